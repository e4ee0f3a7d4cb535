//! Watches: who listens to which keys, and how a watcher gets from history to the present.
//!
//! ```text
//!             nothing older is left to read
//!   Replay ───────────────────────────────▶ Live ──▶ cut off (too slow) | ended (store shut down)
//! ```
//! A watcher in `Replay` reads history in chunks at its own speed and buffers nothing. [`Hub::attach`] makes it `Live`
//! only when nothing between what it has read and what was published last is missing, under the lock that `publish`
//! takes: no gap, no duplicate.

use crate::model::{Error, Event, KeyRange, Result, Revision, Watch, WatchBatch};
use async_trait::async_trait;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

/// Batches that wait for one live watcher before it is cut off.
const QUEUE_BATCHES: usize = 10_000;
/// Bytes of events that wait for one live watcher before it is cut off.
const QUEUE_BYTES: usize = 64 << 20;
/// How often a watcher that sees no events is told how far the store is.
const MARK_INTERVAL: Duration = Duration::from_secs(1);
/// Revisions read from history at once.
const REPLAY_CHUNK: usize = 500;

/// Events read from history.
pub(crate) struct Replayed {
    pub batches: Vec<WatchBatch>,
    /// First revision not read.
    pub next: Revision,
}

/// An engine's past, as watchers need it.
pub(crate) trait History: Send + Sync + 'static {
    /// The events in `range` of at most `limit` revisions from `from` on. Blocks on the disk.
    fn replay(&self, range: &KeyRange, from: Revision, limit: usize) -> Result<Replayed>;
}

#[derive(Default)]
struct Queued {
    batches: AtomicUsize,
    bytes: AtomicUsize,
}

struct Watcher {
    range: KeyRange,
    /// Events before are not for it.
    from: Revision,
    sender: mpsc::UnboundedSender<WatchBatch>,
    queued: Arc<Queued>,
}

#[derive(Default)]
struct State {
    watchers: HashMap<u64, Watcher>,
    next_id: u64,
    published: Revision,
    closed: bool,
}

/// The live watchers of one engine.
pub(crate) struct Hub {
    state: Mutex<State>,
}

pub(crate) struct Live {
    id: u64,
    from: Revision,
    receiver: mpsc::UnboundedReceiver<WatchBatch>,
    queued: Arc<Queued>,
}

pub(crate) enum Attached {
    Live(Live),
    /// History up to the newest published revision has to be read first.
    Behind,
    Closed,
}

impl Hub {
    pub fn new(published: Revision) -> Arc<Self> {
        Arc::new(Hub { state: Mutex::new(State { published, ..State::default() }) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn published(&self) -> Revision {
        self.lock().published
    }

    /// Hands out the events of committed revisions, oldest first. Watchers that are full are cut off.
    pub fn publish(&self, batches: &[WatchBatch]) {
        let Some(last) = batches.last() else { return };
        let mut state = self.lock();
        state.watchers.retain(|_, watcher| batches.iter().all(|batch| watcher.offer(batch)));
        state.published = last.revision;
    }

    /// `from` = 0: from the next revision.
    pub fn attach(&self, range: &KeyRange, from: Revision) -> Attached {
        let mut state = self.lock();
        if state.closed {
            return Attached::Closed;
        }
        let from = if from == 0 { state.published + 1 } else { from };
        if from <= state.published {
            return Attached::Behind;
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        let (id, queued) = (state.next_id, Arc::new(Queued::default()));
        state.next_id += 1;
        let watcher = Watcher { range: range.clone(), from, sender, queued: Arc::clone(&queued) };
        state.watchers.insert(id, watcher);
        Attached::Live(Live { id, from, receiver, queued })
    }

    fn detach(&self, id: u64) {
        self.lock().watchers.remove(&id);
    }

    /// Ends all watches.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.watchers.clear();
    }

    fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

impl Watcher {
    /// False when it must be cut off.
    fn offer(&self, batch: &WatchBatch) -> bool {
        if batch.revision < self.from {
            return true;
        }
        let Some(batch) = narrowed(batch, &self.range) else { return true };
        let size = size_of(&batch);
        if self.queued.batches.load(Ordering::Relaxed) >= QUEUE_BATCHES
            || self.queued.bytes.load(Ordering::Relaxed).saturating_add(size) > QUEUE_BYTES
        {
            return false;
        }
        self.queued.batches.fetch_add(1, Ordering::Relaxed);
        self.queued.bytes.fetch_add(size, Ordering::Relaxed);
        self.sender.send(batch).is_ok()
    }
}

fn key_of(event: &Event) -> &[u8] {
    match event {
        Event::Put { kv, .. } => &kv.key,
        Event::Delete { key, .. } => key,
    }
}

fn size_of(batch: &WatchBatch) -> usize {
    let value = |event: &Event| match event {
        Event::Put { kv, previous } => kv.value.len() + previous.as_ref().map_or(0, |kv| kv.value.len()),
        Event::Delete { previous, .. } => previous.as_ref().map_or(0, |kv| kv.value.len()),
    };
    batch.events.iter().map(|event| key_of(event).len() + value(event)).sum()
}

/// The part of `batch` in `range`; shares the events when that is all of them.
fn narrowed(batch: &WatchBatch, range: &KeyRange) -> Option<WatchBatch> {
    let inside = batch.events.iter().filter(|event| range.contains(key_of(event))).count();
    match inside {
        0 => None,
        all if all == batch.events.len() => Some(batch.clone()),
        _ => {
            let events = batch.events.iter().filter(|event| range.contains(key_of(event))).cloned().collect();
            Some(WatchBatch { revision: batch.revision, events })
        }
    }
}

enum Mode {
    Replay { next: Revision },
    Live(Live),
    Ended,
}

/// One running watch of either engine.
pub(crate) struct Feed {
    hub: Arc<Hub>,
    history: Weak<dyn History>,
    range: KeyRange,
    mode: Mode,
    pending: VecDeque<WatchBatch>,
    /// Last revision given out or marked.
    last: Revision,
}

impl Feed {
    /// `Compacted` when `from` is gone already.
    pub fn start(
        hub: &Arc<Hub>,
        history: Weak<dyn History>,
        range: KeyRange,
        from: Revision,
        compacted: Revision,
    ) -> Result<Feed> {
        if from > 0 && from < compacted {
            return Err(Error::Compacted { oldest: compacted });
        }
        let (mode, last) = match hub.attach(&range, from) {
            Attached::Live(live) => {
                let last = live.from - 1;
                (Mode::Live(live), last)
            }
            Attached::Behind => (Mode::Replay { next: from }, from - 1),
            Attached::Closed => return Err(Error::Closed),
        };
        Ok(Feed { hub: Arc::clone(hub), history, range, mode, pending: VecDeque::new(), last })
    }

    /// One step out of `Replay`: live if nothing is missing, else the next chunk of history.
    async fn catch_up(&mut self, next: Revision) -> Result<()> {
        match self.hub.attach(&self.range, next) {
            Attached::Live(live) => {
                self.mode = Mode::Live(live);
                if self.last < next - 1 {
                    self.pending.push_back(WatchBatch { revision: next - 1, events: Arc::from([]) });
                }
            }
            Attached::Closed => self.mode = Mode::Ended,
            Attached::Behind => {
                let Some(history) = self.history.upgrade() else {
                    self.mode = Mode::Ended;
                    return Ok(());
                };
                let range = self.range.clone();
                let read = tokio::task::spawn_blocking(move || history.replay(&range, next, REPLAY_CHUNK));
                let replayed = read.await.map_err(|_| Error::Closed)??;
                self.pending.extend(replayed.batches);
                self.mode = Mode::Replay { next: replayed.next };
            }
        }
        Ok(())
    }

    fn give(&mut self, batch: WatchBatch) -> Option<Result<WatchBatch>> {
        self.last = batch.revision;
        Some(Ok(batch))
    }
}

#[async_trait]
impl Watch for Feed {
    async fn next(&mut self) -> Option<Result<WatchBatch>> {
        loop {
            if let Some(batch) = self.pending.pop_front() {
                return self.give(batch);
            }
            let live = match &mut self.mode {
                Mode::Ended => return None,
                Mode::Replay { next } => {
                    let next = *next;
                    if let Err(error) = self.catch_up(next).await {
                        self.mode = Mode::Ended;
                        return Some(Err(error));
                    }
                    continue;
                }
                Mode::Live(live) => live,
            };
            match tokio::time::timeout(MARK_INTERVAL, live.receiver.recv()).await {
                Ok(Some(batch)) => {
                    live.queued.batches.fetch_sub(1, Ordering::Relaxed);
                    live.queued.bytes.fetch_sub(size_of(&batch), Ordering::Relaxed);
                    return self.give(batch);
                }
                Ok(None) => {
                    self.mode = Mode::Ended;
                    return if self.hub.is_closed() { None } else { Some(Err(Error::Lagged { after: self.last })) };
                }
                Err(_) => {
                    // Whatever is published has been queued before: nothing queued means nothing missed up to here.
                    let revision = self.hub.published();
                    if revision > self.last && live.receiver.is_empty() {
                        return self.give(WatchBatch { revision, events: Arc::from([]) });
                    }
                }
            }
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Mode::Live(live) = &self.mode {
            self.hub.detach(live.id);
        }
    }
}
