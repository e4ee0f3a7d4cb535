//! What every request needs: the store, the kinds served now, the running watches.

use crate::admission::time_to_live;
use crate::auth::TokenIssuer;
use crate::kinds::Kinds;
use crate::ranges::ServiceRanges;
use crate::rest::storage::{Storage, status_of};
use crate::watch::Feeds;
use api::inspect::Inspect;
use api::kind::{Kind, Scope};
use api::metrics::Source;
use api::status::{Reason, Status, StatusResult};
use api::streams::PodStreams;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use store::Store;

pub struct Core {
    pub storage: Storage,
    pub kinds: Kinds,
    pub feeds: Feeds,
    pub services: ServiceRanges,
    pub tokens: TokenIssuer,
    streams: RwLock<Option<Arc<dyn PodStreams>>>,
    metrics: std::sync::OnceLock<Arc<dyn Source>>,
    inspect: std::sync::OnceLock<Arc<dyn Inspect>>,
    expiry: tokio::sync::Mutex<Option<Expiry>>,
}

/// The lease that objects written now share.
#[derive(Clone, Copy)]
struct Expiry {
    lease: store::LeaseId,
    granted: Instant,
}

/// Objects written in this time share a lease: they expire that much later than they need to.
const SHARE_LEASE: Duration = Duration::from_secs(300);

impl Core {
    pub fn new(store: Arc<dyn Store>, kinds: Kinds, services: ServiceRanges, tokens: TokenIssuer) -> Self {
        Core {
            feeds: Feeds::new(store.clone()),
            storage: Storage { store },
            kinds,
            services,
            tokens,
            streams: RwLock::new(None),
            metrics: std::sync::OnceLock::new(),
            inspect: std::sync::OnceLock::new(),
            expiry: tokio::sync::Mutex::new(None),
        }
    }

    pub fn set_streams(&self, streams: Arc<dyn PodStreams>) {
        *self.streams.write().unwrap_or_else(|e| e.into_inner()) = Some(streams);
    }

    /// Only the first counts.
    pub fn set_metrics(&self, source: Arc<dyn Source>) {
        let _ = self.metrics.set(source);
    }

    /// Only the first counts.
    pub fn set_inspect(&self, inspect: Arc<dyn Inspect>) {
        let _ = self.inspect.set(inspect);
    }

    pub fn inspect(&self) -> StatusResult<&Arc<dyn Inspect>> {
        self.inspect.get().ok_or_else(no_node)
    }

    pub fn metrics(&self) -> Option<&Arc<dyn Source>> {
        self.metrics.get()
    }

    /// The lease an object of this kind is written with; 0 = it stays until it is deleted.
    pub async fn lease_for(&self, kind: &Kind) -> StatusResult<store::LeaseId> {
        let Some(life) = time_to_live(kind) else { return Ok(0) };
        let mut expiry = self.expiry.lock().await;
        if let Some(known) = *expiry
            && known.granted.elapsed() < SHARE_LEASE
        {
            return Ok(known.lease);
        }
        let lease = self.storage.store.lease_grant(life + SHARE_LEASE).await.map_err(status_of)?;
        *expiry = Some(Expiry { lease, granted: Instant::now() });
        Ok(lease)
    }

    pub fn streams(&self) -> StatusResult<Arc<dyn PodStreams>> {
        let streams = self.streams.read().unwrap_or_else(|e| e.into_inner()).clone();
        streams.ok_or_else(no_node)
    }
}

fn no_node() -> Status {
    Status::new(Reason::ServiceUnavailable, "no node is connected to this API server yet")
}

/// An object, or where one will be. `name` is empty for collections and before `generateName` was used.
#[derive(Clone)]
pub struct Target {
    pub kind: Arc<Kind>,
    /// Empty for cluster-scoped kinds and for all namespaces.
    pub namespace: String,
    pub name: String,
}

impl Target {
    pub fn new(kind: &Arc<Kind>, namespace: &str, name: &str) -> Self {
        let namespace = if kind.scope == Scope::Cluster { "" } else { namespace };
        Target { kind: kind.clone(), namespace: namespace.to_owned(), name: name.to_owned() }
    }
    pub fn not_found(&self) -> Status {
        crate::rest::storage::not_found(&self.kind, &self.name)
    }
    pub fn conflict(&self, why: &str) -> Status {
        let resource = &self.kind.resource;
        Status::conflict(&resource.group, &resource.plural, &self.name, why)
    }
    pub fn invalid(&self, causes: Vec<api::status::Cause>) -> Status {
        Status::invalid(&self.kind.resource.group, &self.kind.kind, &self.name, causes)
    }
    /// `plural.group "name" is forbidden: why`.
    pub fn forbidden(&self, why: &str) -> Status {
        let resource = &self.kind.resource;
        let dot = if resource.group.is_empty() { "" } else { "." };
        let text = format!("{}{dot}{} \"{}\" is forbidden: {why}", resource.plural, resource.group, self.name);
        Status::new(Reason::Forbidden, text).about(&resource.group, &resource.plural, &self.name)
    }
    /// The kind of a built-in resource, for code that needs one by name.
    pub fn is(&self, group: &str, plural: &str) -> bool {
        *self.kind.resource.group == *group && *self.kind.resource.plural == *plural
    }
}
