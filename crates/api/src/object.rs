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

impl Meta for Value {
    fn str_at(&self, pointer: &str) -> &str {
        self.pointer(pointer).and_then(Value::as_str).unwrap_or("")
    }
    fn name(&self) -> &str {
        self.str_at("/metadata/name")
    }
    fn namespace(&self) -> &str {
        self.str_at("/metadata/namespace")
    }
    fn uid(&self) -> &str {
        self.str_at("/metadata/uid")
    }
    fn resource_version(&self) -> &str {
        self.str_at("/metadata/resourceVersion")
    }
    fn generation(&self) -> i64 {
        self.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0)
    }
    fn label(&self, key: &str) -> Option<&str> {
        self.pointer("/metadata/labels")?.get(key)?.as_str()
    }
    fn annotation(&self, key: &str) -> Option<&str> {
        self.pointer("/metadata/annotations")?.get(key)?.as_str()
    }
    fn is_deleting(&self) -> bool {
        !self.str_at("/metadata/deletionTimestamp").is_empty()
    }
    fn finalizers(&self) -> Vec<&str> {
        self.pointer("/metadata/finalizers")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default()
    }
    fn controller_ref(&self) -> Option<&Value> {
        self.pointer("/metadata/ownerReferences")?
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
