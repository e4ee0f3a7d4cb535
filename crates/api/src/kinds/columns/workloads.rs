//! Columns of Deployments and ReplicaSets.

use super::{age_column, code, list, name_column, number};
use crate::kind::Column;
use crate::object::{Meta, Object};
use crate::selector::Selector;
use serde_json::Value;

fn of_containers(object: &Object, field: &str) -> Value {
    let containers = list(object, "/spec/template/spec/containers");
    containers.iter().map(|container| container.str_at(field)).collect::<Vec<_>>().join(",").into()
}

fn selector(object: &Object) -> Value {
    let selector = object.pointer("/spec/selector").unwrap_or(&Value::Null);
    match Selector::from_object(selector) {
        Ok(selector) if !selector.requirements.is_empty() => selector.to_string().into(),
        Ok(_) => "<none>".into(),
        Err(_) => "<error>".into(),
    }
}

fn wide() -> [Column; 3] {
    [
        code("Containers", "string", 1, |object, _| of_containers(object, "/name")),
        code("Images", "string", 1, |object, _| of_containers(object, "/image")),
        code("Selector", "string", 1, |object, _| selector(object)),
    ]
}

pub fn deployment() -> Vec<Column> {
    let mut columns = vec![
        name_column(),
        code("Ready", "string", 0, |object, _| {
            format!("{}/{}", number(object, "/status/readyReplicas"), number(object, "/spec/replicas")).into()
        }),
        code("Up-to-date", "integer", 0, |object, _| number(object, "/status/updatedReplicas").into()),
        code("Available", "integer", 0, |object, _| number(object, "/status/availableReplicas").into()),
        age_column(),
    ];
    columns.extend(wide());
    columns
}

pub fn replica_set() -> Vec<Column> {
    let mut columns = vec![
        name_column(),
        code("Desired", "integer", 0, |object, _| number(object, "/spec/replicas").into()),
        code("Current", "integer", 0, |object, _| number(object, "/status/replicas").into()),
        code("Ready", "integer", 0, |object, _| number(object, "/status/readyReplicas").into()),
        age_column(),
    ];
    columns.extend(wide());
    columns
}
