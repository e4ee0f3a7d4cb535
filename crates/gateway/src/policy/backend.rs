//! BackendPolicies as they are written: how the requests for a Service are spread over its endpoints.

use crate::routing::rules::duration;
use crate::routing::{Objects, spec};
use crate::upstream::{Algorithm, HashBy, ProxyVersion, Rules};
use api::object::{Meta, SharedObject};
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct BackendSpec {
    target_refs: Vec<Target>,
    balancing: Option<BalancingSpec>,
    slow_start: Option<String>,
    limits: LimitsSpec,
    proxy_protocol: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Target {
    kind: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BalancingSpec {
    algorithm: String,
    hash: HashSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HashSpec {
    by: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LimitsSpec {
    requests: Option<usize>,
    connections: Option<usize>,
    pending: usize,
}

/// Rules by namespace and name of the Service.
#[derive(Debug, Default)]
pub struct Backends {
    by_service: HashMap<(String, String), Arc<Rules>>,
    none: Arc<Rules>,
}

impl Backends {
    /// Of two policies for a Service the older one counts.
    pub fn read(objects: &Objects) -> Backends {
        let mut sorted: Vec<&SharedObject> =
            objects.backend_policies.iter().filter(|policy| !policy.is_deleting()).collect();
        sorted.sort_by_key(|p| (p.str_at("/metadata/creationTimestamp").to_owned(), p.namespace(), p.name()));
        let mut backends = Backends::default();
        for object in sorted {
            let Some(spec) = spec::<BackendSpec>(object) else { continue };
            let rules = match rules(&spec) {
                Ok(rules) => Arc::new(rules),
                Err(why) => {
                    tracing::warn!(policy = %format_args!("{}/{}", object.namespace(), object.name()), "not used: {why}");
                    continue;
                }
            };
            for target in spec.target_refs.into_iter().filter(|target| target.kind == "Service") {
                let key = (object.namespace().to_owned(), target.name);
                backends.by_service.entry(key).or_insert_with(|| rules.clone());
            }
        }
        backends
    }

    pub fn of(&self, namespace: &str, service: &str) -> &Arc<Rules> {
        if self.by_service.is_empty() {
            return &self.none;
        }
        self.by_service.get(&(namespace.to_owned(), service.to_owned())).unwrap_or(&self.none)
    }
}

fn rules(spec: &BackendSpec) -> Result<Rules, String> {
    let algorithm = match &spec.balancing {
        None => Algorithm::LeastRequest,
        Some(balancing) => match (balancing.algorithm.as_str(), balancing.hash.by.as_str()) {
            ("LeastRequest", _) => Algorithm::LeastRequest,
            ("RoundRobin", _) => Algorithm::RoundRobin,
            ("Hash", "Client") => Algorithm::Hash(HashBy::Client),
            ("Hash", "Header") => Algorithm::Hash(HashBy::Header(super::build::header(&balancing.hash.name)?)),
            ("Hash", "Cookie") => Algorithm::Hash(HashBy::Cookie(balancing.hash.name.clone())),
            (algorithm, by) => return Err(format!("balancing.algorithm {algorithm:?} by {by:?} is not known")),
        },
    };
    let slow_start = match spec.slow_start.as_deref().map(duration) {
        None => Duration::ZERO,
        Some(Some(time)) => time,
        Some(None) => return Err(format!("slowStart {:?} is not a duration", spec.slow_start)),
    };
    let proxy_protocol = match spec.proxy_protocol.as_deref() {
        None => None,
        Some("V1") => Some(ProxyVersion::V1),
        Some("V2") => Some(ProxyVersion::V2),
        Some(other) => return Err(format!("proxyProtocol {other:?} is not known")),
    };
    Ok(Rules {
        algorithm,
        slow_start,
        max_requests: spec.limits.requests,
        max_connections: spec.limits.connections,
        max_pending: spec.limits.pending,
        proxy_protocol,
    })
}
