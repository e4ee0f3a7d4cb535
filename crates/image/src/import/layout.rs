//! OCI image layouts: a directory, or the same in a tar.

use super::archive::Source;
use super::{ImportOptions, Imported};
use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::lookup::choose;
use crate::manifest::{Demand, MANIFEST_LIMIT};
use crate::reference::{Reference, Selector};
use crate::resolve::KindName;
use crate::spec::{Descriptor, Document, Index, Manifest, Platform};
use crate::store::{Progress, ProgressFn, Store};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A layout directory; nothing outside it is read, whatever links it holds.
pub(crate) struct DirSource {
    root: OwnedFd,
}

impl DirSource {
    pub fn open(path: &Path) -> Result<DirSource> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(io("open", path))?;
        let source = DirSource { root };
        if source.open("index.json")?.is_none() {
            return Err(Error::Unrecognised {
                path: path.to_path_buf(),
                why: "a directory without index.json is no OCI layout; to import a root file system, pack it with `tar -C DIR -cf FILE .`".into(),
            });
        }
        Ok(source)
    }
}

impl Source for DirSource {
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match openat2(&self.root, name, flags, Mode::empty(), resolve) {
            Ok(fd) => {
                let file = File::from(fd);
                let metadata = file.metadata().map_err(io("stat", name))?;
                if !metadata.is_file() {
                    return Err(Error::invalid(name, "it is not a regular file"));
                }
                Ok(Some((Box::new(file), metadata.len())))
            }
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(io("open", name)(e)),
        }
    }
}

/// One image of a layout.
struct Chosen {
    descriptor: Descriptor,
    name: Option<Reference>,
}

impl Store {
    pub(crate) fn import_layout(
        &self,
        source: impl Source,
        path: &Path,
        options: &ImportOptions,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let what = path.display().to_string();
        let bytes = source.read("index.json", MANIFEST_LIMIT)?.unwrap_or_default();
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{what}: index.json"), e))?;
        let chosen = self.choose_images(&index, &what, options)?;
        if chosen.len() > 1 && options.tag.is_some() {
            return Err(Error::invalid(
                what,
                format!("it has {} images; one --tag cannot name them all", chosen.len()),
            ));
        }
        let mut result: Option<Imported> = None;
        for image in chosen {
            let names = self.names_for(options, path, image.name.into_iter().collect())?;
            let imported = self.import_tree(&source, &image.descriptor, &names, &options.wanted(), progress)?;
            match &mut result {
                Some(all) => all.names.extend(imported.names),
                None => result = Some(imported),
            }
        }
        result.ok_or_else(|| Error::invalid(what, "its index.json lists no image"))
    }

    /// Several entries of `index.json` are either one image for several platforms or several images with names.
    fn choose_images(&self, index: &Index, what: &str, options: &ImportOptions) -> Result<Vec<Chosen>> {
        let name_of = |d: &Descriptor| self.name_in_layout(d);
        if let [one] = index.manifests.as_slice() {
            return Ok(vec![Chosen { descriptor: one.clone(), name: name_of(one)? }]);
        }
        let mut named = Vec::new();
        for descriptor in &index.manifests {
            named.push((descriptor, name_of(descriptor)?.map(|n| n.to_string())));
        }
        let first = named.first().and_then(|(_, n)| n.clone());
        let one_image = named.iter().all(|(d, n)| d.platform.is_some() && *n == first);
        if one_image && !named.is_empty() {
            let child = choose(what, &index.manifests, &options.wanted())?;
            return Ok(vec![Chosen { descriptor: child.clone(), name: name_of(child)? }]);
        }
        index
            .manifests
            .iter()
            .map(|d| match name_of(d)? {
                Some(name) => Ok(Chosen { descriptor: d.clone(), name: Some(name) }),
                None => Err(Error::invalid(what, format!("it has several images, and {} has no name", d.digest))),
            })
            .collect()
    }

    /// Docker and containerd write the whole name in one annotation, and only the tag in the other.
    fn name_in_layout(&self, descriptor: &Descriptor) -> Result<Option<Reference>> {
        let full = descriptor.annotations.get("io.containerd.image.name");
        let short = descriptor.annotations.get("org.opencontainers.image.ref.name");
        if let Some(name) = full {
            return Reference::parse(name, self.local_hosts()).map(Some);
        }
        // A bare tag ("latest", "1.0") names nothing.
        match short.filter(|s| s.contains([':', '/'])) {
            Some(name) => Reference::parse(name, self.local_hosts()).map(Some),
            None => Ok(None),
        }
    }

    /// Copies an image with all that is there of it, and unpacks the wanted platform's layers.
    fn import_tree(
        &self,
        source: &impl Source,
        root: &Descriptor,
        names: &[Reference],
        wanted: &Platform,
        progress: ProgressFn,
    ) -> Result<Imported> {
        let bytes = read_verified(source, root)?;
        let shown = names.first().map(Reference::to_string).unwrap_or_default();
        match Document::parse(Some(&root.media_type), &bytes)?.0 {
            Document::Manifest(manifest) => {
                self.import_blobs(source, &manifest, progress)?;
                self.check_and_unpack(&shown, &manifest, wanted, progress)?;
                self.put_names(names, &root.media_type, &bytes)?;
                let names = names.iter().map(Reference::to_string).collect();
                Ok(Imported { names, digest: root.digest, kind: KindName::of(&manifest), machine: None })
            }
            Document::Index(index) => {
                let chosen = choose(&shown, &index.manifests, wanted)?.digest;
                let mut kind = KindName::Artifact;
                for child in &index.manifests {
                    if source.open(&blob_name(&child.digest))?.is_none() && child.digest != chosen {
                        continue;
                    }
                    let bytes = read_verified(source, child)?;
                    let Document::Manifest(manifest) = Document::parse(Some(&child.media_type), &bytes)?.0 else {
                        return Err(Error::invalid(shown, "an index within an index of an index"));
                    };
                    self.import_blobs(source, &manifest, progress)?;
                    if child.digest == chosen {
                        kind = KindName::of(&manifest);
                        self.check_and_unpack(&shown, &manifest, wanted, progress)?;
                    }
                    for name in names {
                        let selector = Selector::Digest(child.digest);
                        self.manifest_put_demanding(
                            &name.repository,
                            &selector,
                            Some(&child.media_type),
                            &bytes,
                            Demand::Everything,
                        )?;
                    }
                }
                self.put_names(names, &root.media_type, &bytes)?;
                Ok(Imported {
                    names: names.iter().map(Reference::to_string).collect(),
                    digest: root.digest,
                    kind,
                    machine: None,
                })
            }
        }
    }

    fn import_blobs(&self, source: &impl Source, manifest: &Manifest, progress: ProgressFn) -> Result<()> {
        if manifest.layers.len() > self.limits().layers {
            return Err(Error::invalid("manifest", format!("more than {} layers", self.limits().layers)));
        }
        let count = manifest.layers.len();
        for (number, blob) in std::iter::once(&manifest.config).chain(&manifest.layers).enumerate() {
            if blob.is_foreign() || self.blob_claim(&blob.digest)? == Some(blob.size) {
                continue;
            }
            let label = if number == 0 { "configuration".to_owned() } else { format!("layer {number} of {count}") };
            let missing =
                || Error::invalid(label.clone(), format!("{} is not in the layout; it is incomplete", blob.digest));
            let (reader, _) = source.open(&blob_name(&blob.digest))?.ok_or_else(missing)?;
            self.blob_copy(&label, reader, Some((blob.digest, blob.size)), |done| {
                progress(Progress::Bytes { what: label.clone(), done, total: Some(blob.size) });
            })?;
        }
        Ok(())
    }

    /// Refuses another platform's container image and unpacks this one's layers.
    pub(crate) fn check_and_unpack(
        &self,
        shown: &str,
        manifest: &Manifest,
        wanted: &Platform,
        progress: ProgressFn,
    ) -> Result<()> {
        if KindName::of(manifest) != KindName::Container {
            return Ok(());
        }
        let config = self.config_of(manifest)?;
        if !config.platform().satisfies(&Platform { variant: None, ..wanted.clone() }) {
            return Err(Error::Platform {
                reference: shown.to_owned(),
                wanted: wanted.to_string(),
                available: config.platform().to_string(),
            });
        }
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::invalid(
                shown,
                format!("{} layers for {} diff ids", manifest.layers.len(), diff_ids.len()),
            ));
        }
        for (number, (diff_id, layer)) in diff_ids.iter().zip(&manifest.layers).enumerate() {
            progress(Progress::Step(format!("unpacking layer {} of {}", number + 1, diff_ids.len())));
            self.ensure_layer(diff_id, &layer.digest)?;
        }
        Ok(())
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn read_verified(source: &impl Source, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let name = blob_name(&descriptor.digest);
    let bytes = source
        .read(&name, MANIFEST_LIMIT)?
        .ok_or_else(|| Error::invalid(name.clone(), "it is not in the layout; it is incomplete"))?;
    let actual = Digest::of(&bytes);
    if actual != descriptor.digest {
        return Err(Error::DigestMismatch { what: name, expected: descriptor.digest, actual });
    }
    if bytes.len() as u64 != descriptor.size {
        return Err(Error::SizeMismatch { what: name, expected: descriptor.size, actual: bytes.len() as u64 });
    }
    Ok(bytes)
}
