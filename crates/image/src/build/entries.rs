//! The entries that one step puts into its layer, before they are written: they can be hashed for the cache first.

use super::layer::Item;
use super::view::{Tree, Xattrs};
use crate::digest::{Digest, Hasher};
use crate::error::{Result, io};
use crate::spec::Descriptor;
use crate::store::Store;
use rustix::fs::{FileType, Stat};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) struct Entry<'a> {
    pub item: Item,
    pub content: Content<'a>,
}

pub(crate) enum Content<'a> {
    None,
    Bytes(Vec<u8>),
    /// A file of a tree.
    File(&'a Tree, PathBuf),
    /// A piece of an archive.
    Piece(Arc<File>, u64),
}

impl Entry<'_> {
    pub fn directory(path: &[u8], mode: u32, owner: (u32, u32)) -> Entry<'static> {
        let item = Item { path: path.to_vec(), kind: b'5', mode, uid: owner.0, gid: owner.1, ..Item::default() };
        Entry { item, content: Content::None }
    }

    fn reader(&self) -> Result<Box<dyn Read + '_>> {
        let shown = String::from_utf8_lossy(&self.item.path).into_owned();
        Ok(match &self.content {
            Content::None => Box::new(std::io::empty()),
            Content::Bytes(bytes) => Box::new(&bytes[..]),
            Content::File(tree, path) => Box::new(tree.read(path).map_err(io("open", shown))?),
            Content::Piece(file, offset) => {
                let mut file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&**file)))
                    .map_err(io("open", &shown))?;
                file.seek(SeekFrom::Start(*offset)).map_err(io("read", shown))?;
                Box::new(file.take(self.item.size))
            }
        })
    }
}

/// The entry of a file found in a tree, owner and path yet to be set. `None` for what no layer holds (sockets, devices).
pub(crate) fn of_stat<'a>(
    tree: &'a Tree,
    path: &std::path::Path,
    stat: &Stat,
) -> rustix::io::Result<Option<Entry<'a>>> {
    let mut item = Item {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        ..Item::default()
    };
    let mut content = Content::None;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            item.kind = b'5';
            item.xattrs = kept(tree.xattrs(path)?);
        }
        FileType::RegularFile => {
            item.kind = b'0';
            item.size = u64::try_from(stat.st_size).unwrap_or(0);
            item.xattrs = kept(tree.xattrs(path)?);
            content = Content::File(tree, path.to_path_buf());
        }
        FileType::Symlink => {
            (item.kind, item.mode) = (b'2', 0o777);
            item.link = tree.link(path)?;
        }
        FileType::Fifo => item.kind = b'6',
        _ => return Ok(None),
    }
    Ok(Some(Entry { item, content }))
}

/// Attributes that mean the same elsewhere. Access lists name ids of this machine and are left out.
fn kept(xattrs: Xattrs) -> Xattrs {
    let own = |name: &[u8]| name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
    xattrs
        .into_iter()
        .filter_map(|(name, value)| match name.as_slice() {
            b"security.capability" => Some((name, rootless_capability(value))),
            _ if own(&name) => Some((name, value)),
            _ => None,
        })
        .collect()
}

/// Set inside a user namespace, a file's capabilities carry the id of that namespace's root (version 3); in an image
/// they are for whoever is root there (version 2).
fn rootless_capability(mut value: Vec<u8>) -> Vec<u8> {
    const VERSION_2: u32 = 0x0200_0000;
    const VERSION_3: u32 = 0x0300_0000;
    const FLAGS: u32 = 0x00ff_ffff;
    let magic = value.first_chunk::<4>().map(|b| u32::from_le_bytes(*b));
    if let Some(magic) = magic.filter(|m| m & !FLAGS == VERSION_3)
        && value.len() == 24
    {
        value.truncate(20);
        let magic = (magic & FLAGS) | VERSION_2;
        if let Some(head) = value.first_chunk_mut::<4>() {
            *head = magic.to_le_bytes();
        }
    }
    value
}

/// A digest of everything that will be in the layer but times.
pub(crate) fn digest(entries: &[Entry]) -> Result<Digest> {
    let mut all = Hasher::default();
    for entry in entries {
        let item = &entry.item;
        let mut content = Hasher::default();
        content.consume(entry.reader()?).map_err(io("read", String::from_utf8_lossy(&item.path).into_owned()))?;
        let fields = (item.kind, item.mode, item.uid, item.gid, item.size, &item.path, &item.link, &item.xattrs);
        let text = format!("{fields:?}{}\n", content.finish());
        let _ = all.write_all(text.as_bytes());
    }
    Ok(all.finish())
}

impl Store {
    pub(crate) fn write_layer(&self, entries: &[Entry], latest: Option<i64>) -> Result<(Descriptor, Digest)> {
        let mut writer = self.layer_writer(latest)?;
        for entry in entries {
            writer.add(&entry.item, entry.reader()?)?;
        }
        writer.finish()
    }
}
