//! Keeps the network's policies up to date. One sync at a time; those who ask while one runs share the next.

use super::{Compiled, Member, Policy, compile};
use crate::boundary::SandboxNetwork;
use crate::ports::{Attach, Leased, NetworkError, Networks, Records, ServiceRule};
use api::informer::Informer;
use api::object::{Meta, SharedObject};
use async_trait::async_trait;
use network::Isolation;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Mutex;

const PAUSE: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_secs(2);
/// Everything is looked at again this often.
const RESYNC: Duration = Duration::from_secs(300);

pub(crate) struct Enforcer {
    isolation: Isolation,
    networks: Arc<dyn Networks>,
    policies: Informer,
    namespaces: Informer,
    pods: Informer,
    asked: AtomicU64,
    work: Mutex<Work>,
    current: RwLock<Arc<Compiled>>,
}

#[derive(Default)]
struct Work {
    /// Everything asked up to this has been done.
    done: u64,
    /// Parsed policies by uid, with the version they were read from.
    parsed: HashMap<String, (String, Arc<Policy>)>,
}

impl Enforcer {
    pub fn new(
        isolation: Isolation,
        networks: Arc<dyn Networks>,
        policies: Informer,
        namespaces: Informer,
        pods: Informer,
    ) -> Enforcer {
        Enforcer {
            isolation,
            networks,
            policies,
            namespaces,
            pods,
            asked: AtomicU64::new(0),
            work: Mutex::default(),
            current: RwLock::default(),
        }
    }

    /// What the network enforces now.
    pub fn current(&self) -> Arc<Compiled> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the API until cancelled.
    pub async fn run(self: Arc<Self>) {
        let mut changes = [self.policies.subscribe(), self.namespaces.subscribe(), self.pods.subscribe()];
        loop {
            for changes in &mut changes {
                while changes.try_next().is_some() {}
            }
            let failed = match self.settle().await {
                Ok(()) => false,
                Err(error) => {
                    tracing::warn!("network policies are not up to date, trying again: {error}");
                    true
                }
            };
            let [policies, namespaces, pods] = &mut changes;
            tokio::time::sleep(PAUSE).await;
            tokio::select! {
                _ = policies.next() => {}
                _ = namespaces.next() => {}
                _ = pods.next() => {}
                () = tokio::time::sleep(if failed { RETRY } else { RESYNC }) => {}
            }
        }
    }

    /// Returns once the network enforces what the API says now, for all that is attached now.
    pub async fn settle(&self) -> Result<(), NetworkError> {
        for informer in [&self.policies, &self.namespaces, &self.pods] {
            informer.synced().await;
        }
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut work = self.work.lock().await;
        if work.done >= mine {
            return Ok(());
        }
        let upto = self.asked.load(Ordering::Acquire);
        let leases = self.networks.leases().await;
        let compiled = self.compile(&mut work, &leases);
        self.networks.sync_policies(compiled.clone()).await?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(compiled);
        work.done = upto;
        Ok(())
    }

    fn compile(&self, work: &mut Work, leases: &[Leased]) -> Compiled {
        let objects = self.policies.list();
        let mut parsed = HashMap::with_capacity(objects.len());
        let policies: Vec<Arc<Policy>> = objects
            .iter()
            .map(|object| {
                let version = object.resource_version();
                let known = work.parsed.get(object.uid()).filter(|(known, _)| known == version && !version.is_empty());
                let policy = known.map_or_else(|| Arc::new(Policy::read(object)), |(_, policy)| policy.clone());
                parsed.insert(object.uid().to_owned(), (version.to_owned(), policy.clone()));
                policy
            })
            .collect();
        work.parsed = parsed;
        let namespaces: BTreeMap<String, Value> =
            self.namespaces.list().iter().map(|object| (object.name().to_owned(), labels(object).clone())).collect();
        let addresses: HashMap<&str, Ipv4Addr> = leases.iter().map(|l| (l.uid.as_str(), l.address)).collect();
        let pods = self.pods.list();
        let members: Vec<Member<'_>> = pods
            .iter()
            .filter_map(|pod| {
                Some(Member {
                    namespace: pod.namespace(),
                    name: pod.name(),
                    labels: labels(pod),
                    address: *addresses.get(pod.uid())?,
                    spec: pod.get("spec").unwrap_or(&Value::Null),
                })
            })
            .collect();
        compile(self.isolation, &policies, &namespaces, &members)
    }
}

fn labels(object: &SharedObject) -> &Value {
    object.pointer("/metadata/labels").unwrap_or(&Value::Null)
}

/// A network that lets a pod in only when its policies are in force: a pod whose containers run is never one that they do
/// not know yet.
pub(crate) struct Enforced {
    pub inner: Arc<dyn Networks>,
    pub enforcer: Arc<Enforcer>,
}

#[async_trait]
impl Networks for Enforced {
    async fn attach(&self, request: &Attach) -> Result<SandboxNetwork, NetworkError> {
        let network = self.inner.attach(request).await?;
        self.enforcer.settle().await?;
        Ok(network)
    }
    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        self.inner.detach(uid).await
    }
    async fn sync_services(&self, rules: Vec<ServiceRule>) -> Result<(), NetworkError> {
        self.inner.sync_services(rules).await
    }
    async fn sync_dns(&self, records: Records) -> Result<(), NetworkError> {
        self.inner.sync_dns(records).await
    }
    async fn leases(&self) -> Vec<Leased> {
        self.inner.leases().await
    }
    async fn sync_policies(&self, compiled: Compiled) -> Result<(), NetworkError> {
        self.inner.sync_policies(compiled).await
    }
}
