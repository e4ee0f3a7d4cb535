//! The routing table: immutable, shared by all requests, replaced as a whole.

use super::filter::Filters;
use super::host::HostPattern;
use super::matching::{Match, Seen};
use super::session::Session;
use crate::policy::Policy;
use crate::upstream::Upstream;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Where a share of a rule's requests goes.
#[derive(Clone, Debug)]
pub enum Target {
    Upstream(Arc<Upstream>),
    /// Answered with 500, as the specification asks for; the text says why.
    Invalid(Arc<str>),
}

#[derive(Debug)]
pub struct Backend {
    pub weight: u32,
    pub target: Target,
    pub filters: Filters,
}

/// One rule of one route.
#[derive(Debug)]
pub struct Rule {
    /// `namespace/name` of the route, for logs.
    pub route: Arc<str>,
    pub filters: Filters,
    pub backends: Vec<Backend>,
    pub total_weight: u64,
    pub request_timeout: Option<Duration>,
    pub backend_timeout: Option<Duration>,
    pub retry: Option<Retry>,
    pub session: Option<Session>,
    /// The rule as a whole cannot be served.
    pub invalid: Option<Arc<str>>,
}

/// When a request is tried again, beyond connections that could not be used.
#[derive(Debug, Clone)]
pub struct Retry {
    pub codes: Vec<u16>,
    pub attempts: u32,
    pub backoff: Duration,
}

impl Rule {
    /// The backend on which a random number falls.
    pub fn pick(&self, random: u64) -> Option<&Backend> {
        pick(&self.backends, self.total_weight, random)
    }
}

/// Of weighted backends the one on which a random number falls.
pub fn pick(backends: &[Backend], total_weight: u64, random: u64) -> Option<&Backend> {
    if let [only] = backends {
        return (only.weight > 0).then_some(only);
    }
    let mut place = random.checked_rem(total_weight)?;
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let here = place < weight;
        place = place.saturating_sub(weight);
        here
    })
}

/// One match of one rule under one hostname.
#[derive(Clone, Debug)]
pub struct Entry {
    pub condition: Match,
    pub rule: Arc<Rule>,
    /// Hosts that a more specific listener of the same Gateway takes for itself.
    pub hidden: Arc<[HostPattern]>,
    /// Of the Gateway, then of the route.
    pub policies: Arc<[Arc<Policy>]>,
}

/// All routes: those of HTTP listeners and those of HTTPS listeners.
#[derive(Debug, Default)]
pub struct Table {
    pub plain: Hosts,
    pub secure: Hosts,
}

impl Table {
    pub fn len(&self) -> usize {
        self.plain.len() + self.secure.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn of(&self, secure: bool) -> &Hosts {
        if secure { &self.secure } else { &self.plain }
    }

    /// What serves this request if it came in over an HTTP listener.
    pub fn find(&self, host: &str, seen: &Seen<'_>) -> Option<&Entry> {
        self.plain.find(host, seen)
    }
}

/// Entries by host, each list in order of precedence.
#[derive(Debug, Default)]
pub struct Hosts {
    exact: HashMap<Box<str>, Vec<Entry>>,
    wildcard: HashMap<Box<str>, Vec<Entry>>,
    any: Vec<Entry>,
}

impl Hosts {
    /// Takes entries with their host, already in order of route age and name and of rules within a route: equal matches
    /// keep that order.
    pub fn new(entries: Vec<(HostPattern, Entry)>) -> Hosts {
        let mut table = Hosts::default();
        for (host, entry) in entries {
            match host {
                HostPattern::Any => table.any.push(entry),
                HostPattern::Wildcard(suffix) => table.wildcard.entry(suffix).or_default().push(entry),
                HostPattern::Exact(name) => table.exact.entry(name).or_default().push(entry),
            }
        }
        for list in table.exact.values_mut().chain(table.wildcard.values_mut()) {
            list.sort_by(|a, b| a.condition.precedence(&b.condition));
        }
        table.any.sort_by(|a, b| a.condition.precedence(&b.condition));
        table
    }

    pub fn len(&self) -> usize {
        self.exact.values().chain(self.wildcard.values()).map(Vec::len).sum::<usize>() + self.any.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry that serves this request. `host` is lower case, without port: the most specific hostname goes first,
    /// and where none of its matches fits, the next.
    pub fn find(&self, host: &str, seen: &Seen<'_>) -> Option<&Entry> {
        let fits =
            |entry: &&Entry| entry.condition.matches(seen) && !entry.hidden.iter().any(|pattern| pattern.matches(host));
        if let Some(found) = self.exact.get(host).and_then(|list| list.iter().find(fits)) {
            return Some(found);
        }
        if !self.wildcard.is_empty() {
            let mut rest = host;
            while let Some((_, suffix)) = rest.split_once('.') {
                if let Some(found) = self.wildcard.get(suffix).and_then(|list| list.iter().find(fits)) {
                    return Some(found);
                }
                rest = suffix;
            }
        }
        self.any.iter().find(fits)
    }
}
