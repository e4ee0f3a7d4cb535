//! EgressPolicies, read from the API.

use super::parse::{list, protocol, selector};
use api::names::service_port;
use api::object::{Meta, Object};
use api::selector::Selector;
use network::Pattern;
use network::policy::Ports;
use serde_json::Value;
use std::sync::Arc;

/// One EgressPolicy.
#[derive(Clone, Debug)]
pub struct EgressPolicy {
    pub namespace: String,
    pub name: String,
    /// Which pods of its namespace it is for.
    pub selector: Selector,
    pub(super) rules: Vec<NamedRule>,
}

#[derive(Clone, Debug)]
pub(super) struct NamedRule {
    /// Where it comes from, for people.
    pub origin: Arc<str>,
    /// Not empty.
    pub patterns: Vec<Pattern>,
    /// Empty: everything.
    pub ports: Vec<Ports>,
}

impl EgressPolicy {
    /// Reads a validated object; what cannot be read selects or allows nothing.
    pub fn read(object: &Object) -> EgressPolicy {
        let spec = object.get("spec").unwrap_or(&Value::Null);
        let (namespace, name) = (object.namespace(), object.name());
        let rule = |(index, value): (usize, &Value)| {
            let names = list(value, "to").iter().filter_map(|peer| peer.get("dnsName")?.as_str()?.parse().ok());
            let mut patterns: Vec<Pattern> = names.collect();
            patterns.sort();
            patterns.dedup();
            let ports: Vec<Ports> = list(value, "ports").iter().filter_map(port).collect();
            let readable = !patterns.is_empty() && ports.len() == list(value, "ports").len();
            let origin = format!("EgressPolicy {namespace}/{name} egress[{index}]").into();
            readable.then_some(NamedRule { origin, patterns, ports })
        };
        EgressPolicy {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            selector: spec.get("podSelector").map_or_else(Selector::nothing, selector),
            rules: list(spec, "egress").iter().enumerate().filter_map(rule).collect(),
        }
    }

    /// For people.
    pub(super) fn origin(&self) -> String {
        format!("EgressPolicy {}/{}", self.namespace, self.name)
    }
}

fn port(value: &Value) -> Option<Ports> {
    let protocol = protocol(value.get("protocol").and_then(Value::as_str).unwrap_or("TCP"));
    let number = |value: &Value| value.as_u64().and_then(|n| u16::try_from(n).ok());
    let (first, last) = match value.get("port") {
        None | Some(Value::Null) => (0, u16::MAX),
        Some(Value::String(name)) => service_port(name).map(|port| (port, port))?,
        Some(first) => {
            let first = number(first)?;
            (first, value.get("endPort").map_or(Some(first), number)?)
        }
    };
    Some(Ports { protocol, first, last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use network::Protocol;
    use serde_json::json;

    #[test]
    fn rules_are_names_and_ports() {
        let policy = EgressPolicy::read(&json!({"metadata": {"namespace": "shop", "name": "out"}, "spec": {
            "podSelector": {}, "egress": [
                {"to": [{"dnsName": "B.example."}, {"dnsName": "*.a.example"}, {"dnsName": "b.example"}],
                 "ports": [{"port": "https"}, {"protocol": "UDP", "port": 5, "endPort": 9}, {"protocol": "SCTP"}]},
                {"to": [{"dnsName": "c.example"}]},
                {"to": [{"dnsName": "d.example"}], "ports": [{"port": "nonsense"}]},
                {"to": [{"dnsName": "e e"}]}]}}));
        assert_eq!(policy.rules.len(), 2, "what cannot be read allows nothing: {:?}", policy.rules);
        let names: Vec<String> = policy.rules[0].patterns.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["b.example", "*.a.example"]);
        let range = |protocol, first, last| Ports { protocol, first, last };
        let all = range(Protocol::Sctp, 0, u16::MAX);
        assert_eq!(policy.rules[0].ports, [range(Protocol::Tcp, 443, 443), range(Protocol::Udp, 5, 9), all]);
        assert!(policy.rules[1].ports.is_empty());
        assert_eq!(&*policy.rules[1].origin, "EgressPolicy shop/out egress[1]");
        assert!(!EgressPolicy::read(&json!({"spec": {}})).selector.matches(&json!({})));
    }
}
