//! A container's log as its guest tells it, in the file where logs are. What the guest says are lines in CRI format; a
//! line that is none is kept as one of the host's making, so that readers meet nothing else.

use super::link::{Channel, Link};
use guest::protocol::{OUTPUT, Request};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `2026-11-22T15:04:05.123456789Z stdout F `
const PREFIX: usize = 40;
const MAX_LINE: usize = container::shim::MAX_LINE + PREFIX;

/// Makes an empty log, which also says that this run was begun.
pub fn begin(path: &Path) -> io::Result<()> {
    LogFile::open(path).map(drop)
}

/// Follows one run's log to its end, or the line's.
pub async fn follow(link: Arc<Link>, name: String, attempt: u32, path: PathBuf, max: u64) {
    let Ok(channel) = link.ask(&Request::Logs { name, attempt }) else { return };
    let mut file = LogFile { path, max, file: None, size: 0 };
    let mut begun = Vec::new();
    while let Some(bytes) = channel.read(OUTPUT).await {
        begun.extend_from_slice(&bytes);
        let whole = begun.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let taken = if whole == 0 && begun.len() > MAX_LINE { begun.len() } else { whole };
        if taken == 0 {
            continue;
        }
        let rest = begun.split_off(taken);
        file = match keep(&channel, file, std::mem::replace(&mut begun, rest)).await {
            Some(file) => file,
            None => return,
        };
    }
    if !begun.is_empty() {
        keep(&channel, file, begun).await;
    }
}

/// Credit is given for what is written: what is not will be told again.
async fn keep(channel: &Channel, mut file: LogFile, lines: Vec<u8>) -> Option<LogFile> {
    let taken = lines.len();
    let written = tokio::task::spawn_blocking(move || {
        let outcome = file.write(&lines);
        (file, outcome)
    });
    let (file, outcome) = written.await.ok()?;
    if let Err(error) = outcome {
        tracing::warn!("{}: {error}", file.path.display());
        return None;
    }
    channel.credit(OUTPUT, taken);
    Some(file)
}

struct LogFile {
    path: PathBuf,
    /// 0 = no rotation.
    max: u64,
    file: Option<File>,
    size: u64,
}

impl LogFile {
    fn open(path: &Path) -> io::Result<(File, u64)> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new().create(true).append(true).mode(0o640).open(path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut pending = Vec::with_capacity(lines.len());
        for line in lines.split_inclusive(|b| *b == b'\n') {
            let before = pending.len();
            line_of(line.strip_suffix(b"\n").unwrap_or(line), &mut pending);
            let used = self.size + before as u64;
            if self.max > 0 && used > 0 && used + (pending.len() - before) as u64 > self.max {
                let after = pending.split_off(before);
                self.append(&pending)?;
                pending = after;
                let mut old = self.path.clone().into_os_string();
                old.push(".1");
                std::fs::rename(&self.path, old)?;
                self.file = None;
            }
        }
        self.append(&pending)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            let (file, size) = Self::open(&self.path)?;
            (self.file, self.size) = (Some(file), size);
        }
        if let Some(file) = &mut self.file {
            file.write_all(bytes)?;
            self.size += bytes.len() as u64;
        }
        Ok(())
    }
}

fn is_log_line(line: &[u8]) -> bool {
    let Some((stamp, rest)) = line.split_at_checked(30) else { return false };
    let digits = |(at, b): (usize, &u8)| match at {
        4 | 7 => *b == b'-',
        10 => *b == b'T',
        13 | 16 => *b == b':',
        19 => *b == b'.',
        29 => *b == b'Z',
        _ => b.is_ascii_digit(),
    };
    let tags: [&[u8]; 4] = [b" stdout F ", b" stdout P ", b" stderr F ", b" stderr P "];
    stamp.iter().enumerate().all(digits) && tags.iter().any(|tag| rest.starts_with(tag)) && line.len() <= MAX_LINE
}

fn line_of(line: &[u8], out: &mut Vec<u8>) {
    if !is_log_line(line) {
        let seconds = api::time::now_micros();
        let stamp = api::k8s::jiff::Timestamp::from_microsecond(seconds).unwrap_or_default();
        out.extend_from_slice(format!("{stamp:.9} stderr F ").as_bytes());
    }
    out.extend_from_slice(line.get(..line.len().min(MAX_LINE)).unwrap_or_default());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_rotated_and_made_lines_where_they_are_none() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("c/0.log");
        let mut file = LogFile { path: path.clone(), max: 100, file: None, size: 0 };
        let good = b"2026-11-22T15:04:05.123456789Z stdout F hello\n";
        file.write(good).expect("written");
        assert_eq!(std::fs::read(&path).expect("log"), good);
        file.write(b"\x1b[2J nonsense\n").expect("written");
        file.write(good).expect("written");
        let old = std::fs::read_to_string(dir.path().join("c/0.log.1")).expect("rotated");
        let now = std::fs::read_to_string(&path).expect("log");
        assert!(format!("{old}{now}").contains("stderr F \u{1b}[2J nonsense\n"));
        for line in old.lines().chain(now.lines()) {
            assert!(is_log_line(line.as_bytes()), "{line}");
        }
        for bad in ["", "x", "2026-11-22T15:04:05.123456789Z stdoux F x", "2026-11-22 15:04:05.123456789Z stdout F x"] {
            assert!(!is_log_line(bad.as_bytes()), "{bad}");
        }
    }
}
