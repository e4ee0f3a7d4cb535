//! NetworkPolicy: the types of policy that follow from its rules, and rules across its fields.

use super::field::{Problems, at, fill, has, int, items, object_mut, text};
use crate::object::Object;
use crate::status::Cause;
use serde_json::{Value, json};
use std::net::IpAddr;

/// A policy without `policyTypes` is about ingress, and about egress too if it has egress rules.
pub fn default_policy(policy: &mut Object) {
    let egress = policy.pointer("/spec/egress").and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
    if let Some(spec) = object_mut(policy, "/spec") {
        if spec.get("policyTypes").and_then(Value::as_array).is_some_and(Vec::is_empty) {
            spec.remove("policyTypes");
        }
        fill(spec, "podSelector", json!({}));
        fill(spec, "policyTypes", if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) });
    }
}

pub fn validate_policy(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    p.selector("spec.podSelector", at(spec, "podSelector"));
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in items(spec, direction).iter().enumerate() {
            let path = format!("spec.{direction}[{index}]");
            for (number, one) in items(rule, "ports").iter().enumerate() {
                port(&mut p, &format!("{path}.ports[{number}]"), one);
            }
            for (number, one) in items(rule, peers).iter().enumerate() {
                peer(&mut p, &format!("{path}.{peers}[{number}]"), one);
            }
        }
    }
    let types = items(spec, "policyTypes");
    if types.len() > 2 {
        p.invalid("spec.policyTypes", at(spec, "policyTypes"), "may not specify more than two policyTypes");
    }
    for (index, one) in types.iter().take(2).enumerate() {
        let one = one.as_str().unwrap_or("");
        if !matches!(one, "Ingress" | "Egress") {
            p.unsupported(&format!("spec.policyTypes[{index}]"), one, &["Egress", "Ingress"]);
        }
    }
    p.into_causes()
}

fn port(p: &mut Problems, path: &str, port: &Value) {
    p.one_of(&format!("{path}.protocol"), text(port, "protocol"), &["SCTP", "TCP", "UDP"]);
    let number = at(port, "port");
    p.port_or_name(&format!("{path}.port"), number);
    let (path, Some(end)) = (format!("{path}.endPort"), int(port, "endPort")) else { return };
    match number {
        Value::Null => p.required(&path, "port must be specified along with endPort"),
        Value::String(_) => p.invalid(&path, &end.into(), "endPort may not be specified when port is non-numeric"),
        _ if end < number.as_i64().unwrap_or(0) => {
            p.invalid(&path, &end.into(), "must be greater than or equal to `port`");
        }
        _ => p.port(&path, end),
    }
}

fn peer(p: &mut Problems, path: &str, peer: &Value) {
    let selectors = ["podSelector", "namespaceSelector"];
    for field in selectors {
        p.selector(&format!("{path}.{field}"), at(peer, field));
    }
    let selected = selectors.iter().any(|field| has(peer, field));
    if !has(peer, "ipBlock") {
        if !selected {
            p.required(path, "must specify a peer");
        }
        return;
    }
    if selected {
        p.forbidden(path, "may not specify both ipBlock and another peer");
    }
    let (path, block) = (format!("{path}.ipBlock"), at(peer, "ipBlock"));
    let cidr = text(block, "cidr");
    if cidr.is_empty() {
        return p.required(&format!("{path}.cidr"), "");
    }
    const WANTED: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let Some(outer) = network(cidr) else {
        return p.invalid_text(&format!("{path}.cidr"), cidr, WANTED);
    };
    for (index, except) in items(block, "except").iter().enumerate() {
        let (path, except) = (format!("{path}.except[{index}]"), except.as_str().unwrap_or(""));
        match network(except) {
            None => p.invalid_text(&path, except, WANTED),
            Some(inner) if !strictly_inside(inner, outer) => {
                p.invalid_text(&path, except, &format!("must be a strict subset of `cidr`, {cidr}"));
            }
            Some(_) => {}
        }
    }
}

/// Address bits (IPv4 in the upper 32 of 128), prefix length, whether IPv4. Host bits may be set, as in Kubernetes.
pub(super) fn network(text: &str) -> Option<(u128, u8, bool)> {
    let (address, prefix) = text.split_once('/')?;
    let plain = prefix.bytes().all(|b| b.is_ascii_digit()) && (prefix.len() == 1 || !prefix.starts_with('0'));
    let prefix: u8 = prefix.parse().ok().filter(|_| plain)?;
    match address.parse().ok()? {
        IpAddr::V4(v4) if prefix <= 32 => Some((u128::from(v4.to_bits()) << 96, prefix, true)),
        IpAddr::V6(v6) if prefix <= 128 => Some((v6.to_bits(), prefix, false)),
        _ => None,
    }
}

fn strictly_inside(inner: (u128, u8, bool), outer: (u128, u8, bool)) -> bool {
    let mask = u128::MAX.checked_shl(128 - u32::from(outer.1)).unwrap_or(0);
    inner.2 == outer.2 && inner.1 > outer.1 && inner.0 & mask == outer.0 & mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    fn told(spec: Value) -> Vec<String> {
        let kind = kinds::find("networking.k8s.io", "networkpolicies").unwrap();
        let mut object = json!({"metadata": {"name": "x"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        (kind.hooks.default.unwrap())(&mut object);
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, None));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn what_kubernetes_takes_is_taken() {
        assert!(told(json!({})).is_empty());
        assert!(
            told(json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{}, {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                {"namespaceSelector": {}, "podSelector": {"matchLabels": {"a": "b"}}}],
                "ports": [{"port": 80, "endPort": 90}, {"port": "http", "protocol": "UDP"}, {"protocol": "SCTP"}]}],
            "egress": [{"to": [{"ipBlock": {"cidr": "2001:db8::/32"}}]}]}))
            .is_empty()
        );
    }

    #[test]
    fn the_types_of_a_policy_follow_from_its_rules() {
        let types = |spec: Value| {
            let mut policy = json!({"spec": spec});
            default_policy(&mut policy);
            policy["spec"]["policyTypes"].clone()
        };
        assert_eq!(types(json!({})), json!(["Ingress"]));
        assert_eq!(types(json!({"egress": [{}]})), json!(["Ingress", "Egress"]));
        assert_eq!(types(json!({"egress": []})), json!(["Ingress"]));
        assert_eq!(types(json!({"policyTypes": ["Egress"]})), json!(["Egress"]));
    }

    #[test]
    fn what_cannot_be_meant_is_named_with_its_path() {
        assert_eq!(
            told(json!({"policyTypes": ["Sideways"], "ingress": [{
                "from": [{}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8", "x", "11.0.0.0/16"]}, "podSelector": {}},
                    {"ipBlock": {"cidr": "10.0.0.0"}}, {"ipBlock": {"cidr": "10.0.0.0/033"}}],
                "ports": [{"port": 0}, {"port": 80, "endPort": 70}, {"endPort": 70}, {"port": "http", "endPort": 90},
                    {"port": 70000}, {"port": "no_name"}, {"port": 1, "protocol": "ICMP"}]}]})),
            [
                "spec.ingress[0].ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "spec.ingress[0].ports[1].endPort: Invalid value: 70: must be greater than or equal to `port`",
                "spec.ingress[0].ports[2].endPort: Required value: port must be specified along with endPort",
                "spec.ingress[0].ports[3].endPort: Invalid value: 90: endPort may not be specified when port is non-numeric",
                "spec.ingress[0].ports[4].port: Invalid value: 70000: must be between 1 and 65535, inclusive",
                "spec.ingress[0].ports[5].port: Invalid value: \"no_name\": must contain only alpha-numeric characters (a-z, 0-9), \
                 and hyphens (-)",
                "spec.ingress[0].ports[6].protocol: Unsupported value: \"ICMP\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
                "spec.ingress[0].from[0]: Required value: must specify a peer",
                "spec.ingress[0].from[1]: Forbidden: may not specify both ipBlock and another peer",
                "spec.ingress[0].from[1].ipBlock.except[0]: Invalid value: \"10.0.0.0/8\": must be a strict subset of `cidr`, \
                 10.0.0.0/8",
                "spec.ingress[0].from[1].ipBlock.except[1]: Invalid value: \"x\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or \
                 2001:db8::/64)",
                "spec.ingress[0].from[1].ipBlock.except[2]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`, \
                 10.0.0.0/8",
                "spec.ingress[0].from[2].ipBlock.cidr: Invalid value: \"10.0.0.0\": must be a valid CIDR value, (e.g. 10.9.8.0/24 \
                 or 2001:db8::/64)",
                "spec.ingress[0].from[3].ipBlock.cidr: Invalid value: \"10.0.0.0/033\": must be a valid CIDR value, (e.g. \
                 10.9.8.0/24 or 2001:db8::/64)",
                "spec.policyTypes[0]: Unsupported value: \"Sideways\": supported values: \"Egress\", \"Ingress\"",
            ]
        );
    }
}
