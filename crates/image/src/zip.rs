//! Zip archives as Lambda's packages are: files and directories, stored or deflated. PKWARE's APPNOTE.TXT names the fields.
//!
//! The archive is a stranger's: what it says about itself is checked against what it is, and bounded.

use flate2::read::DeflateDecoder;
use std::collections::BTreeSet;
use std::io::{Read, Write};

/// As much as Lambda takes: 250 MB unzipped.
const UNPACKED: u64 = 262_144_000;
const ENTRIES: usize = 50_000;
const NAME: usize = 1024;
const END: &[u8; 4] = b"PK\x05\x06";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const LOCAL: &[u8; 4] = b"PK\x03\x04";
const END_LENGTH: usize = 22;
/// The end record has a comment of up to this.
const COMMENT: usize = 0xffff;
const ENCRYPTED: u16 = 1;

pub struct Entry {
    /// Relative, without `.` and `..`, separated by `/`.
    pub name: String,
    pub is_dir: bool,
    pub executable: bool,
    method: u16,
    packed: u64,
    unpacked: u64,
    offset: u64,
}

pub struct Zip<'a> {
    bytes: &'a [u8],
    pub entries: Vec<Entry>,
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn short(from: &[u8], at: usize) -> Result<u16, String> {
    bytes(from, at).map(u16::from_le_bytes).ok_or_else(|| "it is cut short".into())
}

fn long(from: &[u8], at: usize) -> Result<u32, String> {
    bytes(from, at).map(u32::from_le_bytes).ok_or_else(|| "it is cut short".into())
}

impl Zip<'_> {
    pub fn read(archive: &[u8]) -> Result<Zip<'_>, String> {
        let from = archive.len().saturating_sub(END_LENGTH + COMMENT);
        let tail = archive.get(from..).unwrap_or_default();
        let end = tail.windows(4).rposition(|window| window == END).ok_or("it is not a zip archive")? + from;
        let count = short(archive, end + 10)?;
        let start = long(archive, end + 16)?;
        if count == u16::MAX || start == u32::MAX {
            return Err("it is in the zip64 format, which is for larger archives than Lambda takes".into());
        }
        if usize::from(count) > ENTRIES {
            return Err(format!("it has {count} entries; the limit is {ENTRIES}"));
        }
        let (mut entries, mut total, mut at) = (Vec::new(), 0u64, start as usize);
        let mut names = BTreeSet::new();
        for _ in 0..count {
            let entry = entry(archive, &mut at)?;
            total = total.saturating_add(entry.unpacked);
            if total > UNPACKED {
                return Err(format!("unpacked it has more than {UNPACKED} bytes"));
            }
            if !names.insert(entry.name.clone()) && !entry.is_dir {
                return Err(format!("{:?} is in it twice", entry.name));
            }
            entries.push(entry);
        }
        Ok(Zip { bytes: archive, entries })
    }

    /// Writes a file's content. Never more than its entry says.
    pub fn copy(&self, entry: &Entry, out: &mut dyn Write) -> Result<(), String> {
        let wrong = |why: String| format!("{:?}: {why}", entry.name);
        let at = usize::try_from(entry.offset).map_err(|e| wrong(e.to_string()))?;
        if bytes::<4>(self.bytes, at).as_ref() != Some(LOCAL) {
            return Err(wrong("its header is not where the directory says".into()));
        }
        let skip = usize::from(short(self.bytes, at + 26)?) + usize::from(short(self.bytes, at + 28)?);
        let start = at + 30 + skip;
        let packed = usize::try_from(entry.packed).ok().and_then(|length| start.checked_add(length));
        let data = packed.and_then(|end| self.bytes.get(start..end)).ok_or_else(|| wrong("it is cut short".into()))?;
        let limit = entry.unpacked.saturating_add(1);
        let copied = match entry.method {
            0 => std::io::copy(&mut data.take(limit), out),
            8 => std::io::copy(&mut DeflateDecoder::new(data).take(limit), out),
            other => return Err(wrong(format!("compression method {other}; stored and deflated are known"))),
        };
        match copied.map_err(|e| wrong(e.to_string()))? == entry.unpacked {
            true => Ok(()),
            false => Err(wrong(format!("it is not of the {} bytes that the directory says", entry.unpacked))),
        }
    }
}

/// The entry of the central directory at `at`, which moves on.
fn entry(archive: &[u8], at: &mut usize) -> Result<Entry, String> {
    let here = *at;
    if bytes::<4>(archive, here).as_ref() != Some(CENTRAL) {
        return Err("its directory is damaged".into());
    }
    let name_length = usize::from(short(archive, here + 28)?);
    let rest = usize::from(short(archive, here + 30)?) + usize::from(short(archive, here + 32)?);
    let name = archive.get(here + 46..here + 46 + name_length).ok_or("it is cut short")?;
    *at = here + 46 + name_length + rest;
    let name = std::str::from_utf8(name).map_err(|_| "a name in it is not UTF-8")?;
    let (is_dir, name) = (name.ends_with('/'), clean(name)?);
    if short(archive, here + 8)? & ENCRYPTED != 0 {
        return Err(format!("{name:?} is encrypted"));
    }
    // The upper half is the mode, if a Unix made it.
    let mode = match short(archive, here + 4)? >> 8 {
        3 => long(archive, here + 38)? >> 16,
        _ => 0o100_644,
    };
    match mode & 0o170_000 {
        0 | 0o100_000 | 0o040_000 => {}
        0o120_000 => return Err(format!("{name:?} is a symbolic link; zip what it points at (zip without -y)")),
        _ => return Err(format!("{name:?} is neither a file nor a directory")),
    }
    Ok(Entry {
        name,
        is_dir: is_dir || mode & 0o170_000 == 0o040_000,
        executable: mode & 0o111 != 0,
        method: short(archive, here + 10)?,
        packed: long(archive, here + 20)?.into(),
        unpacked: long(archive, here + 24)?.into(),
        offset: long(archive, here + 42)?.into(),
    })
}

fn clean(name: &str) -> Result<String, String> {
    let bad = name.is_empty()
        || name.len() > NAME
        || name.starts_with('/')
        || name.chars().any(|c| c.is_control() || c == '\\');
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if bad || parts.is_empty() || parts.contains(&"..") {
        return Err(format!("{name:?} is no name for a file of a package"));
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of stored files, with each one's Unix mode.
    fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (name, mode, content) in files {
            let offset = out.len() as u32;
            let sizes = [content.len() as u32, content.len() as u32];
            let fixed = [20u16, 0, 0, 0, 0];
            let mut shared: Vec<u8> = fixed.iter().flat_map(|n| n.to_le_bytes()).collect();
            shared.extend(0u32.to_le_bytes());
            shared.extend(sizes.iter().flat_map(|n| n.to_le_bytes()));
            shared.extend((name.len() as u16).to_le_bytes());
            shared.extend(0u16.to_le_bytes());
            out.extend(LOCAL);
            out.extend(&shared);
            out.extend(name.as_bytes());
            out.extend(*content);
            directory.extend(CENTRAL);
            directory.extend((3u16 << 8 | 20).to_le_bytes());
            directory.extend(&shared);
            directory.extend([0u8; 6]);
            directory.extend((mode << 16).to_le_bytes());
            directory.extend(offset.to_le_bytes());
            directory.extend(name.as_bytes());
        }
        let start = out.len() as u32;
        let length = directory.len() as u32;
        out.extend(directory);
        out.extend(END);
        out.extend([0u8; 4]);
        out.extend((files.len() as u16).to_le_bytes());
        out.extend((files.len() as u16).to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(start.to_le_bytes());
        out.extend(0u16.to_le_bytes());
        out
    }

    fn content(zip: &Zip<'_>, at: usize) -> Result<Vec<u8>, String> {
        let mut content = Vec::new();
        zip.copy(&zip.entries[at], &mut content).map(|()| content)
    }

    #[test]
    fn files_come_out_as_they_went_in() {
        let archive =
            archive(&[("bootstrap", 0o100_755, b"#!"), ("lib/", 0o040_755, b""), ("./lib/a", 0o100_644, b"x")]);
        let zip = Zip::read(&archive).unwrap();
        let seen: Vec<_> = zip.entries.iter().map(|e| (e.name.as_str(), e.is_dir, e.executable)).collect();
        assert_eq!(seen, [("bootstrap", false, true), ("lib", true, true), ("lib/a", false, false)]);
        assert_eq!(content(&zip, 0).unwrap(), b"#!");
    }

    #[test]
    fn bad_archives_are_told_apart() {
        let of = |name: &str, mode: u32| Zip::read(&archive(&[(name, mode, b"x")])).err().unwrap_or_default();
        for name in ["../a", "/a", "a/../../b", "", ".", "a\\b", "a\0b"] {
            assert!(of(name, 0o100_644).contains("no name"), "{name:?}");
        }
        assert!(of("a", 0o120_777).contains("symbolic link"));
        assert!(of("a", 0o020_777).contains("neither a file"));
        assert!(Zip::read(b"nonsense").err().unwrap().contains("not a zip"));
        let twice = archive(&[("a", 0o100_644, b"1"), ("a", 0o100_644, b"2")]);
        assert!(Zip::read(&twice).err().unwrap().contains("twice"));
        // A size that is not true.
        let mut lying = archive(&[("a", 0o100_644, b"1")]);
        let at = lying.windows(4).position(|w| w == CENTRAL).unwrap() + 24;
        lying[at] = 9;
        let zip = Zip::read(&lying).unwrap();
        assert!(content(&zip, 0).unwrap_err().contains("not of the 9 bytes"));
    }

    #[test]
    fn no_damage_harms() {
        let good = archive(&[("bootstrap", 0o100_755, b"#!/bin/sh"), ("b", 0o100_644, b"x")]);
        for at in 0..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(zip) = Zip::read(&bad) {
                    (0..zip.entries.len()).for_each(|at| drop(content(&zip, at)));
                }
            }
            let _ = Zip::read(&good[..at]).map(|zip| (0..zip.entries.len()).for_each(|at| drop(content(&zip, at))));
        }
    }
}
