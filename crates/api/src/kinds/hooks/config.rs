//! ConfigMaps and Secrets.

use super::field::{Problems, at, flag, has, text};
use crate::names;
use crate::object::{Object, child, object_of};
use crate::status::Cause;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// Bytes all values of a ConfigMap or Secret may have together.
const LIMIT: usize = 1 << 20;

/// `stringData` is a way to write `data`.
pub fn default_secret(secret: &mut Object) {
    let Some(Value::Object(plain)) = object_of(secret).remove("stringData") else { return };
    let data = child(object_of(secret), "data");
    for (key, value) in plain {
        data.insert(key, STANDARD.encode(value.as_str().unwrap_or("")).into());
    }
}

fn fields<'a>(object: &'a Object, field: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    at(object, field).as_object().into_iter().flatten()
}

pub fn validate_config_map(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let mut size = 0;
    for field in ["data", "binaryData"] {
        for (key, value) in fields(new, field) {
            let path = format!("{field}[{key}]");
            p.rule(&path, key, names::config_key);
            if field == "data" && has(at(new, "binaryData"), key) {
                p.invalid_text(&path, key, "duplicate of key present in binaryData");
            }
            let text = value.as_str().unwrap_or("");
            size += if field == "data" { text.len() } else { decoded_length(text) };
        }
    }
    if size > LIMIT {
        p.too_long("", LIMIT);
    }
    frozen(&mut p, new, old, &["data", "binaryData"]);
    p.into_causes()
}

fn decoded_length(base64: &str) -> usize {
    base64.trim_end_matches('=').len() * 3 / 4
}

/// What is declared immutable stays so and keeps its data.
fn frozen(p: &mut Problems, new: &Object, old: Option<&Object>, data: &[&str]) {
    const DETAIL: &str = "field is immutable when `immutable` is set";
    let Some(old) = old.filter(|old| flag(old, "immutable")) else { return };
    if !flag(new, "immutable") {
        p.forbidden("immutable", DETAIL);
    }
    for field in data {
        let empty = Value::Object(Map::new());
        let read = |object: &Object| Some(at(object, field).clone()).filter(|v| !v.is_null()).unwrap_or(empty.clone());
        if read(new) != read(old) {
            p.forbidden(field, DETAIL);
        }
    }
}

pub fn validate_secret(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let mut size = 0;
    for (key, value) in fields(new, "data") {
        p.rule(&format!("data[{key}]"), key, names::config_key);
        size += decoded_length(value.as_str().unwrap_or(""));
    }
    if size > LIMIT {
        p.too_long("data", LIMIT);
    }
    let data = at(new, "data");
    let needed: &[&str] = match text(new, "type") {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/basic-auth" if !has(data, "username") && !has(data, "password") => &["username", "password"],
        _ => &[],
    };
    for key in needed.iter().filter(|key| !has(data, key)) {
        p.required(&format!("data[{key}]"), "");
    }
    for key in [".dockerconfigjson", ".dockercfg"].into_iter().filter(|key| needed.contains(key)) {
        let decoded = data.get(key).and_then(Value::as_str).and_then(|text| STANDARD.decode(text).ok());
        if decoded.is_some_and(|bytes| serde_json::from_slice::<Value>(&bytes).is_err()) {
            p.invalid_text(&format!("data[{key}]"), "<secret contents redacted>", "must be JSON");
        }
    }
    if let Some(old) = old
        && text(new, "type") != text(old, "type")
    {
        p.immutable("type", at(new, "type"), at(old, "type"));
    }
    frozen(&mut p, new, old, &["data"]);
    p.into_causes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn plain_text_becomes_data() {
        let mut secret = json!({"data": {"a": "eA=="}, "stringData": {"b": "pass word"}});
        default_secret(&mut secret);
        assert_eq!(secret, json!({"data": {"a": "eA==", "b": "cGFzcyB3b3Jk"}}));
    }

    #[test]
    fn keys_types_and_frozen_data() {
        let told =
            |causes: Vec<Cause>| causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect::<Vec<_>>();
        assert_eq!(
            told(validate_secret(&json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}}), None)),
            ["data[tls.key]: Required value"]
        );
        let old = json!({"immutable": true, "data": {"a": "b"}});
        assert_eq!(
            told(validate_config_map(&json!({"data": {"a": "c"}}), Some(&old))),
            [
                "immutable: Forbidden: field is immutable when `immutable` is set",
                "data: Forbidden: field is immutable when `immutable` is set"
            ]
        );
        assert!(validate_config_map(&json!({"data": {"a/b": ""}}), None)[0].message.contains("a valid config key"));
        assert_eq!(
            validate_config_map(&json!({"data": {"a": "x".repeat(LIMIT + 1)}}), None)[0].reason,
            "FieldValueTooLong"
        );
    }
}
