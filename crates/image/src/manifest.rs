//! Manifests and indexes: how they come in, are found and leave.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::{Repository, Selector};
use crate::refs::Record;
use crate::spec::{Descriptor, Document};
use crate::store::Store;
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest manifest taken, in bytes (distribution spec 1.1: at least 4 MiB should be).
pub const MANIFEST_LIMIT: u64 = 4 << 20;

/// A manifest as the registry serves it.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    pub digest: Digest,
    pub media_type: String,
    pub bytes: Vec<u8>,
}

/// Which of the blobs a manifest names must be here already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demand {
    /// All: what a registry client pushes.
    Everything,
    /// Children of an index may be absent: only one platform was pulled.
    ChildrenOptional,
}

impl Store {
    /// Takes a manifest or index into a repository. What it names must be here.
    pub fn manifest_put(
        &self,
        repository: &Repository,
        selector: &Selector,
        media_type: Option<&str>,
        bytes: &[u8],
    ) -> Result<StoredManifest> {
        self.manifest_put_demanding(repository, selector, media_type, bytes, Demand::Everything)
    }

    pub(crate) fn manifest_put_demanding(
        &self,
        repository: &Repository,
        selector: &Selector,
        media_type: Option<&str>,
        bytes: &[u8],
        demand: Demand,
    ) -> Result<StoredManifest> {
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(Error::TooLarge { what: "manifest".into(), limit: MANIFEST_LIMIT });
        }
        let digest = Digest::of(bytes);
        if let Selector::Digest(expected) = selector
            && *expected != digest
        {
            return Err(Error::DigestMismatch { what: "manifest".into(), expected: *expected, actual: digest });
        }
        let (document, media_type) = Document::parse(media_type, bytes)?;
        self.blob_put(bytes)?;
        let record = Record {
            digest,
            media_type: media_type.clone(),
            size: bytes.len() as u64,
            created: now(),
            subject: document.subject().map(|s| s.digest),
        };
        let _lock = self.shared()?;
        self.blob_claim_locked(&digest)?.ok_or(Error::BlobUnknown(digest))?;
        self.claim_named(&document, demand)?;
        self.record_put(repository, &Selector::Digest(digest), &record)?;
        if let Selector::Tag(_) = selector {
            self.record_put(repository, selector, &record)?;
        }
        Ok(StoredManifest { digest, media_type, bytes: bytes.to_vec() })
    }

    /// Claims every blob a document names, under the caller's shared lock.
    fn claim_named(&self, document: &Document, demand: Demand) -> Result<()> {
        let claim = |what, descriptor: &Descriptor, optional: bool| match self.blob_claim_locked(&descriptor.digest)? {
            Some(size) if size != descriptor.size => Err(Error::SizeMismatch {
                what: format!("{what} {}", descriptor.digest),
                expected: descriptor.size,
                actual: size,
            }),
            None if !optional => Err(Error::MissingReferenced { what, digest: descriptor.digest }),
            Some(_) | None => Ok(()),
        };
        match document {
            Document::Manifest(manifest) => {
                if manifest.layers.len() > self.limits().layers {
                    return Err(Error::invalid("manifest", format!("more than {} layers", self.limits().layers)));
                }
                claim("config", &manifest.config, false)?;
                for layer in &manifest.layers {
                    claim("layer", layer, layer.is_foreign())?;
                }
            }
            Document::Index(index) => {
                for child in &index.manifests {
                    claim("manifest", child, demand == Demand::ChildrenOptional)?;
                }
            }
        }
        Ok(())
    }

    /// A manifest of a repository by tag or digest.
    pub fn manifest_get(&self, repository: &Repository, selector: &Selector) -> Result<Option<StoredManifest>> {
        let Some(record) = self.record_get(repository, selector)? else { return Ok(None) };
        let bytes = self.blob_read(&record.digest, MANIFEST_LIMIT)?;
        Ok(Some(StoredManifest { digest: record.digest, media_type: record.media_type, bytes }))
    }

    /// Deletes a tag, or a manifest with every tag of this repository that points at it. Whether it was there.
    pub fn manifest_delete(&self, repository: &Repository, selector: &Selector) -> Result<bool> {
        let _lock = self.exclusive()?;
        if let Selector::Digest(digest) = selector {
            for (tag, record) in self.tag_records(repository)? {
                if record.digest == *digest {
                    self.record_delete(repository, &Selector::Tag(tag))?;
                }
            }
        }
        self.record_delete(repository, selector)
    }

    /// Manifests of a repository whose `subject` is the given digest, as the referrers API lists them.
    pub fn referrers(&self, repository: &Repository, subject: &Digest) -> Result<Vec<Descriptor>> {
        let mut found = Vec::new();
        for record in self.manifest_records(repository)? {
            if record.subject != Some(*subject) {
                continue;
            }
            let bytes = self.blob_read(&record.digest, MANIFEST_LIMIT)?;
            let (document, _) = Document::parse(Some(&record.media_type), &bytes)?;
            let (artifact_type, annotations) = match document {
                Document::Manifest(m) => (m.artifact_type.unwrap_or(m.config.media_type), m.annotations),
                Document::Index(i) => (i.artifact_type.unwrap_or_default(), i.annotations),
            };
            let mut descriptor = Descriptor::new(&record.media_type, record.digest, record.size);
            descriptor.artifact_type = Some(artifact_type).filter(|t| !t.is_empty());
            descriptor.annotations = annotations;
            found.push(descriptor);
        }
        found.sort_by_key(|d| d.digest);
        Ok(found)
    }

    /// Reads a manifest or index that is here, whatever repository it belongs to.
    pub(crate) fn document(&self, digest: &Digest, media_type: Option<&str>) -> Result<(Document, String)> {
        let bytes = self.blob_read(digest, MANIFEST_LIMIT)?;
        Document::parse(media_type, &bytes)
    }
}

/// Unix seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
