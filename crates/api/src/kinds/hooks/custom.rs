//! CustomResourceDefinitions.

use super::field::{Problems, at, items, object_mut, text};
use crate::crd;
use crate::object::{Object, child};
use crate::status::Cause;
use serde_json::{Value, json};

/// Names that follow from the kind.
pub fn default(definition: &mut Object) {
    let Some(spec) = object_mut(definition, "/spec") else { return };
    let names = child(spec, "names");
    let kind = names.get("kind").and_then(Value::as_str).unwrap_or("").to_owned();
    if kind.is_empty() {
        return;
    }
    for (field, value) in [("singular", kind.to_lowercase()), ("listKind", format!("{kind}List"))] {
        let entry = names.entry(field).or_insert(Value::Null);
        if entry.as_str().unwrap_or("").is_empty() {
            *entry = json!(value);
        }
    }
}

pub fn validate(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut causes = match crd::parse(new) {
        Ok(_) => Vec::new(),
        Err(causes) => causes,
    };
    if let Some(old) = old {
        let mut p = Problems::default();
        for field in ["group", "scope"] {
            p.immutable(&format!("spec.{field}"), at(at(new, "spec"), field), at(at(old, "spec"), field));
        }
        for field in ["plural", "kind"] {
            let read = |object: &Object| text(at(at(object, "spec"), "names"), field).to_owned();
            p.immutable(&format!("spec.names.{field}"), &read(new).into(), &read(old).into());
        }
        let served: Vec<&str> =
            items(at(new, "spec"), "versions").iter().map(|version| text(version, "name")).collect();
        for (index, stored) in items(at(new, "status"), "storedVersions").iter().enumerate() {
            let stored = stored.as_str().unwrap_or("");
            if !served.contains(&stored) {
                let path = format!("status.storedVersions[{index}]");
                p.invalid_text(&path, stored, "missing from spec.versions; it may still hold stored objects");
            }
        }
        causes.extend(p.into_causes());
    }
    causes
}

pub fn warnings(definition: &Object) -> Vec<String> {
    crd::warnings(definition)
}
