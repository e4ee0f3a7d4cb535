//! The store in memory: the same semantics without a disk, for tests, and the second opinion of the contract suite.
//! Written for plainness: every key keeps the list of its versions.

use crate::check;
use crate::model::{
    Error, Event, KeyRange, KeyValue, LeaseId, Op, OpResponse, RangeRequest, RangeResponse, Result, Revision, Store,
    Txn, TxnResponse, Watch, WatchBatch,
};
use crate::watch::{Feed, History, Hub, Replayed};
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// What a key was from one revision on; `kv` = `None` for a deletion.
struct Version {
    revision: Revision,
    kv: Option<KeyValue>,
}

struct Lease {
    ttl: Duration,
    expires: Instant,
}

struct State {
    revision: Revision,
    compacted: Revision,
    /// Oldest version first.
    keys: BTreeMap<Bytes, Vec<Version>>,
    /// Which keys a revision wrote, in order.
    log: BTreeMap<Revision, Vec<Bytes>>,
    leases: HashMap<LeaseId, Lease>,
    next_lease: LeaseId,
}

struct Shared {
    state: Mutex<State>,
    hub: Arc<Hub>,
}

/// See the module.
pub struct Engine {
    shared: Arc<Shared>,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    pub fn new() -> Engine {
        let state = State {
            revision: 1,
            compacted: 0,
            keys: BTreeMap::new(),
            log: BTreeMap::new(),
            leases: HashMap::new(),
            next_lease: 1,
        };
        Engine { shared: Arc::new(Shared { state: Mutex::new(state), hub: Hub::new(1) }) }
    }
}

impl State {
    fn at(&self, key: &[u8], revision: Revision) -> Option<&KeyValue> {
        let versions = self.keys.get(key)?;
        versions.iter().rev().find(|version| version.revision <= revision)?.kv.as_ref()
    }

    fn keys_in<'a>(&'a self, range: &'a KeyRange) -> impl Iterator<Item = &'a Bytes> + 'a {
        let ahead = self.keys.range::<Bytes, _>(&range.key..).map(|(key, _)| key);
        ahead.take_while(move |key| range.contains(key))
    }

    /// `newest` is what revision 0 means; inside a transaction that is the revision being written.
    fn range(&self, request: &RangeRequest, newest: Revision) -> RangeResponse {
        let revision = if request.revision == 0 { newest } else { request.revision };
        let mut response = RangeResponse { revision: newest, ..RangeResponse::default() };
        for kv in self.keys_in(&request.range).filter_map(|key| self.at(key, revision)) {
            response.count += 1;
            if request.count_only {
                continue;
            }
            match request.limit > 0 && response.kvs.len() == request.limit {
                true => response.more = true,
                false => response.kvs.push(kv.clone()),
            }
        }
        response
    }

    fn put(&mut self, key: Bytes, value: Bytes, lease: LeaseId, revision: Revision) -> Event {
        let previous = self.at(&key, revision).cloned();
        let (create_revision, version) = previous.as_ref().map_or((revision, 0), |kv| (kv.create_revision, kv.version));
        let kv =
            KeyValue { key: key.clone(), value, create_revision, mod_revision: revision, version: version + 1, lease };
        self.keys.entry(key.clone()).or_default().push(Version { revision, kv: Some(kv.clone()) });
        self.log.entry(revision).or_default().push(key);
        Event::Put { kv, previous }
    }

    fn delete(&mut self, range: &KeyRange, revision: Revision) -> Vec<Event> {
        let found: Vec<KeyValue> = self.keys_in(range).filter_map(|key| self.at(key, revision)).cloned().collect();
        let mut events = Vec::new();
        for kv in found {
            self.keys.entry(kv.key.clone()).or_default().push(Version { revision, kv: None });
            self.log.entry(revision).or_default().push(kv.key.clone());
            events.push(Event::Delete { key: kv.key.clone(), revision, previous: Some(kv) });
        }
        events
    }

    fn check(&self, ops: &[Op]) -> Result<()> {
        for op in ops {
            match op {
                Op::Put { lease, .. } if *lease != 0 && !self.leases.contains_key(lease) => {
                    return Err(Error::LeaseNotFound(*lease));
                }
                Op::Range(request) => check::readable(request.revision, self.revision, self.compacted)?,
                Op::Put { .. } | Op::Delete(_) => {}
            }
        }
        Ok(())
    }

    fn apply(&mut self, txn: Txn) -> Result<(TxnResponse, Vec<Event>)> {
        let succeeded = txn.compare.iter().all(|compare| compare.holds(self.at(compare.key(), self.revision)));
        let ops = if succeeded { txn.then } else { txn.otherwise };
        self.check(&ops)?;
        let writing = self.revision + 1;
        let (mut events, mut responses) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let event = self.put(key, value, lease, writing);
                    if let Event::Put { previous, .. } = &event {
                        responses.push(OpResponse::Put { previous: previous.clone() });
                    }
                    events.push(event);
                }
                Op::Delete(range) => {
                    let gone = self.delete(&range, writing);
                    let deleted = gone.iter().filter_map(previous_of).collect();
                    responses.push(OpResponse::Delete { deleted });
                    events.extend(gone);
                }
                Op::Range(request) => {
                    let newest = if events.is_empty() { self.revision } else { writing };
                    responses.push(OpResponse::Range(self.range(&request, newest)));
                }
            }
        }
        if !events.is_empty() {
            self.revision = writing;
        }
        Ok((TxnResponse { succeeded, revision: self.revision, responses }, events))
    }

    fn end_lease(&mut self, lease: LeaseId) -> Vec<Event> {
        self.leases.remove(&lease);
        let newest = self.revision;
        let attached =
            |versions: &Vec<Version>| versions.last().and_then(|v| v.kv.as_ref()).is_some_and(|kv| kv.lease == lease);
        let keys: Vec<Bytes> =
            self.keys.iter().filter(|(_, versions)| attached(versions)).map(|(key, _)| key.clone()).collect();
        let events: Vec<Event> =
            keys.into_iter().flat_map(|key| self.delete(&KeyRange::one(key), newest + 1)).collect();
        if !events.is_empty() {
            self.revision = newest + 1;
        }
        events
    }

    fn compact(&mut self, revision: Revision) {
        self.compacted = revision;
        self.keys.retain(|_, versions| {
            // The newest version at or before `revision` is still what a reader at `revision` sees.
            let kept = versions.iter().rposition(|version| version.revision <= revision).unwrap_or(0);
            versions.drain(..kept);
            !matches!(&versions[..], [only] if only.kv.is_none() && only.revision < revision)
        });
        self.log = self.log.split_off(&revision);
    }
}

fn previous_of(event: &Event) -> Option<KeyValue> {
    match event {
        Event::Put { previous, .. } | Event::Delete { previous, .. } => previous.clone(),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes while the state is held, so that watchers see revisions in order.
    fn publish(&self, state: &State, events: Vec<Event>) {
        if !events.is_empty() {
            self.hub.publish(&[WatchBatch { revision: state.revision, events: events.into() }]);
        }
    }

    fn expire(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        let due: Vec<LeaseId> =
            state.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect();
        for lease in due {
            let events = state.end_lease(lease);
            self.publish(&state, events);
        }
    }

    fn next_expiry(&self, lease: LeaseId) -> Option<Instant> {
        self.lock().leases.get(&lease).map(|lease| lease.expires)
    }
}

impl History for Shared {
    fn replay(&self, range: &KeyRange, from: Revision, limit: usize) -> Result<Replayed> {
        let state = self.lock();
        if from < state.compacted {
            return Err(Error::Compacted { oldest: state.compacted });
        }
        let mut batches = Vec::new();
        let mut next = state.revision + 1;
        for (position, (revision, keys)) in state.log.range(from..).enumerate() {
            if position == limit {
                next = *revision;
                break;
            }
            let mut events = Vec::new();
            for key in keys.iter().filter(|key| range.contains(key)) {
                let previous = state.at(key, revision - 1).cloned();
                match state.at(key, *revision) {
                    Some(kv) => events.push(Event::Put { kv: kv.clone(), previous }),
                    None => events.push(Event::Delete { key: key.clone(), revision: *revision, previous }),
                }
            }
            if !events.is_empty() {
                batches.push(WatchBatch { revision: *revision, events: events.into() });
            }
        }
        Ok(Replayed { batches, next: next.max(from) })
    }
}

#[async_trait]
impl Store for Engine {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        let state = self.shared.lock();
        check::readable(request.revision, state.revision, state.compacted)?;
        Ok(state.range(&request, state.revision))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        check::txn(&txn)?;
        let mut state = self.shared.lock();
        let (response, events) = state.apply(txn)?;
        self.shared.publish(&state, events);
        Ok(response)
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<Box<dyn Watch>> {
        let compacted = self.shared.lock().compacted;
        let history: Weak<dyn History> = Arc::downgrade(&(Arc::clone(&self.shared) as Arc<dyn History>));
        Ok(Box::new(Feed::start(&self.shared.hub, history, range, from, compacted)?))
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(self.shared.lock().revision)
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        let mut state = self.shared.lock();
        check::compactable(revision, state.revision, state.compacted)?;
        state.compact(revision);
        Ok(())
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let ttl = ttl.min(check::LONGEST_LEASE);
        let mut state = self.shared.lock();
        let id = state.next_lease;
        state.next_lease += 1;
        state.leases.insert(id, Lease { ttl, expires: Instant::now() + ttl });
        drop(state);
        let shared = Arc::downgrade(&self.shared);
        tokio::spawn(async move {
            while let Some(expires) = shared.upgrade().and_then(|shared| shared.next_expiry(id)) {
                tokio::time::sleep_until(expires).await;
                if let Some(shared) = shared.upgrade() {
                    shared.expire();
                }
            }
        });
        Ok(id)
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration> {
        let mut state = self.shared.lock();
        let found = state.leases.get_mut(&lease).ok_or(Error::LeaseNotFound(lease))?;
        found.expires = Instant::now() + found.ttl;
        Ok(found.ttl)
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        let mut state = self.shared.lock();
        if !state.leases.contains_key(&lease) {
            return Err(Error::LeaseNotFound(lease));
        }
        let events = state.end_lease(lease);
        self.shared.publish(&state, events);
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.hub.close();
    }
}

#[cfg(test)]
mod tests {
    use super::Engine;
    use std::sync::Arc;

    #[tokio::test(flavor = "multi_thread")]
    async fn contract() {
        crate::contract::all(&|| Arc::new(Engine::new())).await;
    }
}
