//! The patches that the in-memory client knows.

use crate::object::Meta;
use crate::status::{Reason, Status, StatusResult};
use serde_json::Value;

/// RFC 7386.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        patch.clone_into(target);
        return;
    };
    let fields = crate::object::object_of(target);
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// RFC 6902.
pub fn json_patch(target: &mut Value, patch: &Value) -> StatusResult<()> {
    let refuse = |what: String| {
        Status::new(Reason::Invalid, format!("the server rejected our request due to an error in our request: {what}"))
    };
    for step in patch.as_array().map(Vec::as_slice).unwrap_or_default() {
        let (op, path) = (step.str_at("/op"), step.str_at("/path"));
        let from = || target.pointer(step.str_at("/from")).cloned();
        let value = match op {
            "copy" | "move" => from(),
            "remove" => Some(Value::Null),
            _ => step.get("value").cloned(),
        };
        let value = value.ok_or_else(|| refuse(format!("{op} {path}: no value")))?;
        let done = match op {
            "add" | "copy" => insert(target, path, value),
            "move" => take(target, step.str_at("/from")).is_some() && insert(target, path, value),
            "remove" => take(target, path).is_some(),
            "replace" => target.pointer_mut(path).map(|at| *at = value).is_some(),
            "test" => target.pointer(path) == Some(&value),
            _ => false,
        };
        if !done {
            return Err(refuse(format!("{op} operation does not apply at {path:?}")));
        }
    }
    Ok(())
}

fn parent<'a>(target: &'a mut Value, path: &str) -> Option<(&'a mut Value, String)> {
    let (parent, last) = path.rsplit_once('/')?;
    Some((target.pointer_mut(parent)?, last.replace("~1", "/").replace("~0", "~")))
}

fn insert(target: &mut Value, path: &str, value: Value) -> bool {
    match parent(target, path) {
        Some((Value::Object(fields), key)) => {
            fields.insert(key, value);
            true
        }
        Some((Value::Array(items), index)) => {
            let index = if index == "-" { Some(items.len()) } else { index.parse().ok() };
            let index = index.filter(|index| *index <= items.len());
            index.map(|index| items.insert(index, value)).is_some()
        }
        _ => false,
    }
}

fn take(target: &mut Value, path: &str) -> Option<Value> {
    match parent(target, path)? {
        (Value::Object(fields), key) => fields.remove(&key),
        (Value::Array(items), index) => {
            let index = index.parse().ok().filter(|index| *index < items.len())?;
            Some(items.remove(index))
        }
        _ => None,
    }
}
