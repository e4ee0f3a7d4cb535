//! A disk in a qcow2 image (<https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>), with what it does not
//! hold read from a base. The image is foreign bytes: what its tables say is only ever an offset into its own file.

use super::Disk;
use crate::kvm::memory::Memory;
use crate::kvm::virtio::queue::{self, Segment};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const MAGIC: u32 = 0x5146_49fb;
/// An L1 table for 16 TiB in clusters of 64 KiB.
const MOST_L1: u64 = 32 << 10;
const MOST_REFCOUNT_BYTES: u64 = 8 << 20;
/// L2 tables kept in memory: 512 MiB of disk each, in clusters of 64 KiB.
const MOST_TABLES: usize = 32;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("qcow2: {}", what.into()))
}

pub struct Qcow2 {
    file: File,
    len: u64,
    bits: u32,
    version: u32,
    l1: Vec<u64>,
    l1_at: u64,
    tables: HashMap<u64, Vec<u64>>,
    refcounts: Vec<u64>,
    refcounts_at: u64,
    /// Where the next cluster goes.
    end: u64,
    base: Option<Box<dyn Disk>>,
    writable: bool,
}

/// What a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    /// Not here: the base's, or zeros.
    Absent,
    Zero,
    /// `own`: no snapshot shares it.
    Data {
        at: u64,
        own: bool,
    },
    Compressed(u64),
}

fn words(file: &File, at: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0u8; usize::try_from(count * 8).map_err(|_| bad("a table too large"))?];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
}

impl Qcow2 {
    pub fn open(file: File, base: Option<Box<dyn Disk>>, writable: bool) -> io::Result<Self> {
        let mut head = [0u8; 104];
        file.read_exact_at(&mut head[..72], 0).map_err(|_| bad("too short"))?;
        let be32 = |at: usize| head.get(at..at + 4).map_or(0, |b| b.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)));
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        let version = be32(4);
        if be32(0) != MAGIC || !matches!(version, 2 | 3) {
            return Err(bad("not an image of version 2 or 3"));
        }
        let (bits, len, l1_size) = (be32(20), be64(24), u64::from(be32(36)));
        let (l1_at, refcounts_at, refcount_clusters) = (be64(40), be64(48), u64::from(be32(56)));
        if !(9..=21).contains(&bits) || be32(32) != 0 || l1_size > MOST_L1 {
            return Err(bad("cluster size, encryption or size not supported"));
        }
        if writable && be32(60) != 0 {
            return Err(bad("holds snapshots"));
        }
        let mut order = 4;
        if version == 3 {
            file.read_exact_at(&mut head, 0).map_err(|_| bad("too short"))?;
            let be32 =
                |at: usize| head.get(at..at + 4).map_or(0, |b| b.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)));
            // incompatible features; the dirty bit alone does not hinder reading
            let unknown = u64::from(be32(72)) << 32 | u64::from(be32(76) & if writable { !0 } else { !1 });
            if unknown != 0 {
                return Err(bad(format!("incompatible features {unknown:#x}")));
            }
            order = be32(96);
        }
        if writable && order != 4 {
            return Err(bad("refcounts are not 16 bits wide"));
        }
        let covered = l1_size << (2 * bits - 3);
        if len > covered {
            return Err(bad("its first table is too short"));
        }
        let refcount_bytes = refcount_clusters << bits;
        let refcounts = match writable {
            true if refcount_bytes > MOST_REFCOUNT_BYTES => return Err(bad("a refcount table too large")),
            true => words(&file, refcounts_at, refcount_bytes / 8)?,
            false => Vec::new(),
        };
        let end = file.metadata()?.len().next_multiple_of(1 << bits);
        let l1 = words(&file, l1_at, l1_size)?;
        let tables = HashMap::new();
        Ok(Qcow2 { file, len, bits, version, l1, l1_at, tables, refcounts, refcounts_at, end, base, writable })
    }

    fn size(&self) -> u64 {
        1 << self.bits
    }

    /// Index into the first table, index into the second.
    fn indices(&self, offset: u64) -> (usize, usize) {
        let cluster = offset >> self.bits;
        let per_table = self.bits - 3;
        ((cluster >> per_table) as usize, (cluster & ((1 << per_table) - 1)) as usize)
    }

    fn table(&mut self, at: u64) -> io::Result<&mut Vec<u64>> {
        if !self.tables.contains_key(&at) {
            if self.tables.len() >= MOST_TABLES {
                self.tables.clear();
            }
            let table = words(&self.file, at, self.size() / 8)?;
            self.tables.insert(at, table);
        }
        self.tables.get_mut(&at).ok_or_else(|| bad("a table was lost"))
    }

    fn lookup(&mut self, offset: u64) -> io::Result<Cluster> {
        let (first, second) = self.indices(offset);
        let table = self.l1.get(first).copied().unwrap_or(0) & OFFSET;
        if table == 0 {
            return Ok(Cluster::Absent);
        }
        let entry = self.table(table)?.get(second).copied().unwrap_or(0);
        if entry & COMPRESSED != 0 {
            return Ok(Cluster::Compressed(entry));
        }
        let at = entry & OFFSET;
        if self.version == 3 && entry & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        Ok(if at == 0 { Cluster::Absent } else { Cluster::Data { at, own: entry & COPIED != 0 } })
    }

    /// Sets the entry of the second table for a cluster, making that table if there is none.
    fn set(&mut self, offset: u64, entry: u64) -> io::Result<()> {
        let (first, second) = self.indices(offset);
        let mut table = self.l1.get(first).copied().ok_or_else(|| bad("beyond its first table"))?;
        if table & COPIED == 0 {
            let old = table & OFFSET;
            let content = if old == 0 { vec![0; (self.size() / 8) as usize] } else { self.table(old)?.clone() };
            let at = self.allocate()?;
            let bytes: Vec<u8> = content.iter().flat_map(|w| w.to_be_bytes()).collect();
            self.file.write_all_at(&bytes, at)?;
            self.tables.insert(at, content);
            table = at | COPIED;
            self.file.write_all_at(&table.to_be_bytes(), self.l1_at + 8 * first as u64)?;
            if let Some(slot) = self.l1.get_mut(first) {
                *slot = table;
            }
        }
        let at = table & OFFSET;
        self.file.write_all_at(&entry.to_be_bytes(), at + 8 * second as u64)?;
        if let Some(slot) = self.table(at)?.get_mut(second) {
            *slot = entry;
        }
        Ok(())
    }

    /// A fresh cluster of zeros at the end of the file, counted before anything refers to it.
    fn allocate(&mut self) -> io::Result<u64> {
        let at = self.end;
        self.end += self.size();
        self.file.set_len(self.end)?;
        self.count(at)?;
        Ok(at)
    }

    fn count(&mut self, at: u64) -> io::Result<()> {
        let per_block = self.size() / 2;
        let (block, entry) = ((at >> self.bits) / per_block, (at >> self.bits) % per_block);
        let known = self.refcounts.get(block as usize).copied();
        let mut block_at = known.ok_or_else(|| bad("its refcount table is full"))? & OFFSET;
        if block_at == 0 {
            block_at = self.end;
            self.end += self.size();
            self.file.set_len(self.end)?;
            self.file.write_all_at(&block_at.to_be_bytes(), self.refcounts_at + 8 * block)?;
            if let Some(slot) = self.refcounts.get_mut(block as usize) {
                *slot = block_at;
            }
            self.count(block_at)?;
        }
        self.file.write_all_at(&1u16.to_be_bytes(), block_at + 2 * entry)
    }

    fn read_compressed(&self, entry: u64, buffer: &mut [u8], skip: u64) -> io::Result<()> {
        let shift = 62 - (self.bits - 8);
        let at = entry & ((1 << shift) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> shift;
        let length = (sectors + 1) * 512 - (at & 511);
        let mut packed = vec![0u8; usize::try_from(length).map_err(|_| bad("a compressed cluster too large"))?];
        let mut have = 0;
        // the last one may end with the file
        while let Some(rest) = packed.get_mut(have..).filter(|r| !r.is_empty()) {
            match self.file.read_at(rest, at + have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        let mut whole = vec![0u8; self.size() as usize];
        let mut inflate = flate2::Decompress::new(false);
        let packed = packed.get(..have).unwrap_or_default();
        inflate.decompress(packed, &mut whole, flate2::FlushDecompress::Finish).map_err(|e| bad(e.to_string()))?;
        let from = whole.get(skip as usize..).and_then(|w| w.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or_else(|| bad("a range beyond its cluster"))?);
        Ok(())
    }

    fn read_base(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        buffer.fill(0);
        let Some(base) = &mut self.base else { return Ok(()) };
        let there = base.capacity().saturating_sub(offset).min(buffer.len() as u64);
        match buffer.get_mut(..there as usize) {
            Some(part) if !part.is_empty() => base.read_bytes(part, offset),
            _ => Ok(()),
        }
    }

    /// The bytes of one cluster or a part of it.
    fn read_part(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self.lookup(offset)? {
            Cluster::Absent => self.read_base(buffer, offset),
            Cluster::Zero => {
                buffer.fill(0);
                Ok(())
            }
            Cluster::Data { at, .. } => self.file.read_exact_at(buffer, at + offset % self.size()),
            Cluster::Compressed(entry) => self.read_compressed(entry, buffer, offset % self.size()),
        }
    }

    /// (offset, length) of the part of each cluster that a range covers.
    fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (size, end) = (self.size(), offset + length);
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let from = at;
            at = ((at / size + 1) * size).min(end);
            Some((from, at - from))
        })
    }

    /// Makes the cluster this image's own, with `content` (all of it) in it.
    fn own(&mut self, offset: u64, content: &[u8]) -> io::Result<()> {
        let at = self.allocate()?;
        self.file.write_all_at(content, at)?;
        self.set(offset, at | COPIED)
    }

    /// Writes bytes to a cluster that is not this image's own yet.
    fn write_fresh(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let size = self.size();
        let start = offset / size * size;
        let mut whole = vec![0u8; size as usize];
        if bytes.len() as u64 != size {
            self.read_part(&mut whole, start)?;
        }
        let from = (offset - start) as usize;
        let to = whole.get_mut(from..from + bytes.len()).ok_or_else(|| bad("a range beyond its cluster"))?;
        to.copy_from_slice(bytes);
        self.own(start, &whole)
    }
}

impl Disk for Qcow2 {
    fn capacity(&self) -> u64 {
        self.len
    }

    fn read_bytes(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buffer;
        for (at, length) in self.parts(offset, rest.len() as u64) {
            let (part, next) = rest.split_at_mut(length as usize);
            self.read_part(part, at)?;
            rest = next;
        }
        Ok(())
    }

    fn read(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()> {
        for (at, length) in self.parts(offset, queue::length(segments)) {
            let part = queue::part(segments, at - offset, length);
            if let Cluster::Data { at: data, .. } = self.lookup(at)? {
                let from = data + at % self.size();
                super::raw::all(&part, |rest, done| {
                    crate::kvm::sys::read_at(self.file.as_fd(), memory, rest, from + done)
                })?;
                continue;
            }
            let mut buffer = vec![0u8; length as usize];
            self.read_part(&mut buffer, at)?;
            queue::scatter(memory, &part, &buffer).map_err(|f| bad(f.0))?;
        }
        Ok(())
    }

    fn write(&mut self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        for (at, length) in self.parts(offset, queue::length(segments)) {
            let part = queue::part(segments, at - offset, length);
            if let Cluster::Data { at: data, own: true } = self.lookup(at)? {
                let to = data + at % self.size();
                super::raw::all(&part, |rest, done| {
                    crate::kvm::sys::write_at(self.file.as_fd(), memory, rest, to + done)
                })?;
                continue;
            }
            let mut buffer = vec![0u8; length as usize];
            queue::gather(memory, &part, &mut buffer).map_err(|f| bad(f.0))?;
            self.write_fresh(at, &buffer)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        for (at, length) in self.parts(offset, length) {
            if let Cluster::Data { at: data, own: true } = self.lookup(at)? {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(&self.file, hole, data + at % self.size(), length) {
                    Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        for (at, length) in self.parts(offset, length) {
            match self.lookup(at)? {
                Cluster::Zero => {}
                Cluster::Absent if self.base.is_none() => {}
                Cluster::Absent if length == self.size() && self.version == 3 => self.set(at, ZERO)?,
                Cluster::Data { at: data, own: true } => {
                    self.file.write_all_at(&vec![0u8; length as usize], data + at % self.size())?;
                }
                _ => self.write_fresh(at, &vec![0u8; length as usize])?,
            }
        }
        Ok(())
    }
}

/// For fuzzing: any bytes are an image, read and written.
pub fn fuzz(data: &[u8]) {
    let file = rustix::fs::memfd_create("qcow2", rustix::fs::MemfdFlags::CLOEXEC).map(File::from);
    let (Ok(file), Ok(memory)) = (file, crate::kvm::memory::allocate(1 << 16)) else { return };
    if file.write_all_at(data, 0).is_err() {
        return;
    }
    let segments = [Segment { address: vm_memory::GuestAddress(0), len: 1024 }];
    if let Ok(mut disk) = Qcow2::open(file, None, true) {
        let last = disk.capacity().saturating_sub(1024) & !511;
        for at in [0, 1 << 16, last] {
            let _ = disk.read(&memory, &segments, at);
            let _ = disk.write(&memory, &segments, at);
            let _ = disk.zero(at, 512, true);
        }
    }
}

#[cfg(test)]
mod tests;
