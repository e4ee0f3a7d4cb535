//! A container's log on its way to the host. The shim writes it to a file and rotates that; what the host has taken in is
//! gone from here, what was sent and not credited is sent again to a host that takes over.

use super::channel::{Channel, lock};
use crate::protocol::{LOGS, OUTPUT};
use rustix::event::PollFlags;
use rustix::fs::inotify;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Of one file; a second holds what was before. The guest keeps them in its memory.
pub const MAX_BYTES: u64 = 1 << 20;

pub fn path(name: &str, attempt: u32) -> PathBuf {
    Path::new(LOGS).join(name).join(format!("{attempt}.log"))
}

fn ended_mark(log: &Path) -> PathBuf {
    log.with_extension("ended")
}

#[derive(Default)]
struct Tail {
    file: Option<File>,
    inode: u64,
    /// Sent and not yet credited.
    pending: VecDeque<u8>,
}

/// A container's name and the number of its run.
type Run = (String, u32);

#[derive(Default)]
pub struct Tails(Mutex<BTreeMap<Run, Arc<Mutex<Tail>>>>);

impl Tails {
    /// The container has ended: all that it will ever say is in its log. Making the file wakes who follows.
    pub fn ended(&self, name: &str, attempt: u32) {
        let mark = ended_mark(&path(name, attempt));
        if !mark.exists() {
            let _ = File::create(mark);
        }
    }

    pub fn forget(&self, name: &str) {
        lock(&self.0).retain(|(of, _), _| of != name);
    }

    pub fn follow(&self, channel: &Channel, name: &str, attempt: u32) -> io::Result<()> {
        let tail = lock(&self.0).entry((name.to_owned(), attempt)).or_default().clone();
        // whoever followed before is cancelled and lets go
        let mut tail = lock(&tail);
        let path = path(name, attempt);
        let directory = path.parent().unwrap_or(Path::new(LOGS));
        std::fs::create_dir_all(directory)?;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVE;
        inotify::add_watch(&watch, directory, events)?;
        let again: Vec<u8> = tail.pending.iter().copied().collect();
        let mut acknowledged = 0;
        if !again.is_empty() && !channel.data(OUTPUT, &again) {
            return Ok(());
        }
        let mut buffer = vec![0; 8 << 10];
        loop {
            let ended = ended_mark(&path).exists();
            let read = tail.read(&path, &mut buffer)?;
            tail.settle(channel, &mut acknowledged);
            if read > 0 {
                let bytes = buffer.get(..read).unwrap_or_default();
                tail.pending.extend(bytes);
                if !channel.data(OUTPUT, bytes) {
                    break;
                }
            } else if ended {
                channel.end(OUTPUT);
                // until the host has taken it in
                channel.ready(&channel.cancelled, PollFlags::IN);
                break;
            } else if !channel.ready(&watch, PollFlags::IN) {
                break;
            } else {
                while matches!(rustix::io::read(&watch, &mut buffer), Ok(n) if n > 0) {}
            }
        }
        tail.settle(channel, &mut acknowledged);
        Ok(())
    }
}

impl Tail {
    fn settle(&mut self, channel: &Channel, acknowledged: &mut u64) {
        let now = channel.credited(OUTPUT);
        let more = usize::try_from(now.saturating_sub(*acknowledged)).unwrap_or(usize::MAX);
        self.pending.drain(..more.min(self.pending.len()));
        *acknowledged = now;
    }

    /// The next bytes; 0 if there are none now.
    fn read(&mut self, path: &Path, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(file) = &mut self.file {
                let read = file.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
            }
            if !self.next(path) {
                return Ok(0);
            }
        }
    }

    /// Goes on to the file after this one; false if there is none.
    fn next(&mut self, path: &Path) -> bool {
        let mut rotated = path.as_os_str().to_owned();
        rotated.push(".1");
        let Ok(current) = std::fs::metadata(path) else { return false };
        if self.file.is_some() && current.ino() == self.inode {
            return false;
        }
        let before = std::fs::metadata(&rotated).ok().filter(|old| self.file.is_some() && old.ino() != self.inode);
        let open = if before.is_some() { File::open(&rotated) } else { File::open(path) };
        let Ok(file) = open else { return false };
        let Ok(meta) = file.metadata() else { return false };
        if self.file.is_some() && meta.ino() == self.inode {
            return false;
        }
        (self.file, self.inode) = (Some(file), meta.ino());
        true
    }
}
