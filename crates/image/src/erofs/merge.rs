//! What a container of the image would see: its layers laid over each other, as overlayfs does it.

use super::format::encode_xattrs;
use crate::error::{Error, Result, io};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fgetxattr, fstat, lgetxattr, llistxattr, openat2,
    readlinkat, statat,
};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Linux's own limit of one value, and of a list of names.
const XATTR_SIZE_MAX: usize = 65536;

pub(super) struct Tree {
    /// Roots of the layers, the topmost first.
    pub layers: Vec<OwnedFd>,
    /// The first is the root.
    pub nodes: Vec<Node>,
    /// Parents before children; the first is the root.
    pub directories: Vec<Directory>,
}

pub(super) struct Node {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    pub xattrs: Box<[u8]>,
}

pub(super) enum Kind {
    /// Which of the directories it is.
    Directory(usize),
    /// A regular file of a layer.
    File {
        layer: usize,
        size: u64,
    },
    Symlink(Box<[u8]>),
    /// A device, a fifo or a socket.
    Special(u64),
}

pub(super) struct Directory {
    pub path: Vec<u8>,
    pub node: usize,
    /// Layers that have it, the topmost first.
    layers: Vec<usize>,
    /// Names and nodes, sorted, with `.` and `..`.
    pub entries: Vec<(Box<[u8]>, usize)>,
}

/// What the layers down to one have under a name.
enum Found {
    Whiteout,
    Other(Stat, usize),
    Directory {
        layers: Vec<usize>,
        /// A layer has something else there, which hides those below it.
        covered: bool,
    },
}

struct Merge<'a> {
    what: &'a str,
    most: u64,
    tree: Tree,
    /// Nodes of files with several names.
    linked: HashMap<(u64, u64), usize>,
    /// For extended attributes.
    buffer: Vec<u8>,
}

impl Tree {
    /// `layers`: the lowest first.
    pub fn of(what: &str, layers: &[PathBuf], most: u64) -> Result<Tree> {
        let layers: Vec<OwnedFd> = layers.iter().rev().map(|l| crate::store::open_dir(l)).collect::<Result<_>>()?;
        let all = (0..layers.len()).collect();
        let tree = Tree { layers, nodes: Vec::new(), directories: Vec::new() };
        let mut merge = Merge { what, most, tree, linked: HashMap::new(), buffer: vec![0; XATTR_SIZE_MAX] };
        merge.directory(Vec::new(), 0, all)?;
        let mut next = 0;
        while next < merge.tree.directories.len() {
            merge.fill(next)?;
            next += 1;
        }
        Ok(merge.tree)
    }
}

impl Directory {
    pub fn open(&self, tree: &Tree, layer: usize) -> Result<OwnedFd> {
        let failed = |e: Errno| io("open", String::from_utf8_lossy(&self.path).as_ref())(e);
        let Some(root) = tree.layers.get(layer) else { return Err(failed(Errno::NOENT)) };
        let path: &[u8] = if self.path.is_empty() { b"." } else { &self.path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(root, OsStr::from_bytes(path), flags, Mode::empty(), resolve).map_err(failed)
    }
}

impl Merge<'_> {
    /// Adds a directory; its attributes and entries come when it is filled.
    fn directory(&mut self, path: Vec<u8>, parent: usize, layers: Vec<usize>) -> Result<usize> {
        let kind = Kind::Directory(self.tree.directories.len());
        // Until it is filled, and where no layer has it: the root of an image without layers.
        let node = Node { kind, mode: 0o040_755, uid: 0, gid: 0, mtime: (0, 0), links: 2, xattrs: Box::default() };
        let node = self.add(node)?;
        let entries = vec![(b"."[..].into(), node), (b".."[..].into(), parent)];
        self.tree.directories.push(Directory { path, node, layers, entries });
        Ok(node)
    }

    fn add(&mut self, node: Node) -> Result<usize> {
        if self.tree.nodes.len() as u64 >= self.most {
            return Err(Error::invalid(
                format!("image {:?}", self.what),
                format!("its file system has more than {} files and directories, the limit", self.most),
            ));
        }
        self.tree.nodes.push(node);
        Ok(self.tree.nodes.len() - 1)
    }

    fn fill(&mut self, index: usize) -> Result<()> {
        let Some(directory) = self.tree.directories.get_mut(index) else { return Ok(()) };
        let (path, node, layers) = (directory.path.clone(), directory.node, std::mem::take(&mut directory.layers));
        let mut found: BTreeMap<Vec<u8>, Found> = BTreeMap::new();
        let mut opened: Vec<(usize, OwnedFd)> = Vec::new();
        for layer in layers {
            let Some(directory) = self.tree.directories.get(index) else { break };
            let dir = directory.open(&self.tree, layer)?;
            if opened.is_empty() {
                self.attributes(node, &dir, &path)?;
            }
            look(&dir, layer, &path, &mut found)?;
            let opaque = fgetxattr(&dir, "trusted.overlay.opaque", &mut [0u8; 4]).is_ok();
            opened.push((layer, dir));
            if opaque {
                break;
            }
        }
        let mut entries = Vec::with_capacity(found.len());
        for (name, found) in found {
            let child = match found {
                Found::Whiteout => continue,
                Found::Directory { layers, .. } => {
                    if let Some(node) = self.tree.nodes.get_mut(node) {
                        node.links += 1;
                    }
                    self.directory(join(&path, &name), node, layers)?
                }
                Found::Other(stat, layer) => {
                    let Some((_, dir)) = opened.iter().find(|(l, _)| *l == layer) else { continue };
                    self.other(dir, &path, &name, &stat, layer)?
                }
            };
            entries.push((name.into(), child));
        }
        if let Some(directory) = self.tree.directories.get_mut(index) {
            directory.entries.extend(entries);
            directory.entries.sort();
        }
        Ok(())
    }

    fn attributes(&mut self, node: usize, dir: &OwnedFd, path: &[u8]) -> Result<()> {
        let shown = String::from_utf8_lossy(path);
        let stat = fstat(dir).map_err(io("stat", shown.as_ref()))?;
        let xattrs = self.xattrs(dir, b".", path)?;
        if let Some(node) = self.tree.nodes.get_mut(node) {
            (node.mode, node.uid, node.gid, node.mtime) = (stat.st_mode, stat.st_uid, stat.st_gid, time(&stat));
            node.xattrs = xattrs;
        }
        Ok(())
    }

    fn other(&mut self, dir: &OwnedFd, path: &[u8], name: &[u8], stat: &Stat, layer: usize) -> Result<usize> {
        let identity = (stat.st_dev, stat.st_ino);
        if stat.st_nlink > 1
            && let Some(known) = self.linked.get(&identity)
        {
            if let Some(node) = self.tree.nodes.get_mut(*known) {
                node.links += 1;
            }
            return Ok(*known);
        }
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File { layer, size: u64::try_from(stat.st_size).unwrap_or(0) },
            FileType::Symlink => {
                let target = readlinkat(dir, OsStr::from_bytes(name), Vec::new());
                let target = target.map_err(io("read", String::from_utf8_lossy(&join(path, name)).as_ref()))?;
                Kind::Symlink(target.into_bytes().into())
            }
            _ => Kind::Special(stat.st_rdev),
        };
        let xattrs = self.xattrs(dir, name, path)?;
        let (mode, uid, gid) = (stat.st_mode, stat.st_uid, stat.st_gid);
        let node = self.add(Node { kind, mode, uid, gid, mtime: time(stat), links: 1, xattrs })?;
        if stat.st_nlink > 1 {
            self.linked.insert(identity, node);
        }
        Ok(node)
    }

    /// Extended attributes of a file, its symbolic link not followed; but those by which layers speak to overlayfs.
    fn xattrs(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8]) -> Result<Box<[u8]>> {
        // There is no call that takes a directory and a name; this path has no link but the kernel's own.
        let file = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
        let file = OsStr::from_bytes(&file);
        let shown = || String::from_utf8_lossy(&join(path, name)).into_owned();
        let failed = |e: Errno| io("read the attributes of", shown())(e);
        let length = match llistxattr(file, &mut self.buffer[..]) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Box::default()),
            Ok(length) => length,
            Err(e) => return Err(failed(e)),
        };
        let names = self.buffer.get(..length).unwrap_or_default().to_vec();
        let mut all = Vec::new();
        for name in names.split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.")) {
            let length = lgetxattr(file, OsStr::from_bytes(name), &mut self.buffer[..]).map_err(failed)?;
            all.push((name.to_vec(), self.buffer.get(..length).unwrap_or_default().to_vec()));
        }
        encode_xattrs(&format!("image {:?}: {}", self.what, shown()), all)
    }
}

fn time(stat: &Stat) -> (i64, u32) {
    (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

/// Lays what a layer has in a directory under what those above have.
fn look(dir: &OwnedFd, layer: usize, path: &[u8], found: &mut BTreeMap<Vec<u8>, Found>) -> Result<()> {
    let failed = |operation| {
        let path = String::from_utf8_lossy(path).into_owned();
        move |e: Errno| io(operation, path)(e)
    };
    for entry in Dir::read_from(dir).map_err(failed("list"))? {
        let entry = entry.map_err(failed("list"))?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." || matches!(found.get(name), Some(Found::Whiteout | Found::Other(..))) {
            continue;
        }
        let stat = statat(dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("stat"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        match found.get_mut(name) {
            Some(Found::Directory { layers, covered: false }) if kind == FileType::Directory => layers.push(layer),
            Some(Found::Directory { covered, .. }) => *covered |= kind != FileType::Directory,
            Some(Found::Whiteout | Found::Other(..)) => {}
            None => {
                let first = match kind {
                    FileType::Directory => Found::Directory { layers: vec![layer], covered: false },
                    FileType::CharacterDevice if stat.st_rdev == 0 => Found::Whiteout,
                    _ => Found::Other(stat, layer),
                };
                found.insert(name.to_vec(), first);
            }
        }
    }
    Ok(())
}

pub(super) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}
