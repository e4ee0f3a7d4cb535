//! A function's log in CRI format: `<RFC 3339 with nanoseconds> stdout|stderr F|P <text>`.

use bytes::Bytes;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

/// Longer lines are written in parts, as containerd does.
const LINE: usize = 16 << 10;
/// How many times its wanted size a log may reach before it is cut off.
const OVERFLOW: u64 = 4;

#[derive(Clone, Copy)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

pub(super) struct Log {
    inner: Mutex<Inner>,
    max_bytes: u64,
}

struct Inner {
    file: File,
    /// Bytes in the file.
    length: u64,
    cut: bool,
}

impl Log {
    pub fn new(file: OwnedFd, max_bytes: u64) -> Log {
        let inner = Inner::new(file);
        Log { inner: Mutex::new(inner), max_bytes: max_bytes.max(64 << 10) }
    }

    pub fn replace(&self, file: OwnedFd) {
        *self.lock() = Inner::new(file);
    }

    /// Writes a whole line of the host's own.
    pub fn note(&self, text: &str) {
        for line in text.lines() {
            self.line(Stream::Stderr, line.as_bytes(), true);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn line(&self, stream: Stream, text: &[u8], whole: bool) {
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let mut inner = self.lock();
        if inner.cut {
            return;
        }
        let time = clock::stamp(clock::now_nanos());
        let tag = if whole { "F" } else { "P" };
        let mut record = [time.as_slice(), b" ", name.as_bytes(), b" ", tag.as_bytes(), b" "].concat();
        if inner.length > self.max_bytes.saturating_mul(OVERFLOW) {
            inner.cut = true;
            let lost = b" stderr F the log was not rotated in time; what follows is lost";
            record = [time.as_slice(), lost].concat();
        } else {
            record.extend_from_slice(text);
        }
        record.push(b'\n');
        // A full disk must not stop the function.
        if inner.file.write_all(&record).is_ok() {
            inner.length += record.len() as u64;
        }
    }
}

impl Inner {
    fn new(file: OwnedFd) -> Inner {
        let file = File::from(file);
        let length = file.metadata().map(|m| m.len()).unwrap_or(0);
        Inner { file, length, cut: false }
    }
}

/// One of the two streams of one instance. Lines of several instances do not mix.
#[derive(Clone)]
pub(super) struct Lines {
    buffer: Arc<Mutex<Buffer>>,
}

struct Buffer {
    log: Arc<Log>,
    stream: Stream,
    pending: Vec<u8>,
}

impl Lines {
    pub fn new(log: Arc<Log>, stream: Stream) -> Lines {
        Lines { buffer: Arc::new(Mutex::new(Buffer { log, stream, pending: Vec::new() })) }
    }

    fn take(&self, bytes: &[u8]) {
        self.buffer.lock().unwrap_or_else(|e| e.into_inner()).take(bytes);
    }
}

impl Buffer {
    fn take(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let (text, ended) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            for part in text.chunks(LINE) {
                if self.pending.len() + part.len() > LINE {
                    self.log.line(self.stream, &std::mem::take(&mut self.pending), false);
                }
                self.pending.extend_from_slice(part);
            }
            if ended {
                self.log.line(self.stream, &std::mem::take(&mut self.pending), true);
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.pending.is_empty() {
            self.log.line(self.stream, &self.pending, true);
        }
    }
}

impl IsTerminal for Lines {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Lines {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl AsyncWrite for Lines {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.take(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[async_trait::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}

impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.take(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 << 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Seek, SeekFrom};

    fn logged(writes: &[&[u8]], max: u64) -> Vec<String> {
        let mut file = tempfile::tempfile().unwrap();
        let log = Arc::new(Log::new(file.try_clone().unwrap().into(), max));
        let lines = Lines::new(log, Stream::Stdout);
        writes.iter().for_each(|w| lines.take(w));
        drop(lines);
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        text.lines().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn lines_as_cri_has_them() {
        assert_eq!(logged(&[b"he", b"llo\nwor", b"ld"], 1 << 20), ["stdout F hello", "stdout F world"]);
        let long = "x".repeat(LINE + 10);
        let got = logged(&[long.as_bytes(), b"\n"], 1 << 20);
        assert_eq!((got.len(), got[0].len(), got[1].as_str()), (2, LINE + 9, "stdout F xxxxxxxxxx"));
        assert!(got[0].starts_with("stdout P x"));
    }

    #[test]
    fn a_log_that_no_one_rotates_ends() {
        let line = format!("{}\n", "y".repeat(10_000));
        let writes: Vec<&[u8]> = std::iter::repeat_n(line.as_bytes(), 100).collect();
        let got = logged(&writes, 0);
        assert!(got.len() < 40 && got.last().unwrap().contains("not rotated"));
    }

    proptest! {
        #[test]
        fn cutting_the_writes_otherwise_changes_nothing(text in "[ab\n]{0,200}", cut in 0usize..200) {
            let cut = cut.min(text.len());
            let (a, b) = text.as_bytes().split_at(cut);
            prop_assert_eq!(logged(&[a, b], 1 << 20), logged(&[text.as_bytes()], 1 << 20));
        }
    }
}
