//! `metadata`: what every object's must be like, on creation and on update.

use super::cause;
use crate::core::Target;
use api::kind::Scope;
use api::names;
use api::object::{Meta, Object};
use api::status::{Cause, Reason, Status, StatusResult};
use serde_json::{Map, Value};

/// All annotations of an object together.
const ANNOTATIONS_LIMIT: usize = 256 << 10;

/// Set by the server alone; what a client sends is dropped.
const SERVER_FIELDS: [&str; 6] =
    ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink"];

/// `apiVersion`, `kind` and `namespace` as the request's path says; refused if the object says otherwise.
pub fn identify(target: &Target, object: &mut Object) -> StatusResult<()> {
    let kind = &target.kind;
    let wanted = kind.resource.api_version();
    let Some(fields) = object.as_object_mut() else {
        return Err(Status::bad_request("the object provided is not a JSON object"));
    };
    match fields.get("apiVersion").and_then(Value::as_str) {
        Some(found) if found != wanted => {
            return Err(Status::bad_request(format!(
                "the API version in the data ({found}) does not match the expected API version ({wanted})"
            )));
        }
        Some(_) => {}
        None => drop(fields.insert("apiVersion".into(), wanted.into())),
    }
    match fields.get("kind").and_then(Value::as_str) {
        Some(found) if found != kind.kind => {
            return Err(Status::bad_request(format!(
                "the kind in the data ({found}) does not match the expected kind ({})",
                kind.kind
            )));
        }
        Some(_) => {}
        None => drop(fields.insert("kind".into(), kind.kind.as_str().into())),
    }
    if fields.get("metadata").is_some_and(|m| !m.is_object() && !m.is_null()) {
        return Err(Status::bad_request("metadata: must be an object"));
    }
    let namespace = object.namespace().to_owned();
    match kind.scope {
        Scope::Cluster => drop(object.metadata_mut().remove("namespace")),
        Scope::Namespaced if namespace.is_empty() => {
            object.metadata_mut().insert("namespace".into(), target.namespace.as_str().into());
        }
        Scope::Namespaced if namespace != target.namespace => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        Scope::Namespaced => {}
    }
    Ok(())
}

/// Metadata of a new object: name made from `generateName` if there is none, server fields set anew.
pub fn begin(target: &mut Target, object: &mut Object) -> StatusResult<()> {
    if !object.resource_version().is_empty() {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let prefix = object.str_at("/metadata/generateName").to_owned();
    if object.name().is_empty() && !prefix.is_empty() {
        let name = names::generate(&prefix);
        object.metadata_mut().insert("name".into(), name.into());
    }
    if object.name().is_empty() {
        return Err(target.invalid(vec![cause(
            "FieldValueRequired",
            "metadata.name",
            "Required value: name or generateName is required",
        )]));
    }
    target.name = object.name().to_owned();
    let metadata = object.metadata_mut();
    for field in SERVER_FIELDS {
        metadata.remove(field);
    }
    metadata.insert("uid".into(), names::uid().into());
    metadata.insert("creationTimestamp".into(), api::time::now_rfc3339().into());
    if target.kind.counts_generation {
        metadata.insert("generation".into(), 1.into());
    }
    Ok(())
}

/// Metadata of an update: what only the server sets stays as it is in `live`.
pub fn carry(target: &Target, live: &Object, object: &mut Object) -> StatusResult<()> {
    let name = object.name();
    if !name.is_empty() && name != target.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        )));
    }
    let uid = object.uid();
    if !uid.is_empty() && uid != live.uid() {
        let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", live.uid());
        return Err(target.conflict(&why));
    }
    let version = object.resource_version();
    if !version.is_empty() && version != live.resource_version() {
        if version.parse::<u64>().is_err() {
            let text = format!("Invalid value: \"{version}\": must be an unsigned integer");
            return Err(target.invalid(vec![cause("FieldValueInvalid", "metadata.resourceVersion", text)]));
        }
        return Err(target.conflict(super::storage::MODIFIED));
    }
    let metadata = object.metadata_mut();
    metadata.insert("name".into(), target.name.as_str().into());
    for field in SERVER_FIELDS.into_iter().chain(["resourceVersion", "generateName"]) {
        match live.pointer("/metadata").and_then(|m| m.get(field)) {
            Some(value) => drop(metadata.insert(field.into(), value.clone())),
            None => drop(metadata.remove(field)),
        }
    }
    Ok(())
}

/// Problems of an object's metadata; `live` on update.
pub fn validate(target: &Target, object: &Object, live: Option<&Object>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = object.name();
    if live.is_none() {
        let problems = if target.is("", "namespaces") { names::dns_label(name) } else { names::dns_subdomain(name) };
        for problem in problems {
            causes.push(cause("FieldValueInvalid", "metadata.name", format!("Invalid value: \"{name}\": {problem}")));
        }
    }
    let Some(metadata) = object.pointer("/metadata").and_then(Value::as_object) else { return causes };
    for (key, value) in map(metadata, "labels") {
        for problem in names::qualified_name(key) {
            causes.push(cause("FieldValueInvalid", "metadata.labels", format!("Invalid value: \"{key}\": {problem}")));
        }
        let Some(text) = value.as_str() else {
            causes.push(cause(
                "FieldValueTypeInvalid",
                "metadata.labels",
                format!("Invalid value: {value}: must be a string"),
            ));
            continue;
        };
        for problem in names::label_value(text) {
            causes.push(cause("FieldValueInvalid", "metadata.labels", format!("Invalid value: \"{text}\": {problem}")));
        }
    }
    annotations(metadata, &mut causes);
    finalizers(metadata, live, &mut causes);
    owners(metadata, &mut causes);
    causes
}

fn map<'a>(metadata: &'a Map<String, Value>, field: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    metadata.get(field).and_then(Value::as_object).into_iter().flatten()
}

fn annotations(metadata: &Map<String, Value>, causes: &mut Vec<Cause>) {
    let mut size = 0;
    for (key, value) in map(metadata, "annotations") {
        for problem in names::qualified_name(&key.to_ascii_lowercase()) {
            let text = format!("Invalid value: \"{key}\": {problem}");
            causes.push(cause("FieldValueInvalid", "metadata.annotations", text));
        }
        size += key.len() + value.as_str().map_or(0, str::len);
        if !value.is_string() {
            let text = format!("Invalid value: {value}: must be a string");
            causes.push(cause("FieldValueTypeInvalid", "metadata.annotations", text));
        }
    }
    if size > ANNOTATIONS_LIMIT {
        let text = format!("Too long: may not be more than {ANNOTATIONS_LIMIT} bytes");
        causes.push(cause("FieldValueTooLong", "metadata.annotations", text));
    }
}

fn finalizers(metadata: &Map<String, Value>, live: Option<&Object>, causes: &mut Vec<Cause>) {
    let list = metadata.get("finalizers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let before = live.map(|live| live.finalizers()).unwrap_or_default();
    let deleting = live.is_some_and(|live| live.is_deleting());
    let mut added = Vec::new();
    for (index, value) in list.iter().enumerate() {
        let text = value.as_str().unwrap_or("");
        let plain = text == "orphan" || text == "foregroundDeletion";
        for problem in names::qualified_name(text) {
            let field = format!("metadata.finalizers[{index}]");
            causes.push(cause("FieldValueInvalid", &field, format!("Invalid value: \"{text}\": {problem}")));
        }
        // `customresourcecleanup.apiextensions.k8s.io` is qualified by its domain alone.
        if !plain && !text.contains(['/', '.']) && live.is_none() {
            let text = format!(
                "Invalid value: \"{text}\": name is neither a standard finalizer name nor is it fully qualified"
            );
            causes.push(cause("FieldValueInvalid", &format!("metadata.finalizers[{index}]"), text));
        }
        if deleting && !before.contains(&text) {
            added.push(text.to_owned());
        }
    }
    if !added.is_empty() {
        let text = format!(
            "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
        );
        causes.push(cause("FieldValueForbidden", "metadata.finalizers", text));
    }
}

fn owners(metadata: &Map<String, Value>, causes: &mut Vec<Cause>) {
    let list = metadata.get("ownerReferences").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut controllers = Vec::new();
    for (index, owner) in list.iter().enumerate() {
        let field = |name: &str| format!("metadata.ownerReferences[{index}].{name}");
        let text = |name: &str| owner.get(name).and_then(Value::as_str).unwrap_or("");
        for (name, words) in [
            ("apiVersion", "Invalid value: \"\": version must not be empty"),
            ("kind", "Invalid value: \"\": must not be empty"),
            ("name", "Invalid value: \"\": must not be empty"),
            ("uid", "Invalid value: \"\": must not be empty"),
        ] {
            if text(name).is_empty() {
                causes.push(cause("FieldValueInvalid", &field(name), words));
            }
        }
        if owner.get("controller").and_then(Value::as_bool) == Some(true) {
            controllers.push(format!("{}/{}", text("kind"), text("name")));
        }
    }
    if let [first, second, ..] = controllers.as_slice() {
        let text = format!(
            "Invalid value: Only one reference can have Controller set to true. Found \"true\" in references for {first} \
             and {second}"
        );
        causes.push(cause("FieldValueInvalid", "metadata.ownerReferences", text));
    }
}

/// `user-agent`-like clients never see this: two objects that differ only in the times of their ownership entries.
pub fn same(live: &Object, new: &Object) -> bool {
    fn without_times(object: &Object) -> Object {
        let mut object = object.clone();
        if let Some(entries) = object.pointer_mut("/metadata/managedFields").and_then(Value::as_array_mut) {
            for entry in entries.iter_mut().filter_map(Value::as_object_mut) {
                entry.remove("time");
            }
        }
        object
    }
    live == new || (live.get("spec") == new.get("spec") && without_times(live) == without_times(new))
}

/// Whether anything but metadata and status differs.
pub fn spec_differs(live: &Object, new: &Object) -> bool {
    let (Some(a), Some(b)) = (live.as_object(), new.as_object()) else { return true };
    let counted = |key: &str| !matches!(key, "metadata" | "status" | "apiVersion" | "kind");
    a.keys().chain(b.keys()).filter(|key| counted(key)).any(|key| a.get(key) != b.get(key))
}

/// Refuses writes to what does not exist in the way of the object: its namespace.
pub fn no_namespace(name: &str) -> Status {
    Status::new(Reason::NotFound, format!("namespaces \"{name}\" not found")).about("", "namespaces", name)
}
