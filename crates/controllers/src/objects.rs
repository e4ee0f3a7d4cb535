//! Small reads and writes of API objects that many reconcilers need.

use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use serde_json::{Map, Value, json};

pub(crate) fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub(crate) fn int(object: &Value, pointer: &str) -> Option<i64> {
    object.pointer(pointer).and_then(Value::as_i64)
}

pub(crate) fn flag(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

pub(crate) fn map<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
    object.pointer(pointer).and_then(Value::as_object).into_iter().flatten()
}

/// The condition of this type in `conditions` of a status.
pub(crate) fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    list(status, "/conditions").iter().find(|condition| condition.str_at("/type") == kind)
}

/// The status of a condition of an object; empty when it has none.
pub(crate) fn condition_status<'a>(object: &'a Value, kind: &str) -> &'a str {
    let found = list(object, "/status/conditions").iter().find(|condition| condition.str_at("/type") == kind);
    found.map_or("", |condition| condition.str_at("/status"))
}

/// The reference with which a dependent names `owner` as its controller.
pub(crate) fn controller_reference(resource: &Resource, kind: &str, owner: &Object) -> Value {
    json!({"apiVersion": resource.api_version(), "kind": kind, "name": owner.name(), "uid": owner.uid(),
           "controller": true, "blockOwnerDeletion": true})
}

pub(crate) fn is_controlled_by(object: &Object, owner_uid: &str) -> bool {
    object.controller_ref().is_some_and(|owner| owner.str_at("/uid") == owner_uid)
}

/// The name of the controller if it is of this group and kind.
pub(crate) fn controller_name<'a>(object: &'a Object, resource: &Resource, kind: &str) -> Option<&'a str> {
    let owner = object.controller_ref()?;
    let group = owner.str_at("/apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
    (owner.str_at("/kind") == kind && group == &*resource.group).then(|| owner.str_at("/name"))
}

/// Neither ended nor on its way out.
pub(crate) fn is_active(pod: &Object) -> bool {
    !has_ended(pod) && !pod.is_deleting()
}

pub(crate) fn has_ended(pod: &Object) -> bool {
    matches!(pod.str_at("/status/phase"), "Succeeded" | "Failed")
}

pub(crate) fn is_ready(pod: &Object) -> bool {
    condition_status(pod, "Ready") == "True"
}

/// Unix seconds since which the pod is ready.
pub(crate) fn ready_since(pod: &Object) -> Option<i64> {
    let ready = list(pod, "/status/conditions").iter().find(|condition| condition.str_at("/type") == "Ready")?;
    if ready.str_at("/status") != "True" {
        return None;
    }
    api::time::parse(ready.str_at("/lastTransitionTime"))
}

/// Ready for at least `min_ready` seconds.
pub(crate) fn is_available(pod: &Object, min_ready: i64, now: i64) -> bool {
    is_ready(pod) && (min_ready <= 0 || ready_since(pod).is_some_and(|since| since + min_ready <= now))
}

pub(crate) fn created(object: &Object) -> i64 {
    api::time::parse(object.str_at("/metadata/creationTimestamp")).unwrap_or(0)
}

/// Oldest first; the name decides between equals.
pub(crate) fn by_age(objects: &mut [SharedObject]) {
    objects.sort_by(|a, b| (created(a), a.name()).cmp(&(created(b), b.name())));
}

/// A pod made from `template`, without a name.
pub(crate) fn pod_from_template(template: &Value) -> Object {
    let mut metadata = Map::new();
    for key in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer("/metadata").and_then(|metadata| metadata.get(key)) {
            metadata.insert(key.into(), value.clone());
        }
    }
    let spec = template.get("spec").cloned().unwrap_or_else(|| json!({}));
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
}

/// 32-bit FNV-1a.
pub(crate) fn fnv32a(bytes: impl IntoIterator<Item = u8>) -> u32 {
    bytes.into_iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// `base` cut so that with `suffix` it is at most `limit` bytes long.
pub(crate) fn joined(base: &str, suffix: &str, limit: usize) -> String {
    let mut end = base.len().min(limit.saturating_sub(suffix.len()));
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", base.get(..end).unwrap_or(""))
}
