//! A disk's bytes, whatever they are kept in, as the block device uses them.

pub mod qcow2;
pub mod raw;

use crate::kvm::memory::Memory;
use crate::kvm::virtio::queue::Segment;
use crate::machine::{DiskFormat, Error, Machine, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

/// Offsets and lengths are bytes, multiples of 512, inside `capacity`.
pub trait Disk: Send {
    fn capacity(&self) -> u64;
    /// Into the host's own memory.
    fn read_bytes(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn read(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()>;
    fn write(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()>;
    /// All that was written is on stable storage.
    fn flush(&mut self) -> io::Result<()>;
    /// The guest has no use for these bytes any more.
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;
    /// These bytes read as zeros from now on; `unmap`: their space may be given back.
    fn zero(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;
}

/// What a disk's bytes are kept in, beside its own file.
pub enum Kind {
    Raw,
    /// With what it does not hold: an image that nobody writes.
    Qcow2 {
        base: Option<(File, DiskFormat)>,
    },
}

impl Kind {
    /// Descriptors beside the disk's own file.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match self {
            Kind::Raw | Kind::Qcow2 { base: None } => Vec::new(),
            Kind::Qcow2 { base: Some((file, _)) } => vec![file.as_raw_fd()],
        }
    }
}

/// In the jail: from here on the image's own bytes are read.
pub fn attach(file: File, kind: &Kind, read_only: bool) -> io::Result<Box<dyn Disk>> {
    let raw = |file: File| raw::Raw::open(file).map(|disk| Box::new(disk) as Box<dyn Disk>);
    match kind {
        Kind::Raw => raw(file),
        Kind::Qcow2 { base } => {
            let base = match base {
                None => None,
                Some((file, DiskFormat::Raw)) => Some(raw(file.try_clone()?)?),
                Some((file, DiskFormat::Qcow2)) => {
                    Some(Box::new(qcow2::Qcow2::open(file.try_clone()?, None, false)?) as Box<dyn Disk>)
                }
            };
            Ok(Box::new(qcow2::Qcow2::open(file, base, !read_only)?))
        }
    }
}

/// The file that takes a machine's writes to a disk whose image must not change, made if it is not there.
pub fn overlay(machine: &Machine, index: usize) -> Result<PathBuf> {
    let path = machine.state_dir.join(format!("disk{index}.qcow2"));
    let Some(disk) = machine.disks.get(index).filter(|_| !path.exists()) else { return Ok(path) };
    if let Some(from) = &disk.begins {
        // refuses what points outside itself
        crate::qcow2::virtual_size(from, true)?;
        let new = path.with_extension("new");
        let _ = std::fs::remove_file(&new);
        crate::saved::clone_file(from, &new)?;
        std::os::unix::fs::chown(&new, Some(machine.uid), Some(machine.uid)).map_err(Error::io("chown", &new))?;
        std::fs::rename(&new, &path).map_err(Error::io("rename", &new))?;
    } else {
        let size = crate::qcow2::virtual_size(&disk.path, disk.format == DiskFormat::Qcow2)?;
        crate::qcow2::create_overlay(&path, size, machine.uid)?;
    }
    Ok(path)
}

/// Opens a disk and locks it for as long as the descriptor lives, in whichever process: one writer, or any number of
/// readers.
pub fn open(path: &Path, write: bool) -> Result<File> {
    use rustix::fs::{FlockOperation, flock};
    let file = OpenOptions::new().read(true).write(write).open(path).map_err(Error::io("open disk", path))?;
    let how = if write { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    match flock(&file, how) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::DiskImage {
            path: path.display().to_string(),
            message: "is in use by another machine; stop that one first, or give this one a copy".into(),
        }),
        Err(e) => Err(Error::io("lock disk", path)(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = open(file.path(), false).unwrap();
        assert!(open(file.path(), false).is_ok());
        let error = open(file.path(), true).unwrap_err().to_string();
        assert!(error.contains("in use by another machine"), "{error}");
        drop(reader);
        let _writer = open(file.path(), true).unwrap();
        assert!(open(file.path(), false).is_err());
    }
}
