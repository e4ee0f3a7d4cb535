//! A versioned key-value store with etcd's semantics: revisions, ranges at a revision, transactions with compares,
//! watch from a revision, compaction, leases. One trait, [`Store`]; the embedded engine is redb with group commit.
//!
//! Knows nothing of what is stored.
#![forbid(unsafe_code)]

mod model;

pub use model::*;
