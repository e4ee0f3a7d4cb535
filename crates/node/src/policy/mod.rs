//! Policies as the network enforces them: selectors become sets of addresses, named ports numbers, and the policies of one
//! tier that select one pod a profile (<https://kubernetes.io/docs/concepts/services-networking/network-policies/>,
//! <https://network-policy-api.sigs.k8s.io/api-overview/>).
//!
//! - [`compile`]: pure; policies, namespaces and pods in, [`network::Policies`] out.
//! - `enforce`: follows the API, and admits each pod to the network before its first container starts.
//! - [`inspect`]: says whether and why a connection passes, and what was refused, over a socket for the command line.

mod admin;
mod egress;
mod enforce;
pub mod inspect;
mod parse;
mod watch;

pub use admin::{AdminPolicy, Tier};
pub use egress::EgressPolicy;
pub(crate) use enforce::{Enforced, Enforcer};
use network::policy::{
    Action, Block, Direction, Isolation, Network, Otherwise, Policies, Ports, Profile, Ranges, Workload,
};
use network::{NameSet, Protocol, RouterConfig};
pub use parse::Policy;
use parse::{Peer, Port, PortName, Rule};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
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

/// A node's labels and addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub labels: Value,
    pub addresses: Vec<IpAddr>,
}

/// All that [`compile`] looks at.
pub struct World<'a> {
    pub config: &'a RouterConfig,
    pub isolation: Isolation,
    pub policies: &'a [Arc<Policy>],
    pub by_name: &'a [Arc<EgressPolicy>],
    pub admin: &'a [Arc<AdminPolicy>],
    /// Names with `metadata.labels`.
    pub namespaces: &'a BTreeMap<String, Value>,
    pub nodes: &'a [Node],
    pub members: &'a [Member<'a>],
}

/// What [`compile`] makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    pub policies: Policies,
    /// Namespaces whose names in DNS a namespace sees besides its own: those with an ingress rule that lets its
    /// workloads, or anyone, in by name.
    pub visible: BTreeMap<String, BTreeSet<String>>,
}

/// Resolves all policies.
pub fn compile(world: &World<'_>) -> Compiled {
    let mut by_namespace: BTreeMap<&str, Vec<&Arc<Policy>>> = BTreeMap::new();
    for policy in world.policies {
        by_namespace.entry(&policy.namespace).or_default().push(policy);
    }
    let mut by_name: BTreeMap<&str, Vec<&EgressPolicy>> = BTreeMap::new();
    for policy in world.by_name {
        by_name.entry(&policy.namespace).or_default().push(policy);
    }
    let mut admin: Vec<&AdminPolicy> = world.admin.iter().map(Arc::as_ref).collect();
    admin.sort_by(|a, b| (a.tier, &a.name).cmp(&(b.tier, &b.name)));
    let nodes = world.nodes.iter().flat_map(|node| &node.addresses).copied().collect();
    let out = Policies { isolation: world.isolation, nodes, ..Policies::default() };
    let mut compiler = Compiler { world, out };
    for member in world.members {
        let own = by_namespace.get(member.namespace).map(Vec::as_slice).unwrap_or_default();
        let own: Vec<&Policy> =
            own.iter().map(|policy| &***policy).filter(|policy| policy.selector.matches(member.labels)).collect();
        let named = by_name.get(member.namespace).map(Vec::as_slice).unwrap_or_default();
        let named: Vec<&EgressPolicy> =
            named.iter().copied().filter(|policy| policy.selector.matches(member.labels)).collect();
        let labels = world.namespaces.get(member.namespace).unwrap_or(&Value::Null);
        let admin: Vec<&AdminPolicy> =
            admin.iter().copied().filter(|policy| policy.selects(labels, member.labels)).collect();
        let egress = compiler.tiers(Direction::Egress, (&own, &named), &admin, member);
        let ingress = compiler.tiers(Direction::Ingress, (&own, &[]), &admin, member);
        let workload = Workload { namespace: member.namespace.into(), name: member.name.into(), egress, ingress };
        compiler.out.workloads.insert(member.address, workload);
    }
    Compiled { visible: visible(world), policies: compiler.out }
}

fn visible(world: &World<'_>) -> BTreeMap<String, BTreeSet<String>> {
    let namespaces = world.namespaces;
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    if world.isolation == Isolation::Open {
        let names: BTreeSet<String> = namespaces.keys().cloned().collect();
        return namespaces.keys().map(|name| (name.clone(), names.clone())).collect();
    }
    let mut let_in = |into: &str, rule: &Rule| {
        let lets_in = |labels: &Value| {
            rule.peers.is_empty()
                || rule.peers.iter().any(|peer| match peer {
                    Peer::Pods { namespaces: Some(selector), .. } => selector.matches(labels),
                    Peer::Pods { namespaces: None, .. } | Peer::Block(_) | Peer::Nodes(_) => false,
                })
        };
        for (name, _) in namespaces.iter().filter(|(name, labels)| *name != into && lets_in(labels)) {
            all.entry(name.clone()).or_default().insert(into.to_owned());
        }
    };
    for policy in world.policies {
        for rule in policy.rules(Direction::Ingress).into_iter().flatten() {
            let_in(&policy.namespace, rule);
        }
    }
    for policy in world.admin {
        let subjects = || namespaces.iter().filter(|(_, labels)| policy.selects_namespace(labels));
        for rule in policy.rules(Direction::Ingress).iter().filter(|rule| rule.action == Action::Allow) {
            subjects().for_each(|(name, _)| let_in(name, rule));
        }
    }
    all
}

struct Compiler<'a> {
    world: &'a World<'a>,
    out: Policies,
}

impl Compiler<'_> {
    /// The profile that a pod's connections go through first: administrators' policies lead to the namespace's own, or to
    /// the baseline where none of those is about this direction. `None`: the default holds.
    fn tiers(
        &mut self,
        direction: Direction,
        (own, named): (&[&Policy], &[&EgressPolicy]),
        admin: &[&AdminPolicy],
        pod: &Member<'_>,
    ) -> Option<Arc<str>> {
        let of_tier = |baseline: bool| -> (Vec<String>, Vec<&Rule>) {
            let about = admin
                .iter()
                .filter(|policy| (policy.tier == Tier::Baseline) == baseline && !policy.rules(direction).is_empty());
            (about.clone().map(|p| p.origin()).collect(), about.flat_map(|p| p.rules(direction)).collect())
        };
        let isolating: Vec<_> = own.iter().filter_map(|p| p.rules(direction).map(|rules| (*p, rules))).collect();
        let mut first = None;
        if !isolating.is_empty() || !named.is_empty() {
            let names = isolating.iter().map(|(policy, _)| policy.origin());
            let names = names.chain(named.iter().map(|policy| policy.origin())).collect();
            let rules: Vec<&Rule> = isolating.iter().flat_map(|(_, rules)| rules.iter()).collect();
            first = Some(self.profile(direction, names, (&rules, named), Otherwise::Refuse, pod));
        } else if let (names, rules) = of_tier(true)
            && !rules.is_empty()
        {
            first = Some(self.profile(direction, names, (&rules, &[]), Otherwise::Default, pod));
        }
        let (names, rules) = of_tier(false);
        if rules.is_empty() {
            return first;
        }
        let otherwise = first.map_or(Otherwise::Default, Otherwise::Profile);
        Some(self.profile(direction, names, (&rules, &[]), otherwise, pod))
    }

    /// The key of the profile with these rules for a pod; pods for which they mean the same share it.
    fn profile(
        &mut self,
        direction: Direction,
        names: Vec<String>,
        (rules, named): (&[&Rule], &[&EgressPolicy]),
        otherwise: Otherwise,
        own: &Member<'_>,
    ) -> Arc<str> {
        let origin = names.join(" and ");
        let mut key = format!("{direction:?} {origin}");
        if direction == Direction::Ingress {
            // The names of ports mean what this pod's containers say.
            for name in rules.iter().flat_map(|rule| &rule.ports).filter_map(Port::name) {
                key.push_str(&format!(" {}={:?}", name.name, numbers(own.spec, name)));
            }
        }
        if let Otherwise::Profile(next) = &otherwise {
            key.push_str(&format!(" then {next}"));
        }
        let key: Arc<str> = key.into();
        if !self.out.profiles.contains_key(&key) {
            let mut out = Vec::new();
            for rule in rules {
                match direction {
                    Direction::Ingress => self.ingress(rule, own, &mut out),
                    Direction::Egress => self.egress(rule, own.namespace, &mut out),
                }
            }
            named.iter().for_each(|policy| self.named(policy, &mut out));
            self.out.profiles.insert(key.clone(), Profile { direction, origin: origin.into(), rules: out, otherwise });
        }
        key
    }

    /// Rules with the same names share a set of addresses.
    fn named(&mut self, policy: &EgressPolicy, out: &mut Vec<network::policy::Rule>) {
        for rule in &policy.rules {
            let names: Vec<String> = rule.patterns.iter().map(ToString::to_string).collect();
            let key: Arc<str> = format!("{}:{}", policy.namespace, names.join("|")).into();
            let set = || NameSet { namespace: policy.namespace.as_str().into(), patterns: rule.patterns.clone() };
            self.out.names.entry(key.clone()).or_insert_with(set);
            out.push(network::policy::Rule {
                origin: rule.origin.clone(),
                action: Action::Allow,
                anyone: false,
                group: None,
                blocks: Ranges::default(),
                names: Some(key),
                ports: rule.ports.clone(),
            });
        }
    }

    fn ingress(&mut self, rule: &Rule, own: &Member<'_>, out: &mut Vec<network::policy::Rule>) {
        let mut ports = Vec::new();
        for port in &rule.ports {
            match port {
                Port::Numbers(range) => ports.push(*range),
                Port::Name(name) => ports.extend(numbers(own.spec, name)),
            }
        }
        // Ports that no container has: nothing matches, which is not the same as no ports at all.
        if ports.is_empty() && !rule.ports.is_empty() {
            return;
        }
        out.push(self.rule(rule, own.namespace, ports));
    }

    fn egress(&mut self, rule: &Rule, namespace: &str, out: &mut Vec<network::policy::Rule>) {
        let numeric: Vec<Ports> = rule
            .ports
            .iter()
            .filter_map(|port| match port {
                Port::Numbers(range) => Some(*range),
                Port::Name(_) => None,
            })
            .collect();
        if rule.ports.is_empty() || !numeric.is_empty() {
            out.push(self.rule(rule, namespace, numeric));
        }
        for name in rule.ports.iter().filter_map(Port::name) {
            // A name means something else at every destination: one rule for each number it stands for.
            let blocks: Vec<Block> = rule.peers.iter().flat_map(|peer| self.blocks(peer)).collect();
            let inside = network::policy::ranges(&blocks);
            let mut by_number: BTreeMap<Ports, (BTreeSet<Ipv4Addr>, Vec<Block>)> = BTreeMap::new();
            for member in self.world.members {
                let pod = rule.peers.is_empty() || rule.peers.iter().any(|peer| self.matches(namespace, peer, member));
                let both: [IpAddr; 2] = [member.address.into(), self.world.config.v6_of(member.address).into()];
                let single = both.into_iter().filter(|address| inside.contains(*address)).map(whole);
                let single: Vec<Block> = single.collect();
                if !pod && single.is_empty() {
                    continue;
                }
                for number in numbers(member.spec, name) {
                    let (pods, blocks) = by_number.entry(number).or_default();
                    blocks.extend(single.iter().cloned());
                    if pod {
                        pods.insert(member.address);
                    }
                }
            }
            for (number, (pods, blocks)) in by_number {
                let key = format!("{} with {}={number:?}", rule.peers_key(namespace), name.name);
                let key: Arc<str> = key.into();
                self.out.groups.insert(key.clone(), pods);
                out.push(network::policy::Rule {
                    origin: rule.origin.clone(),
                    action: rule.action,
                    anyone: false,
                    group: Some(key),
                    blocks: network::policy::ranges(&blocks),
                    names: None,
                    ports: vec![number],
                });
            }
        }
    }

    fn rule(&mut self, rule: &Rule, namespace: &str, ports: Vec<Ports>) -> network::policy::Rule {
        let (anyone, group, blocks) = self.peers(rule, namespace);
        let origin = rule.origin.clone();
        network::policy::Rule { origin, action: rule.action, anyone, group, blocks, names: None, ports }
    }

    /// Anyone, a group of pods, ranges of addresses.
    fn peers(&mut self, rule: &Rule, namespace: &str) -> (bool, Option<Arc<str>>, Ranges) {
        if rule.peers.is_empty() {
            return (true, None, Ranges::default());
        }
        let blocks: Vec<Block> = rule.peers.iter().flat_map(|peer| self.blocks(peer)).collect();
        let group = rule.peers.iter().any(|peer| matches!(peer, Peer::Pods { .. })).then(|| {
            let key: Arc<str> = rule.peers_key(namespace).into();
            if !self.out.groups.contains_key(&key) {
                let peers = self
                    .world
                    .members
                    .iter()
                    .filter(|member| rule.peers.iter().any(|peer| self.matches(namespace, peer, member)));
                let addresses = peers.map(|member| member.address).collect();
                self.out.groups.insert(key.clone(), addresses);
            }
            key
        });
        (false, group, network::policy::ranges(&blocks))
    }

    fn blocks(&self, peer: &Peer) -> Vec<Block> {
        match peer {
            Peer::Pods { .. } => Vec::new(),
            Peer::Block(block) => vec![block.clone()],
            Peer::Nodes(selector) => {
                let nodes = self.world.nodes.iter().filter(|node| selector.matches(&node.labels));
                nodes.flat_map(|node| &node.addresses).copied().map(whole).collect()
            }
        }
    }

    /// Whether a peer names a pod by its labels.
    fn matches(&self, own: &str, peer: &Peer, member: &Member<'_>) -> bool {
        match peer {
            Peer::Pods { namespaces, pods } => {
                let namespace = match namespaces {
                    None => member.namespace == own,
                    Some(selector) => {
                        let labels = self.world.namespaces.get(member.namespace);
                        labels.is_some_and(|labels| selector.matches(labels))
                    }
                };
                namespace && pods.matches(member.labels)
            }
            Peer::Block(_) | Peer::Nodes(_) => false,
        }
    }
}

fn whole(address: IpAddr) -> Block {
    Block { network: Network::whole(address), except: Vec::new() }
}

/// The ports that a pod's containers give a name; usually one.
fn numbers(spec: &Value, wanted: &PortName) -> BTreeSet<Ports> {
    let lists = ["containers", "initContainers"].into_iter().filter_map(|list| spec.get(list)?.as_array());
    let ports = lists.flatten().filter_map(|container| container.get("ports")?.as_array()).flatten();
    let named = ports.filter(|port| port.get("name").and_then(Value::as_str) == Some(&wanted.name));
    let one = |port: &Value| {
        let protocol = parse::protocol(port.get("protocol").and_then(Value::as_str).unwrap_or("TCP"));
        let number = u16::try_from(port.get("containerPort")?.as_u64()?).ok()?;
        let right: bool = wanted.protocol.is_none_or(|wanted: Protocol| wanted == protocol);
        right.then_some(Ports { protocol, first: number, last: number })
    };
    named.filter_map(one).collect()
}
