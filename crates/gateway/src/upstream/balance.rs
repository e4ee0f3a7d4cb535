//! How requests are spread over the endpoints of a Service, and how much each of them is asked at a time.

use super::endpoint::Endpoint;
use http::header::COOKIE;
use http::{HeaderMap, HeaderName};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// The share of requests that an endpoint gets at the beginning of its slow start, of 256.
const FIRST_SHARE: u64 = 26;

/// What a BackendPolicy asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub algorithm: Algorithm,
    /// Time over which a new endpoint comes to its full share; not where requests have an endpoint of their own.
    pub slow_start: Duration,
    /// Requests under way at one endpoint.
    pub max_requests: Option<usize>,
    /// Connections to one endpoint that requests are under way on.
    pub max_connections: Option<usize>,
    /// Requests that may wait for room; further ones are refused.
    pub max_pending: usize,
    /// Connections begin with a PROXY protocol header, and serve one request.
    pub proxy_protocol: Option<ProxyVersion>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// The better of two random endpoints.
    #[default]
    LeastRequest,
    RoundRobin,
    /// Requests with the same key go to the same endpoint, as long as that is there.
    Hash(HashBy),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashBy {
    Client,
    Header(HeaderName),
    Cookie(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    V1,
    V2,
}

/// What came of looking for an endpoint.
#[derive(Debug)]
pub enum Picked {
    Endpoint(Arc<Endpoint>),
    /// All are at their limit.
    Full,
    /// There is none.
    Nobody,
}

impl Picked {
    pub fn endpoint(self) -> Option<Arc<Endpoint>> {
        match self {
            Picked::Endpoint(endpoint) => Some(endpoint),
            Picked::Full | Picked::Nobody => None,
        }
    }
}

impl Rules {
    /// Requests under way at one endpoint at most. In HTTP/1.1 each has a connection of its own.
    pub fn most(&self, http2: bool) -> usize {
        let connections = self.max_connections.filter(|_| !http2);
        self.max_requests.into_iter().chain(connections).min().unwrap_or(usize::MAX)
    }

    /// What a request has in common with those that are to go the same way. One without the header or cookie goes any way.
    pub fn key(&self, client: IpAddr, headers: &HeaderMap) -> Option<u64> {
        let Algorithm::Hash(by) = &self.algorithm else { return None };
        Some(match by {
            HashBy::Client => number(&client),
            HashBy::Header(name) => number(headers.get(name)?.as_bytes()),
            HashBy::Cookie(name) => {
                let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
                let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
                number(pairs.find(|(known, _)| known == name)?.1.as_bytes())
            }
        })
    }
}

/// FNV-1a with a last stir: the same in every process.
fn number(what: &(impl Hash + ?Sized)) -> u64 {
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        fn finish(&self) -> u64 {
            stir(self.0)
        }
    }
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    what.hash(&mut hasher);
    hasher.finish()
}

/// The end of MurmurHash3: every bit of the outcome hangs on every bit.
fn stir(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Picks among `endpoints`; `avoid` and ejected ones only if there is no other.
pub fn pick(
    endpoints: &[Arc<Endpoint>],
    (rules, most): (&Rules, usize),
    turn: &AtomicUsize,
    (random, key): (u64, Option<u64>),
    avoid: Option<&Arc<Endpoint>>,
) -> Picked {
    let other = |e: &Arc<Endpoint>| avoid.is_none_or(|avoid| !Arc::ptr_eq(e, avoid));
    let room = |e: &Arc<Endpoint>| e.active() < most;
    let good = |e: &Arc<Endpoint>| room(e) && other(e) && !e.is_ejected();
    let chosen = match (endpoints, &rules.algorithm, key) {
        ([], _, _) => return Picked::Nobody,
        ([only], _, _) => Some(only).filter(|only| room(only)),
        (_, Algorithm::Hash(_), Some(key)) => by_key(endpoints, key, good),
        (_, Algorithm::RoundRobin, _) => in_turn(endpoints, turn, |e| good(e) && is_warm(e, rules, random))
            .or_else(|| in_turn(endpoints, turn, good)),
        _ => least(endpoints, random, rules, good),
    };
    let around = |fine: &dyn Fn(&Arc<Endpoint>) -> bool| {
        let start = (random % endpoints.len().max(1) as u64) as usize;
        endpoints.iter().cycle().skip(start).take(endpoints.len()).find(|e| fine(e))
    };
    let chosen =
        chosen.or_else(|| around(&good)).or_else(|| around(&|e| room(e) && other(e))).or_else(|| around(&room));
    chosen.map_or(Picked::Full, |endpoint| Picked::Endpoint(endpoint.clone()))
}

/// The highest of the scores that key and endpoint have together (rendezvous hashing): when an endpoint goes, only its own
/// keys move, and each of them to its second best; there is no table to make or to keep.
fn by_key(endpoints: &[Arc<Endpoint>], key: u64, good: impl Fn(&Arc<Endpoint>) -> bool) -> Option<&Arc<Endpoint>> {
    endpoints.iter().filter(|e| good(e)).max_by_key(|e| stir(e.id ^ key))
}

fn in_turn<'e>(
    endpoints: &'e [Arc<Endpoint>],
    turn: &AtomicUsize,
    good: impl Fn(&Arc<Endpoint>) -> bool,
) -> Option<&'e Arc<Endpoint>> {
    let turn = || endpoints.get(turn.fetch_add(1, Relaxed) % endpoints.len().max(1));
    endpoints.iter().filter_map(|_| turn()).find(|e| good(e))
}

/// The one of two random endpoints with fewer requests under way.
fn least<'e>(
    endpoints: &'e [Arc<Endpoint>],
    random: u64,
    rules: &Rules,
    good: impl Fn(&Arc<Endpoint>) -> bool,
) -> Option<&'e Arc<Endpoint>> {
    let count = endpoints.len() as u64;
    let first = endpoints.get((random % count.max(1)) as usize)?;
    let step = 1 + (random >> 32) % count.saturating_sub(1).max(1);
    let second = endpoints.get(((random + step) % count) as usize)?;
    match (good(first), good(second)) {
        (true, true) => {
            let (better, worse) = if second.active() < first.active() { (second, first) } else { (first, second) };
            Some(if is_warm(better, rules, random) { better } else { worse })
        }
        (true, false) => Some(first),
        (false, true) => Some(second),
        (false, false) => None,
    }
}

/// Whether an endpoint has been there for long enough for this request.
fn is_warm(endpoint: &Endpoint, rules: &Rules, random: u64) -> bool {
    if rules.slow_start.is_zero() {
        return true;
    }
    let (age, whole) = (endpoint.age().as_millis() as u64, rules.slow_start.as_millis().max(1) as u64);
    let share = FIRST_SHARE + age.min(whole) * (256 - FIRST_SHARE) / whole;
    // Bits that chose none of the two.
    (random >> 24) & 0xff < share
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::SocketAddr;

    fn endpoints(count: u8) -> Vec<Arc<Endpoint>> {
        let make = |n: u8| {
            let address: SocketAddr = ([127, 0, 0, n], 80).into();
            let id = super::super::fingerprint(&[&address.to_string()]);
            Arc::new(Endpoint::new(address, id, Arc::default(), Arc::default()))
        };
        (0..count).map(make).collect()
    }

    fn picked(endpoints: &[Arc<Endpoint>], rules: &Rules, turn: &AtomicUsize, random: u64, key: Option<u64>) -> u64 {
        pick(endpoints, (rules, usize::MAX), turn, (random, key), None).endpoint().unwrap().id
    }

    fn hash() -> Rules {
        Rules { algorithm: Algorithm::Hash(HashBy::Client), ..Rules::default() }
    }

    #[test]
    fn everybody_gets_a_turn() {
        let (all, turn) = (endpoints(3), AtomicUsize::new(0));
        let rules = Rules { algorithm: Algorithm::RoundRobin, ..Rules::default() };
        let ids: Vec<u64> = (0..9).map(|random| picked(&all, &rules, &turn, random, None)).collect();
        assert_eq!(ids[..3], ids[3..6]);
        assert!(all.iter().all(|endpoint| ids[..3].contains(&endpoint.id)));
    }

    #[test]
    fn keys_move_only_when_their_endpoint_goes() {
        let (all, turn) = (endpoints(10), AtomicUsize::new(0));
        let fewer: Vec<_> = all[1..].to_vec();
        let mut counts = [0; 10];
        for key in (0..10_000u64).map(stir) {
            let before = picked(&all, &hash(), &turn, 0, Some(key));
            let at = all.iter().position(|endpoint| endpoint.id == before).unwrap();
            counts[at] += 1;
            if at != 0 {
                assert_eq!(picked(&fewer, &hash(), &turn, 7, Some(key)), before);
            }
        }
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn keys_of_requests() {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", "ann".parse().unwrap());
        headers.append(COOKIE, "a=b; cart=7".parse().unwrap());
        let key = |by: HashBy| {
            Rules { algorithm: Algorithm::Hash(by), ..Rules::default() }.key([10, 0, 0, 1].into(), &headers)
        };
        assert!(key(HashBy::Client).is_some());
        assert_eq!(key(HashBy::Header("x-user".parse().unwrap())), Some(number(&b"ann"[..])));
        assert_eq!(key(HashBy::Cookie("cart".into())), Some(number(&b"7"[..])));
        assert_eq!(key(HashBy::Cookie("c".into())), None);
        assert_eq!(Rules::default().key([10, 0, 0, 1].into(), &headers), None);
    }

    #[test]
    fn who_is_new_gets_little_at_first() {
        let all = endpoints(2);
        let rules = Rules { slow_start: Duration::from_secs(3600), ..Rules::default() };
        let warm = (0..256u64).filter(|n| is_warm(&all[0], &rules, n << 24)).count() as u64;
        assert_eq!(warm, FIRST_SHARE);
        assert!(is_warm(&all[0], &Rules::default(), u64::MAX));
    }

    proptest! {
        #[test]
        fn whoever_is_picked_has_room(count in 1u8..6, busy in 0usize..7, random: u64, key: Option<u64>, which in 0u8..3) {
            let (all, turn) = (endpoints(count), AtomicUsize::new(random as usize));
            let algorithm = match which {
                0 => Algorithm::LeastRequest,
                1 => Algorithm::RoundRobin,
                _ => Algorithm::Hash(HashBy::Client),
            };
            let rules = Rules { algorithm, ..Rules::default() };
            let leases: Vec<_> = all.iter().take(busy).map(|e| super::super::Lease::take(e.clone())).collect();
            match pick(&all, (&rules, 1), &turn, (random, key), all.first()) {
                Picked::Endpoint(endpoint) => prop_assert_eq!(endpoint.active(), 0),
                Picked::Full => prop_assert_eq!(leases.len(), all.len()),
                Picked::Nobody => prop_assert!(false),
            }
        }
    }
}
