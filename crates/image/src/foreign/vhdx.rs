//! VHDX, of Hyper-V ([MS-VHDX]). Numbers are little-endian.

use super::{Layout, Place, le32, le64, read};
use std::fs::File;

pub const MAGIC: &[u8] = b"vhdxfile";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Identifiers as they are on disk.
const BAT: [u8; 16] = [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08];
const METADATA: [u8; 16] =
    [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e];
const PARAMETERS: [u8; 16] =
    [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b];
const SIZE: [u8; 16] = [0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8];
const SECTOR: [u8; 16] =
    [0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f];
const LONGEST_TABLE: u64 = 256 * MIB;

pub struct Vhdx {
    size: u64,
    block: u64,
    /// Blocks between two bitmaps in the table.
    ratio: u64,
    table: Vec<u64>,
}

/// CRC-32C of a structure whose own sum, four bytes at 4, counts as zero.
fn checked(bytes: &[u8]) -> bool {
    let mut crc = !0u32;
    for (at, byte) in bytes.iter().enumerate() {
        crc ^= if (4..8).contains(&at) { 0 } else { u32::from(*byte) };
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc == le32(bytes, 4)
}

/// The newer of two that is whole.
fn header(file: &File) -> Result<Vec<u8>, String> {
    let good =
        |at: u64| read(file, at, 4096, "header").ok().filter(|bytes| bytes.starts_with(b"head") && checked(bytes));
    let both = [64 * KIB, 128 * KIB].into_iter().filter_map(good);
    both.max_by_key(|bytes| le64(bytes, 8)).ok_or_else(|| "neither of its headers is whole".into())
}

/// Offset and length of a region.
fn region(file: &File, wanted: &[u8; 16]) -> Result<(u64, u64), String> {
    let good = |at: u64| {
        read(file, at, 64 * KIB as usize, "region table").ok().filter(|b| b.starts_with(b"regi") && checked(b))
    };
    let table = [192 * KIB, 256 * KIB].into_iter().find_map(good).ok_or("neither of its region tables is whole")?;
    let count = le32(&table, 8).min(2047) as usize;
    let mut entries = (0..count).filter_map(|n| table.get(16 + n * 32..48 + n * 32));
    let entry = entries.find(|entry| entry.starts_with(wanted)).ok_or("it has no block table or no metadata")?;
    Ok((le64(entry, 16), u64::from(le32(entry, 24))))
}

fn item(
    file: &File,
    (at, length): (u64, u64),
    table: &[u8],
    wanted: &[u8; 16],
    size: usize,
) -> Result<Vec<u8>, String> {
    let count =
        usize::from(u16::from_le_bytes([table.get(10).copied().unwrap_or(0), table.get(11).copied().unwrap_or(0)]));
    let mut entries = (0..count.min(2047)).filter_map(|n| table.get(32 + n * 32..64 + n * 32));
    let entry = entries.find(|entry| entry.starts_with(wanted)).ok_or("its metadata lacks an item")?;
    let offset = u64::from(le32(entry, 16));
    if offset + size as u64 > length {
        return Err("its metadata lies outside its region".into());
    }
    read(file, at.checked_add(offset).ok_or("its metadata lies outside the file")?, size, "metadata")
}

impl Vhdx {
    pub fn open(file: &File) -> Result<Self, String> {
        let header = header(file)?;
        if header.get(48..64).is_some_and(|log| log.iter().any(|b| *b != 0)) {
            return Err(
                "it was not closed in order; open it once where it comes from, or `qemu-img check -r all`".into()
            );
        }
        let place = region(file, &METADATA)?;
        let table = read(file, place.0, 64 * KIB as usize, "metadata")?;
        if !table.starts_with(b"metadata") {
            return Err("it has no metadata where they should be".into());
        }
        let parameters = item(file, place, &table, &PARAMETERS, 8)?;
        if le32(&parameters, 4) & 2 != 0 {
            return Err("it has a parent; merge it first".into());
        }
        let block = u64::from(le32(&parameters, 0));
        let size = le64(&item(file, place, &table, &SIZE, 8)?, 0);
        let sector = u64::from(le32(&item(file, place, &table, &SECTOR, 4)?, 0));
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) || !matches!(sector, 512 | 4096) {
            return Err(format!("blocks of {block} bytes, sectors of {sector}"));
        }
        let ratio = (sector << 23) / block;
        let (at, length) = region(file, &BAT)?;
        let blocks = size.div_ceil(block);
        let entries = blocks + blocks.saturating_sub(1) / ratio;
        if entries * 8 > length || length > LONGEST_TABLE {
            return Err(format!("a table of {length} bytes for a disk of {size}"));
        }
        let bytes = read(file, at, (entries * 8) as usize, "table of blocks")?;
        let table = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Ok(Vhdx { size, block, ratio, table })
    }
}

impl Layout for Vhdx {
    fn size(&self) -> u64 {
        self.size
    }
    fn block(&self) -> u64 {
        self.block
    }
    fn locate(&mut self, _: &File, index: u64) -> Result<Place, String> {
        let entry = self.table.get((index + index / self.ratio) as usize).copied().unwrap_or(0);
        match entry & 7 {
            0..=3 => Ok(Place::Zero),
            6 => Ok(Place::At((entry >> 20) * MIB)),
            state => Err(format!("a block in state {state}")),
        }
    }
}
