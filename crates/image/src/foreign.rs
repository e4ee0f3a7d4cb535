//! Disks as other hypervisors keep them, made qcow2 images when they are brought in: VMDK (monolithic sparse and
//! stream-optimised), VHD (fixed and dynamic), VHDX. What a file's tables say is only ever an offset into that file; disks that
//! need another file (parents, extents, logs that were not written back) are refused.

mod qcow2;
mod vhd;
mod vhdx;
mod vmdk;

use crate::error::{Error, Result, io};
use crate::store::{Progress, ProgressFn};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What machines' overlays can lie over.
const LARGEST: u64 = 16 << 40;
/// Read and written at once; a cluster of the result.
const CHUNK: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Vmdk,
    Vhd,
    Vhdx,
}

/// Where a block of a disk is.
enum Place {
    Zero,
    /// From this offset of the file on.
    At(u64),
    /// It was compressed.
    Bytes(Vec<u8>),
}

/// A disk whose tables have been read. Why it cannot be read is a text for people.
trait Layout {
    /// Bytes, a multiple of 512.
    fn size(&self) -> u64;
    fn block(&self) -> u64;
    fn locate(&mut self, file: &File, index: u64) -> std::result::Result<Place, String>;
}

/// Told by the beginning of a file, and its end.
pub(crate) fn detect(file: &File, head: &[u8]) -> Option<Format> {
    if head.starts_with(vmdk::MAGIC) || head.starts_with(b"# Disk DescriptorFile") {
        return Some(Format::Vmdk);
    }
    if head.starts_with(vhdx::MAGIC) {
        return Some(Format::Vhdx);
    }
    if head.starts_with(vhd::MAGIC) {
        return Some(Format::Vhd);
    }
    let end = file.metadata().ok()?.len().checked_sub(512)?;
    let mut cookie = [0u8; 8];
    file.read_exact_at(&mut cookie, end).ok()?;
    (cookie == vhd::MAGIC).then_some(Format::Vhd)
}

fn open(file: &File, format: Format) -> std::result::Result<Box<dyn Layout>, String> {
    let disk: Box<dyn Layout> = match format {
        Format::Vmdk => Box::new(vmdk::Vmdk::open(file).map_err(|why| format!("VMDK disk: {why}"))?),
        Format::Vhd => Box::new(vhd::Vhd::open(file).map_err(|why| format!("VHD disk: {why}"))?),
        Format::Vhdx => Box::new(vhdx::Vhdx::open(file).map_err(|why| format!("VHDX disk: {why}"))?),
    };
    match disk.size() {
        0 => Err("a disk of no bytes".into()),
        size if size > LARGEST => Err(format!("a disk of {size} bytes; at most {LARGEST} are possible")),
        size if !size.is_multiple_of(512) => Err(format!("a disk of {size} bytes, not whole sectors of 512")),
        _ => Ok(disk),
    }
}

/// Writes what is in `file` to `to`, an empty file, as qcow2.
pub(crate) fn convert(file: &File, format: Format, path: &Path, to: File, progress: ProgressFn) -> Result<()> {
    let unusable = |why: String| Error::Unrecognised { path: path.to_path_buf(), why };
    let mut disk = open(file, format).map_err(unusable)?;
    let length = file.metadata().map_err(io("stat", path))?.len();
    let (size, block) = (disk.size(), disk.block());
    let mut out = qcow2::Writer::new(to, size).map_err(io("write", path))?;
    let mut buffer = vec![0u8; CHUNK];
    let (mut taken, mut told) = (0u64, 0);
    for index in 0..size.div_ceil(block) {
        let begin = index * block;
        let wanted = block.min(size - begin);
        let place = disk.locate(file, index).map_err(unusable)?;
        if !matches!(place, Place::Zero) {
            // every block has a place of its own, or a small file would become any number of large ones
            taken += block;
            if matches!(place, Place::At(_)) && taken > length.saturating_add(block) {
                return Err(unusable("two of its blocks are in one place".into()));
            }
        }
        match place {
            Place::Zero => {}
            Place::Bytes(bytes) => {
                let bytes = bytes.get(..wanted as usize).ok_or_else(|| unusable("a block is cut off".into()))?;
                out.write(begin, bytes).map_err(io("write", path))?;
            }
            Place::At(at) => {
                let mut done = 0;
                while done < wanted {
                    let part = buffer.get_mut(..CHUNK.min((wanted - done) as usize)).unwrap_or_default();
                    let from = at.checked_add(done).ok_or_else(|| unusable("a block beyond its end".into()))?;
                    file.read_exact_at(part, from).map_err(|_| unusable("a block beyond its end".into()))?;
                    out.write(begin + done, part).map_err(io("write", path))?;
                    done += part.len() as u64;
                }
            }
        }
        if begin >> 26 != told {
            told = begin >> 26;
            progress(Progress::Bytes { what: "converting".into(), done: begin, total: Some(size) });
        }
    }
    out.finish().map_err(io("write", path))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// So many bytes of a file; what is missing is said.
fn read(file: &File, at: u64, length: usize, what: &str) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = vec![0u8; length];
    file.read_exact_at(&mut bytes, at).map_err(|_| format!("its {what} is cut off"))?;
    Ok(bytes)
}

/// For fuzzing: any bytes as a disk of each format, converted beneath `scratch`.
pub(crate) fn fuzz(bytes: &[u8], scratch: &Path) {
    let path = scratch.join("foreign");
    if std::fs::write(&path, bytes).is_err() {
        return;
    }
    let Ok(file) = File::open(&path) else { return };
    for format in [Format::Vmdk, Format::Vhd, Format::Vhdx] {
        // sizes that would only take time are left out
        let small = open(&file, format).is_ok_and(|disk| disk.size() <= 1 << 30 && disk.block() >= 4096);
        if let Some(to) = small.then(|| File::create(scratch.join("foreign.qcow2")).ok()).flatten() {
            let _ = convert(&file, format, &path, to, &crate::store::silent);
        }
    }
}

#[cfg(test)]
mod tests;
