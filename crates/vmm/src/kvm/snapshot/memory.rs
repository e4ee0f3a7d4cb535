//! The guest's memory as a file, and a file as the guest's memory: mapped, each machine with its own copies of the pages
//! it writes.

use super::{Error, Id};
use crate::kvm::memory::{self, Memory};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

const MAGIC: [u8; 8] = *b"ATOLLMEM";
const VERSION: u32 = 1;
const PAGE: u64 = 4096;
/// Pages looked at in one go: 1 MiB.
const BATCH: u64 = 256;
/// Runs of pages in a difference.
const MOST_RUNS: usize = 1 << 20;

/// What Linux says of each page of this process (<https://docs.kernel.org/admin-guide/mm/pagemap.html>).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Of pages in their order: a change of any one word changes it. Not against forgery; the files are root's.
#[derive(Default)]
struct Sum(u64);

impl Sum {
    fn add(&mut self, page: &[u8; PAGE as usize]) {
        for word in page.as_chunks::<8>().0 {
            // an odd factor: no two sums become one
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
}

/// Where a guest's memory may differ from what it began as.
pub struct Pagemap(File);

impl Pagemap {
    /// Opens this process's own; to be called where `/proc` still is.
    pub fn open() -> std::io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    pub fn descriptor(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }

    /// Of each of `count` pages from the host's address `at`: whether the guest or a device ever wrote to it.
    fn written(&self, at: u64, count: u64) -> std::io::Result<Vec<bool>> {
        let mut bytes = vec![0u8; (count * 8) as usize];
        self.0.read_exact_at(&mut bytes, at / PAGE * 8)?;
        let of = |entry: &[u8; 8]| {
            let entry = u64::from_le_bytes(*entry);
            entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
        };
        Ok(bytes.as_chunks::<8>().0.iter().map(of).collect())
    }
}

/// What was written.
pub struct Written {
    pub sum: u64,
    pub runs: Vec<(u64, u64)>,
}

/// Writes all of `memory` that is not zero to `to`, an empty file; or, with a base, all that differs from it. No vCPU and no
/// device runs.
pub fn write(
    memory: &Memory,
    pagemap: Option<&Pagemap>,
    to: &File,
    id: Id,
    base: Option<&File>,
) -> Result<Written, Error> {
    let total: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    to.set_len(total + PAGE).map_err(Error::Read)?;
    let mut out = Writer { to, base, crc: Sum::default(), runs: Vec::new(), before: vec![0; (BATCH * PAGE) as usize] };
    let mut first = 0;
    let mut buffer = vec![0u8; (BATCH * PAGE) as usize];
    for region in memory.iter() {
        // of a file's pages those that were not written are the file's: nothing new only where that is the base
        let over = region.file_offset().map(|f| same(f.file(), base));
        let known = pagemap.filter(|_| over != Some(false));
        let mut at = 0;
        while at < region.len() {
            let pages = BATCH.min((region.len() - at) / PAGE);
            let host = region.as_ptr() as u64 + at;
            let touched = known.and_then(|p| p.written(host, pages).ok());
            let skip_untouched = base.is_none() || over == Some(true);
            if touched.as_ref().is_none_or(|t| t.iter().any(|page| *page)) || !skip_untouched {
                let bytes = buffer.get_mut(..(pages * PAGE) as usize).unwrap_or_default();
                let from = GuestAddress(region.start_addr().0 + at);
                memory.read_slice(bytes, from).map_err(|e| Error::Content(e.to_string()))?;
                out.pages(first + at / PAGE, bytes)?;
            }
            at += pages * PAGE;
        }
        first += region.len() / PAGE;
    }
    to.write_all_at(&trailer(total, id), total).map_err(Error::Read)?;
    to.sync_data().map_err(Error::Read)?;
    Ok(Written { sum: out.crc.0, runs: out.runs })
}

fn same(file: &File, other: Option<&File>) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |file: &File| file.metadata().ok().map(|m| (m.dev(), m.ino()));
    other.is_some_and(|other| of(file).is_some() && of(file) == of(other))
}

struct Writer<'a> {
    to: &'a File,
    base: Option<&'a File>,
    crc: Sum,
    runs: Vec<(u64, u64)>,
    before: Vec<u8>,
}

impl Writer<'_> {
    fn pages(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let before = self.before.get_mut(..bytes.len()).unwrap_or_default();
        if let Some(base) = self.base {
            base.read_exact_at(before, first * PAGE).map_err(Error::Read)?;
        }
        let (pages, _) = bytes.as_chunks::<{ PAGE as usize }>();
        let (old, _) = before.as_chunks::<{ PAGE as usize }>();
        let (mut at, mut start) = (first, None);
        for (page, old) in pages.iter().zip(old) {
            let zero = is_zero(page);
            if self.base.is_some() && page != old {
                let room = self.runs.len() < MOST_RUNS;
                match self.runs.last_mut() {
                    Some((from, count)) if *from + *count == at => *count += 1,
                    _ if room => self.runs.push((at, 1)),
                    _ => return Err(Error::Content("the differences are too scattered; take a full snapshot".into())),
                }
            }
            let wanted = !zero && (self.base.is_none() || page != old);
            if wanted {
                self.crc.add(page);
                start.get_or_insert(at);
            } else if let Some(from) = start.take() {
                put(self.to, first, bytes, from, at)?;
            }
            at += 1;
        }
        start.map_or(Ok(()), |from| put(self.to, first, bytes, from, at))
    }
}

/// Pages `from` to `until` of `bytes`, whose first is page `first`.
fn put(to: &File, first: u64, bytes: &[u8], from: u64, until: u64) -> Result<(), Error> {
    let range = ((from - first) * PAGE) as usize..((until - first) * PAGE) as usize;
    to.write_all_at(bytes.get(range).unwrap_or_default(), from * PAGE).map_err(Error::Read)
}

fn is_zero(page: &[u8; PAGE as usize]) -> bool {
    page.as_chunks::<64>().0.iter().all(|part| *part == [0; 64])
}

fn trailer(total: u64, id: Id) -> [u8; PAGE as usize] {
    let mut page = [0u8; PAGE as usize];
    let text = [&MAGIC[..], &VERSION.to_le_bytes(), &total.to_le_bytes(), &id.0].concat();
    for (to, byte) in page.iter_mut().zip(text) {
        *to = byte;
    }
    page
}

/// Whether this is the memory file that a state speaks of, whole.
fn check(file: &File, total: u64, id: Id) -> Result<(), Error> {
    let length = file.metadata().map_err(Error::Read)?.len();
    if length != total.saturating_add(PAGE) {
        return Err(Error::Damaged);
    }
    let mut page = [0u8; PAGE as usize];
    file.read_exact_at(&mut page, total).map_err(Error::Read)?;
    match page == trailer(total, id) {
        true => Ok(()),
        false if page.starts_with(&MAGIC) => Err(Error::Content("this memory belongs to another snapshot".into())),
        false => Err(Error::Damaged),
    }
}

/// The id of a memory file of that many bytes.
pub fn id(file: &File, bytes: u64) -> Result<Id, Error> {
    let mut at_end = [0u8; 16];
    let total = bytes.next_multiple_of(PAGE);
    file.read_exact_at(&mut at_end, total + 20).map_err(|_| Error::Damaged)?;
    check(file, total, Id(at_end)).map(|()| Id(at_end))
}

/// In order, apart and inside the memory.
pub fn check_runs(runs: &[(u64, u64)], total: u64) -> Result<(), Error> {
    let mut end = 0u64;
    for (first, count) in runs {
        let next = first.checked_add(*count).filter(|next| *next <= total / PAGE && *count > 0 && *first >= end);
        end = next.ok_or_else(|| Error::Content(format!("{count} pages at page {first} are not in its memory")))?;
    }
    Ok(())
}

/// `base` as a machine's memory, without reading it; with a difference's pages copied over it.
pub fn map(bytes: u64, base: &File, id: Id) -> Result<Memory, Error> {
    let total = bytes.next_multiple_of(PAGE);
    check(base, total, id)?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (address, size) in memory::ranges(total) {
        let file = base.try_clone().map_err(Error::Read)?;
        let content = |e: &dyn std::fmt::Display| Error::Content(format!("its memory cannot be mapped: {e}"));
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        let mapped = MmapRegion::build(Some(FileOffset::new(file, offset)), size, protection, flags);
        let region = GuestRegionMmap::new(mapped.map_err(|e| content(&e))?, address);
        regions.push(region.ok_or_else(|| content(&"beyond the end of addresses"))?);
        offset += size as u64;
    }
    Memory::from_regions(regions).map_err(|e| Error::Content(e.to_string()))
}

/// Puts the pages of a difference over its base.
pub fn apply(memory: &Memory, difference: &File, id: Id, runs: &[(u64, u64)], sum: u64) -> Result<(), Error> {
    let total: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    check(difference, total, id)?;
    check_runs(runs, total)?;
    let mut crc = Sum::default();
    let mut buffer = vec![0u8; (BATCH * PAGE) as usize];
    for (first, count) in runs {
        let mut page = *first;
        while page < first + count {
            let pages = BATCH.min(first + count - page).min(to_region_end(page));
            let bytes = buffer.get_mut(..(pages * PAGE) as usize).unwrap_or_default();
            difference.read_exact_at(bytes, page * PAGE).map_err(Error::Read)?;
            bytes.as_chunks::<{ PAGE as usize }>().0.iter().filter(|p| !is_zero(p)).for_each(|page| crc.add(page));
            memory.write_slice(bytes, address(page)).map_err(|e| Error::Content(e.to_string()))?;
            page += pages;
        }
    }
    if crc.0 == sum { Ok(()) } else { Err(Error::Damaged) }
}

fn address(page: u64) -> GuestAddress {
    let at = page * PAGE;
    GuestAddress(if at < memory::GAP_START { at } else { at - memory::GAP_START + memory::GAP_END })
}

fn to_region_end(page: u64) -> u64 {
    match (memory::GAP_START / PAGE).checked_sub(page) {
        Some(0) | None => u64::MAX,
        Some(rest) => rest,
    }
}

/// Whether every page of a full memory file is as it was written. Reads all of it.
pub fn verify(file: &File, bytes: u64, id: Id, sum: u64) -> Result<(), Error> {
    use rustix::fs::{SeekFrom, seek};
    let total = bytes.next_multiple_of(PAGE);
    check(file, total, id)?;
    let mut crc = Sum::default();
    let mut buffer = vec![0u8; (BATCH * PAGE) as usize];
    let mut at = 0;
    while at < total {
        // a file system without holes answers where it was asked
        let Ok(data) = seek(file, SeekFrom::Data(at)) else { break };
        let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(total);
        let (mut page, end) = (data / PAGE, hole.min(total).div_ceil(PAGE));
        while page < end {
            let pages = BATCH.min(end - page);
            let bytes = buffer.get_mut(..(pages * PAGE) as usize).unwrap_or_default();
            file.read_exact_at(bytes, page * PAGE).map_err(Error::Read)?;
            bytes.as_chunks::<{ PAGE as usize }>().0.iter().filter(|p| !is_zero(p)).for_each(|page| crc.add(page));
            page += pages;
        }
        at = end * PAGE;
    }
    if crc.0 == sum { Ok(()) } else { Err(Error::Damaged) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const MIB: u64 = 1 << 20;

    fn filled() -> Memory {
        let memory = memory::allocate(16 * MIB).unwrap();
        memory.write_slice(&[1; 8192], GuestAddress(MIB)).unwrap();
        memory.write_slice(&[2; 100], GuestAddress(9 * MIB + 50)).unwrap();
        memory
    }

    fn byte(memory: &Memory, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn memory_comes_back_as_it_was_and_holes_stay_holes() {
        let (memory, file, pagemap) = (filled(), tempfile::tempfile().unwrap(), Pagemap::open().unwrap());
        let written = write(&memory, Some(&pagemap), &file, Id([1; 16]), None).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < MIB, "{} blocks", file.metadata().unwrap().blocks());
        verify(&file, 16 * MIB, Id([1; 16]), written.sum).unwrap();
        let copies = [map(16 * MIB, &file, Id([1; 16])).unwrap(), map(16 * MIB, &file, Id([1; 16])).unwrap()];
        copies[0].write_obj(9u8, GuestAddress(MIB)).unwrap();
        assert_eq!((byte(&copies[0], MIB), byte(&copies[1], MIB), byte(&copies[1], 9 * MIB + 149)), (9, 1, 2));
        assert_eq!(byte(&copies[1], 12 * MIB), 0);
        let difference = tempfile::tempfile().unwrap();
        let changed = write(&copies[0], Some(&pagemap), &difference, Id([3; 16]), Some(&file)).unwrap();
        assert_eq!(changed.runs, [(256, 1)]);
        // a snapshot of what was restored is whole again
        let again = tempfile::tempfile().unwrap();
        let whole = write(&copies[1], Some(&pagemap), &again, Id([2; 16]), None).unwrap();
        assert_eq!(whole.sum, written.sum);
    }

    #[test]
    fn a_difference_goes_over_its_base() {
        let (memory, base, difference) = (filled(), tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        write(&memory, None, &base, Id([1; 16]), None).unwrap();
        memory.write_slice(&[0; 4096], GuestAddress(MIB)).unwrap();
        memory.write_obj(7u8, GuestAddress(3 * MIB)).unwrap();
        let written = write(&memory, None, &difference, Id([2; 16]), Some(&base)).unwrap();
        assert_eq!(written.runs, [(256, 1), (768, 1)]);
        let restored = map(16 * MIB, &base, Id([1; 16])).unwrap();
        apply(&restored, &difference, Id([2; 16]), &written.runs, written.sum).unwrap();
        assert_eq!([MIB, MIB + 4096, 3 * MIB, 9 * MIB + 50].map(|at| byte(&restored, at)), [0, 1, 7, 2]);
        let wrong = apply(&restored, &difference, Id([2; 16]), &written.runs, written.sum ^ 1);
        assert!(matches!(wrong, Err(Error::Damaged)));
        let outside = apply(&restored, &difference, Id([2; 16]), &[(4095, 2)], written.sum).unwrap_err();
        assert!(outside.to_string().contains("not in its memory"), "{outside}");
    }

    #[test]
    fn files_that_are_cut_or_of_another_are_refused() {
        let (memory, file) = (filled(), tempfile::tempfile().unwrap());
        let written = write(&memory, None, &file, Id([1; 16]), None).unwrap();
        let said = |id| map(16 * MIB, &file, id).err().unwrap().to_string();
        assert!(said(Id([2; 16])).contains("another snapshot"));
        file.write_all_at(&[0xff], MIB + 1).unwrap();
        assert!(matches!(verify(&file, 16 * MIB, Id([1; 16]), written.sum), Err(Error::Damaged)));
        file.set_len(16 * MIB).unwrap();
        assert!(said(Id([1; 16])).contains("cut short"));
    }

    #[test]
    fn runs_lie_inside_and_apart() {
        assert!(check_runs(&[(0, 2), (2, 1), (9, 1)], 10 * PAGE).is_ok());
        for bad in [&[(0, 0)][..], &[(9, 2)], &[(3, 2), (4, 1)], &[(u64::MAX, 2)]] {
            assert!(check_runs(bad, 10 * PAGE).is_err(), "{bad:?}");
        }
    }
}
