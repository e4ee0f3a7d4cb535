//! A versioned key-value store with etcd's semantics: revisions, ranges at a revision, transactions with compares,
//! watch from a revision, compaction, leases. One trait, [`Store`]; the embedded engine, [`redb::Engine`], is redb with
//! group commit; [`memory::Engine`] keeps everything in memory, for tests. Both pass the suite in `contract`.
//!
//! Knows nothing of what is stored.
#![forbid(unsafe_code)]

mod check;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod memory;
mod model;
pub mod redb;
mod watch;

pub use check::{KEY_LIMIT, VALUE_LIMIT};
pub use model::*;
