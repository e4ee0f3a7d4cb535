//! From a name to what can be run.

use crate::digest::Digest;
use crate::disk::DiskImage;
use crate::error::{Error, Result, io};
use crate::jailed::Input;
use crate::lookup::Found;
use crate::spec::{ImageConfig, Manifest, Platform, media};
use crate::store::Store;
use crate::unpack::{guarded, sniff};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, getxattr, openat2, readlinkat, statat};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// An image, ready to run: its layers are unpacked.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Digest of the manifest (of this platform).
    pub digest: Digest,
    /// The name it was found by: `repository:tag`, or `repository@digest`.
    pub reference: String,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Container {
        config: Box<ImageConfig>,
        /// Unpacked layers, lowest first.
        layers: Vec<PathBuf>,
    },
    Component {
        path: PathBuf,
        digest: Digest,
    },
    Disk(DiskImage),
}

/// What an image is, without the particulars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KindName {
    Container,
    Component,
    Disk,
    /// A signature, a bill of materials, a chart: kept and served, not run.
    Artifact,
}

impl KindName {
    pub fn as_str(self) -> &'static str {
        match self {
            KindName::Container => "container image",
            KindName::Component => "WebAssembly component",
            KindName::Disk => "disk",
            KindName::Artifact => "artifact that is not run",
        }
    }

    pub(crate) fn of(manifest: &Manifest) -> KindName {
        let layer = |t: &str| manifest.layers.first().is_some_and(|l| l.media_type.starts_with(t));
        match manifest.config.media_type.as_str() {
            media::WASM_CONFIG => KindName::Component,
            media::DISK_CONFIG => KindName::Disk,
            _ if layer(media::WASM_LAYER) => KindName::Component,
            _ if layer(media::DISK_RAW) || layer(media::DISK_QCOW2) => KindName::Disk,
            media::OCI_CONFIG | media::DOCKER_CONFIG => KindName::Container,
            _ => KindName::Artifact,
        }
    }
}

/// Symbolic links followed in one look-up, as the kernel's own limit.
const LINKS: usize = 40;

impl Store {
    /// Finds an image by tag, name, digest or id prefix and makes it ready: layers that are not unpacked yet are, so
    /// the first call after a push may take a while.
    ///
    /// What was resolved stays for the grace period of garbage collection; to keep it longer, [`Store::pin`] it.
    pub fn resolve(&self, reference: &str) -> Result<Resolved> {
        self.resolve_for(reference, &Platform::host())
    }

    pub fn resolve_for(&self, reference: &str, wanted: &Platform) -> Result<Resolved> {
        let found = self.find(reference)?;
        let (digest, manifest) = self.manifest_for(&found, wanted)?;
        self.blob_claim(&digest)?;
        let kind = match KindName::of(&manifest) {
            KindName::Container => self.container(&found, &manifest, wanted)?,
            KindName::Component => self.component(&found, &manifest)?,
            KindName::Disk => Kind::Disk(self.disk(&found, &manifest)?),
            other @ KindName::Artifact => {
                return Err(Error::WrongKind {
                    reference: found.name(),
                    found: other.as_str(),
                    wanted: "container image, component or disk",
                });
            }
        };
        Ok(Resolved { digest, reference: found.name(), kind })
    }

    pub(crate) fn config_of(&self, manifest: &Manifest) -> Result<ImageConfig> {
        let bytes = self.blob_read(&manifest.config.digest, self.limits().config_bytes)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::invalid(format!("image configuration {}", manifest.config.digest), e))
    }

    fn container(&self, found: &Found, manifest: &Manifest, wanted: &Platform) -> Result<Kind> {
        let config = self.config_of(manifest)?;
        let own = config.platform();
        if !own.architecture.is_empty() && !own.satisfies(&Platform { variant: None, ..wanted.clone() }) {
            return Err(Error::Platform {
                reference: found.name(),
                wanted: wanted.to_string(),
                available: own.to_string(),
            });
        }
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::invalid(
                found.name(),
                format!("its manifest has {} layers, its configuration {}", manifest.layers.len(), diff_ids.len()),
            ));
        }
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (diff_id, layer) in diff_ids.iter().zip(&manifest.layers) {
            self.ensure_layer(diff_id, &layer.digest)?;
            layers.push(self.layer_dir(diff_id).join("fs"));
        }
        Ok(Kind::Container { config: Box::new(config), layers })
    }

    fn component(&self, found: &Found, manifest: &Manifest) -> Result<Kind> {
        let layer = manifest
            .layers
            .iter()
            .find(|l| l.media_type == media::WASM_LAYER)
            .ok_or_else(|| Error::invalid(found.name(), "it has no application/wasm layer"))?;
        self.blob_claim(&layer.digest)?.ok_or(Error::BlobUnknown(layer.digest))?;
        Ok(Kind::Component { path: self.blob_path(&layer.digest), digest: layer.digest })
    }

    fn disk(&self, found: &Found, manifest: &Manifest) -> Result<DiskImage> {
        let [layer] = manifest.layers.as_slice() else {
            return Err(Error::invalid(found.name(), "a disk is an image of exactly one layer"));
        };
        self.blob_claim(&layer.digest)?.ok_or(Error::BlobUnknown(layer.digest))?;
        let compressed = ["+gzip", "+zstd"].iter().any(|s| layer.media_type.ends_with(s));
        let path = if compressed { self.decompressed_disk(&layer.digest)? } else { self.blob_path(&layer.digest) };
        DiskImage::probe(&path)
    }

    fn decompressed_disk(&self, blob: &Digest) -> Result<PathBuf> {
        let path = self.root().join("disks").join(blob.hex());
        let name = format!("disk-{}", blob.hex());
        let lock = self.named_lock(&name)?;
        if !path.exists() {
            let mut opened = self.blob_open(blob)?.ok_or(Error::BlobUnknown(*blob))?;
            let bad = |why: String| Error::Archive { layer: blob.to_string(), why };
            let compression = sniff(&mut opened.file).map_err(io("read", &path))?.map_err(|why| bad(why.to_owned()))?;
            let reader = guarded(Input::File(opened.file), compression, self.limits(), self.roles())
                .map_err(|e| bad(e.to_string()))?;
            let mut writer = self.blob_writer()?;
            std::io::copy(&mut { reader }, &mut writer).map_err(|e| bad(e.to_string()))?;
            let (content, _) = writer.commit(None)?;
            fs::hard_link(self.blob_path(&content), &path).map_err(io("link", &path))?;
            crate::store::sync_dir(&self.root().join("disks"))?;
        }
        crate::blob::touch(&path)?;
        self.forget_lock(&name, lock);
        Ok(path)
    }

    /// The disk of an image: a disk artifact, or the one file in `/disk` of a container image (KubeVirt's
    /// `containerDisk`). `path` names a file explicitly.
    pub fn disk_image(&self, reference: &str, path: Option<&str>) -> Result<DiskImage> {
        let resolved = self.resolve(reference)?;
        let layers = match (&resolved.kind, path) {
            (Kind::Disk(disk), None) => return Ok(disk.clone()),
            (Kind::Container { .. }, Some(path)) => return DiskImage::probe(&self.file_in_image(reference, path)?),
            (Kind::Container { layers, .. }, None) => layers,
            (Kind::Disk(_) | Kind::Component { .. }, _) => {
                let found = KindName::from(&resolved.kind).as_str();
                return Err(Error::WrongKind {
                    reference: reference.into(),
                    found,
                    wanted: "container image with /disk",
                });
            }
        };
        let mut names: Vec<String> = Vec::new();
        for layer in layers {
            let Ok(entries) = fs::read_dir(layer.join("disk")) else { continue };
            names.extend(entries.flatten().filter_map(|e| e.file_name().into_string().ok()));
        }
        names.sort();
        names.dedup();
        let disks: Vec<PathBuf> =
            names.iter().filter_map(|n| self.file_in_image(reference, &format!("/disk/{n}")).ok()).collect();
        match disks.as_slice() {
            [disk] => DiskImage::probe(disk),
            [] => Err(Error::NoFile { reference: reference.into(), path: "/disk/*".into() }),
            _ => Err(Error::invalid(
                reference,
                format!("it has several files in /disk ({}); name one", names.join(", ")),
            )),
        }
    }

    /// A regular file of a container image, as a container would see it at `path`: upper layers first, whiteouts
    /// observed, symbolic links followed within the image. The result contains no symbolic link.
    pub fn file_in_image(&self, reference: &str, path: &str) -> Result<PathBuf> {
        let resolved = self.resolve(reference)?;
        let Kind::Container { layers, .. } = &resolved.kind else {
            let found = KindName::from(&resolved.kind).as_str();
            return Err(Error::WrongKind { reference: reference.into(), found, wanted: "container image" });
        };
        let none = || Error::NoFile { reference: reference.to_owned(), path: path.to_owned() };
        let mut merged = Vec::new();
        for layer in layers.iter().rev() {
            merged.push((layer.clone(), crate::store::open_dir(layer)?));
        }
        look_up(&merged, path).ok_or_else(none)
    }
}

impl From<&Kind> for KindName {
    fn from(kind: &Kind) -> KindName {
        match kind {
            Kind::Container { .. } => KindName::Container,
            Kind::Component { .. } => KindName::Component,
            Kind::Disk(_) => KindName::Disk,
        }
    }
}

/// Walks a path through layers, topmost first.
fn look_up(layers: &[(PathBuf, OwnedFd)], path: &str) -> Option<PathBuf> {
    let mut todo: VecDeque<OsString> = names(Path::new(path))?;
    let mut done = PathBuf::new();
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            done.pop();
            continue;
        }
        let here = done.join(&name);
        let (layer, fd, kind) = top_most(layers, &here)?;
        match kind {
            FileType::Directory => done = here,
            FileType::Symlink => {
                links += 1;
                let parent = open_beneath(fd, &done)?;
                let target = readlinkat(parent, name.as_os_str(), Vec::new()).ok()?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if links > LINKS {
                    return None;
                }
                if target.is_absolute() {
                    done = PathBuf::new();
                }
                for part in names(&target)?.into_iter().rev() {
                    todo.push_front(part);
                }
            }
            FileType::RegularFile => return todo.is_empty().then(|| layer.join(here)),
            _ => return None,
        }
    }
    None
}

fn names(path: &Path) -> Option<VecDeque<OsString>> {
    if path.as_os_str().len() > 4096 {
        return None;
    }
    Some(
        path.components()
            .filter_map(|c| match c {
                Component::Normal(name) => Some(name.to_owned()),
                Component::ParentDir => Some("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
            })
            .collect(),
    )
}

/// The uppermost layer that has a path, unless one above hides it.
fn top_most<'a>(layers: &'a [(PathBuf, OwnedFd)], path: &Path) -> Option<(&'a Path, &'a OwnedFd, FileType)> {
    for (dir, fd) in layers {
        let parent = path.parent().unwrap_or(Path::new(""));
        if let Some(opened) = open_beneath(fd, parent)
            && let Some(name) = path.file_name()
            && let Ok(stat) = statat(&opened, name, AtFlags::SYMLINK_NOFOLLOW)
        {
            return match FileType::from_raw_mode(stat.st_mode) {
                FileType::CharacterDevice => None,
                kind => Some((dir, fd, kind)),
            };
        }
        // A directory above it that is opaque or not a directory here hides what is below.
        for ancestor in parent.ancestors() {
            let full = dir.join(ancestor);
            let Ok(metadata) = fs::symlink_metadata(&full) else { continue };
            let opaque = getxattr(&full, "trusted.overlay.opaque", &mut [0u8; 4]).is_ok();
            if !metadata.is_dir() || opaque {
                return None;
            }
        }
    }
    None
}

fn open_beneath(root: &OwnedFd, path: &Path) -> Option<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve).ok()
}

/// Whether a file begins like a WebAssembly component (component-model, Binary.md: layer 1).
pub(crate) fn check_component(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut head = [0u8; 8];
    let n = file.read_at(&mut head, 0).map_err(io("read", path))?;
    let unrecognised = |why: &str| Err(Error::Unrecognised { path: path.to_path_buf(), why: why.to_owned() });
    match head {
        [0, b'a', b's', b'm', _, _, 1, 0] if n == 8 => Ok(()),
        [0, b'a', b's', b'm', 1, 0, 0, 0] if n == 8 => {
            unrecognised("it is a core WebAssembly module, not a component; make one with `wasm-tools component new`")
        }
        _ => unrecognised("it is not a WebAssembly component"),
    }
}
