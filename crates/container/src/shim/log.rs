//! A container's log in the format of the container runtime interface:
//! `2026-11-22T15:04:05.123456789Z stdout F line`, `P` instead of `F` for a piece of a line that goes on.

use clock::STAMP;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longer lines are cut into pieces of this size.
pub const MAX_LINE: usize = 16 * 1024;

pub struct Log {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    max: u64,
    pending: Vec<u8>,
}

/// The beginning of a line whose end has not been read yet.
#[derive(Default)]
pub struct Partial(Vec<u8>);

impl Log {
    /// Appends to what is there. `max` 0 = no rotation.
    pub fn open(path: &Path, max: u64) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut log = Self { path: path.to_owned(), file: None, size: 0, max, pending: Vec::new() };
        log.reopen()?;
        Ok(log)
    }

    fn reopen(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).append(true).mode(0o640).open(&self.path)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// Cuts `data` into lines; `now` is unix nanoseconds.
    pub fn feed(&mut self, stream: &str, partial: &mut Partial, mut data: &[u8], now: i64) -> io::Result<()> {
        let stamp = clock::stamp(now);
        while !data.is_empty() {
            let end = data.iter().position(|b| *b == b'\n');
            let (mut line, rest) = match end {
                Some(at) => (data.get(..at).unwrap_or_default(), data.get(at + 1..).unwrap_or_default()),
                None => (data, &[][..]),
            };
            while partial.0.len() + line.len() > MAX_LINE {
                let (head, tail) = line.split_at((MAX_LINE - partial.0.len()).min(line.len()));
                self.line(&stamp, stream, b'P', &partial.0, head)?;
                partial.0.clear();
                line = tail;
            }
            if end.is_some() {
                self.line(&stamp, stream, b'F', &partial.0, line)?;
                partial.0.clear();
            } else {
                partial.0.extend_from_slice(line);
            }
            data = rest;
        }
        if partial.0.is_empty() {
            partial.0 = Vec::new();
        }
        self.flush()
    }

    /// The stream is over: what it left without a line end.
    pub fn finish(&mut self, stream: &str, partial: &mut Partial, now: i64) -> io::Result<()> {
        let rest = std::mem::take(&mut partial.0);
        if !rest.is_empty() {
            let stamp = clock::stamp(now);
            self.line(&stamp, stream, b'P', &rest, b"")?;
        }
        self.flush()
    }

    fn line(&mut self, stamp: &[u8; STAMP], stream: &str, tag: u8, head: &[u8], tail: &[u8]) -> io::Result<()> {
        let length = (STAMP + stream.len() + 5 + head.len() + tail.len()) as u64;
        let used = self.size + self.pending.len() as u64;
        if self.max > 0 && used > 0 && used + length > self.max {
            self.flush()?;
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            fs::rename(&self.path, old)?;
            self.reopen()?;
        }
        self.pending.extend_from_slice(stamp);
        self.pending.push(b' ');
        self.pending.extend_from_slice(stream.as_bytes());
        self.pending.extend_from_slice(&[b' ', tag, b' ']);
        self.pending.extend_from_slice(head);
        self.pending.extend_from_slice(tail);
        self.pending.push(b'\n');
        if self.pending.len() >= 64 * 1024 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if self.file.is_none() {
            self.reopen()?;
        }
        let outcome = self.file.as_mut().map_or(Ok(()), |file| file.write_all(&self.pending));
        self.size += self.pending.len() as u64;
        // Kept small between bursts: there is a shim for every pod.
        self.pending = Vec::new();
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Puts lines together again, as readers of such logs do.
    fn parse(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        for line in text.lines() {
            let mut parts = line.splitn(4, ' ');
            assert_eq!(parts.next().map(str::len), Some(STAMP));
            assert_eq!(parts.next(), Some("stdout"));
            let tag = parts.next();
            let content = parts.next().expect("content");
            assert!(content.len() <= MAX_LINE);
            out.extend_from_slice(content.as_bytes());
            if tag == Some("F") {
                out.push(b'\n');
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn nothing_is_lost_or_added(
            lines in proptest::collection::vec((0usize..40_000, proptest::bool::ANY), 0..6), chunk in 1usize..30_000
        ) {
            let directory = tempfile::tempdir().expect("directory");
            let path = directory.path().join("a/0.log");
            let mut log = Log::open(&path, 0).expect("opened");
            let mut data = Vec::new();
            for (length, ends) in lines {
                data.extend(std::iter::repeat_n(b'x', length));
                if ends { data.push(b'\n'); }
            }
            let mut partial = Partial::default();
            for piece in data.chunks(chunk) {
                log.feed("stdout", &mut partial, piece, 7).expect("fed");
            }
            log.finish("stdout", &mut partial, 8).expect("finished");
            let text = fs::read_to_string(&path).expect("read");
            prop_assert!(parse(&text) == data);
        }
    }

    #[test]
    fn rotates_within_one_burst() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("0.log");
        let mut log = Log::open(&path, 100).expect("opened");
        log.feed("stdout", &mut Partial::default(), b"1\n2\n3\n4\n5\n", 0).expect("fed");
        assert!(fs::metadata(&path).expect("log").len() <= 100);
        assert!(fs::metadata(directory.path().join("0.log.1")).expect("old log").len() <= 100);
    }

    #[test]
    fn rotates() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("0.log");
        let mut log = Log::open(&path, 200).expect("opened");
        let mut partial = Partial::default();
        for n in 0..20 {
            log.feed("stderr", &mut partial, format!("line {n}\n").as_bytes(), 0).expect("fed");
        }
        let now = fs::read_to_string(&path).expect("read");
        let old = fs::read_to_string(directory.path().join("0.log.1")).expect("read");
        assert!(now.len() <= 200 && old.len() <= 200 && !old.is_empty());
        assert!(now.ends_with("stderr F line 19\n"));
        assert_eq!(old.lines().count(), 4);
    }
}
