//! The bytes of EROFS: superblock, extended inodes, directory blocks, extended attributes. All little-endian.

use crate::error::{Error, Result};

pub(super) const BLOCK: u64 = 4096;
const BLOCK_BITS: u8 = 12;
/// Inodes begin at multiples of this; their number (nid) is their offset divided by it.
pub(super) const SLOT: u64 = 32;
pub(super) const INODE: u64 = 64;
const SUPER_OFFSET: usize = 1024;
const SUPER: usize = 128;
/// First byte that an inode may have.
pub(super) const META: u64 = (SUPER_OFFSET + SUPER) as u64;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;
const DIRENT: usize = 12;
const XATTR_HEADER: usize = 12;
const INODE_EXTENDED: u16 = 1;
pub(super) const FLAT_PLAIN: u16 = 0;
pub(super) const FLAT_INLINE: u16 = 2;

pub(super) struct Inode {
    pub layout: u16,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// First block of the content, or the device.
    pub start: u32,
    pub number: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    /// Bytes of extended attributes that follow.
    pub xattrs: usize,
}

impl Inode {
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = if self.xattrs == 0 { 0 } else { (self.xattrs - XATTR_HEADER) / 4 + 1 };
        out.extend((self.layout << 1 | INODE_EXTENDED).to_le_bytes());
        out.extend((count as u16).to_le_bytes());
        out.extend((self.mode as u16).to_le_bytes());
        out.extend([0u8; 2]);
        out.extend(self.size.to_le_bytes());
        out.extend(self.start.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.uid.to_le_bytes());
        out.extend(self.gid.to_le_bytes());
        out.extend(self.mtime.0.to_le_bytes());
        out.extend(self.mtime.1.to_le_bytes());
        out.extend(self.links.to_le_bytes());
        out.extend([0u8; 16]);
    }
}

/// Writes the superblock into the first block, whose other bytes are there already: its checksum covers them.
pub(super) fn seal(first: &mut [u8; BLOCK as usize], root: u64, inodes: u64, blocks: u64, uuid: &[u8; 16]) {
    let mut bytes = Vec::with_capacity(SUPER);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    bytes.extend([BLOCK_BITS, 0]);
    bytes.extend(((root / SLOT) as u16).to_le_bytes());
    bytes.extend(inodes.to_le_bytes());
    bytes.extend([0u8; 12]);
    bytes.extend((blocks as u32).to_le_bytes());
    bytes.extend([0u8; 8]);
    bytes.extend(uuid);
    bytes.resize(SUPER, 0);
    first[SUPER_OFFSET..SUPER_OFFSET + SUPER].copy_from_slice(&bytes);
    let sum = crc32c(&first[SUPER_OFFSET..]);
    first[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&sum.to_le_bytes());
}

/// Castagnoli's, without the last inversion, as EROFS has it.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// Takes entries for one directory block; gives how many fit, and how many bytes they are.
pub(super) fn directory_block<'a>(names: impl Iterator<Item = &'a [u8]>) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0);
    for name in names {
        if bytes + DIRENT + name.len() > BLOCK as usize {
            break;
        }
        bytes += DIRENT + name.len();
        count += 1;
    }
    (count, bytes)
}

/// Entries (name, inode's offset, type of file) of one directory block.
pub(super) fn encode_directory_block(entries: &[(&[u8], u64, u8)], out: &mut Vec<u8>) {
    let mut name_at = entries.len() * DIRENT;
    for (name, offset, kind) in entries {
        out.extend((offset / SLOT).to_le_bytes());
        out.extend((name_at as u16).to_le_bytes());
        out.extend([*kind, 0]);
        name_at += name.len();
    }
    for (name, ..) in entries {
        out.extend(*name);
    }
}

/// `linux/fs_types.h`, by the mode.
pub(super) fn file_type(mode: u32) -> u8 {
    match mode & 0o170_000 {
        0o100_000 => 1,
        0o040_000 => 2,
        0o020_000 => 3,
        0o060_000 => 4,
        0o010_000 => 5,
        0o140_000 => 6,
        0o120_000 => 7,
        _ => 0,
    }
}

/// As the kernel's `new_encode_dev`.
pub(super) fn device(device: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// What attributes' names begin with, and the number that stands for it.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Extended attributes as they follow an inode; nothing for none.
pub(super) fn encode_xattrs(what: &str, mut xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Box<[u8]>> {
    xattrs.sort();
    let mut out = Vec::new();
    for (name, value) in &xattrs {
        let named = PREFIXES.iter().find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)));
        let Some((rest, index)) = named else { continue };
        let (Ok(name_length), Ok(value_length)) = (u8::try_from(rest.len()), u16::try_from(value.len())) else {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(Error::invalid(what, format!("its extended attribute {name} is of more than 65535 bytes")));
        };
        if out.is_empty() {
            out.extend([0u8; XATTR_HEADER]);
        }
        out.extend([name_length, index]);
        out.extend(value_length.to_le_bytes());
        out.extend(rest);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    if out.len() > XATTR_HEADER + 4 * (usize::from(u16::MAX) - 1) {
        return Err(Error::invalid(what, "its extended attributes are of more than 256 KiB"));
    }
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn attributes_are_padded_and_sorted_and_strange_ones_left_out() {
        let of = |all: &[(&str, &[u8])]| {
            encode_xattrs("x", all.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.to_vec())).collect())
        };
        assert!(of(&[]).unwrap().is_empty() && of(&[("system.nfs4_acl", b"x")]).unwrap().is_empty());
        let bytes = of(&[("user.b", b"12"), ("security.capability", b"x")]).unwrap();
        let capability = [&[10, 6, 1, 0][..], b"capability", b"x", &[0]].concat();
        assert_eq!(*bytes, [&[0u8; 12][..], &capability, &[1, 1, 2, 0], b"b12", &[0]].concat());
        assert!(of(&[("user.b", &[0; 65536])]).is_err());
    }
}
