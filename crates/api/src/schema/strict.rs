//! Holding an object against its schema: unknown fields and wrong types ([`check`]), removal of what is not known
//! ([`prune`]), default values ([`apply_defaults`]) and checks of values ([`validate_values`], in `values`).
//!
//! A `null` reads as an absent field, as it does for Kubernetes' own types, unless the schema says `nullable`.
//! All functions are bounded: objects nested deeper than [`MAX_DEPTH`] are refused, at most [`MAX_PROBLEMS`] problems are
//! told.

use super::path::Path;
use super::{ObjectShape, Schema, Shape, Types};
use crate::quantity::Quantity;
use crate::status::Cause;
use crate::{names, time};
use base64::Engine;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use super::values::validate_values;

pub const MAX_DEPTH: usize = 64;
pub const MAX_PROBLEMS: usize = 100;

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Paths, `spec.template.spec.containers[0].imagee`.
    pub unknown_fields: Vec<String>,
    pub type_errors: Vec<Cause>,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.unknown_fields.is_empty() && self.type_errors.is_empty()
    }
    /// One text per unknown field: `unknown field "spec.foo"`, what `fieldValidation=Warn` sends as warnings.
    pub fn warnings(&self) -> Vec<String> {
        self.unknown_fields.iter().map(|path| format!("unknown field \"{path}\"")).collect()
    }
    /// `strict decoding error: unknown field "spec.foo", unknown field "spec.bar"`; `None` without unknown fields.
    /// `duplicates` are paths of fields that the text of the request had twice.
    pub fn strict_error(&self, duplicates: &[String]) -> Option<String> {
        let mut all: Vec<String> = duplicates.iter().map(|path| format!("duplicate field \"{path}\"")).collect();
        all.extend(self.warnings());
        (!all.is_empty()).then(|| format!("strict decoding error: {}", all.join(", ")))
    }
}

/// Unknown fields and values of the wrong type.
pub fn check(schema: &Schema, types: &Types, value: &Value) -> Report {
    let mut report = Report::default();
    check_at(schema, types, value, &Path::Root, &mut report);
    report
}

fn check_at(schema: &Schema, types: &Types, value: &Value, path: &Path, report: &mut Report) {
    let schema = types.resolve(schema);
    if value.is_null() || report.type_errors.len() >= MAX_PROBLEMS {
        return;
    }
    let nested = value.is_object() || value.is_array();
    if nested && path.depth() >= MAX_DEPTH {
        let message = format!("Invalid value: nested deeper than {MAX_DEPTH} levels");
        report.type_errors.push(cause("FieldValueInvalid", path, message));
        return;
    }
    match (&schema.shape, value) {
        (Shape::Any, _) => deep_enough(value, path, report),
        (Shape::Object(object), Value::Object(fields)) => {
            for (name, value) in fields {
                let at = path.field(name);
                match (object.fields.get(name), &object.values) {
                    (Some(field), _) => check_at(field, types, value, &at, report),
                    (None, Some(values)) => check_at(values, types, value, &at, report),
                    (None, None) if object.keep_unknown => deep_enough(value, &at, report),
                    (None, None) if value.is_null() => {}
                    (None, None) => {
                        if report.unknown_fields.len() < MAX_PROBLEMS {
                            report.unknown_fields.push(at.to_string());
                        }
                    }
                }
            }
        }
        (Shape::Map(values), Value::Object(fields)) => {
            for (name, value) in fields {
                check_at(values, types, value, &path.field(name), report);
            }
        }
        (Shape::List { items, .. }, Value::Array(list)) => {
            for (index, value) in list.iter().enumerate() {
                let at = path.index(index);
                if value.is_null() && !types.resolve(items).nullable {
                    wrong_type(types.resolve(items), value, &at, report);
                }
                check_at(items, types, value, &at, report);
            }
        }
        _ => {
            if let Err(problem) = scalar(schema, value) {
                match problem {
                    Problem::Type => wrong_type(schema, value, path, report),
                    Problem::Text(text) => {
                        report.type_errors.push(cause(
                            "FieldValueInvalid",
                            path,
                            format!("Invalid value: {value}: {text}"),
                        ));
                    }
                }
            }
        }
    }
}

/// Values without a schema still must not be nested too deeply.
fn deep_enough(value: &Value, path: &Path, report: &mut Report) {
    fn depth(value: &Value, left: usize) -> bool {
        match value {
            Value::Array(list) => left > 0 && list.iter().all(|item| depth(item, left - 1)),
            Value::Object(fields) => left > 0 && fields.values().all(|item| depth(item, left - 1)),
            _ => true,
        }
    }
    if !depth(value, MAX_DEPTH.saturating_sub(path.depth())) {
        let message = format!("Invalid value: nested deeper than {MAX_DEPTH} levels");
        report.type_errors.push(cause("FieldValueInvalid", path, message));
    }
}

enum Problem {
    Type,
    Text(String),
}

fn scalar(schema: &Schema, value: &Value) -> Result<(), Problem> {
    let fits = |fits: bool| if fits { Ok(()) } else { Err(Problem::Type) };
    match &schema.shape {
        Shape::Boolean => fits(value.is_boolean()),
        Shape::Number => fits(value.is_number()),
        Shape::Integer { format } => match value.as_i64() {
            Some(number) if format == "int32" && i32::try_from(number).is_err() => {
                Err(Problem::Text("must be a 32-bit integer".to_owned()))
            }
            Some(_) => Ok(()),
            None => fits(value.is_u64()),
        },
        Shape::String { format } => match (value.as_str(), format.as_str()) {
            (None, _) => Err(Problem::Type),
            (Some(text), "date-time") if time::parse(text).is_none() => {
                Err(Problem::Text("must be a time such as 2006-01-02T15:04:05Z".to_owned()))
            }
            (Some(text), _) if !has_format(text, format) => Err(Problem::Text(format!("must be of type {format}"))),
            (Some(text), "byte") if base64::engine::general_purpose::STANDARD.decode(text).is_err() => {
                Err(Problem::Text("must be base64 data".to_owned()))
            }
            _ => Ok(()),
        },
        Shape::IntOrString => fits(value.is_i64() || value.is_string()),
        Shape::Quantity => match value {
            Value::String(_) | Value::Number(_) => {
                Quantity::from_value(value).map(drop).map_err(|error| Problem::Text(error.to_string()))
            }
            _ => Err(Problem::Type),
        },
        Shape::Any | Shape::Ref(_) => Ok(()),
        Shape::Object(_) | Shape::Map(_) | Shape::List { .. } => Err(Problem::Type),
    }
}

/// The formats of text that are checked; others are notes.
fn has_format(text: &str, format: &str) -> bool {
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    match format {
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => text.split_once('/').is_some_and(|(address, bits)| {
            let most = if address.contains(':') { 128 } else { 32 };
            address.parse::<IpAddr>().is_ok() && bits.parse::<u8>().is_ok_and(|bits| bits <= most)
        }),
        "date" => text.len() == 10 && time::parse(&format!("{text}T00:00:00Z")).is_some(),
        "hostname" => names::dns_subdomain(&text.to_ascii_lowercase()).is_empty(),
        "uuid" => {
            let parts: Vec<usize> = text.split('-').map(str::len).collect();
            (parts == [8, 4, 4, 4, 12] || parts == [32]) && text.split('-').all(hex)
        }
        "mac" => {
            let parts: Vec<&str> = text.split([':', '-']).collect();
            parts.len() == 6 && parts.iter().all(|part| part.len() == 2 && hex(part))
        }
        _ => true,
    }
}

/// The JSON type a schema wants, as messages name it.
fn type_name(schema: &Schema) -> &'static str {
    match schema.shape {
        Shape::Any | Shape::Ref(_) => "any",
        Shape::Boolean => "boolean",
        Shape::Integer { .. } => "integer",
        Shape::Number => "number",
        Shape::String { .. } => "string",
        Shape::IntOrString => "integer or string",
        Shape::Quantity => "quantity",
        Shape::Object(_) | Shape::Map(_) => "object",
        Shape::List { .. } => "array",
    }
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn wrong_type(schema: &Schema, value: &Value, path: &Path, report: &mut Report) {
    let (wanted, found) = (type_name(schema), json_type(value));
    let message = format!("Invalid value: \"{found}\": {path} in body must be of type {wanted}: \"{found}\"");
    report.type_errors.push(cause("FieldValueTypeInvalid", path, message));
}

pub(super) fn cause(reason: &str, path: &Path, message: String) -> Cause {
    let field = match path {
        Path::Root => "<nil>".to_owned(),
        path => path.to_string(),
    };
    Cause { reason: reason.to_owned(), message, field }
}

/// Removes fields that are not known and nulls that mean "absent", and writes quantities in their canonical form, as
/// Kubernetes does when it reads them: `0.5` becomes `500m`.
pub fn prune(schema: &Schema, types: &Types, value: &mut Value) {
    prune_at(schema, types, value, MAX_DEPTH);
}

fn prune_at(schema: &Schema, types: &Types, value: &mut Value, left: usize) {
    let schema = types.resolve(schema);
    if left == 0 {
        return;
    }
    let kept = |field: &Schema, value: &Value| !value.is_null() || field.nullable || types.resolve(field).nullable;
    match (&schema.shape, value) {
        (Shape::Quantity, value) => {
            if let Ok(quantity) = Quantity::from_value(value) {
                *value = quantity.to_string().into();
            }
        }
        (Shape::Object(object), Value::Object(fields)) => {
            fields.retain(|name, value| match (object.fields.get(name), &object.values) {
                (Some(field), _) | (None, Some(field)) => {
                    kept(field, value) || matches!(types.resolve(field).shape, Shape::Any)
                }
                (None, None) => object.keep_unknown,
            });
            for (name, value) in fields {
                if let Some(field) = object.fields.get(name).or(object.values.as_ref()) {
                    prune_at(field, types, value, left - 1);
                }
            }
        }
        (Shape::Map(values), Value::Object(fields)) => {
            fields.retain(|_, value| kept(values, value) || matches!(types.resolve(values).shape, Shape::Any));
            for value in fields.values_mut() {
                prune_at(values, types, value, left - 1);
            }
        }
        (Shape::List { items, .. }, Value::Array(list)) => {
            for value in list {
                prune_at(items, types, value, left - 1);
            }
        }
        _ => {}
    }
}

/// Fills the default values of fields that are absent (or null without being nullable) in objects that are there.
pub fn apply_defaults(schema: &Schema, types: &Types, value: &mut Value) {
    defaults_at(schema, types, value, MAX_DEPTH);
}

fn defaults_at(schema: &Schema, types: &Types, value: &mut Value, left: usize) {
    let schema = types.resolve(schema);
    if left == 0 {
        return;
    }
    match (&schema.shape, value) {
        (Shape::Object(object), Value::Object(fields)) => {
            for (name, field) in &object.fields {
                let Some(default) = &field.default else { continue };
                let absent = match fields.get(name) {
                    None => true,
                    Some(value) => value.is_null() && !field.nullable,
                };
                if absent {
                    fields.insert(name.clone(), default.clone());
                }
            }
            fill(object, types, fields, left);
        }
        (Shape::Map(values), Value::Object(fields)) => {
            for value in fields.values_mut() {
                defaults_at(values, types, value, left - 1);
            }
        }
        (Shape::List { items, .. }, Value::Array(list)) => {
            for value in list {
                defaults_at(items, types, value, left - 1);
            }
        }
        _ => {}
    }
}

fn fill(object: &ObjectShape, types: &Types, fields: &mut serde_json::Map<String, Value>, left: usize) {
    for (name, value) in fields {
        if let Some(field) = object.fields.get(name).or(object.values.as_ref()) {
            defaults_at(field, types, value, left - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn pod(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "creationTimestamp": null}, "spec": spec})
    }

    #[test]
    fn unknown_fields_and_wrong_types_are_named_with_their_paths() {
        let (types, schema) = (builtin::types(), builtin::schema("io.k8s.api.core.v1.Pod"));
        let good = pod(
            json!({"containers": [{"name": "a", "image": "b", "resources": {"limits": {"cpu": 1, "memory": "1Gi"}},
            "ports": [{"containerPort": 80}], "livenessProbe": {"httpGet": {"port": "http"}}}], "nodeSelector": {"a": "b"}}),
        );
        assert_eq!(check(&schema, &types, &good), Report::default());
        let bad = pod(json!({"containers": [{"name": 1, "imagee": "b", "resources": {"limits": {"cpu": "x"}},
            "ports": [{"containerPort": "80"}, null]}], "replicas": 1, "nodeSelector": {"a": true}}));
        let report = check(&schema, &types, &bad);
        assert_eq!(report.unknown_fields, ["spec.containers[0].imagee", "spec.replicas"]);
        let fields: Vec<&str> = report.type_errors.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "spec.containers[0].name",
                "spec.containers[0].ports[0].containerPort",
                "spec.containers[0].ports[1]",
                "spec.containers[0].resources.limits.cpu",
                "spec.nodeSelector.a"
            ]
        );
        assert_eq!(
            report.type_errors[0].message,
            "Invalid value: \"integer\": spec.containers[0].name in body must be of type string: \"integer\""
        );
        assert_eq!(
            report.strict_error(&["spec.x".into()]).unwrap(),
            "strict decoding error: duplicate field \"spec.x\", unknown field \"spec.containers[0].imagee\", unknown field \
             \"spec.replicas\""
        );
    }

    #[test]
    fn prunes_and_fills() {
        let (types, schema) = (builtin::types(), builtin::schema("io.k8s.api.core.v1.Pod"));
        let mut object =
            pod(json!({"containers": [{"name": "a", "foo": 1, "ports": [{"containerPort": 1}]}], "nodeName": null}));
        prune(&schema, &types, &mut object);
        apply_defaults(&schema, &types, &mut object);
        let expected = json!({"containers": [{"name": "a", "ports": [{"containerPort": 1, "protocol": "TCP"}], "resources": {},
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
            "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "schedulerName": "default-scheduler", "securityContext": {},
            "terminationGracePeriodSeconds": 30});
        assert_eq!(object["spec"], expected);
        assert_eq!(object["metadata"], json!({"name": "a"}));
    }

    #[test]
    fn quantities_become_canonical() {
        let (types, schema) = (builtin::types(), builtin::schema("io.k8s.api.core.v1.ResourceRequirements"));
        let mut resources =
            json!({"limits": {"cpu": 0.5, "memory": "1024Mi", "x": "not a quantity"}, "requests": {"cpu": 1}});
        prune(&schema, &types, &mut resources);
        let expected =
            json!({"limits": {"cpu": "500m", "memory": "1Gi", "x": "not a quantity"}, "requests": {"cpu": "1"}});
        assert_eq!(resources, expected);
    }

    #[test]
    fn formats_of_text() {
        let good = [
            ("ipv4", "1.2.3.4"),
            ("ipv6", "::1"),
            ("cidr", "10.0.0.0/8"),
            ("date", "2020-02-29"),
            ("hostname", "a.b"),
            ("uuid", "5d307ca9-b3ef-428c-8861-06e72d69f223"),
            ("mac", "52:54:00:12:34:56"),
            ("password", "x"),
        ];
        for (format, text) in good {
            assert!(has_format(text, format), "{format}");
            assert!(format == "password" || !has_format("?", format), "{format}");
        }
    }

    #[test]
    fn deep_objects_are_refused_not_followed() {
        let (types, schema) = (
            builtin::types(),
            builtin::schema("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps"),
        );
        let mut value = json!({});
        for _ in 0..200 {
            value = json!({"not": value});
        }
        assert_eq!(check(&schema, &types, &value).type_errors.len(), 1);
        prune(&schema, &types, &mut value);
        apply_defaults(&schema, &types, &mut value);
        assert!(validate_values(&schema, &types, &value).len() <= 1);
        let mut free = json!({});
        for _ in 0..200 {
            free = json!([free]);
        }
        assert_eq!(check(&Schema::default(), &types, &free).type_errors.len(), 1);
    }
}
