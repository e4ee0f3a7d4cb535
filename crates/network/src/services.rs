//! Services. One map leads from (address, protocol, port) to a chain per service, whose rule picks an endpoint by a random
//! number and redirects the connection. The cost of a packet does not depend on the number of services, the cost of a
//! change only on the services that changed. Both families have the same, each in its own table.
//!
//! With session affinity a map of the service's own remembers each client's endpoint for some time after its last
//! connection; the kernel fills it. An endpoint that has gone is not in the chain's set any more, and another is picked.

use crate::activator::{Activation, Who};
use crate::error::{Error, Result};
use crate::firewall::{ACTIVATED, NAMESPACES, SERVICES, TABLE};
use crate::netlink::nft::{
    self, AnonymousSet, Element, ElementValue, Family, Field, R0, R8, Transaction, Verdict, concat, octets,
};
use crate::netlink::{Socket, conntrack};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
    fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

/// One port of a Service, at one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRule {
    pub namespace: String,
    pub name: String,
    /// A ClusterIP, or [`crate::NODE`] for a port of the node.
    pub cluster_ip: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    /// Those that connections go to, of the address's family; others are left out. With none, connections are refused.
    pub endpoints: Vec<(IpAddr, u16)>,
    /// `sessionAffinity: ClientIP`: a client stays with its endpoint until it has not connected for this long.
    pub affinity_seconds: Option<u32>,
    /// Who may connect to an IPv4 address, as sorted, disjoint, inclusive ranges; empty: anyone.
    pub sources: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Its own namespace's workloads are led to the activator ([`crate::Router::open_activator`]), if there is one.
    pub activated: bool,
}

type Key = (IpAddr, Protocol, u16);

fn key(rule: &ServiceRule) -> Key {
    (rule.cluster_ip, rule.protocol, rule.port)
}

fn taken(rule: &ServiceRule, other: &Target) -> Error {
    Error::Config {
        field: "cluster_ip",
        value: format!("{}:{}/{}", rule.cluster_ip, rule.port, rule.protocol.name()),
        why: format!("is both {}/{} and {}", rule.namespace, rule.name, other.comment),
    }
}

/// What of a rule the kernel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    comment: String,
    endpoints: Vec<(IpAddr, u16)>,
    affinity: Option<u32>,
    sources: Vec<(Ipv4Addr, Ipv4Addr)>,
    activated: bool,
    /// Who is led to the activator, and where that is.
    through: Option<(Who, (IpAddr, u16))>,
}

impl Target {
    /// Whether there is a chain: without one packets reach the refusal in `forward`.
    fn leads(&self) -> bool {
        !self.endpoints.is_empty() || self.through.is_some()
    }
}

/// The services that the kernel holds now.
#[derive(Default)]
pub struct Services {
    /// `None`: unknown (the table was found, not made), so the next sync writes everything.
    current: Option<HashMap<Key, Target>>,
}

impl Services {
    /// Of a table just made.
    pub fn none() -> Services {
        Services { current: Some(HashMap::new()) }
    }

    /// Makes the kernel's services these, in one transaction. Answers how many of them changed.
    pub fn sync(&mut self, socket: &mut Socket, rules: &[ServiceRule], activation: &Activation<'_>) -> Result<usize> {
        let wanted = targets(rules, activation)?;
        match self.current.as_ref() == Some(&wanted) {
            true => Ok(0),
            false => self.replace(socket, wanted),
        }
    }

    /// The namespaces' numbers may have changed.
    pub fn renumber(&mut self, socket: &mut Socket, activation: &Activation<'_>) -> Result<usize> {
        let Some(current) = &self.current else { return Ok(0) };
        let changed = |(key, target): (&Key, &Target)| {
            let namespace = target.comment.split_once('/').map_or("", |(namespace, _)| namespace);
            let through = activation.of(namespace, key.0.is_ipv4());
            (through != target.through).then(|| (*key, Target { through, ..target.clone() }))
        };
        let changed: Vec<_> = current.iter().filter(|(_, target)| target.activated).filter_map(changed).collect();
        if changed.is_empty() {
            return Ok(0);
        }
        let mut wanted = current.clone();
        wanted.extend(changed);
        self.replace(socket, wanted)
    }

    /// Replaces the services of some rules by others. `None`: what the kernel holds is not known.
    pub fn change(
        &mut self,
        socket: &mut Socket,
        before: &[ServiceRule],
        after: &[ServiceRule],
        activation: &Activation<'_>,
    ) -> Result<Option<usize>> {
        let Some(current) = &mut self.current else { return Ok(None) };
        let wanted = targets(after, activation)?;
        let gone: BTreeSet<Key> = before.iter().map(key).collect();
        for rule in after.iter().filter(|rule| !gone.contains(&key(rule))) {
            if let Some(other) = current.get(&key(rule)) {
                return Err(taken(rule, other));
            }
        }
        let old = gone.iter().filter_map(|key| Some((*key, current.get(key)?.clone()))).collect();
        let mut transaction = Transaction::new(TABLE);
        let changed = difference(&mut transaction, &old, &wanted);
        if changed.is_empty() {
            return Ok(Some(0));
        }
        // Nothing of a failed transaction takes effect.
        transaction.commit(socket)?;
        gone.iter().for_each(|key| drop(current.remove(key)));
        current.extend(wanted);
        let udp = changed.iter().filter(|key| key.1 == Protocol::Udp).copied().collect();
        self.forget_stale(socket, &udp)?;
        Ok(Some(changed.len()))
    }

    fn replace(&mut self, socket: &mut Socket, wanted: HashMap<Key, Target>) -> Result<usize> {
        let mut transaction = Transaction::new(TABLE);
        let known = self.current.take();
        let old = match &known {
            Some(old) => old,
            None => {
                forget_everything(&mut transaction, socket)?;
                &HashMap::new()
            }
        };
        let changed = difference(&mut transaction, old, &wanted);
        let committed = transaction.commit(socket);
        if committed.is_err() {
            // Nothing of a failed transaction took effect.
            self.current = known;
            return committed.map(|()| 0);
        }
        let udp: BTreeSet<Key> = if known.is_some() {
            changed.iter().filter(|key| key.1 == Protocol::Udp).copied().collect()
        } else {
            wanted.keys().filter(|key| key.1 == Protocol::Udp).copied().collect()
        };
        self.current = Some(wanted);
        self.forget_stale(socket, &udp)?;
        Ok(changed.len())
    }

    /// UDP has no end of a connection: a client that goes on sending would stay with an endpoint that has gone.
    fn forget_stale(&self, socket: &mut Socket, changed: &BTreeSet<Key>) -> Result<()> {
        if changed.is_empty() {
            return Ok(());
        }
        let stale = conntrack::find(socket, |entry| {
            let key = (entry.original.destination, Protocol::Udp, entry.original.destination_port);
            let target = self.current.as_ref().and_then(|all| all.get(&key));
            entry.original.protocol == Protocol::Udp.number()
                && changed.contains(&key)
                && !target.is_some_and(|t| t.endpoints.contains(&(entry.reply.source, entry.reply.source_port)))
        })?;
        conntrack::delete(socket, &stale)
    }
}

const CHAIN_PREFIX: &str = "svc/";

/// Clients that one service remembers. Further ones go to any endpoint.
const CLIENTS: u32 = 65_536;
const AFFINITY_PREFIX: &str = "affinity/";

fn chain_name((address, protocol, port): &Key) -> String {
    format!("{CHAIN_PREFIX}{address}/{}/{port}", protocol.name())
}

fn affinity_name(key: &Key, seconds: u32) -> String {
    format!("{AFFINITY_PREFIX}{}/{seconds}", chain_name(key))
}

/// Removes what an earlier process left.
fn forget_everything(t: &mut Transaction, socket: &mut Socket) -> Result<()> {
    for family in Family::INET {
        t.family(family);
        t.flush_set(SERVICES);
        for chain in nft::chains(socket, TABLE, family)?.iter().filter(|name| name.starts_with(CHAIN_PREFIX)) {
            t.flush_chain(chain);
            t.delete_chain(chain);
        }
        for map in nft::sets(socket, TABLE, family)?.iter().filter(|name| name.starts_with(AFFINITY_PREFIX)) {
            t.delete_set(map);
        }
    }
    Ok(())
}

fn targets(rules: &[ServiceRule], activation: &Activation<'_>) -> Result<HashMap<Key, Target>> {
    let mut all = HashMap::with_capacity(rules.len());
    for rule in rules {
        let mut endpoints = rule.endpoints.clone();
        endpoints.retain(|(address, _)| address.is_ipv4() == rule.cluster_ip.is_ipv4());
        endpoints.sort_unstable();
        endpoints.dedup();
        let target = Target {
            comment: format!("{}/{}", rule.namespace, rule.name),
            endpoints,
            affinity: rule.affinity_seconds,
            sources: rule.sources.clone(),
            activated: rule.activated,
            through: match rule.activated && rule.protocol == Protocol::Tcp {
                true => activation.of(&rule.namespace, rule.cluster_ip.is_ipv4()),
                false => None,
            },
        };
        if let Some(other) = all.insert(key(rule), target) {
            return Err(taken(rule, &other));
        }
    }
    Ok(all)
}

/// Writes what leads from `old` to `wanted`; answers the keys that differ.
fn difference(t: &mut Transaction, old: &HashMap<Key, Target>, wanted: &HashMap<Key, Target>) -> Vec<Key> {
    let mut changed: BTreeMap<Key, (Option<&Target>, Option<&Target>)> = BTreeMap::new();
    for (key, target) in old {
        if wanted.get(key) != Some(target) {
            changed.insert(*key, (Some(target), wanted.get(key)));
        }
    }
    for (key, target) in wanted {
        if !old.contains_key(key) {
            changed.insert(*key, (None, Some(target)));
        }
    }
    for family in Family::INET {
        t.family(family);
        let own: Vec<_> = changed.iter().filter(|(key, _)| Family::of(key.0) == family).collect();
        let some = |target: &Option<&Target>| target.is_some_and(Target::leads);
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for (key, (before, after)) in &own {
            match (some(before), some(after)) {
                (false, true) => added.push(element(key)),
                (true, false) => removed.push(element(key)),
                _ => {}
            }
        }
        t.delete_elements(SERVICES, &removed);
        for (key, (before, after)) in own {
            rewrite(t, key, before.filter(|t| t.leads()), after.filter(|t| t.leads()));
        }
        t.add_elements(SERVICES, &added);
    }
    changed.into_keys().collect()
}

/// One service's chain, and its map of clients, which stays as long as the service has the same affinity.
fn rewrite(t: &mut Transaction, key: &Key, before: Option<&Target>, after: Option<&Target>) {
    let chain = chain_name(key);
    match before {
        Some(_) => t.flush_chain(&chain),
        None if after.is_some() => t.add_chain(&chain),
        None => return,
    }
    let map =
        |target: Option<&Target>| target.and_then(|t| t.affinity).map(|seconds| (affinity_name(key, seconds), seconds));
    let (old, new) = (map(before), map(after));
    if let Some((name, _)) = old.as_ref().filter(|_| old != new) {
        t.delete_set(name);
    }
    let address = Family::of(key.0).address();
    if let Some((name, seconds)) = new.as_ref().filter(|_| old != new) {
        t.add_expiring_map(name, &[address], &[address, Field::Port], *seconds, CLIENTS);
    }
    match after {
        Some(target) => add_endpoints(t, &chain, target, address, new.as_ref().map(|(name, _)| name.as_str())),
        None => t.delete_chain(&chain),
    }
}

fn element(key: &Key) -> Element {
    let (address, protocol, port) = key;
    let octets = concat(&[&octets(*address), &[protocol.number()], &port.to_be_bytes()]);
    Element::new(octets, ElementValue::Verdict(Verdict::Goto(chain_name(key))))
}

fn endpoint((address, port): &(IpAddr, u16)) -> Vec<u8> {
    concat(&[&octets(*address), &port.to_be_bytes()])
}

fn add_endpoints(t: &mut Transaction, chain: &str, target: &Target, address: Field, clients: Option<&str>) {
    let count = target.endpoints.len() as u32;
    let numbered = |t: &mut Transaction| -> AnonymousSet {
        let value = |(index, own): (usize, &(IpAddr, u16))| {
            Element::new((index as u32).to_ne_bytes().to_vec(), ElementValue::Data(endpoint(own)))
        };
        let elements: Vec<Element> = target.endpoints.iter().enumerate().map(value).collect();
        t.add_anonymous_map(&[Field::Integer], &[address, Field::Port], &elements)
    };
    if let Some((who, to)) = &target.through {
        let only = Element::new(0u32.to_ne_bytes().to_vec(), ElementValue::Data(endpoint(to)));
        let activator = t.add_anonymous_map(&[Field::Integer], &[address, Field::Port], &[only]);
        let workload = t.rule().load_source(R0).load_mapped(NAMESPACES, R0, R0);
        let own = match who {
            Who::Anyone => workload,
            Who::Namespace(number) => workload.equal(R0, &number.to_ne_bytes()),
        };
        let led = own.mark_connection(ACTIVATED).random(1, R0).lookup(activator, R0, R0).destination_nat(R0);
        t.add_rule(chain, led.comment("to the activator"));
    }
    if target.endpoints.is_empty() {
        return;
    }
    if !target.sources.is_empty() && address == Field::Address {
        // Whoever is not one of these is not redirected, and refused further on.
        let sources = t.add_anonymous_ranges(&target.sources);
        let rule = t.rule().load_source(R0).if_not_in(sources, R0).accept();
        t.add_rule(chain, rule.comment("source ranges"));
    }
    if let Some(clients) = clients {
        let keys: Vec<Element> = target.endpoints.iter().map(|own| Element::key(endpoint(own))).collect();
        let live = t.add_anonymous_keys(&[address, Field::Port], &keys);
        let known = t.rule().load_source(R8).load_mapped(clients, R8, R0).if_in(live, R0).remember(clients, R8, R0);
        let known = known.destination_nat(R0).comment(&target.comment);
        t.add_rule(chain, known);
        let map = numbered(t);
        let new = t.rule().load_source(R8).random(count, R0).lookup(map, R0, R0).forget(clients, R8, R0);
        t.add_rule(chain, new.remember(clients, R8, R0).destination_nat(R0).comment(&target.comment));
    }
    let map = numbered(t);
    let any = t.rule().random(count, R0).lookup(map, R0, R0).destination_nat(R0);
    t.add_rule(chain, any.comment(&target.comment));
}
