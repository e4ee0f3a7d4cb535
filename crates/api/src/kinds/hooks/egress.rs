//! EgressPolicy: names that can be names of hosts outside, and ports that there are.

use super::field::{Problems, at, has, int, items, text};
use crate::names::{service_port, wildcard_subdomain};
use crate::object::Object;
use crate::status::Cause;
use serde_json::Value;
use std::net::IpAddr;

pub fn validate(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    p.selector("spec.podSelector", at(spec, "podSelector"));
    for (index, rule) in items(spec, "egress").iter().enumerate() {
        let path = format!("spec.egress[{index}]");
        for (number, peer) in items(rule, "to").iter().enumerate() {
            dns_name(&mut p, &format!("{path}.to[{number}].dnsName"), text(peer, "dnsName"));
        }
        for (number, one) in items(rule, "ports").iter().enumerate() {
            port(&mut p, &format!("{path}.ports[{number}]"), one);
        }
    }
    p.into_causes()
}

fn dns_name(p: &mut Problems, path: &str, name: &str) {
    if name.is_empty() {
        return;
    }
    let plain = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if plain.parse::<IpAddr>().is_ok() {
        return p.invalid_text(path, name, "is an address; allow addresses by ipBlock of a NetworkPolicy");
    }
    let problems = match plain.strip_prefix("*.") {
        Some(_) => wildcard_subdomain(&plain),
        None => crate::names::dns_subdomain(&plain),
    };
    if !problems.is_empty() || plain.split('.').any(|label| label.len() > 63) {
        return p.invalid_text(path, name, "must be a DNS name such as api.example.org, or *. and one");
    }
    if !plain.trim_start_matches("*.").contains('.') {
        return p.invalid_text(path, name, "must have at least two labels; a whole top-level domain is not a name");
    }
    if plain == "cluster.local" || plain.ends_with(".cluster.local") {
        p.invalid_text(path, name, "is inside the cluster; select its pods in a NetworkPolicy");
    }
}

fn port(p: &mut Problems, path: &str, port: &Value) {
    let number = at(port, "port");
    match number {
        Value::String(name) if service_port(name).is_none() => {
            let detail = "is no well-known port, and hosts outside have no names for theirs; give its number";
            p.invalid_text(&format!("{path}.port"), name, detail);
        }
        Value::Number(number) => p.port(&format!("{path}.port"), number.as_i64().unwrap_or(0)),
        _ => {}
    }
    let (path, Some(end)) = (format!("{path}.endPort"), int(port, "endPort")) else { return };
    match number {
        Value::Number(first) if end < first.as_i64().unwrap_or(0) => {
            p.invalid(&path, &end.into(), "must be greater than or equal to `port`");
        }
        Value::Number(_) => {}
        Value::String(_) => p.invalid(&path, &end.into(), "endPort may not be specified when port is non-numeric"),
        _ if has(port, "endPort") => p.required(&path, "port must be specified along with endPort"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;
    use serde_json::json;

    fn told(spec: Value) -> Vec<String> {
        let kind = kinds::find("atoll.dev", "egresspolicies").unwrap();
        let mut object = json!({"metadata": {"name": "x"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, None));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    fn name(name: &str) -> Vec<String> {
        told(json!({"podSelector": {}, "egress": [{"to": [{"dnsName": name}]}]}))
    }

    #[test]
    fn names_of_hosts_are_taken() {
        for fine in ["api.example.org", "*.example.org", "API.Example.org.", "xn--bcher-kva.example", "a-1.b.c.d.e.fr"]
        {
            assert!(name(fine).is_empty(), "{fine}: {:?}", name(fine));
        }
        assert!(told(json!({"podSelector": {}})).is_empty());
        let ports = json!([{"port": 443}, {"port": "https"}, {"port": 8000, "endPort": 8100, "protocol": "UDP"}, {}]);
        let spec = json!({"podSelector": {"matchLabels": {"a": "b"}},
            "egress": [{"to": [{"dnsName": "a.example"}], "ports": ports}]});
        assert!(told(spec).is_empty());
    }

    #[test]
    fn what_is_no_name_is_told_with_its_path() {
        let long = format!("{}.org", "a".repeat(64));
        for bad in [
            "",
            "*",
            "*.",
            ".",
            "..",
            "a..b",
            "org",
            "*.org",
            "10.0.0.1",
            "fd00::1",
            "a.*.org",
            "*a.example.org",
            "*.*.example.org",
            "-a.example.org",
            "a_b.example.org",
            "http://example.org",
            "example.org/x",
            "example.org:443",
            "ex ample.org",
            "bücher.example",
            "web.shop.svc.cluster.local",
            "cluster.local",
            &long,
        ] {
            let told = name(bad);
            assert!(told.len() == 1 && told[0].starts_with("spec.egress[0].to[0].dnsName: "), "{bad}: {told:?}");
        }
    }

    #[test]
    fn ports_and_selectors_are_checked() {
        let ports = json!([{"port": 0}, {"port": 70000}, {"port": "nonsense"}, {"port": 80, "endPort": 70},
            {"endPort": 70}, {"port": "https", "endPort": 500}, {"port": 1, "protocol": "ICMP"}]);
        let spec = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]},
            "egress": [{"to": [{"dnsName": "a.example"}], "ports": ports}, {"to": []}]});
        let told = told(spec);
        for wanted in [
            "spec.egress[0].ports[0].port: ",
            "spec.egress[0].ports[1].port: ",
            "spec.egress[0].ports[2].port: ",
            "spec.egress[0].ports[3].endPort: ",
            "spec.egress[0].ports[4].endPort: ",
            "spec.egress[0].ports[5].endPort: ",
            "spec.egress[0].ports[6].protocol: ",
            "spec.podSelector.matchExpressions[0].operator: ",
            "spec.egress[1].to: ",
        ] {
            assert!(told.iter().any(|one| one.starts_with(wanted)), "{wanted}: {told:#?}");
        }
        assert_eq!(told.len(), 9, "{told:#?}");
    }
}
