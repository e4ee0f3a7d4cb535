//! AdminNetworkPolicy and BaselineAdminNetworkPolicy: what their schema cannot say.

use super::field::{Problems, at, has, int, items, present, text};
use super::network::network;
use crate::object::{Meta, Object};
use crate::status::Cause;
use serde_json::Value;

pub fn validate(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    spec(&mut p, at(new, "spec"));
    p.into_causes()
}

/// There is one, so that nobody has to ask which is judged first.
pub fn validate_baseline(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    if new.name() != "default" {
        p.invalid_text("metadata.name", new.name(), "the one BaselineAdminNetworkPolicy is named default");
    }
    spec(&mut p, at(new, "spec"));
    p.into_causes()
}

fn spec(p: &mut Problems, spec: &Value) {
    let subject = at(spec, "subject");
    exactly_one(p, "spec.subject", subject, &["namespaces", "pods"]);
    workloads(p, "spec.subject", subject);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in items(spec, direction).iter().enumerate() {
            let path = format!("spec.{direction}[{index}]");
            for (number, one) in items(rule, peers).iter().enumerate() {
                peer(p, &format!("{path}.{peers}[{number}]"), one, direction);
            }
            for (number, one) in items(rule, "ports").iter().enumerate() {
                port(p, &format!("{path}.ports[{number}]"), one);
            }
            let nameless = |peer: &Value| has(peer, "nodes") || has(peer, "networks");
            if items(rule, peers).iter().any(nameless) && items(rule, "ports").iter().any(|port| has(port, "namedPort"))
            {
                p.forbidden(&format!("{path}.ports"), "nodes and networks have no named ports; use portNumber");
            }
        }
    }
}

fn exactly_one(p: &mut Problems, path: &str, value: &Value, fields: &[&str]) {
    match present(value, fields).as_slice() {
        [_] => {}
        [] => p.required(path, &format!("exactly one of {} must be set", fields.join(", "))),
        several => p.forbidden(path, &format!("only one of {} may be set", several.join(", "))),
    }
}

fn workloads(p: &mut Problems, path: &str, value: &Value) {
    p.selector(&format!("{path}.namespaces"), at(value, "namespaces"));
    let pods = at(value, "pods");
    for field in ["namespaceSelector", "podSelector"] {
        p.selector(&format!("{path}.pods.{field}"), at(pods, field));
    }
}

fn peer(p: &mut Problems, path: &str, peer: &Value, direction: &str) {
    let fields: &[&str] =
        if direction == "egress" { &["namespaces", "pods", "nodes", "networks"] } else { &["namespaces", "pods"] };
    exactly_one(p, path, peer, fields);
    workloads(p, path, peer);
    p.selector(&format!("{path}.nodes"), at(peer, "nodes"));
    for (index, cidr) in items(peer, "networks").iter().enumerate() {
        let cidr = cidr.as_str().unwrap_or("");
        if network(cidr).is_none() {
            const WANTED: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            p.invalid_text(&format!("{path}.networks[{index}]"), cidr, WANTED);
        }
    }
}

fn port(p: &mut Problems, path: &str, port: &Value) {
    exactly_one(p, path, port, &["portNumber", "namedPort", "portRange"]);
    if has(port, "namedPort") {
        p.rule(&format!("{path}.namedPort"), text(port, "namedPort"), crate::names::port_name);
    }
    let range = at(port, "portRange");
    if let (Some(start), Some(end)) = (int(range, "start"), int(range, "end"))
        && end < start
    {
        p.invalid(&format!("{path}.portRange.end"), &end.into(), "must be greater than or equal to `start`");
    }
}

#[cfg(test)]
mod tests {
    use crate::kinds;
    use crate::schema::strict;
    use serde_json::{Value, json};

    fn told(plural: &str, name: &str, spec: Value) -> Vec<String> {
        let kind = kinds::find("policy.networking.k8s.io", plural).unwrap();
        let mut object = json!({"metadata": {"name": name}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, None));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn what_the_api_takes_is_taken() {
        let spec = json!({"priority": 5, "subject": {"namespaces": {}},
            "ingress": [{"name": "monitoring", "action": "Pass", "from": [{"namespaces": {"matchLabels": {"team": "ops"}}}],
                "ports": [{"portNumber": {"port": 80}}, {"portRange": {"start": 90, "end": 99, "protocol": "UDP"}},
                    {"namedPort": "metrics"}]}],
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8", "2001:db8::/32"]}, {"nodes": {}},
                {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}}]}]});
        assert_eq!(told("adminnetworkpolicies", "any", spec), Vec::<String>::new());
        assert_eq!(told("baselineadminnetworkpolicies", "default", json!({"subject": {"namespaces": {}}})), [""; 0]);
    }

    #[test]
    fn what_cannot_be_meant_is_named_with_its_path() {
        let spec = json!({"priority": 1001, "subject": {"namespaces": {}, "pods": {"namespaceSelector": {}, "podSelector": {}}},
            "ingress": [{"action": "Log", "from": [{}]}, {"action": "Allow", "from": [{"networks": ["10.0.0.0/8"]}]},
                {"action": "Allow", "from": []}],
            "egress": [{"action": "Allow", "to": [{"networks": ["10.0.0.0"]}], "ports": [{"namedPort": "http"}, {},
                {"portRange": {"start": 9, "end": 8}}, {"portNumber": {"port": 0}}]}]});
        let told_of = told("adminnetworkpolicies", "any", spec);
        for wanted in [
            "spec.priority: Invalid value: 1001",
            "spec.subject: Forbidden: only one of namespaces, pods may be set",
            "spec.ingress[0].action: Unsupported value: \"Log\"",
            "spec.ingress[0].from[0]: Required value: exactly one of namespaces, pods must be set",
            "spec.ingress[1].from[0]: Required value",
            "spec.ingress[2].from: ",
            "spec.egress[0].to[0].networks[0]: Invalid value: \"10.0.0.0\"",
            "spec.egress[0].ports: Forbidden: nodes and networks have no named ports",
            "spec.egress[0].ports[1]: Required value: exactly one of portNumber, namedPort, portRange must be set",
            "spec.egress[0].ports[2].portRange.end: Invalid value: 8: must be greater than or equal to `start`",
            "spec.egress[0].ports[3].portNumber.port: Invalid value: 0",
        ] {
            assert!(told_of.iter().any(|one| one.starts_with(wanted)), "{wanted}\n{told_of:#?}");
        }
        let told_of = told(
            "baselineadminnetworkpolicies",
            "mine",
            json!({"subject": {"namespaces": {}},
            "ingress": [{"action": "Pass", "from": [{"namespaces": {}}]}]}),
        );
        assert!(told_of.iter().any(|one| one.starts_with("metadata.name: Invalid value: \"mine\"")), "{told_of:#?}");
        assert!(told_of.iter().any(|one| one.starts_with("spec.ingress[0].action: Unsupported")), "{told_of:#?}");
    }
}
