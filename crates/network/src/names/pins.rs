//! What is pinned, by namespace: which address was the answer for which name, and until when. Bounded; time is a parameter.

use super::NameSet;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients keep addresses longer than they should.
pub const FLOOR: Duration = Duration::from_secs(60);
pub const MOST: Duration = Duration::from_secs(24 * 3600);
/// Pins of one namespace, and of one set of names; beyond that those that would end first go.
pub const PER_NAMESPACE: usize = 4096;
pub const PER_SET: usize = 1024;

type Key = (Arc<str>, IpAddr);

#[derive(Default)]
pub struct Pins(HashMap<Arc<str>, BTreeMap<Key, Instant>>);

/// One pin that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub address: IpAddr,
}

/// When a pin ends that is made now, for an answer with this TTL in seconds.
pub fn end_of(now: Instant, ttl: u32) -> Instant {
    now + Duration::from_secs(ttl.into()).clamp(FLOOR, MOST)
}

impl Pins {
    /// Pins, or prolongs.
    pub fn pin(&mut self, namespace: &Arc<str>, name: &Arc<str>, address: IpAddr, until: Instant) {
        let pins = self.0.entry(namespace.clone()).or_default();
        let end = pins.entry((name.clone(), address)).or_insert(until);
        *end = until.max(*end);
    }

    pub fn forget(&mut self, gone: &Gone) {
        if let Some(pins) = self.0.get_mut(&gone.namespace) {
            pins.remove(&(gone.name.clone(), gone.address));
            if pins.is_empty() {
                self.0.remove(&gone.namespace);
            }
        }
    }

    /// Takes away what is beyond the limits of a namespace and of one of its sets.
    pub fn prune(&mut self, set: &NameSet) -> Vec<Gone> {
        let mut all = self.prune_some(&set.namespace, PER_SET, |name| set.matches(name));
        all.extend(self.prune_some(&set.namespace, PER_NAMESPACE, |_| true));
        all
    }

    fn prune_some(&mut self, namespace: &Arc<str>, most: usize, counts: impl Fn(&str) -> bool) -> Vec<Gone> {
        let Some(pins) = self.0.get(namespace).filter(|pins| pins.len() > most) else { return Vec::new() };
        let mut counted: Vec<(Instant, Key)> =
            pins.iter().filter(|((name, _), _)| counts(name)).map(|(key, until)| (*until, key.clone())).collect();
        let beyond = counted.len().saturating_sub(most);
        counted.sort_unstable_by_key(|(until, _)| *until);
        let gone = |(_, (name, address)): (Instant, Key)| Gone { namespace: namespace.clone(), name, address };
        let all: Vec<Gone> = counted.into_iter().take(beyond).map(gone).collect();
        all.iter().for_each(|gone| self.forget(gone));
        all
    }

    /// Addresses of a set, each until its last pin ends, with that pin's name.
    pub fn of_set(&self, set: &NameSet) -> BTreeMap<IpAddr, (Instant, Arc<str>)> {
        let mut all: BTreeMap<IpAddr, (Instant, Arc<str>)> = BTreeMap::new();
        for ((name, address), until) in self.0.get(&set.namespace).into_iter().flatten() {
            if set.matches(name) && all.get(address).is_none_or(|(other, _)| other < until) {
                all.insert(*address, (*until, name.clone()));
            }
        }
        all
    }

    /// Whether another name of the set has this address too.
    pub fn holds(&self, set: &NameSet, address: IpAddr) -> bool {
        let pins = self.0.get(&set.namespace).into_iter().flatten();
        pins.into_iter().any(|((name, other), _)| *other == address && set.matches(name))
    }

    pub fn next_end(&self) -> Option<Instant> {
        self.0.values().flat_map(BTreeMap::values).min().copied()
    }

    /// Those whose time is up.
    pub fn ended(&self, now: Instant) -> Vec<Gone> {
        let of = |(namespace, pins): (&Arc<str>, &BTreeMap<Key, Instant>)| {
            let ended = pins.iter().filter(|(_, until)| **until <= now);
            let gone = ended.map(|((name, address), _)| Gone {
                namespace: namespace.clone(),
                name: name.clone(),
                address: *address,
            });
            gone.collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of).collect()
    }

    pub fn keep_namespaces(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|namespace, _| keep(namespace));
    }

    pub fn count(&self) -> BTreeMap<Arc<str>, usize> {
        self.0.iter().map(|(namespace, pins)| (namespace.clone(), pins.len())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(namespace: &str, pattern: &str) -> NameSet {
        NameSet { namespace: namespace.into(), patterns: vec![pattern.parse().unwrap()] }
    }
    fn ip(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0xc000_0200 + n).into()
    }

    #[test]
    fn ttls_have_a_floor_and_a_ceiling() {
        let now = Instant::now();
        for (ttl, wanted) in [(0, FLOOR), (30, FLOOR), (300, Duration::from_secs(300)), (u32::MAX, MOST)] {
            assert_eq!(end_of(now, ttl) - now, wanted, "{ttl}");
        }
    }

    #[test]
    fn an_address_stays_while_any_name_has_it() {
        let (now, mut pins) = (Instant::now(), Pins::default());
        let (a, b): (Arc<str>, Arc<str>) = ("a.example.org".into(), "b.example.org".into());
        let shop: Arc<str> = "shop".into();
        pins.pin(&shop, &a, ip(1), now + FLOOR);
        pins.pin(&shop, &b, ip(1), now + 2 * FLOOR);
        pins.pin(&shop, &b, ip(1), now + FLOOR);
        let both = set("shop", "*.example.org");
        assert_eq!(pins.of_set(&both)[&ip(1)], (now + 2 * FLOOR, b.clone()));
        assert_eq!(pins.of_set(&set("shop", "a.example.org"))[&ip(1)].0, now + FLOOR);
        assert!(pins.of_set(&set("other", "*.example.org")).is_empty(), "of another namespace");
        let ended = pins.ended(now + FLOOR);
        assert_eq!(ended, [Gone { namespace: shop.clone(), name: a, address: ip(1) }]);
        pins.forget(&ended[0]);
        assert!(pins.holds(&both, ip(1)) && !pins.holds(&set("shop", "a.example.org"), ip(1)));
        assert_eq!(pins.next_end(), Some(now + 2 * FLOOR));
    }

    proptest! {
        #[test]
        fn limits_hold_and_those_that_end_first_go(count in 0usize..6000) {
            let (now, mut pins) = (Instant::now(), Pins::default());
            let (shop, name): (Arc<str>, Arc<str>) = ("shop".into(), "a.example.org".into());
            for n in 0..count {
                pins.pin(&shop, &name, ip(n as u32), now + Duration::from_secs(n as u64));
            }
            let set = set("shop", "a.example.org");
            let gone = pins.prune(&set);
            let left = pins.of_set(&set);
            prop_assert_eq!(left.len(), count.min(PER_SET));
            prop_assert_eq!(gone.len() + left.len(), count);
            let last_gone = gone.iter().map(|gone| gone.address).max();
            prop_assert!(last_gone.is_none() || last_gone < left.keys().next().copied());
        }
    }
}
