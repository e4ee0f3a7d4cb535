//! CustomResourceDefinitions: the finalizer that lets their objects go first, and the status that says whether they are
//! served. A definition that is accepted is served by the write that makes it.

use super::{Effects, Operation};
use crate::core::{Core, Target};
use crate::kinds::Set;
use api::object::{Meta, Object, child, object_of};
use api::status::StatusResult;
use serde_json::{Map, Value, json};

/// Removed once no object of the kind is left.
pub const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

pub fn admit(core: &Core, target: &Target, operation: Operation<'_>, object: &mut Object) -> StatusResult<Effects> {
    match operation {
        Operation::Create => {
            let mut finalizers: Vec<String> = object.finalizers().into_iter().map(str::to_owned).collect();
            if !finalizers.iter().any(|f| f == FINALIZER) {
                finalizers.push(FINALIZER.to_owned());
            }
            object.metadata_mut().insert("finalizers".into(), finalizers.into());
            settle_status(&core.kinds.current(), &target.name, object);
        }
        Operation::Update { subresource: "", .. } => settle_status(&core.kinds.current(), &target.name, object),
        Operation::Delete => {
            let text = "CustomResource deletion is in progress";
            condition(object, "Terminating", true, "InstanceDeletionInProgress", text);
        }
        Operation::Update { .. } => {}
    }
    Ok(Effects::default())
}

/// Whether what `object` says about itself lets it be served.
pub fn is_established(object: &Object) -> bool {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array).map(Vec::as_slice);
    conditions.unwrap_or_default().iter().any(|c| {
        c.get("type").and_then(Value::as_str) == Some("Established")
            && c.get("status").and_then(Value::as_str) == Some("True")
    })
}

fn settle_status(set: &Set, name: &str, object: &mut Object) {
    let names = object.pointer("/spec/names").cloned().unwrap_or_else(|| json!({}));
    let group = object.str_at("/spec/group").to_owned();
    let mut taken: Vec<String> = Vec::new();
    for field in ["plural", "singular"] {
        let word = names.get(field).and_then(Value::as_str).unwrap_or("");
        if !word.is_empty() && set.taken(name, &group, word) {
            taken.push(word.to_owned());
        }
    }
    for word in names.get("shortNames").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if set.taken(name, &group, word) {
            taken.push(word.to_owned());
        }
    }
    for field in ["kind", "listKind"] {
        let word = names.get(field).and_then(Value::as_str).unwrap_or("");
        if !word.is_empty() && set.kind_taken(name, &group, word) {
            taken.push(word.to_owned());
        }
    }
    if taken.is_empty() {
        condition(object, "NamesAccepted", true, "NoConflicts", "no conflicts found");
        condition(object, "Established", true, "InitialNamesAccepted", "the initial names have been accepted");
        child(object_of(object), "status").insert("acceptedNames".into(), names);
    } else {
        let text = format!("already in use in the group {group}: {}", taken.join(", "));
        condition(object, "NamesAccepted", false, "NamesConflict", &text);
        // Once established it stays so with the names it had.
        if !is_established(object) {
            condition(object, "Established", false, "NotAccepted", "not all names are accepted");
        }
    }
    let versions = object.pointer("/spec/versions").and_then(Value::as_array).cloned().unwrap_or_default();
    let storage = versions
        .iter()
        .find(|v| v.get("storage").and_then(Value::as_bool) == Some(true))
        .and_then(|v| v.get("name").cloned());
    let status = child(object_of(object), "status");
    if let Value::Array(stored) = status.entry("storedVersions").or_insert_with(|| json!([]))
        && let Some(storage) = storage
        && !stored.contains(&storage)
    {
        stored.push(storage);
    }
    child(object_of(object), "status").entry("acceptedNames").or_insert_with(|| json!({"kind": "", "plural": ""}));
}

/// Sets a condition; its time moves only when its status does.
pub fn condition(object: &mut Object, kind: &str, on: bool, reason: &str, message: &str) {
    let status = child(object_of(object), "status");
    let Value::Array(list) = status.entry("conditions").or_insert_with(|| json!([])) else { return };
    let value = if on { "True" } else { "False" };
    let known = list.iter().find(|c| c.get("type").and_then(Value::as_str) == Some(kind));
    let since = known
        .filter(|c| c.get("status").and_then(Value::as_str) == Some(value))
        .and_then(|c| c.get("lastTransitionTime").cloned())
        .unwrap_or_else(|| api::time::now_rfc3339().into());
    let mut entry = Map::new();
    for (name, text) in [("type", kind), ("status", value), ("reason", reason), ("message", message)] {
        entry.insert(name.into(), text.into());
    }
    entry.insert("lastTransitionTime".into(), since);
    list.retain(|c| c.get("type").and_then(Value::as_str) != Some(kind));
    list.push(Value::Object(entry));
}
