//! An API object as the machinery sees it: a JSON object with `apiVersion`, `kind` and `metadata`.

use serde_json::{Map, Value};
use std::sync::Arc;

/// A whole API object. Shared objects (informers, watch events) are `Arc<Object>`.
pub type Object = Value;
pub type SharedObject = Arc<Object>;

/// Read and write access to the parts every object has. Never panics; absent parts read as `""`/`None`.
pub trait Meta {
    fn str_at(&self, pointer: &str) -> &str;
    fn name(&self) -> &str;
    fn namespace(&self) -> &str;
    fn uid(&self) -> &str;
    fn resource_version(&self) -> &str;
    fn generation(&self) -> i64;
    fn label(&self, key: &str) -> Option<&str>;
    fn annotation(&self, key: &str) -> Option<&str>;
    fn is_deleting(&self) -> bool;
    fn finalizers(&self) -> Vec<&str>;
    /// The owner reference that has `controller: true`, if any.
    fn controller_ref(&self) -> Option<&Value>;
    /// `metadata`, made if absent (or if not an object).
    fn metadata_mut(&mut self) -> &mut Map<String, Value>;
    fn set_annotation(&mut self, key: &str, value: &str);
    fn set_label(&mut self, key: &str, value: &str);
}

/// A field of `metadata`. Every list and watch reads some of every object, so it is not looked up by a JSON pointer, whose
/// parts are copied to be unescaped.
fn field<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object.get("metadata")?.get(key)
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    field(object, key).and_then(Value::as_str).unwrap_or("")
}

/// [`Value::pointer`], without a copy of its parts where none is escaped.
fn at<'a>(value: &'a Value, pointer: &str) -> Option<&'a Value> {
    let step = |value: &'a Value, key: &str| match value {
        Value::Array(list) => list.get(key.parse::<usize>().ok()?),
        other => other.get(key),
    };
    match pointer.strip_prefix('/') {
        Some(keys) if !keys.contains('~') => keys.split('/').try_fold(value, step),
        _ => value.pointer(pointer),
    }
}

impl Meta for Value {
    fn str_at(&self, pointer: &str) -> &str {
        at(self, pointer).and_then(Value::as_str).unwrap_or("")
    }
    fn name(&self) -> &str {
        text(self, "name")
    }
    fn namespace(&self) -> &str {
        text(self, "namespace")
    }
    fn uid(&self) -> &str {
        text(self, "uid")
    }
    fn resource_version(&self) -> &str {
        text(self, "resourceVersion")
    }
    fn generation(&self) -> i64 {
        field(self, "generation").and_then(Value::as_i64).unwrap_or(0)
    }
    fn label(&self, key: &str) -> Option<&str> {
        field(self, "labels")?.get(key)?.as_str()
    }
    fn annotation(&self, key: &str) -> Option<&str> {
        field(self, "annotations")?.get(key)?.as_str()
    }
    fn is_deleting(&self) -> bool {
        !text(self, "deletionTimestamp").is_empty()
    }
    fn finalizers(&self) -> Vec<&str> {
        field(self, "finalizers")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default()
    }
    fn controller_ref(&self) -> Option<&Value> {
        field(self, "ownerReferences")?
            .as_array()?
            .iter()
            .find(|owner| owner.get("controller").and_then(Value::as_bool) == Some(true))
    }
    fn metadata_mut(&mut self) -> &mut Map<String, Value> {
        child(object_of(self), "metadata")
    }
    fn set_annotation(&mut self, key: &str, value: &str) {
        child(self.metadata_mut(), "annotations").insert(key.to_owned(), value.into());
    }
    fn set_label(&mut self, key: &str, value: &str) {
        child(self.metadata_mut(), "labels").insert(key.to_owned(), value.into());
    }
}

/// `value` as a JSON object, replaced by an empty one if it is anything else.
pub fn object_of(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// The object at `key`, made if absent (or if not an object).
pub fn child<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    object_of(map.entry(key.to_owned()).or_insert_with(|| Value::Object(Map::new())))
}
