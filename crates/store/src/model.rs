//! The store's contract, in etcd's terms (<https://etcd.io/docs/v3.5/learning/api/>).

use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// A revision of the whole store: goes up by one with every transaction that writes. The empty store is at 1.
pub type Revision = i64;
pub type LeaseId = i64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Bytes,
    pub value: Bytes,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    /// Writes since it was created; 1 on creation.
    pub version: i64,
    /// 0 = none.
    pub lease: LeaseId,
}

/// `[key, end)`. `end` empty = exactly `key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    pub key: Bytes,
    pub end: Bytes,
}

impl KeyRange {
    pub fn one(key: impl Into<Bytes>) -> Self {
        KeyRange { key: key.into(), end: Bytes::new() }
    }
    /// All keys that begin with `prefix` (must not be empty and not all 0xff).
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let key: Bytes = prefix.into();
        let mut end = key.to_vec();
        while let Some(last) = end.pop() {
            if last < 0xff {
                end.push(last + 1);
                break;
            }
        }
        KeyRange { key, end: end.into() }
    }
    pub fn contains(&self, key: &[u8]) -> bool {
        if self.end.is_empty() { key == self.key } else { key >= &self.key[..] && key < &self.end[..] }
    }
}

#[derive(Clone, Debug)]
pub struct RangeRequest {
    pub range: KeyRange,
    /// 0 = newest.
    pub revision: Revision,
    /// 0 = no limit.
    pub limit: usize,
    pub count_only: bool,
}

#[derive(Clone, Debug, Default)]
pub struct RangeResponse {
    pub kvs: Vec<KeyValue>,
    /// More keys than `limit` allowed.
    pub more: bool,
    /// Keys in the whole range, whatever the limit.
    pub count: usize,
    /// The store's revision when it was read.
    pub revision: Revision,
}

#[derive(Clone, Debug)]
pub enum Compare {
    /// `mod_revision` equals; 0 = the key does not exist.
    ModRevision(Bytes, Revision),
    CreateRevision(Bytes, Revision),
    Version(Bytes, i64),
    Value(Bytes, Bytes),
}

#[derive(Clone, Debug)]
pub enum Op {
    Put { key: Bytes, value: Bytes, lease: LeaseId },
    Delete(KeyRange),
    Range(RangeRequest),
}

#[derive(Clone, Debug)]
pub enum OpResponse {
    Put { previous: Option<KeyValue> },
    Delete { deleted: Vec<KeyValue> },
    Range(RangeResponse),
}

/// If all compares hold `then` is done, else `otherwise`; atomically, at one revision. No key may be put twice.
#[derive(Clone, Debug, Default)]
pub struct Txn {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

#[derive(Clone, Debug)]
pub struct TxnResponse {
    pub succeeded: bool,
    pub revision: Revision,
    pub responses: Vec<OpResponse>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put {
        kv: KeyValue,
        previous: Option<KeyValue>,
    },
    /// `revision` of the deletion; `previous` = what was deleted.
    Delete {
        key: Bytes,
        revision: Revision,
        previous: Option<KeyValue>,
    },
}

impl Event {
    pub fn revision(&self) -> Revision {
        match self {
            Event::Put { kv, .. } => kv.mod_revision,
            Event::Delete { revision, .. } => *revision,
        }
    }
}

/// All events of one revision that fall in the watched range, or none: then it is a progress mark for `revision`.
#[derive(Clone, Debug)]
pub struct WatchBatch {
    pub revision: Revision,
    pub events: Arc<[Event]>,
}

/// A running watch. `next` yields batches in order of revision without gaps, and `None` when the store shuts down.
#[async_trait]
pub trait Watch: Send {
    /// `Compacted` when the start revision is gone; `Lagged` when this watcher was too slow and was cut off (watch
    /// again from the last revision seen).
    async fn next(&mut self) -> Option<Result<WatchBatch>>;
}

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("required revision has been compacted; oldest kept is {oldest}")]
    Compacted { oldest: Revision },
    #[error("required revision {asked} is a future revision; newest is {newest}")]
    FutureRevision { asked: Revision, newest: Revision },
    #[error("watcher too slow; it was cut off after revision {after}")]
    Lagged { after: Revision },
    #[error("lease {0} not found")]
    LeaseNotFound(LeaseId),
    #[error("duplicate key in one transaction")]
    DuplicateKey,
    #[error("value of {size} bytes is over the limit of {limit}")]
    TooLarge { size: usize, limit: usize },
    #[error("{path}: data directory is of a newer version ({found}, this program knows up to {known})")]
    NewerVersion { path: String, found: u32, known: u32 },
    #[error("{path}: in use by another process")]
    InUse { path: String },
    #[error("too many requests waiting")]
    Busy,
    #[error("store is shut down")]
    Closed,
    #[error("{path}: {message}")]
    Storage { path: String, message: String },
}

#[async_trait]
pub trait Store: Send + Sync + 'static {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse>;
    /// Returns once the write is durable.
    async fn txn(&self, txn: Txn) -> Result<TxnResponse>;
    /// Events from `from` on (inclusive); 0 = from the next write.
    async fn watch(&self, range: KeyRange, from: Revision) -> Result<Box<dyn Watch>>;
    /// Newest revision.
    async fn revision(&self) -> Result<Revision>;
    /// Drops history older than `revision`: superseded values and tombstones.
    async fn compact(&self, revision: Revision) -> Result<()>;
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId>;
    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration>;
    async fn lease_revoke(&self, lease: LeaseId) -> Result<()>;
}
