//! Reading fields and collecting what is wrong with them.

use crate::status::Cause;
use serde_json::{Map, Value};

/// Problems told at most; an object with more is hostile or hopeless.
const MAX: usize = 100;

/// Causes in Kubernetes' words.
#[derive(Default)]
pub struct Problems {
    causes: Vec<Cause>,
}

impl Problems {
    pub fn into_causes(self) -> Vec<Cause> {
        self.causes
    }

    fn add(&mut self, reason: &str, path: &str, message: String) {
        if self.causes.len() < MAX {
            self.causes.push(Cause { reason: reason.to_owned(), message, field: path.to_owned() });
        }
    }
    pub fn required(&mut self, path: &str, detail: &str) {
        let text = if detail.is_empty() { "Required value".to_owned() } else { format!("Required value: {detail}") };
        self.add("FieldValueRequired", path, text);
    }
    pub fn invalid(&mut self, path: &str, value: &Value, detail: &str) {
        self.add("FieldValueInvalid", path, format!("Invalid value: {value}: {detail}"));
    }
    pub fn invalid_text(&mut self, path: &str, value: &str, detail: &str) {
        self.invalid(path, &value.into(), detail);
    }
    pub fn unsupported(&mut self, path: &str, value: &str, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|text| format!("{text:?}")).collect();
        let text = format!("Unsupported value: {value:?}: supported values: {}", list.join(", "));
        self.add("FieldValueNotSupported", path, text);
    }
    pub fn duplicate(&mut self, path: &str, value: &Value) {
        self.add("FieldValueDuplicate", path, format!("Duplicate value: {value}"));
    }
    pub fn not_found(&mut self, path: &str, value: &str) {
        self.add("FieldValueNotFound", path, format!("Not found: {value:?}"));
    }
    pub fn forbidden(&mut self, path: &str, detail: &str) {
        self.add("FieldValueForbidden", path, format!("Forbidden: {detail}"));
    }
    pub fn too_long(&mut self, path: &str, limit: usize) {
        self.add("FieldValueTooLong", path, format!("Too long: may not be more than {limit} bytes"));
    }

    /// Runs one of the rules of [`crate::names`].
    pub fn rule(&mut self, path: &str, value: &str, rule: fn(&str) -> Vec<String>) {
        for problem in rule(value) {
            self.invalid_text(path, value, &problem);
        }
    }
    /// A rule for a field that may be absent or empty.
    pub fn optional_rule(&mut self, path: &str, value: &str, rule: fn(&str) -> Vec<String>) {
        if !value.is_empty() {
            self.rule(path, value, rule);
        }
    }
    /// One of a few words; empty is fine where a default fills it.
    pub fn one_of(&mut self, path: &str, value: &str, supported: &[&str]) {
        if !value.is_empty() && !supported.contains(&value) {
            self.unsupported(path, value, supported);
        }
    }
    pub fn at_least(&mut self, path: &str, value: Option<i64>, least: i64) {
        if let Some(value) = value.filter(|value| *value < least) {
            self.invalid(path, &value.into(), &format!("must be greater than or equal to {least}"));
        }
    }
    pub fn port(&mut self, path: &str, value: i64) {
        if !(1..=65535).contains(&value) {
            self.invalid(path, &value.into(), "must be between 1 and 65535, inclusive");
        }
    }
    /// A port number or the name of a port.
    pub fn port_or_name(&mut self, path: &str, value: &Value) {
        match value {
            Value::Number(number) => self.port(path, number.as_i64().unwrap_or(0)),
            Value::String(name) => self.rule(path, name, crate::names::port_name),
            _ => {}
        }
    }
    pub fn labels(&mut self, path: &str, labels: &Value) {
        for (key, value) in labels.as_object().into_iter().flatten() {
            self.rule(path, key, crate::names::qualified_name);
            self.rule(path, value.as_str().unwrap_or(""), crate::names::label_value);
        }
    }
    /// A `LabelSelector`.
    pub fn selector(&mut self, path: &str, selector: &Value) {
        self.labels(&format!("{path}.matchLabels"), at(selector, "matchLabels"));
        for (index, expression) in items(selector, "matchExpressions").iter().enumerate() {
            let path = format!("{path}.matchExpressions[{index}]");
            let (operator, count) = (text(expression, "operator"), items(expression, "values").len());
            match operator {
                "In" | "NotIn" if count == 0 => {
                    self.required(&format!("{path}.values"), "must be specified when `operator` is 'In' or 'NotIn'");
                }
                "Exists" | "DoesNotExist" if count > 0 => {
                    let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                    self.forbidden(&format!("{path}.values"), detail);
                }
                "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
                _ => self.invalid_text(&format!("{path}.operator"), operator, "not a valid selector operator"),
            }
            self.rule(&format!("{path}.key"), text(expression, "key"), crate::names::qualified_name);
        }
    }
    pub fn immutable(&mut self, path: &str, new: &Value, old: &Value) {
        if new != old {
            self.invalid(path, new, "field is immutable");
        }
    }
}

const NULL: &Value = &Value::Null;

/// The field, or `null`.
pub fn at<'a>(value: &'a Value, field: &str) -> &'a Value {
    value.get(field).unwrap_or(NULL)
}

/// The value at a JSON pointer, or `null`.
pub fn pointer<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or(NULL)
}

pub fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    at(value, field).as_str().unwrap_or("")
}

pub fn int(value: &Value, field: &str) -> Option<i64> {
    at(value, field).as_i64()
}

pub fn flag(value: &Value, field: &str) -> bool {
    at(value, field).as_bool().unwrap_or(false)
}

pub fn items<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    at(value, field).as_array().map(Vec::as_slice).unwrap_or_default()
}

pub fn has(value: &Value, field: &str) -> bool {
    !at(value, field).is_null()
}

/// Which of `fields` are there.
pub fn present<'a>(value: &Value, fields: &[&'a str]) -> Vec<&'a str> {
    fields.iter().copied().filter(|field| has(value, field)).collect()
}

/// Sets a field that is absent.
pub fn fill(map: &mut Map<String, Value>, field: &str, value: impl Into<Value>) {
    if map.get(field).is_none_or(Value::is_null) {
        map.insert(field.to_owned(), value.into());
    }
}

pub fn object_mut<'a>(value: &'a mut Value, pointer: &str) -> Option<&'a mut Map<String, Value>> {
    value.pointer_mut(pointer)?.as_object_mut()
}

pub fn items_mut<'a>(map: &'a mut Map<String, Value>, field: &str) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    map.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}
