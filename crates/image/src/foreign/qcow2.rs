//! Writes a qcow2 image (QEMU's docs/interop/qcow2) in one pass: clusters that are not all zeros as they come, then the tables.

use super::CHUNK;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const BITS: u32 = 16;
const CLUSTER: u64 = CHUNK as u64;
/// Entries of a second table, 8 bytes each.
const TABLE: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in one block.
const COUNTS: u64 = CLUSTER / 2;
/// The refcount is one.
const OWN: u64 = 1 << 63;

pub struct Writer {
    file: File,
    size: u64,
    /// Where each first-level entry's table will be, by that entry; filled in order.
    tables: Vec<(u64, Vec<u64>)>,
    /// Clusters used.
    next: u64,
    current: Option<(u64, Vec<u8>)>,
}

impl Writer {
    pub fn new(file: File, size: u64) -> io::Result<Self> {
        Ok(Writer { file, size, tables: Vec::new(), next: 1, current: None })
    }

    /// Offsets only grow.
    pub fn write(&mut self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (cluster, within) = (offset / CLUSTER, (offset % CLUSTER) as usize);
            if self.current.as_ref().is_none_or(|(known, _)| *known != cluster) {
                self.flush()?;
                self.current = Some((cluster, vec![0; CHUNK]));
            }
            let (now, rest) = data.split_at(data.len().min(CHUNK - within));
            if let Some(to) = self.current.as_mut().and_then(|(_, b)| b.get_mut(within..within + now.len())) {
                to.copy_from_slice(now);
            }
            offset += now.len() as u64;
            data = rest;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some((cluster, bytes)) = self.current.take() else { return Ok(()) };
        if bytes.iter().all(|b| *b == 0) {
            return Ok(());
        }
        let at = self.append(&bytes)?;
        let (first, second) = (cluster / TABLE, (cluster % TABLE) as usize);
        if self.tables.last().is_none_or(|(known, _)| *known != first) {
            self.tables.push((first, vec![0; TABLE as usize]));
        }
        if let Some(entry) = self.tables.last_mut().and_then(|(_, table)| table.get_mut(second)) {
            *entry = at | OWN;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.next * CLUSTER;
        self.file.write_all_at(bytes, at)?;
        self.next += (bytes.len() as u64).div_ceil(CLUSTER);
        Ok(at)
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
        let first_size = self.size.div_ceil(CLUSTER * TABLE).max(1);
        let mut first = vec![0u64; usize::try_from(first_size).map_err(io::Error::other)?];
        for (index, table) in std::mem::take(&mut self.tables) {
            let at = self.append(&words(&table))?;
            if let Some(entry) = first.get_mut(index as usize) {
                *entry = at | OWN;
            }
        }
        let first_at = self.append(&words(&first))?;
        // refcounts count themselves: as many blocks as all clusters then need
        let (mut blocks, mut table) = (0u64, 1u64);
        while blocks * COUNTS < self.next + blocks + table {
            blocks = (self.next + blocks + table).div_ceil(COUNTS);
            table = (blocks * 8).div_ceil(CLUSTER).max(1);
        }
        let all = self.next + blocks + table;
        let mut block_places = Vec::new();
        for block in 0..blocks {
            let ones = all.saturating_sub(block * COUNTS).min(COUNTS) as usize;
            let mut bytes = [0u8, 1].repeat(ones);
            bytes.resize(CHUNK, 0);
            block_places.push(self.append(&bytes)?);
        }
        let mut counts = words(&block_places);
        counts.resize((table * CLUSTER) as usize, 0);
        let counts_at = self.append(&counts)?;
        self.file.set_len(self.next * CLUSTER)?;
        self.file.write_all_at(&self.header(first_size as u32, first_at, counts_at, table as u32), 0)?;
        self.file.sync_all()
    }

    fn header(&self, first_size: u32, first_at: u64, counts_at: u64, table: u32) -> Vec<u8> {
        let mut head = vec![0u8; 104];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = head.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(0, b"QFI\xfb");
        put(4, &3u32.to_be_bytes());
        put(20, &BITS.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &first_size.to_be_bytes());
        put(40, &first_at.to_be_bytes());
        put(48, &counts_at.to_be_bytes());
        put(56, &table.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        head
    }
}
