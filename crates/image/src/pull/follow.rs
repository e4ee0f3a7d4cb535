//! Reading a download while it grows, so that a layer is unpacked as it comes. What was unpacked is given a name only
//! when the whole blob has arrived and has its digest.

use crate::digest::Digest;
use crate::error::{Result, io};
use crate::jailed::Input;
use crate::spec::Descriptor;
use crate::store::Store;
use crate::unpack::Compression;
use std::fs::File;
use std::io::{self as stdio, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A download as those who follow it see it.
#[derive(Default)]
pub(super) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    file: Option<Arc<File>>,
    have: u64,
    /// Whether it came whole and verified.
    ended: Option<bool>,
}

impl Watch {
    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// A try begins with so many bytes that are there. If there were more before, whoever has read them has to give up.
    /// The file is opened anew: the writer's lock must go with the writer.
    pub fn begin(&self, path: &Path, have: u64) {
        let file = File::open(path).ok().map(Arc::new);
        self.update(|state| {
            if have < state.have || file.is_none() {
                state.ended = Some(false);
            }
            (state.file, state.have) = (file, have);
        });
    }

    pub fn grown(&self, have: u64) {
        self.update(|state| state.have = have);
    }

    /// The first word counts.
    pub fn end(&self, verified: bool) {
        self.update(|state| {
            state.ended.get_or_insert(verified);
        });
    }

    fn wait<T>(&self, mut ready: impl FnMut(&State) -> Option<T>) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = ready(&state) {
                return value;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends a watch when the download is over, however it is.
pub(super) struct EndOnDrop<'a>(pub &'a Watch);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(false);
    }
}

struct Follower {
    watch: Arc<Watch>,
    at: u64,
    size: u64,
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        if self.at == self.size || buffer.is_empty() {
            return Ok(0);
        }
        let (at, size) = (self.at, self.size);
        let ready = self.watch.wait(|state| match (&state.file, state.ended) {
            (_, Some(false)) => Some(None),
            (Some(file), _) if state.have > at => Some(Some((file.clone(), state.have.min(size) - at))),
            (_, Some(true)) => Some(None),
            _ => None,
        });
        let (file, there) = ready.ok_or_else(|| stdio::Error::other("the download failed"))?;
        let want = (buffer.len() as u64).min(there) as usize;
        let n = file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Store {
    /// Unpacks a layer as it comes. What goes wrong here is told when it is unpacked from its blob.
    pub(super) fn unpack_following(&self, layer: &Descriptor, diff_id: &Digest, watch: &Arc<Watch>) {
        if let Err(error) = self.follow(layer, diff_id, watch) {
            tracing::debug!(layer = %layer.digest, error = %error.chain(), "not unpacked on its way");
        }
    }

    fn follow(&self, layer: &Descriptor, diff_id: &Digest, watch: &Arc<Watch>) -> Result<()> {
        let name = format!("layer-{}", diff_id.hex());
        // Another process is at it.
        let Some(lock) = self.try_named_lock(&name)? else { return Ok(()) };
        if !self.layer_claim(diff_id)? {
            let (temporary, held) = self.temporary_dir()?;
            let unpacked = self.follow_into(layer, diff_id, watch, &temporary);
            drop(held);
            if !matches!(unpacked, Ok(true)) {
                let _ = std::fs::remove_dir_all(&temporary);
            }
            unpacked?;
        }
        self.forget_lock(&name, lock);
        Ok(())
    }

    /// Whether it is in its place.
    fn follow_into(&self, layer: &Descriptor, diff_id: &Digest, watch: &Arc<Watch>, temporary: &Path) -> Result<bool> {
        let what = layer.digest.to_string();
        let mut head = Vec::new();
        let mut follower = Follower { watch: watch.clone(), at: 0, size: layer.size };
        follower.by_ref().take(6).read_to_end(&mut head).map_err(io("follow", &what))?;
        let Ok(compression) = Compression::detect(&head) else { return Ok(false) };
        follower.at = 0;
        self.unpack_source(&what, compression, Input::Stream(Box::new(follower)), temporary, Some(diff_id))?;
        if !watch.wait(|state| state.ended) {
            return Ok(false);
        }
        self.layer_adopt(temporary, diff_id)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_waits_for_what_is_to_come_and_hears_of_failure() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(b"hello, world", 0).unwrap();
        let watch = Arc::new(Watch::default());
        std::thread::scope(|scope| {
            let whole = scope.spawn(|| {
                let mut text = String::new();
                Follower { watch: watch.clone(), at: 0, size: 12 }.read_to_string(&mut text).map(|_| text)
            });
            watch.begin(file.path(), 0);
            watch.grown(5);
            watch.begin(file.path(), 5);
            watch.grown(12);
            assert_eq!(whole.join().unwrap().unwrap(), "hello, world");
            let more = scope.spawn(|| {
                let mut text = String::new();
                Follower { watch: watch.clone(), at: 0, size: 20 }.read_to_string(&mut text).map(|_| text)
            });
            // The server did not go on where it stopped.
            watch.begin(file.path(), 0);
            assert!(more.join().unwrap().is_err());
        });
        assert!(!watch.wait(|s| s.ended));
    }
}
