//! Looking at what is there, pinning it and removing names.

use crate::digest::Digest;
use crate::error::{Result, io};
use crate::lookup::Found;
use crate::reference::{Repository, Selector};
use crate::resolve::KindName;
use crate::spec::{Document, Manifest, Platform};
use crate::store::Store;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;

/// One line of `atoll image ls`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageInfo {
    /// `repository:tag`, or `repository@digest` for what has no tag.
    pub name: String,
    pub digest: Digest,
    pub kind: KindName,
    /// Platforms that are here.
    pub platforms: Vec<String>,
    /// Bytes of the blobs, as they would travel.
    pub size: u64,
    /// When it came here, unix seconds.
    pub created: u64,
}

/// Everything about one image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspect {
    pub name: String,
    pub digest: Digest,
    pub media_type: String,
    pub kind: KindName,
    /// All names of this digest.
    pub names: Vec<String>,
    pub size: u64,
    pub created: u64,
    pub manifest: serde_json::Value,
    /// Of this machine's platform, if it is here.
    pub config: Option<serde_json::Value>,
}

/// What `remove` did.
#[derive(Clone, Debug, Serialize)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// Set when no name points at it any more, so that garbage collection takes it.
    pub deleted: Option<Digest>,
}

impl Store {
    /// Every tagged image, and every untagged one that nothing else refers to, sorted by name.
    pub fn list(&self) -> Result<Vec<ImageInfo>> {
        let mut all = Vec::new();
        for repository in self.all_repositories()? {
            let tags = self.tag_records(&repository)?;
            let mut covered: BTreeSet<Digest> = BTreeSet::new();
            for (tag, record) in tags {
                self.cover(&record.digest, &mut covered);
                all.push(self.info(Found { repository: repository.clone(), tag: Some(tag), record })?);
            }
            let records = self.manifest_records(&repository)?;
            for record in &records {
                if covered.contains(&record.digest) {
                    continue;
                }
                if let Ok((Document::Index(_), _)) = self.document(&record.digest, Some(&record.media_type)) {
                    self.cover(&record.digest, &mut covered);
                    all.push(self.info(Found { repository: repository.clone(), tag: None, record: record.clone() })?);
                }
            }
            for record in records.into_iter().filter(|r| !covered.contains(&r.digest) && r.subject.is_none()) {
                all.push(self.info(Found { repository: repository.clone(), tag: None, record })?);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    fn cover(&self, digest: &Digest, covered: &mut BTreeSet<Digest>) {
        covered.insert(*digest);
        if let Ok((Document::Index(index), _)) = self.document(digest, None) {
            covered.extend(index.manifests.iter().map(|m| m.digest));
        }
    }

    fn info(&self, found: Found) -> Result<ImageInfo> {
        let mut info = ImageInfo {
            name: found.name(),
            digest: found.record.digest,
            kind: KindName::Artifact,
            platforms: Vec::new(),
            size: 0,
            created: found.record.created,
        };
        // A damaged image is still listed: it must be possible to see and remove it.
        match self.document(&found.record.digest, Some(&found.record.media_type)) {
            Ok((Document::Manifest(manifest), _)) => self.add_manifest(&manifest, &mut info),
            Ok((Document::Index(index), _)) => {
                for child in index.manifests.iter().filter(|c| !c.is_attestation()) {
                    if let Ok((Document::Manifest(manifest), _)) = self.document(&child.digest, Some(&child.media_type))
                    {
                        self.add_manifest(&manifest, &mut info);
                    }
                }
            }
            Err(e) => tracing::warn!(image = info.name, error = %e.chain(), "image is damaged"),
        }
        info.platforms.sort();
        info.platforms.dedup();
        Ok(info)
    }

    fn add_manifest(&self, manifest: &Manifest, info: &mut ImageInfo) {
        info.kind = KindName::of(manifest);
        info.size += manifest.config.size + manifest.layers.iter().map(|l| l.size).sum::<u64>();
        if let Ok(config) = self.config_of(manifest)
            && !config.architecture.is_empty()
        {
            info.platforms.push(config.platform().to_string());
        }
    }

    pub fn inspect(&self, reference: &str) -> Result<Inspect> {
        let found = self.find(reference)?;
        let bytes = self.blob_read(&found.record.digest, crate::manifest::MANIFEST_LIMIT)?;
        let manifest: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| crate::error::Error::invalid("manifest", e))?;
        let chosen = self.manifest_for(&found, &Platform::host()).ok();
        let config = chosen.and_then(|(_, m)| self.blob_read(&m.config.digest, self.limits().config_bytes).ok());
        let info = self.info(found.clone())?;
        Ok(Inspect {
            name: info.name,
            digest: info.digest,
            media_type: found.record.media_type,
            kind: info.kind,
            names: self.names_of(&info.digest)?,
            size: info.size,
            created: info.created,
            manifest,
            config: config.and_then(|c| serde_json::from_slice(&c).ok()),
        })
    }

    fn names_of(&self, digest: &Digest) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for repository in self.all_repositories()? {
            for (tag, record) in self.tag_records(&repository)? {
                if record.digest == *digest {
                    names.push(format!("{repository}:{tag}"));
                }
            }
        }
        Ok(names)
    }

    /// Gives an image another name.
    pub fn tag(&self, reference: &str, name: &str) -> Result<()> {
        let found = self.find(reference)?;
        let target = crate::reference::Reference::parse(name, self.local_hosts())?;
        let bytes = self.blob_read(&found.record.digest, crate::manifest::MANIFEST_LIMIT)?;
        let document = self.document(&found.record.digest, Some(&found.record.media_type))?.0;
        if let Document::Index(index) = document {
            for child in index.manifests {
                if let Some(record) = self.record_get(&found.repository, &Selector::Digest(child.digest))? {
                    let _lock = self.shared()?;
                    self.record_put(&target.repository, &Selector::Digest(child.digest), &record)?;
                }
            }
        }
        let selector = Selector::Tag(target.tag.unwrap_or_else(|| "latest".into()));
        let optional = crate::manifest::Demand::ChildrenOptional;
        self.manifest_put_demanding(&target.repository, &selector, Some(&found.record.media_type), &bytes, optional)?;
        Ok(())
    }

    /// Removes a name; found by id or digest, all names. What no name of its repository needs any more becomes garbage.
    pub fn remove(&self, reference: &str) -> Result<Removed> {
        let found = self.find(reference)?;
        let digest = found.record.digest;
        let _lock = self.exclusive()?;
        let mut untagged = Vec::new();
        // A tag was named if the words end in it; an id means the image itself.
        let named = crate::reference::Reference::parse(reference, self.local_hosts())
            .is_ok_and(|r| r.digest.is_none() && found.repository.path.ends_with(&r.repository.path));
        match (&found.tag, named) {
            (Some(tag), true) => {
                self.record_delete(&found.repository, &Selector::Tag(tag.clone()))?;
                untagged.push(found.name());
                self.drop_untagged(&found.repository, &digest)?;
            }
            _ => {
                for repository in self.all_repositories()? {
                    for (tag, record) in self.tag_records(&repository)? {
                        if record.digest == digest {
                            self.record_delete(&repository, &Selector::Tag(tag.clone()))?;
                            untagged.push(format!("{repository}:{tag}"));
                        }
                    }
                    self.drop_untagged(&repository, &digest)?;
                }
            }
        }
        let mut still = false;
        for repository in self.all_repositories()? {
            still |= self.record_get(&repository, &Selector::Digest(digest))?.is_some();
        }
        Ok(Removed { untagged, deleted: (!still).then_some(digest) })
    }

    /// Takes a manifest, its children and what is about it out of a repository, unless a tag there still needs them.
    fn drop_untagged(&self, repository: &Repository, digest: &Digest) -> Result<()> {
        let mut needed = BTreeSet::new();
        for (_, record) in self.tag_records(repository)? {
            self.cover(&record.digest, &mut needed);
        }
        let mut gone = BTreeSet::new();
        self.cover(digest, &mut gone);
        gone.retain(|d| !needed.contains(d));
        for record in self.manifest_records(repository)? {
            if gone.contains(&record.digest) || record.subject.is_some_and(|s| gone.contains(&s)) {
                self.record_delete(repository, &Selector::Digest(record.digest))?;
            }
        }
        Ok(())
    }

    /// Keeps an image from garbage collection while `owner` (a pod's uid, say) uses it. An owner may pin several.
    pub fn pin(&self, owner: &str, digest: &Digest) -> Result<()> {
        let _lock = self.shared()?;
        let dir = self.pin_dir(owner)?;
        crate::store::make_dir(&dir, 0o700)?;
        self.write_file(&dir.join(digest.hex()), b"")
    }

    /// Lets go of everything an owner pinned.
    pub fn unpin(&self, owner: &str) -> Result<()> {
        let _lock = self.exclusive()?;
        let dir = self.pin_dir(owner)?;
        match fs::remove_dir_all(&dir) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(io("remove", &dir)(e)),
        }
    }

    /// Owners that have pins, for an agent to let go of those that are gone.
    pub fn pin_owners(&self) -> Result<Vec<String>> {
        let dir = self.root().join("pins");
        let entries = fs::read_dir(&dir).map_err(io("list", &dir))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
    }

    fn pin_dir(&self, owner: &str) -> Result<std::path::PathBuf> {
        let fine = (1..=200).contains(&owner.len())
            && !owner.starts_with('.')
            && owner.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !fine {
            return Err(crate::error::Error::invalid(
                format!("pin owner {owner:?}"),
                "letters, digits, `.`, `_`, `-` only",
            ));
        }
        Ok(self.root().join("pins").join(owner))
    }
}
