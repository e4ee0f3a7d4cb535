//! OpenAPI documents of the kinds served.

use crate::kinds::Set;
use serde_json::{Value, json};

/// `api/v1`, `apis/apps/v1`, ...
pub fn paths(set: &Set) -> Vec<String> {
    let path = |group: &str, version: &str| {
        if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
    };
    set.groups().iter().flat_map(|(g, versions)| versions.iter().map(|v| path(g, v)).collect::<Vec<_>>()).collect()
}

pub fn v3(_set: &Set, _path: &str) -> Option<Value> {
    None
}

pub fn v2(_set: &Set) -> Value {
    json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": "v1.32"}, "paths": {}, "definitions": {}})
}
