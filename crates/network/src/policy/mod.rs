//! Who may talk to whom. A connection passes if its source's side lets it out and its destination's side lets it in. Each
//! side goes through the [`Profile`]s of its workload, one after the other: the rules of administrators, of the namespace's
//! own policies, of the baseline. The first rule that matches decides; if none does, the last profile's [`Otherwise`] does,
//! in the end the default: own namespace only, or ([`Isolation::Open`]) everything.
//!
//! This module decides ([`Policies::decide`], for explanations and for ending connections that are no longer allowed);
//! `program` makes the kernel decide the same.

mod program;

use crate::config::RouterConfig;
use crate::names::NameSet;
use crate::netlink::nft::Family;
use crate::services::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

pub use program::Changed;
pub(crate) use program::Programmed;

/// What holds where no policy isolates a workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// A namespace is a private network: nothing crosses its border.
    #[default]
    Private,
    /// As Kubernetes without policies: everyone reaches everyone.
    Open,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Egress,
    Ingress,
}

/// An inclusive range of one protocol's ports; a port on its own is a range of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    pub protocol: Protocol,
    pub first: u16,
    pub last: u16,
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
    /// Goes on with what the profile's [`Otherwise`] says.
    Pass,
}

/// One rule: peers and ports that are talked to, or from, and what is done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where it comes from, for people: `NetworkPolicy shop/web ingress[0]`.
    pub origin: Arc<str>,
    pub action: Action,
    /// Any peer at all; then `group` and `blocks` do not matter.
    pub anyone: bool,
    /// Key in [`Policies::groups`].
    pub group: Option<Arc<str>>,
    pub blocks: Ranges,
    /// Key in [`Policies::names`]: addresses outside that the resolver answered for these names.
    pub names: Option<Arc<str>>,
    /// Empty: everything, of any protocol.
    pub ports: Vec<Ports>,
}

/// What happens to what no rule of a profile decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// The workload is isolated.
    Refuse,
    /// As if no policy selected the workload.
    Default,
    /// The profile of this key goes on; at most [`TIERS`] follow one another.
    Profile(Arc<str>),
}

/// Administrators' rules, the namespace's own, the baseline.
pub const TIERS: usize = 3;

/// All rules of one direction and tier that hold for some workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    pub direction: Direction,
    /// The policies it is made from, for people.
    pub origin: Arc<str>,
    pub rules: Vec<Rule>,
    pub otherwise: Otherwise,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// Keys in [`Policies::profiles`], of the first that is asked; `None`: no policy is about it in that direction.
    pub egress: Option<Arc<str>>,
    pub ingress: Option<Arc<str>>,
}

/// Everything the kernel is to enforce, for both addresses of a workload, which the IPv4 one stands for
/// ([`RouterConfig::v6_of`]). What is not a workload in here reaches nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    pub isolation: Isolation,
    /// Sets of workloads that rules name, by a key that stays the same while members come and go.
    pub groups: BTreeMap<Arc<str>, BTreeSet<Ipv4Addr>>,
    /// Names outside that rules name, by a key that says what they are: another key for other names.
    pub names: BTreeMap<Arc<str>, NameSet>,
    pub profiles: BTreeMap<Arc<str>, Profile>,
    pub workloads: BTreeMap<Ipv4Addr, Workload>,
    /// Where the way out leads; without one, nowhere.
    pub outside: Ranges,
    /// Addresses of nodes, which no name leads to.
    pub nodes: Vec<IpAddr>,
}

/// A connection to judge, by its first packet after a Service's address has been replaced by an endpoint's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// As in the IP header: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6, 132 SCTP.
    pub protocol: u8,
    pub port: u16,
}

impl Flow {
    /// Whether it goes to a DHCP client, which takes an address from whoever writes there.
    fn is_lease(&self) -> bool {
        self.protocol == Protocol::Udp.number() && self.port == dhcp_client(Family::of(self.destination))
    }
}

/// Where DHCP's answers go (RFC 2131, 4.1; RFC 8415, 7.2).
pub(crate) fn dhcp_client(family: Family) -> u16 {
    match family {
        Family::Ip | Family::Arp => 68,
        Family::Ip6 => 546,
    }
}

/// Whether an address was the answer for names of this key in [`Policies::names`].
pub type IsPinned<'a> = dyn Fn(&str, IpAddr) -> bool + 'a;

/// Why one side lets a connection through, or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Source and destination are one workload.
    Itself,
    SameNamespace,
    Open,
    /// The rule of this origin.
    Rule(Arc<str>),
    /// The rule of this origin is against it.
    Denied(Arc<str>),
    /// Nothing isolates it, and the other is of another namespace, or no workload.
    OtherNamespace,
    /// The policies of this origin isolate it, and none of their rules allows this.
    NoRule(Arc<str>),
    /// No workload has the address.
    NoWorkload,
    /// Nobody here speaks for what is behind the uplink.
    Outside,
    /// An answer to a question for an address.
    RouterAlone,
}

impl Reason {
    pub fn allows(&self) -> bool {
        match self {
            Reason::Itself | Reason::SameNamespace | Reason::Open | Reason::Rule(_) | Reason::Outside => true,
            Reason::OtherNamespace
            | Reason::Denied(_)
            | Reason::NoRule(_)
            | Reason::NoWorkload
            | Reason::RouterAlone => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Itself => f.write_str("a workload always reaches itself"),
            Reason::SameNamespace => f.write_str("no policy isolates it, and both are in one namespace"),
            Reason::Open => f.write_str("no policy isolates it, and the network's default is open"),
            Reason::Rule(origin) => write!(f, "{origin} allows it"),
            Reason::Denied(origin) => write!(f, "{origin} denies it"),
            Reason::OtherNamespace => {
                f.write_str("no policy isolates it, and the other side is not in its namespace: a namespace is private")
            }
            Reason::NoRule(origin) => write!(f, "{origin} isolates it, and no rule allows this"),
            Reason::NoWorkload => f.write_str("no workload here has that address"),
            Reason::Outside => f.write_str("it is outside, behind the uplink"),
            Reason::RouterAlone => {
                f.write_str("addresses, routes and redirects come from the router alone, whatever policies say")
            }
        }
    }
}

/// Both sides of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub egress: Reason,
    pub ingress: Reason,
}

impl Decision {
    pub fn allowed(&self) -> bool {
        self.egress.allows() && self.ingress.allows()
    }
}

/// One end of a connection.
#[derive(Clone, Copy)]
struct End {
    address: IpAddr,
    /// The IPv4 address that stands for a workload.
    pod: Option<Ipv4Addr>,
}

/// The IPv4 address that stands for the workload with this address, if one can have it.
pub fn pod_address(config: &RouterConfig, address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(address) => config.v4_of(address),
    }
}

impl Policies {
    /// Says whether and why a connection passes. The same decision as the kernel's.
    /// What is reached by name is told from `pinned`.
    pub fn decide(&self, config: &RouterConfig, flow: &Flow, pinned: &IsPinned<'_>) -> Decision {
        let ends = [flow.source, flow.destination].map(|address| End { address, pod: pod_address(config, address) });
        let [source, destination] = ends.map(|end| self.workloads.get(&end.pod?));
        if flow.is_lease() {
            return Decision { egress: Reason::RouterAlone, ingress: Reason::RouterAlone };
        }
        if flow.source == flow.destination && source.is_some() {
            return Decision { egress: Reason::Itself, ingress: Reason::Itself };
        }
        let side = |own: Option<&Workload>, peer: End, other: Option<&Workload>, direction| match own {
            None if self.is_outside(match direction {
                Direction::Egress => flow.source,
                Direction::Ingress => flow.destination,
            }) =>
            {
                Reason::Outside
            }
            None => Reason::NoWorkload,
            Some(own) => self.side(own, peer, other, direction, (flow, pinned)),
        };
        Decision {
            egress: side(source, ends[1], destination, Direction::Egress),
            ingress: side(destination, ends[0], source, Direction::Ingress),
        }
    }

    fn side(
        &self,
        own: &Workload,
        peer: End,
        other: Option<&Workload>,
        direction: Direction,
        (flow, pinned): (&Flow, &IsPinned<'_>),
    ) -> Reason {
        let mut next = match direction {
            Direction::Egress => own.egress.as_ref(),
            Direction::Ingress => own.ingress.as_ref(),
        };
        for _ in 0..TIERS {
            let Some(key) = next else { break };
            let Some(profile) = self.profiles.get(key) else { return Reason::NoRule(key.clone()) };
            let decides = profile.rules.iter().find(|rule| self.matches(rule, peer, flow, pinned));
            match decides.map(|rule| (rule.action, rule.origin.clone())) {
                Some((Action::Allow, origin)) => return Reason::Rule(origin),
                Some((Action::Deny, origin)) => return Reason::Denied(origin),
                Some((Action::Pass, _)) | None => {}
            }
            next = match &profile.otherwise {
                Otherwise::Refuse => return Reason::NoRule(profile.origin.clone()),
                Otherwise::Default => break,
                Otherwise::Profile(key) => Some(key),
            };
        }
        match self.isolation {
            Isolation::Open => Reason::Open,
            Isolation::Private if other.is_some_and(|other| other.namespace == own.namespace) => Reason::SameNamespace,
            Isolation::Private => Reason::OtherNamespace,
        }
    }

    fn matches(&self, rule: &Rule, peer: End, flow: &Flow, pinned: &IsPinned<'_>) -> bool {
        let port =
            |ports: &Ports| ports.protocol.number() == flow.protocol && (ports.first..=ports.last).contains(&flow.port);
        let member = || {
            let group = rule.group.as_ref().and_then(|key| self.groups.get(key));
            group.is_some_and(|group| peer.pod.is_some_and(|pod| group.contains(&pod)))
        };
        let inside = || rule.blocks.contains(peer.address);
        let named =
            || rule.names.as_ref().is_some_and(|key| self.is_outside(peer.address) && pinned(key, peer.address));
        (rule.ports.is_empty() || rule.ports.iter().any(port)) && (rule.anyone || member() || inside() || named())
    }

    /// Names outside that some rule lets the workload reach, and that no rule before it refuses altogether.
    pub fn names_of(&self, workload: &Workload) -> Vec<&NameSet> {
        let mut all = Vec::new();
        let mut key = workload.egress.as_ref().filter(|_| !self.outside.is_empty());
        for _ in 0..TIERS {
            let Some(profile) = key.and_then(|key| self.profiles.get(key)) else { break };
            for rule in &profile.rules {
                match rule.action {
                    Action::Allow => all.extend(rule.names.as_ref().and_then(|key| self.names.get(key))),
                    Action::Deny if rule.anyone && rule.ports.is_empty() => return all,
                    Action::Pass if rule.anyone && rule.ports.is_empty() => break,
                    Action::Deny | Action::Pass => {}
                }
            }
            key = match &profile.otherwise {
                Otherwise::Profile(next) => Some(next),
                Otherwise::Refuse | Otherwise::Default => None,
            };
        }
        all
    }

    pub fn is_outside(&self, address: IpAddr) -> bool {
        self.outside.contains(address)
    }

    /// Whether there is a way out, and some rule lets the workload take it, to wherever.
    pub fn lets_out(&self, workload: &Workload) -> bool {
        let open = self.isolation == Isolation::Open;
        let somewhere = self.outside != Ranges::default();
        let mut key = workload.egress.as_ref();
        for _ in 0..TIERS {
            let Some(profile) = key.map(|key| self.profiles.get(key)) else { break };
            let Some(profile) = profile.filter(|_| somewhere) else { return false };
            for rule in &profile.rules {
                match rule.action {
                    Action::Allow if rule.anyone || rule.blocks.touches(&self.outside) => return true,
                    Action::Deny if rule.anyone && rule.ports.is_empty() => return false,
                    Action::Pass if rule.anyone && rule.ports.is_empty() => break,
                    Action::Allow | Action::Deny | Action::Pass => {}
                }
            }
            match &profile.otherwise {
                Otherwise::Refuse => return false,
                Otherwise::Default => break,
                Otherwise::Profile(next) => key = Some(next),
            }
        }
        open && somewhere
    }

    /// Every workload follows the default.
    pub fn without_rules<'a>(
        isolation: Isolation,
        workloads: impl IntoIterator<Item = (Ipv4Addr, &'a str, &'a str)>,
    ) -> Policies {
        let workload = |(address, namespace, name): (Ipv4Addr, &str, &str)| {
            (address, Workload { namespace: namespace.into(), name: name.into(), egress: None, ingress: None })
        };
        Policies { isolation, workloads: workloads.into_iter().map(workload).collect(), ..Policies::default() }
    }
}

/// Addresses as inclusive ranges, sorted and disjoint; see [`ranges`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    pub v4: Vec<(Ipv4Addr, Ipv4Addr)>,
    pub v6: Vec<(Ipv6Addr, Ipv6Addr)>,
}

impl Ranges {
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
    /// Whether some address is in both.
    pub fn touches(&self, other: &Ranges) -> bool {
        fn any<T: PartialOrd>(some: &[(T, T)], others: &[(T, T)]) -> bool {
            some.iter().any(|(first, last)| others.iter().any(|(a, b)| a <= last && first <= b))
        }
        any(&self.v4, &other.v4) || any(&self.v6, &other.v6)
    }
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.iter().any(|(first, last)| (*first..=*last).contains(&address)),
            IpAddr::V6(address) => self.v6.iter().any(|(first, last)| (*first..=*last).contains(&address)),
        }
    }
}

/// The addresses in one of `blocks`. Bits below a prefix are ignored, and so is what is excepted of the other family.
pub fn ranges(blocks: &[Block]) -> Ranges {
    let of = |v4: bool| -> Vec<(u128, u128)> {
        let blocks = blocks.iter().filter(|block| block.network.base.is_ipv4() == v4);
        merged(blocks.flat_map(|block| remaining(block, v4)).collect())
    };
    let v4 = |bits: u128| Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX));
    Ranges {
        v4: of(true).into_iter().map(|(first, last)| (v4(first), v4(last))).collect(),
        v6: of(false).into_iter().map(|(first, last)| (first.into(), last.into())).collect(),
    }
}

/// What is left of a block.
fn remaining(block: &Block, v4: bool) -> Vec<(u128, u128)> {
    let mut left = Vec::new();
    let (first, last) = block.network.bounds();
    let excepts = block.except.iter().filter(|network| network.base.is_ipv4() == v4);
    let mut excepts: Vec<(u128, u128)> = excepts.map(|network| network.bounds()).collect();
    excepts.sort_unstable();
    let mut from = first;
    for (begin, end) in excepts {
        if begin > from {
            left.push((from, last.min(begin - 1)));
        }
        let Some(after) = end.checked_add(1) else { return left };
        from = from.max(after);
    }
    if from <= last {
        left.push((from, last));
    }
    left.retain(|(first, last)| first <= last);
    left
}

fn merged(mut all: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    all.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// A network of either family and any size, unlike [`crate::Cidr`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    pub base: IpAddr,
    /// 0 to 32, or 128; more counts as that.
    pub prefix: u8,
}

impl Network {
    pub fn whole(address: impl Into<IpAddr>) -> Network {
        Network { base: address.into(), prefix: 128 }
    }
    fn bounds(self) -> (u128, u128) {
        let (base, width) = match self.base {
            IpAddr::V4(base) => (u128::from(base.to_bits()), 32),
            IpAddr::V6(base) => (base.to_bits(), 128),
        };
        let host = u128::MAX.checked_shr(128 - width + u32::from(self.prefix)).unwrap_or(0);
        (base & !host, base | host)
    }
}

impl std::str::FromStr for Network {
    type Err = ();
    fn from_str(text: &str) -> Result<Network, ()> {
        let (base, prefix) = text.split_once('/').ok_or(())?;
        let base: IpAddr = base.parse().map_err(|_| ())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= most).ok_or(())?;
        Ok(Network { base, prefix })
    }
}

/// An `ipBlock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub network: Network,
    pub except: Vec<Network>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn blocks_become_ranges() {
        let block = |text: &str, except: &[&str]| Block {
            network: network(text),
            except: except.iter().map(|text| network(text)).collect(),
        };
        let text = |blocks: &[Block]| -> Vec<String> {
            let Ranges { v4, v6 } = ranges(blocks);
            let v4 = v4.iter().map(|(first, last)| format!("{first}-{last}"));
            v4.chain(v6.iter().map(|(first, last)| format!("{first}-{last}"))).collect()
        };
        assert_eq!(text(&[block("0.0.0.0/0", &[])]), ["0.0.0.0-255.255.255.255"]);
        assert_eq!(
            text(&[block("0.0.0.0/0", &["169.254.169.254/32", "10.0.0.0/8"])]),
            ["0.0.0.0-9.255.255.255", "11.0.0.0-169.254.169.253", "169.254.169.255-255.255.255.255"]
        );
        assert_eq!(text(&[block("10.0.0.0/24", &[]), block("10.0.1.7/24", &[])]), ["10.0.0.0-10.0.1.255"]);
        assert!(text(&[block("10.0.0.0/24", &["10.0.0.0/25", "10.0.0.128/25"])]).is_empty());
        assert!(text(&[]).is_empty());
        assert_eq!(
            text(&[block("::/0", &["fd00::/8", "10.0.0.0/8"]), block("192.0.2.1/32", &[])]),
            [
                "192.0.2.1-192.0.2.1",
                "::-fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "fe00::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
            ]
        );
        assert!(text(&[block("ff00::/8", &["ff00::/9", "ff80::/9"])]).is_empty());
        for bad in ["10.0.0.0/33", "::/129", "10.0.0.0", "x/8", "::/-1"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn ranges_hold_what_blocks_hold(
            blocks in proptest::collection::vec((0u32..64, 24u8..=32, proptest::collection::vec((0u32..64, 26u8..=32), 0..4)), 0..4),
            probe in 0u32..300,
            v6: bool,
        ) {
            let at = |bits: u32| match v6 {
                false => IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + bits)),
                true => IpAddr::V6(Ipv6Addr::from_bits((0xfd << 120) + u128::from(bits))),
            };
            let wide = |prefix: u8| if v6 { prefix + 96 } else { prefix };
            let network = |(base, prefix): (u32, u8)| Network { base: at(base * 4), prefix: wide(prefix) };
            let blocks: Vec<Block> = blocks.into_iter().map(|(base, prefix, except)| Block {
                network: network((base, prefix)),
                except: except.into_iter().map(network).collect(),
            }).collect();
            let bits = |address: IpAddr| match address {
                IpAddr::V4(address) => u128::from(address.to_bits()),
                IpAddr::V6(address) => address.to_bits(),
            };
            let inside = |network: &Network, address: IpAddr| {
                let (first, last) = network.bounds();
                (first..=last).contains(&bits(address))
            };
            let address = at(probe);
            let wanted = blocks.iter().any(|block| {
                inside(&block.network, address) && !block.except.iter().any(|network| inside(network, address))
            });
            let found = ranges(&blocks);
            prop_assert_eq!(found.contains(address), wanted);
            prop_assert!(found.v4.windows(2).all(|pair| u64::from(pair[0].1.to_bits()) + 1 < u64::from(pair[1].0.to_bits())));
            prop_assert!(found.v6.windows(2).all(|pair| pair[0].1.to_bits() + 1 < pair[1].0.to_bits()));
        }
    }
}
