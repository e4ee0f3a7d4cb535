//! Policies as the kernel holds them, in the tables of both IP families under the same names. A chain for each profile, a
//! set for each group, and for each workload its elements in the maps of `firewall.rs`. Only what differs is written, in up to three transactions ([`Work`]): a process killed
//! between them leaves what the next one replaces.

use super::{Action, Direction, Flow, Isolation, Otherwise, Policies, Profile, Reason, Workload, pod_address};
use crate::activator::Who;
use crate::config::RouterConfig;
use crate::error::Result;
use crate::firewall::{
    self, EGRESS, EGRESS_DEFAULT, INGRESS, INGRESS_DEFAULT, MEMBERS, NAMESPACES, REFUSED, TABLE, TO_INGRESS,
};
use crate::limits::COUNTED;
use crate::names::{self, Names, Pinned};
use crate::netlink::nft::{self, Element, ElementValue, Family, R0, R1, Rule, Transaction, Verdict, concat, octets};
use crate::netlink::{Socket, conntrack};
use crate::uplink::{LINK as UPLINK, RELAY};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::sync::Arc;

const CHAIN_PREFIX: &str = "policy/";
const SET_PREFIX: &str = "peers/";

/// The policies that the kernel holds now.
#[derive(Default)]
pub(crate) struct Programmed {
    /// `None`: unknown (the table was found, not made), so the next sync writes everything.
    current: Option<Policies>,
    numbers: Numbers,
}

/// Names of kernel objects, by what they stand for.
#[derive(Clone, Default)]
struct Numbers {
    next: u32,
    groups: HashMap<Arc<str>, u32>,
    profiles: HashMap<Arc<str>, u32>,
    names: HashMap<Arc<str>, u32>,
    namespaces: HashMap<Arc<str>, u32>,
}

impl Numbers {
    fn of(next: &mut u32, map: &mut HashMap<Arc<str>, u32>, key: &Arc<str>) -> u32 {
        *map.entry(key.clone()).or_insert_with(|| {
            *next += 1;
            *next
        })
    }
    fn group(&mut self, key: &Arc<str>) -> String {
        format!("{SET_PREFIX}{}", Numbers::of(&mut self.next, &mut self.groups, key))
    }
    fn profile(&mut self, key: &Arc<str>) -> String {
        format!("{CHAIN_PREFIX}{}", Numbers::of(&mut self.next, &mut self.profiles, key))
    }
    fn names(&mut self, key: &Arc<str>) -> String {
        format!("{}{}", names::PREFIX, Numbers::of(&mut self.next, &mut self.names, key))
    }
    fn namespace(&mut self, key: &Arc<str>) -> u32 {
        Numbers::of(&mut self.next, &mut self.namespaces, key)
    }
}

/// What one sync did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Kernel objects written or removed.
    pub objects: usize,
    /// Connections ended because they are no longer allowed.
    pub ended: usize,
}

impl Programmed {
    /// Of a table just made.
    pub fn none() -> Programmed {
        Programmed { current: Some(Policies::default()), numbers: Numbers::default() }
    }

    /// Who the workloads are that reach a namespace where no policy decides.
    pub fn who(&self, namespace: &str) -> Option<Who> {
        match self.current.as_ref()?.isolation {
            Isolation::Open => Some(Who::Anyone),
            Isolation::Private => self.numbers.namespaces.get(namespace).copied().map(Who::Namespace),
        }
    }

    /// Makes the kernel enforce these.
    pub fn sync(
        &mut self,
        socket: &mut Socket,
        config: &RouterConfig,
        names: &Names,
        wanted: Policies,
    ) -> Result<Changed> {
        if self.current.as_ref() == Some(&wanted) {
            return Ok(Changed::default());
        }
        // No answer is pinned before its set is known.
        let mut names = names.lock();
        let mut work = Work::new(config, self.numbers.clone());
        // Should a step fail, what the kernel holds is unknown.
        let known = self.current.take();
        let old = match &known {
            Some(old) => old,
            None => {
                work.replace_everything(socket)?;
                names.recover()?;
                &Policies::default()
            }
        };
        for (key, set) in wanted.names.iter().filter(|(key, _)| !old.names.contains_key(*key)) {
            names.make(&mut work.add, &work.numbers.names(key), set);
        }
        work.difference(old, &wanted);
        let Work { add, switch, remove, numbers, objects, tighter, .. } = work;
        self.numbers = numbers;
        for step in [add, switch, remove] {
            step.commit(socket)?;
        }
        self.numbers.prune(&wanted);
        names.install(&wanted, |key| self.numbers.names(key));
        let pinned = names.pinned();
        drop(names);
        let ended = if tighter || known.is_none() { end_connections(socket, config, &wanted, &pinned)? } else { 0 };
        self.current = Some(wanted);
        Ok(Changed { objects, ended })
    }

    /// Adds what makes the kernel forget a workload that is being detached; [`Programmed::forgotten`] when that has been
    /// committed.
    pub fn forget(&self, t: &mut Transaction, config: &RouterConfig, address: Ipv4Addr) {
        let Some(current) = &self.current else { return };
        both(t, |t, family| {
            let key = || Element::key(own(config, family, address));
            for (group, members) in &current.groups {
                if let Some(number) = self.numbers.groups.get(group)
                    && members.contains(&address)
                {
                    t.delete_elements(&format!("{SET_PREFIX}{number}"), &[key()]);
                }
            }
            let Some(workload) = current.workloads.get(&address) else { return };
            for map in [EGRESS, INGRESS, NAMESPACES] {
                t.delete_elements(map, &[key()]);
            }
            if let Some(number) = self.numbers.namespaces.get(&workload.namespace) {
                t.delete_elements(MEMBERS, &[Element::key(member(config, family, *number, address))]);
            }
        });
    }

    pub fn forgotten(&mut self, address: Ipv4Addr) {
        if let Some(current) = &mut self.current {
            current.workloads.remove(&address);
            current.groups.values_mut().for_each(|members| {
                members.remove(&address);
            });
        }
    }
}

impl Numbers {
    /// Numbers of what is gone are forgotten; they are not used again.
    fn prune(&mut self, wanted: &Policies) {
        self.groups.retain(|key, _| wanted.groups.contains_key(key));
        self.profiles.retain(|key, _| wanted.profiles.contains_key(key));
        self.names.retain(|key, _| wanted.names.contains_key(key));
        let live: BTreeSet<&Arc<str>> = wanted.workloads.values().map(|workload| &workload.namespace).collect();
        self.namespaces.retain(|key, _| live.contains(key));
    }
}

/// Writes the same for the tables of both families, and leaves the transaction at the first.
fn both(t: &mut Transaction, mut write: impl FnMut(&mut Transaction, Family)) {
    for family in Family::INET {
        t.family(family);
        write(t, family);
    }
    t.family(Family::Ip);
}

/// A workload's address of a family, as a key.
fn own(config: &RouterConfig, family: Family, address: Ipv4Addr) -> Vec<u8> {
    match family {
        Family::Ip | Family::Arp => octets(address),
        Family::Ip6 => octets(config.v6_of(address)),
    }
}

fn member(config: &RouterConfig, family: Family, namespace: u32, address: Ipv4Addr) -> Vec<u8> {
    concat(&[&namespace.to_ne_bytes(), &own(config, family, address)])
}

/// A change in the making, as three transactions. A packet on its way reads rules of one generation, but elements of sets
/// as they are at that moment; so what is new is there before anything leads to it, and what is old goes when nothing does
/// any more. A packet that is allowed before and after is allowed throughout.
struct Work<'a> {
    config: &'a RouterConfig,
    add: Transaction,
    switch: Transaction,
    remove: Transaction,
    numbers: Numbers,
    objects: usize,
    /// Something may be refused that was allowed before.
    tighter: bool,
    /// Elements of [`MEMBERS`] that an unknown earlier state left, by [`index`] of their family.
    strays: [BTreeSet<Vec<u8>>; 2],
}

impl Work<'_> {
    fn new(config: &RouterConfig, numbers: Numbers) -> Work<'_> {
        let [add, switch, remove] = [(); 3].map(|()| Transaction::new(TABLE));
        Work { config, add, switch, remove, numbers, objects: 0, tighter: false, strays: Default::default() }
    }

    /// Makes way for a state that is written anew beside what an earlier process left, under numbers of its own.
    fn replace_everything(&mut self, socket: &mut Socket) -> Result<()> {
        let mut highest = 0;
        for (index, family) in Family::INET.into_iter().enumerate() {
            let (chains, sets) = (nft::chains(socket, TABLE, family)?, nft::sets(socket, TABLE, family)?);
            let chains: Vec<&String> = chains.iter().filter(|name| name.starts_with(CHAIN_PREFIX)).collect();
            let ours = |name: &&String| name.starts_with(SET_PREFIX) || name.starts_with(names::PREFIX);
            let sets: Vec<&String> = sets.iter().filter(ours).collect();
            let members = nft::keys(socket, TABLE, family, MEMBERS)?;
            let number = |name: &&String| name.rsplit('/').next().and_then(|n| n.parse::<u32>().ok());
            let namespace = |key: &Vec<u8>| key.get(..4).and_then(|n| n.try_into().ok()).map(u32::from_ne_bytes);
            let used = chains.iter().chain(&sets).filter_map(number).chain(members.iter().filter_map(namespace));
            highest = used.fold(highest, u32::max);
            for t in [&mut self.switch, &mut self.remove] {
                t.family(family);
            }
            for map in [EGRESS, INGRESS, NAMESPACES] {
                self.switch.flush_set(map);
            }
            firewall::defaults(&mut self.switch, family, true);
            for chain in &chains {
                self.remove.flush_chain(chain);
            }
            for chain in chains {
                self.remove.delete_chain(chain);
            }
            for set in sets {
                self.remove.delete_set(set);
            }
            self.strays[index] = members.into_iter().collect();
        }
        for t in [&mut self.switch, &mut self.remove] {
            t.family(Family::Ip);
        }
        self.numbers = Numbers { next: highest, ..Numbers::default() };
        Ok(())
    }

    fn difference(&mut self, old: &Policies, wanted: &Policies) {
        if old.isolation != wanted.isolation {
            let private = wanted.isolation == Isolation::Private;
            both(&mut self.switch, |t, family| firewall::defaults(t, family, private));
            self.tighter |= private;
            self.objects += 1;
        }
        let against = denied(wanted);
        for (key, members) in &wanted.groups {
            self.group(key, old.groups.get(key), members, against.contains(key));
        }
        // One may lead to another, so all are there before the rules of any.
        for key in wanted.profiles.keys().filter(|key| !old.profiles.contains_key(*key)) {
            let chain = self.numbers.profile(key);
            both(&mut self.add, |t, _| t.add_chain(&chain));
        }
        for (key, profile) in &wanted.profiles {
            self.profile(key, old.profiles.get(key), profile);
        }
        self.workloads(old, wanted);
        let gone = old.profiles.keys().filter(|key| !wanted.profiles.contains_key(*key));
        let gone: Vec<String> = gone.map(|key| self.numbers.profile(key)).collect();
        both(&mut self.remove, |t, _| {
            gone.iter().for_each(|chain| t.flush_chain(chain));
            gone.iter().for_each(|chain| t.delete_chain(chain));
        });
        self.objects += gone.len();
        for key in old.groups.keys().filter(|key| !wanted.groups.contains_key(*key)) {
            let set = self.numbers.group(key);
            both(&mut self.remove, |t, _| t.delete_set(&set));
            self.objects += 1;
        }
        for key in old.names.keys().filter(|key| !wanted.names.contains_key(*key)) {
            let set = self.numbers.names(key);
            both(&mut self.remove, |t, _| t.delete_set(&set));
            self.objects += 1;
        }
        let strays =
            std::mem::take(&mut self.strays).map(|keys| keys.into_iter().map(Element::key).collect::<Vec<_>>());
        both(&mut self.remove, |t, family| t.delete_elements(MEMBERS, &strays[index(family)]));
    }

    /// `denied`: a rule refuses its members, so that being one of them is what comes late and goes early.
    fn group(&mut self, key: &Arc<str>, old: Option<&BTreeSet<Ipv4Addr>>, wanted: &BTreeSet<Ipv4Addr>, denied: bool) {
        if old == Some(wanted) {
            return;
        }
        let name = self.numbers.group(key);
        let none = BTreeSet::new();
        let before = old.unwrap_or(&none);
        if old.is_none() {
            both(&mut self.add, |t, family| t.add_set(&name, &[family.address()], &nft::Value::None));
        }
        let gone: Vec<&Ipv4Addr> = before.difference(wanted).collect();
        let new: Vec<&Ipv4Addr> = wanted.difference(before).collect();
        self.tighter |= !gone.is_empty() || (denied && !new.is_empty());
        let config = self.config;
        let keys = |family, some: &[&Ipv4Addr]| -> Vec<Element> {
            some.iter().map(|address| Element::key(own(config, family, **address))).collect()
        };
        let (removing, adding) = match denied && old.is_some() {
            true => (&mut self.add, &mut self.remove),
            false => (&mut self.remove, &mut self.add),
        };
        both(removing, |t, family| t.delete_elements(&name, &keys(family, &gone)));
        both(adding, |t, family| t.add_elements(&name, &keys(family, &new)));
        self.objects += 1;
    }

    fn profile(&mut self, key: &Arc<str>, old: Option<&Profile>, wanted: &Profile) {
        if old == Some(wanted) {
            return;
        }
        let chain = self.numbers.profile(key);
        let numbers = &mut self.numbers;
        // A new chain, to which nothing leads yet; or new rules of one, all of which take effect at once.
        let t = if old.is_none() { &mut self.add } else { &mut self.switch };
        let otherwise = match (&wanted.otherwise, wanted.direction) {
            (Otherwise::Refuse, _) => REFUSED.to_owned(),
            (Otherwise::Default, Direction::Egress) => EGRESS_DEFAULT.to_owned(),
            (Otherwise::Default, Direction::Ingress) => INGRESS_DEFAULT.to_owned(),
            (Otherwise::Profile(next), _) => numbers.profile(next),
        };
        let place = Place { chain: &chain, direction: wanted.direction, otherwise: &otherwise };
        both(t, |t, family| {
            if old.is_some() {
                t.flush_chain(&chain);
            }
            for one in &wanted.rules {
                place.add(t, family, numbers, one);
            }
            t.add_rule(&chain, Rule::new().goto(&otherwise).comment(&wanted.origin));
        });
        self.tighter = true;
        self.objects += 1;
    }

    fn workloads(&mut self, old: &Policies, wanted: &Policies) {
        let (mut gone, mut new) = (Batches::new(), Batches::new());
        for (address, workload) in &old.workloads {
            let next = wanted.workloads.get(address);
            if next == Some(workload) {
                continue;
            }
            let next = next.map(|next| self.elements(*address, next));
            for one in self.elements(*address, workload) {
                if !next.as_ref().is_some_and(|next| next.contains(&one)) {
                    gone.entry((index(one.0), one.1)).or_default().push(Element::key(one.2));
                }
            }
            self.tighter = true;
        }
        for (address, workload) in &wanted.workloads {
            let before = old.workloads.get(address);
            if before == Some(workload) {
                continue;
            }
            let before = before.map(|before| self.elements(*address, before));
            for one in self.elements(*address, workload) {
                if !before.as_ref().is_some_and(|before| before.contains(&one)) {
                    self.strays[index(one.0)].remove(&one.2);
                    new.entry((index(one.0), one.1)).or_default().push(Element::new(one.2, one.3.into_element()));
                }
            }
        }
        self.objects += gone.values().chain(new.values()).map(Vec::len).sum::<usize>();
        for ((family, set), elements) in gone {
            let t = if set == MEMBERS { &mut self.remove } else { &mut self.switch };
            t.family(Family::INET[family]);
            t.delete_elements(set, &elements);
        }
        for ((family, set), elements) in new {
            let t = if set == MEMBERS { &mut self.add } else { &mut self.switch };
            t.family(Family::INET[family]);
            t.add_elements(set, &elements);
        }
    }

    /// All elements of a workload.
    fn elements(&mut self, address: Ipv4Addr, workload: &Workload) -> Vec<OneElement> {
        let number = self.numbers.namespace(&workload.namespace);
        let mut chain = |key: &Option<Arc<str>>, default: &str| {
            Held::Chain(key.as_ref().map_or_else(|| default.to_owned(), |key| self.numbers.profile(key)))
        };
        let (egress, ingress) = (chain(&workload.egress, EGRESS_DEFAULT), chain(&workload.ingress, INGRESS_DEFAULT));
        let config = self.config;
        let of_family = |family| {
            let own = own(config, family, address);
            [
                (family, EGRESS, own.clone(), egress.clone()),
                (family, INGRESS, own.clone(), ingress.clone()),
                (family, NAMESPACES, own, Held::Number(number)),
                (family, MEMBERS, member(config, family, number, address), Held::Nothing),
            ]
        };
        Family::INET.into_iter().flat_map(of_family).collect()
    }
}

/// Elements by family's [`index`] and set.
type Batches = BTreeMap<(usize, &'static str), Vec<Element>>;
/// Family, set, key, value.
type OneElement = (Family, &'static str, Vec<u8>, Held);

/// A family's place in [`Family::INET`].
fn index(family: Family) -> usize {
    usize::from(family == Family::Ip6)
}

/// The groups that a rule refuses, and none allows or passes on.
fn denied(policies: &Policies) -> BTreeSet<&Arc<str>> {
    let rules = || policies.profiles.values().flat_map(|profile| &profile.rules);
    let groups = |denied: bool| {
        rules().filter(move |rule| (rule.action == Action::Deny) == denied).filter_map(|rule| rule.group.as_ref())
    };
    let mut all: BTreeSet<_> = groups(true).collect();
    if !all.is_empty() {
        groups(false).for_each(|key| {
            all.remove(key);
        });
    }
    all
}

/// Where a rule goes, and where what it passes on goes.
struct Place<'a> {
    chain: &'a str,
    direction: Direction,
    otherwise: &'a str,
}

impl Place<'_> {
    fn add(&self, t: &mut Transaction, family: Family, numbers: &mut Numbers, wanted: &super::Rule) {
        let peer = |rule: Rule| match self.direction {
            Direction::Egress => rule.load_destination(R0),
            Direction::Ingress => rule.load_source(R0),
        };
        if wanted.anyone {
            return self.matched(t, wanted, Rule::new());
        }
        if let Some(key) = &wanted.group {
            let set = numbers.group(key);
            self.matched(t, wanted, peer(t.rule()).if_in_set(&set, R0));
        }
        if let Some(key) = &wanted.names {
            // Outside and nowhere else, whatever an answer said.
            let set = numbers.names(key);
            for link in [UPLINK, RELAY] {
                self.matched(t, wanted, peer(t.rule().if_output(link)).if_in_set(&set, R0));
            }
        }
        let set = match family {
            Family::Ip6 if !wanted.blocks.v6.is_empty() => t.add_anonymous_ranges6(&wanted.blocks.v6),
            Family::Ip if !wanted.blocks.v4.is_empty() => t.add_anonymous_ranges(&wanted.blocks.v4),
            Family::Ip | Family::Ip6 | Family::Arp => return,
        };
        self.matched(t, wanted, peer(t.rule()).if_in(set, R0));
    }

    /// The rule that goes on from matched peers: ports, then the verdict.
    fn matched(&self, t: &mut Transaction, wanted: &super::Rule, matched: Rule) {
        let matched = match wanted.ports.as_slice() {
            [] => matched,
            [one] if one.first == one.last => matched.if_protocol(one.protocol.number()).if_destination_port(one.first),
            many => {
                let set = t.add_anonymous_ports(&merged(many));
                matched.load_protocol(R0).load_destination_port(R1).if_in(set, R0)
            }
        };
        let rule = match (wanted.action, self.direction) {
            (Action::Allow, Direction::Egress) => matched.goto(TO_INGRESS),
            (Action::Allow, Direction::Ingress) => matched.goto(COUNTED),
            (Action::Deny, _) => matched.goto(REFUSED),
            (Action::Pass, _) => matched.goto(self.otherwise),
        };
        t.add_rule(self.chain, rule.comment(&wanted.origin));
    }
}

#[derive(Clone, PartialEq, Eq)]
enum Held {
    Nothing,
    Number(u32),
    Chain(String),
}

impl Held {
    fn into_element(self) -> ElementValue {
        match self {
            Held::Nothing => ElementValue::None,
            Held::Number(number) => ElementValue::Data(number.to_ne_bytes().to_vec()),
            Held::Chain(chain) => ElementValue::Verdict(Verdict::Goto(chain)),
        }
    }
}

/// Ranges of one protocol that touch or overlap become one: the kernel refuses overlapping elements.
fn merged(ports: &[super::Ports]) -> Vec<(u8, u16, u16)> {
    let mut all: Vec<(u8, u16, u16)> = ports.iter().map(|p| (p.protocol.number(), p.first, p.last)).collect();
    all.retain(|(_, first, last)| first <= last);
    all.sort_unstable();
    let mut out: Vec<(u8, u16, u16)> = Vec::with_capacity(all.len());
    for (protocol, first, last) in all {
        match out.last_mut() {
            Some(before) if before.0 == protocol && first <= before.2.saturating_add(1) => {
                before.2 = before.2.max(last)
            }
            _ => out.push((protocol, first, last)),
        }
    }
    out
}

/// Ends connections between workloads that are no longer allowed: their next packet is judged anew, and refused.
fn end_connections(socket: &mut Socket, config: &RouterConfig, policies: &Policies, pinned: &Pinned) -> Result<usize> {
    let is_workload =
        |address| pod_address(config, address).is_some_and(|address| policies.workloads.contains_key(&address));
    let stale = conntrack::find(socket, |entry| {
        let flow = Flow {
            source: entry.original.source,
            // Where the connection really goes: past a Service's address.
            destination: entry.reply.source,
            protocol: entry.original.protocol,
            port: entry.reply.source_port,
        };
        let decision = policies.decide(config, &flow, &|key, address| pinned.has(key, address));
        match [flow.source, flow.destination].map(is_workload) {
            [true, true] => !decision.allowed(),
            [true, false] => policies.is_outside(flow.destination) && !decision.egress.allows(),
            // The default refuses strangers, but not at a port that a Service opened on the node.
            [false, true] => {
                config.is_foreign(flow.source) && matches!(decision.ingress, Reason::NoRule(_) | Reason::Denied(_))
            }
            [false, false] => false,
        }
    })?;
    conntrack::delete(socket, &stale)?;
    Ok(stale.len())
}
