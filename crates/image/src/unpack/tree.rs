//! Makes one layer's files. Every operation is relative to a directory descriptor that was resolved beneath the layer's
//! root by `openat2` without following any symbolic link, so no entry can reach outside.

use crate::blob::is_zero;
use crate::error::{Error, Result};
use crate::tar::{Archive, Entry, EntryKind};
use crate::unpack::chain;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, makedev, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Ids beyond a pod's range of 65,536 become nobody's.
const NOBODY: u32 = 65534;
const MAX_ID: u64 = 65535;
const PATH_MAX: usize = 4096;
const NAME_MAX: usize = 255;
const BUFFER: usize = 128 * 1024;
const HOLE: usize = 4096;
/// Time of directories that have no entry: the same wherever the layer is unpacked.
const IMPLIED: (i64, u32) = (0, 0);

pub(crate) struct Tree {
    root: OwnedFd,
    layer: String,
    /// The directory the last entry was in: most archives go directory by directory.
    last: Option<(Vec<u8>, OwnedFd)>,
    /// Times of directories, set when nothing is written in them any more.
    times: Vec<(Vec<u8>, (i64, u32))>,
    /// Directories that hide what lower layers have in theirs.
    opaque: BTreeSet<Vec<u8>>,
    buffer: Vec<u8>,
}

enum Failure {
    Why(String),
    Errno(&'static str, Errno),
}

impl From<String> for Failure {
    fn from(why: String) -> Failure {
        Failure::Why(why)
    }
}

impl From<&str> for Failure {
    fn from(why: &str) -> Failure {
        Failure::Why(why.to_owned())
    }
}

type Done<T = ()> = std::result::Result<T, Failure>;

fn at(what: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::Errno(what, errno)
}

impl Tree {
    pub fn new(root: OwnedFd, layer: &str) -> Tree {
        Tree {
            root,
            layer: layer.to_owned(),
            last: None,
            times: vec![(Vec::new(), IMPLIED)],
            opaque: BTreeSet::new(),
            buffer: vec![0u8; BUFFER],
        }
    }

    pub fn add(&mut self, entry: &Entry, content: &mut impl Read) -> Result<()> {
        self.entry(entry, content).map_err(|failure| self.error(&entry.path, failure))
    }

    /// Makes all of an archive's entries. Tells which directories are to be marked opaque.
    pub fn fill<R: Read>(mut self, archive: &mut Archive<R>, most: u64) -> Result<Vec<Vec<u8>>> {
        let mut entries = 0u64;
        let layer = self.layer.clone();
        let failed = |why: String| Error::Archive { layer: layer.clone(), why };
        while let Some(entry) = archive.next().map_err(|e| failed(chain(&e)))? {
            entries += 1;
            if entries > most {
                return Err(failed(format!("it has more than {most} entries")));
            }
            self.add(&entry, archive)?;
        }
        self.finish()
    }

    /// Sets what had to wait. Tells which directories are to be marked opaque.
    pub fn finish(mut self) -> Result<Vec<Vec<u8>>> {
        let times = std::mem::take(&mut self.times);
        for (path, mtime) in &times {
            let result = match self.beneath(path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(dir) => futimens(dir, &timestamps(*mtime)).map_err(at("set the time")),
                // It was replaced by a later entry.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
                Err(e) => Err(Failure::Errno("open", e)),
            };
            result.map_err(|failure| self.error(path, failure))?;
        }
        Ok(self.opaque.into_iter().collect())
    }

    fn error(&self, path: &[u8], failure: Failure) -> Error {
        let entry = String::from_utf8_lossy(path).chars().take(300).collect();
        let why = match failure {
            Failure::Why(why) => why,
            Failure::Errno(what, errno) => format!("cannot {what}: {}", std::io::Error::from(errno)),
        };
        Error::Layer { layer: self.layer.clone(), entry, why }
    }

    fn entry(&mut self, entry: &Entry, content: &mut impl Read) -> Done {
        let path = clean(&entry.path)?;
        let Some((parent, name)) = split(&path) else {
            // The root itself: only its attributes count.
            if entry.kind == EntryKind::Directory {
                let root = self.root.try_clone().map_err(|_| "out of descriptors")?;
                return self.attributes(root, entry, Some(path));
            }
            return Err("the layer's root can only be a directory".into());
        };
        let (parent, name) = (parent.to_vec(), name.to_vec());
        if name.starts_with(WHITEOUT) {
            return self.whiteout(&parent, &name);
        }
        let dir = self.parent(&parent)?;
        match entry.kind {
            EntryKind::Directory => self.directory(dir, &name, entry, path),
            EntryKind::File => {
                self.clear(&dir, &name, &path)?;
                self.file(dir, &name, entry, content)
            }
            EntryKind::Symlink => self.symlink(dir, &name, entry, &path),
            EntryKind::HardLink => self.hard_link(dir, &name, entry, &path),
            EntryKind::Fifo => {
                self.clear(&dir, &name, &path)?;
                mknodat(&dir, os(&name), FileType::Fifo, Mode::from_raw_mode(0o600), 0).map_err(at("make the fifo"))?;
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fifo = openat(&dir, os(&name), flags, Mode::empty()).map_err(at("open the fifo"))?;
                self.attributes(fifo, entry, None)
            }
            // A pod's /dev is made by the runtime; a device in an image is of no use but to break out.
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                self.clear(&dir, &name, &path)?;
                tracing::debug!(layer = self.layer, entry = %String::from_utf8_lossy(&path), "device node left out");
                Ok(())
            }
            EntryKind::Other(b'S') => Err("is a sparse file in GNU form; make the archive without --sparse".into()),
            EntryKind::Other(kind) => Err(format!("is of unknown type {:?}", char::from(kind)).into()),
        }
    }

    fn directory(&mut self, dir: OwnedFd, name: &[u8], entry: &Entry, path: Vec<u8>) -> Done {
        let mut opaque = false;
        match existing(&dir, name)? {
            Some(FileType::Directory) => {}
            Some(kind) => {
                opaque = kind == FileType::CharacterDevice;
                self.clear(&dir, name, &path)?;
                mkdirat(&dir, os(name), Mode::RWXU).map_err(at("make the directory"))?;
            }
            None => mkdirat(&dir, os(name), Mode::RWXU).map_err(at("make the directory"))?,
        }
        let made = open_directory(&dir, name)?;
        if opaque {
            self.opaque.insert(path.clone());
        }
        self.attributes(made, entry, Some(path))
    }

    fn file(&mut self, dir: OwnedFd, name: &[u8], entry: &Entry, content: &mut impl Read) -> Done {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&dir, os(name), flags, Mode::RUSR | Mode::WUSR).map_err(at("create the file"))?;
        let mut position = 0u64;
        loop {
            let n = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.to_string().into()),
            };
            write_sparse(&file, self.buffer.get(..n).unwrap_or_default(), position)?;
            position += n as u64;
        }
        rustix::fs::ftruncate(&file, position).map_err(at("set the size"))?;
        self.attributes(file, entry, None)
    }

    fn symlink(&mut self, dir: OwnedFd, name: &[u8], entry: &Entry, path: &[u8]) -> Done {
        if entry.link.is_empty() || entry.link.len() >= PATH_MAX || entry.link.contains(&0) {
            return Err("is a symbolic link to nothing or to a path of more than 4095 bytes".into());
        }
        self.clear(&dir, name, path)?;
        symlinkat(os(&entry.link), &dir, os(name)).map_err(at("make the symbolic link"))?;
        let (uid, gid) = owner(entry);
        chownat(&dir, os(name), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(at("set the owner"))?;
        utimensat(&dir, os(name), &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(at("set the time"))
    }

    fn hard_link(&mut self, dir: OwnedFd, name: &[u8], entry: &Entry, path: &[u8]) -> Done {
        let target = clean(&entry.link)?;
        let shown = String::from_utf8_lossy(&target).into_owned();
        let (parent, target_name) = split(&target).ok_or("is a hard link to the layer's root")?;
        let source = match self.beneath(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(source) => source,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return Err(format!("is a hard link to {shown:?}, which is not in the layer").into());
            }
            Err(Errno::LOOP) => return Err(format!("is a hard link to {shown:?}, through a symbolic link").into()),
            Err(e) => return Err(Failure::Errno("open the link's target", e)),
        };
        match existing(&source, target_name)? {
            Some(FileType::RegularFile | FileType::Symlink | FileType::Fifo) => {}
            None => return Err(format!("is a hard link to {shown:?}, which is not in the layer").into()),
            Some(_) => return Err(format!("is a hard link to {shown:?}, which is not a file").into()),
        }
        // A link to itself is what stays of a duplicated entry.
        if existing(&dir, name)?.is_some() && same_file(&source, target_name, &dir, name)? {
            return Ok(());
        }
        self.clear(&dir, name, path)?;
        linkat(&source, os(target_name), &dir, os(name), AtFlags::empty()).map_err(at("make the hard link"))
    }

    /// OCI image spec, "Whiteouts": they hide what lower layers have, never what this layer brings.
    fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Done {
        let dir = self.parent(parent)?;
        if name == OPAQUE {
            self.opaque.insert(parent.to_vec());
            return Ok(());
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = name.get(WHITEOUT.len()..).unwrap_or_default();
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err("is a whiteout of nothing".into());
        }
        match existing(&dir, hidden)? {
            Some(FileType::Directory) => {
                self.opaque.insert(join(parent, hidden));
                Ok(())
            }
            Some(_) => Ok(()),
            None => mknodat(&dir, os(hidden), FileType::CharacterDevice, Mode::empty(), makedev(0, 0))
                .map_err(at("make the whiteout")),
        }
    }

    fn attributes(&mut self, file: OwnedFd, entry: &Entry, directory: Option<Vec<u8>>) -> Done {
        let (uid, gid) = owner(entry);
        // In this order: changing the owner clears set-uid bits and capabilities.
        fchown(&file, Some(uid), Some(gid)).map_err(at("set the owner"))?;
        fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(at("set the mode"))?;
        for (name, value) in &entry.xattrs {
            if !xattr_allowed(name) {
                continue;
            }
            match fsetxattr(&file, os(name), value, XattrFlags::empty()) {
                Ok(()) | Err(Errno::NOTSUP) => {}
                Err(e) => return Err(Failure::Errno("set an extended attribute", e)),
            }
        }
        match directory {
            Some(path) => {
                self.times.push((path, entry.mtime));
                Ok(())
            }
            None => futimens(&file, &timestamps(entry.mtime)).map_err(at("set the time")),
        }
    }

    /// Opens a directory of the layer, making it if no entry did.
    fn parent(&mut self, path: &[u8]) -> Done<OwnedFd> {
        if let Some((last, fd)) = &self.last
            && last == path
        {
            return fd.try_clone().map_err(|_| "out of descriptors".into());
        }
        let fd = match self.beneath(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_parents(path)?,
            Err(Errno::LOOP) => return Err("lies behind a symbolic link of the same layer".into()),
            Err(e) => return Err(Failure::Errno("open its directory", e)),
        };
        self.last = Some((path.to_vec(), fd.try_clone().map_err(|_| "out of descriptors")?));
        Ok(fd)
    }

    fn make_parents(&mut self, path: &[u8]) -> Done<OwnedFd> {
        let mut dir = self.root.try_clone().map_err(|_| "out of descriptors")?;
        let mut at = Vec::new();
        for name in path.split(|b| *b == b'/') {
            at = join(&at, name);
            match existing(&dir, name)? {
                Some(FileType::Directory) => {}
                Some(FileType::Symlink) => return Err("lies behind a symbolic link of the same layer".into()),
                Some(FileType::CharacterDevice) => {
                    self.clear(&dir, name, &at)?;
                    make_implied(&dir, name)?;
                    self.times.push((at.clone(), IMPLIED));
                    self.opaque.insert(at.clone());
                }
                Some(_) => return Err("lies in what an earlier entry made a file".into()),
                None => {
                    make_implied(&dir, name)?;
                    self.times.push((at.clone(), IMPLIED));
                }
            }
            dir = open_directory(&dir, name)?;
        }
        Ok(dir)
    }

    /// Makes way for an entry: the last of duplicates counts.
    fn clear(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8]) -> Done {
        match existing(dir, name)? {
            None => Ok(()),
            Some(FileType::Directory) => {
                self.last = None;
                self.opaque.retain(|p| p.strip_prefix(path).is_none_or(|rest| !matches!(rest, [] | [b'/', ..])));
                remove_tree(dir, name, 0)
            }
            Some(_) => unlinkat(dir, os(name), AtFlags::empty()).map_err(at("replace an earlier entry")),
        }
    }

    fn beneath(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        beneath(&self.root, path, flags)
    }
}

fn beneath(root: &OwnedFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(root, os(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Marks directories opaque for overlayfs, which only the host's root may: the unpacker asks for it.
pub(crate) fn mark_opaque(root: &OwnedFd, layer: &str, directories: &[Vec<u8>]) -> Result<()> {
    for path in directories {
        let marked = beneath(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
            .and_then(|dir| fsetxattr(&dir, "trusted.overlay.opaque", b"y", XattrFlags::empty()));
        marked.map_err(|e| Error::Layer {
            layer: layer.to_owned(),
            entry: String::from_utf8_lossy(path).chars().take(300).collect(),
            why: format!("cannot mark the directory opaque: {}", std::io::Error::from(e)),
        })?;
    }
    Ok(())
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Without leading slashes, `.` and repeated slashes; `..` is refused.
fn clean(path: &[u8]) -> Done<Vec<u8>> {
    if path.len() >= PATH_MAX || path.contains(&0) {
        return Err("has a path of more than 4095 bytes".into());
    }
    let mut cleaned: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("climbs out with `..`".into()),
            _ if part.len() > NAME_MAX => return Err("has a name of more than 255 bytes".into()),
            _ => {
                if !cleaned.is_empty() {
                    cleaned.push(b'/');
                }
                cleaned.extend_from_slice(part);
            }
        }
    }
    Ok(cleaned)
}

/// Parent and name; `None` for the root.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => Some((path.get(..slash)?, path.get(slash + 1..)?)),
        None => Some((b"", path)),
    }
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

fn owner(entry: &Entry) -> (Uid, Gid) {
    let fit = |id: u64| if id > MAX_ID { NOBODY } else { id as u32 };
    (Uid::from_raw(fit(entry.uid)), Gid::from_raw(fit(entry.gid)))
}

fn timestamps(mtime: (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: mtime.0, tv_nsec: mtime.1 as _ };
    Timestamps { last_access: time, last_modification: time }
}

/// `trusted.*` would let a layer speak to overlayfs itself.
fn xattr_allowed(name: &[u8]) -> bool {
    let allowed = name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || name.starts_with(b"user.");
    allowed && !name.starts_with(b"user.overlay.") && name.len() <= NAME_MAX && !name.contains(&0)
}

fn existing(dir: &impl AsFd, name: &[u8]) -> Done<Option<FileType>> {
    match statat(dir, os(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(Failure::Errno("stat", e)),
    }
}

fn same_file(a: &OwnedFd, a_name: &[u8], b: &OwnedFd, b_name: &[u8]) -> Done<bool> {
    let a = statat(a, os(a_name), AtFlags::SYMLINK_NOFOLLOW).map_err(at("stat"))?;
    let b = statat(b, os(b_name), AtFlags::SYMLINK_NOFOLLOW).map_err(at("stat"))?;
    Ok(a.st_ino == b.st_ino && a.st_dev == b.st_dev)
}

fn open_directory(dir: &impl AsFd, name: &[u8]) -> Done<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, os(name), flags, Mode::empty()).map_err(at("open the directory"))
}

fn make_implied(dir: &OwnedFd, name: &[u8]) -> Done {
    mkdirat(dir, os(name), Mode::RWXU).map_err(at("make its directory"))?;
    fchmod(open_directory(dir, name)?, Mode::from_raw_mode(0o755)).map_err(at("set the mode"))
}

/// Writes all but the zero pages; the file's size is set afterwards.
fn write_sparse(file: &OwnedFd, bytes: &[u8], position: u64) -> Done {
    let mut from = 0;
    while from < bytes.len() {
        let pages = bytes.get(from..).unwrap_or_default().chunks(HOLE);
        let hole = |page: &[u8]| page.len() == HOLE && is_zero(page);
        let skipped: usize = pages.clone().take_while(|p| hole(p)).map(<[u8]>::len).sum();
        let run: usize = pages.skip(skipped / HOLE).take_while(|p| !hole(p)).map(<[u8]>::len).sum();
        from += skipped;
        let end = from + run;
        while from < end {
            let rest = bytes.get(from..end).unwrap_or_default();
            from += rustix::io::pwrite(file, rest, position + from as u64).map_err(at("write"))?;
        }
    }
    Ok(())
}

fn remove_tree(parent: &OwnedFd, name: &[u8], depth: usize) -> Done {
    if depth > PATH_MAX / 2 {
        return Err("replaces a directory that is too deep".into());
    }
    let dir = open_directory(parent, name)?;
    let names: Vec<OsString> = Dir::read_from(&dir)
        .map_err(at("list the directory"))?
        .flatten()
        .map(|e| OsString::from_vec(e.file_name().to_bytes().to_vec()))
        .filter(|n| n != "." && n != "..")
        .collect();
    for child in names {
        match existing(&dir, child.as_bytes())? {
            Some(FileType::Directory) => remove_tree(&dir, child.as_bytes(), depth + 1)?,
            Some(_) => unlinkat(&dir, &child, AtFlags::empty()).map_err(at("replace an earlier entry"))?,
            None => {}
        }
    }
    unlinkat(parent, os(name), AtFlags::REMOVEDIR).map_err(at("replace an earlier entry"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_clean_path_has_no_way_up(path in "[a./\\\\]{0,30}") {
            if let Ok(cleaned) = clean(path.as_bytes()) {
                prop_assert!(!cleaned.starts_with(b"/"));
                for part in cleaned.split(|b| *b == b'/').filter(|_| !cleaned.is_empty()) {
                    prop_assert!(!part.is_empty() && part != b"." && part != b"..");
                }
            }
        }
    }

    #[test]
    fn only_harmless_attributes_are_set() {
        for name in ["security.capability", "user.mime"] {
            assert!(xattr_allowed(name.as_bytes()), "{name}");
        }
        for name in ["trusted.overlay.redirect", "user.overlay.opaque", "security.ima", "system.nfs4_acl"] {
            assert!(!xattr_allowed(name.as_bytes()), "{name}");
        }
    }
}
