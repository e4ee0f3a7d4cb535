//! A disk that is a file or block device, byte for byte.

use super::Disk;
use crate::kvm::memory::Memory;
use crate::kvm::sys;
use crate::kvm::virtio::queue::{self, Segment};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

pub struct Raw {
    file: File,
    len: u64,
}

impl Raw {
    pub fn open(mut file: File) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        Ok(Raw { file, len })
    }
}

/// Transfers all of `segments`, however little each call does.
pub fn all(segments: &[Segment], mut step: impl FnMut(&[Segment], u64) -> io::Result<usize>) -> io::Result<()> {
    let total = queue::length(segments);
    let mut done = 0;
    while done < total {
        let rest = if done == 0 { segments.to_vec() } else { queue::part(segments, done, u64::MAX) };
        match step(&rest, done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Disk for Raw {
    fn capacity(&self) -> u64 {
        self.len
    }
    fn read_bytes(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }
    fn read(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()> {
        all(segments, |rest, done| sys::read_at(self.file.as_fd(), memory, rest, offset + done))
    }
    fn write(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()> {
        all(segments, |rest, done| sys::write_at(self.file.as_fd(), memory, rest, offset + done))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            // a hint: a file system without holes keeps the bytes
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
    fn zero(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => {
                use std::os::unix::fs::FileExt;
                let zeros = vec![0u8; 64 << 10];
                let mut at = 0;
                while at < length {
                    let n = zeros.len().min((length - at) as usize);
                    self.file.write_all_at(zeros.get(..n).unwrap_or_default(), offset + at)?;
                    at += n as u64;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}
