//! ClusterIPs. One map leads from (address, protocol, port) to a chain per service, whose one rule picks an endpoint by
//! a random number (or, with session affinity, a hash of the client's address) and redirects the connection. The cost of
//! a packet does not depend on the number of services, the cost of a change only on the services that changed.

use crate::error::{Error, Result};
use crate::firewall::{SERVICES, TABLE};
use crate::netlink::nft::{self, Element, ElementValue, Family, Field, R0, R1, Rule, Transaction, Verdict, concat};
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

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRule {
    pub namespace: String,
    pub name: String,
    pub cluster_ip: Ipv4Addr,
    pub protocol: Protocol,
    pub port: u16,
    /// Ready endpoints. With none, connections are refused.
    pub endpoints: Vec<(Ipv4Addr, u16)>,
    /// `sessionAffinity: ClientIP`: a client stays with its endpoint. The choice is a hash of the client's address, so
    /// it holds without a time limit for as long as the endpoints stay the same; the number itself is not used.
    pub affinity_seconds: Option<u32>,
}

type Key = (Ipv4Addr, Protocol, u16);

/// What of a rule the kernel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    comment: String,
    endpoints: Vec<(Ipv4Addr, u16)>,
    affinity: bool,
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
    pub fn sync(&mut self, socket: &mut Socket, rules: &[ServiceRule]) -> Result<usize> {
        let wanted = targets(rules)?;
        if self.current.as_ref() == Some(&wanted) {
            return Ok(0);
        }
        let mut transaction = Transaction::new(TABLE);
        let known = self.current.take();
        let old = match &known {
            Some(old) => old,
            None => {
                transaction.flush_set(SERVICES);
                for chain in
                    nft::chains(socket, TABLE, Family::Ip)?.iter().filter(|name| name.starts_with(CHAIN_PREFIX))
                {
                    transaction.flush_chain(chain);
                    transaction.delete_chain(chain);
                }
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
            let (IpAddr::V4(destination), IpAddr::V4(endpoint)) = (entry.original.destination, entry.reply.source)
            else {
                return false;
            };
            let key = (destination, Protocol::Udp, entry.original.destination_port);
            let target = self.current.as_ref().and_then(|all| all.get(&key));
            entry.original.protocol == Protocol::Udp.number()
                && changed.contains(&key)
                && !target.is_some_and(|t| t.endpoints.contains(&(endpoint, entry.reply.source_port)))
        })?;
        conntrack::delete(socket, &stale)
    }
}

const CHAIN_PREFIX: &str = "svc/";

fn chain_name((address, protocol, port): &Key) -> String {
    format!("{CHAIN_PREFIX}{address}/{}/{port}", protocol.name())
}

fn targets(rules: &[ServiceRule]) -> Result<HashMap<Key, Target>> {
    let mut all = HashMap::with_capacity(rules.len());
    for rule in rules {
        let mut endpoints = rule.endpoints.clone();
        endpoints.sort_unstable();
        endpoints.dedup();
        let target = Target {
            comment: format!("{}/{}", rule.namespace, rule.name),
            endpoints,
            affinity: rule.affinity_seconds.is_some(),
        };
        let key = (rule.cluster_ip, rule.protocol, rule.port);
        if let Some(other) = all.insert(key, target) {
            return Err(Error::Config {
                field: "cluster_ip",
                value: format!("{}:{}/{}", rule.cluster_ip, rule.port, rule.protocol.name()),
                why: format!("is both {}/{} and {}", rule.namespace, rule.name, other.comment),
            });
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
    // A target without endpoints has no chain: its packets reach the refusal in `forward`.
    let some = |target: Option<&Target>| target.is_some_and(|t| !t.endpoints.is_empty());
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for (key, (before, after)) in &changed {
        match (some(*before), some(*after)) {
            (false, true) => added.push(element(key)),
            (true, false) => removed.push(element(key)),
            _ => {}
        }
    }
    t.delete_elements(SERVICES, &removed);
    for (key, (before, after)) in &changed {
        let chain = chain_name(key);
        if some(*before) {
            t.flush_chain(&chain);
        }
        match after {
            Some(target) if some(*after) => {
                if !some(*before) {
                    t.add_chain(&chain);
                }
                add_endpoints(t, &chain, target);
            }
            _ if some(*before) => t.delete_chain(&chain),
            _ => {}
        }
    }
    t.add_elements(SERVICES, &added);
    changed.into_keys().collect()
}

fn element(key: &Key) -> Element {
    let (address, protocol, port) = key;
    let octets = concat(&[&address.octets(), &[protocol.number()], &port.to_be_bytes()]);
    Element::new(octets, ElementValue::Verdict(Verdict::Goto(chain_name(key))))
}

fn add_endpoints(t: &mut Transaction, chain: &str, target: &Target) {
    let elements: Vec<Element> = target
        .endpoints
        .iter()
        .enumerate()
        .map(|(index, (address, port))| {
            let value = ElementValue::Data(concat(&[&address.octets(), &port.to_be_bytes()]));
            Element::new((index as u32).to_ne_bytes().to_vec(), value)
        })
        .collect();
    let map = t.add_anonymous_map(&[Field::Integer], &[Field::Address, Field::Port], &elements);
    let count = elements.len() as u32;
    let pick =
        if target.affinity { Rule::new().load_source(R1).hash(R1, count, R0) } else { Rule::new().random(count, R0) };
    t.add_rule(chain, pick.lookup(map, R0, R0).destination_nat(R0).comment(&target.comment));
}
