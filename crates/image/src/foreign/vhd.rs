//! VHD, of Virtual PC and Hyper-V's first years ("Virtual Hard Disk Image Format Specification", 2006). Numbers are big-endian.

use super::{Layout, Place, be32, be64, read};
use std::fs::File;

pub const MAGIC: &[u8] = b"conectix";
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const ABSENT: u32 = u32::MAX;
/// Blocks of one table.
const MOST: u32 = 16 << 20;

pub struct Vhd {
    size: u64,
    block: u64,
    /// Sectors where blocks begin, their bitmaps in front; none of a fixed disk.
    table: Option<Vec<u32>>,
}

/// Ones' complement of the sum of all bytes but its own four.
fn checked(bytes: &[u8], at: usize, what: &str) -> Result<(), String> {
    let own: u32 = bytes.get(at..at + 4).unwrap_or_default().iter().map(|b| u32::from(*b)).sum();
    let sum = bytes.iter().map(|b| u32::from(*b)).fold(0u32, u32::wrapping_add).wrapping_sub(own);
    if be32(bytes, at) == !sum { Ok(()) } else { Err(format!("its {what} is damaged (checksum)")) }
}

impl Vhd {
    pub fn open(file: &File) -> Result<Self, String> {
        let length = file.metadata().map_err(|e| e.to_string())?.len();
        let end = length.checked_sub(512).ok_or("it is too short")?;
        let footer = read(file, end, 512, "footer")?;
        if !footer.starts_with(MAGIC) {
            return Err("it has no footer; was it copied as a whole?".into());
        }
        checked(&footer, 64, "footer")?;
        let size = be64(&footer, 48);
        match be32(&footer, 60) {
            FIXED if size > end => Err("it is cut off".into()),
            FIXED => Ok(Vhd { size, block: 1 << 20, table: None }),
            DYNAMIC => Self::dynamic(file, size, be64(&footer, 16)),
            4 => Err("it has a parent; merge it first".into()),
            kind => Err(format!("a disk of kind {kind}")),
        }
    }

    fn dynamic(file: &File, size: u64, at: u64) -> Result<Self, String> {
        let header = read(file, at, 1024, "header")?;
        if !header.starts_with(b"cxsparse") {
            return Err("it has no header of a dynamic disk".into());
        }
        checked(&header, 36, "header")?;
        let (entries, block) = (be32(&header, 28), u64::from(be32(&header, 32)));
        if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
            return Err(format!("blocks of {block} bytes"));
        }
        if entries > MOST || u64::from(entries) * block < size {
            return Err(format!("a table of {entries} blocks for {size} bytes"));
        }
        let bytes = read(file, be64(&header, 16), entries as usize * 4, "table of blocks")?;
        let table = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_be_bytes(*b)).collect();
        Ok(Vhd { size, block, table: Some(table) })
    }
}

impl Layout for Vhd {
    fn size(&self) -> u64 {
        self.size
    }
    fn block(&self) -> u64 {
        self.block
    }
    fn locate(&mut self, _: &File, index: u64) -> Result<Place, String> {
        let Some(table) = &self.table else { return Ok(Place::At(index * self.block)) };
        let bitmap = (self.block / 512 / 8).next_multiple_of(512);
        match table.get(index as usize) {
            None | Some(&ABSENT) => Ok(Place::Zero),
            Some(sector) => Ok(Place::At(u64::from(*sector) * 512 + bitmap)),
        }
    }
}
