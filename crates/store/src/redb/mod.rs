//! The embedded engine: one redb file, one writer thread with group commit.
//!
//! Reads are redb read transactions (snapshots): they never wait for the writer. Everything that writes goes through a
//! bounded queue to one thread, which puts all that is waiting into one redb transaction and answers each caller after
//! that transaction is durable; [`writer`] has the details, [`tables`] the layout on disk.

mod read;
mod tables;
#[cfg(test)]
mod tests;
mod writer;

use crate::check;
use crate::model::{
    Error, KeyRange, LeaseId, RangeRequest, RangeResponse, Result, Revision, Store, Txn, TxnResponse, Watch,
};
use crate::watch::{Feed, History, Hub, Replayed};
use ::redb::{Database, DatabaseError, ReadableDatabase};
use async_trait::async_trait;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use tables::{Counters, FORMAT};
use tokio::sync::oneshot;
use writer::{Request, Writer};

const FILE: &str = "store.redb";
/// Requests that wait for the writer before callers are told `Busy`.
const QUEUE: usize = 4096;
/// Above this a file that is mostly free pages is rewritten when opened.
const SHRINK_ABOVE: u64 = 16 << 20;

/// How much memory and history an engine keeps.
#[derive(Clone, Debug)]
pub struct Options {
    /// redb's page cache, bytes.
    pub cache_bytes: usize,
    /// History older than this is compacted without being asked; `None` = only when asked. Looked at once per this
    /// time, so that up to twice as much is kept.
    pub keep_history: Option<Duration>,
    /// History is cut in any case when it is longer than this many revisions (to half).
    pub keep_revisions: i64,
}

impl Default for Options {
    fn default() -> Self {
        Options { cache_bytes: 8 << 20, keep_history: None, keep_revisions: 200_000 }
    }
}

struct Shared {
    db: Database,
    path: String,
    hub: Arc<Hub>,
}

/// See the module. Dropping it waits for the writer to finish what it has.
pub struct Engine {
    shared: Arc<Shared>,
    queue: Option<SyncSender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Opens the store in `dir`, making both where absent.
    pub fn open(dir: &Path) -> Result<Engine> {
        Self::open_with(dir, &Options::default())
    }

    pub fn open_with(dir: &Path, options: &Options) -> Result<Engine> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| storage(dir, &error))?;
        let path = dir.join(FILE);
        // redb may panic on a file that is damaged in ways it does not look for.
        let opened = panic::catch_unwind(AssertUnwindSafe(|| open_database(&path, options)));
        let (db, counters) = opened.unwrap_or_else(|_| Err(damaged(&path, "cannot be read")))?;
        let hub = Hub::new(counters.revision);
        let path = path.display().to_string();
        let shared = Arc::new(Shared { db, path, hub });
        let (queue, requests) = sync_channel(QUEUE);
        let writer = Writer::new(Arc::clone(&shared), requests, counters, options)?;
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| storage(dir, &error))?;
        Ok(Engine { shared, queue: Some(queue), thread: Some(thread) })
    }

    /// Sends the writer what `make` builds around the way back, and waits for the answer.
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<Result<T>>) -> Request) -> Result<T> {
        let queue = self.queue.as_ref().ok_or(Error::Closed)?;
        let (answer, answered) = oneshot::channel();
        queue.try_send(make(answer)).map_err(|error| match error {
            TrySendError::Full(_) => Error::Busy,
            TrySendError::Disconnected(_) => Error::Closed,
        })?;
        answered.await.map_err(|_| Error::Closed)?
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(path = self.shared.path, "the store's writer had died");
        }
    }
}

fn open_database(path: &Path, options: &Options) -> Result<(Database, Counters)> {
    let mut builder = Database::builder();
    builder.set_cache_size(options.cache_bytes);
    let mut db = match path.try_exists() {
        Ok(true) => builder.open(path).map_err(|error| opening(path, error))?,
        Ok(false) => return create_database(path, &builder),
        Err(error) => return Err(storage(path, &error)),
    };
    let counters = tables::load(&db, path)?;
    shrink(&mut db, path);
    Ok((db, counters))
}

/// A new file appears under its name only once it is whole.
fn create_database(path: &Path, builder: &::redb::Builder) -> Result<(Database, Counters)> {
    let fresh = path.with_extension("redb.new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(storage(&fresh, &error)),
        _ => {}
    }
    let db = builder.create(&fresh).map_err(|error| opening(&fresh, error))?;
    let counters = tables::initialise(&db).map_err(|error| storage(&fresh, &error))?;
    fs::rename(&fresh, path).map_err(|error| storage(path, &error))?;
    if let Some(dir) = path.parent() {
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| storage(dir, &error))?;
    }
    Ok((db, counters))
}

/// Gives pages back to the file system when most of a large file is free. Failing to is no harm.
fn shrink(db: &mut Database, path: &Path) {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    if size < SHRINK_ABOVE {
        return;
    }
    let used = db.begin_write().ok().and_then(|txn| {
        let stats = txn.stats().ok();
        let used = stats.map(|stats| stats.allocated_pages().saturating_mul(stats.page_size() as u64));
        if let Err(error) = txn.abort() {
            tracing::warn!(%error, "store: abandoning the measurement");
        }
        used
    });
    if used.is_some_and(|used| used < size / 3)
        && let Err(error) = db.compact()
    {
        tracing::warn!(%error, path = %path.display(), "store: the file could not be made smaller");
    }
}

fn opening(path: &Path, error: DatabaseError) -> Error {
    match error {
        DatabaseError::DatabaseAlreadyOpen => Error::InUse { path: path.display().to_string() },
        DatabaseError::UpgradeRequired(version) => {
            Error::NewerVersion { path: path.display().to_string(), found: u32::from(version), known: FORMAT }
        }
        DatabaseError::Storage(::redb::StorageError::Corrupted(why)) => damaged(path, &why),
        DatabaseError::Storage(::redb::StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
            damaged(path, &error.to_string())
        }
        other => storage(path, &other),
    }
}

fn damaged(path: &Path, why: &str) -> Error {
    let message = format!(
        "not a store, or damaged ({why}); put a copy of it from a backup in its place, or move it away to begin with an \
         empty store"
    );
    Error::Storage { path: path.display().to_string(), message }
}

fn storage(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Storage { path: path.display().to_string(), message: error.to_string() }
}

impl Shared {
    fn failed(&self, error: impl Into<::redb::Error>) -> Error {
        Error::Storage { path: self.path.clone(), message: error.into().to_string() }
    }

    fn counters(&self) -> Result<Counters> {
        let read = || -> std::result::Result<Counters, ::redb::Error> {
            let txn = self.db.begin_read()?;
            let table = txn.open_table(tables::META)?;
            Ok(Counters::decode(table.get("counters")?.map(|row| row.value().to_vec()).as_deref()))
        };
        read().map_err(|error| self.failed(error))
    }

    fn read(&self, request: &RangeRequest) -> Result<RangeResponse> {
        let counters = self.counters()?;
        check::readable(request.revision, counters.revision, counters.compacted)?;
        read::range(&self.db, request).map_err(|error| match error {
            read::Failure::Compacted(oldest) => Error::Compacted { oldest },
            read::Failure::Storage(error) => self.failed(*error),
        })
    }
}

impl History for Shared {
    fn replay(&self, range: &KeyRange, from: Revision, limit: usize) -> Result<Replayed> {
        read::replay(&self.db, range, from, limit).map_err(|error| match error {
            read::Failure::Compacted(oldest) => Error::Compacted { oldest },
            read::Failure::Storage(error) => self.failed(*error),
        })
    }
}

#[async_trait]
impl Store for Engine {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        if self.queue.is_none() {
            return Err(Error::Closed);
        }
        // One key is one descent of a B-tree; anything longer leaves the async workers.
        if request.range.end.is_empty() {
            return self.shared.read(&request);
        }
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.read(&request)).await.map_err(|_| Error::Closed)?
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        check::txn(&txn)?;
        self.ask(|answer| Request::Txn(txn, answer)).await
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<Box<dyn Watch>> {
        let compacted = if from == 0 { 0 } else { self.shared.counters()?.compacted };
        let history: Weak<dyn History> = Arc::downgrade(&(Arc::clone(&self.shared) as Arc<dyn History>));
        Ok(Box::new(Feed::start(&self.shared.hub, history, range, from, compacted)?))
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(self.shared.counters()?.revision)
    }

    /// Takes effect at once; the space is given back in slices in the background.
    async fn compact(&self, revision: Revision) -> Result<()> {
        self.ask(|answer| Request::Compact(revision, answer)).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        self.ask(|answer| Request::Grant(ttl, answer)).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration> {
        self.ask(|answer| Request::KeepAlive(lease, answer)).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.ask(|answer| Request::Revoke(lease, answer)).await
    }
}
