//! Service ports and their endpoints: who there is, who is chosen, and connections that are kept open to them.
//!
//! `balance` chooses, `http1` and `http2` speak with an endpoint, `framing` says where an HTTP/1.1 body ends, `body` streams it.

mod balance;
mod body;
mod endpoint;
mod framing;
mod http1;
mod http2;
mod request_body;
mod slices;

pub use balance::{Algorithm, HashBy, Picked, ProxyVersion, Rules};
pub use body::UpstreamBody;
pub use endpoint::{Connection, Endpoint, Lease, Room};
pub use framing::{Chunks, Framing};
pub use http1::{Exchange, Failure, Head, exchange, has_token, parse_head};
pub use http2::{Refusal, exchange as exchange_http2};
pub use request_body::{KEEP, Kept, RequestBody};
pub use slices::addresses;

use crate::counters::Counters;
use api::demand::{Demand, Load};
use std::collections::HashMap;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Namespace, service, port number, whether spoken to in HTTP/2.
type Key = (String, String, u16, bool);

/// Every request pays this many thousandths into its upstream's retry budget, every retry takes a thousand out.
const DEPOSIT: u32 = 200;
const WITHDRAWAL: u32 = 1000;
const BUDGET_AT_START: u32 = 10 * WITHDRAWAL;
const MAX_BUDGET: u32 = 100 * WITHDRAWAL;

/// All Service ports that routes refer to. Owned by the task that follows the API.
pub struct Upstreams {
    all: HashMap<Key, Wanted>,
    settings: Arc<Settings>,
    generation: u64,
}

struct Wanted {
    upstream: Arc<Upstream>,
    generation: u64,
}

/// What all endpoints share.
#[derive(Debug, Default)]
pub struct Settings {
    pub counters: Arc<Counters>,
    pub demand: Arc<Demand>,
    pub connect_timeout: Duration,
    pub idle: Duration,
}

impl Upstreams {
    pub fn new(settings: Settings) -> Upstreams {
        Upstreams { all: HashMap::new(), settings: Arc::new(settings), generation: 0 }
    }

    /// Begins a new table: what is not wanted until [`Upstreams::retire`] is let go.
    pub fn begin(&mut self) {
        self.generation += 1;
    }

    /// The upstream of a Service port; the same one as before if the port is the same.
    pub fn want(&mut self, namespace: &str, service: &str, port: u16, name: &str, http2: bool) -> Arc<Upstream> {
        let key = (namespace.to_owned(), service.to_owned(), port, http2);
        let fresh = || Arc::new(Upstream::new(namespace, service, name, http2, self.settings.clone()));
        let generation = self.generation;
        let entry = self.all.entry(key).or_insert_with(|| Wanted { upstream: fresh(), generation });
        if entry.upstream.port_name != name {
            entry.upstream = Arc::new(Upstream::new(namespace, service, name, http2, self.settings.clone()));
        }
        entry.generation = generation;
        entry.upstream.clone()
    }

    pub fn retire(&mut self) {
        let generation = self.generation;
        self.all.retain(|_, wanted| wanted.generation == generation);
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.all.values().map(|wanted| &wanted.upstream)
    }
}

/// One port of one Service.
#[derive(Debug)]
pub struct Upstream {
    pub namespace: String,
    pub service: String,
    /// Name of the Service's port, by which EndpointSlices refer to it.
    pub port_name: String,
    /// Spoken to in HTTP/2 from the first byte (gRPC).
    pub http2: bool,
    group: RwLock<Arc<Group>>,
    /// Whose turn it is.
    turn: AtomicUsize,
    /// Where requests wait until an endpoint has room.
    pub room: Arc<Room>,
    settings: Arc<Settings>,
    /// Of the whole Service.
    pub load: Arc<Load>,
    /// Thousandths of retries that may still be made.
    budget: AtomicU32,
}

/// The endpoints there are, and how requests are spread over them.
#[derive(Debug)]
pub struct Group {
    endpoints: Box<[Arc<Endpoint>]>,
    pub rules: Arc<Rules>,
    /// Requests under way at one endpoint at most.
    pub most: usize,
}

/// A short name for something, the same in every process.
pub fn fingerprint(parts: &[&str]) -> u64 {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Upstream {
    fn new(namespace: &str, service: &str, port_name: &str, http2: bool, settings: Arc<Settings>) -> Upstream {
        Upstream {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            port_name: port_name.to_owned(),
            http2,
            group: RwLock::new(Arc::new(Group { endpoints: Box::new([]), rules: Arc::default(), most: usize::MAX })),
            turn: AtomicUsize::new(0),
            room: Arc::default(),
            load: settings.demand.of(namespace, service),
            settings,
            budget: AtomicU32::new(BUDGET_AT_START),
        }
    }

    pub fn group(&self) -> Arc<Group> {
        self.group.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.group().endpoints.to_vec()
    }

    fn set_group(&self, endpoints: Box<[Arc<Endpoint>]>, rules: Arc<Rules>) {
        let group = Group { endpoints, most: rules.most(self.http2), rules };
        *self.group.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(group);
        self.load.notify();
        self.room.all();
    }

    /// Replaces how requests are spread.
    pub fn set_rules(&self, rules: &Arc<Rules>) {
        let group = self.group();
        if group.rules != *rules {
            self.set_group(group.endpoints.clone(), rules.clone());
        }
    }

    /// Replaces the endpoints; those that stay keep their connections and their record. Requests in flight to those
    /// that go are not disturbed.
    pub fn set_endpoints(&self, addresses: &[SocketAddr]) {
        let group = self.group();
        let old = &group.endpoints;
        if old.len() == addresses.len() && old.iter().zip(addresses).all(|(o, a)| o.address == *a) {
            return;
        }
        let known: HashMap<SocketAddr, &Arc<Endpoint>> = old.iter().map(|e| (e.address, e)).collect();
        let new: Vec<Arc<Endpoint>> = addresses
            .iter()
            .map(|address| match known.get(address) {
                Some(endpoint) => Arc::clone(endpoint),
                None => {
                    let id = fingerprint(&[&self.namespace, &self.service, &address.to_string()]);
                    Arc::new(Endpoint::new(*address, id, self.settings.clone(), self.room.clone()))
                }
            })
            .collect();
        for gone in old.iter().filter(|endpoint| !addresses.contains(&endpoint.address)) {
            gone.retire();
        }
        self.set_group(new.into(), group.rules.clone());
    }

    /// A request begins.
    pub fn deposit(&self) {
        // A lost update costs a fifth of a retry.
        let budget = self.budget.load(Relaxed);
        if budget < MAX_BUDGET {
            self.budget.store(budget + DEPOSIT, Relaxed);
        }
    }

    /// Whether one more retry may be made; when all fails, retries must not be what keeps it down.
    pub fn may_retry(&self) -> bool {
        self.budget.fetch_update(Relaxed, Relaxed, |budget| budget.checked_sub(WITHDRAWAL)).is_ok()
    }

    /// The endpoint of that name, if it may be used.
    pub fn endpoint(&self, id: u64) -> Option<Arc<Endpoint>> {
        self.group().endpoints.iter().find(|endpoint| endpoint.id == id && !endpoint.is_ejected()).cloned()
    }

    /// What balancing knows requests like this one by; `None` if it does not care.
    pub fn key(&self, client: IpAddr, headers: &http::HeaderMap) -> Option<u64> {
        self.group().rules.key(client, headers)
    }

    /// An endpoint by the rules; `avoid` and ejected ones only if there is no other.
    pub fn pick(&self, random: u64, key: Option<u64>, avoid: Option<&Arc<Endpoint>>) -> Picked {
        let group = self.group();
        balance::pick(&group.endpoints, (&group.rules, group.most), &self.turn, (random, key), avoid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn upstream(count: u8) -> Upstream {
        let upstream = Upstream::new("n", "s", "", false, Arc::default());
        let addresses: Vec<SocketAddr> = (0..count).map(|n| ([127, 0, 0, n], 80).into()).collect();
        upstream.set_endpoints(&addresses);
        upstream
    }

    #[test]
    fn endpoints_that_stay_are_the_same() {
        let upstream = upstream(3);
        let before = upstream.endpoints();
        upstream.set_endpoints(&[before[2].address, before[0].address]);
        let after = upstream.endpoints();
        assert!(Arc::ptr_eq(&before[2], &after[0]) && Arc::ptr_eq(&before[0], &after[1]));
    }

    #[test]
    fn retries_are_a_share_of_requests() {
        let upstream = upstream(1);
        let spend = || (0..1000).take_while(|_| upstream.may_retry()).count();
        assert_eq!(spend(), 10);
        (0..100).for_each(|_| upstream.deposit());
        assert_eq!(spend(), 20);
    }

    proptest! {
        #[test]
        fn the_one_to_avoid_is_avoided(count in 2u8..6, avoid in 0usize..6, random: u64) {
            let upstream = upstream(count);
            let endpoints = upstream.endpoints();
            let avoid = &endpoints[avoid % endpoints.len()];
            let picked = upstream.pick(random, None, Some(avoid)).endpoint().unwrap();
            prop_assert!(!Arc::ptr_eq(&picked, avoid));
        }
    }
}
