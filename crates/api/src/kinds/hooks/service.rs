//! Services. Addresses, with their families, and node ports are given out by the server; here only what can be said without knowing others.

use super::field::{Problems, at, fill, flag, has, int, items, items_mut, object_mut, text};
use crate::names;
use crate::object::{Meta, Object};
use crate::status::Cause;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::net::IpAddr;

pub fn default(service: &mut Object) {
    let Some(spec) = object_mut(service, "/spec") else { return };
    let kind = spec.get("type").and_then(Value::as_str).unwrap_or("ClusterIP").to_owned();
    for port in items_mut(spec, "ports") {
        let unset =
            port.get("targetPort").is_none_or(|target| *target == json!(0) || *target == json!("") || target.is_null());
        if let (true, Some(number)) = (unset, port.get("port").cloned()) {
            port.insert("targetPort".into(), number);
        }
    }
    if spec.get("sessionAffinity").and_then(Value::as_str) == Some("ClientIP") {
        fill(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10800}}));
    }
    if kind == "ExternalName" {
        return;
    }
    fill(spec, "internalTrafficPolicy", "Cluster");
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        fill(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        fill(spec, "allocateLoadBalancerNodePorts", true);
    }
    let address = spec.get("clusterIP").and_then(Value::as_str).unwrap_or("").to_owned();
    let first = spec.get("clusterIPs").and_then(|list| list.get(0)).and_then(Value::as_str).unwrap_or("").to_owned();
    if !address.is_empty() && first.is_empty() {
        spec.insert("clusterIPs".into(), json!([address]));
    } else if address.is_empty() && !first.is_empty() {
        spec.insert("clusterIP".into(), first.into());
    }
}

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

pub fn validate(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    if old.is_none() {
        p.rule("metadata.name", new.name(), names::dns_1035_label);
    }
    let spec = at(new, "spec");
    let kind = text(spec, "type");
    p.one_of("spec.type", kind, &TYPES);
    p.one_of("spec.sessionAffinity", text(spec, "sessionAffinity"), &["ClientIP", "None"]);
    p.one_of("spec.internalTrafficPolicy", text(spec, "internalTrafficPolicy"), &["Cluster", "Local"]);
    p.one_of("spec.externalTrafficPolicy", text(spec, "externalTrafficPolicy"), &["Cluster", "Local"]);
    let families = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    p.one_of("spec.ipFamilyPolicy", text(spec, "ipFamilyPolicy"), &families);
    p.labels("spec.selector", at(spec, "selector"));
    addresses(&mut p, spec, kind);
    ports(&mut p, spec, kind);
    let seconds = at(spec, "sessionAffinityConfig").pointer("/clientIP/timeoutSeconds").and_then(Value::as_i64);
    if let Some(seconds) = seconds.filter(|seconds| !(1..=86_400).contains(seconds)) {
        let path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        p.invalid(path, &seconds.into(), "must be greater than 0 and less than 86400");
    }
    if let Some(old) = old {
        validate_update(&mut p, spec, at(old, "spec"));
    }
    p.into_causes()
}

fn addresses(p: &mut Problems, spec: &Value, kind: &str) {
    let address = text(spec, "clusterIP");
    match kind {
        "ExternalName" => {
            if !address.is_empty() {
                p.forbidden("spec.clusterIPs[0]", "may not be set for ExternalName services");
            }
            let name = text(spec, "externalName").trim_end_matches('.');
            if name.is_empty() {
                p.required("spec.externalName", "");
            } else {
                p.rule("spec.externalName", name, names::dns_subdomain);
            }
        }
        "NodePort" | "LoadBalancer" if address == "None" => {
            let detail = format!("may not be set to 'None' for {kind} services");
            p.invalid_text("spec.clusterIPs[0]", address, &detail);
        }
        _ => {}
    }
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
    if !address.is_empty() && address != "None" && !is_address(address) {
        p.invalid_text("spec.clusterIPs[0]", address, detail);
    }
    let all = items(spec, "clusterIPs");
    if all.first().and_then(Value::as_str).is_some_and(|first| !address.is_empty() && first != address) {
        p.invalid("spec.clusterIPs", at(spec, "clusterIPs"), "first value must match `clusterIP`");
    }
    for (index, value) in items(spec, "externalIPs").iter().enumerate() {
        let value = value.as_str().unwrap_or("");
        if !is_address(value) {
            p.invalid_text(&format!("spec.externalIPs[{index}]"), value, detail);
        }
    }
}

fn ports(p: &mut Problems, spec: &Value, kind: &str) {
    let ports = items(spec, "ports");
    if ports.is_empty() && text(spec, "clusterIP") != "None" && kind != "ExternalName" {
        p.required("spec.ports", "");
    }
    let (mut seen, mut numbers, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let (name, protocol) = (text(port, "name"), text(port, "protocol"));
        if name.is_empty() {
            if ports.len() > 1 {
                p.required(&format!("{path}.name"), "");
            }
        } else {
            p.rule(&format!("{path}.name"), name, names::dns_label);
            if !seen.insert(name) {
                p.duplicate(&format!("{path}.name"), &name.into());
            }
        }
        let number = int(port, "port").unwrap_or(0);
        if has(port, "port") {
            p.port(&format!("{path}.port"), number);
        }
        p.one_of(&format!("{path}.protocol"), protocol, &["SCTP", "TCP", "UDP"]);
        p.port_or_name(&format!("{path}.targetPort"), at(port, "targetPort"));
        if !numbers.insert((number, protocol)) {
            p.duplicate(&path, &json!({"port": number, "protocol": protocol}));
        }
        let node_port = int(port, "nodePort").unwrap_or(0);
        if node_port != 0 {
            if matches!(kind, "ClusterIP" | "ExternalName" | "") {
                p.forbidden(&format!("{path}.nodePort"), "may not be used when `type` is 'ClusterIP'");
            }
            p.port(&format!("{path}.nodePort"), node_port);
            if !node_ports.insert((node_port, protocol)) {
                p.duplicate(&format!("{path}.nodePort"), &node_port.into());
            }
        }
    }
    if kind == "LoadBalancer" || !flag(spec, "allocateLoadBalancerNodePorts") {
        return;
    }
    p.forbidden("spec.allocateLoadBalancerNodePorts", "may only be used when `type` is 'LoadBalancer'");
}

fn validate_update(p: &mut Problems, new: &Value, old: &Value) {
    let same_type = text(new, "type") != "ExternalName" && text(old, "type") != "ExternalName";
    let before = text(old, "clusterIP");
    if same_type && !before.is_empty() && text(new, "clusterIP") != before {
        p.invalid("spec.clusterIPs[0]", at(new, "clusterIPs"), "may not change once set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    fn complete(spec: Value) -> Value {
        let kind = kinds::find("", "services").unwrap();
        let mut object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        default(&mut object);
        object
    }

    fn told(spec: Value) -> Vec<String> {
        validate(&complete(spec), None).into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn a_service_gets_what_kubernetes_gives_it() {
        let service = complete(json!({"selector": {"a": "b"}, "ports": [{"port": 80}], "clusterIP": "10.43.0.9"}));
        let expected = json!({"clusterIP": "10.43.0.9", "clusterIPs": ["10.43.0.9"], "internalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
            "selector": {"a": "b"}, "sessionAffinity": "None", "type": "ClusterIP"});
        assert_eq!(service["spec"], expected);
        assert!(validate(&service, None).is_empty());
    }

    #[test]
    fn ports_and_addresses() {
        assert_eq!(told(json!({})), ["spec.ports: Required value"]);
        assert!(told(json!({"clusterIP": "None"})).is_empty());
        assert_eq!(told(json!({"type": "ExternalName"})), ["spec.externalName: Required value"]);
        assert_eq!(
            told(
                json!({"ports": [{"port": 80, "nodePort": 30000}, {"name": "a", "port": 80, "targetPort": 0, "protocol": "X"}]})
            ),
            [
                "spec.ports[0].name: Required value",
                "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
                "spec.ports[1].protocol: Unsupported value: \"X\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
            ]
        );
        let old = complete(json!({"ports": [{"port": 80}], "clusterIP": "10.43.0.9"}));
        let new = complete(json!({"ports": [{"port": 80}], "clusterIP": "10.43.0.8"}));
        assert_eq!(validate(&new, Some(&old))[0].message, "Invalid value: [\"10.43.0.8\"]: may not change once set");
    }
}
