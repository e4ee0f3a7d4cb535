//! What a transaction must satisfy before an engine touches anything, so that no engine has to undo half of one.

use crate::model::{Compare, Error, KeyRange, KeyValue, Op, Result, Revision, Txn};
use bytes::Bytes;
use std::collections::HashSet;

/// Largest value, bytes.
pub const VALUE_LIMIT: usize = 4 << 20;
/// Longest key, bytes.
pub const KEY_LIMIT: usize = 4 << 10;

/// Checks sizes and overlaps of both branches: as in etcd, a transaction that could put a key twice, or put one that
/// it also deletes, is refused whichever branch would run.
pub(crate) fn txn(txn: &Txn) -> Result<()> {
    branch(&txn.then)?;
    branch(&txn.otherwise)
}

fn branch(ops: &[Op]) -> Result<()> {
    let mut put: HashSet<&Bytes> = HashSet::new();
    let mut deleted: Vec<&KeyRange> = Vec::new();
    for op in ops {
        match op {
            Op::Put { key, value, .. } => {
                within(key.len(), KEY_LIMIT)?;
                within(value.len(), VALUE_LIMIT)?;
                if !put.insert(key) {
                    return Err(Error::DuplicateKey);
                }
            }
            Op::Delete(range) => deleted.push(range),
            Op::Range(_) => {}
        }
    }
    match put.iter().any(|key| deleted.iter().any(|range| range.contains(key))) {
        true => Err(Error::DuplicateKey),
        false => Ok(()),
    }
}

fn within(size: usize, limit: usize) -> Result<()> {
    if size > limit { Err(Error::TooLarge { size, limit }) } else { Ok(()) }
}

/// Whether `revision` (0 = newest) can be read from a store that is at `newest` and compacted up to `compacted`.
pub(crate) fn readable(revision: Revision, newest: Revision, compacted: Revision) -> Result<()> {
    if revision > newest {
        return Err(Error::FutureRevision { asked: revision, newest });
    }
    if revision > 0 && revision < compacted {
        return Err(Error::Compacted { oldest: compacted });
    }
    Ok(())
}

/// Whether a compaction up to `revision` can be done.
pub(crate) fn compactable(revision: Revision, newest: Revision, compacted: Revision) -> Result<()> {
    if revision > newest {
        return Err(Error::FutureRevision { asked: revision, newest });
    }
    if revision <= compacted {
        return Err(Error::Compacted { oldest: compacted });
    }
    Ok(())
}

impl Compare {
    pub(crate) fn key(&self) -> &Bytes {
        match self {
            Compare::ModRevision(key, _)
            | Compare::CreateRevision(key, _)
            | Compare::Version(key, _)
            | Compare::Value(key, _) => key,
        }
    }
    /// A key that does not exist has revisions and version 0 and equals no value.
    pub(crate) fn holds(&self, found: Option<&KeyValue>) -> bool {
        match self {
            Compare::ModRevision(_, wanted) => found.map_or(0, |kv| kv.mod_revision) == *wanted,
            Compare::CreateRevision(_, wanted) => found.map_or(0, |kv| kv.create_revision) == *wanted,
            Compare::Version(_, wanted) => found.map_or(0, |kv| kv.version) == *wanted,
            Compare::Value(_, wanted) => found.is_some_and(|kv| kv.value == wanted),
        }
    }
}

/// Leases live no longer than this without being kept alive.
pub(crate) const LONGEST_LEASE: std::time::Duration = std::time::Duration::from_secs(10 * 365 * 86_400);
