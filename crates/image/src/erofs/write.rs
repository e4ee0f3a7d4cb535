//! Writing what was laid out.

use super::format::{BLOCK, Inode, device, directory_block, encode_directory_block, file_type, seal};
use super::layout::{Layout, Place};
use super::merge::{Directory, Kind, Node, Tree, join};
use crate::error::{Error, Result, io};
use crate::store::{Progress, ProgressFn};
use rustix::fs::{Mode, OFlags, SeekFrom, copy_file_range, openat, seek};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

/// Files from this size on are copied by the kernel, which on some file systems need not copy at all.
const LARGE: u64 = 256 << 10;
const STEP: u64 = 4 << 20;

pub(super) struct Writer<'a> {
    what: &'a str,
    tree: &'a Tree,
    layout: &'a Layout,
    to: &'a File,
    progress: ProgressFn<'a>,
    written: Vec<bool>,
    /// Bytes of content: all, written, and told of.
    total: u64,
    done: u64,
    told: u64,
    /// An inode and what follows it.
    buffer: Vec<u8>,
    content: Vec<u8>,
}

impl<'a> Writer<'a> {
    pub fn new(
        what: &'a str,
        tree: &'a Tree,
        layout: &'a Layout,
        to: &'a File,
        progress: ProgressFn<'a>,
    ) -> Writer<'a> {
        Writer {
            what,
            tree,
            layout,
            to,
            progress,
            written: vec![false; tree.nodes.len()],
            total: layout.places.iter().map(|p| p.size).sum(),
            done: 0,
            told: 0,
            buffer: Vec::new(),
            content: Vec::new(),
        }
    }

    pub fn write(mut self, uuid: &[u8; 16]) -> Result<()> {
        let length = self.layout.blocks * BLOCK;
        self.to.set_len(length).map_err(|e| self.failed(e))?;
        self.node(0, None)?;
        for directory in &self.tree.directories {
            let mut open = None;
            for (name, index) in &directory.entries {
                let opened = match self.tree.nodes.get(*index).map(|n| &n.kind) {
                    Some(Kind::File { layer, .. }) if self.written.get(*index) == Some(&false) => {
                        Some(self.file(directory, name, *layer, &mut open)?)
                    }
                    _ => None,
                };
                let shown = || String::from_utf8_lossy(&join(&directory.path, name)).into_owned();
                self.node(*index, opened.as_ref()).map_err(|e| match e {
                    Error::Io { operation: "read", source, .. } => io("read", shown())(source),
                    other => other,
                })?;
            }
        }
        let mut first = [0u8; BLOCK as usize];
        self.to.read_exact_at(&mut first, 0).map_err(|e| self.failed(e))?;
        let root = self.place(0).offset;
        seal(&mut first, root, self.tree.nodes.len() as u64, self.layout.blocks, uuid);
        self.put(&first, 0)
    }

    fn failed(&self, e: std::io::Error) -> Error {
        io("write the file system of image", self.what)(e)
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.to.write_all_at(bytes, at).map_err(|e| self.failed(e))
    }

    fn place(&self, node: usize) -> Place {
        self.layout.places.get(node).copied().unwrap_or_default()
    }

    /// Opens a file of a layer, keeping that layer's directory open for the next one.
    fn file(
        &self,
        directory: &Directory,
        name: &[u8],
        layer: usize,
        open: &mut Option<(usize, OwnedFd)>,
    ) -> Result<File> {
        let dir = match open.take() {
            Some((of, dir)) if of == layer => dir,
            _ => directory.open(self.tree, layer)?,
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&dir, OsStr::from_bytes(name), flags, Mode::empty())
            .map_err(io("open", String::from_utf8_lossy(&join(&directory.path, name)).as_ref()))?;
        *open = Some((layer, dir));
        Ok(file.into())
    }

    fn node(&mut self, index: usize, file: Option<&File>) -> Result<()> {
        let (Some(node), Some(written)) = (self.tree.nodes.get(index), self.written.get_mut(index)) else {
            return Ok(());
        };
        if std::mem::replace(written, true) {
            return Ok(());
        }
        let place = self.place(index);
        let tree = self.tree;
        self.content.clear();
        let whole = place.blocks * BLOCK;
        let tail = place.size.saturating_sub(whole);
        match (&node.kind, file) {
            (Kind::Directory(index), _) => {
                if let Some(directory) = tree.directories.get(*index) {
                    self.encode_directory(directory);
                }
            }
            (Kind::Symlink(target), _) => self.content.extend(&**target),
            (Kind::File { .. }, Some(file)) if place.size >= LARGE => {
                self.copy(file, place.start * BLOCK, place.size - tail)?;
                self.content.resize(tail as usize, 0);
                file.read_exact_at(&mut self.content, whole).map_err(io("read", ""))?;
            }
            (Kind::File { .. }, Some(file)) => {
                self.content.resize(place.size as usize, 0);
                file.read_exact_at(&mut self.content, 0).map_err(io("read", ""))?;
            }
            (Kind::File { .. }, None) | (Kind::Special(_), _) => {}
        }
        let tail_at = self.content.len() - tail as usize;
        let (blocks, tail) = self.content.split_at(tail_at);
        if !crate::blob::is_zero(blocks) {
            self.put(blocks, place.start * BLOCK)?;
        }
        self.buffer.clear();
        inode(node, index, &place).encode(&mut self.buffer);
        self.buffer.extend(&*node.xattrs);
        self.buffer.extend(tail);
        self.put(&self.buffer, place.offset)?;
        self.advance(place.size);
        Ok(())
    }

    fn encode_directory(&mut self, directory: &Directory) {
        let mut rest = directory.entries.as_slice();
        while !rest.is_empty() {
            let (count, _) = directory_block(rest.iter().map(|(name, _)| &**name));
            let (these, more) = rest.split_at(count);
            let entries: Vec<(&[u8], u64, u8)> = these
                .iter()
                .map(|(name, node)| {
                    let mode = self.tree.nodes.get(*node).map_or(0, |n| n.mode);
                    (&**name, self.place(*node).offset, file_type(mode))
                })
                .collect();
            encode_directory_block(&entries, &mut self.content);
            if !more.is_empty() {
                self.content.resize(self.content.len().next_multiple_of(BLOCK as usize), 0);
            }
            rest = if count == 0 { &[] } else { more };
        }
    }

    /// Copies the beginning of a file, but not its holes.
    fn copy(&mut self, from: &File, to: u64, length: u64) -> Result<()> {
        let mut at = 0;
        while at < length {
            let data = match seek(from, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                Err(e) => return Err(io("read", "")(e)),
            };
            let end = seek(from, SeekFrom::Hole(data)).map_err(io("read", ""))?.min(length);
            at = data;
            while at < end {
                at += self.copy_some(from, at, to + at, (end - at).min(STEP))?;
                self.tell(self.done + at);
            }
        }
        Ok(())
    }

    fn copy_some(&mut self, from: &File, at: u64, to: u64, length: u64) -> Result<u64> {
        match copy_file_range(from, Some(&mut { at }), self.to, Some(&mut { to }), length as usize) {
            Ok(0) => return Err(io("read", "")(std::io::Error::from(std::io::ErrorKind::UnexpectedEof))),
            Ok(n) => return Ok(n as u64),
            // A file system that cannot.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(self.failed(e.into())),
        }
        let mut buffer = vec![0u8; length.min(1 << 20) as usize];
        from.read_exact_at(&mut buffer, at).map_err(io("read", ""))?;
        self.put(&buffer, to)?;
        Ok(buffer.len() as u64)
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.tell(self.done);
    }

    fn tell(&mut self, done: u64) {
        if done >= self.told + STEP {
            self.told = done;
            (self.progress)(Progress::Bytes { what: self.what.to_owned(), done, total: Some(self.total) });
        }
    }
}

fn inode(node: &Node, index: usize, place: &Place) -> Inode {
    let start = match node.kind {
        Kind::Special(number) => device(number),
        Kind::Directory(_) | Kind::File { .. } | Kind::Symlink(_) => place.start as u32,
    };
    Inode {
        layout: place.layout(),
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        size: place.size,
        start,
        number: index as u32 + 1,
        mtime: node.mtime,
        links: node.links,
        xattrs: node.xattrs.len(),
    }
}
