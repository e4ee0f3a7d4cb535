//! What Kubernetes says a policy means, written down a second time: straight from the objects, one pair and port at a
//! time, with nothing of the code under test.
//! <https://kubernetes.io/docs/concepts/services-networking/network-policies/>,
//! <https://network-policy-api.sigs.k8s.io/reference/spec/>

use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Clone, Debug)]
pub struct Pod {
    pub namespace: &'static str,
    pub name: String,
    pub labels: Value,
    pub address: Ipv4Addr,
    pub address6: Ipv6Addr,
    /// Its TCP port named `http`.
    pub http: u16,
}

impl Pod {
    pub fn both(&self) -> [IpAddr; 2] {
        [self.address.into(), self.address6.into()]
    }
}

pub struct World<'a> {
    pub private: bool,
    pub namespaces: &'a [(&'static str, Value)],
    pub policies: &'a [Value],
}

/// `protocol` is `TCP`, `UDP` or `ICMP`, with a 6 behind it over IPv6.
pub fn allowed(world: &World<'_>, from: &Pod, to: &Pod, protocol: &str, port: u16) -> bool {
    let itself = from.address == to.address;
    itself
        || (side(world, "Egress", from, to, to, protocol, port) && side(world, "Ingress", to, from, to, protocol, port))
}

fn side(world: &World<'_>, kind: &str, own: &Pod, peer: &Pod, to: &Pod, protocol: &str, port: u16) -> bool {
    let of_kind = |kind: &'static str| world.policies.iter().filter(move |policy| policy["kind"] == kind);
    let mut admin: Vec<&Value> = of_kind("AdminNetworkPolicy").collect();
    admin.sort_by_key(|policy| {
        (policy["spec"]["priority"].as_u64().unwrap(), policy["metadata"]["name"].as_str().unwrap())
    });
    let first_action = |policies: Vec<&Value>| -> Option<String> {
        let action = |policy| admin_action(world, policy, kind, own, peer, to, protocol, port);
        policies.into_iter().find_map(|policy| action(policy).map(str::to_owned))
    };
    match first_action(admin).as_deref() {
        Some("Allow") => return true,
        Some("Deny") => return false,
        _ => {}
    }
    let mut isolated = false;
    for policy in world.policies.iter().filter(|policy| policy["kind"].is_null()) {
        let spec = &policy["spec"];
        let mine = policy["metadata"]["namespace"] == own.namespace && selects(&spec["podSelector"], &own.labels);
        if !mine || !types(spec).contains(&kind) {
            continue;
        }
        isolated = true;
        let (rules, peers) = if kind == "Egress" { ("egress", "to") } else { ("ingress", "from") };
        for rule in array(&spec[rules]) {
            let peer_fits = array(&rule[peers]).is_empty()
                || array(&rule[peers]).iter().any(|p| is_peer(world, own.namespace, p, peer, protocol));
            let port_fits = array(&rule["ports"]).is_empty()
                || array(&rule["ports"]).iter().any(|p| is_port(p, to, protocol, port));
            if peer_fits && port_fits {
                return true;
            }
        }
    }
    if isolated {
        return false;
    }
    match first_action(of_kind("BaselineAdminNetworkPolicy").collect()).as_deref() {
        Some("Allow") => true,
        Some("Deny") => false,
        _ => !world.private || own.namespace == peer.namespace,
    }
}

/// What the first rule of an administrator's policy that matches says.
#[allow(clippy::too_many_arguments)]
fn admin_action<'a>(
    world: &World<'_>,
    policy: &'a Value,
    kind: &str,
    own: &Pod,
    peer: &Pod,
    to: &Pod,
    protocol: &str,
    port: u16,
) -> Option<&'a str> {
    let spec = &policy["spec"];
    if !is_chosen(world, &spec["subject"], own, protocol) {
        return None;
    }
    let (rules, peers) = if kind == "Egress" { ("egress", "to") } else { ("ingress", "from") };
    let matches = |rule: &&Value| {
        array(&rule[peers]).iter().any(|one| is_chosen(world, one, peer, protocol))
            && (rule["ports"].is_null()
                || array(&rule["ports"]).iter().any(|one| is_admin_port(one, to, protocol, port)))
    };
    array(&spec[rules]).iter().find(matches).and_then(|rule| rule["action"].as_str())
}

/// Whether a subject or peer of an administrator's policy names a pod; nodes are no pods.
fn is_chosen(world: &World<'_>, chosen: &Value, pod: &Pod, protocol: &str) -> bool {
    let namespace = |selector: &Value| {
        world.namespaces.iter().any(|(name, labels)| *name == pod.namespace && selects(selector, labels))
    };
    let inside = |network: &Value| is_inside(network, pod, protocol);
    (chosen["namespaces"].is_object() && namespace(&chosen["namespaces"]))
        || (chosen["pods"].is_object()
            && namespace(&chosen["pods"]["namespaceSelector"])
            && selects(&chosen["pods"]["podSelector"], &pod.labels))
        || array(&chosen["networks"]).iter().any(inside)
}

fn is_admin_port(wanted: &Value, to: &Pod, protocol: &str, port: u16) -> bool {
    if let Some(name) = wanted["namedPort"].as_str() {
        return name == "http" && plain(protocol) == "TCP" && to.http == port;
    }
    let (range, number) = (&wanted["portRange"], &wanted["portNumber"]);
    let of = if range.is_object() { range } else { number };
    if of["protocol"].as_str().unwrap_or("TCP") != plain(protocol) {
        return false;
    }
    if range.is_object() {
        (range["start"].as_u64().unwrap()..=range["end"].as_u64().unwrap()).contains(&u64::from(port))
    } else {
        number["port"] == u64::from(port)
    }
}

fn plain(protocol: &str) -> &str {
    protocol.trim_end_matches('6')
}

fn is_inside(network: &Value, pod: &Pod, protocol: &str) -> bool {
    let (base, prefix) = network.as_str().unwrap().split_once('/').unwrap();
    let prefix = prefix.parse::<u32>().unwrap();
    let same = |a: u128, b: u128, width: u32| prefix == 0 || a >> (width - prefix) == b >> (width - prefix);
    match (base.parse().unwrap(), protocol.ends_with('6')) {
        (IpAddr::V4(base), false) => same(base.to_bits().into(), pod.address.to_bits().into(), 32),
        (IpAddr::V6(base), true) => same(base.to_bits(), pod.address6.to_bits(), 128),
        _ => false,
    }
}

fn types(spec: &Value) -> Vec<&str> {
    let named: Vec<&str> = array(&spec["policyTypes"]).iter().filter_map(Value::as_str).collect();
    match (named.is_empty(), array(&spec["egress"]).is_empty()) {
        (false, _) => named,
        (true, true) => vec!["Ingress"],
        (true, false) => vec!["Ingress", "Egress"],
    }
}

fn is_peer(world: &World<'_>, own: &str, peer: &Value, pod: &Pod, protocol: &str) -> bool {
    if peer["ipBlock"].is_object() {
        let inside = |network: &Value| is_inside(network, pod, protocol);
        return inside(&peer["ipBlock"]["cidr"]) && !array(&peer["ipBlock"]["except"]).iter().any(inside);
    }
    let namespace = match &peer["namespaceSelector"] {
        Value::Null => pod.namespace == own,
        selector => world.namespaces.iter().any(|(name, labels)| *name == pod.namespace && selects(selector, labels)),
    };
    namespace && (peer["podSelector"].is_null() || selects(&peer["podSelector"], &pod.labels))
}

fn is_port(wanted: &Value, to: &Pod, protocol: &str, port: u16) -> bool {
    if wanted["protocol"].as_str().unwrap_or("TCP") != plain(protocol) {
        return false;
    }
    match &wanted["port"] {
        Value::Null => true,
        Value::String(name) => name == "http" && plain(protocol) == "TCP" && to.http == port,
        number => {
            let first = number.as_u64().unwrap();
            (first..=wanted["endPort"].as_u64().unwrap_or(first)).contains(&u64::from(port))
        }
    }
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten().all(|(key, value)| &labels[key] == value);
    let fits = |expression: &Value| {
        let have = &labels[expression["key"].as_str().unwrap()];
        let among = array(&expression["values"]).contains(have);
        match expression["operator"].as_str().unwrap() {
            "In" => among,
            "NotIn" => !among,
            "Exists" => !have.is_null(),
            "DoesNotExist" => have.is_null(),
            other => panic!("{other}"),
        }
    };
    equal && array(&selector["matchExpressions"]).iter().all(fits)
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
