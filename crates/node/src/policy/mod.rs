//! NetworkPolicies as the network enforces them: selectors become sets of addresses, named ports numbers, and the policies
//! that select one pod a profile (<https://kubernetes.io/docs/concepts/services-networking/network-policies/>).
//!
//! - [`compile`]: pure; policies, namespaces and pods in, [`network::Policies`] out.
//! - `enforce`: follows the API, and admits each pod to the network before its first container starts.
//! - [`inspect`]: says whether and why a connection passes, and what was refused, over a socket for the command line.

mod enforce;
pub mod inspect;
mod parse;

pub(crate) use enforce::{Enforced, Enforcer};
use network::policy::{Allow, Direction, Isolation, Policies, Ports, Profile, Workload};
pub use parse::Policy;
use parse::{Peer, Port, PortName, Rule};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// A pod with an address.
pub struct Member<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    /// `metadata.labels`, or `null`.
    pub labels: &'a Value,
    pub address: Ipv4Addr,
    /// The pod's `spec`, for its named ports.
    pub spec: &'a Value,
}

/// What [`compile`] makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    pub policies: Policies,
    /// Namespaces whose names in DNS a namespace sees besides its own: those with an ingress rule that lets its
    /// workloads, or anyone, in by name.
    pub visible: BTreeMap<String, BTreeSet<String>>,
}

/// Resolves all policies. `namespaces` are names with `metadata.labels`.
pub fn compile(
    isolation: Isolation,
    policies: &[Arc<Policy>],
    namespaces: &BTreeMap<String, Value>,
    members: &[Member<'_>],
) -> Compiled {
    let mut by_namespace: BTreeMap<&str, Vec<&Arc<Policy>>> = BTreeMap::new();
    for policy in policies {
        by_namespace.entry(&policy.namespace).or_default().push(policy);
    }
    let mut world = World { namespaces, members, out: Policies { isolation, ..Policies::default() } };
    for member in members {
        let own = by_namespace.get(member.namespace).map(Vec::as_slice).unwrap_or_default();
        let selecting: Vec<&Arc<Policy>> =
            own.iter().copied().filter(|policy| policy.selector.matches(member.labels)).collect();
        let [egress, ingress] = [Direction::Egress, Direction::Ingress].map(|d| world.profile(d, &selecting, member));
        let workload = Workload { namespace: member.namespace.into(), name: member.name.into(), egress, ingress };
        world.out.workloads.insert(member.address, workload);
    }
    Compiled { visible: visible(isolation, policies, namespaces), policies: world.out }
}

fn visible(
    isolation: Isolation,
    policies: &[Arc<Policy>],
    namespaces: &BTreeMap<String, Value>,
) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    if isolation == Isolation::Open {
        let names: BTreeSet<String> = namespaces.keys().cloned().collect();
        return namespaces.keys().map(|name| (name.clone(), names.clone())).collect();
    }
    for policy in policies {
        for rule in policy.rules(Direction::Ingress).into_iter().flatten() {
            let lets_in = |labels: &Value| {
                rule.peers.is_empty()
                    || rule.peers.iter().any(|peer| match peer {
                        Peer::Pods { namespaces: Some(selector), .. } => selector.matches(labels),
                        Peer::Pods { namespaces: None, .. } | Peer::Block(_) => false,
                    })
            };
            for (name, _) in namespaces.iter().filter(|(name, labels)| **name != policy.namespace && lets_in(labels)) {
                all.entry(name.clone()).or_default().insert(policy.namespace.clone());
            }
        }
    }
    all
}

struct World<'a> {
    namespaces: &'a BTreeMap<String, Value>,
    members: &'a [Member<'a>],
    out: Policies,
}

impl World<'_> {
    /// The profile of a pod that these policies select; `None`: none of them is about this direction.
    fn profile(&mut self, direction: Direction, selecting: &[&Arc<Policy>], own: &Member<'_>) -> Option<Arc<str>> {
        let about: Vec<_> =
            selecting.iter().filter_map(|policy| policy.rules(direction).map(|rules| (*policy, rules))).collect();
        if about.is_empty() {
            return None;
        }
        let names: Vec<String> = about.iter().map(|(policy, _)| policy.origin()).collect();
        let origin = names.join(" and ");
        let mut key = format!("{direction:?} {origin}");
        if direction == Direction::Ingress {
            // The names of ports mean what this pod's containers say.
            let wanted = about.iter().flat_map(|(_, rules)| rules.iter()).flat_map(|rule| &rule.ports);
            for name in wanted.filter_map(Port::name) {
                let numbers: Vec<String> = numbers(own.spec, name).iter().map(u16::to_string).collect();
                key.push_str(&format!(" {}/{}={}", name.protocol, name.name, numbers.join("+")));
            }
        }
        let key: Arc<str> = key.into();
        if !self.out.profiles.contains_key(&key) {
            let mut allows = Vec::new();
            for (policy, rules) in about {
                for (index, rule) in rules.iter().enumerate() {
                    let field = if direction == Direction::Egress { "egress" } else { "ingress" };
                    let origin: Arc<str> = format!("{} {field}[{index}]", policy.origin()).into();
                    match direction {
                        Direction::Ingress => self.ingress(policy, rule, origin, own, &mut allows),
                        Direction::Egress => self.egress(policy, rule, origin, &mut allows),
                    }
                }
            }
            self.out.profiles.insert(key.clone(), Profile { direction, origin: origin.into(), allows });
        }
        Some(key)
    }

    fn ingress(&mut self, policy: &Policy, rule: &Rule, origin: Arc<str>, own: &Member<'_>, out: &mut Vec<Allow>) {
        let mut ports = Vec::new();
        for port in &rule.ports {
            match port {
                Port::Numbers(range) => ports.push(*range),
                Port::Name(name) => ports.extend(numbers(own.spec, name).into_iter().map(|n| one(name, n))),
            }
        }
        // Ports that no container has: nothing is allowed, which is not the same as no ports at all.
        if ports.is_empty() && !rule.ports.is_empty() {
            return;
        }
        let (anyone, group, blocks) = self.peers(policy, rule);
        out.push(Allow { origin, anyone, group, blocks, ports });
    }

    fn egress(&mut self, policy: &Policy, rule: &Rule, origin: Arc<str>, out: &mut Vec<Allow>) {
        let numeric: Vec<Ports> = rule
            .ports
            .iter()
            .filter_map(|port| match port {
                Port::Numbers(range) => Some(*range),
                Port::Name(_) => None,
            })
            .collect();
        if rule.ports.is_empty() || !numeric.is_empty() {
            let (anyone, group, blocks) = self.peers(policy, rule);
            out.push(Allow { origin: origin.clone(), anyone, group, blocks, ports: numeric });
        }
        for name in rule.ports.iter().filter_map(Port::name) {
            // A name means something else at every destination: one rule for each number it stands for.
            let mut by_number: BTreeMap<u16, BTreeSet<Ipv4Addr>> = BTreeMap::new();
            for member in self.members.iter().filter(|member| self.is_peer(policy, rule, member)) {
                for number in numbers(member.spec, name) {
                    by_number.entry(number).or_default().insert(member.address);
                }
            }
            for (number, addresses) in by_number {
                let key: Arc<str> =
                    format!("{} with {}/{}={number}", rule.peers_key(policy), name.protocol, name.name).into();
                self.out.groups.insert(key.clone(), addresses);
                let ports = vec![one(name, number)];
                out.push(Allow { origin: origin.clone(), anyone: false, group: Some(key), blocks: Vec::new(), ports });
            }
        }
    }

    /// Anyone, a group of pods, ranges of addresses.
    fn peers(&mut self, policy: &Policy, rule: &Rule) -> (bool, Option<Arc<str>>, Vec<(Ipv4Addr, Ipv4Addr)>) {
        if rule.peers.is_empty() {
            return (true, None, Vec::new());
        }
        let blocks: Vec<_> = rule.peers.iter().filter_map(Peer::block).collect();
        let group = rule.peers.iter().any(|peer| peer.block().is_none()).then(|| {
            let key: Arc<str> = rule.peers_key(policy).into();
            if !self.out.groups.contains_key(&key) {
                let peers = self.members.iter().filter(|member| {
                    rule.peers.iter().any(|peer| peer.block().is_none() && self.matches(policy, peer, member))
                });
                let addresses = peers.map(|member| member.address).collect();
                self.out.groups.insert(key.clone(), addresses);
            }
            key
        });
        (false, group, network::policy::ranges(&blocks))
    }

    fn is_peer(&self, policy: &Policy, rule: &Rule, member: &Member<'_>) -> bool {
        rule.peers.is_empty() || rule.peers.iter().any(|peer| self.matches(policy, peer, member))
    }

    fn matches(&self, policy: &Policy, peer: &Peer, member: &Member<'_>) -> bool {
        match peer {
            Peer::Pods { namespaces, pods } => {
                let namespace = match namespaces {
                    None => member.namespace == policy.namespace,
                    Some(selector) => {
                        let labels = self.namespaces.get(member.namespace);
                        labels.is_some_and(|labels| selector.matches(labels))
                    }
                };
                namespace && pods.matches(member.labels)
            }
            Peer::Block(block) => {
                let ranges = network::policy::ranges(std::slice::from_ref(block));
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&member.address))
            }
        }
    }
}

fn one(name: &PortName, number: u16) -> Ports {
    Ports { protocol: parse::protocol(&name.protocol), first: number, last: number }
}

/// The numbers that a pod's containers give a port's name; usually one.
fn numbers(spec: &Value, wanted: &PortName) -> BTreeSet<u16> {
    let lists = ["containers", "initContainers"].into_iter().filter_map(|list| spec.get(list)?.as_array());
    let ports = lists.flatten().filter_map(|container| container.get("ports")?.as_array()).flatten();
    let text = |port: &Value, field: &str| port.get(field).and_then(Value::as_str).map(str::to_owned);
    ports
        .filter(|port| {
            text(port, "name").as_deref() == Some(&wanted.name)
                && text(port, "protocol").unwrap_or_else(|| "TCP".into()) == wanted.protocol
        })
        .filter_map(|port| u16::try_from(port.get("containerPort")?.as_u64()?).ok())
        .collect()
}
