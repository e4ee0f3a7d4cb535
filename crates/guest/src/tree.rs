//! Files of volumes as they cross to the guest: read on the host, brought about in the guest so that whoever reads there
//! meanwhile sees the old state or the new one. Names of files that stand for a whole generation are symbolic links
//! (`..data`): they are changed after all that they lead to, and what is left over goes last.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

/// Bytes of files in one tree.
pub const MAX_BYTES: u64 = 16 << 20;
const MAX_ENTRIES: usize = 16_384;
const MAX_DEPTH: usize = 32;

#[derive(Debug, Serialize, Deserialize)]
pub struct Tree {
    /// Absolute, in the guest.
    pub root: PathBuf,
    /// Directories before what is in them; the first, with an empty path, is the root.
    pub entries: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the root.
    pub path: PathBuf,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub content: Content,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    Directory,
    Link(PathBuf),
    /// base64
    File(String),
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// What is at `source`, a directory or a file, for `root` in the guest.
pub fn read(source: &Path, root: &Path) -> io::Result<Tree> {
    let mut tree = Tree { root: root.to_owned(), entries: Vec::new() };
    let mut left = MAX_BYTES;
    add(source, Path::new(""), 0, &mut tree.entries, &mut left)?;
    Ok(tree)
}

fn add(path: &Path, inside: &Path, depth: usize, out: &mut Vec<Entry>, left: &mut u64) -> io::Result<()> {
    if out.len() >= MAX_ENTRIES || depth > MAX_DEPTH {
        return Err(invalid(format!("{}: more than {MAX_ENTRIES} files or {MAX_DEPTH} levels", path.display())));
    }
    let meta = fs::symlink_metadata(path)?;
    let content = if meta.is_dir() {
        Content::Directory
    } else if meta.is_symlink() {
        Content::Link(fs::read_link(path)?)
    } else if meta.is_file() {
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
        let mut bytes = Vec::new();
        fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?.take(*left + 1).read_to_end(&mut bytes)?;
        *left = left.checked_sub(bytes.len() as u64).ok_or_else(|| {
            invalid(format!("{}: files of more than {MAX_BYTES} bytes in one volume", path.display()))
        })?;
        Content::File(STANDARD.encode(bytes))
    } else {
        return Ok(());
    };
    let directory = content == Content::Directory;
    let mode = meta.mode() & 0o7777;
    out.push(Entry { path: inside.to_owned(), mode, uid: meta.uid(), gid: meta.gid(), content });
    if directory {
        let mut names: Vec<_> = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for entry in names {
            add(&entry.path(), &inside.join(entry.file_name()), depth + 1, out, left)?;
        }
    }
    Ok(())
}

fn plain(path: &Path) -> bool {
    path.components().all(|c| matches!(c, Component::Normal(_)))
}

impl Tree {
    /// Makes what is at the root as it is told here.
    pub fn write(&self) -> io::Result<()> {
        if let Some(parent) = self.root.parent() {
            fs::create_dir_all(parent)?;
        }
        let place = |entry: &Entry| -> io::Result<PathBuf> {
            if !plain(&entry.path) {
                return Err(invalid(format!("{}: must lie below its volume", entry.path.display())));
            }
            Ok(if entry.path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(&entry.path) })
        };
        let (links, others): (Vec<_>, Vec<_>) =
            self.entries.iter().partition(|e| matches!(e.content, Content::Link(_)));
        for entry in others.into_iter().chain(links) {
            entry.write(&place(entry)?)?;
        }
        let known: BTreeSet<PathBuf> = self.entries.iter().map(place).collect::<io::Result<_>>()?;
        if self.root.is_dir() { remove_others(&self.root, &known) } else { Ok(()) }
    }
}

impl Entry {
    fn write(&self, path: &Path) -> io::Result<()> {
        match &self.content {
            Content::Directory => {
                if !fs::symlink_metadata(path).is_ok_and(|m| m.is_dir()) {
                    fs::DirBuilder::new().mode(0o700).create(path)?;
                }
            }
            Content::Link(target) => {
                if fs::read_link(path).is_ok_and(|there| there == *target) {
                    return Ok(());
                }
                let new = beside(path);
                let _ = fs::remove_file(&new);
                symlink(target, &new)?;
                lchown(&new, Some(self.uid), Some(self.gid))?;
                return fs::rename(&new, path);
            }
            Content::File(text) => return self.write_file(path, text),
        }
        lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode & 0o7777))
    }

    /// In place: a file may be mounted in a container by itself.
    fn write_file(&self, path: &Path, text: &str) -> io::Result<()> {
        let bytes = STANDARD.decode(text).map_err(|e| invalid(format!("{}: {e}", path.display())))?;
        if fs::symlink_metadata(path).is_ok_and(|m| m.is_file()) && fs::read(path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
        options.open(path)?.write_all(&bytes)?;
        lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode & 0o7777))
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

fn remove_others(directory: &Path, known: &BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, directory) = (entry.path(), entry.file_type()?.is_dir());
        match (known.contains(&path), directory) {
            (true, true) => remove_others(&path, known)?,
            (true, false) => {}
            (false, true) => fs::remove_dir_all(&path)?,
            (false, false) => fs::remove_file(&path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(dir: &Path, name: &str, text: &str) {
        fs::create_dir_all(dir.join(name)).expect("made");
        fs::write(dir.join(name).join("key"), text).expect("written");
        let _ = fs::remove_file(dir.join("..data"));
        symlink(name, dir.join("..data")).expect("linked");
        let _ = fs::remove_file(dir.join("key"));
        symlink("..data/key", dir.join("key")).expect("linked");
    }

    #[test]
    fn a_volume_arrives_changes_and_loses_what_is_gone() {
        let (host, guest) = (tempfile::tempdir().expect("host"), tempfile::tempdir().expect("guest"));
        let root = guest.path().join("volumes/v");
        generation(host.path(), "..1", "one");
        read(host.path(), &root).expect("read").write().expect("written");
        assert_eq!(fs::read_to_string(root.join("key")).expect("key"), "one");
        generation(host.path(), "..2", "two");
        fs::remove_dir_all(host.path().join("..1")).expect("removed");
        read(host.path(), &root).expect("read").write().expect("written");
        assert_eq!(fs::read_to_string(root.join("key")).expect("key"), "two");
        assert!(!root.join("..1").exists());
        assert_eq!(fs::read_link(root.join("..data")).expect("link"), Path::new("..2"));
    }

    #[test]
    fn a_single_file_keeps_its_identity() {
        let (host, guest) = (tempfile::tempdir().expect("host"), tempfile::tempdir().expect("guest"));
        let (from, to) = (host.path().join("hosts"), guest.path().join("etc/hosts"));
        fs::write(&from, "a").expect("written");
        read(&from, &to).expect("read").write().expect("written");
        let inode = fs::metadata(&to).expect("there").ino();
        fs::write(&from, "b").expect("written");
        read(&from, &to).expect("read").write().expect("written");
        assert_eq!(
            (fs::read_to_string(&to).expect("text").as_str(), fs::metadata(&to).expect("there").ino()),
            ("b", inode)
        );
    }

    #[test]
    fn what_leads_out_is_refused() {
        let guest = tempfile::tempdir().expect("guest");
        for path in ["../x", "/x", "a/../../x"] {
            let entry = Entry { path: path.into(), mode: 0o644, uid: 0, gid: 0, content: Content::File(String::new()) };
            let tree = Tree { root: guest.path().join("v"), entries: vec![entry] };
            assert!(tree.write().is_err(), "{path}");
            assert!(!guest.path().join("x").exists());
        }
    }

    #[test]
    fn too_much_is_refused_by_name() {
        let host = tempfile::tempdir().expect("host");
        let file = fs::File::create(host.path().join("big")).expect("made");
        file.set_len(MAX_BYTES + 1).expect("sized");
        assert!(read(host.path(), Path::new("/v")).expect_err("refused").to_string().contains("big"));
    }
}
