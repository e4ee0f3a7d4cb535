//! Checks of values against a schema: required fields, allowed values, lengths, bounds, patterns, keys of lists and the
//! logical combinations of CustomResourceDefinitions, worded as Kubernetes words them.

use super::path::Path;
use super::strict::{MAX_DEPTH, MAX_PROBLEMS, cause};
use super::{Checks, ListKind, ObjectShape, Schema, Shape, Types};
use crate::status::Cause;
use regex::Regex;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::sync::{LazyLock, Mutex, PoisonError};

/// What is wrong with the values of an object whose types are right. The `status` of kinds with named types is written
/// by this program alone and only looked at for allowed values, not for completeness.
pub fn validate_values(schema: &Schema, types: &Types, value: &Value) -> Vec<Cause> {
    let mut found = Found { types, causes: Vec::new() };
    found.look(schema, value, &Path::Root);
    found.causes
}

struct Found<'a> {
    types: &'a Types,
    causes: Vec<Cause>,
}

impl Found<'_> {
    fn add(&mut self, reason: &str, path: &Path, message: String) {
        if self.causes.len() < MAX_PROBLEMS {
            self.causes.push(cause(reason, path, message));
        }
    }

    fn look(&mut self, schema: &Schema, value: &Value, path: &Path) {
        // Checks may stand beside a reference or on what it refers to.
        self.checks(schema, value, path);
        let resolved = self.types.resolve(schema);
        if !std::ptr::eq(schema, resolved) {
            self.checks(resolved, value, path);
        }
        if path.depth() >= MAX_DEPTH || self.causes.len() >= MAX_PROBLEMS {
            return;
        }
        match (&resolved.shape, value) {
            (Shape::Object(object), Value::Object(fields)) => self.object(object, fields, path),
            (Shape::Map(values), Value::Object(fields)) => {
                for (name, value) in fields {
                    self.look(values, value, &path.field(name));
                }
            }
            (Shape::List { items, kind, strategic }, Value::Array(list)) => {
                if strategic.is_none() {
                    self.unique(kind, list, path);
                }
                for (index, value) in list.iter().enumerate() {
                    self.look(items, value, &path.index(index));
                }
            }
            _ => {}
        }
    }

    fn object(&mut self, object: &ObjectShape, fields: &Map<String, Value>, path: &Path) {
        for name in &object.required {
            if fields
                .get(name)
                .is_none_or(|value| value.is_null() && !object.fields.get(name).is_some_and(|f| f.nullable))
            {
                self.add("FieldValueRequired", &path.field(name), "Required value".to_owned());
            }
        }
        for (name, value) in fields {
            let Some(field) = object.fields.get(name).or(object.values.as_ref()) else { continue };
            let own_status = matches!(path, Path::Root) && name == "status" && matches!(field.shape, Shape::Ref(_));
            if !own_status {
                self.look(field, value, &path.field(name));
            }
        }
    }

    fn checks(&mut self, schema: &Schema, value: &Value, path: &Path) {
        if value.is_null() {
            return;
        }
        if !schema.one_of.is_empty() && !schema.one_of.contains(value) {
            let allowed: Vec<String> = schema.one_of.iter().map(Value::to_string).collect();
            let message = format!("Unsupported value: {value}: supported values: {}", allowed.join(", "));
            self.add("FieldValueNotSupported", path, message);
        }
        let checks = &schema.checks;
        match value {
            Value::String(text) => self.text(checks, text, path),
            Value::Number(number) => self.number(checks, number.as_f64().unwrap_or(0.0), value, path),
            Value::Array(list) => {
                self.count(checks.min_items, checks.max_items, list.len(), "items", path);
                if checks.unique_items {
                    self.unique(&ListKind::Set, list, path);
                }
            }
            Value::Object(fields) => {
                self.count(checks.min_properties, checks.max_properties, fields.len(), "properties", path);
            }
            _ => {}
        }
        if let Some(logic) = &checks.logic {
            for message in broken_logic(logic, value, MAX_DEPTH) {
                let shown = if value.is_object() || value.is_array() { "\"\"".to_owned() } else { value.to_string() };
                self.add("FieldValueInvalid", path, format!("Invalid value: {shown}: \"{path}\" {message}"));
            }
        }
    }

    fn text(&mut self, checks: &Checks, text: &str, path: &Path) {
        let length = text.chars().count() as u64;
        if let Some(min) = checks.min_length.filter(|min| length < *min) {
            let message = format!("Invalid value: {text:?}: {path} in body should be at least {min} chars long");
            self.add("FieldValueInvalid", path, message);
        }
        if let Some(max) = checks.max_length.filter(|max| length > *max) {
            self.add("FieldValueTooLong", path, format!("Too long: may not be more than {max} bytes"));
        }
        if let Some(pattern) = checks.pattern.as_deref().filter(|pattern| !matches(pattern, text)) {
            let message = format!("Invalid value: {text:?}: {path} in body should match '{pattern}'");
            self.add("FieldValueInvalid", path, message);
        }
    }

    fn number(&mut self, checks: &Checks, number: f64, value: &Value, path: &Path) {
        if let Some(min) = checks.minimum
            && (number < min || (checks.exclusive_minimum && number == min))
        {
            let than = if checks.exclusive_minimum { "greater than" } else { "greater than or equal to" };
            self.add(
                "FieldValueInvalid",
                path,
                format!("Invalid value: {value}: {path} in body should be {than} {min}"),
            );
        }
        if let Some(max) = checks.maximum
            && (number > max || (checks.exclusive_maximum && number == max))
        {
            let than = if checks.exclusive_maximum { "less than" } else { "less than or equal to" };
            self.add(
                "FieldValueInvalid",
                path,
                format!("Invalid value: {value}: {path} in body should be {than} {max}"),
            );
        }
        if let Some(step) = checks.multiple_of.filter(|step| !is_multiple(number, *step)) {
            let message = format!("Invalid value: {value}: {path} in body should be a multiple of {step}");
            self.add("FieldValueInvalid", path, message);
        }
    }

    fn count(&mut self, min: Option<u64>, max: Option<u64>, count: usize, what: &str, path: &Path) {
        if let Some(min) = min.filter(|min| (count as u64) < *min) {
            let message = format!("Invalid value: {count}: {path} in body should have at least {min} {what}");
            self.add("FieldValueInvalid", path, message);
        }
        if let Some(max) = max.filter(|max| count as u64 > *max) {
            self.add("FieldValueTooMany", path, format!("Too many: {count}: must have at most {max} items"));
        }
    }

    fn unique(&mut self, kind: &ListKind, list: &[Value], path: &Path) {
        let mut seen = HashSet::new();
        for (index, item) in list.iter().enumerate() {
            let key = match kind {
                ListKind::Atomic => return,
                ListKind::Set => item.to_string(),
                ListKind::Map(keys) => {
                    let of = keys.iter().filter_map(|key| Some((key.clone(), item.get(key)?.clone())));
                    Value::Object(of.collect()).to_string()
                }
            };
            if !seen.insert(key.clone()) {
                self.add("FieldValueDuplicate", &path.index(index), format!("Duplicate value: {key}"));
            }
        }
    }
}

fn is_multiple(number: f64, step: f64) -> bool {
    let ratio = number / step;
    step == 0.0 || (ratio - ratio.round()).abs() < 1e-9
}

/// Whether `text` matches `pattern` anywhere; a pattern that cannot be read matches everything (definitions with such
/// patterns are refused when they are made).
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    const CACHED: usize = 512;
    static PATTERNS: LazyLock<Mutex<HashMap<String, Option<Regex>>>> = LazyLock::new(Mutex::default);
    let mut cache = PATTERNS.lock().unwrap_or_else(PoisonError::into_inner);
    if cache.len() >= CACHED && !cache.contains_key(pattern) {
        cache.clear();
    }
    let compiled = cache.entry(pattern.to_owned()).or_insert_with(|| Regex::new(pattern).ok()).clone();
    drop(cache);
    compiled.is_none_or(|regex| regex.is_match(text))
}

/// What `allOf`, `anyOf`, `oneOf` and `not` in `logic` have against `value`.
fn broken_logic(logic: &Value, value: &Value, left: usize) -> Vec<String> {
    let list = |key: &str| logic.get(key).and_then(Value::as_array);
    let valid = |key: &str| list(key).map(|all| all.iter().filter(|one| holds(one, value, left)).count());
    let mut broken = Vec::new();
    if let (Some(all), Some(valid)) = (list("allOf"), valid("allOf"))
        && valid < all.len()
    {
        broken.push("must validate all the schemas (allOf)".to_owned());
    }
    if valid("anyOf") == Some(0) {
        broken.push("must validate at least one schema (anyOf)".to_owned());
    }
    match valid("oneOf") {
        Some(0) => broken.push("must validate one and only one schema (oneOf). Found none valid".to_owned()),
        Some(many) if many > 1 => {
            broken.push(format!("must validate one and only one schema (oneOf). Found {many} valid alternatives"));
        }
        _ => {}
    }
    if logic.get("not").is_some_and(|not| holds(not, value, left)) {
        broken.push("must not validate the schema (not)".to_owned());
    }
    broken
}

/// Whether `value` fits a piece of JSON schema as it may stand inside `allOf`, `anyOf`, `oneOf` and `not`.
fn holds(schema: &Value, value: &Value, left: usize) -> bool {
    if left == 0 {
        return false;
    }
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let flag = |key: &str| schema.get(key).and_then(Value::as_bool).unwrap_or(false);
    let in_range = |count: usize, min: &str, max: &str| {
        number(min).is_none_or(|min| count as f64 >= min) && number(max).is_none_or(|max| count as f64 <= max)
    };
    let right_type = match schema.get("type").and_then(Value::as_str) {
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => true,
    };
    let allowed = schema.get("enum").and_then(Value::as_array).is_none_or(|all| all.contains(value));
    let fits = match value {
        Value::String(text) => {
            let pattern = schema.get("pattern").and_then(Value::as_str);
            pattern.is_none_or(|pattern| matches(pattern, text))
                && in_range(text.chars().count(), "minLength", "maxLength")
        }
        Value::Number(found) => {
            let found = found.as_f64().unwrap_or(0.0);
            number("minimum").is_none_or(|min| if flag("exclusiveMinimum") { found > min } else { found >= min })
                && number("maximum").is_none_or(|max| if flag("exclusiveMaximum") { found < max } else { found <= max })
                && number("multipleOf").is_none_or(|step| is_multiple(found, step))
        }
        Value::Array(list) => {
            in_range(list.len(), "minItems", "maxItems")
                && schema.get("items").is_none_or(|items| list.iter().all(|item| holds(items, item, left - 1)))
        }
        Value::Object(fields) => {
            let required =
                schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
            let properties = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
            in_range(fields.len(), "minProperties", "maxProperties")
                && required.into_iter().all(|name| fields.contains_key(name))
                && properties
                    .into_iter()
                    .all(|(name, field)| fields.get(name).is_none_or(|value| holds(field, value, left - 1)))
        }
        _ => true,
    };
    right_type && allowed && fits && broken_logic(schema, value, left - 1).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn told(type_name: &str, value: Value) -> Vec<String> {
        let causes = validate_values(&builtin::schema(type_name), &builtin::types(), &value);
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn values_of_routes_and_machines() {
        let route = json!({"spec": {"parentRefs": [{"name": ""}], "rules": [{"matches": [{"path": {"type": "Prefix"}, "method": "GET"}],
            "backendRefs": [{"port": 70000}]}]}, "status": {}});
        assert_eq!(
            told("io.k8s.networking.gateway.v1.HTTPRoute", route),
            [
                "spec.parentRefs[0].name: Invalid value: \"\": spec.parentRefs[0].name in body should be at least 1 chars long",
                "spec.rules[0].backendRefs[0].name: Required value",
                "spec.rules[0].backendRefs[0].port: Invalid value: 70000: spec.rules[0].backendRefs[0].port in body should be less \
                 than or equal to 65535",
                "spec.rules[0].matches[0].path.type: Unsupported value: \"Prefix\": supported values: \"Exact\", \"PathPrefix\", \
                 \"RegularExpression\"",
            ]
        );
        let machine =
            json!({"spec": {"template": {"spec": {"domain": {"devices": {"disks": [{"name": "a"}, {"name": "a"}]}}}}}});
        assert_eq!(
            told("io.kubevirt.v1.VirtualMachine", machine),
            ["spec.template.spec.domain.devices.disks[1]: Duplicate value: {\"name\":\"a\"}"]
        );
        assert_eq!(
            told("io.k8s.api.apps.v1.Deployment", json!({"spec": {}})),
            ["spec.selector: Required value", "spec.template: Required value"]
        );
    }

    #[test]
    fn logic() {
        let logic = json!({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "not": {"properties": {"a": {"enum": [3]}}, "required": ["a"]}});
        assert!(broken_logic(&logic, &json!({"a": 1}), 9).is_empty());
        assert_eq!(broken_logic(&logic, &json!({"a": 3, "b": 1}), 9).len(), 2);
        assert_eq!(
            broken_logic(&json!({"anyOf": [{"type": "string", "pattern": "^a"}, {"minimum": 3}]}), &json!("b"), 9)
                .len(),
            0
        );
        assert_eq!(
            broken_logic(&json!({"anyOf": [{"type": "string", "pattern": "^a"}, {"type": "integer"}]}), &json!("b"), 9)
                .len(),
            1
        );
    }
}
