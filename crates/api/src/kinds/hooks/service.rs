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
    let near = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    p.one_of("spec.trafficDistribution", text(spec, "trafficDistribution"), &near);
    p.one_of("spec.externalTrafficPolicy", text(spec, "externalTrafficPolicy"), &["Cluster", "Local"]);
    let families = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    p.one_of("spec.ipFamilyPolicy", text(spec, "ipFamilyPolicy"), &families);
    p.labels("spec.selector", at(spec, "selector"));
    addresses(&mut p, spec, kind);
    ports(&mut p, spec, kind);
    outside(&mut p, spec, kind);
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
        let (value, path) = (value.as_str().unwrap_or(""), format!("spec.externalIPs[{index}]"));
        match value.parse::<IpAddr>() {
            Err(_) => p.invalid_text(&path, value, detail),
            Ok(address) => {
                if let Some(why) = special(address) {
                    p.invalid_text(&path, value, why);
                }
            }
        }
    }
}

/// Why an address cannot be one that the world outside uses for a Service.
fn special(address: IpAddr) -> Option<&'static str> {
    let link = match address {
        IpAddr::V4(own) => own.is_link_local(),
        IpAddr::V6(own) => own.is_unicast_link_local() || own.to_ipv4_mapped().is_some(),
    };
    match address {
        _ if address.is_unspecified() => Some("may not be unspecified (0.0.0.0 or ::)"),
        _ if address.is_loopback() => Some("may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        _ if link => Some("may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
        _ if address.is_multicast() => Some("may not be in the multicast range (224.0.0.0/4, ff00::/8)"),
        _ => None,
    }
}

/// What is about the world outside the cluster.
fn outside(p: &mut Problems, spec: &Value, kind: &str) {
    let balanced = kind == "LoadBalancer";
    let policy = text(spec, "externalTrafficPolicy");
    let reachable = balanced || kind == "NodePort" || !items(spec, "externalIPs").is_empty();
    if !policy.is_empty() && !reachable {
        let detail = "may only be set for externally-accessible services";
        p.invalid_text("spec.externalTrafficPolicy", policy, detail);
    }
    let health = int(spec, "healthCheckNodePort").unwrap_or(0);
    if health != 0 {
        p.port("spec.healthCheckNodePort", health);
        if !(balanced && policy == "Local") {
            let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
            p.invalid("spec.healthCheckNodePort", &health.into(), detail);
        }
        let ports = items(spec, "ports").iter();
        if ports.filter(|port| text(port, "protocol") != "UDP").any(|port| int(port, "nodePort") == Some(health)) {
            p.invalid("spec.healthCheckNodePort", &health.into(), "is a port's `nodePort` already");
        }
    }
    let (class, ranges) = (text(spec, "loadBalancerClass"), items(spec, "loadBalancerSourceRanges"));
    if !class.is_empty() {
        p.rule("spec.loadBalancerClass", class, names::qualified_name);
        if !balanced {
            p.forbidden("spec.loadBalancerClass", "may only be used when `type` is 'LoadBalancer'");
        }
    }
    if !ranges.is_empty() && !balanced {
        p.forbidden("spec.loadBalancerSourceRanges", "may only be used when `type` is 'LoadBalancer'");
    }
    for (index, range) in ranges.iter().enumerate() {
        let range = range.as_str().unwrap_or("");
        if !is_network(range.trim()) {
            let path = format!("spec.loadBalancerSourceRanges[{index}]");
            p.invalid_text(&path, range, "must be a range of IP addresses (e.g. 10.240.0.0/24 or 2001:db8::/64)");
        }
    }
}

fn is_network(text: &str) -> bool {
    let Some((base, prefix)) = text.split_once('/') else { return false };
    let most = match base.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most)
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
    if text(new, "type") == "LoadBalancer" && text(old, "type") == "LoadBalancer" {
        let path = "spec.loadBalancerClass";
        if text(new, "loadBalancerClass") != text(old, "loadBalancerClass") {
            p.invalid(path, at(new, "loadBalancerClass"), "may not change once set");
        }
        let (before, now) =
            (int(old, "healthCheckNodePort").unwrap_or(0), int(new, "healthCheckNodePort").unwrap_or(0));
        if before != 0 && now != 0 && before != now {
            p.invalid("spec.healthCheckNodePort", &now.into(), "may not change once set");
        }
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
    fn what_is_about_the_outside_fits_together() {
        let ports = json!([{"port": 80}]);
        let lb = |more: Value| {
            let mut spec = json!({"type": "LoadBalancer", "ports": ports});
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            spec
        };
        assert!(
            told(lb(
                json!({"loadBalancerSourceRanges": ["192.0.2.0/24", " 2001:db8::/32"], "loadBalancerClass": "a.b/c",
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 30000})
            ))
            .is_empty()
        );
        for (spec, wanted) in [
            (
                json!({"ports": ports, "externalTrafficPolicy": "Local"}),
                "spec.externalTrafficPolicy: Invalid value: \"Local\"",
            ),
            (
                json!({"ports": ports, "loadBalancerSourceRanges": ["192.0.2.0/24"]}),
                "spec.loadBalancerSourceRanges: Forbidden",
            ),
            (json!({"ports": ports, "loadBalancerClass": "a.b/c"}), "spec.loadBalancerClass: Forbidden"),
            (
                json!({"ports": ports, "externalIPs": ["127.0.0.1"]}),
                "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback",
            ),
            (json!({"ports": ports, "externalIPs": ["192.0.2.1", "169.254.169.254"]}), "spec.externalIPs[1]: "),
            (json!({"ports": ports, "externalIPs": ["::ffff:127.0.0.1"]}), "spec.externalIPs[0]: "),
            (
                lb(json!({"loadBalancerSourceRanges": ["192.0.2.0/33"]})),
                "spec.loadBalancerSourceRanges[0]: Invalid value: \"192.0.2.0/33\"",
            ),
            (lb(json!({"healthCheckNodePort": 30000})), "spec.healthCheckNodePort: Invalid value: 30000: may only"),
            (
                lb(
                    json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": 30000, "ports": [{"port": 1, "nodePort": 30000}]}),
                ),
                "spec.healthCheckNodePort: Invalid value: 30000: is a port's",
            ),
        ] {
            let told = told(spec);
            assert!(told.len() == 1 && told[0].starts_with(wanted), "{told:?}: {wanted}");
        }
        let old = complete(lb(json!({"loadBalancerClass": "a.b/c"})));
        assert_eq!(validate(&complete(lb(json!({}))), Some(&old))[0].field, "spec.loadBalancerClass");
    }

    #[test]
    fn ports_and_addresses() {
        assert_eq!(told(json!({})), ["spec.ports: Required value"]);
        assert!(told(json!({"clusterIP": "None"})).is_empty());
        let near = |value: &str| told(json!({"ports": [{"port": 80}], "trafficDistribution": value}));
        assert!(near("PreferClose").is_empty() && near("PreferSameNode").is_empty());
        let only = "supported values: \"PreferClose\", \"PreferSameNode\", \"PreferSameZone\"";
        assert_eq!(near("Near"), [format!("spec.trafficDistribution: Unsupported value: \"Near\": {only}")]);
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
