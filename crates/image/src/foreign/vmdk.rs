//! VMDK in one file ("Virtual Disk Format 5.0", VMware): sparse, and stream-optimised as in OVA archives. Numbers are little-endian,
//! places are sectors.

use super::{Layout, Place, le32, le64, read};
use std::fs::File;
use std::io::Read;

pub const MAGIC: &[u8] = b"KDMV";
const SECTOR: u64 = 512;
const COMPRESSED: u32 = 1 << 16;
const ZERO_GRAINS: u32 = 1 << 2;
/// The directory's place is in a footer.
const AT_END: u64 = u64::MAX;
const MOST_TABLES: u64 = 4 << 20;

pub struct Vmdk {
    size: u64,
    grain: u64,
    compressed: bool,
    zero_grains: bool,
    per_table: u64,
    directory: Vec<u32>,
    /// The table read last, and which it is.
    table: Option<(u64, Vec<u32>)>,
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

impl Vmdk {
    pub fn open(file: &File) -> Result<Self, String> {
        let length = file.metadata().map_err(|e| e.to_string())?.len();
        // A description may be shorter than a header.
        if !read(file, 0, MAGIC.len(), "header")?.starts_with(MAGIC) {
            return Err("it is a description of other files; make one of them with `qemu-img convert`".into());
        }
        let mut head = read(file, 0, 512, "header")?;
        check_description(file, &head)?;
        if le64(&head, 56) == AT_END {
            let at = length.checked_sub(1024).ok_or("it is cut off")?;
            head = read(file, at, 512, "footer")?;
            if !head.starts_with(MAGIC) {
                return Err("it is cut off: its footer is not at its end".into());
            }
        }
        let (version, flags) = (le32(&head, 4), le32(&head, 8));
        let (capacity, grain, per_table) = (le64(&head, 12), le64(&head, 20), u64::from(le32(&head, 44)));
        if !(1..=3).contains(&version) {
            return Err(format!("version {version}"));
        }
        let compressed = flags & COMPRESSED != 0;
        let algorithm = head.get(77).copied().unwrap_or(0);
        if compressed && algorithm != 1 {
            return Err(format!("compression {algorithm}; deflate is known"));
        }
        if !grain.is_power_of_two() || !(8..=2048).contains(&grain) || !(1..=4096).contains(&per_table) {
            return Err(format!("grains of {grain} sectors in tables of {per_table}"));
        }
        let tables = capacity.div_ceil(grain * per_table);
        if tables > MOST_TABLES {
            return Err(format!("a disk of {capacity} sectors"));
        }
        let at = le64(&head, 56).checked_mul(SECTOR).ok_or("a directory beyond its end")?;
        let directory = words(&read(file, at, tables as usize * 4, "directory")?);
        let size = capacity.checked_mul(SECTOR).ok_or("too large a disk")?;
        let zero_grains = flags & ZERO_GRAINS != 0;
        Ok(Vmdk { size, grain, compressed, zero_grains, per_table, directory, table: None })
    }

    /// The sector where a grain is; 0 for none.
    fn entry(&mut self, file: &File, index: u64) -> Result<u32, String> {
        let number = index / self.per_table;
        if self.table.as_ref().is_none_or(|(known, _)| *known != number) {
            let table = match self.directory.get(number as usize).copied().unwrap_or(0) {
                0 => Vec::new(),
                at => words(&read(file, u64::from(at) * SECTOR, self.per_table as usize * 4, "table of grains")?),
            };
            self.table = Some((number, table));
        }
        let table = self.table.as_ref().map(|(_, table)| table);
        Ok(table.and_then(|table| table.get((index % self.per_table) as usize)).copied().unwrap_or(0))
    }

    /// A marker with the grain's number and length, then zlib's stream.
    fn inflate(&self, file: &File, at: u64, index: u64) -> Result<Vec<u8>, String> {
        let marker = read(file, at, 12, "grain")?;
        let length = le32(&marker, 8) as usize;
        let whole = (self.grain * SECTOR) as usize;
        if le64(&marker, 0) != index * self.grain || length > 2 * whole + 1024 {
            return Err(format!("grain {index} is not where its table says"));
        }
        let packed = read(file, at + 12, length, "grain")?;
        let mut bytes = Vec::with_capacity(whole);
        let mut inflated = flate2::read::ZlibDecoder::new(packed.as_slice()).take(whole as u64);
        inflated.read_to_end(&mut bytes).map_err(|e| format!("grain {index}: {e}"))?;
        // the last one of a disk may be shorter
        bytes.resize(whole, 0);
        Ok(bytes)
    }
}

/// The description inside must not lead to other files.
fn check_description(file: &File, head: &[u8]) -> Result<(), String> {
    let (at, sectors) = (le64(head, 28), le64(head, 36));
    if at == 0 || sectors == 0 {
        return Err("it is one of several files; make one of them with `qemu-img convert`".into());
    }
    let length = sectors.min(128) * SECTOR;
    let bytes =
        read(file, at.checked_mul(SECTOR).ok_or("a description beyond its end")?, length as usize, "description")?;
    let text = String::from_utf8_lossy(&bytes).to_lowercase();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix('='));
        line.map(|value| value.trim().trim_matches(['"', '\0']).to_owned()).unwrap_or_default()
    };
    if !matches!(value("parentcid").as_str(), "" | "ffffffff") {
        return Err("it has a parent; merge its snapshots first".into());
    }
    match value("createtype").as_str() {
        "monolithicsparse" | "streamoptimized" => Ok(()),
        other => Err(format!("createType \"{other}\"; monolithicSparse and streamOptimized are known")),
    }
}

impl Layout for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }
    fn block(&self) -> u64 {
        self.grain * SECTOR
    }
    fn locate(&mut self, file: &File, index: u64) -> Result<Place, String> {
        match self.entry(file, index)? {
            0 => Ok(Place::Zero),
            1 if self.zero_grains => Ok(Place::Zero),
            sector if self.compressed => self.inflate(file, u64::from(sector) * SECTOR, index).map(Place::Bytes),
            sector => Ok(Place::At(u64::from(sector) * SECTOR)),
        }
    }
}
