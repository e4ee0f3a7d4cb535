//! AdminNetworkPolicies and the baseline, read from the API.

use super::parse::{Peer, Port, PortName, Rule, list, protocol, selector};
use api::object::{Meta, Object};
use api::selector::Selector;
use network::policy::{Action, Block, Direction, Network, Ports};
use serde_json::Value;

/// Where an administrator's policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Before the namespace's own policies, lower priorities first.
    Admin { priority: u64 },
    /// After them, where none of them isolates a pod.
    Baseline,
}

/// One AdminNetworkPolicy, or the baseline.
#[derive(Clone, Debug)]
pub struct AdminPolicy {
    pub tier: Tier,
    pub name: String,
    namespaces: Selector,
    pods: Selector,
    egress: Vec<Rule>,
    ingress: Vec<Rule>,
}

impl AdminPolicy {
    /// Reads a validated object. Peers that cannot be read fail closed: allowing rules match nothing, others refuse all.
    pub fn read(object: &Object, baseline: bool) -> AdminPolicy {
        let spec = object.get("spec").unwrap_or(&Value::Null);
        let tier = if baseline {
            Tier::Baseline
        } else {
            Tier::Admin { priority: spec.get("priority").and_then(Value::as_u64).unwrap_or(1000) }
        };
        let kind = if baseline { "BaselineAdminNetworkPolicy" } else { "AdminNetworkPolicy" };
        let rules = |field: &str, peers: &str| -> Vec<Rule> {
            let one = |(index, value): (usize, &Value)| {
                let name = match value.get("name").and_then(Value::as_str) {
                    Some(name) if !name.is_empty() => format!(" ({name})"),
                    _ => String::new(),
                };
                rule(value, peers, &format!("{kind} {} {field}[{index}]{name}", object.name()))
            };
            list(spec, field).iter().enumerate().map(one).collect()
        };
        let (namespaces, pods) = match spec.get("subject").and_then(workloads) {
            Some(subject) => subject,
            None => (Selector::nothing(), Selector::nothing()),
        };
        AdminPolicy {
            tier,
            name: object.name().to_owned(),
            namespaces,
            pods,
            egress: rules("egress", "to"),
            ingress: rules("ingress", "from"),
        }
    }

    pub(super) fn selects_namespace(&self, labels: &Value) -> bool {
        self.namespaces.matches(labels)
    }

    pub(super) fn selects(&self, namespace: &Value, pod: &Value) -> bool {
        self.namespaces.matches(namespace) && self.pods.matches(pod)
    }

    pub(super) fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Egress => &self.egress,
            Direction::Ingress => &self.ingress,
        }
    }

    /// For people.
    pub(super) fn origin(&self) -> String {
        match self.tier {
            Tier::Admin { .. } => format!("AdminNetworkPolicy {}", self.name),
            Tier::Baseline => format!("BaselineAdminNetworkPolicy {}", self.name),
        }
    }
}

fn rule(value: &Value, field: &str, origin: &str) -> Rule {
    let action = match value.get("action").and_then(Value::as_str) {
        Some("Allow") => Action::Allow,
        Some("Pass") => Action::Pass,
        _ => Action::Deny,
    };
    let read: Vec<Option<Vec<Peer>>> = list(value, field).iter().map(peers).collect();
    let ports: Vec<Port> = list(value, "ports").iter().filter_map(port).collect();
    let unread = ports.len() != list(value, "ports").len();
    let origin = origin.into();
    if action != Action::Allow && (unread || read.iter().any(Option::is_none)) {
        return Rule { origin, action: Action::Deny, peers: Vec::new(), ports: Vec::new() };
    }
    let mut peers: Vec<Peer> = read.into_iter().flatten().flatten().collect();
    if peers.is_empty() || unread {
        peers.clear();
        // To the rest of the code no peers mean anyone; here they mean nobody.
        peers.push(Peer::Pods { namespaces: Some(Selector::nothing()), pods: Selector::nothing() });
    }
    Rule { origin, action, peers, ports }
}

/// `namespaces`, or `pods` with both its selectors.
fn workloads(value: &Value) -> Option<(Selector, Selector)> {
    let field = |value: &Value, name: &str| value.get(name).filter(|value| !value.is_null()).map(selector);
    if let Some(namespaces) = field(value, "namespaces") {
        return Some((namespaces, Selector::everything()));
    }
    let pods = value.get("pods")?;
    Some((field(pods, "namespaceSelector")?, field(pods, "podSelector")?))
}

fn peers(value: &Value) -> Option<Vec<Peer>> {
    if let Some((namespaces, pods)) = workloads(value) {
        return Some(vec![Peer::Pods { namespaces: Some(namespaces), pods }]);
    }
    if let Some(nodes) = value.get("nodes").filter(|nodes| !nodes.is_null()) {
        return Some(vec![Peer::Nodes(selector(nodes))]);
    }
    let networks = value.get("networks")?.as_array()?;
    let read = networks.iter().filter_map(|one| one.as_str()?.parse::<Network>().ok());
    Some(read.map(|network| Peer::Block(Block { network, except: Vec::new() })).collect())
}

fn port(value: &Value) -> Option<Port> {
    let number = |value: &Value, field: &str| value.get(field)?.as_u64().and_then(|n| u16::try_from(n).ok());
    let of = |value: &Value| protocol(value.get("protocol").and_then(Value::as_str).unwrap_or("TCP"));
    if let Some(name) = value.get("namedPort").and_then(Value::as_str) {
        return Some(Port::Name(PortName { protocol: None, name: name.to_owned() }));
    }
    if let Some(range) = value.get("portRange").filter(|range| !range.is_null()) {
        let (first, last) = (number(range, "start")?, number(range, "end")?);
        return Some(Port::Numbers(Ports { protocol: of(range), first, last }));
    }
    let one = value.get("portNumber")?;
    let port = number(one, "port")?;
    Some(Port::Numbers(Ports { protocol: of(one), first: port, last: port }))
}
