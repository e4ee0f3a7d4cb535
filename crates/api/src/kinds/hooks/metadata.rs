//! Small kinds: Namespace, Node, Event, EndpointSlice, Lease, RuntimeClass.

use super::field::{Problems, at, fill, int, items, object_mut, pointer, text};
use super::pod_spec;
use crate::names;
use crate::object::{Meta, Object, child, object_of};
use crate::status::Cause;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Every namespace can be selected by its name.
pub fn default_namespace(namespace: &mut Object) {
    let name = namespace.name().to_owned();
    if !name.is_empty() {
        namespace.set_label("kubernetes.io/metadata.name", &name);
    }
}

/// A new namespace is active and is kept until its contents are gone.
pub fn prepare_namespace(namespace: &mut Object) {
    child(object_of(namespace), "status").insert("phase".into(), "Active".into());
    child(object_of(namespace), "spec").insert("finalizers".into(), json!(["kubernetes"]));
}

/// What a node can give is what it has, unless it says otherwise.
pub fn default_node(node: &mut Object) {
    if let Some(status) = object_mut(node, "/status")
        && let Some(capacity) = status.get("capacity").cloned().filter(Value::is_object)
    {
        fill(status, "allocatable", capacity);
    }
}

pub fn validate_node(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    for (index, taint) in items(at(new, "spec"), "taints").iter().enumerate() {
        let path = format!("spec.taints[{index}]");
        p.rule(&format!("{path}.key"), text(taint, "key"), names::qualified_name);
        p.rule(&format!("{path}.value"), text(taint, "value"), names::label_value);
        match text(taint, "effect") {
            "" => p.required(&format!("{path}.effect"), ""),
            effect => p.one_of(&format!("{path}.effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]),
        }
    }
    p.into_causes()
}

pub fn validate_event(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let involved = pointer(new, "/involvedObject/namespace").as_str().unwrap_or("");
    let namespace = new.namespace();
    // Events about cluster-scoped objects are kept in the default namespace.
    let fits =
        if involved.is_empty() { matches!(namespace, "default" | "kube-system" | "") } else { involved == namespace };
    if !fits {
        p.invalid_text("involvedObject.namespace", involved, "does not match event.namespace");
    }
    p.one_of("type", text(new, "type"), &["Normal", "Warning"]);
    p.into_causes()
}

/// Addresses that mean something else on every machine are nobody's endpoint.
fn special_address(p: &mut Problems, path: &str, text: &str) {
    let Ok(address) = text.parse::<IpAddr>() else { return };
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    for (is, detail) in [
        (address.is_unspecified(), "may not be unspecified (0.0.0.0 or ::)"),
        (address.is_loopback(), "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        (link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
        (address.is_multicast(), "may not be in the multicast range (224.0.0.0/4, ff00::/8)"),
    ] {
        if is {
            p.invalid_text(path, text, detail);
        }
    }
}

pub fn validate_endpoint_slice(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let kind = text(new, "addressType");
    p.one_of("addressType", kind, &["FQDN", "IPv4", "IPv6"]);
    let endpoints = items(new, "endpoints");
    if endpoints.len() > 1000 {
        p.invalid("endpoints", &endpoints.len().into(), "must have at most 1000 items");
    }
    for (index, endpoint) in endpoints.iter().enumerate().take(1000) {
        let path = format!("endpoints[{index}].addresses");
        if items(endpoint, "addresses").is_empty() {
            p.required(&path, "must contain at least 1 address");
        }
        for (number, address) in items(endpoint, "addresses").iter().enumerate() {
            let (path, address) = (format!("{path}[{number}]"), address.as_str().unwrap_or(""));
            match kind {
                "IPv4" if address.parse::<Ipv4Addr>().is_err() => {
                    p.invalid_text(&path, address, "must be a valid IPv4 address");
                }
                "IPv6" if address.parse::<Ipv6Addr>().is_err() => {
                    p.invalid_text(&path, address, "must be a valid IPv6 address");
                }
                "FQDN" => p.rule(&path, address, names::dns_subdomain),
                _ => special_address(&mut p, &path, address),
            }
        }
        p.optional_rule(&format!("endpoints[{index}].hostname"), text(endpoint, "hostname"), names::dns_label);
    }
    for (index, port) in items(new, "ports").iter().enumerate() {
        let path = format!("ports[{index}]");
        p.optional_rule(&format!("{path}.name"), text(port, "name"), names::dns_label);
        p.one_of(&format!("{path}.protocol"), text(port, "protocol"), &["SCTP", "TCP", "UDP"]);
        if let Some(number) = int(port, "port") {
            p.port(&format!("{path}.port"), number);
        }
    }
    if let Some(old) = old {
        p.immutable("addressType", at(new, "addressType"), at(old, "addressType"));
    }
    p.into_causes()
}

pub fn validate_lease(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    if let Some(seconds) = int(spec, "leaseDurationSeconds").filter(|seconds| *seconds <= 0) {
        p.invalid("spec.leaseDurationSeconds", &seconds.into(), "must be greater than 0");
    }
    p.at_least("spec.leaseTransitions", int(spec, "leaseTransitions"), 0);
    p.into_causes()
}

pub fn validate_runtime_class(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    p.rule("handler", text(new, "handler"), names::dns_label);
    let scheduling = at(new, "scheduling");
    p.labels("scheduling.nodeSelector", at(scheduling, "nodeSelector"));
    for (index, toleration) in items(scheduling, "tolerations").iter().enumerate() {
        pod_spec::validate_toleration(&mut p, &format!("scheduling.tolerations[{index}]"), toleration);
    }
    if let Some(old) = old {
        p.immutable("handler", at(new, "handler"), at(old, "handler"));
    }
    p.into_causes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn endpoints_are_addresses_that_others_can_have() {
        let told = |kind: &str, address: &str, hostname: &str| {
            let slice = json!({"addressType": kind, "endpoints": [{"addresses": [address], "hostname": hostname}]});
            validate_endpoint_slice(&slice, None).into_iter().map(|cause| cause.field).collect::<Vec<_>>()
        };
        assert!(told("IPv4", "10.42.0.7", "db-0").is_empty() && told("IPv6", "fd00::7", "").is_empty());
        for (kind, address) in [
            ("IPv4", "127.0.0.1"),
            ("IPv4", "0.0.0.0"),
            ("IPv4", "169.254.169.254"),
            ("IPv4", "224.0.0.1"),
            ("IPv6", "::1"),
            ("IPv6", "::"),
            ("IPv6", "fe80::1"),
            ("IPv6", "ff02::1"),
            ("IPv4", "x"),
        ] {
            assert_eq!(told(kind, address, ""), ["endpoints[0].addresses[0]"], "{address}");
        }
        for hostname in ["a.b", "-a", "a b", "UPPER"] {
            assert_eq!(told("IPv4", "10.42.0.7", hostname), ["endpoints[0].hostname"], "{hostname}");
        }
    }
}
