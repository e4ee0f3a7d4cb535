//! What Services came to, followed object by object: the cost of a change is that of the Services it is about.

use super::{by_service, rules_and_record};
use crate::ports::{Records, ServiceRule};
use api::demand::BACKENDS;
use api::informer::Key;
use api::k8s::api::core::v1::Service;
use api::object::{Meta, SharedObject};
use api::topology::Place;
use network::dns::ServiceRecord;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};

#[derive(Default)]
pub(super) struct Known {
    place: Place,
    services: HashMap<Key, SharedObject>,
    /// By their Service, whether that is there or not.
    slices: HashMap<Key, BTreeMap<Key, SharedObject>>,
    /// The Service that a slice is of.
    owners: HashMap<Key, Key>,
    results: BTreeMap<Key, One>,
}

#[derive(Default, PartialEq, Eq)]
struct One {
    rules: Vec<ServiceRule>,
    record: Option<ServiceRecord>,
}

/// An object that is there now, or is not there any more.
pub(super) enum Seen {
    Service(Key, Option<SharedObject>),
    Slice(Key, Option<SharedObject>),
}

/// What the kernel is to have instead of what, and whether names changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub before: Vec<ServiceRule>,
    pub after: Vec<ServiceRule>,
    pub names: bool,
}

impl Known {
    pub fn of(place: &Place, services: Vec<SharedObject>, slices: Vec<SharedObject>) -> Known {
        let mut known = Known { place: place.clone(), ..Known::default() };
        let services = services.into_iter().map(|object| Seen::Service(Key::of(&object), Some(object)));
        let slices = slices.into_iter().map(|object| Seen::Slice(Key::of(&object), Some(object)));
        known.apply(services.chain(slices));
        known
    }

    pub fn apply(&mut self, seen: impl Iterator<Item = Seen>) -> Changed {
        let mut touched = BTreeSet::new();
        for seen in seen {
            match seen {
                Seen::Service(key, object) => {
                    match object {
                        Some(object) => self.services.insert(key.clone(), object),
                        None => self.services.remove(&key),
                    };
                    touched.insert(key);
                }
                Seen::Slice(key, object) => self.slice(key, object, &mut touched),
            }
        }
        let mut changed = Changed::default();
        for key in touched {
            let before = self.results.remove(&key).unwrap_or_default();
            let after = self.services.get(&key).map(|service| self.read(&key, service));
            let now = after.as_ref();
            changed.names |= before.record.as_ref() != now.and_then(|one| one.record.as_ref());
            if before.rules != now.map_or(&[][..], |one| &one.rules) {
                changed.before.extend(before.rules);
                changed.after.extend(now.iter().flat_map(|one| one.rules.iter().cloned()));
            }
            if let Some(one) = after {
                self.results.insert(key, one);
            }
        }
        changed
    }

    fn slice(&mut self, key: Key, object: Option<SharedObject>, touched: &mut BTreeSet<Key>) {
        if let Some(owner) = self.owners.remove(&key) {
            if let Some(slices) = self.slices.get_mut(&owner) {
                slices.remove(&key);
                if slices.is_empty() {
                    self.slices.remove(&owner);
                }
            }
            touched.insert(owner);
        }
        let Some(object) = object else { return };
        let Some(service) = object.label("kubernetes.io/service-name") else { return };
        let owner = Key::new(&key.namespace, service);
        self.owners.insert(key.clone(), owner.clone());
        self.slices.entry(owner.clone()).or_default().insert(key, object);
        touched.insert(owner);
    }

    fn read(&self, key: &Key, service: &SharedObject) -> One {
        let Some(spec) = Service::deserialize(&**service).ok().and_then(|service| service.spec) else {
            return One::default();
        };
        let names = (key.namespace.to_string(), key.name.to_string());
        let slices = self.slices.get(key).into_iter().flat_map(BTreeMap::values);
        let slices = by_service(slices, |_| true).remove(&names).unwrap_or_default();
        let (mut rules, record) = rules_and_record(&self.place, names, &spec, &slices);
        let activated = service.annotation(BACKENDS).is_some_and(|backends| !backends.is_empty());
        rules.iter_mut().for_each(|rule| rule.activated = activated);
        One { rules, record }
    }

    pub fn rules(&self) -> Vec<ServiceRule> {
        let mut rules: Vec<ServiceRule> = self.results.values().flat_map(|one| one.rules.iter().cloned()).collect();
        rules.sort_by_key(|rule| (rule.cluster_ip, rule.protocol, rule.port));
        rules
    }

    pub fn records(&self) -> Records {
        let services = self.results.values().filter_map(|one| one.record.clone()).collect();
        Records { services }
    }
}
