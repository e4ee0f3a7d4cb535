//! Files' bytes shared where the file system can, copied where not.

use crate::machine::{Error, Result};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Bytes that a file has on disk; 0 if there is none.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

/// A file that never changes, under another name as well.
pub fn link(from: &Path, to: &Path) -> Result<()> {
    match std::fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(_) => clone_file(from, to),
    }
}

/// A new file, of mode 0600, with the bytes of another. They share their blocks on btrfs and XFS (`FICLONE`); elsewhere what
/// is not a hole is copied.
pub fn clone_file(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).map_err(Error::io("open", from))?;
    let mut options = OpenOptions::new();
    let target = options.write(true).create_new(true).mode(0o600).open(to).map_err(Error::io("create", to))?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let copied = || -> std::io::Result<()> {
        let length = source.metadata()?.len();
        target.set_len(length)?;
        let mut at = 0;
        while let Some((begin, end)) = extent(&source, at, length)? {
            copy_range(&source, &target, begin, end)?;
            at = end;
        }
        Ok(())
    };
    copied().map_err(Error::io("copy", from))
}

/// The next bytes from `at` on that are not a hole.
fn extent(file: &File, at: u64, length: u64) -> std::io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let begin = match seek(file, SeekFrom::Data(at)) {
        Ok(begin) => begin,
        Err(Errno::NXIO) => return Ok(None),
        // a file system that knows no holes
        Err(Errno::INVAL) => return Ok(Some((at, length))),
        Err(e) => return Err(e.into()),
    };
    Ok(Some((begin, seek(file, SeekFrom::Hole(begin))?.min(length))))
}

fn copy_range(from: &File, to: &File, begin: u64, end: u64) -> std::io::Result<()> {
    let (mut source, mut target) = (begin, begin);
    while source < end {
        let most = usize::try_from(end - source).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(from, Some(&mut source), to, Some(&mut target), most) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP) => return by_hand(from, to, source, end),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn by_hand(from: &File, to: &File, mut at: u64, end: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; 256 << 10];
    while at < end {
        let most = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let Some(part) = buffer.get_mut(..most) else { break };
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += most as u64;
    }
    Ok(())
}
