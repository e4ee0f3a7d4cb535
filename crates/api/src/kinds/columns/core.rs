//! Columns of the core kinds.

use super::{age_column, code, list, name_column, number, or_none};
use crate::kind::Column;
use crate::object::{Meta, Object};
use crate::selector::Selector;
use crate::time;
use serde_json::Value;

pub fn namespace() -> Vec<Column> {
    vec![name_column(), code("Status", "string", 0, |object, _| object.str_at("/status/phase").into()), age_column()]
}

pub fn node() -> Vec<Column> {
    let info = |name: &'static str, at: fn(&Object, i64) -> Value| code(name, "string", 1, at);
    vec![
        name_column(),
        code("Status", "string", 0, |object, _| node_status(object).into()),
        code("Roles", "string", 0, |object, _| or_none(&node_roles(object).join(","))),
        age_column(),
        code("Version", "string", 0, |object, _| object.str_at("/status/nodeInfo/kubeletVersion").into()),
        info("Internal-IP", |object, _| or_none(address(object, "InternalIP"))),
        info("External-IP", |object, _| or_none(address(object, "ExternalIP"))),
        info("OS-Image", |object, _| or_unknown(object.str_at("/status/nodeInfo/osImage"))),
        info("Kernel-Version", |object, _| or_unknown(object.str_at("/status/nodeInfo/kernelVersion"))),
        info("Container-Runtime", |object, _| or_unknown(object.str_at("/status/nodeInfo/containerRuntimeVersion"))),
    ]
}

fn or_unknown(text: &str) -> Value {
    if text.is_empty() { "<unknown>".into() } else { text.into() }
}

fn node_status(node: &Object) -> String {
    let ready = list(node, "/status/conditions").iter().find(|c| c.str_at("/type") == "Ready");
    let mut status = match ready.map(|c| c.str_at("/status")) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if node.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true) {
        status.push_str(",SchedulingDisabled");
    }
    status
}

fn node_roles(node: &Object) -> Vec<String> {
    let labels = node.pointer("/metadata/labels").and_then(Value::as_object);
    let mut roles: Vec<String> = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => Some(role.to_owned()),
            None if key == "kubernetes.io/role" => value.as_str().filter(|role| !role.is_empty()).map(str::to_owned),
            _ => None,
        })
        .collect();
    roles.sort();
    roles.dedup();
    roles
}

fn address<'a>(node: &'a Object, kind: &str) -> &'a str {
    list(node, "/status/addresses").iter().find(|a| a.str_at("/type") == kind).map_or("", |a| a.str_at("/address"))
}

pub fn service() -> Vec<Column> {
    vec![
        name_column(),
        code("Type", "string", 0, |object, _| object.str_at("/spec/type").into()),
        code("Cluster-IP", "string", 0, |object, _| or_none(object.str_at("/spec/clusterIP"))),
        code("External-IP", "string", 0, |object, _| external_ip(object).into()),
        code("Port(s)", "string", 0, |object, _| or_none(&service_ports(object))),
        age_column(),
        code("Selector", "string", 1, |object, _| {
            let selector = Selector::from_map(object.pointer("/spec/selector").unwrap_or(&Value::Null));
            or_none(&selector.map(|selector| selector.to_string()).unwrap_or_default())
        }),
    ]
}

fn external_ip(service: &Object) -> String {
    let mut addresses: Vec<&str> = Vec::new();
    let kind = service.str_at("/spec/type");
    match kind {
        "ExternalName" => return service.str_at("/spec/externalName").to_owned(),
        "LoadBalancer" => {
            for ingress in list(service, "/status/loadBalancer/ingress") {
                let ip = ingress.str_at("/ip");
                addresses.push(if ip.is_empty() { ingress.str_at("/hostname") } else { ip });
            }
        }
        _ => {}
    }
    addresses.extend(list(service, "/spec/externalIPs").iter().filter_map(Value::as_str));
    match (addresses.is_empty(), kind) {
        (true, "LoadBalancer") => "<pending>".to_owned(),
        (true, _) => "<none>".to_owned(),
        (false, _) => addresses.join(","),
    }
}

fn service_ports(service: &Object) -> String {
    let port = |port: &Value| {
        let (number_, node) = (number(port, "/port"), number(port, "/nodePort"));
        let protocol = port.str_at("/protocol");
        if node > 0 { format!("{number_}:{node}/{protocol}") } else { format!("{number_}/{protocol}") }
    };
    list(service, "/spec/ports").iter().map(port).collect::<Vec<_>>().join(",")
}

fn count(object: &Object, pointer: &str) -> usize {
    match object.pointer(pointer) {
        Some(Value::Object(fields)) => fields.len(),
        Some(Value::Array(list)) => list.len(),
        _ => 0,
    }
}

pub fn config_map() -> Vec<Column> {
    vec![
        name_column(),
        code("Data", "integer", 0, |object, _| (count(object, "/data") + count(object, "/binaryData")).into()),
        age_column(),
    ]
}

pub fn secret() -> Vec<Column> {
    vec![
        name_column(),
        code("Type", "string", 0, |object, _| object.str_at("/type").into()),
        code("Data", "integer", 0, |object, _| count(object, "/data").into()),
        age_column(),
    ]
}

pub fn service_account() -> Vec<Column> {
    vec![name_column(), code("Secrets", "integer", 0, |object, _| count(object, "/secrets").into()), age_column()]
}

pub fn event() -> Vec<Column> {
    vec![
        code("Last Seen", "string", 0, |event, now| last_seen(event, now).into()),
        code("Type", "string", 0, |event, _| event.str_at("/type").into()),
        code("Reason", "string", 0, |event, _| event.str_at("/reason").into()),
        code("Object", "string", 0, |event, _| involved(event).into()),
        code("Subobject", "string", 1, |event, _| event.str_at("/involvedObject/fieldPath").into()),
        code("Source", "string", 1, |event, _| source(event).into()),
        code("Message", "string", 0, |event, _| event.str_at("/message").trim().into()),
        code("First Seen", "string", 1, |event, now| first_seen(event, now).into()),
        code("Count", "integer", 1, |event, _| {
            let series = number(event, "/series/count");
            if series > 0 { series.into() } else { number(event, "/count").max(1).into() }
        }),
        Column { priority: 1, ..name_column() },
    ]
}

fn first_seen(event: &Object, now: i64) -> String {
    let first = event.str_at("/firstTimestamp");
    time::age(if first.is_empty() { event.str_at("/eventTime") } else { first }, now)
}

fn last_seen(event: &Object, now: i64) -> String {
    let times = [event.str_at("/series/lastObservedTime"), event.str_at("/lastTimestamp")];
    match times.into_iter().find(|text| !text.is_empty()) {
        Some(last) => time::age(last, now),
        None => first_seen(event, now),
    }
}

fn involved(event: &Object) -> String {
    let kind = event.str_at("/involvedObject/kind").to_lowercase();
    let name = event.str_at("/involvedObject/name");
    if name.is_empty() { kind } else { format!("{kind}/{name}") }
}

fn source(event: &Object) -> String {
    let either = |old: &str, new: &str| {
        let text = event.str_at(old);
        if text.is_empty() { event.str_at(new).to_owned() } else { text.to_owned() }
    };
    let component = either("/source/component", "/reportingComponent");
    let host = either("/source/host", "/reportingInstance");
    if host.is_empty() { component } else { format!("{component}, {host}") }
}

pub fn endpoint_slice() -> Vec<Column> {
    vec![
        name_column(),
        code("AddressType", "string", 0, |object, _| object.str_at("/addressType").into()),
        code("Ports", "string", 0, |object, _| {
            let port =
                |port: &Value| port.get("port").filter(|p| !p.is_null()).map_or("*".to_owned(), Value::to_string);
            first_of(list(object, "/ports").iter().map(port).collect())
        }),
        code("Endpoints", "string", 0, |object, _| {
            let all = list(object, "/endpoints").iter().flat_map(|endpoint| list(endpoint, "/addresses"));
            first_of(all.filter_map(Value::as_str).map(str::to_owned).collect())
        }),
        age_column(),
    ]
}

/// The first three and how many more there are.
fn first_of(all: Vec<String>) -> Value {
    match all.len() {
        0 => "<unset>".into(),
        1..=3 => all.join(",").into(),
        count => format!("{} + {} more...", all.get(..3).unwrap_or_default().join(","), count - 3).into(),
    }
}

pub fn lease() -> Vec<Column> {
    vec![
        name_column(),
        code("Holder", "string", 0, |object, _| object.str_at("/spec/holderIdentity").into()),
        age_column(),
    ]
}

pub fn runtime_class() -> Vec<Column> {
    vec![name_column(), code("Handler", "string", 0, |object, _| object.str_at("/handler").into()), age_column()]
}

pub fn custom_resource_definition() -> Vec<Column> {
    vec![
        name_column(),
        code("Created At", "date", 0, |object, _| {
            let created = object.str_at("/metadata/creationTimestamp");
            if created.is_empty() { "<unknown>".into() } else { created.into() }
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind::Cell;
    use serde_json::json;

    fn row(columns: Vec<Column>, object: Value) -> Vec<Value> {
        let cell = |column: Column| match column.cell {
            Cell::Code(code) => code(&object, 100),
            Cell::Path(_) => Value::Null,
        };
        columns.into_iter().map(cell).collect()
    }

    #[test]
    fn rows_as_kubernetes_prints_them() {
        let created = "1970-01-01T00:00:10Z";
        let meta =
            json!({"name": "x", "creationTimestamp": created, "labels": {"node-role.kubernetes.io/control-plane": ""}});
        let service = json!({"metadata": meta, "spec": {"type": "NodePort", "clusterIP": "10.43.0.7", "selector": {"a": "b"},
            "ports": [{"port": 80, "protocol": "TCP"}, {"port": 443, "nodePort": 30443, "protocol": "TCP"}]}});
        assert_eq!(
            Value::from(row(super::service(), service)),
            json!(["x", "NodePort", "10.43.0.7", "<none>", "80/TCP,443:30443/TCP", "90s", "a=b"])
        );
        let node = json!({"metadata": meta, "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "nodeInfo": {"kubeletVersion": "v1.33.0"}}});
        assert_eq!(
            Value::from(row(super::node(), node)),
            json!([
                "x",
                "Ready,SchedulingDisabled",
                "control-plane",
                "90s",
                "v1.33.0",
                "10.0.0.1",
                "<none>",
                "<unknown>",
                "<unknown>",
                "<unknown>"
            ])
        );
        let event = json!({"metadata": meta, "type": "Normal", "reason": "Pulled", "message": "ok\n", "count": 2,
            "involvedObject": {"kind": "Pod", "name": "p"}, "lastTimestamp": "1970-01-01T00:01:30Z", "firstTimestamp": created,
            "source": {"component": "kubelet", "host": "n"}});
        assert_eq!(
            Value::from(row(super::event(), event)),
            json!(["10s", "Normal", "Pulled", "pod/p", "", "kubelet, n", "ok", "90s", 2, "x"])
        );
        let slice = json!({"metadata": meta, "addressType": "IPv4", "ports": [{"port": 80}],
            "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3", "10.0.0.4"]}]});
        assert_eq!(
            Value::from(row(endpoint_slice(), slice)),
            json!(["x", "IPv4", "80", "10.0.0.1,10.0.0.2,10.0.0.3 + 1 more...", "90s"])
        );
    }
}
