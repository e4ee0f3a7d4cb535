//! Spans of invocations, until the daemon fetches them: the host reaches no collector itself.
//!
//! They are kept while somebody fetches them, in a bounded buffer; what has no room is counted and dropped.

use crate::wire::Recorded;
use spans::Span;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard};

const ROOM: usize = 4096;
/// Spans of one answer to the daemon.
const BATCH: usize = 256;
/// Who has not fetched for so long does so no more, nanoseconds.
const PATIENCE: i64 = 30_000_000_000;

#[derive(Default)]
pub(crate) struct Recorder {
    /// When spans were last fetched, unix nanoseconds.
    fetched: AtomicI64,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    spans: VecDeque<Recorded>,
    dropped: u64,
}

impl Recorder {
    pub fn wanted(&self) -> bool {
        clock::now_nanos().saturating_sub(self.fetched.load(Ordering::Relaxed)) < PATIENCE
    }

    pub fn keep(&self, function: &str, span: Span) {
        let mut kept = self.lock();
        if kept.spans.len() >= ROOM {
            kept.dropped += 1;
        } else {
            kept.spans.push_back(Recorded { function: function.to_owned(), span });
        }
    }

    /// The oldest ones, and how many were dropped since the last time.
    pub fn fetch(&self) -> (Vec<Recorded>, u64) {
        self.fetched.store(clock::now_nanos(), Ordering::Relaxed);
        let mut kept = self.lock();
        let count = kept.spans.len().min(BATCH);
        (kept.spans.drain(..count).collect(), std::mem::take(&mut kept.dropped))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_fetches_is_dropped() {
        let recorder = Recorder::default();
        assert!(!recorder.wanted());
        assert_eq!(recorder.fetch().0.len(), 0);
        assert!(recorder.wanted(), "somebody fetches");
        let span = Span {
            trace: 1,
            id: 1,
            parent: None,
            state: String::new(),
            name: "GET".into(),
            start: 0,
            end: 0,
            error: None,
            attributes: Vec::new(),
        };
        (0..ROOM + 5).for_each(|_| recorder.keep("f", span.clone()));
        let mut fetched = 0;
        let mut lost = 0;
        loop {
            let (spans, dropped) = recorder.fetch();
            lost += dropped;
            if spans.is_empty() {
                break;
            }
            fetched += spans.len();
        }
        assert_eq!((fetched, lost), (ROOM, 5));
    }
}
