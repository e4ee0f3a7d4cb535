//! TrafficPolicies as they are written, and what they are attached to.

use super::rate::Limiter;
use super::token::Tokens;
use super::{Basic, By, Keys, Limit, Network, Policy, hash, number};
use crate::cache::{self, Budget, Cache};
use crate::compress::Compression;
use crate::routing::rules::duration;
use crate::routing::{Objects, spec};
use api::object::{Meta, SharedObject};
use base64::Engine;
use http::{HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PolicySpec {
    target_refs: Vec<TargetRef>,
    addresses: Addresses,
    max_headers: Option<usize>,
    max_header_bytes: Option<usize>,
    max_body_bytes: Option<u64>,
    rate_limits: Vec<LimitSpec>,
    api_keys: Option<KeySpec>,
    basic_auth: Option<BasicSpec>,
    jwt: Option<TokenSpec>,
    compression: Option<CompressionSpec>,
    cache: Option<CacheSpec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CacheSpec {
    max_bytes: Option<usize>,
    max_object_bytes: Option<usize>,
    key_headers: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CompressionSpec {
    types: Vec<String>,
    min_bytes: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TargetRef {
    kind: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Addresses {
    allow: Vec<String>,
    deny: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LimitSpec {
    requests: u32,
    period: Option<String>,
    burst: Option<u32>,
    by: Option<String>,
    header: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Named {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KeySpec {
    secret_ref: Named,
    header: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct BasicSpec {
    secret_ref: Named,
    realm: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TokenSpec {
    issuer: String,
    audiences: Vec<String>,
    jwks: String,
    claims_to_headers: Vec<ClaimSpec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ClaimSpec {
    claim: String,
    header: String,
}

/// Buckets and stored answers outlive the table: a route that changes does not give anyone a fresh start.
pub struct Limiters {
    all: HashMap<String, (Arc<Limiter>, bool)>,
    caches: HashMap<String, (Arc<Cache>, bool)>,
    budget: Budget,
}

impl Default for Limiters {
    fn default() -> Self {
        Limiters { all: HashMap::new(), caches: HashMap::new(), budget: Budget::new(cache::ALL) }
    }
}

impl Limiters {
    fn cache(&mut self, policy: &SharedObject, spec: &CacheSpec) -> Result<Arc<Cache>, String> {
        let headers = spec.key_headers.iter().map(|name| header(name)).collect::<Result<_, _>>()?;
        let budget = self.budget.clone();
        let fresh = || (Arc::new(Cache::new(spec.max_bytes, spec.max_object_bytes, headers, budget)), true);
        let entry = self.caches.entry(format!("{} {spec:?}", policy.uid())).or_insert_with(fresh);
        entry.1 = true;
        Ok(entry.0.clone())
    }

    fn of(&mut self, policy: &SharedObject, index: usize, made: (u32, Duration, u32)) -> Arc<Limiter> {
        let key = format!("{} {index} {made:?}", policy.uid());
        let fresh = || (Arc::new(Limiter::new(made.0, made.1, made.2)), true);
        let entry = self.all.entry(key).or_insert_with(fresh);
        entry.1 = true;
        entry.0.clone()
    }

    fn tidy(&mut self) {
        self.all.retain(|_, (_, used)| std::mem::replace(used, false));
        self.caches.retain(|_, (_, used)| std::mem::replace(used, false));
    }
}

/// Policies by kind, namespace and name of what they are attached to; the oldest first.
#[derive(Default)]
pub struct Attached {
    by_target: HashMap<(String, String, String), Vec<Arc<Policy>>>,
}

impl Attached {
    pub fn read(objects: &Objects, limiters: &mut Limiters) -> Attached {
        let mut sorted: Vec<&SharedObject> = objects.policies.iter().filter(|policy| !policy.is_deleting()).collect();
        sorted.sort_by_key(|p| (p.str_at("/metadata/creationTimestamp").to_owned(), p.namespace(), p.name()));
        let mut attached = Attached::default();
        for object in sorted {
            let Some(spec) = spec::<PolicySpec>(object) else { continue };
            let policy = Arc::new(policy(object, &spec, objects, limiters));
            for target in spec.target_refs {
                let key = (target.kind, object.namespace().to_owned(), target.name);
                attached.by_target.entry(key).or_default().push(policy.clone());
            }
        }
        limiters.tidy();
        attached
    }

    pub fn of(&self, kind: &str, namespace: &str, name: &str) -> &[Arc<Policy>] {
        if self.by_target.is_empty() {
            return &[];
        }
        let key = (kind.to_owned(), namespace.to_owned(), name.to_owned());
        self.by_target.get(&key).map(Vec::as_slice).unwrap_or_default()
    }
}

fn policy(object: &SharedObject, spec: &PolicySpec, objects: &Objects, limiters: &mut Limiters) -> Policy {
    let mut broken = None;
    let mut policy = Policy {
        name: format!("{}/{}", object.namespace(), object.name()).into(),
        allow: networks(&spec.addresses.allow, &mut broken),
        deny: networks(&spec.addresses.deny, &mut broken),
        max_body: spec.max_body_bytes,
        max_headers: spec.max_headers,
        max_header_bytes: spec.max_header_bytes,
        compression: spec.compression.as_ref().map(|spec| Compression::new(&spec.types, spec.min_bytes)),
        limits: Vec::new(),
        keys: None,
        basic: None,
        tokens: None,
        cache: None,
        broken: None,
    };
    for (index, limit) in spec.rate_limits.iter().enumerate() {
        match self::limit(object, index, limit, limiters) {
            Ok(limit) => policy.limits.push(limit),
            Err(why) => broken = broken.or(Some(why)),
        }
    }
    let mut keep = |result: Result<(), String>| broken = broken.take().or(result.err());
    if let Some(spec) = &spec.cache {
        keep(limiters.cache(object, spec).map(|cache| policy.cache = Some(cache)));
    }
    if let Some(spec) = &spec.api_keys {
        keep(keys(object, spec, objects).map(|keys| policy.keys = Some(keys)));
    }
    if let Some(spec) = &spec.basic_auth {
        keep(basic(object, spec, objects).map(|basic| policy.basic = Some(basic)));
    }
    if let Some(spec) = &spec.jwt {
        keep(tokens(spec).map(|tokens| policy.tokens = Some(tokens)));
    }
    if let Some(why) = &broken {
        tracing::warn!(policy = %policy.name, "lets nothing through: {why}");
    }
    policy.broken = broken;
    policy
}

fn networks(texts: &[String], broken: &mut Option<String>) -> Vec<Network> {
    let read = |text: &String| {
        let (address, bits) = text.split_once('/').map_or((text.as_str(), None), |(a, b)| (a, Some(b)));
        let address: IpAddr = address.parse().ok()?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits: u32 = bits.map_or(Some(width), |bits| bits.parse().ok()).filter(|bits| *bits <= width)?;
        Some(Network(number(address), 128 - width + bits))
    };
    let mut all = Vec::new();
    for text in texts {
        match read(text) {
            Some(network) => all.push(network),
            None => *broken = Some(format!("addresses: {text:?} is not a network")),
        }
    }
    all
}

fn limit(object: &SharedObject, index: usize, spec: &LimitSpec, limiters: &mut Limiters) -> Result<Limit, String> {
    let period = duration(spec.period.as_deref().unwrap_or("1s")).filter(|period| !period.is_zero());
    let period = period.ok_or_else(|| format!("rateLimits[{index}].period {:?} is not a duration", spec.period))?;
    let by = match (spec.by.as_deref().unwrap_or("Client"), &spec.header) {
        ("Client", _) => By::Client,
        ("Route", _) => By::Route,
        ("Header", Some(name)) => By::Header(header(name)?),
        (other, _) => return Err(format!("rateLimits[{index}].by {other:?} is not known or lacks its header")),
    };
    let made = (spec.requests, period, spec.burst.unwrap_or(spec.requests));
    Ok(Limit { by, limiter: limiters.of(object, index, made) })
}

pub(super) fn header(name: &str) -> Result<HeaderName, String> {
    name.parse().map_err(|_| format!("header name {name:?} is not valid"))
}

/// Names and values of a Secret beside the policy.
fn secret(object: &SharedObject, name: &str, objects: &Objects) -> Result<Vec<(String, Vec<u8>)>, String> {
    let namespace = object.namespace();
    let found = objects.secrets.iter().find(|secret| secret.namespace() == namespace && secret.name() == name);
    let found = found.ok_or_else(|| format!("there is no secret {namespace}/{name}"))?;
    let mut all = Vec::new();
    for (key, value) in found.get("data").and_then(Value::as_object).into_iter().flatten() {
        let bytes = value.as_str().and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok());
        let bytes = bytes.ok_or_else(|| format!("secret {namespace}/{name}: {key:?} is not base64"))?;
        // An empty key would let in whoever sends nothing.
        if bytes.is_empty() {
            return Err(format!("secret {namespace}/{name}: {key:?} is empty"));
        }
        all.push((key.clone(), bytes));
    }
    Ok(all)
}

fn keys(object: &SharedObject, spec: &KeySpec, objects: &Objects) -> Result<Keys, String> {
    let clients = secret(object, &spec.secret_ref.name, objects)?;
    let clients = clients.into_iter().map(|(name, key)| (hash(&[&key]), name)).collect();
    Ok(Keys { header: header(spec.header.as_deref().unwrap_or("x-api-key"))?, clients })
}

fn basic(object: &SharedObject, spec: &BasicSpec, objects: &Objects) -> Result<Basic, String> {
    let users = secret(object, &spec.secret_ref.name, objects)?;
    let users = users.into_iter().map(|(name, password)| (hash(&[name.as_bytes(), b":", &password]), name)).collect();
    let realm = spec.realm.as_deref().unwrap_or("atoll").replace(['"', '\\'], "");
    let challenge = HeaderValue::try_from(format!("Basic realm=\"{realm}\", charset=\"UTF-8\""));
    Ok(Basic { challenge: challenge.map_err(|_| format!("realm {realm:?} cannot be a header"))?, users })
}

fn tokens(spec: &TokenSpec) -> Result<Tokens, String> {
    let claims = spec.claims_to_headers.iter().map(|claim| Ok((claim.claim.clone(), header(&claim.header)?)));
    Tokens::new(&spec.issuer, spec.audiences.clone(), claims.collect::<Result<_, String>>()?, &spec.jwks)
}
