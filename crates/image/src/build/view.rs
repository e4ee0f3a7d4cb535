//! Looking into trees of files that strangers made: one directory, or unpacked layers as overlayfs would show them
//! together. Every step is relative to a descriptor and follows no symbolic link but by its own rules.

use crate::error::{Result, io};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fgetxattr, flistxattr, openat2, readlinkat, statat,
};
use rustix::io::Errno;
use std::collections::{BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// Symbolic links followed in one look-up, as the kernel's own limit.
const LINKS: usize = 40;

pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One directory tree.
pub(crate) struct Tree(OwnedFd);

impl Tree {
    pub fn open(path: &Path) -> Result<Tree> {
        crate::store::open_dir(path).map(Tree)
    }

    pub fn stat(&self, path: &Path) -> rustix::io::Result<Stat> {
        let Some(name) = path.file_name() else { return rustix::fs::fstat(&self.0) };
        let parent = self.at(path.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
        statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn at(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.0, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)
    }

    /// A regular file or a directory, for reading.
    pub fn read(&self, path: &Path) -> rustix::io::Result<File> {
        self.at(path, OFlags::RDONLY | OFlags::NONBLOCK).map(File::from)
    }

    pub fn names(&self, path: &Path) -> rustix::io::Result<Vec<OsString>> {
        let dir = self.at(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names: Vec<OsString> = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    pub fn link(&self, path: &Path) -> rustix::io::Result<Vec<u8>> {
        let parent = self.at(path.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(readlinkat(parent, path.file_name().unwrap_or_default(), Vec::new())?.into_bytes())
    }

    /// Extended attributes of a regular file or directory.
    pub fn xattrs(&self, path: &Path) -> rustix::io::Result<Xattrs> {
        xattrs(self.at(path, OFlags::RDONLY | OFlags::NONBLOCK)?)
    }

    pub fn is_opaque(&self, path: &Path) -> bool {
        let dir = self.at(path, OFlags::RDONLY | OFlags::DIRECTORY);
        dir.is_ok_and(|d| fgetxattr(d, "trusted.overlay.opaque", &mut [0u8; 4][..]).is_ok())
    }
}

fn xattrs(file: impl AsFd) -> rustix::io::Result<Xattrs> {
    let mut names = vec![0u8; 64 << 10];
    let length = match flistxattr(&file, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(e) => return Err(e),
    };
    names.truncate(length);
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0u8; 64 << 10];
        let length = fgetxattr(&file, OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(length);
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}

/// Trees stacked, topmost first.
pub(crate) struct View {
    trees: Vec<Tree>,
}

/// Something in a view, and the tree that it is in.
pub(crate) struct Node<'a> {
    pub tree: &'a Tree,
    pub stat: Stat,
}

impl Node<'_> {
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub fn is_dir(&self) -> bool {
        self.kind() == FileType::Directory
    }
}

impl View {
    /// `layers`: lowest first.
    pub fn open(layers: &[PathBuf]) -> Result<View> {
        Ok(View { trees: layers.iter().rev().map(|l| Tree::open(l)).collect::<Result<_>>()? })
    }

    /// What is at a path without symbolic links, relative to the root.
    pub fn node(&self, path: &Path) -> Option<Node<'_>> {
        for tree in &self.trees {
            match look(tree, path) {
                Look::Here(stat) => return Some(Node { tree, stat }),
                Look::Hidden => return None,
                Look::Below => {}
            }
        }
        None
    }

    /// Follows symbolic links within the view; what is not there is taken as written. The result is relative to the
    /// root and has no symbolic link in it.
    pub fn resolve(&self, path: &Path) -> std::result::Result<PathBuf, String> {
        let mut todo: VecDeque<OsString> = names(path);
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            done.push(&name);
            let Some(node) = self.node(&done).filter(|n| n.kind() == FileType::Symlink) else { continue };
            links += 1;
            if links > LINKS {
                return Err(format!("{}: more than {LINKS} symbolic links", path.display()));
            }
            let target = node.tree.link(&done).map_err(|e| format!("{}: {e}", done.display()))?;
            let target = PathBuf::from(OsString::from_vec(target));
            done.pop();
            if target.is_absolute() {
                done = PathBuf::new();
            }
            for part in names(&target).into_iter().rev() {
                todo.push_front(part);
            }
        }
        Ok(done)
    }

    /// Names in a directory, sorted.
    pub fn names(&self, path: &Path) -> std::result::Result<Vec<OsString>, String> {
        let mut all = BTreeSet::new();
        for tree in &self.trees {
            match look(tree, path) {
                Look::Here(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                    all.extend(tree.names(path).map_err(|e| format!("{}: {e}", path.display()))?);
                }
                Look::Here(_) | Look::Hidden => break,
                Look::Below => continue,
            }
            if tree.is_opaque(path) {
                break;
            }
        }
        Ok(all.into_iter().filter(|name| self.node(&path.join(name)).is_some()).collect())
    }

    /// Content of a small regular file, links followed; `None` if there is none.
    pub fn text(&self, path: &str, limit: u64) -> Option<String> {
        let path = self.resolve(Path::new(path)).ok()?;
        let node = self.node(&path).filter(|n| n.kind() == FileType::RegularFile)?;
        let mut text = String::new();
        node.tree.read(&path).ok()?.take(limit).read_to_string(&mut text).ok()?;
        Some(text)
    }
}

enum Look {
    Here(Stat),
    /// Not here, and nothing below shows through.
    Hidden,
    Below,
}

fn look(tree: &Tree, path: &Path) -> Look {
    let mut prefix = PathBuf::new();
    let mut opaque = tree.is_opaque(&prefix);
    let parts: Vec<&OsStr> = path.iter().collect();
    let Some((last, parents)) = parts.split_last() else {
        return rustix::fs::fstat(&tree.0).map_or(Look::Hidden, Look::Here);
    };
    let missing = |opaque: bool| if opaque { Look::Hidden } else { Look::Below };
    for part in parents {
        prefix.push(part);
        match tree.stat(&prefix) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                opaque |= tree.is_opaque(&prefix);
            }
            Ok(_) => return Look::Hidden,
            Err(_) => return missing(opaque),
        }
    }
    prefix.push(last);
    match tree.stat(&prefix) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0 => {
            Look::Hidden
        }
        Ok(stat) => Look::Here(stat),
        Err(_) => missing(opaque),
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// A whole directory as a context.
pub(crate) fn context(path: &Path) -> Result<View> {
    let path = path.canonicalize().map_err(io("open the context", path))?;
    View::open(&[path])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn layers_are_seen_as_one() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: whiteouts need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low"), dir.path().join("high"));
        fs::create_dir_all(low.join("usr/bin")).unwrap();
        fs::create_dir_all(low.join("a/b")).unwrap();
        fs::create_dir_all(high.join("a")).unwrap();
        fs::write(low.join("usr/bin/x"), "low").unwrap();
        fs::write(low.join("a/gone"), "").unwrap();
        fs::write(high.join("a/new"), "new").unwrap();
        symlink("usr/bin", low.join("bin")).unwrap();
        symlink("/../../../etc", low.join("out")).unwrap();
        symlink("loop", low.join("loop")).unwrap();
        let whiteout = |path: &Path| {
            let mode = Mode::empty();
            rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, mode, 0).unwrap();
        };
        whiteout(&high.join("a/gone"));
        let view = View::open(&[low.clone(), high.clone()]).unwrap();
        assert_eq!(view.resolve(Path::new("/bin/x")).unwrap(), Path::new("usr/bin/x"));
        assert_eq!(view.resolve(Path::new("/out/passwd")).unwrap(), Path::new("etc/passwd"));
        assert!(view.resolve(Path::new("/loop")).is_err());
        assert_eq!(view.text("bin/x", 10).as_deref(), Some("low"));
        assert_eq!(view.names(Path::new("a")).unwrap(), ["b", "new"]);
        assert!(view.node(Path::new("a/gone")).is_none());
        assert!(view.node(Path::new("bin/x")).is_none(), "a link is not followed unasked");
        let a = crate::store::open_dir(&high.join("a")).unwrap();
        rustix::fs::fsetxattr(&a, "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty()).unwrap();
        assert_eq!(view.names(Path::new("a")).unwrap(), ["new"]);
        assert!(view.node(Path::new("a/b")).is_none());
    }
}
