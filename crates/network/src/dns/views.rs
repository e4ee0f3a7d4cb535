//! Who sees which names. A question's source address says whose it is (the router checks source addresses on every link);
//! names of a namespace that the asker does not see do not exist for it.

use crate::names::Pattern;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Workloads' namespaces, and what each namespace sees besides its own names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Views {
    /// Everyone sees everything.
    pub open: bool,
    pub namespaces: HashMap<Ipv4Addr, Arc<str>>,
    pub visible: BTreeMap<String, BTreeSet<String>>,
    pub outside: Outside,
    /// Names outside that workloads may ask for which may not ask for all.
    pub named: HashMap<Ipv4Addr, Vec<Pattern>>,
}

/// Who may ask for names outside: a question carries data out as well as a packet does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outside {
    Everyone,
    These(HashSet<Ipv4Addr>),
}

impl Default for Outside {
    fn default() -> Outside {
        Outside::These(HashSet::new())
    }
}

impl Outside {
    pub fn allows(&self, asker: Ipv4Addr) -> bool {
        match self {
            Outside::Everyone => true,
            Outside::These(askers) => askers.contains(&asker),
        }
    }
}

/// What one asker sees.
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    Everything,
    /// The names of one namespace, and of others that let it in.
    Of {
        namespace: &'a str,
        visible: Option<&'a BTreeSet<String>>,
    },
    /// Nobody that is known here.
    Nothing,
}

impl Views {
    pub fn open() -> Views {
        Views { open: true, outside: Outside::Everyone, ..Views::default() }
    }

    /// Whether a workload may ask others for this name.
    pub fn may_ask(&self, asker: Ipv4Addr, name: &str) -> bool {
        let named = || self.named.get(&asker).is_some_and(|names| names.iter().any(|pattern| pattern.matches(name)));
        self.outside.allows(asker) || named()
    }

    pub fn of(&self, asker: Ipv4Addr) -> View<'_> {
        match self.namespaces.get(&asker) {
            _ if self.open => View::Everything,
            Some(namespace) => View::Of { namespace, visible: self.visible.get(&**namespace) },
            None => View::Nothing,
        }
    }
}

impl View<'_> {
    pub fn sees(&self, wanted: &str) -> bool {
        match self {
            View::Everything => true,
            View::Of { namespace, visible } => {
                *namespace == wanted || visible.is_some_and(|visible| visible.contains(wanted))
            }
            View::Nothing => false,
        }
    }
}
