//! Reading tar archives from strangers, and writing them.
//!
//! POSIX ustar, pax and the GNU long names; everything bounded, nothing believed. What an entry's path may do to a file
//! system is not this module's matter but `unpack`'s.

use std::io::{self, Read, Write};

const BLOCK: usize = 512;
/// Bytes of one extended header.
const EXTENDED_LIMIT: u64 = 1 << 20;
/// Extended headers before one entry.
const EXTENDED_COUNT: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// Sparse files in old GNU form, volume labels, and what else there is.
    Other(u8),
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub kind: EntryKind,
    pub size: u64,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Unix seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub link: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where its content begins in the archive.
    pub offset: u64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("it ends in the middle of {0}; it was truncated")]
    Truncated(&'static str),
    #[error("no tar header at byte {0}: wrong checksum")]
    Checksum(u64),
    #[error("header at byte {at}: {field} is not a number that fits")]
    Number { at: u64, field: &'static str },
    #[error("header at byte {0}: extended header of more than 1 MiB, or too many of them")]
    Extended(u64),
    #[error("header at byte {at}: {why}")]
    Pax { at: u64, why: &'static str },
    #[error("reading it failed")]
    Read(#[source] io::Error),
}

/// Reads entries one after another; between two calls of `next` it is a reader of the entry's content.
pub(crate) struct Archive<R> {
    reader: R,
    position: u64,
    /// Content bytes of the current entry not read yet.
    remaining: u64,
    padding: u64,
    finished: bool,
    /// Whether the two zero blocks that end an archive were seen.
    pub marked_end: bool,
}

#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: bool,
}

impl<R: Read> Archive<R> {
    pub fn new(reader: R) -> Self {
        Archive { reader, position: 0, remaining: 0, padding: 0, finished: false, marked_end: false }
    }

    pub fn into_inner(self) -> R {
        self.reader
    }

    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_content()?;
        let mut extended = Extended::default();
        let mut count = 0;
        loop {
            if self.finished {
                return Ok(None);
            }
            let at = self.position;
            let Some(block) = self.header_block()? else {
                if count > 0 {
                    return Err(TarError::Truncated("an extended header's entry"));
                }
                return Ok(None);
            };
            let flag = block[156];
            match flag {
                b'L' | b'K' | b'x' | b'X' | b'g' => {
                    count += 1;
                    let size = number(&block[124..136]).ok_or(TarError::Number { at, field: "size" })?;
                    if count > EXTENDED_COUNT || size > EXTENDED_LIMIT {
                        return Err(TarError::Extended(at));
                    }
                    let content = self.small_content(size)?;
                    match flag {
                        b'L' => extended.path = Some(until_nul(&content).to_vec()),
                        b'K' => extended.link = Some(until_nul(&content).to_vec()),
                        b'x' | b'X' => parse_pax(&content, &mut extended, at)?,
                        _ => {}
                    }
                }
                _ => return self.entry(&block, extended, at).map(Some),
            }
        }
    }

    fn entry(&mut self, block: &[u8; BLOCK], extended: Extended, at: u64) -> Result<Entry, TarError> {
        let field = |range: std::ops::Range<usize>, field| {
            number(block.get(range).unwrap_or_default()).ok_or(TarError::Number { at, field })
        };
        let mut path = match extended.path {
            Some(path) => path,
            None => {
                let name = until_nul(&block[0..100]);
                let prefix = until_nul(&block[345..500]);
                // The prefix field is ustar's; GNU keeps times there.
                if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
                    [prefix, b"/", name].concat()
                } else {
                    name.to_vec()
                }
            }
        };
        let flag = block[156];
        let mut kind = match flag {
            b'0' | 0 | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => EntryKind::Other(other),
        };
        if kind == EntryKind::File && path.ends_with(b"/") {
            kind = EntryKind::Directory;
        }
        if extended.sparse {
            kind = EntryKind::Other(b'S');
        }
        while path.len() > 1 && path.ends_with(b"/") {
            path.pop();
        }
        let size = match extended.size {
            Some(size) => size,
            None => field(124..136, "size")?,
        };
        // Links and devices carry no content, whatever their size says (POSIX.1-2001 pax, typeflag).
        let content = match kind {
            EntryKind::File | EntryKind::Other(_) => size,
            _ => 0,
        };
        self.remaining = content;
        self.padding = content.next_multiple_of(BLOCK as u64).saturating_sub(content);
        Ok(Entry {
            path,
            kind,
            size: content,
            mode: (field(100..108, "mode")? & 0o7777) as u32,
            uid: match extended.uid {
                Some(uid) => uid,
                None => field(108..116, "uid")?,
            },
            gid: match extended.gid {
                Some(gid) => gid,
                None => field(116..124, "gid")?,
            },
            mtime: match extended.mtime {
                Some(mtime) => mtime,
                None => (signed(&block[136..148]).ok_or(TarError::Number { at, field: "mtime" })?, 0),
            },
            link: extended.link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec()),
            xattrs: extended.xattrs,
            offset: self.position,
        })
    }

    /// One header, `None` at the end.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0u8; BLOCK];
        if !self.fill(&mut block, "a header")? {
            self.finished = true;
            return Ok(None);
        }
        if block.iter().all(|b| *b == 0) {
            self.finished = true;
            let mut second = [0u8; BLOCK];
            self.marked_end = self.fill(&mut second, "its end mark").unwrap_or(false);
            return Ok(None);
        }
        if !checksum_fits(&block) {
            return Err(TarError::Checksum(self.position - BLOCK as u64));
        }
        Ok(Some(block))
    }

    fn small_content(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut content = vec![0u8; size as usize];
        if !content.is_empty() && !self.fill(&mut content, "an extended header")? {
            return Err(TarError::Truncated("an extended header"));
        }
        let padding = content.len().next_multiple_of(BLOCK) - content.len();
        let mut rest = [0u8; BLOCK];
        if padding > 0 && !self.fill(&mut rest[..padding], "an extended header")? {
            return Err(TarError::Truncated("an extended header"));
        }
        Ok(content)
    }

    /// Fills the buffer; false if there was nothing at all.
    fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<bool, TarError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|r| !r.is_empty()) {
            match self.reader.read(rest) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(TarError::Truncated(what)),
                Ok(n) => {
                    done += n;
                    self.position += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(TarError::Read(e)),
            }
        }
        Ok(true)
    }

    fn skip_content(&mut self) -> Result<(), TarError> {
        let mut left = self.remaining + self.padding;
        (self.remaining, self.padding) = (0, 0);
        let mut sink = [0u8; 16 * 1024];
        while left > 0 {
            let want = left.min(sink.len() as u64) as usize;
            let buffer = sink.get_mut(..want).unwrap_or_default();
            if !self.fill(buffer, "an entry's content")? {
                return Err(TarError::Truncated("an entry's content"));
            }
            left -= want as u64;
        }
        Ok(())
    }
}

/// Content of the current entry. An early end is an error, never a short file.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = (buffer.len() as u64).min(self.remaining) as usize;
        if want == 0 {
            return Ok(0);
        }
        let n = self.reader.read(buffer.get_mut(..want).unwrap_or_default())?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, TarError::Truncated("an entry's content")));
        }
        self.remaining -= n as u64;
        self.position += n as u64;
        Ok(n)
    }
}

/// Whether a block looks like a tar header.
pub(crate) fn is_tar(head: &[u8]) -> bool {
    match head.first_chunk::<BLOCK>() {
        Some(block) => checksum_fits(block) && block.iter().any(|b| *b != 0),
        None => false,
    }
}

fn checksum_fits(block: &[u8; BLOCK]) -> bool {
    let Some(stored) = number(&block[148..156]) else { return false };
    let sum = |signed: bool| -> i64 {
        block
            .iter()
            .enumerate()
            .map(|(i, b)| match (i, signed) {
                (148..156, _) => 32,
                (_, true) => i64::from(*b as i8),
                (_, false) => i64::from(*b),
            })
            .sum()
    };
    i64::try_from(stored).is_ok_and(|s| s == sum(false) || s == sum(true))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

fn number(field: &[u8]) -> Option<u64> {
    signed(field).and_then(|n| u64::try_from(n).ok())
}

/// Octal text, or GNU's base 256 with the top bit set.
fn signed(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        value = value.checked_mul(64)?.checked_add(i64::from(first & 0x3f))?;
        for b in rest {
            value = value.checked_mul(256)?.checked_add(i64::from(*b))?;
        }
        return Some(value);
    }
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim();
    if text.is_empty() {
        return Some(0);
    }
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    i64::from_str_radix(text, 8).ok()
}

/// Records `LENGTH KEY=VALUE\n`; the length counts itself.
fn parse_pax(mut content: &[u8], into: &mut Extended, at: u64) -> Result<(), TarError> {
    let bad = |why| TarError::Pax { at, why };
    while !until_nul(content).is_empty() {
        let space = content.iter().position(|b| *b == b' ').ok_or(bad("a pax record without a length"))?;
        let length: usize = std::str::from_utf8(content.get(..space).unwrap_or_default())
            .ok()
            .and_then(|t| t.parse().ok())
            .ok_or(bad("a pax record without a length"))?;
        let record = content.get(space + 1..length).ok_or(bad("a pax record longer than its header"))?;
        content = content.get(length..).unwrap_or_default();
        let record = record.strip_suffix(b"\n").ok_or(bad("a pax record without its line end"))?;
        let equals = record.iter().position(|b| *b == b'=').ok_or(bad("a pax record without `=`"))?;
        let (key, value) = (record.get(..equals).unwrap_or_default(), record.get(equals + 1..).unwrap_or_default());
        let whole = || std::str::from_utf8(value).ok().and_then(|t| t.parse::<u64>().ok());
        match key {
            b"path" => into.path = Some(value.to_vec()),
            b"linkpath" => into.link = Some(value.to_vec()),
            b"size" => into.size = Some(whole().filter(|s| *s < 1 << 62).ok_or(bad("pax size is not a number"))?),
            b"uid" => into.uid = Some(whole().ok_or(bad("pax uid is not a number"))?),
            b"gid" => into.gid = Some(whole().ok_or(bad("pax gid is not a number"))?),
            b"mtime" => into.mtime = Some(pax_time(value).ok_or(bad("pax mtime is not a time"))?),
            _ if key.starts_with(b"GNU.sparse.") => into.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    into.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // -1.25 s is 0.75 s after -2 s.
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// Writes a plain archive: regular files and directories with short names.
pub(crate) struct Builder<W> {
    writer: W,
}

impl<W: Write> Builder<W> {
    pub fn new(writer: W) -> Self {
        Builder { writer }
    }

    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.header(name, b'5', 0, 0o755)
    }

    pub fn file(&mut self, name: &str, size: u64, content: impl Read) -> io::Result<()> {
        self.header(name, b'0', size, 0o644)?;
        let copied = io::copy(&mut content.take(size), &mut self.writer)?;
        if copied != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{name} is shorter than {size} bytes")));
        }
        let padding = (size.next_multiple_of(BLOCK as u64) - size) as usize;
        self.writer.write_all([0u8; BLOCK].get(..padding).unwrap_or_default())
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.writer.write_all(&[0u8; 2 * BLOCK])?;
        self.writer.flush()?;
        Ok(self.writer)
    }

    fn header(&mut self, name: &str, kind: u8, size: u64, mode: u32) -> io::Result<()> {
        self.writer.write_all(&header(name.as_bytes(), kind, size, mode, b"")?)
    }
}

pub(crate) fn header(name: &[u8], kind: u8, size: u64, mode: u32, link: &[u8]) -> io::Result<[u8; BLOCK]> {
    let mut block = [0u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8], room: usize| -> io::Result<()> {
        let place = block.get_mut(at..at + bytes.len()).filter(|_| bytes.len() <= room);
        place.ok_or_else(|| io::Error::other("name too long for a tar header"))?.copy_from_slice(bytes);
        Ok(())
    };
    put(0, name, 100)?;
    put(100, format!("{mode:07o}").as_bytes(), 8)?;
    put(108, b"0000000", 8)?;
    put(116, b"0000000", 8)?;
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes(), 12)?;
    } else {
        put(124, &[0x80], 12)?;
        put(128, &size.to_be_bytes(), 8)?;
    }
    put(136, b"00000000000", 12)?;
    put(148, b"        ", 8)?;
    put(156, &[kind], 1)?;
    put(157, link, 100)?;
    put(257, b"ustar\x0000", 8)?;
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        builder.directory("etc").unwrap();
        builder.file("etc/motd", 5, &b"hello"[..]).unwrap();
        builder.finish().unwrap()
    }

    #[test]
    fn reads_what_it_writes() {
        let bytes = sample();
        let mut archive = Archive::new(&bytes[..]);
        assert_eq!(archive.next().unwrap().unwrap().kind, EntryKind::Directory);
        let entry = archive.next().unwrap().unwrap();
        assert_eq!((entry.path.as_slice(), entry.size, entry.mode), (&b"etc/motd"[..], 5, 0o644));
        let mut text = String::new();
        archive.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(archive.next().unwrap().is_none());
        assert!(archive.marked_end);
    }

    #[test]
    fn cut_anywhere_it_says_truncated_or_shows_no_end_mark() {
        let whole = sample();
        for cut in 1..whole.len() - BLOCK {
            let mut archive = Archive::new(&whole[..cut]);
            let ended = loop {
                match archive.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break archive.marked_end,
                    Err(_) => break false,
                }
            };
            assert!(!ended, "cut at {cut}");
        }
    }

    #[test]
    fn numbers_and_times() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(2 << 32));
        assert_eq!(signed(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), None);
        assert_eq!(number(b"00x\0"), None);
        assert_eq!(pax_time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
    }

    #[test]
    fn extended_headers_are_bounded() {
        let mut bytes = header(b"x", b'L', 1 << 40, 0, b"").unwrap().to_vec();
        bytes.extend([b'a'; 4096]);
        assert!(matches!(Archive::new(&bytes[..]).next(), Err(TarError::Extended(0))));
    }

    proptest! {
        #[test]
        fn any_damage_is_an_error_or_harmless(position in 0usize..2048, value: u8) {
            let mut bytes = sample();
            if let Some(b) = bytes.get_mut(position) { *b = value; }
            let mut archive = Archive::new(&bytes[..]);
            for _ in 0..10 {
                match archive.next() {
                    Ok(Some(_)) => { let _ = io::copy(&mut archive, &mut io::sink()); }
                    Ok(None) | Err(_) => break,
                }
            }
        }

        #[test]
        fn pax_never_panics(content: Vec<u8>) {
            let _ = parse_pax(&content, &mut Extended::default(), 0);
        }
    }
}
