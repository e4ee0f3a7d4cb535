//! `Table`: objects as the rows that `kubectl get` prints.

use crate::kind::{Cell, Column, Kind};
use crate::object::{Object, SharedObject};
use crate::{jsonpath, time};
use serde_json::{Value, json};

/// How much of each object a row carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

/// A `meta.k8s.io/v1` `Table` of `items`; `list_meta` becomes its metadata, `now` is unix seconds.
pub fn table(kind: &Kind, items: &[SharedObject], list_meta: Value, include: Include, now: i64) -> Value {
    let rows: Vec<Value> = items
        .iter()
        .map(|object| match include {
            Include::None => json!({"cells": cells(kind, object, now)}),
            Include::Metadata => json!({"cells": cells(kind, object, now), "object": {"kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1", "metadata": object.get("metadata")}}),
            Include::Object => json!({"cells": cells(kind, object, now), "object": **object}),
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_meta, "columnDefinitions": columns(kind),
           "rows": rows})
}

/// The column definitions.
pub fn columns(kind: &Kind) -> Value {
    let all = kind.columns.iter().map(|Column { name, kind, format, description, priority, .. }| {
        json!({"name": name, "type": shown_type(kind), "format": format, "description": description, "priority": priority})
    });
    all.collect()
}

/// Ages are sent as text.
fn shown_type(kind: &str) -> &str {
    if kind == "date" { "string" } else { kind }
}

/// One object's cells, in the order of the columns.
pub fn cells(kind: &Kind, object: &Object, now: i64) -> Vec<Value> {
    let cell = |column: &Column| match &column.cell {
        Cell::Code(code) => code(object, now),
        Cell::Path(path) => match jsonpath::find(object, path).first() {
            Some(value) => from_path(&column.kind, value, now),
            None => Value::Null,
        },
    };
    kind.columns.iter().map(cell).collect()
}

fn from_path(kind: &str, value: &Value, now: i64) -> Value {
    match kind {
        "string" => match value {
            Value::String(_) => value.clone(),
            Value::Null => "".into(),
            other => other.to_string().into(),
        },
        "integer" => match value.as_f64() {
            Some(number) => value.as_i64().unwrap_or(number as i64).into(),
            None => Value::Null,
        },
        "number" if value.is_number() => value.clone(),
        "boolean" if value.is_boolean() => value.clone(),
        "date" => match value.as_str() {
            Some(text) if time::parse(text).is_some() => time::age(text, now).into(),
            _ => "<unknown>".into(),
        },
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_table_of_machines() {
        let kind = crate::kinds::builtin().into_iter().find(|k| k.kind == "VirtualMachine").unwrap();
        let machine = json!({"metadata": {"name": "db", "creationTimestamp": "1970-01-01T00:00:00Z"},
            "status": {"printableStatus": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        let table = table(&kind, &[Arc::new(machine)], json!({"resourceVersion": "7"}), Include::Metadata, 60);
        assert_eq!(table["rows"][0]["cells"], json!(["db", "60s", "Running", "True"]));
        assert_eq!(table["rows"][0]["object"]["metadata"]["name"], "db");
        assert_eq!(table["columnDefinitions"][0]["format"], "name");
        assert_eq!(table["metadata"]["resourceVersion"], "7");
    }
}
