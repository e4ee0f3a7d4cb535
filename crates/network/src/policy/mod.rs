//! Who may talk to whom. A connection passes if its source's side lets it out and its destination's side lets it in. Each
//! side goes through the [`Profile`]s of its workload, one after the other: the rules of administrators, of the namespace's
//! own policies, of the baseline. The first rule that matches decides; if none does, the last profile's [`Otherwise`] does,
//! in the end the default: own namespace only, or ([`Isolation::Open`]) everything.
//!
//! This module decides ([`Policies::decide`], for explanations and for ending connections that are no longer allowed);
//! `program` makes the kernel decide the same.

mod program;

use crate::services::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
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
    /// Inclusive ranges of addresses, sorted and disjoint; see [`ranges`].
    pub blocks: Vec<(Ipv4Addr, Ipv4Addr)>,
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

/// Everything the kernel is to enforce. What is not a workload in here reaches nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    pub isolation: Isolation,
    /// Sets of workloads that rules name, by a key that stays the same while members come and go.
    pub groups: BTreeMap<Arc<str>, BTreeSet<Ipv4Addr>>,
    pub profiles: BTreeMap<Arc<str>, Profile>,
    pub workloads: BTreeMap<Ipv4Addr, Workload>,
}

/// A connection to judge, by its first packet after a Service's address has been replaced by an endpoint's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// As in the IP header: 1 ICMP, 6 TCP, 17 UDP, 132 SCTP.
    pub protocol: u8,
    pub port: u16,
}

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
}

impl Reason {
    pub fn allows(&self) -> bool {
        match self {
            Reason::Itself | Reason::SameNamespace | Reason::Open | Reason::Rule(_) => true,
            Reason::OtherNamespace | Reason::Denied(_) | Reason::NoRule(_) | Reason::NoWorkload => false,
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

impl Policies {
    /// Says whether and why a connection passes. The same decision as the kernel's.
    pub fn decide(&self, flow: &Flow) -> Decision {
        let (source, destination) = (self.workloads.get(&flow.source), self.workloads.get(&flow.destination));
        if flow.source == flow.destination && source.is_some() {
            return Decision { egress: Reason::Itself, ingress: Reason::Itself };
        }
        let side = |own: Option<&Workload>, peer: Ipv4Addr, other: Option<&Workload>, direction| match own {
            None => Reason::NoWorkload,
            Some(own) => self.side(own, peer, other, direction, flow),
        };
        Decision {
            egress: side(source, flow.destination, destination, Direction::Egress),
            ingress: side(destination, flow.source, source, Direction::Ingress),
        }
    }

    fn side(
        &self,
        own: &Workload,
        peer: Ipv4Addr,
        other: Option<&Workload>,
        direction: Direction,
        flow: &Flow,
    ) -> Reason {
        let mut next = match direction {
            Direction::Egress => own.egress.as_ref(),
            Direction::Ingress => own.ingress.as_ref(),
        };
        for _ in 0..TIERS {
            let Some(key) = next else { break };
            let Some(profile) = self.profiles.get(key) else { return Reason::NoRule(key.clone()) };
            let decides = profile.rules.iter().find(|rule| self.matches(rule, peer, flow));
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

    fn matches(&self, rule: &Rule, peer: Ipv4Addr, flow: &Flow) -> bool {
        let port =
            |ports: &Ports| ports.protocol.number() == flow.protocol && (ports.first..=ports.last).contains(&flow.port);
        let member = || {
            let group = rule.group.as_ref().and_then(|key| self.groups.get(key));
            group.is_some_and(|group| group.contains(&peer))
        };
        let inside = || rule.blocks.iter().any(|(first, last)| (*first..=*last).contains(&peer));
        (rule.ports.is_empty() || rule.ports.iter().any(port)) && (rule.anyone || member() || inside())
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

/// The addresses in one of `blocks` (base, prefix length, what is excepted), as sorted, disjoint, inclusive ranges. Bits
/// below a prefix are ignored.
pub fn ranges(blocks: &[Block]) -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for block in blocks {
        let (first, last) = block.network.bounds();
        let mut excepts: Vec<(u64, u64)> = block.except.iter().map(|network| network.bounds()).collect();
        excepts.sort_unstable();
        let mut from = first;
        for (begin, end) in excepts {
            if begin > from {
                all.push((from, last.min(begin - 1)));
            }
            from = from.max(end + 1);
        }
        if from <= last {
            all.push((from, last));
        }
    }
    all.retain(|(first, last)| first <= last);
    all.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match merged.last_mut() {
            Some(before) if first <= before.1 + 1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    let address = |bits: u64| Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX));
    merged.into_iter().map(|(first, last)| (address(first), address(last))).collect()
}

/// A network of any size, unlike [`crate::Cidr`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    pub base: Ipv4Addr,
    /// 0 to 32; more counts as 32.
    pub prefix: u8,
}

impl Network {
    fn bounds(self) -> (u64, u64) {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0);
        let base = self.base.to_bits() & mask;
        (u64::from(base), u64::from(base | !mask))
    }
}

impl std::str::FromStr for Network {
    type Err = ();
    fn from_str(text: &str) -> Result<Network, ()> {
        let (base, prefix) = text.split_once('/').ok_or(())?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or(())?;
        Ok(Network { base: base.parse().map_err(|_| ())?, prefix })
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
            ranges(blocks).iter().map(|(first, last)| format!("{first}-{last}")).collect()
        };
        assert_eq!(text(&[block("0.0.0.0/0", &[])]), ["0.0.0.0-255.255.255.255"]);
        assert_eq!(
            text(&[block("0.0.0.0/0", &["169.254.169.254/32", "10.0.0.0/8"])]),
            ["0.0.0.0-9.255.255.255", "11.0.0.0-169.254.169.253", "169.254.169.255-255.255.255.255"]
        );
        assert_eq!(text(&[block("10.0.0.0/24", &[]), block("10.0.1.7/24", &[])]), ["10.0.0.0-10.0.1.255"]);
        assert!(text(&[block("10.0.0.0/24", &["10.0.0.0/25", "10.0.0.128/25"])]).is_empty());
        assert!(text(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn ranges_hold_what_blocks_hold(
            blocks in proptest::collection::vec((0u32..64, 24u8..=32, proptest::collection::vec((0u32..64, 26u8..=32), 0..4)), 0..4),
            probe in 0u32..300,
        ) {
            let at = |n: u32| Ipv4Addr::from_bits(0x0a00_0000 + n * 4);
            let blocks: Vec<Block> = blocks.into_iter().map(|(base, prefix, except)| Block {
                network: Network { base: at(base), prefix },
                except: except.into_iter().map(|(base, prefix)| Network { base: at(base), prefix }).collect(),
            }).collect();
            let inside = |network: &Network, bits: u32| {
                let (first, last) = network.bounds();
                (first..=last).contains(&u64::from(bits))
            };
            let bits = 0x0a00_0000 + probe;
            let wanted = blocks.iter().any(|block| {
                inside(&block.network, bits) && !block.except.iter().any(|network| inside(network, bits))
            });
            let found = ranges(&blocks);
            let address = Ipv4Addr::from_bits(bits);
            prop_assert_eq!(found.iter().any(|(first, last)| (*first..=*last).contains(&address)), wanted);
            prop_assert!(found.windows(2).all(|pair| u64::from(pair[0].1.to_bits()) + 1 < u64::from(pair[1].0.to_bits())));
        }
    }
}
