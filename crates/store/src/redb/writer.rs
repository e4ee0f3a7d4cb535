//! The writer thread: takes all that waits in the queue, applies it to one redb transaction, commits it durably, tells
//! the watchers, answers the callers; and expires leases and gives back the space of compacted history meanwhile.
//!
//! A request is checked whole before it touches a table, so one that fails (compare, duplicate, lease, size) leaves the
//! group's transaction as it was. A failure of the disk fails the whole group and nothing of it is kept.

use super::tables::{self, Counters, HISTORY, LATEST, LEASE_KEYS, LEASES, LOG, META, TOMBSTONE};
use super::{Options, Shared, read};
use crate::check;
use crate::model::{
    Error, Event, KeyRange, KeyValue, LeaseId, Op, OpResponse, RangeRequest, RangeResponse, Result, Revision, Txn,
    TxnResponse, WatchBatch,
};
use ::redb::{Durability, ReadableDatabase, ReadableTable, StorageError, Table, WriteTransaction};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot::Sender;

/// Requests in one commit.
pub(super) const GROUP: usize = 512;
/// Bytes of values in one commit.
const GROUP_BYTES: usize = 8 << 20;
/// Revisions whose space is given back in one commit.
const SLICE: usize = 256;

pub(super) enum Request {
    Txn(Txn, Sender<Result<TxnResponse>>),
    Compact(Revision, Sender<Result<()>>),
    Grant(Duration, Sender<Result<LeaseId>>),
    KeepAlive(LeaseId, Sender<Result<Duration>>),
    Revoke(LeaseId, Sender<Result<()>>),
}

impl Request {
    fn size(&self) -> usize {
        let Request::Txn(txn, _) = self else { return 0 };
        let value = |op: &Op| if let Op::Put { value, .. } = op { value.len() } else { 0 };
        txn.then.iter().chain(&txn.otherwise).map(value).sum()
    }
}

/// An answer that waits for the commit.
type Reply = Box<dyn FnOnce(Option<Error>) + Send>;

fn reply<T: Send + 'static>(to: Sender<Result<T>>, answer: Result<T>) -> Reply {
    // A caller that has gone away is not told.
    Box::new(move |failed| drop(to.send(failed.map_or(answer, Err))))
}

struct Lease {
    ttl: Duration,
    expires: Instant,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    counters: Counters,
    /// When each lease ends. The leases themselves are in the table.
    leases: HashMap<LeaseId, Lease>,
    keep_history: Option<Duration>,
    keep_revisions: i64,
    /// When and at which revision history was looked at last.
    marked: (Instant, Revision),
}

enum Wake {
    Request(Request),
    /// Something is due.
    Timer,
    Closed,
}

impl Writer {
    pub fn new(
        shared: Arc<Shared>,
        requests: Receiver<Request>,
        counters: Counters,
        options: &Options,
    ) -> Result<Writer> {
        let load = || -> std::result::Result<HashMap<LeaseId, Lease>, ::redb::Error> {
            let txn = shared.db.begin_read()?;
            let mut leases = HashMap::new();
            for row in txn.open_table(LEASES)?.iter()? {
                let (id, ttl) = row?;
                // A store that was down counts no time against its leases.
                let ttl = Duration::from_millis(u64::try_from(ttl.value()).unwrap_or(0)).min(check::LONGEST_LEASE);
                leases.insert(id.value(), Lease { ttl, expires: Instant::now() + ttl });
            }
            Ok(leases)
        };
        let leases = load().map_err(|error| shared.failed(error))?;
        let marked = (Instant::now(), counters.revision);
        let (keep_history, keep_revisions) = (options.keep_history, options.keep_revisions.max(2));
        Ok(Writer { shared, requests, counters, leases, keep_history, keep_revisions, marked })
    }

    /// Until the last sender is dropped and the queue is empty.
    pub fn run(mut self) {
        let hub = Closing(Arc::clone(&self.shared));
        loop {
            let mut group = match self.wait() {
                Wake::Request(request) => vec![request],
                Wake::Timer => Vec::new(),
                Wake::Closed => break,
            };
            let mut bytes: usize = group.iter().map(Request::size).sum();
            while group.len() < GROUP && bytes < GROUP_BYTES {
                let Ok(request) = self.requests.try_recv() else { break };
                bytes += request.size();
                group.push(request);
            }
            self.commit(group);
        }
        drop(hub);
    }

    fn wait(&self) -> Wake {
        if self.counters.scrubbed < self.counters.compacted {
            return match self.requests.try_recv() {
                Ok(request) => Wake::Request(request),
                Err(TryRecvError::Empty) => Wake::Timer,
                Err(TryRecvError::Disconnected) => Wake::Closed,
            };
        }
        let expiry = self.leases.values().map(|lease| lease.expires).min();
        let look = self.keep_history.map(|every| self.marked.0 + every);
        let Some(due) = [expiry, look].into_iter().flatten().min() else {
            return self.requests.recv().map_or(Wake::Closed, Wake::Request);
        };
        match self.requests.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(request) => Wake::Request(request),
            Err(RecvTimeoutError::Timeout) => Wake::Timer,
            Err(RecvTimeoutError::Disconnected) => Wake::Closed,
        }
    }

    fn commit(&mut self, group: Vec<Request>) {
        let now = Instant::now();
        let mut outcome = Outcome { counters: self.counters, ..Outcome::default() };
        let done = self.write(group, now, &mut outcome);
        let failed = done.err();
        match &failed {
            Some(error) => {
                tracing::error!(%error, path = self.shared.path, "store: writing failed");
                // Nothing of it was kept. Wait a little rather than spin on whatever was due.
                std::thread::sleep(Duration::from_millis(100));
            }
            None => {
                self.counters = outcome.counters;
                for (id, change) in outcome.leases {
                    match change {
                        Some(ttl) => drop(self.leases.insert(id, Lease { ttl, expires: now + ttl })),
                        None => drop(self.leases.remove(&id)),
                    }
                }
                self.shared.hub.publish(&outcome.batches);
            }
        }
        for reply in outcome.replies {
            reply(
                failed
                    .as_ref()
                    .map(|error| Error::Storage { path: self.shared.path.clone(), message: error.to_string() }),
            );
        }
    }

    fn write(
        &mut self,
        group: Vec<Request>,
        now: Instant,
        outcome: &mut Outcome,
    ) -> std::result::Result<(), ::redb::Error> {
        let expired: Vec<LeaseId> =
            self.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect();
        let history_due = self.history_due(now);
        let mut group = group.into_iter();
        let run = || -> std::result::Result<(), ::redb::Error> {
            let mut txn = self.shared.db.begin_write()?;
            txn.set_durability(Durability::Immediate)?;
            let dirty = {
                let mut tables = Tables::open(&txn)?;
                for lease in expired {
                    tables.end_lease(lease, outcome)?;
                }
                for request in group.by_ref() {
                    tables.serve(request, &self.leases, outcome)?;
                }
                if let Some(revision) = history_due
                    && revision > outcome.counters.compacted
                {
                    outcome.counters.compacted = revision;
                }
                tables.scrub(&mut outcome.counters)?;
                let changed = outcome.counters != self.counters;
                if changed {
                    tables.meta.insert("counters", outcome.counters.encode().as_slice())?;
                }
                changed || outcome.leases.iter().any(|(_, change)| change.is_none())
            };
            if dirty { Ok(txn.commit()?) } else { Ok(txn.abort()?) }
        };
        let done = run();
        // Those that had not been looked at when the disk failed are answered too.
        outcome.replies.extend(group.map(|request| match request {
            Request::Txn(_, to) => reply(to, Err(Error::Closed)),
            Request::Compact(_, to) | Request::Revoke(_, to) => reply(to, Err(Error::Closed)),
            Request::Grant(_, to) => reply(to, Err(Error::Closed)),
            Request::KeepAlive(_, to) => reply(to, Err(Error::Closed)),
        }));
        if done.is_ok() && self.keep_history.is_some_and(|every| self.marked.0 + every <= now) {
            self.marked = (now, outcome.counters.revision);
        }
        done
    }

    /// Up to where history is to be compacted now without being asked.
    fn history_due(&self, now: Instant) -> Option<Revision> {
        let counters = &self.counters;
        if counters.revision - counters.compacted > self.keep_revisions {
            return Some(counters.revision - self.keep_revisions / 2);
        }
        self.keep_history.filter(|every| self.marked.0 + *every <= now).map(|_| self.marked.1)
    }
}

/// Ends the watches however the writer ends.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.hub.close();
    }
}

/// What a group does beyond its tables, held back until it is durable.
struct Outcome {
    counters: Counters,
    batches: Vec<WatchBatch>,
    /// Leases granted or kept alive (`Some`), or ended.
    leases: Vec<(LeaseId, Option<Duration>)>,
    replies: Vec<Reply>,
}

impl Default for Outcome {
    fn default() -> Self {
        Outcome { counters: Counters::decode(None), batches: Vec::new(), leases: Vec::new(), replies: Vec::new() }
    }
}

impl Outcome {
    fn wrote(&mut self, events: Vec<Event>) {
        if !events.is_empty() {
            self.counters.revision += 1;
            self.batches.push(WatchBatch { revision: self.counters.revision, events: events.into() });
        }
    }
}

/// The tables of the running transaction.
struct Tables<'t> {
    meta: Table<'t, &'static str, &'static [u8]>,
    latest: Table<'t, &'static [u8], &'static [u8]>,
    history: Table<'t, (&'static [u8], i64), &'static [u8]>,
    log: Table<'t, i64, &'static [u8]>,
    leases: Table<'t, i64, i64>,
    lease_keys: Table<'t, (i64, &'static [u8]), ()>,
}

impl<'t> Tables<'t> {
    fn open(txn: &'t WriteTransaction) -> std::result::Result<Self, ::redb::TableError> {
        Ok(Tables {
            meta: txn.open_table(META)?,
            latest: txn.open_table(LATEST)?,
            history: txn.open_table(HISTORY)?,
            log: txn.open_table(LOG)?,
            leases: txn.open_table(LEASES)?,
            lease_keys: txn.open_table(LEASE_KEYS)?,
        })
    }

    fn serve(
        &mut self,
        request: Request,
        timers: &HashMap<LeaseId, Lease>,
        outcome: &mut Outcome,
    ) -> std::result::Result<(), StorageError> {
        let answer = match request {
            Request::Txn(txn, to) => reply(to, self.txn(txn, outcome)?),
            Request::Compact(revision, to) => {
                let counters = &mut outcome.counters;
                let checked = check::compactable(revision, counters.revision, counters.compacted);
                if checked.is_ok() {
                    counters.compacted = revision;
                }
                reply(to, checked)
            }
            Request::Grant(ttl, to) => {
                let (id, ttl) = (outcome.counters.next_lease, ttl.min(check::LONGEST_LEASE));
                outcome.counters.next_lease += 1;
                self.leases.insert(id, i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))?;
                outcome.leases.push((id, Some(ttl)));
                reply(to, Ok(id))
            }
            Request::KeepAlive(id, to) => match (self.leases.get(id)?, timers.get(&id)) {
                (Some(_), Some(lease)) => {
                    outcome.leases.push((id, Some(lease.ttl)));
                    reply(to, Ok(lease.ttl))
                }
                _ => reply(to, Err(Error::LeaseNotFound(id))),
            },
            Request::Revoke(id, to) => {
                let found = self.leases.get(id)?.is_some();
                if found {
                    self.end_lease(id, outcome)?;
                }
                reply(to, if found { Ok(()) } else { Err(Error::LeaseNotFound(id)) })
            }
        };
        outcome.replies.push(answer);
        Ok(())
    }

    fn txn(&mut self, txn: Txn, outcome: &mut Outcome) -> std::result::Result<Result<TxnResponse>, StorageError> {
        let mut succeeded = true;
        for compare in &txn.compare {
            let key = compare.key();
            let found = self.latest.get(&key[..])?.and_then(|record| tables::decode(key, record.value()));
            succeeded &= compare.holds(found.as_ref());
        }
        let ops = if succeeded { txn.then } else { txn.otherwise };
        if let Err(error) = self.check(&ops, &outcome.counters)? {
            return Ok(Err(error));
        }
        let newest = outcome.counters.revision;
        let (mut events, mut entry, mut responses) = (Vec::new(), Vec::new(), Vec::with_capacity(ops.len()));
        for op in ops {
            responses.push(match op {
                Op::Put { key, value, lease } => {
                    let (kv, previous) = self.put(key, value, lease, newest + 1)?;
                    tables::log_entry(&mut entry, false, &kv.key);
                    events.push(Event::Put { kv, previous: previous.clone() });
                    OpResponse::Put { previous }
                }
                Op::Delete(range) => {
                    let deleted = self.delete(&range, newest + 1)?;
                    for kv in &deleted {
                        tables::log_entry(&mut entry, true, &kv.key);
                        let (key, previous) = (kv.key.clone(), Some(kv.clone()));
                        events.push(Event::Delete { key, revision: newest + 1, previous });
                    }
                    OpResponse::Delete { deleted }
                }
                Op::Range(request) => {
                    OpResponse::Range(self.range(&request, newest, newest + i64::from(!events.is_empty()))?)
                }
            });
        }
        if !events.is_empty() {
            self.log.insert(newest + 1, entry.as_slice())?;
        }
        outcome.wrote(events);
        Ok(Ok(TxnResponse { succeeded, revision: outcome.counters.revision, responses }))
    }

    /// What has to hold before the first operation is done.
    fn check(&self, ops: &[Op], counters: &Counters) -> std::result::Result<Result<()>, StorageError> {
        for op in ops {
            let checked = match op {
                Op::Put { lease, .. } if *lease != 0 && self.leases.get(*lease)?.is_none() => {
                    Err(Error::LeaseNotFound(*lease))
                }
                Op::Range(request) => check::readable(request.revision, counters.revision, counters.compacted),
                Op::Put { .. } | Op::Delete(_) => Ok(()),
            };
            if checked.is_err() {
                return Ok(checked);
            }
        }
        Ok(Ok(()))
    }

    /// `newest` was there before this transaction, `now` counts what it wrote so far.
    fn range(
        &self,
        request: &RangeRequest,
        newest: Revision,
        now: Revision,
    ) -> std::result::Result<RangeResponse, StorageError> {
        if request.revision == 0 || (request.revision == newest && now == newest) {
            return read::newest(&self.latest, request, now);
        }
        read::at(&self.latest, &self.history, request, now)
    }

    fn put(
        &mut self,
        key: Bytes,
        value: Bytes,
        lease: LeaseId,
        revision: Revision,
    ) -> std::result::Result<(KeyValue, Option<KeyValue>), StorageError> {
        let previous = self.latest.get(&key[..])?.and_then(|record| tables::decode(&key, record.value()));
        if let Some(old) = &previous {
            self.retire(old)?;
        }
        let (create_revision, version) = previous.as_ref().map_or((revision, 0), |kv| (kv.create_revision, kv.version));
        let kv = KeyValue { key, value, create_revision, mod_revision: revision, version: version + 1, lease };
        self.latest.insert(&kv.key[..], tables::encode(&kv).as_slice())?;
        if lease != 0 {
            self.lease_keys.insert((lease, &kv.key[..]), ())?;
        }
        Ok((kv, previous))
    }

    fn delete(&mut self, range: &KeyRange, revision: Revision) -> std::result::Result<Vec<KeyValue>, StorageError> {
        let all = RangeRequest { range: range.clone(), revision: 0, limit: 0, count_only: false };
        let found = read::newest(&self.latest, &all, revision)?.kvs;
        for kv in &found {
            self.latest.remove(&kv.key[..])?;
            self.retire(kv)?;
            self.history.insert((&kv.key[..], revision), TOMBSTONE.as_slice())?;
        }
        Ok(found)
    }

    /// Moves what was the newest version into history.
    fn retire(&mut self, old: &KeyValue) -> std::result::Result<(), StorageError> {
        self.history.insert((&old.key[..], old.mod_revision), tables::encode(old).as_slice())?;
        if old.lease != 0 {
            self.lease_keys.remove((old.lease, &old.key[..]))?;
        }
        Ok(())
    }

    /// Deletes a lease and all keys on it, at one revision.
    fn end_lease(&mut self, lease: LeaseId, outcome: &mut Outcome) -> std::result::Result<(), StorageError> {
        let empty: &[u8] = &[];
        let mut keys = Vec::new();
        for row in self.lease_keys.range((lease, empty)..(lease.saturating_add(1), empty))? {
            keys.push(Bytes::copy_from_slice(row?.0.value().1));
        }
        self.leases.remove(lease)?;
        outcome.leases.push((lease, None));
        let revision = outcome.counters.revision + 1;
        let (mut events, mut entry) = (Vec::new(), Vec::new());
        for key in keys {
            for kv in self.delete(&KeyRange::one(key), revision)? {
                tables::log_entry(&mut entry, true, &kv.key);
                events.push(Event::Delete { key: kv.key.clone(), revision, previous: Some(kv) });
            }
        }
        if !events.is_empty() {
            self.log.insert(revision, entry.as_slice())?;
        }
        outcome.wrote(events);
        Ok(())
    }

    /// Gives back the space of one slice of compacted history. The log says which keys a revision wrote: all that they
    /// were before it can go, and the deletion itself once it is older than the oldest readable revision.
    fn scrub(&mut self, counters: &mut Counters) -> std::result::Result<(), StorageError> {
        if counters.scrubbed >= counters.compacted {
            return Ok(());
        }
        let mut slice: Vec<(Revision, Vec<u8>)> = Vec::new();
        let mut reached = counters.compacted;
        for row in self.log.range(counters.scrubbed..=counters.compacted)? {
            let (revision, entry) = row?;
            if slice.len() == SLICE {
                reached = revision.value();
                break;
            }
            slice.push((revision.value(), entry.value().to_vec()));
        }
        for (revision, entry) in slice {
            let gone = revision < counters.compacted;
            for (deletion, key) in tables::log_keys(&entry) {
                let upto = if deletion && gone { revision + 1 } else { revision };
                self.history.retain_in((key, 0)..(key, upto), |_, _| false)?;
            }
            if gone {
                self.log.remove(revision)?;
            }
        }
        counters.scrubbed = reached;
        Ok(())
    }
}
