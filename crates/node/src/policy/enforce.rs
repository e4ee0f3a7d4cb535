//! Keeps the network's policies up to date. One sync at a time; those who ask while one runs share the next.

use super::{AdminPolicy, Compiled, EgressPolicy, Member, Node, Policy, World, compile};
use crate::boundary::SandboxNetwork;
use crate::ports::{Attach, Bandwidth, Leased, NetworkError, Networks, Place, Records, ServiceRule};
use crate::subnets::Subnets;
use api::client::{Client, ListOptions, Patch};
use api::informer::{Informer, Subscription};
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use async_trait::async_trait;
use network::{Isolation, RouterConfig};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Mutex;

const PAUSE: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_secs(2);
/// Everything is looked at again this often.
const RESYNC: Duration = Duration::from_secs(300);

const ADMIN: &str = "policy.networking.k8s.io";
/// On a namespace: the host's addresses, one of a family, that its workloads have outside.
const EGRESS_ADDRESS: &str = "atoll.dev/egress-address";

pub(crate) struct Enforcer {
    config: RouterConfig,
    isolation: Isolation,
    client: Arc<dyn Client>,
    networks: Arc<dyn Networks>,
    policies: Informer,
    by_name: (Resource, Informer),
    /// AdminNetworkPolicies, and the baseline.
    admin: [(Resource, Informer); 2],
    nodes: Informer,
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
    policies: Parsed<Policy>,
    by_name: Parsed<EgressPolicy>,
    admin: Parsed<AdminPolicy>,
}

/// Read objects by uid, with the version they were read from.
struct Parsed<T>(HashMap<String, (String, Arc<T>)>);

impl<T> Default for Parsed<T> {
    fn default() -> Self {
        Parsed(HashMap::new())
    }
}

impl<T> Parsed<T> {
    /// Reads what is new, forgets what is gone.
    fn update(&mut self, objects: &[SharedObject], read: impl Fn(&SharedObject) -> T) -> Vec<Arc<T>> {
        let mut parsed = HashMap::with_capacity(objects.len());
        let all = objects.iter().map(|object| {
            let version = object.resource_version();
            let known = self.0.get(object.uid()).filter(|(known, _)| known == version && !version.is_empty());
            let one = known.map_or_else(|| Arc::new(read(object)), |(_, one)| one.clone());
            parsed.insert(object.uid().to_owned(), (version.to_owned(), one.clone()));
            one
        });
        let all = all.collect();
        self.0 = parsed;
        all
    }
}

impl Enforcer {
    pub fn new(
        config: RouterConfig,
        isolation: Isolation,
        client: Arc<dyn Client>,
        networks: Arc<dyn Networks>,
        pods: Informer,
    ) -> Enforcer {
        let follow =
            |resource: &Resource| Informer::spawn(client.clone(), resource.clone(), "", ListOptions::default());
        let admin = ["adminnetworkpolicies", "baselineadminnetworkpolicies"].map(|plural| {
            let resource = Resource::new(ADMIN, "v1alpha1", plural);
            let informer = follow(&resource);
            (resource, informer)
        });
        let egress = Resource::new("atoll.dev", "v1alpha1", "egresspolicies");
        let by_name = follow(&egress);
        Enforcer {
            config,
            isolation,
            networks,
            by_name: (egress, by_name),
            policies: follow(&Resource::new("networking.k8s.io", "v1", "networkpolicies")),
            admin,
            nodes: follow(&Resource::new("", "v1", "nodes")),
            namespaces: follow(&Resource::new("", "v1", "namespaces")),
            pods,
            client,
            asked: AtomicU64::new(0),
            work: Mutex::default(),
            current: RwLock::default(),
        }
    }

    /// What the network enforces now.
    pub fn current(&self) -> Arc<Compiled> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, after what is being put in force at this moment.
    pub async fn settled(&self) -> Arc<Compiled> {
        drop(self.work.lock().await);
        self.current()
    }

    /// Follows the API until cancelled.
    pub async fn run(self: Arc<Self>) {
        let mut changes: Vec<Subscription> = self.informers().map(Informer::subscribe).collect();
        let mut nodes = self.nodes.subscribe();
        loop {
            for changes in &mut changes {
                while changes.try_next().is_some() {}
            }
            let seen = self.nodes();
            let told = self.admin.iter().chain([&self.by_name]);
            let told: Vec<_> = told.map(|(resource, informer)| (resource, informer.list())).collect();
            let failed = match self.settle().await {
                Ok(()) => {
                    self.tell(told).await;
                    false
                }
                Err(error) => {
                    tracing::warn!("network policies are not up to date, trying again: {error}");
                    true
                }
            };
            tokio::time::sleep(PAUSE).await;
            // Nodes say every few seconds that they are alive, which changes nothing here.
            let node_changed = async {
                while self.nodes() == seen {
                    nodes.next().await;
                }
            };
            tokio::select! {
                _ = futures_util::future::select_all(changes.iter_mut().map(|changes| Box::pin(changes.next()))) => {}
                () = node_changed => {}
                () = tokio::time::sleep(if failed { RETRY } else { RESYNC }) => {}
            }
        }
    }

    pub fn namespaces(&self) -> &Informer {
        &self.namespaces
    }

    /// All whose changes matter whatever they are.
    fn informers(&self) -> impl Iterator<Item = &Informer> {
        let admin = self.admin.iter().map(|(_, informer)| informer);
        [&self.policies, &self.by_name.1, &self.namespaces, &self.pods].into_iter().chain(admin)
    }

    /// Labels and addresses.
    fn nodes(&self) -> Vec<Node> {
        let address = |one: &Value| one.get("address")?.as_str()?.parse().ok();
        let read = |node: &SharedObject| Node {
            labels: labels(node).clone(),
            addresses: node
                .pointer("/status/addresses")
                .and_then(Value::as_array)
                .map(|all| all.iter().filter_map(address).collect())
                .unwrap_or_default(),
        };
        self.nodes.list().iter().map(read).collect()
    }

    /// Writes into the status of policies that they are in force, or what keeps them from having an effect.
    async fn tell(&self, told: Vec<(&Resource, Vec<SharedObject>)>) {
        for (resource, objects) in told {
            let needs_uplink = *resource == self.by_name.0 && self.networks.outside().is_empty();
            let (status, reason, message) = match needs_uplink {
                true => ("False", "NoUplink", "No uplink leads outside: atoll up --egress nat, or routed."),
                false => ("True", "Programmed", "The network enforces it."),
            };
            for object in objects {
                let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
                let known = |one: &Value| {
                    let is = |field: &str, wanted: &str| one.get(field).and_then(Value::as_str) == Some(wanted);
                    let generation = one.get("observedGeneration").and_then(Value::as_i64);
                    generation == Some(object.generation()) && is("status", status) && is("reason", reason)
                };
                if conditions.into_iter().flatten().any(known) {
                    continue;
                }
                let condition = json!({"type": "Programmed", "status": status, "reason": reason, "message": message,
                    "observedGeneration": object.generation(), "lastTransitionTime": api::time::now_rfc3339()});
                let patch = Patch::Merge(json!({"status": {"conditions": [condition]}}));
                let (namespace, name) = (object.namespace(), object.name());
                if let Err(error) = self.client.patch(resource, namespace, name, "status", patch).await {
                    tracing::debug!("status of {} {namespace}/{name}: {}", resource.plural, error.message);
                }
            }
        }
    }

    /// Returns once the network enforces what the API says now, for all that is attached now.
    pub async fn settle(&self) -> Result<(), NetworkError> {
        for informer in self.informers().chain([&self.nodes]) {
            informer.synced().await;
        }
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut work = self.work.lock().await;
        if work.done >= mine {
            return Ok(());
        }
        let upto = self.asked.load(Ordering::Acquire);
        let leases = self.networks.leases().await;
        let mut compiled = self.compile(&mut work, &leases);
        compiled.policies.outside = self.networks.outside();
        self.networks.sync_policies(compiled.clone()).await?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(compiled);
        self.networks.sync_egress_addresses(self.egress_addresses(&leases)).await?;
        work.done = upto;
        Ok(())
    }

    /// By workload's address, from what its namespace asks for.
    fn egress_addresses(&self, leases: &[Leased]) -> BTreeMap<IpAddr, IpAddr> {
        let namespaces = self.namespaces.list();
        let asked = |object: &SharedObject| -> Option<Vec<IpAddr>> {
            object.annotation(EGRESS_ADDRESS)?.split(',').map(|text| text.trim().parse().ok()).collect()
        };
        let wanted: HashMap<&str, Vec<IpAddr>> =
            namespaces.iter().filter_map(|object| Some((object.name(), asked(object)?))).collect();
        let of_lease = |lease: &Leased| {
            let both: [IpAddr; 2] = [lease.address.into(), self.config.v6_of(lease.address).into()];
            let asked = wanted.get(lease.namespace.as_str()).into_iter().flatten();
            let pairs = asked.map(move |to| (both[usize::from(to.is_ipv6())], *to));
            pairs.collect::<Vec<_>>()
        };
        leases.iter().flat_map(of_lease).collect()
    }

    fn compile(&self, work: &mut Work, leases: &[Leased]) -> Compiled {
        let policies = work.policies.update(&self.policies.list(), |object| Policy::read(object));
        let by_name = work.by_name.update(&self.by_name.1.list(), |object| EgressPolicy::read(object));
        let [of_admin, of_baseline] = &self.admin;
        let baseline: BTreeSet<String> = of_baseline.1.list().iter().map(|object| object.uid().to_owned()).collect();
        let objects: Vec<SharedObject> = of_admin.1.list().into_iter().chain(of_baseline.1.list()).collect();
        let admin = work.admin.update(&objects, |object| AdminPolicy::read(object, baseline.contains(object.uid())));
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
        compile(&World {
            config: &self.config,
            isolation: self.isolation,
            policies: &policies,
            by_name: &by_name,
            admin: &admin,
            namespaces: &namespaces,
            nodes: &self.nodes(),
            members: &members,
        })
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
    pub subnets: Arc<Subnets>,
}

#[async_trait]
impl Networks for Enforced {
    async fn attach(&self, request: &Attach) -> Result<SandboxNetwork, NetworkError> {
        let network = self.inner.attach(request).await?;
        self.enforcer.settle().await?;
        Ok(network)
    }
    async fn place(&self, uid: &str, namespace: &str, asked: Option<&str>) -> Result<Place, NetworkError> {
        self.subnets.place(uid, namespace, asked).await
    }
    async fn set_bandwidth(&self, uid: &str, bandwidth: Bandwidth) -> Result<(), NetworkError> {
        self.inner.set_bandwidth(uid, bandwidth).await
    }
    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        self.inner.detach(uid).await
    }
    async fn sync_services(&self, rules: Vec<ServiceRule>) -> Result<(), NetworkError> {
        self.inner.sync_services(rules).await
    }
    async fn change_services(&self, before: Vec<ServiceRule>, after: Vec<ServiceRule>) -> Result<bool, NetworkError> {
        self.inner.change_services(before, after).await
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
