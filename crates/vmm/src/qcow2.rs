//! The little of qcow2 that Atoll itself writes and reads: an empty overlay over a backing file, and the header
//! of what someone brought (<https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>).

use crate::machine::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const MAGIC: u32 = 0x5146_49fb;
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// What a qcow2 header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub virtual_size: u64,
    /// It names a backing file: refused for images that people bring, since the name could be any path.
    pub has_backing_file: bool,
    pub encrypted: bool,
    /// Version 3 incompatible feature bit 2: guest data in an external file.
    pub external_data: bool,
}

/// Reads a header; `None` if these bytes are not qcow2.
pub fn parse_header(bytes: &[u8]) -> Option<Header> {
    let be32 = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let be64 = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    if be32(0)? != MAGIC {
        return None;
    }
    let version = be32(4)?;
    Some(Header {
        version,
        virtual_size: be64(24)?,
        has_backing_file: be64(8)? != 0,
        encrypted: be32(32)? != 0,
        external_data: version >= 3 && be64(72)? & 4 != 0,
    })
}

/// The size a guest sees of a disk image, refusing images that point outside themselves.
pub fn virtual_size(path: &Path, qcow2: bool) -> Result<u64> {
    let mut file = File::open(path).map_err(Error::io("open disk", path))?;
    if !qcow2 {
        return Ok(file.metadata().map_err(Error::io("stat disk", path))?.len());
    }
    let mut head = [0u8; 104];
    let wrong = |message: &str| Error::DiskImage { path: path.display().to_string(), message: message.into() };
    file.read_exact(&mut head).map_err(|_| wrong("too short for a qcow2 image"))?;
    let header = parse_header(&head).ok_or_else(|| wrong("not a qcow2 image"))?;
    if header.has_backing_file || header.external_data {
        return Err(wrong("names another file; convert it to a standalone image first (qemu-img convert)"));
    }
    if header.encrypted {
        return Err(wrong("is encrypted; decrypt it first"));
    }
    Ok(header.virtual_size)
}

/// An empty qcow2 image of `size` bytes, at `path`, readable by `uid` alone. Its backing file is not named inside: the
/// engine is told which it is, so nothing in the image decides what is opened.
pub fn create_overlay(path: &Path, size: u64, uid: u32) -> Result<()> {
    let l2_entries = CLUSTER / 8;
    let l1_entries = size.div_ceil(CLUSTER * l2_entries).max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    if l1_clusters > 1024 {
        return Err(Error::DiskImage {
            path: path.display().to_string(),
            message: "is too large for an overlay".into(),
        });
    }
    // cluster 0 header, 1 refcount table, 2 refcount block, 3.. L1 table
    let used = 3 + l1_clusters;
    let mut image = vec![0u8; (used * CLUSTER) as usize];
    let mut put = |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &(l1_entries as u32).to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes()); // refcount_order: 16 bits
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    for cluster in 0..used {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create overlay", path))?;
    file.write_all(&image).map_err(Error::io("write overlay", path))?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(uid)).map_err(Error::io("chown overlay", path))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_reads_back_and_points_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.qcow2");
        create_overlay(&path, 10 << 30, rustix::process::getuid().as_raw()).unwrap();
        assert_eq!(virtual_size(&path, true).unwrap(), 10 << 30);
        let header = parse_header(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((header.version, header.has_backing_file, header.encrypted), (3, false, false));
    }

    #[test]
    fn images_that_name_other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evil.qcow2");
        create_overlay(&path, 1 << 20, rustix::process::getuid().as_raw()).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[15] = 200;
        std::fs::write(&path, &bytes).unwrap();
        assert!(virtual_size(&path, true).unwrap_err().to_string().contains("names another file"));
    }

    proptest::proptest! {
        #[test]
        fn headers_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = parse_header(&bytes);
            let mut with_magic = MAGIC.to_be_bytes().to_vec();
            with_magic.extend(bytes);
            let _ = parse_header(&with_magic);
        }
    }
}
