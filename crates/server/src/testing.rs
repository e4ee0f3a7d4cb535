//! Kinds for unit tests.

use api::kind::Kind;
use std::sync::Arc;

/// A built-in kind by its plural.
pub fn kind(plural: &str) -> Arc<Kind> {
    let kinds = api::kinds::builtin();
    Arc::new(kinds.into_iter().find(|k| *k.resource.plural == *plural).unwrap())
}
