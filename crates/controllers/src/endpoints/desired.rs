//! Which endpoints a Service should have: pure.

use crate::objects::{flag, has_ended, int, is_ready, list};
use api::object::{Meta, Object, SharedObject};
use serde_json::{Map, Value, json};
use std::net::IpAddr;

pub(super) struct Endpoint {
    /// Of its pod.
    pub uid: String,
    pub value: Value,
}

/// Endpoints with the same port numbers; named target ports can differ from pod to pod.
pub(super) struct Group {
    pub ports: Value,
    pub endpoints: Vec<Endpoint>,
}

/// `zone_of`: of the node of that name. `family` as EndpointSlices name it: `IPv4` or `IPv6`.
pub(super) fn groups(
    service: &Object,
    family: &str,
    pods: &[SharedObject],
    zone_of: &dyn Fn(&str) -> Option<String>,
) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for pod in pods {
        let Some(endpoint) = endpoint(service, family, pod, zone_of) else { continue };
        let Some(ports) = ports(service, pod) else { continue };
        match groups.iter_mut().find(|group| group.ports == ports) {
            Some(group) => group.endpoints.push(endpoint),
            None => groups.push(Group { ports, endpoints: vec![endpoint] }),
        }
    }
    if groups.is_empty() {
        groups.push(Group { ports: Value::Null, endpoints: Vec::new() });
    }
    groups
}

/// The pod's address of a family.
fn address_of<'a>(pod: &'a Object, family: &str) -> Option<&'a str> {
    let all = list(pod, "/status/podIPs").iter().map(|ip| ip.str_at("/ip"));
    let of_family = |text: &&str| text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == (family == "IPv6"));
    all.chain([pod.str_at("/status/podIP")]).find(of_family)
}

fn endpoint(
    service: &Object,
    family: &str,
    pod: &Object,
    zone_of: &dyn Fn(&str) -> Option<String>,
) -> Option<Endpoint> {
    let address = address_of(pod, family).filter(|_| !has_ended(pod))?;
    let (serving, terminating) = (is_ready(pod), pod.is_deleting());
    let even_unready = flag(service, "/spec/publishNotReadyAddresses");
    let mut value = json!({
        "addresses": [address],
        "conditions": {"ready": even_unready || (serving && !terminating), "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "namespace": pod.namespace(), "name": pod.name(), "uid": pod.uid()},
    });
    if let Some(fields) = value.as_object_mut() {
        let node = pod.str_at("/spec/nodeName");
        if !node.is_empty() {
            fields.insert("nodeName".into(), node.into());
            let zone = zone_of(node).filter(|zone| !zone.is_empty());
            if let Some(hints) =
                hints(service, node, zone.as_deref()).filter(|_| even_unready || (serving && !terminating))
            {
                fields.insert("hints".into(), hints);
            }
            if let Some(zone) = zone {
                fields.insert("zone".into(), zone.into());
            }
        }
        let hostname = pod.str_at("/spec/hostname");
        if !hostname.is_empty() && pod.str_at("/spec/subdomain") == service.name() {
            fields.insert("hostname".into(), hostname.into());
        }
    }
    Some(Endpoint { uid: pod.uid().to_owned(), value })
}

/// Who should use an endpoint, as the Service's `trafficDistribution` has it.
fn hints(service: &Object, node: &str, zone: Option<&str>) -> Option<Value> {
    let wanted = service.str_at("/spec/trafficDistribution");
    let mut hints = Map::new();
    if wanted == "PreferSameNode" {
        hints.insert("forNodes".into(), json!([{"name": node}]));
    }
    if let Some(zone) = zone.filter(|_| matches!(wanted, "PreferClose" | "PreferSameZone" | "PreferSameNode")) {
        hints.insert("forZones".into(), json!([{"name": zone}]));
    }
    (!hints.is_empty()).then_some(Value::Object(hints))
}

/// The Service's ports as numbers of this pod. `None` if it has ports and the pod none of them.
fn ports(service: &Object, pod: &Object) -> Option<Value> {
    let asked = list(service, "/spec/ports");
    let found: Vec<Value> = asked.iter().filter_map(|port| resolved(port, pod)).collect();
    if found.is_empty() && !asked.is_empty() {
        return None;
    }
    Some(found.into())
}

fn resolved(port: &Value, pod: &Object) -> Option<Value> {
    let protocol = if port.str_at("/protocol").is_empty() { "TCP" } else { port.str_at("/protocol") };
    let number = match port.get("targetPort") {
        Some(Value::String(name)) => named(pod, name, protocol)?,
        Some(Value::Number(number)) if number.as_i64() != Some(0) => number.as_i64()?,
        _ => int(port, "/port")?,
    };
    let mut value = Map::new();
    value.insert("name".into(), port.str_at("/name").into());
    value.insert("port".into(), number.into());
    value.insert("protocol".into(), protocol.into());
    if let Some(application) = port.get("appProtocol").filter(|application| !application.is_null()) {
        value.insert("appProtocol".into(), application.clone());
    }
    Some(Value::Object(value))
}

fn named(pod: &Object, name: &str, protocol: &str) -> Option<i64> {
    let sidecars = list(pod, "/spec/initContainers").iter().filter(|c| c.str_at("/restartPolicy") == "Always");
    let containers = list(pod, "/spec/containers").iter().chain(sidecars);
    let port = containers.flat_map(|container| list(container, "/ports")).find(|port| {
        port.str_at("/name") == name && matches!(port.str_at("/protocol"), "" if protocol == "TCP")
            || port.str_at("/name") == name && port.str_at("/protocol") == protocol
    })?;
    int(port, "/containerPort")
}
