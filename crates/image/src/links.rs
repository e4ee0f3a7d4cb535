//! Which blobs a repository of the built-in registry may serve: those its manifests name, and those that were sent or
//! mounted to it lately and that no manifest names yet. The latter are links, empty files `_blobs/HEX`, that garbage
//! collection takes once they are old.

use crate::digest::Digest;
use crate::error::{Result, io};
use crate::reference::{Repository, Selector};
use crate::refs::subdirectories;
use crate::spec::Document;
use crate::store::{Store, make_dir};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

impl Store {
    fn link_path(&self, repository: &Repository, digest: &Digest) -> PathBuf {
        self.repository_dir(repository).join("_blobs").join(digest.hex())
    }

    /// Makes a blob part of a repository until a manifest there names it. Not synced by itself: the sync of the blob's
    /// own directory follows, and a link lost to a power failure costs a client one upload.
    pub fn blob_link(&self, repository: &Repository, digest: &Digest) -> Result<()> {
        let path = self.link_path(repository, digest);
        let _lock = self.shared()?;
        make_dir(path.parent().unwrap_or(Path::new("")), 0o700)?;
        File::options().write(true).create(true).truncate(true).open(&path).map(drop).map_err(io("create", &path))
    }

    /// Whether a blob that is here belongs to a repository.
    pub fn blob_in(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        if self.link_path(repository, digest).exists() {
            return Ok(true);
        }
        let named = self.blob_is_named(repository, digest)?;
        if named {
            self.blob_link(repository, digest)?;
        }
        Ok(named)
    }

    /// Whether a manifest of the repository names the blob, or is it.
    pub fn blob_is_named(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        if self.record_get(repository, &Selector::Digest(*digest))?.is_some() {
            return Ok(true);
        }
        for record in self.manifest_records(repository)? {
            let Ok((Document::Manifest(manifest), _)) = self.document(&record.digest, Some(&record.media_type)) else {
                continue;
            };
            if manifest.config.digest == *digest || manifest.layers.iter().any(|l| l.digest == *digest) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes a blob out of a repository whose manifests do not name it. Whether it was there.
    pub fn blob_unlink(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        let path = self.link_path(repository, digest);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(io("remove", &path)(e)),
        }
    }

    /// Whether the repository has this manifest.
    pub fn manifest_in(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        Ok(self.record_get(repository, &Selector::Digest(*digest))?.is_some())
    }

    /// What a tag points at.
    pub fn tag_digest(&self, repository: &Repository, tag: &str) -> Result<Option<Digest>> {
        Ok(self.record_get(repository, &Selector::Tag(tag.to_owned()))?.map(|r| r.digest))
    }

    /// Tags of a repository that point at a manifest.
    pub fn tags_of(&self, repository: &Repository, digest: &Digest) -> Result<Vec<String>> {
        let all = self.tag_records(repository)?;
        Ok(all.into_iter().filter(|(_, r)| r.digest == *digest).map(|(tag, _)| tag).collect())
    }

    /// Takes links older than `age`, and the directories that then hold nothing.
    pub(crate) fn sweep_links(&self, age: Duration) -> Result<()> {
        let _lock = self.exclusive()?;
        for (_, host) in subdirectories(&self.root().join("refs"))? {
            sweep(&host, age)?;
        }
        Ok(())
    }
}

fn sweep(dir: &Path, age: Duration) -> Result<()> {
    for (name, path) in subdirectories(dir)? {
        if name == "_blobs" {
            for entry in fs::read_dir(&path).map_err(io("list", &path))?.flatten() {
                if crate::gc::is_older(&entry.path(), age) {
                    let _ = fs::remove_file(entry.path());
                }
            }
        } else if !name.starts_with('_') {
            sweep(&path, age)?;
        }
        if name == "_blobs" || !name.starts_with('_') {
            let _ = fs::remove_dir(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_a_lease_that_a_manifest_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (ours, other) = (Repository::local("a/b").unwrap(), Repository::local("a").unwrap());
        let digest = store.blob_put(b"{}").unwrap();
        assert!(!store.blob_in(&ours, &digest).unwrap());
        store.blob_link(&ours, &digest).unwrap();
        assert!(store.blob_in(&ours, &digest).unwrap() && !store.blob_in(&other, &digest).unwrap());
        assert_eq!(store.repositories().unwrap(), Vec::<String>::new());

        store.sweep_links(Duration::ZERO).unwrap();
        assert!(!store.blob_in(&ours, &digest).unwrap());
        assert!(!store.repository_dir(&other).exists(), "an empty directory stayed");

        let manifest =
            format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"a/b","digest":"{digest}","size":2}},"layers":[]}}"#);
        store.manifest_put(&ours, &Selector::Tag("1".into()), None, manifest.as_bytes()).unwrap();
        store.sweep_links(Duration::ZERO).unwrap();
        assert!(store.blob_in(&ours, &digest).unwrap(), "what a manifest names belongs");
        assert_eq!(store.tags_of(&ours, &Digest::of(manifest.as_bytes())).unwrap(), ["1"]);
    }
}
