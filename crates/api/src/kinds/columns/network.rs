//! Columns of the networking kinds.

use super::{CREATED, age_column, code, name_column, or_none, path, paths};
use crate::kind::Column;
use crate::selector::Selector;
use serde_json::Value;

pub fn network_policy() -> Vec<Column> {
    vec![name_column(), pod_selector(), age_column()]
}

fn pod_selector() -> Column {
    code("Pod-Selector", "string", 0, |object, _| {
        let selector = Selector::from_object(object.pointer("/spec/podSelector").unwrap_or(&Value::Null));
        or_none(&selector.map(|selector| selector.to_string()).unwrap_or_default())
    })
}

pub fn egress_policy() -> Vec<Column> {
    let names = code("Names", "string", 0, |object, _| {
        let rules = object.pointer("/spec/egress").and_then(Value::as_array).into_iter().flatten();
        let peers = rules.filter_map(|rule| rule.get("to")?.as_array()).flatten();
        let names: Vec<&str> = peers.filter_map(|peer| peer.get("dnsName")?.as_str()).collect();
        let shown = names.iter().take(3).copied().collect::<Vec<_>>().join(",");
        if names.len() > 3 { format!("{shown} + {} more...", names.len() - 3).into() } else { or_none(&shown) }
    });
    let programmed = path("Programmed", "string", 0, ".status.conditions[?(@.type=='Programmed')].status");
    vec![name_column(), pod_selector(), names, programmed, age_column()]
}

pub fn subnet() -> Vec<Column> {
    paths(&[
        ("CIDR", "string", 0, ".spec.cidr"),
        ("CIDR6", "string", 1, ".spec.cidr6"),
        ("Used", "integer", 0, ".status.used"),
        ("Free", "integer", 0, ".status.free"),
        ("Ready", "string", 0, ".status.conditions[?(@.type=='Ready')].status"),
        ("Reason", "string", 0, ".status.conditions[?(@.type=='Ready')].reason"),
        ("Age", "date", 0, CREATED),
    ])
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
