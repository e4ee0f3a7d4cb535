//! The routing table: immutable, shared by all requests, replaced as a whole.

use super::filter::Filters;
use super::host::HostPattern;
use super::matching::{Match, Seen, first_segment};
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
    /// The same as long as route and rule are; 0 where nothing is cached.
    pub id: u64,
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
    exact: HashMap<Box<str>, Entries>,
    wildcard: HashMap<Box<str>, Entries>,
    any: Entries,
}

/// The entries of one host in order of precedence, found by the first segment of the path: a request looks only at those
/// that may fit.
#[derive(Debug, Default)]
struct Entries {
    all: Vec<Entry>,
    /// Where in `all` those are that fit only paths that begin with this segment.
    by_segment: HashMap<Box<str>, Vec<usize>>,
    /// Those that may fit any path.
    others: Vec<usize>,
}

impl Entries {
    fn new(mut all: Vec<Entry>) -> Entries {
        all.sort_by(|a, b| a.condition.precedence(&b.condition));
        let mut entries = Entries::default();
        for (index, entry) in all.iter().enumerate() {
            match entry.condition.path.first_segment() {
                Some(segment) => entries.by_segment.entry(segment.into()).or_default().push(index),
                None => entries.others.push(index),
            }
        }
        Entries { all, ..entries }
    }

    fn find(&self, seen: &Seen<'_>, fits: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        let known = first_segment(seen.path).and_then(|segment| self.by_segment.get(segment));
        let (mut known, mut others) = (known.into_iter().flatten().peekable(), self.others.iter().peekable());
        loop {
            let next = match (known.peek(), others.peek()) {
                (Some(a), Some(b)) if a < b => known.next(),
                (Some(_), None) => known.next(),
                _ => others.next(),
            };
            let entry = self.all.get(*next?)?;
            if fits(entry) {
                return Some(entry);
            }
        }
    }
}

impl Hosts {
    /// Takes entries with their host, already in order of route age and name and of rules within a route: equal matches
    /// keep that order.
    pub fn new(entries: Vec<(HostPattern, Entry)>) -> Hosts {
        let (mut exact, mut wildcard, mut any) = (HashMap::new(), HashMap::new(), Vec::new());
        for (host, entry) in entries {
            match host {
                HostPattern::Any => any.push(entry),
                HostPattern::Wildcard(suffix) => wildcard.entry(suffix).or_insert_with(Vec::new).push(entry),
                HostPattern::Exact(name) => exact.entry(name).or_insert_with(Vec::new).push(entry),
            }
        }
        let sorted = |lists: HashMap<Box<str>, Vec<Entry>>| {
            lists.into_iter().map(|(host, list)| (host, Entries::new(list))).collect()
        };
        Hosts { exact: sorted(exact), wildcard: sorted(wildcard), any: Entries::new(any) }
    }

    pub fn len(&self) -> usize {
        let named = self.exact.values().chain(self.wildcard.values());
        named.chain([&self.any]).map(|entries| entries.all.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry that serves this request. `host` is lower case, without port: the most specific hostname goes first,
    /// and where none of its matches fits, the next.
    pub fn find(&self, host: &str, seen: &Seen<'_>) -> Option<&Entry> {
        let fits =
            |entry: &Entry| entry.condition.matches(seen) && !entry.hidden.iter().any(|pattern| pattern.matches(host));
        if let Some(found) = self.exact.get(host).and_then(|list| list.find(seen, fits)) {
            return Some(found);
        }
        if !self.wildcard.is_empty() {
            let mut rest = host;
            while let Some((_, suffix)) = rest.split_once('.') {
                if let Some(found) = self.wildcard.get(suffix).and_then(|list| list.find(seen, fits)) {
                    return Some(found);
                }
                rest = suffix;
            }
        }
        self.any.find(seen, fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::PathMatch;
    use http::{HeaderMap, Method};
    use proptest::prelude::*;

    fn entry(condition: Match) -> Entry {
        let rule = Rule {
            route: "n/r".into(),
            id: 0,
            filters: Filters::default(),
            backends: Vec::new(),
            total_weight: 0,
            request_timeout: None,
            backend_timeout: None,
            retry: None,
            session: None,
            invalid: None,
        };
        Entry { condition, rule: Arc::new(rule), hidden: Arc::from([]), policies: Arc::from([]) }
    }

    fn any_match() -> impl Strategy<Value = Match> {
        let path = "(/[abc]?){0,3}";
        let path = prop_oneof![
            path.prop_map(|path| PathMatch::Exact(if path.is_empty() { "/".into() } else { path })),
            path.prop_map(|path| PathMatch::prefix(&path)),
            Just(PathMatch::Regex(regex::Regex::new("^(?:/a.*)$").unwrap())),
        ];
        let method = prop_oneof![Just(None), Just(Some(Method::GET)), Just(Some(Method::PUT))];
        (path, method).prop_map(|(path, method)| Match { method, ..Match::path(path) })
    }

    proptest! {
        /// By segment the same entry is found as by looking at all of them.
        #[test]
        fn nothing_is_overlooked(matches in proptest::collection::vec(any_match(), 0..12), path in "(/[abc]?){1,4}") {
            let entries = Entries::new(matches.into_iter().map(entry).collect());
            let headers = HeaderMap::new();
            let seen = Seen { method: &Method::GET, path: &path, query: None, headers: &headers };
            let fits = |entry: &Entry| entry.condition.matches(&seen);
            let wanted = entries.all.iter().position(fits);
            let found = entries.find(&seen, fits);
            let found = found.and_then(|found| entries.all.iter().position(|entry| std::ptr::eq(entry, found)));
            prop_assert_eq!(found, wanted);
        }
    }
}
