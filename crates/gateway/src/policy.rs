//! Policies attached to Gateways and routes (`gateway.atoll.dev` TrafficPolicy): what is asked of a request before its rule
//! sees it.
//!
//! `build` reads them, `rate` counts, `token` checks JSON Web Tokens. A policy that cannot be understood, or whose Secret is
//! not there, lets nothing through: it was meant to keep something out.

mod backend;
mod build;
mod rate;
mod token;

pub use backend::Backends;
pub use build::{Attached, Limiters};

use crate::cache::Cache;
use crate::compress::Compression;
use crate::counters::Counters;
use crate::peer::Peer;
use crate::reply::{self, ReplyBody};
use base64::Engine;
use http::header::{AUTHORIZATION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use rate::Limiter;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use token::Tokens;

type Hash = [u8; 32];
type Refusal = Box<Response<ReplyBody>>;

#[derive(Debug)]
pub struct Policy {
    /// `namespace/name`.
    name: Arc<str>,
    allow: Vec<Network>,
    deny: Vec<Network>,
    pub max_body: Option<u64>,
    /// Header lines of a request.
    max_headers: Option<usize>,
    /// Bytes of all of them.
    max_header_bytes: Option<usize>,
    pub compression: Option<Compression>,
    pub cache: Option<Arc<Cache>>,
    limits: Vec<Limit>,
    keys: Option<Keys>,
    basic: Option<Basic>,
    tokens: Option<Tokens>,
    /// Why it cannot be applied.
    broken: Option<String>,
}

/// An address and how many of its bits count.
#[derive(Debug)]
struct Network(u128, u32);

#[derive(Debug)]
struct Limit {
    by: By,
    limiter: Arc<Limiter>,
}

#[derive(Debug)]
enum By {
    Client,
    Header(HeaderName),
    Route,
}

/// Clients by the hash of their key: what is looked up leaks nothing by the time it takes.
#[derive(Debug)]
struct Keys {
    header: HeaderName,
    clients: HashMap<Hash, String>,
}

/// Users by the hash of `name:password`.
#[derive(Debug)]
struct Basic {
    challenge: HeaderValue,
    users: HashMap<Hash, String>,
}

/// What a request is changed by once it was let through.
#[derive(Debug, Default)]
pub struct Grant {
    pub remove: Vec<HeaderName>,
    pub set: Vec<(HeaderName, HeaderValue)>,
}

impl Grant {
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty()
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
    }
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// As a number in which IPv4 is a part of IPv6.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

impl Network {
    fn contains(&self, address: u128) -> bool {
        let mask = if self.1 == 0 { 0 } else { u128::MAX << (128 - self.1.min(128)) };
        (self.0 ^ address) & mask == 0
    }
}

fn refuse(status: StatusCode, text: &str) -> Refusal {
    Box::new(reply::text(status, text))
}

fn challenge(challenge: HeaderValue, text: &str) -> Refusal {
    let mut refusal = refuse(StatusCode::UNAUTHORIZED, text);
    refusal.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    refusal
}

impl Policy {
    /// Lets a request for a route through, or answers it. `now` is Unix seconds.
    pub fn check(
        &self,
        peer: &Peer,
        parts: &Parts,
        route: &str,
        now: u64,
        counters: &Counters,
        grant: &mut Grant,
    ) -> Result<(), Refusal> {
        let checked = self.checked(peer, parts, route, now, grant);
        if let Err(refusal) = &checked {
            let counter = match refusal.status() {
                StatusCode::TOO_MANY_REQUESTS => &counters.rate_limited_total,
                _ => &counters.denied_total,
            };
            Counters::add(counter);
        }
        checked
    }

    fn checked(&self, peer: &Peer, parts: &Parts, route: &str, now: u64, grant: &mut Grant) -> Result<(), Refusal> {
        if let Some(why) = &self.broken {
            tracing::debug!(policy = %self.name, "answered 500: {why}");
            return Err(refuse(StatusCode::INTERNAL_SERVER_ERROR, "a policy of the route cannot be applied"));
        }
        let address = number(peer.client.ip());
        let within = |list: &[Network]| list.iter().any(|network| network.contains(address));
        if within(&self.deny) || !(self.allow.is_empty() || within(&self.allow)) {
            return Err(refuse(StatusCode::FORBIDDEN, "requests from this address are not served"));
        }
        let bytes = |headers: &HeaderMap| headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum::<usize>();
        if self.max_headers.is_some_and(|most| parts.headers.len() > most)
            || self.max_header_bytes.is_some_and(|most| bytes(&parts.headers) > most)
        {
            let text = "the request's headers are too many or too long";
            return Err(refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, text));
        }
        let length = parts.headers.get(http::header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
        if self.max_body.is_some_and(|most| length.is_some_and(|length| length > most)) {
            return Err(refuse(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too large"));
        }
        for limit in &self.limits {
            limit.check(peer, parts, route)?;
        }
        if let Some(keys) = &self.keys {
            keys.check(parts, grant)?;
        }
        if let Some(basic) = &self.basic {
            basic.check(parts, grant)?;
        }
        match &self.tokens {
            Some(tokens) => tokens.check(parts, now, grant),
            None => Ok(()),
        }
    }
}

impl Limit {
    fn check(&self, peer: &Peer, parts: &Parts, route: &str) -> Result<(), Refusal> {
        let wait = match &self.by {
            By::Route => self.limiter.take(&route),
            By::Header(name) => self.limiter.take(&parts.headers.get(name).map(HeaderValue::as_bytes)),
            // A client has at least a /64 of IPv6 addresses.
            By::Client => match peer.client.ip() {
                IpAddr::V4(address) => self.limiter.take(&address.octets()),
                IpAddr::V6(address) => self.limiter.take(&address.octets().get(..8)),
            },
        };
        let Err(wait) = wait else { return Ok(()) };
        let mut refusal = refuse(StatusCode::TOO_MANY_REQUESTS, "too many requests; try again later");
        let seconds = (wait + Duration::from_millis(999)).as_secs().max(1);
        refusal.headers_mut().insert(RETRY_AFTER, seconds.into());
        Err(refusal)
    }
}

/// Who was let in, for endpoints; never what a client says of itself.
const CONSUMER: HeaderName = HeaderName::from_static("x-atoll-consumer");

fn consumer(name: &str, grant: &mut Grant) {
    grant.remove.push(CONSUMER);
    if let Ok(value) = HeaderValue::from_str(name) {
        grant.set.push((CONSUMER, value));
    }
}

impl Keys {
    fn check(&self, parts: &Parts, grant: &mut Grant) -> Result<(), Refusal> {
        let key = parts.headers.get(&self.header).map(HeaderValue::as_bytes);
        let client = key.and_then(|key| self.clients.get(&hash(&[key])));
        let Some(client) = client else {
            let text = format!("a key is needed in the header {}", self.header);
            return Err(refuse(StatusCode::UNAUTHORIZED, &text));
        };
        grant.remove.push(self.header.clone());
        consumer(client, grant);
        Ok(())
    }
}

impl Basic {
    fn check(&self, parts: &Parts, grant: &mut Grant) -> Result<(), Refusal> {
        let credentials = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let credentials = credentials
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
            .and_then(|(_, text)| base64::engine::general_purpose::STANDARD.decode(text.trim()).ok());
        let user = credentials.and_then(|text| self.users.get(&hash(&[&text])));
        let Some(user) = user else {
            return Err(challenge(self.challenge.clone(), "name and password are needed"));
        };
        grant.remove.push(AUTHORIZATION);
        consumer(user, grant);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn networks_of_both_families() {
        let network = |text: &str, bits: u32| Network(number(text.parse().unwrap()), bits);
        let within = |n: &Network, text: &str| n.contains(number(text.parse().unwrap()));
        let ten = network("10.0.0.0", 96 + 8);
        assert!(within(&ten, "10.255.0.1") && !within(&ten, "11.0.0.1") && !within(&ten, "::1"));
        let all = network("0.0.0.0", 96);
        assert!(within(&all, "1.2.3.4") && !within(&all, "2001:db8::1"));
        assert!(within(&network("::", 0), "1.2.3.4"));
        assert!(within(&network("2001:db8::", 32), "2001:db8:1::1"));
    }

    proptest! {
        #[test]
        fn a_network_is_its_first_bits(address: u128, other: u128, bits in 0u32..129) {
            let same = bits == 0 || address >> (128 - bits) == other >> (128 - bits);
            prop_assert_eq!(Network(address, bits).contains(other), same);
        }
    }
}
