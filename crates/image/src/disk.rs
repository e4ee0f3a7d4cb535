//! Disk images of machines: what format, how large, and nothing that could reach beyond the file.

use crate::error::{Error, Result, io};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A disk ready to be a machine's, or the base of an overlay.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskImage {
    /// Read-only.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// Bytes, a multiple of 512.
    pub virtual_size: u64,
}

/// Bytes at the beginning that tell what a file is.
pub(crate) const HEAD: usize = 72 * 1024;
const QCOW2: &[u8] = b"QFI\xfb";

impl DiskImage {
    pub(crate) fn probe(path: &Path) -> Result<DiskImage> {
        let file = File::open(path).map_err(io("open", path))?;
        let length = file.metadata().map_err(io("stat", path))?.len();
        let mut head = [0u8; 104];
        let read = file.read_at(&mut head, 0).map_err(io("read", path))?;
        let head = head.get(..read).unwrap_or_default();
        let unrecognised = |why: String| Error::Unrecognised { path: path.to_path_buf(), why };
        if head.starts_with(QCOW2) {
            let virtual_size = check_qcow2(head).map_err(|why| unrecognised(format!("qcow2 disk: {why}")))?;
            return Ok(DiskImage { path: path.to_path_buf(), format: "qcow2".into(), virtual_size });
        }
        if length == 0 {
            return Err(unrecognised("an empty file is no disk".into()));
        }
        Ok(DiskImage { path: path.to_path_buf(), format: "raw".into(), virtual_size: length.next_multiple_of(512) })
    }
}

/// Checks a qcow2 header (QEMU's docs/interop/qcow2) and gives the virtual size. A backing file or an external data
/// file would let a stranger's image name any file of this machine.
pub(crate) fn check_qcow2(head: &[u8]) -> std::result::Result<u64, String> {
    let u32_at = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let u64_at = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    let short = || "its header is cut off".to_owned();
    let version = u32_at(4).ok_or_else(short)?;
    let backing = u64_at(8).ok_or_else(short)?;
    let cluster_bits = u32_at(20).ok_or_else(short)?;
    let size = u64_at(24).ok_or_else(short)?;
    let encryption = u32_at(32).ok_or_else(short)?;
    if version != 2 && version != 3 {
        return Err(format!("version {version} is not 2 or 3"));
    }
    if backing != 0 {
        return Err("it has a backing file; flatten it with `qemu-img convert`".into());
    }
    if version == 3 {
        let incompatible = u64_at(72).ok_or_else(short)?;
        if incompatible & 4 != 0 {
            return Err("it keeps its data in another file; convert it with `qemu-img convert`".into());
        }
        if incompatible & 2 != 0 {
            return Err("it is marked corrupt; repair it with `qemu-img check -r all`".into());
        }
    }
    if encryption != 0 {
        return Err("it is encrypted".into());
    }
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("a cluster of 2^{cluster_bits} bytes"));
    }
    if size == 0 || size > 1 << 50 {
        return Err(format!("a virtual size of {size} bytes"));
    }
    if !size.is_multiple_of(512) {
        return Err(format!("a virtual size of {size} bytes, not whole sectors of 512"));
    }
    Ok(size)
}

/// Whether the first `HEAD` bytes are those of a disk: partition table or a file system.
pub(crate) fn looks_like_disk(head: &[u8]) -> bool {
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    has(0, QCOW2)
        || has(510, &[0x55, 0xaa])
        || has(512, b"EFI PART")
        || has(1080, &[0x53, 0xef])
        || has(0, b"XFSB")
        || has(0, b"hsqs")
        || has(1024, &[0xe2, 0xe1, 0xf5, 0xe0])
        || has(0x8001, b"CD001")
        || has(0x10040, b"_BHRfS_M")
}

#[cfg(test)]
pub(crate) fn qcow2_header(backing: u64, incompatible: u64, size: u64) -> Vec<u8> {
    let mut head = vec![0u8; 104];
    head[..4].copy_from_slice(QCOW2);
    head[4..8].copy_from_slice(&3u32.to_be_bytes());
    head[8..16].copy_from_slice(&backing.to_be_bytes());
    head[20..24].copy_from_slice(&16u32.to_be_bytes());
    head[24..32].copy_from_slice(&size.to_be_bytes());
    head[72..80].copy_from_slice(&incompatible.to_be_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_reaches_no_other_file() {
        assert_eq!(check_qcow2(&qcow2_header(0, 0, 1 << 30)), Ok(1 << 30));
        assert!(check_qcow2(&qcow2_header(512, 0, 1 << 30)).unwrap_err().contains("backing file"));
        assert!(check_qcow2(&qcow2_header(0, 4, 1 << 30)).unwrap_err().contains("another file"));
        assert!(check_qcow2(&qcow2_header(0, 0, 0)).is_err());
        let odd = check_qcow2(&qcow2_header(0, 0, (1 << 30) + 1)).unwrap_err();
        assert!(odd.contains("sectors"), "{odd}");
        for cut in 4..80 {
            assert!(check_qcow2(&qcow2_header(0, 0, 1 << 30)[..cut]).is_err());
        }
    }
}
