//! Answers kept for others (RFC 9111), where a policy asks for it: a shared cache in memory, bounded by bytes.
//!
//! `control` is what the RFC says of a request and a response, `store` keeps and finds, `proxy::cached` asks them. What a
//! response may depend on without saying so is the weak place of every such cache: what is stored is found by all that names
//! the resource as the endpoint sees it (scheme, authority, path, query, rule), and whoever sends a header that is not known to
//! be harmless gets an answer that is not kept.

pub mod control;
pub mod store;

pub use store::Budget;

use control::{is_known, varies_by};
use http::{HeaderMap, HeaderName};
use std::sync::Arc;
use store::{Store, value_of};

const DEFAULT_MOST: usize = 64 << 20;
const DEFAULT_MOST_OBJECT: usize = 1 << 20;
/// Bytes that the caches of all policies hold together.
pub const ALL: usize = 256 << 20;

/// The cache of one policy.
#[derive(Debug)]
pub struct Cache {
    pub store: Arc<Store>,
    pub most_object: usize,
    /// Further headers of requests that name the resource.
    headers: Vec<HeaderName>,
}

impl Cache {
    pub fn new(most: Option<usize>, most_object: Option<usize>, headers: Vec<HeaderName>, budget: Budget) -> Cache {
        let most = most.unwrap_or(DEFAULT_MOST);
        let store = Arc::new(Store::new(most, budget));
        Cache { store, most_object: most_object.unwrap_or(DEFAULT_MOST_OBJECT).min(most), headers }
    }

    /// Whether all that these headers may lead the endpoint to is in the key, or in what its answers vary by.
    pub fn knows<'a>(&self, mut names: impl Iterator<Item = &'a HeaderName>) -> bool {
        names.all(|name| is_known(name) || self.headers.contains(name))
    }

    /// The headers of a request that an answer depends on, with their values; `None` if it can be given to nobody else.
    pub fn vary(&self, answer: &HeaderMap, asked: &HeaderMap) -> Option<Vec<(HeaderName, Vec<u8>)>> {
        let mut names = varies_by(answer)?;
        names.extend(self.headers.iter().cloned());
        Some(names.into_iter().map(|name| (value_of(asked, &name), name)).map(|(value, name)| (name, value)).collect())
    }
}

/// What a target is found by.
pub fn key(secure: bool, authority: &str, path: &str, query: Option<&str>) -> String {
    let scheme = if secure { "https" } else { "http" };
    let mut key = format!("{scheme}://{}{path}", authority.to_ascii_lowercase());
    if let Some(query) = query {
        key.push('?');
        key.push_str(query);
    }
    key
}
