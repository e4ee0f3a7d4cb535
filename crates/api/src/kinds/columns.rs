//! Printed columns of the built-in kinds, as Kubernetes' server (or the kind's own project) prints them.

mod core;
mod machines;
mod network;
mod pod;
mod workloads;

use crate::kind::{Cell, Column};
use crate::object::{Meta, Object};
use crate::time;
use serde_json::Value;

pub use core::{
    config_map, custom_resource_definition, endpoint_slice, event, lease, namespace, node, runtime_class, secret,
    service, service_account,
};
pub use machines::{
    virtual_machine, virtual_machine_clone, virtual_machine_instance, virtual_machine_restore,
    virtual_machine_snapshot, virtual_machine_snapshot_content,
};
pub use network::{admin_network_policy, baseline_admin_network_policy, egress_policy, network_policy, subnet};
pub use pod::pod;
pub use workloads::{deployment, replica_set};

fn name_column() -> Column {
    Column {
        name: "Name".into(),
        kind: "string".into(),
        format: "name".into(),
        description: "Name must be unique within a namespace.".into(),
        priority: 0,
        cell: Cell::Code(|object, _| object.name().into()),
    }
}

fn code(name: &str, kind: &str, priority: i32, cell: fn(&Object, i64) -> Value) -> Column {
    Column {
        name: name.into(),
        kind: kind.into(),
        format: String::new(),
        description: String::new(),
        priority,
        cell: Cell::Code(cell),
    }
}

fn path(name: &str, kind: &str, priority: i32, path: &str) -> Column {
    Column {
        name: name.into(),
        kind: kind.into(),
        format: String::new(),
        description: String::new(),
        priority,
        cell: Cell::Path(path.into()),
    }
}

fn age_column() -> Column {
    code("Age", "string", 0, |object, now| time::age(object.str_at("/metadata/creationTimestamp"), now).into())
}

/// The columns of a kind that are all paths, after its name.
fn paths(columns: &[(&str, &str, i32, &str)]) -> Vec<Column> {
    let rest = columns.iter().map(|(name, kind, priority, at)| path(name, kind, *priority, at));
    std::iter::once(name_column()).chain(rest).collect()
}

const CREATED: &str = ".metadata.creationTimestamp";
const READY: &str = ".status.conditions[?(@.type=='Ready')].status";
const READY_REASON: &str = ".status.conditions[?(@.type=='Ready')].reason";

pub fn knative_service() -> Vec<Column> {
    paths(&[
        ("URL", "string", 0, ".status.url"),
        ("LatestCreated", "string", 0, ".status.latestCreatedRevisionName"),
        ("LatestReady", "string", 0, ".status.latestReadyRevisionName"),
        ("Ready", "string", 0, READY),
        ("Reason", "string", 0, READY_REASON),
    ])
}

pub fn configuration() -> Vec<Column> {
    paths(&[
        ("LatestCreated", "string", 0, ".status.latestCreatedRevisionName"),
        ("LatestReady", "string", 0, ".status.latestReadyRevisionName"),
        ("Ready", "string", 0, READY),
        ("Reason", "string", 0, READY_REASON),
    ])
}

pub fn revision() -> Vec<Column> {
    paths(&[
        ("Config Name", "string", 0, ".metadata.labels['serving.knative.dev/configuration']"),
        ("Generation", "string", 0, ".metadata.labels['serving.knative.dev/configurationGeneration']"),
        ("Ready", "string", 0, READY),
        ("Reason", "string", 0, READY_REASON),
        ("Actual Replicas", "integer", 0, ".status.actualReplicas"),
        ("Desired Replicas", "integer", 0, ".status.desiredReplicas"),
    ])
}

pub fn route() -> Vec<Column> {
    paths(&[("URL", "string", 0, ".status.url"), ("Ready", "string", 0, READY), ("Reason", "string", 0, READY_REASON)])
}

pub fn gateway_class() -> Vec<Column> {
    paths(&[
        ("Controller", "string", 0, ".spec.controllerName"),
        ("Accepted", "string", 0, ".status.conditions[?(@.type=='Accepted')].status"),
        ("Age", "date", 0, CREATED),
        ("Description", "string", 1, ".spec.description"),
    ])
}

pub fn gateway() -> Vec<Column> {
    paths(&[
        ("Class", "string", 0, ".spec.gatewayClassName"),
        ("Address", "string", 0, ".status.addresses[*].value"),
        ("Programmed", "string", 0, ".status.conditions[?(@.type=='Programmed')].status"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn http_route() -> Vec<Column> {
    paths(&[("Hostnames", "string", 0, ".spec.hostnames"), ("Age", "date", 0, CREATED)])
}

pub fn grpc_route() -> Vec<Column> {
    http_route()
}

pub fn tls_route() -> Vec<Column> {
    http_route()
}

pub fn reference_grant() -> Vec<Column> {
    paths(&[("Age", "date", 0, CREATED)])
}

pub fn traffic_policy() -> Vec<Column> {
    paths(&[
        ("Targets", "string", 0, ".spec.targetRefs[*].name"),
        ("Accepted", "string", 0, ".status.conditions[?(@.type=='Accepted')].status"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn backend_policy() -> Vec<Column> {
    traffic_policy()
}

pub fn message() -> Vec<Column> {
    paths(&[
        ("Function", "string", 0, ".spec.function"),
        ("State", "string", 0, ".status.state"),
        ("Attempts", "integer", 0, ".status.attempts"),
        ("Error", "string", 1, ".status.lastError"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn schedule() -> Vec<Column> {
    paths(&[
        ("Schedule", "string", 0, ".spec.schedule"),
        ("Function", "string", 0, ".spec.function"),
        ("Suspend", "boolean", 0, ".spec.suspend"),
        ("Last", "date", 0, ".status.lastScheduleTime"),
        ("Next", "string", 0, ".status.nextScheduleTime"),
        ("Ready", "string", 0, ".status.conditions[?(@.type=='Ready')].status"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn broker() -> Vec<Column> {
    paths(&[
        ("URL", "string", 0, ".status.address.url"),
        ("Age", "date", 0, CREATED),
        ("Ready", "string", 0, READY),
        ("Reason", "string", 0, READY_REASON),
    ])
}

pub fn trigger() -> Vec<Column> {
    paths(&[
        ("Broker", "string", 0, ".spec.broker"),
        ("Subscriber_URI", "string", 0, ".status.subscriberUri"),
        ("Age", "date", 0, CREATED),
        ("Ready", "string", 0, READY),
        ("Reason", "string", 0, READY_REASON),
    ])
}

pub fn ingress() -> Vec<Column> {
    paths(&[
        ("Class", "string", 0, ".spec.ingressClassName"),
        ("Hosts", "string", 0, ".spec.rules[*].host"),
        ("Address", "string", 0, ".status.loadBalancer.ingress[*].ip"),
        ("Age", "date", 0, CREATED),
    ])
}

pub fn ingress_class() -> Vec<Column> {
    paths(&[("Controller", "string", 0, ".spec.controller"), ("Age", "date", 0, CREATED)])
}

/// `text`, or `<none>` where there is none.
fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

fn list<'a>(object: &'a Object, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn number(object: &Object, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}
