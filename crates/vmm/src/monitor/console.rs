//! The serial console: every line into a log in CRI format, every byte to whoever is attached.

use crate::machine::{self, Error, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};

const LONGEST_LINE: usize = 16 << 10;
const MOST_ATTACHED: usize = 16;

#[derive(Clone)]
pub struct Console {
    serial: Arc<UnixStream>,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

struct Shared {
    log: Log,
    attached: Vec<UnixStream>,
    ended: bool,
}

impl Console {
    /// Opens the log while there is still the right to, and gives its directory to the machine's user for rotation.
    pub fn open(console: &machine::Console, uid: u32, serial: UnixStream) -> Result<Self> {
        let log = Log::open(console, uid)?;
        let shared = Shared { log, attached: Vec::new(), ended: false };
        Ok(Console { serial: Arc::new(serial), shared: Arc::new((Mutex::new(shared), Condvar::new())) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Starts the thread that reads the serial line until the engine closes it.
    pub fn pump(&self) {
        let console = self.clone();
        let spawned = std::thread::Builder::new().name("console".into()).stack_size(128 << 10).spawn(move || {
            let mut buffer = vec![0u8; 8 << 10];
            loop {
                match (&*console.serial).read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => {
                        let mut shared = console.lock();
                        let bytes = buffer.get(..n).unwrap_or_default();
                        shared.log.write(bytes);
                        shared.attached.retain_mut(|stream| stream.write_all(bytes).is_ok());
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            let mut shared = console.lock();
            shared.log.flush();
            shared.ended = true;
            console.shared.1.notify_all();
        });
        if spawned.is_err() {
            self.lock().ended = true;
        }
    }

    /// Waits until all that the machine printed is in the log.
    pub fn drain(&self) {
        let mut shared = self.lock();
        while !shared.ended {
            shared = self.shared.1.wait(shared).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Feeds a client's bytes to the machine and the machine's to the client, until the client goes.
    pub fn attach(&self, mut reader: impl Read, writer: UnixStream) {
        // a client that does not read is cut off, it must not stall the machine's console
        let _ = writer.set_write_timeout(Some(std::time::Duration::from_millis(500)));
        {
            let mut shared = self.lock();
            if shared.attached.len() >= MOST_ATTACHED {
                return;
            }
            shared.attached.push(writer);
        }
        let mut buffer = [0u8; 1024];
        while let Ok(n) = reader.read(&mut buffer) {
            let Some(bytes) = buffer.get(..n).filter(|b| !b.is_empty()) else { return };
            if (&*self.serial).write_all(bytes).is_err() {
                return;
            }
        }
    }
}

struct Log {
    dir: OwnedFd,
    name: String,
    file: File,
    written: u64,
    limit: u64,
    line: Vec<u8>,
}

impl Log {
    fn open(console: &machine::Console, uid: u32) -> Result<Self> {
        let path = &console.log_path;
        let dir = path.parent().unwrap_or(path);
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        std::os::unix::fs::chown(dir, Some(uid), Some(uid)).map_err(Error::io("chown", dir))?;
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let dir: OwnedFd = File::open(dir).map_err(Error::io("open", dir))?.into();
        let file = append(&dir, &name).map_err(Error::io("open", path))?;
        std::os::unix::fs::fchown(&file, Some(uid), Some(uid)).map_err(Error::io("chown", path))?;
        let written = file.metadata().map(|m| m.len()).unwrap_or(0);
        Ok(Log { dir, name, file, written, limit: console.log_max_bytes.max(64 << 10), line: Vec::new() })
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.emit(b"F"),
                b'\r' => {}
                byte => {
                    self.line.push(byte);
                    if self.line.len() >= LONGEST_LINE {
                        self.emit(b"P");
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            self.emit(b"F");
        }
    }

    fn emit(&mut self, tag: &[u8]) {
        let line = std::mem::take(&mut self.line);
        let record = [clock::stamp(clock::now_nanos()).as_slice(), b" stdout ", tag, b" ", &line, b"\n"].concat();
        if self.written + record.len() as u64 > self.limit {
            self.rotate();
        }
        // a full disk loses log lines, not the machine
        if self.file.write_all(&record).is_ok() {
            self.written += record.len() as u64;
        }
    }

    fn rotate(&mut self) {
        let old = format!("{}.1", self.name);
        if rustix::fs::renameat(&self.dir, &self.name, &self.dir, &old).is_ok()
            && let Ok(file) = append(&self.dir, &self.name)
        {
            self.file = file;
            self.written = 0;
        }
    }
}

fn append(dir: &OwnedFd, name: &str) -> std::io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o640))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cri_records_and_the_log_rotates() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/0.log");
        let console = machine::Console { log_path: path.clone(), log_max_bytes: 64 << 10 };
        let mut log = Log::open(&console, rustix::process::getuid().as_raw()).unwrap();
        log.write(b"one\r\ntw");
        log.write(b"o\n");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().map(|l| l.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["stdout F one", "stdout F two"]);
        for _ in 0..2000 {
            log.write(&[b'x'; 99]);
            log.write(b"\n");
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 64 << 10);
        assert!(path.with_file_name("0.log.1").exists());
    }
}
