//! The `scale` subresource: an `autoscaling/v1` `Scale` made from the paths in the kind's table entry.

use crate::core::Target;
use api::kind::ScalePaths;
use api::object::{Meta, Object, object_of};
use api::selector::Selector;
use api::status::{Status, StatusResult};
use serde_json::{Value, json};

fn paths(target: &Target) -> StatusResult<&ScalePaths> {
    target.kind.subresources.scale.as_ref().ok_or_else(|| target.not_found())
}

/// `live` as a Scale.
pub fn show(target: &Target, live: &Object) -> StatusResult<Object> {
    let paths = paths(target)?;
    let number = |path: &str| live.pointer(path).and_then(Value::as_i64).unwrap_or(0);
    let mut metadata = serde_json::Map::new();
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = live.pointer("/metadata").and_then(|m| m.get(field)) {
            metadata.insert(field.into(), value.clone());
        }
    }
    let selector = live.pointer(&paths.selector).map(Selector::from_any).and_then(Result::ok);
    let mut status = json!({"replicas": number(&paths.status_replicas)});
    if let Some(text) = selector.filter(|s| !s.nothing).map(|s| s.to_string()).filter(|s| !s.is_empty()) {
        object_of(&mut status).insert("selector".into(), text.into());
    }
    Ok(json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": metadata,
              "spec": {"replicas": number(&paths.spec_replicas)}, "status": status}))
}

/// `live` with the replicas of `scale`.
pub fn replace(target: &Target, live: &Object, scale: &Object) -> StatusResult<Object> {
    let paths = paths(target)?;
    if scale.get("kind").and_then(Value::as_str).is_some_and(|kind| kind != "Scale") {
        return Err(Status::bad_request("the object provided is not a Scale"));
    }
    let replicas = scale.pointer("/spec/replicas").cloned().unwrap_or_else(|| 0.into());
    let Some(count) = replicas.as_i64().and_then(|n| i32::try_from(n).ok()) else {
        return Err(Status::bad_request(format!("spec.replicas: Invalid value: {replicas}: must be a 32-bit integer")));
    };
    if count < 0 {
        return Err(target.invalid(vec![super::cause(
            "FieldValueInvalid",
            "spec.replicas",
            format!("Invalid value: {count}: must be greater than or equal to 0"),
        )]));
    }
    let version = scale.resource_version();
    if !version.is_empty() && version != live.resource_version() {
        return Err(target.conflict(super::storage::MODIFIED));
    }
    let mut new = live.clone();
    set(&mut new, &paths.spec_replicas, count.into());
    Ok(new)
}

/// An apply configuration of the object itself that sets its replicas.
pub fn applied_body(target: &Target, live: &Object, replicas: Value) -> StatusResult<Object> {
    let paths = paths(target)?;
    let mut body = json!({"apiVersion": target.kind.resource.api_version(), "kind": target.kind.kind,
                          "metadata": {"name": live.name()}});
    if !live.namespace().is_empty() {
        body.metadata_mut().insert("namespace".into(), live.namespace().into());
    }
    set(&mut body, &paths.spec_replicas, replicas);
    Ok(body)
}

fn set(object: &mut Value, pointer: &str, value: Value) {
    let mut at = object;
    let mut keys = pointer.split('/').skip(1).peekable();
    while let Some(key) = keys.next() {
        let map = object_of(at);
        if keys.peek().is_none() {
            map.insert(key.to_owned(), value);
            return;
        }
        at = map.entry(key.to_owned()).or_insert_with(|| json!({}));
    }
}
