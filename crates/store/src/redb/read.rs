//! Ranges at any kept revision, and history for watchers; over the tables of a snapshot or of the writer's transaction.

use super::tables::{self, Counters, HISTORY, LATEST, LOG, META};
use crate::model::{Event, KeyRange, KeyValue, RangeRequest, RangeResponse, Revision, WatchBatch};
use crate::watch::Replayed;
use ::redb::{AccessGuard, Database, ReadableDatabase, ReadableTable, StorageError};
use bytes::Bytes;
use std::ops::Bound;

pub(super) trait Latest: ReadableTable<&'static [u8], &'static [u8]> {}
impl<T: ReadableTable<&'static [u8], &'static [u8]>> Latest for T {}
pub(super) trait Past: ReadableTable<(&'static [u8], i64), &'static [u8]> {}
impl<T: ReadableTable<(&'static [u8], i64), &'static [u8]>> Past for T {}

pub(super) enum Failure {
    /// Compacted since it was checked; the oldest kept revision.
    Compacted(Revision),
    Storage(Box<::redb::Error>),
}

impl<E: Into<::redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Storage(Box::new(error.into()))
    }
}

fn counters(txn: &::redb::ReadTransaction) -> Result<Counters, Failure> {
    let meta = txn.open_table(META)?;
    let row = meta.get("counters")?.map(|row| row.value().to_vec());
    Ok(Counters::decode(row.as_deref()))
}

pub(super) fn range(db: &Database, request: &RangeRequest) -> Result<RangeResponse, Failure> {
    let txn = db.begin_read()?;
    let counters = counters(&txn)?;
    if request.revision > 0 && request.revision < counters.compacted {
        return Err(Failure::Compacted(counters.compacted));
    }
    let latest = txn.open_table(LATEST)?;
    if request.revision == 0 || request.revision >= counters.revision {
        return Ok(newest(&latest, request, counters.revision)?);
    }
    Ok(at(&latest, &txn.open_table(HISTORY)?, request, counters.revision)?)
}

impl RangeResponse {
    fn take(&mut self, request: &RangeRequest, kv: impl FnOnce() -> Option<KeyValue>) {
        self.count += 1;
        if request.count_only {
            return;
        }
        match request.limit > 0 && self.kvs.len() >= request.limit {
            true => self.more = true,
            false => self.kvs.extend(kv()),
        }
    }
}

/// The bounds of a range with an end.
fn bounds(range: &KeyRange) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Bound::Included(&range.key[..]), Bound::Excluded(&range.end[..]))
}

/// A range whose end is not after its beginning holds nothing (redb would panic on some of these).
fn is_empty(range: &KeyRange) -> bool {
    !range.end.is_empty() && range.end <= range.key
}

pub(super) fn newest(
    latest: &impl Latest,
    request: &RangeRequest,
    revision: Revision,
) -> Result<RangeResponse, StorageError> {
    let mut response = RangeResponse { revision, ..RangeResponse::default() };
    let range = &request.range;
    if range.end.is_empty() {
        if let Some(record) = latest.get(&range.key[..])? {
            response.take(request, || tables::decode(&range.key, record.value()));
        }
    } else if !is_empty(range) {
        for row in latest.range::<&[u8]>(bounds(range))? {
            let (key, record) = row?;
            response.take(request, || tables::decode(key.value(), record.value()));
        }
    }
    Ok(response)
}

/// A range at an older revision: what has not been written since is in `latest`, the rest in `history`.
pub(super) fn at(
    latest: &impl Latest,
    past: &impl Past,
    request: &RangeRequest,
    newest: Revision,
) -> Result<RangeResponse, StorageError> {
    let mut response = RangeResponse { revision: newest, ..RangeResponse::default() };
    let range = &request.range;
    if range.end.is_empty() {
        if let Some(kv) = one(latest, past, &range.key, request.revision)? {
            response.take(request, || Some(kv));
        }
        return Ok(response);
    }
    if is_empty(range) {
        return Ok(response);
    }
    let mut old = PastKeys { rows: past.range((&range.key[..], 0)..(&range.end[..], 0))?, ahead: None };
    let mut behind = old.next(request.revision)?;
    for row in latest.range::<&[u8]>(bounds(range))? {
        let (key, record) = row?;
        let (key, record) = (key.value(), record.value());
        while let Some((old_key, kv)) = behind.take_if(|(old_key, _)| &old_key[..] < key) {
            debug_assert!(kv.as_ref().is_none_or(|kv| kv.key == old_key));
            if let Some(kv) = kv {
                response.take(request, || Some(kv));
            }
            behind = old.next(request.revision)?;
        }
        let same = behind.take_if(|(old_key, _)| &old_key[..] == key);
        let passed = same.is_some();
        if tables::mod_revision(record) <= request.revision {
            response.take(request, || tables::decode(key, record));
        } else if let Some((_, Some(kv))) = same {
            response.take(request, || Some(kv));
        }
        if passed {
            behind = old.next(request.revision)?;
        }
    }
    while let Some((_, kv)) = behind {
        if let Some(kv) = kv {
            response.take(request, || Some(kv));
        }
        behind = old.next(request.revision)?;
    }
    Ok(response)
}

/// Walks `history` key by key.
struct PastKeys<'a> {
    rows: ::redb::Range<'a, (&'static [u8], i64), &'static [u8]>,
    /// First row of the next key.
    ahead: Option<(Bytes, Revision, Option<KeyValue>)>,
}

impl PastKeys<'_> {
    fn row(&mut self) -> Result<Option<(Bytes, Revision, Option<KeyValue>)>, StorageError> {
        if let Some(ahead) = self.ahead.take() {
            return Ok(Some(ahead));
        }
        let Some(row) = self.rows.next() else { return Ok(None) };
        let (key, record) = row?;
        let (key, revision) = key.value();
        Ok(Some((Bytes::copy_from_slice(key), revision, tables::decode(key, record.value()))))
    }

    /// The next key, and what it was at `revision` as far as `history` knows.
    fn next(&mut self, revision: Revision) -> Result<Option<(Bytes, Option<KeyValue>)>, StorageError> {
        let Some((key, first, kv)) = self.row()? else { return Ok(None) };
        let mut found = if first <= revision { kv } else { None };
        while let Some((other, later, kv)) = self.row()? {
            if other != key {
                self.ahead = Some((other, later, kv));
                break;
            }
            if later <= revision {
                found = kv;
            }
        }
        Ok(Some((key, found)))
    }
}

/// What `key` was at `revision`.
fn one(
    latest: &impl Latest,
    past: &impl Past,
    key: &[u8],
    revision: Revision,
) -> Result<Option<KeyValue>, StorageError> {
    if let Some(record) = latest.get(key)?
        && tables::mod_revision(record.value()) <= revision
    {
        return Ok(tables::decode(key, record.value()));
    }
    let mut rows = past.range((key, 0)..=(key, revision))?;
    let decoded =
        |(_, record): (AccessGuard<'_, _>, AccessGuard<'_, &'static [u8]>)| tables::decode(key, record.value());
    Ok(rows.next_back().transpose()?.and_then(decoded))
}

pub(super) fn replay(db: &Database, range: &KeyRange, from: Revision, limit: usize) -> Result<Replayed, Failure> {
    let txn = db.begin_read()?;
    let counters = counters(&txn)?;
    if from < counters.compacted {
        return Err(Failure::Compacted(counters.compacted));
    }
    let (latest, past, log) = (txn.open_table(LATEST)?, txn.open_table(HISTORY)?, txn.open_table(LOG)?);
    let mut batches = Vec::new();
    let mut next = counters.revision + 1;
    for (position, row) in log.range(from..)?.enumerate() {
        let (revision, entry) = row?;
        let revision = revision.value();
        if position == limit {
            next = revision;
            break;
        }
        let mut events = Vec::new();
        for (_, key) in tables::log_keys(entry.value()).filter(|(_, key)| range.contains(key)) {
            let previous = one(&latest, &past, key, revision - 1)?;
            match one(&latest, &past, key, revision)? {
                Some(kv) => events.push(Event::Put { kv, previous }),
                None => events.push(Event::Delete { key: Bytes::copy_from_slice(key), revision, previous }),
            }
        }
        if !events.is_empty() {
            batches.push(WatchBatch { revision, events: events.into() });
        }
    }
    Ok(Replayed { batches, next: next.max(from) })
}
