//! OpenAPI documents of the kinds served, written by `api` from their schemas.

use crate::kinds::Set;
use api::kind::Kind;
use serde_json::Value;

fn kinds(set: &Set) -> impl Iterator<Item = &Kind> {
    set.iter().map(AsRef::as_ref)
}

/// `api/v1`, `apis/apps/v1`, ...
pub fn paths(set: &Set) -> Vec<String> {
    api::openapi::v3_paths(kinds(set))
}

/// The document at `path`.
pub fn v3(set: &Set, path: &str) -> Option<Value> {
    let mut parts = path.split('/');
    let (group, version) = match (parts.next()?, parts.next()?, parts.next(), parts.next()) {
        ("api", version, None, None) => ("", version),
        ("apis", group, Some(version), None) => (group, version),
        _ => return None,
    };
    api::openapi::v3(group, version, kinds(set))
}

pub fn v2(set: &Set) -> Value {
    api::openapi::v2(kinds(set))
}
