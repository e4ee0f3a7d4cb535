//! Names: which tag of which repository points at which manifest.

use crate::digest::Digest;
use crate::error::{Result, io};
use crate::reference::{Repository, Selector};
use crate::store::{Store, make_dir, sync_dir};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const LOCAL: &str = "_local";

/// Content of a tag's or manifest's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub digest: Digest,
    pub media_type: String,
    pub size: u64,
    /// Unix seconds.
    pub created: u64,
    /// What this manifest is about (signature, scan result, ...).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Digest>,
}

impl Store {
    pub(crate) fn repository_dir(&self, repository: &Repository) -> PathBuf {
        self.root().join("refs").join(repository.host.as_deref().unwrap_or(LOCAL)).join(&repository.path)
    }

    fn record_path(&self, repository: &Repository, selector: &Selector) -> PathBuf {
        let dir = self.repository_dir(repository);
        match selector {
            Selector::Tag(tag) => dir.join("_tags").join(tag),
            Selector::Digest(digest) => dir.join("_manifests").join(digest.hex()),
        }
    }

    pub(crate) fn record_get(&self, repository: &Repository, selector: &Selector) -> Result<Option<Record>> {
        read_record(&self.record_path(repository, selector))
    }

    pub(crate) fn record_put(&self, repository: &Repository, selector: &Selector, record: &Record) -> Result<()> {
        let path = self.record_path(repository, selector);
        if let Some(parent) = path.parent() {
            make_dir(parent, 0o700)?;
        }
        let bytes = serde_json::to_vec(record).map_err(|e| io("encode", &path)(std::io::Error::other(e)))?;
        self.write_file(&path, &bytes)
    }

    /// Whether it was there.
    pub(crate) fn record_delete(&self, repository: &Repository, selector: &Selector) -> Result<bool> {
        let path = self.record_path(repository, selector);
        match fs::remove_file(&path) {
            Ok(()) => {
                if let Some(parent) = path.parent() {
                    sync_dir(parent)?;
                }
                self.prune_empty(repository);
                Ok(true)
            }
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(io("remove", &path)(e)),
        }
    }

    /// Removes the directories of a repository that holds nothing any more.
    fn prune_empty(&self, repository: &Repository) {
        let dir = self.repository_dir(repository);
        let _ = fs::remove_dir(dir.join("_tags"));
        let _ = fs::remove_dir(dir.join("_manifests"));
        let mut current = dir.as_path();
        let stop = self.root().join("refs");
        while current != stop && fs::remove_dir(current).is_ok() {
            match current.parent() {
                Some(parent) => current = parent,
                None => return,
            }
        }
    }

    pub(crate) fn tag_records(&self, repository: &Repository) -> Result<Vec<(String, Record)>> {
        read_records(&self.repository_dir(repository).join("_tags"))
    }

    pub(crate) fn manifest_records(&self, repository: &Repository) -> Result<Vec<Record>> {
        Ok(read_records(&self.repository_dir(repository).join("_manifests"))?.into_iter().map(|(_, r)| r).collect())
    }

    /// Every repository that holds something, sorted.
    pub(crate) fn all_repositories(&self) -> Result<Vec<Repository>> {
        let mut found = Vec::new();
        for (host, path) in subdirectories(&self.root().join("refs"))? {
            let host = if host == LOCAL { None } else { Some(host) };
            walk(&path, "", &host, &mut found)?;
        }
        found.sort();
        Ok(found)
    }

    /// Names of the repositories of the built-in registry.
    pub fn repositories(&self) -> Result<Vec<String>> {
        Ok(self.all_repositories()?.into_iter().filter(|r| r.host.is_none()).map(|r| r.path).collect())
    }

    /// Tags of a repository of the built-in registry, sorted bytewise; `None` if there is no such repository.
    pub fn tags(&self, name: &str) -> Result<Option<Vec<String>>> {
        let repository = Repository::local(name)?;
        let mut tags: Vec<String> = self.tag_records(&repository)?.into_iter().map(|(tag, _)| tag).collect();
        if tags.is_empty() && !self.repository_dir(&repository).join("_manifests").is_dir() {
            return Ok(None);
        }
        tags.sort();
        Ok(Some(tags))
    }
}

fn walk(dir: &Path, name: &str, host: &Option<String>, found: &mut Vec<Repository>) -> Result<()> {
    let children = subdirectories(dir)?;
    if children.iter().any(|(n, _)| n == "_tags" || n == "_manifests") {
        found.push(Repository { host: host.clone(), path: name.to_owned() });
    }
    for (child, path) in children {
        if !child.starts_with('_') {
            let name = if name.is_empty() { child } else { format!("{name}/{child}") };
            walk(&path, &name, host, found)?;
        }
    }
    Ok(())
}

pub(crate) fn subdirectories(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io("list", dir)(e)),
    };
    Ok(entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|e| Some((e.file_name().into_string().ok()?, e.path())))
        .collect())
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    match fs::read(path) {
        // A record that cannot be read is treated as damage, not as absence: garbage collection relies on records.
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| io("decode", path)(std::io::Error::other(e))),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(io("read", path)(e)),
    }
}

fn read_records(dir: &Path) -> Result<Vec<(String, Record)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io("list", dir)(e)),
    };
    let mut records = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io("list", dir))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if let Some(record) = read_record(&entry.path())? {
            records.push((name, record));
        }
    }
    Ok(records)
}
