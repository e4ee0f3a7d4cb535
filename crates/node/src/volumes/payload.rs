//! Writes the files of a configMap, secret, projected or downwardAPI volume so that a reader sees either all old or all
//! new content:
//!
//! ```text
//! <volume>/..2025_01_31_12_00_00.000000001/a/b   the files
//! <volume>/..data -> ..2025_...                   swapped by one rename
//! <volume>/a -> ..data/a                          what a container opens
//! ```

use super::tree::own;
use super::{VolumeError, io};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

/// One file of a volume. The path is checked when it is made: relative, plain components only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileEntry {
    path: PathBuf,
    bytes: Vec<u8>,
    mode: u32,
}

impl FileEntry {
    pub fn new(path: &str, bytes: Vec<u8>, mode: u32) -> Result<Self, VolumeError> {
        let bad = |why: &str| Err(VolumeError::Invalid(format!("invalid path \"{path}\": {why}")));
        if path.is_empty() || path.len() > 4096 || path.contains('\0') {
            return bad("must not be empty, longer than 4096 bytes or contain NUL");
        }
        if path.starts_with("..") {
            return bad("must not start with '..'");
        }
        let parsed = Path::new(path);
        for part in parsed.components() {
            match part {
                Component::Normal(name) if name.len() <= 255 => {}
                Component::Normal(_) => return bad("a part of it is longer than 255 bytes"),
                Component::CurDir => return bad("must not contain '.'"),
                Component::ParentDir => return bad("must not contain '..'"),
                Component::RootDir | Component::Prefix(_) => return bad("must be relative"),
            }
        }
        Ok(FileEntry { path: parsed.components().collect(), bytes, mode })
    }
}

/// Makes the volume at `dir` show exactly `files`. Does nothing if it does already.
pub(crate) fn write(dir: &Path, files: &[FileEntry], fs_group: Option<u32>) -> Result<(), VolumeError> {
    // Later entries win, as in projected volumes.
    let wanted: BTreeMap<&Path, &FileEntry> = files.iter().map(|f| (f.path.as_path(), f)).collect();
    for path in wanted.keys() {
        if path.ancestors().skip(1).any(|up| wanted.contains_key(up)) {
            let path = path.display();
            return Err(VolumeError::Invalid(format!("path \"{path}\" lies below another path that is a file")));
        }
    }
    let link = dir.join("..data");
    let current = std::fs::read_link(&link).ok();
    if let Some(current) = &current
        && shows(&dir.join(current), &wanted, fs_group)
    {
        return make_links(dir, &wanted);
    }
    own(dir, fs_group, if fs_group.is_some() { 0o2755 } else { 0o755 })?;
    let name = version_name();
    let version = dir.join(&name);
    let made = write_version(&version, &wanted, fs_group).and_then(|()| {
        let next = dir.join("..data_tmp");
        let _ = std::fs::remove_file(&next);
        std::os::unix::fs::symlink(&name, &next).map_err(io("link", &next))?;
        std::fs::rename(&next, &link).map_err(io("swap", &link))
    });
    if made.is_err() {
        let _ = std::fs::remove_dir_all(&version);
        return made;
    }
    make_links(dir, &wanted)?;
    remove_old(dir, &name);
    Ok(())
}

fn version_name() -> String {
    let micros = api::time::now_micros();
    let stamp: String = api::time::rfc3339(micros.div_euclid(1_000_000))
        .chars()
        .filter(|c| *c != 'Z')
        .map(|c| if c.is_ascii_digit() { c } else { '_' })
        .collect();
    format!("..{stamp}.{:06}{:03}", micros.rem_euclid(1_000_000), api::names::random_u64() % 1000)
}

fn file_mode(mode: u32, fs_group: Option<u32>) -> u32 {
    if fs_group.is_some() { mode | 0o440 } else { mode }
}

fn write_version(
    version: &Path,
    wanted: &BTreeMap<&Path, &FileEntry>,
    fs_group: Option<u32>,
) -> Result<(), VolumeError> {
    let dir_mode = if fs_group.is_some() { 0o2755 } else { 0o755 };
    std::fs::create_dir(version).map_err(io("make", version))?;
    own(version, fs_group, dir_mode)?;
    let mut dirs = BTreeSet::new();
    for (path, entry) in wanted {
        let mut parents: Vec<&Path> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        parents.reverse();
        for parent in parents {
            if dirs.insert(parent.to_owned()) {
                let parent = version.join(parent);
                std::fs::create_dir(&parent).map_err(io("make", &parent))?;
                own(&parent, fs_group, dir_mode)?;
            }
        }
        let full = version.join(path);
        let mut open = std::fs::OpenOptions::new();
        let mut file = open.write(true).create_new(true).mode(0o600).open(&full).map_err(io("make", &full))?;
        file.write_all(&entry.bytes).map_err(io("write", &full))?;
        own(&full, fs_group, file_mode(entry.mode, fs_group))?;
    }
    Ok(())
}

/// Whether `version` holds exactly these files.
fn shows(version: &Path, wanted: &BTreeMap<&Path, &FileEntry>, fs_group: Option<u32>) -> bool {
    let same = |path: &Path, entry: &FileEntry| {
        let full = version.join(path);
        let Ok(stat) = rustix::fs::lstat(&full) else { return false };
        stat.st_mode & 0o777 == file_mode(entry.mode, fs_group)
            && u64::try_from(stat.st_size) == Ok(entry.bytes.len() as u64)
            && std::fs::read(&full).is_ok_and(|bytes| bytes == entry.bytes)
    };
    version.is_dir() && count_files(version, 0) == wanted.len() && wanted.iter().all(|(path, entry)| same(path, entry))
}

fn count_files(dir: &Path, depth: usize) -> usize {
    if depth > 64 {
        return usize::MAX / 2;
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { count_files(&e.path(), depth + 1) } else { 1 }).sum()
}

/// The visible names, one link for each first component; stale ones go.
fn make_links(dir: &Path, wanted: &BTreeMap<&Path, &FileEntry>) -> Result<(), VolumeError> {
    let first = |path: &Path| path.components().next().map(|c| PathBuf::from(c.as_os_str()));
    let names: BTreeSet<PathBuf> = wanted.keys().filter_map(|p| first(p)).collect();
    for name in &names {
        let link = dir.join(name);
        let target = Path::new("..data").join(name);
        if std::fs::read_link(&link).is_ok_and(|t| t == target) {
            continue;
        }
        std::os::unix::fs::symlink(&target, &link).map_err(io("link", &link))?;
    }
    for entry in std::fs::read_dir(dir).map_err(io("list", dir))?.flatten() {
        let name = PathBuf::from(entry.file_name());
        if !entry.file_name().as_encoded_bytes().starts_with(b"..") && !names.contains(&name) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

fn remove_old(dir: &Path, keep: &str) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..") && name != keep && entry.file_type().is_ok_and(|t| t.is_dir()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
