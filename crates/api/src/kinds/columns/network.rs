//! Columns of the networking kinds.

use super::{CREATED, age_column, code, name_column, or_none, paths};
use crate::kind::Column;
use crate::selector::Selector;
use serde_json::Value;

pub fn network_policy() -> Vec<Column> {
    vec![
        name_column(),
        code("Pod-Selector", "string", 0, |object, _| {
            let selector = Selector::from_object(object.pointer("/spec/podSelector").unwrap_or(&Value::Null));
            or_none(&selector.map(|selector| selector.to_string()).unwrap_or_default())
        }),
        age_column(),
    ]
}

pub fn admin_network_policy() -> Vec<Column> {
    paths(&[
        ("Priority", "string", 0, ".spec.priority"),
        ("Programmed", "string", 0, ".status.conditions[?(@.type=='Programmed')].status"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn baseline_admin_network_policy() -> Vec<Column> {
    paths(&[
        ("Programmed", "string", 0, ".status.conditions[?(@.type=='Programmed')].status"),
        ("Age", "date", 0, CREATED),
    ])
}
