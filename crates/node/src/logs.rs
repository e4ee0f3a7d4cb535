//! Reads container logs in CRI format (`<RFC3339Nano> stdout|stderr F|P <text>`), with the rotated file before the
//! current one: tail, since, timestamps, a limit of bytes, and following across rotation.

use api::k8s::jiff::Timestamp;
use api::streams::LogOptions;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;

/// Read at a time; tiny in tests, so that lines cross its edges.
const CHUNK: usize = if cfg!(test) { 37 } else { 64 << 10 };
/// Longer lines than any writer makes are not log lines.
const LINE_LIMIT: usize = 1 << 20;
const POLL: Duration = Duration::from_millis(100);

/// `<attempt>.log.1`: what rotation put aside.
fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// One line of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry<'a> {
    time: &'a [u8],
    stream: &'a [u8],
    partial: bool,
    text: &'a [u8],
}

/// `None` if it is not in CRI format. `line` is without its newline.
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
    let text = parts.next().unwrap_or_default();
    if time.len() < 20 || time.len() > 40 || !matches!(stream, b"stdout" | b"stderr") {
        return None;
    }
    let partial = match tags.split(|b| *b == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Entry { time, stream, partial, text })
}

fn nanos(time: &[u8]) -> Option<i128> {
    std::str::from_utf8(time).ok()?.parse::<Timestamp>().ok().map(Timestamp::as_nanosecond)
}

/// Turns file content into what the client gets.
struct Format {
    timestamps: bool,
    since: Option<i128>,
    stream: Option<&'static [u8]>,
    left: Option<u64>,
    /// The next entry begins a line.
    fresh: bool,
}

impl Format {
    fn new(options: &LogOptions) -> Self {
        Format {
            timestamps: options.timestamps,
            since: options.since_nanos,
            stream: match options.stream.to_ascii_lowercase().as_str() {
                "stdout" => Some(b"stdout"),
                "stderr" => Some(b"stderr"),
                _ => None,
            },
            left: options.limit_bytes,
            fresh: true,
        }
    }

    fn done(&self) -> bool {
        self.left == Some(0)
    }

    fn line(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(entry) = parse(line) else { return };
        if self.stream.is_some_and(|s| s != entry.stream) {
            return;
        }
        if let Some(since) = self.since
            && nanos(entry.time).is_none_or(|t| t < since)
        {
            return;
        }
        let start = out.len();
        if self.timestamps && self.fresh {
            out.extend_from_slice(entry.time);
            out.push(b' ');
        }
        out.extend_from_slice(entry.text);
        if !entry.partial {
            out.push(b'\n');
        }
        self.fresh = !entry.partial;
        if let Some(left) = &mut self.left {
            let take = usize::try_from(*left).unwrap_or(usize::MAX).min(out.len() - start);
            out.truncate(start + take);
            *left -= take as u64;
        }
    }
}

/// Splits a growing file into lines.
struct Reader {
    path: PathBuf,
    file: Option<File>,
    buffer: Vec<u8>,
}

impl Reader {
    /// Opens at `offset`; a file that is not there yet is waited for.
    fn open(path: PathBuf, offset: u64) -> std::io::Result<Self> {
        let file = match File::open(&path) {
            Ok(mut file) => {
                file.seek(SeekFrom::Start(offset))?;
                Some(file)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        Ok(Reader { path, file, buffer: Vec::new() })
    }

    /// Reads one piece and formats the whole lines in it. Answers bytes read: 0 at the end.
    fn read(&mut self, format: &mut Format, out: &mut Vec<u8>) -> std::io::Result<usize> {
        let Some(file) = &mut self.file else { return Ok(0) };
        let before = self.buffer.len();
        let read = file.by_ref().take(CHUNK as u64).read_to_end(&mut self.buffer)?;
        let mut from = 0;
        let mut search = before;
        while let Some(end) = self.buffer.get(search..).and_then(|rest| rest.iter().position(|b| *b == b'\n')) {
            let end = search + end;
            if let Some(line) = self.buffer.get(from..end)
                && !format.done()
            {
                format.line(line, out);
            }
            from = end + 1;
            search = from;
        }
        self.buffer.drain(..from);
        if self.buffer.len() > LINE_LIMIT {
            self.buffer.clear();
        }
        Ok(read)
    }

    /// After the end: goes on in the file that replaced this one, if one has. What was written between the last read
    /// and the rotation is read before.
    fn reopen(&mut self, format: &mut Format, out: &mut Vec<u8>) -> std::io::Result<bool> {
        let own = match &self.file {
            Some(file) => Some(file.metadata()?.ino()),
            None => None,
        };
        let other = |path: &Path| -> std::io::Result<bool> {
            match std::fs::metadata(path) {
                Ok(meta) => Ok(own != Some(meta.ino())),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(e),
            }
        };
        if !other(&self.path)? {
            return Ok(false);
        }
        while self.read(format, out)? > 0 {}
        // Rotated twice since: what was put aside is newer than what was read here, and comes first.
        let aside = rotated(&self.path);
        let next = if own.is_some() && other(&aside)? { aside } else { self.path.clone() };
        self.buffer.clear();
        self.file = match File::open(&next) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        };
        Ok(true)
    }
}

/// Offset at which the last `lines` whole lines begin, and how many there are from there.
fn tail_offset(path: &Path, lines: u64) -> std::io::Result<(u64, u64)> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
        Err(e) => return Err(e),
    };
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok((length, 0));
    }
    // Walks backwards; `pending` is the beginning of what follows the block, up to its first newline.
    let (mut at, mut found, mut boundary) = (length, 0u64, length);
    let mut pending: Vec<u8> = Vec::new();
    let mut started = false;
    while at > 0 {
        let size = at.min(CHUNK as u64);
        at -= size;
        let mut block = vec![0; usize::try_from(size).unwrap_or(CHUNK)];
        file.read_exact_at(&mut block, at)?;
        block.append(&mut pending);
        let mut end = block.len();
        while let Some(newline) = block.get(..end).and_then(|b| b.iter().rposition(|b| *b == b'\n')) {
            if started && ends_line(block.get(newline + 1..end).unwrap_or_default()) {
                if found == lines {
                    return Ok((boundary, found));
                }
                found += 1;
            }
            started = true;
            boundary = at + newline as u64 + 1;
            end = newline;
        }
        block.truncate(end);
        if block.len() > LINE_LIMIT {
            block.clear();
        }
        pending = block;
    }
    if started && ends_line(&pending) {
        if found == lines {
            return Ok((boundary, found));
        }
        found += 1;
    }
    Ok((0, found))
}

/// Whether this entry is the last of its line. Entries in other formats count as nothing.
fn ends_line(line: &[u8]) -> bool {
    parse(line).is_some_and(|e| !e.partial)
}

/// The end of a log as text, for termination messages.
pub(crate) fn tail_text(path: &Path, bytes: u64, lines: usize) -> String {
    let Ok((offset, _)) = tail_offset(path, lines as u64) else { return String::new() };
    let Ok(mut reader) = Reader::open(path.to_owned(), offset) else { return String::new() };
    let mut format = Format::new(&LogOptions::default());
    let mut out = Vec::new();
    while matches!(reader.read(&mut format, &mut out), Ok(n) if n > 0) {}
    let keep = usize::try_from(bytes).unwrap_or(usize::MAX);
    let from = out.len().saturating_sub(keep);
    String::from_utf8_lossy(out.get(from..).unwrap_or_default()).into_owned()
}

/// Reads the log at `path`. While following, `alive` tells whether more may come.
pub(crate) fn stream(
    path: PathBuf,
    options: LogOptions,
    alive: impl Fn() -> bool + Send + 'static,
) -> BoxStream<'static, std::io::Result<Bytes>> {
    let (send, receive) = mpsc::channel(4);
    tokio::spawn(async move {
        if let Err(error) = pump(path, options, alive, &send).await {
            let _ = send.send(Err(error)).await;
        }
    });
    Box::pin(futures_util::stream::unfold(receive, |mut receive| async {
        receive.recv().await.map(|item| (item, receive))
    }))
}

/// Reading happens on blocking threads, a piece at a time, so a slow client holds none of them.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(std::io::Error::other(e)))
}

async fn pump(
    path: PathBuf,
    options: LogOptions,
    alive: impl Fn() -> bool + Send + 'static,
    send: &mpsc::Sender<std::io::Result<Bytes>>,
) -> std::io::Result<()> {
    let (tail, current) = (options.tail_lines, path.clone());
    let readers = blocking(move || open_at_tail(current, tail)).await?;
    let mut format = Format::new(&options);
    let last = readers.len().saturating_sub(1);
    for (index, mut reader) in readers.into_iter().enumerate() {
        let mut ending = false;
        loop {
            let (read, out, r, f) = blocking(move || {
                let mut out = Vec::new();
                let read = reader.read(&mut format, &mut out)?;
                Ok((read, out, reader, format))
            })
            .await?;
            (reader, format) = (r, f);
            if !out.is_empty() && send.send(Ok(out.into())).await.is_err() || format.done() {
                return Ok(());
            }
            if read > 0 {
                ending = false;
                continue;
            }
            if index < last || !options.follow {
                break;
            }
            let (changed, out, r, f) = blocking(move || {
                let mut out = Vec::new();
                let changed = reader.reopen(&mut format, &mut out)?;
                Ok((changed, out, reader, format))
            })
            .await?;
            (reader, format) = (r, f);
            if !out.is_empty() && send.send(Ok(out.into())).await.is_err() || format.done() {
                return Ok(());
            }
            if changed {
                continue;
            }
            // What was written before the end was seen is read once more.
            if ending {
                return Ok(());
            }
            ending = !alive();
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = send.closed() => return Ok(()),
            }
        }
    }
    Ok(())
}

fn open_at_tail(path: PathBuf, tail: Option<u64>) -> std::io::Result<Vec<Reader>> {
    let before = rotated(&path);
    let mut readers = Vec::new();
    match tail {
        None => {
            readers.push(Reader::open(before, 0)?);
            readers.push(Reader::open(path, 0)?);
        }
        Some(lines) => {
            let (offset, found) = tail_offset(&path, lines)?;
            if found < lines {
                let (offset, _) = tail_offset(&before, lines - found)?;
                readers.push(Reader::open(before, offset)?);
            }
            readers.push(Reader::open(path, offset)?);
        }
    }
    Ok(readers)
}

#[cfg(test)]
mod tests;
