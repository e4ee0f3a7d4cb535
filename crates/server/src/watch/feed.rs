//! One store watch per resource, its newest events kept in a ring that any number of watchers read at their own pace.
//!
//! ```text
//!             what it has read reaches the ring
//!   Catching ─────────────────────────────────▶ Following ──▶ ended
//!      ▲                                            │ the ring moved on without it
//!      └────────────────────────────────────────────┘
//! ```
//! A watcher that asks for an old revision, or falls behind, reads from the store by itself until it meets the ring.

use crate::rest::storage;
use api::kind::Kind;
use api::object::SharedObject;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use store::{KeyRange, Revision, Store};
use tokio::sync::watch;

const RING_EVENTS: usize = 256;
const RING_BYTES: usize = 2 << 20;
/// A first watcher that is at most this far behind starts the ring where it is.
const START_BEHIND: Revision = 1000;
/// Events handed to a watcher at once.
const CHUNK: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Added,
    Modified,
    Deleted,
}

impl Change {
    pub fn name(self) -> &'static str {
        match self {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        }
    }
}

/// One change of one object.
pub struct Event {
    pub revision: Revision,
    pub change: Change,
    /// As it is now; the last state when deleted, with the revision of the deletion.
    pub object: SharedObject,
    previous_bytes: Option<Bytes>,
    previous: OnceLock<Option<SharedObject>>,
    encoded: Mutex<Vec<(u64, Bytes)>>,
    size: usize,
}

impl Event {
    pub fn new(revision: Revision, change: Change, object: SharedObject, previous: Option<Bytes>) -> Self {
        Event {
            revision,
            change,
            object,
            previous_bytes: previous,
            previous: OnceLock::new(),
            encoded: Mutex::new(Vec::new()),
            size: 0,
        }
    }

    /// The state before, decoded when first asked for.
    pub fn previous(&self) -> Option<SharedObject> {
        self.previous
            .get_or_init(|| {
                let bytes = self.previous_bytes.as_ref()?;
                serde_json::from_slice(bytes).ok().map(Arc::new)
            })
            .clone()
    }

    /// The serialised form `form` of this event, made by the first watcher that needs it.
    pub fn encoded(&self, form: u64, make: impl FnOnce() -> Bytes) -> Bytes {
        let mut known = lock(&self.encoded);
        if let Some((_, bytes)) = known.iter().find(|(f, _)| *f == form) {
            return bytes.clone();
        }
        let bytes = make();
        known.push((form, bytes.clone()));
        bytes
    }

    fn read(kind: &Kind, event: &store::Event) -> Option<Self> {
        let (revision, change, value, previous) = match event {
            store::Event::Put { kv, previous: Some(previous) } => {
                (kv.mod_revision, Change::Modified, &kv.value, Some(previous.value.clone()))
            }
            store::Event::Put { kv, previous: None } if kv.version > 1 => {
                (kv.mod_revision, Change::Modified, &kv.value, None)
            }
            store::Event::Put { kv, previous: None } => (kv.mod_revision, Change::Added, &kv.value, None),
            store::Event::Delete { revision, previous: Some(previous), .. } => {
                (*revision, Change::Deleted, &previous.value, None)
            }
            store::Event::Delete { previous: None, .. } => return None,
        };
        let object = match storage::decode(kind, value, revision) {
            Ok(object) => Arc::new(object),
            Err(error) => {
                tracing::error!(plural = %kind.resource.plural, revision, "{}", error.message);
                return None;
            }
        };
        let size = value.len() + previous.as_ref().map_or(0, Bytes::len);
        Some(Event { size, ..Event::new(revision, change, object, previous) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[derive(Default)]
struct Ring {
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Sequence number of the first event in the ring.
    base: u64,
    /// All events after this revision are in the ring or came after.
    start: Revision,
    /// Nothing up to here is missing.
    head: Revision,
    /// The store has shut down.
    ended: bool,
}

struct Shared {
    ring: Mutex<Ring>,
    /// Counts batches; watchers wait for it to move.
    moved: watch::Sender<u64>,
}

/// The events of one resource in one version.
pub struct Feed {
    shared: Arc<Shared>,
    kind: Arc<Kind>,
    store: Arc<dyn Store>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Feed {
    fn start(store: Arc<dyn Store>, kind: Arc<Kind>, after: Revision) -> Arc<Self> {
        let ring = Ring { start: after, head: after, ..Ring::default() };
        let shared = Arc::new(Shared { ring: Mutex::new(ring), moved: watch::channel(0).0 });
        let task = tokio::spawn(run(store.clone(), kind.clone(), shared.clone(), after));
        Arc::new(Feed { shared, kind, store, task })
    }

    fn range(&self) -> KeyRange {
        KeyRange::prefix(storage::prefix(&self.kind, ""))
    }
}

/// Fills the ring. A store watch that was cut off is begun again where it ended.
async fn run(store: Arc<dyn Store>, kind: Arc<Kind>, shared: Arc<Shared>, after: Revision) {
    let mut after = after;
    loop {
        let range = KeyRange::prefix(storage::prefix(&kind, ""));
        let mut watch = match store.watch(range, after + 1).await {
            Ok(watch) => watch,
            Err(error) => {
                // Too old to go on from: watchers find the gap by themselves when they read the store.
                let Ok(now) = store.revision().await else { break };
                tracing::warn!(plural = %kind.resource.plural, %error, "watch begins again");
                {
                    let mut ring = lock(&shared.ring);
                    ring.base += ring.events.len() as u64 + 1;
                    ring.events.clear();
                    (ring.bytes, ring.start, ring.head) = (0, now, now);
                }
                after = now;
                shared.moved.send_modify(|n| *n += 1);
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        loop {
            match watch.next().await {
                Some(Ok(batch)) => {
                    after = after.max(batch.revision);
                    push(&kind, &shared, &batch);
                }
                Some(Err(error)) => {
                    tracing::warn!(plural = %kind.resource.plural, %error, "watch ended");
                    break;
                }
                None => {
                    lock(&shared.ring).ended = true;
                    shared.moved.send_modify(|n| *n += 1);
                    return;
                }
            }
        }
    }
    lock(&shared.ring).ended = true;
    shared.moved.send_modify(|n| *n += 1);
}

fn push(kind: &Kind, shared: &Shared, batch: &store::WatchBatch) {
    let events: Vec<Arc<Event>> = batch.events.iter().filter_map(|e| Event::read(kind, e)).map(Arc::new).collect();
    let news = !events.is_empty();
    {
        let mut ring = lock(&shared.ring);
        for event in events {
            ring.bytes += event.size;
            ring.events.push_back(event);
        }
        while ring.events.len() > RING_EVENTS || (ring.bytes > RING_BYTES && ring.events.len() > 1) {
            let Some(oldest) = ring.events.pop_front() else { break };
            ring.bytes -= oldest.size;
            ring.base += 1;
            ring.start = oldest.revision;
        }
        ring.head = ring.head.max(batch.revision);
    }
    if news {
        shared.moved.send_modify(|n| *n += 1);
    }
}

/// The running feeds; one ends with its last watcher.
pub struct Feeds {
    store: Arc<dyn Store>,
    feeds: Mutex<HashMap<api::kind::Resource, Weak<Feed>>>,
}

impl Feeds {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Feeds { store, feeds: Mutex::new(HashMap::new()) }
    }

    /// Watches all of a resource after `after`.
    pub async fn watch(&self, kind: &Arc<Kind>, after: Revision) -> store::Result<Watcher> {
        let now = self.store.revision().await?;
        if after > now {
            return Err(store::Error::FutureRevision { asked: after, newest: now });
        }
        let feed = {
            let mut feeds = lock(&self.feeds);
            match feeds.get(&kind.resource).and_then(Weak::upgrade) {
                // A CustomResourceDefinition that changed makes a new kind.
                Some(feed) if Arc::ptr_eq(&feed.kind, kind) => feed,
                _ => {
                    let start = if now - after <= START_BEHIND { after } else { now };
                    let feed = Feed::start(self.store.clone(), kind.clone(), start);
                    feeds.retain(|_, f| f.strong_count() > 0);
                    feeds.insert(kind.resource.clone(), Arc::downgrade(&feed));
                    feed
                }
            }
        };
        Watcher::start(feed, after).await
    }
}

enum Mode {
    /// Reads the store by itself.
    Catching(Box<dyn store::Watch>),
    /// Next sequence number to read from the ring.
    Following(u64),
}

/// One reader of a feed.
pub struct Watcher {
    feed: Arc<Feed>,
    moved: watch::Receiver<u64>,
    mode: Mode,
    /// Everything up to here has been handed out.
    last: Revision,
}

impl Watcher {
    async fn start(feed: Arc<Feed>, after: Revision) -> store::Result<Self> {
        let moved = feed.shared.moved.subscribe();
        let mode = match Self::meet(&feed, after) {
            Some(next) => Mode::Following(next),
            None => Mode::Catching(feed.store.watch(feed.range(), after + 1).await?),
        };
        Ok(Watcher { feed, moved, mode, last: after })
    }

    /// Where in the ring the first event after `after` is, if none is missing.
    fn meet(feed: &Feed, after: Revision) -> Option<u64> {
        let ring = lock(&feed.shared.ring);
        if after < ring.start {
            return None;
        }
        let skip = ring.events.partition_point(|event| event.revision <= after);
        Some(ring.base + skip as u64)
    }

    /// The revision up to which nothing is missing: what a bookmark may say once `next` has nothing more.
    pub fn position(&self) -> Revision {
        match self.mode {
            Mode::Catching(_) => self.last,
            Mode::Following(next) => {
                let ring = lock(&self.feed.shared.ring);
                let all_read = next == ring.base + ring.events.len() as u64;
                if all_read { self.last.max(ring.head) } else { self.last }
            }
        }
    }

    /// The next events in order; `None` when the store shuts down. Cancel safe.
    pub async fn next(&mut self) -> Option<store::Result<Vec<Arc<Event>>>> {
        loop {
            match &mut self.mode {
                Mode::Catching(watch) => {
                    let batch = match watch.next().await? {
                        Ok(batch) => batch,
                        Err(error) => return Some(Err(error)),
                    };
                    self.last = self.last.max(batch.revision);
                    let kind = self.feed.kind.clone();
                    let events: Vec<_> =
                        batch.events.iter().filter_map(|e| Event::read(&kind, e)).map(Arc::new).collect();
                    if let Some(next) = Self::meet(&self.feed, self.last) {
                        self.mode = Mode::Following(next);
                    }
                    if !events.is_empty() {
                        return Some(Ok(events));
                    }
                }
                Mode::Following(next) => {
                    self.moved.mark_unchanged();
                    let (events, behind, ended) = {
                        let ring = lock(&self.feed.shared.ring);
                        let behind = *next < ring.base;
                        let skip = next.saturating_sub(ring.base) as usize;
                        let mut events: Vec<Arc<Event>> = Vec::new();
                        for event in ring.events.iter().skip(skip) {
                            // What happened at once is handed out at once: `last` says a revision is done with.
                            if events.len() >= CHUNK && events.last().is_some_and(|e| e.revision != event.revision) {
                                break;
                            }
                            events.push(event.clone());
                        }
                        (events, behind, ring.ended)
                    };
                    if behind {
                        match self.feed.store.watch(self.feed.range(), self.last + 1).await {
                            Ok(watch) => self.mode = Mode::Catching(watch),
                            Err(error) => return Some(Err(error)),
                        }
                        continue;
                    }
                    if let Some(newest) = events.last() {
                        *next += events.len() as u64;
                        self.last = self.last.max(newest.revision);
                        return Some(Ok(events));
                    }
                    if ended || self.moved.changed().await.is_err() {
                        return None;
                    }
                }
            }
        }
    }
}
