//! Writing an image as an OCI layout in one tar, for other tools and other machines.

use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::manifest::MANIFEST_LIMIT;
use crate::spec::{Descriptor, Document, Index, Platform, media};
use crate::store::{Progress, ProgressFn, Store};
use crate::tar::Builder;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What an image consists of, each part once.
pub(crate) struct Exported {
    pub root: Descriptor,
    /// Indexes before what they name.
    pub manifests: Vec<Descriptor>,
    pub blobs: Vec<Descriptor>,
}

impl Store {
    /// Exports to a file: temporary name, synced, renamed. An index of which some platforms are missing here is
    /// exported as this machine's image alone.
    pub fn export(&self, reference: &str, to: &Path, progress: ProgressFn) -> Result<Digest> {
        let found = self.find(reference)?;
        let Exported { root, manifests, blobs } = self.exported(&found)?;
        let blobs: Vec<Digest> = manifests.iter().chain(&blobs).map(|d| d.digest).collect();
        let mut named = root.clone();
        named
            .annotations
            .insert("org.opencontainers.image.ref.name".into(), found.tag.clone().unwrap_or_else(|| "latest".into()));
        named.annotations.insert("io.containerd.image.name".into(), found.name());
        let index = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.into()),
            artifact_type: None,
            manifests: vec![named],
            subject: None,
            annotations: Default::default(),
        };
        let index = serde_json::to_vec(&index).map_err(|e| Error::invalid("index", e))?;

        let mut temporary = to.as_os_str().to_owned();
        temporary.push(format!(".{}.part", std::process::id()));
        let temporary = Path::new(&temporary);
        let result = self.write_layout(temporary, &index, &blobs, progress);
        let renamed = result.and_then(|()| fs::rename(temporary, to).map_err(io("rename into place", to)));
        if let Err(e) = renamed {
            let _ = fs::remove_file(temporary);
            return Err(e);
        }
        Ok(root.digest)
    }

    /// All of an image, or where some platforms of an index are missing here, this machine's image alone.
    pub(crate) fn exported(&self, found: &crate::lookup::Found) -> Result<Exported> {
        let whole = Descriptor::new(&found.record.media_type, found.record.digest, found.record.size);
        if let Ok(exported) = self.gather(&whole) {
            return Ok(exported);
        }
        let (digest, manifest) = self.manifest_for(found, &Platform::host())?;
        let bytes = self.blob_read(&digest, MANIFEST_LIMIT)?;
        let kind = manifest.media_type.as_deref().unwrap_or(media::OCI_MANIFEST);
        self.gather(&Descriptor::of(kind, &bytes))
    }

    fn gather(&self, root: &Descriptor) -> Result<Exported> {
        let mut exported = Exported { root: root.clone(), manifests: Vec::new(), blobs: Vec::new() };
        let mut seen = BTreeSet::new();
        let mut todo = vec![root.clone()];
        while let Some(descriptor) = todo.pop() {
            if !seen.insert(descriptor.digest) {
                continue;
            }
            self.blob_claim(&descriptor.digest)?.ok_or(Error::BlobUnknown(descriptor.digest))?;
            match self.document(&descriptor.digest, Some(&descriptor.media_type))?.0 {
                Document::Manifest(manifest) => {
                    for blob in manifest.layers.into_iter().filter(|l| !l.is_foreign()).chain([manifest.config]) {
                        self.blob_claim(&blob.digest)?.ok_or(Error::BlobUnknown(blob.digest))?;
                        if seen.insert(blob.digest) {
                            exported.blobs.push(blob);
                        }
                    }
                }
                Document::Index(index) => todo.extend(index.manifests),
            }
            exported.manifests.push(descriptor);
        }
        Ok(exported)
    }

    fn write_layout(&self, to: &Path, index: &[u8], blobs: &[Digest], progress: ProgressFn) -> Result<()> {
        let file =
            File::options().write(true).create(true).truncate(true).mode(0o644).open(to).map_err(io("create", to))?;
        let failed = || io::<std::io::Error>("write", to);
        let mut builder = Builder::new(BufWriter::with_capacity(1 << 20, file));
        let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
        builder.file("oci-layout", layout.len() as u64, &layout[..]).map_err(failed())?;
        builder.file("index.json", index.len() as u64, index).map_err(failed())?;
        builder.directory("blobs").map_err(failed())?;
        builder.directory("blobs/sha256").map_err(failed())?;
        for (done, digest) in blobs.iter().enumerate() {
            progress(Progress::Step(format!("writing blob {} of {}", done + 1, blobs.len())));
            let blob = self.blob_open(digest)?.ok_or(Error::BlobUnknown(*digest))?;
            builder.file(&format!("blobs/sha256/{}", digest.hex()), blob.size, blob.file).map_err(failed())?;
        }
        let file = builder.finish().map_err(failed())?.into_inner().map_err(|e| io("write", to)(e.into_error()))?;
        file.sync_all().map_err(failed())
    }
}
