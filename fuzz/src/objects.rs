//! What Kubernetes clients send: objects as JSON, YAML and protobuf, patches, selectors, paths.

use crate::halves;
use api::kind::Kind;
use api::schema::strict;
use api::selector::{FieldSelector, Selector};
use api::{Object, jsonpath};
use serde_json::Value;
use server::patch;
use std::sync::OnceLock;

fn kinds() -> &'static [Kind] {
    static KINDS: OnceLock<Vec<Kind>> = OnceLock::new();
    KINDS.get_or_init(api::kinds::builtin)
}

fn kind_of(value: &Value) -> Option<&'static Kind> {
    let named = value.get("kind")?.as_str()?;
    kinds().iter().find(|k| k.kind == named)
}

pub fn decode(data: &[u8]) {
    let Some((format, body)) = data.split_first() else { return };
    server::fuzz::content_type(&String::from_utf8_lossy(body));
    if let Some(value) = server::fuzz::body(body, *format) {
        // What was read can be written and read again.
        let text = serde_json::to_vec(&value).expect("a value is JSON");
        assert!(text.len() > 3 << 20 || server::fuzz::body(&text, 0).is_some());
    }
}

/// An object as a create takes it: strict, pruned, defaulted, validated.
pub fn strict(data: &[u8]) {
    let Ok(mut value) = serde_json::from_slice::<Value>(data) else { return };
    let Some(kind) = kind_of(&value) else { return };
    let report = strict::check(&kind.schema, &kind.types, &value);
    let _ = (report.is_clean(), report.warnings(), report.strict_error(&[]));
    strict::prune(&kind.schema, &kind.types, &mut value);
    strict::apply_defaults(&kind.schema, &kind.types, &mut value);
    let _ = strict::validate_values(&kind.schema, &kind.types, &value);
    let mut object: Object = value;
    if let Some(default) = kind.hooks.default {
        default(&mut object);
    }
    if let Some(prepare) = kind.hooks.prepare_create {
        prepare(&mut object);
    }
    if let Some(validate) = kind.hooks.validate {
        let _ = (validate(&object, None), validate(&object, Some(&object)));
    }
    if let Some(warnings) = kind.hooks.warnings {
        let _ = warnings(&object);
    }
}

/// A document and a patch, with a zero byte between them.
pub fn patch(data: &[u8]) {
    let (document, change) = halves(data);
    let Ok(document) = serde_json::from_slice::<Value>(document) else { return };
    let Ok(change) = serde_json::from_slice::<Value>(change) else { return };
    let _ = patch::json_patch(&document, &change);
    let merged = patch::merge_patch(&document, &change);
    assert_eq!(patch::merge_patch(&merged, &change), merged, "a merge patch twice is the patch once");
    if let Some(kind) = kind_of(&document) {
        let _ = patch::strategic(&document, &change, &kind.schema, &kind.types);
    }
}

pub fn fields(data: &[u8]) {
    if let Ok(set) = patch::Set::parse(data) {
        let again = patch::Set::from_json(&set.to_json()).expect("what was written is read");
        assert_eq!(again.paths(), set.paths());
        assert!(set.difference(&set).is_empty());
    }
}

pub fn selectors(data: &[u8]) {
    let (text, object) = halves(data);
    let text = String::from_utf8_lossy(text);
    let object: Value = serde_json::from_slice(object).unwrap_or_default();
    if let Ok(selector) = Selector::parse(&text) {
        let _ = (selector.matches(&object), selector.matches_object(&object), selector.is_everything());
    }
    if let Ok(selector) = FieldSelector::parse(&text) {
        let _ = (selector.matches(&object), selector.check(&["metadata.name"]), selector.required("metadata.name"));
    }
    let _ = (Selector::from_object(&object), Selector::from_map(&object), Selector::from_any(&object));
    let _ = (api::quantity::Quantity::parse(&text), api::quantity::Quantity::from_value(&object));
}

pub fn jsonpath(data: &[u8]) {
    let (path, object) = halves(data);
    let path = String::from_utf8_lossy(path);
    let object: Value = serde_json::from_slice(object).unwrap_or_default();
    let found = jsonpath::find(&object, &path).len();
    assert!(found == 0 || jsonpath::is_valid(&path) || path.is_empty());
}
