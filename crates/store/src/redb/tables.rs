//! The layout on disk, format 1. Integers in values are little-endian.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `format` | u32 |
//! | | `counters` | revision, compacted, scrubbed, next lease: i64 each |
//! | `latest` | key | record of the newest version |
//! | `history` | key, mod revision | record of a superseded version; a record of all zeros is a deletion |
//! | `log` | revision | what it wrote: (u8 deletion?, u32 length, key)* |
//! | `leases` | lease | time to live, ms |
//! | `lease_keys` | lease, key | |
//!
//! A record is create revision, mod revision, version, lease (i64 each), then the value's bytes. Reading the newest
//! version is one lookup in `latest`; creating a key writes `latest` and `log` only.

use crate::model::{Error, KeyValue, Result, Revision};
use ::redb::{Database, ReadableDatabase, TableDefinition, TableError, TableHandle};
use bytes::Bytes;
use std::path::Path;

pub(super) const FORMAT: u32 = 1;

pub(super) const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
pub(super) const LATEST: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("latest");
pub(super) const HISTORY: TableDefinition<'static, (&[u8], i64), &[u8]> = TableDefinition::new("history");
pub(super) const LOG: TableDefinition<'static, i64, &[u8]> = TableDefinition::new("log");
pub(super) const LEASES: TableDefinition<'static, i64, i64> = TableDefinition::new("leases");
pub(super) const LEASE_KEYS: TableDefinition<'static, (i64, &[u8]), ()> = TableDefinition::new("lease_keys");

const HEADER: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counters {
    pub revision: Revision,
    /// Nothing before this revision can be read.
    pub compacted: Revision,
    /// Up to here compaction has given the space back; the log begins here.
    pub scrubbed: Revision,
    pub next_lease: i64,
}

impl Counters {
    pub fn encode(self) -> Vec<u8> {
        [self.revision, self.compacted, self.scrubbed, self.next_lease].iter().flat_map(|n| n.to_le_bytes()).collect()
    }
    pub fn decode(row: Option<&[u8]>) -> Counters {
        let row = row.unwrap_or_default();
        Counters {
            revision: i64_at(row, 0).max(1),
            compacted: i64_at(row, 8),
            scrubbed: i64_at(row, 16),
            next_lease: i64_at(row, 24).max(1),
        }
    }
}

fn i64_at(row: &[u8], at: usize) -> i64 {
    row.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, i64::from_le_bytes)
}

pub(super) fn encode(kv: &KeyValue) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER + kv.value.len());
    for number in [kv.create_revision, kv.mod_revision, kv.version, kv.lease] {
        record.extend_from_slice(&number.to_le_bytes());
    }
    record.extend_from_slice(&kv.value);
    record
}

pub(super) const TOMBSTONE: [u8; HEADER] = [0; HEADER];

/// `None` for a deletion.
pub(super) fn decode(key: &[u8], record: &[u8]) -> Option<KeyValue> {
    let create_revision = i64_at(record, 0);
    (create_revision != 0).then(|| KeyValue {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(record.get(HEADER..).unwrap_or_default()),
        create_revision,
        mod_revision: i64_at(record, 8),
        version: i64_at(record, 16),
        lease: i64_at(record, 24),
    })
}

/// The mod revision of a record, without copying it.
pub(super) fn mod_revision(record: &[u8]) -> Revision {
    i64_at(record, 8)
}

pub(super) fn log_entry(entry: &mut Vec<u8>, deletion: bool, key: &[u8]) {
    entry.push(u8::from(deletion));
    entry.extend_from_slice(&u32::try_from(key.len()).unwrap_or(0).to_le_bytes());
    entry.extend_from_slice(key);
}

/// The keys of a log entry, each with whether it was deleted. Stops at damage.
pub(super) fn log_keys(mut entry: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    std::iter::from_fn(move || {
        let (head, rest) = entry.split_first_chunk::<5>()?;
        let [deletion, length @ ..] = *head;
        let (key, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(length)).ok()?)?;
        entry = rest;
        Some((deletion != 0, key))
    })
}

pub(super) fn initialise(db: &Database) -> std::result::Result<Counters, ::redb::Error> {
    let counters = Counters { revision: 1, compacted: 0, scrubbed: 0, next_lease: 1 };
    let txn = db.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        meta.insert("format", FORMAT.to_le_bytes().as_slice())?;
        meta.insert("counters", counters.encode().as_slice())?;
        txn.open_table(LATEST)?;
        txn.open_table(HISTORY)?;
        txn.open_table(LOG)?;
        txn.open_table(LEASES)?;
        txn.open_table(LEASE_KEYS)?;
    }
    txn.commit()?;
    Ok(counters)
}

/// Checks the format and reads the counters.
pub(super) fn load(db: &Database, path: &Path) -> Result<Counters> {
    let failed = |error: ::redb::Error| super::storage(path, &error);
    let read = || -> std::result::Result<_, ::redb::Error> {
        let txn = db.begin_read()?;
        let meta = match txn.open_table(META) {
            Ok(meta) => meta,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let format = meta.get("format")?.map(|row| row.value().to_vec());
        let counters = meta.get("counters")?.map(|row| row.value().to_vec());
        Ok(Some((format, counters)))
    };
    let Some((format, counters)) = read().map_err(failed)? else {
        return Err(super::damaged(path, &format!("table {} is missing", META.name())));
    };
    let format = format.and_then(|row| <[u8; 4]>::try_from(row).ok()).map_or(0, u32::from_le_bytes);
    match (format, counters) {
        (FORMAT, Some(row)) => Ok(Counters::decode(Some(&row))),
        (found, _) if found > FORMAT => {
            Err(Error::NewerVersion { path: path.display().to_string(), found, known: FORMAT })
        }
        (found, _) => Err(super::damaged(path, &format!("format {found}"))),
    }
}
