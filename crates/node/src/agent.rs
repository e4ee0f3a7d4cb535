//! The agent: finds what an earlier one left, follows the pods bound to this node, and has one worker for each.

use crate::adaptors::{RouterNetworks, StoreImages};
use crate::boundary::{Boundary, BoundaryError};
use crate::config::Config;
use crate::down;
use crate::etc_files::Resolver;
use crate::events::Recorder;
use crate::exposed::{self, Followed};
use crate::kept;
use crate::kept_logs;
use crate::pod::{self, Update};
use crate::policy::inspect::{Desk, Inspector};
use crate::policy::{Enforced, Enforcer};
use crate::ports::{Images, Networks};
use crate::proxy;
use crate::record::{self, IdRanges, Record};
use crate::registration::{Machine, Registration};
use crate::shared::Shared;
use crate::snapshots;
use crate::streams::Streams;
use crate::subnets::{self, Subnets};
use crate::views::Views;
use crate::volumes::tree;
use api::client::{Client, ListOptions};
use api::informer::{Change, Informer};
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use api::streams::PodStreams;
use api::topology::Place;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{Id, JoinSet};

/// Time workers get to finish what they are at when the agent ends.
const LEAVE: Duration = Duration::from_secs(5);
const COLLECT_EVERY: Duration = Duration::from_secs(600);
/// Uids of pods that are done with, remembered against late news of them.
const REMEMBERED: usize = 4096;

/// The node agent. Cheap until [`Agent::run`].
pub struct Agent {
    config: Config,
    client: Arc<dyn Client>,
    images: Arc<dyn Images>,
    networks: Arc<dyn Networks>,
    router: Option<Arc<RouterNetworks>>,
    boundaries: BTreeMap<&'static str, Arc<dyn Boundary>>,
    views: Arc<Views>,
    inspector: Arc<OnceLock<Arc<Inspector>>>,
}

/// What boundaries count, and the network once the agent runs.
struct Counters {
    inspector: Arc<OnceLock<Arc<Inspector>>>,
    boundaries: Vec<Arc<dyn Boundary>>,
}

#[async_trait::async_trait]
impl api::metrics::Source for Counters {
    async fn metrics(&self) -> api::metrics::Text {
        let mut text = api::metrics::Text::default();
        for boundary in &self.boundaries {
            text.append(&boundary.metrics().await);
        }
        if let Some(inspector) = self.inspector.get() {
            match inspector.metrics().await {
                Ok(network) => text.append(&network),
                Err(error) => tracing::warn!("counters of the network: {error}"),
            }
        }
        text
    }
}

impl Agent {
    pub fn new(
        config: Config,
        client: Arc<dyn Client>,
        images: Arc<image::Store>,
        router: Arc<network::Router>,
        boundaries: Vec<Arc<dyn Boundary>>,
    ) -> Agent {
        let mut config = config;
        if config.node_ip.is_unspecified() {
            config.node_ip = router.config().router_address();
            config.node_ip6 = router.has_ipv6().then(|| router.config().router_address6());
        }
        config.cluster_dns = router.config().dns_address;
        config.pod_cidrs = vec![router.config().pod_cidr.to_string()];
        config.pod_cidrs.extend(router.has_ipv6().then(|| router.config().pod_cidr6.to_string()));
        let router = Arc::new(RouterNetworks::new(router, config.host_netns.clone()));
        let images = Arc::new(StoreImages::new(images, config.host_netns.clone(), config.pull.clone()));
        let mut agent = Agent::with_ports(config, client, images, router.clone(), boundaries);
        agent.router = Some(router);
        agent
    }

    /// With other implementations of the ports, for tests.
    pub fn with_ports(
        config: Config,
        client: Arc<dyn Client>,
        images: Arc<dyn Images>,
        networks: Arc<dyn Networks>,
        boundaries: Vec<Arc<dyn Boundary>>,
    ) -> Agent {
        let boundaries = boundaries.into_iter().map(|b| (b.name(), b)).collect();
        let mut config = config;
        if config.node_ip.is_unspecified() {
            config.node_ip = network::GATEWAY;
        }
        Agent {
            config,
            client,
            images,
            networks,
            router: None,
            boundaries,
            views: Arc::default(),
            inspector: Arc::default(),
        }
    }

    /// The DNS server that shall know Services and pods.
    #[must_use]
    pub fn with_dns(self, dns: Arc<network::DnsServer>) -> Agent {
        if let Some(router) = &self.router {
            let _ = router.dns.set(dns);
        }
        self
    }

    /// How the API reaches into pods. Works while the agent runs.
    pub fn streams(&self) -> Arc<dyn PodStreams> {
        Arc::new(Streams { views: self.views.clone(), data_dir: self.config.data_dir.clone() })
    }

    /// Answers what the network is asked, once the agent runs.
    pub fn inspect(&self) -> Arc<dyn api::inspect::Inspect> {
        Arc::new(Desk(self.inspector.clone()))
    }

    /// Counters for Prometheus.
    pub fn metrics(&self) -> Arc<dyn api::metrics::Source> {
        Arc::new(Counters {
            inspector: self.inspector.clone(),
            boundaries: self.boundaries.values().cloned().collect(),
        })
    }

    /// Stops every workload from what is on disk alone; the API is not asked. Answers how many ran.
    pub async fn destroy_all(&self) -> usize {
        down::destroy_all(&self.config, &self.networks, &self.boundaries).await
    }

    /// Runs until `shutdown` turns true (or its sender goes); workloads are left running.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        let mut running = Running::start(self).await;
        tokio::select! {
            () = running.follow() => {}
            _ = shutdown.wait_for(|stop| *stop) => {}
        }
        running.leave().await;
    }
}

/// `atoll down` without an agent: stops every workload found in `config.data_dir`. Answers how many ran.
pub async fn destroy_all(config: &Config, router: Arc<network::Router>, boundaries: Vec<Arc<dyn Boundary>>) -> usize {
    let networks: Arc<dyn Networks> = Arc::new(RouterNetworks::new(router, None));
    let boundaries = boundaries.into_iter().map(|b| (b.name(), b)).collect();
    down::destroy_all(config, &networks, &boundaries).await
}

struct Handle {
    tell: watch::Sender<Update>,
    object: SharedObject,
}

struct Running {
    shared: Arc<Shared>,
    pods: Informer,
    /// Sandboxes on disk that no worker has taken over yet.
    records: HashMap<String, Record>,
    bare: Vec<String>,
    workers: JoinSet<()>,
    ids: HashMap<Id, String>,
    handles: HashMap<String, Handle>,
    done: (BTreeSet<String>, VecDeque<String>),
    helpers: JoinSet<()>,
}

impl Running {
    async fn start(agent: &Agent) -> Running {
        let config = agent.config.clone();
        let copy = config.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let resolver = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            (record::scan(&copy), Machine::look(&copy), Resolver::parse(&resolver))
        });
        let (scan, machine, node_resolver) = match looked.await {
            Ok((scan, machine, resolver)) => {
                let scan = scan.unwrap_or_else(|error| {
                    tracing::error!("{}: {error}", config.pods_dir().display());
                    record::Scan::default()
                });
                (scan, machine, resolver)
            }
            Err(_) => (record::Scan::default(), Machine::look(&config), Resolver::default()),
        };
        let ids = IdRanges::new();
        for record in scan.records.iter().filter(|r| !r.ended) {
            ids.reserve(record.sandbox.id_base);
        }
        let client = &agent.client;
        let follow = |group: &str, plural: &str, options: ListOptions| {
            Informer::spawn(client.clone(), Resource::new(group, "v1", plural), "", options)
        };
        let mine = ListOptions { field_selector: format!("spec.nodeName={}", config.name), ..ListOptions::default() };
        let pods = follow("", "pods", mine);
        let services = follow("", "services", ListOptions::default());
        let slices = follow("discovery.k8s.io", "endpointslices", ListOptions::default());
        let named = ListOptions { field_selector: format!("metadata.name={}", config.name), ..ListOptions::default() };
        let own = follow("", "nodes", named);
        let followed = Followed { own, services: services.clone(), slices };
        let mut helpers = JoinSet::new();
        let mut networks = agent.networks.clone();
        if let Some(router) = &agent.router {
            let inner = networks.clone();
            let network = router.router().config().clone();
            let enforcer = Enforcer::new(network, config.isolation, client.clone(), inner.clone(), pods.clone());
            let enforcer = Arc::new(enforcer);
            helpers.spawn(enforcer.clone().run());
            let inspector = Inspector::new(&config, router.clone(), enforcer.clone(), followed.clone());
            let _ = agent.inspector.set(Arc::new(inspector));
            let networks_of_pods = Informer::spawn(client.clone(), subnets::resource(), "", ListOptions::default());
            let followed = (networks_of_pods, enforcer.namespaces().clone(), pods.clone());
            let subnets = Arc::new(Subnets::new(client.clone(), inner.clone(), followed));
            helpers.spawn(subnets.clone().run());
            networks = Arc::new(Enforced { inner, enforcer, subnets });
        }
        let events = Recorder::spawn(client.clone(), &config.name);
        let place = Place { node: config.name.clone(), zone: None };
        let exposed = exposed::Exposed { place, exposing: config.exposing.clone() };
        helpers.spawn(exposed.run(followed.clone(), agent.networks.clone(), events.clone()));
        helpers.spawn(kept::run(client.clone(), agent.networks.clone()));
        helpers.spawn(proxy::run(config.name.clone(), followed, agent.networks.clone()));
        let registration = Registration {
            config: config.clone(),
            client: client.clone(),
            boundaries: agent.boundaries.values().cloned().collect(),
            machine: machine.clone(),
        };
        helpers.spawn(registration.run());
        let shared = Arc::new(Shared {
            client: client.clone(),
            images: agent.images.clone(),
            networks,
            boundaries: agent.boundaries.clone(),
            events,
            ids,
            views: agent.views.clone(),
            services,
            node_resolver,
            node_cpu_milli: machine.cores.saturating_mul(1000),
            node_memory: machine.memory,
            pulls: Shared::pull_slots(),
            config,
        });
        helpers.spawn(collect(shared.clone()));
        helpers.spawn(snapshots::run(shared.clone()));
        Running {
            shared,
            pods,
            records: scan.records.into_iter().map(|r| (r.sandbox.uid.clone(), r)).collect(),
            bare: scan.bare,
            workers: JoinSet::new(),
            ids: HashMap::new(),
            handles: HashMap::new(),
            done: (BTreeSet::new(), VecDeque::new()),
            helpers,
        }
    }

    async fn follow(&mut self) {
        let mut changes = self.pods.subscribe();
        self.pods.synced().await;
        self.look_at_all();
        self.remove_orphans();
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Change::Everything => self.look_at_all(),
                    Change::Object { old, new, .. } => {
                        if let Some(old) = old
                            && new.as_ref().is_none_or(|n| n.uid() != old.uid())
                        {
                            self.gone(old.uid());
                        }
                        if let Some(new) = new {
                            self.present(new);
                        }
                    }
                },
                Some(ended) = self.workers.join_next_with_id() => self.ended(ended),
            }
        }
    }

    fn look_at_all(&mut self) {
        let pods = self.pods.list();
        let uids: BTreeSet<&str> = pods.iter().map(|p| p.uid()).collect();
        let gone: Vec<String> = self.handles.keys().filter(|u| !uids.contains(u.as_str())).cloned().collect();
        for uid in gone {
            self.gone(&uid);
        }
        for pod in pods {
            self.present(pod);
        }
    }

    fn present(&mut self, object: SharedObject) {
        let uid = object.uid().to_owned();
        if let Some(handle) = self.handles.get_mut(&uid) {
            handle.object = object.clone();
            handle.tell.send_replace(Update::Present(object));
            return;
        }
        if self.done.0.contains(&uid) {
            return;
        }
        let record = self.records.remove(&uid);
        let (tell, worker) = pod::worker(self.shared.clone(), object.clone(), record);
        let task = self.workers.spawn(worker);
        self.ids.insert(task.id(), uid.clone());
        self.handles.insert(uid, Handle { tell, object });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(handle) = self.handles.get(uid) {
            handle.tell.send_replace(Update::Gone);
        }
    }

    fn ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let (id, panicked) = match &ended {
            Ok((id, ())) => (*id, false),
            Err(error) => (error.id(), error.is_panic()),
        };
        let Some(uid) = self.ids.remove(&id) else { return };
        let Some(handle) = self.handles.remove(&uid) else { return };
        if panicked {
            tracing::error!(pod = handle.object.name(), "its worker failed and is started again");
            let dir = self.shared.config.pod_dir(&uid);
            if let Ok(Some(record)) = Record::read(&dir) {
                self.records.insert(uid, record);
            }
            self.present(handle.object);
            return;
        }
        if self.done.0.insert(uid.clone()) {
            self.done.1.push_back(uid);
        }
        if self.done.1.len() > REMEMBERED
            && let Some(oldest) = self.done.1.pop_front()
        {
            self.done.0.remove(&oldest);
        }
    }

    /// What is on disk or attached and belongs to no pod any more.
    fn remove_orphans(&mut self) {
        let records = std::mem::take(&mut self.records);
        for record in records.into_values() {
            self.helpers.spawn(remove_orphan(self.shared.clone(), record));
        }
        let bare: Vec<String> = self.bare.drain(..).filter(|uid| !self.handles.contains_key(uid)).collect();
        self.helpers.spawn(remove_bare(self.shared.clone(), bare));
    }

    async fn leave(mut self) {
        self.helpers.abort_all();
        for handle in self.handles.values() {
            handle.tell.send_replace(Update::Leave);
        }
        let all = async { while self.workers.join_next().await.is_some() {} };
        if tokio::time::timeout(LEAVE, all).await.is_err() {
            tracing::warn!("some pods were in the middle of something; the next start goes on with it");
        }
    }
}

async fn remove_orphan(shared: Arc<Shared>, record: Record) {
    let sandbox = &record.sandbox;
    if !record.ended
        && let Some(boundary) = shared.boundaries.get(record.boundary.as_str())
    {
        match boundary.destroy(sandbox).await {
            Ok(()) | Err(BoundaryError::NoSandbox(_)) => {}
            Err(error) => {
                tracing::error!(pod = sandbox.name, namespace = sandbox.namespace, "orphan cannot be removed: {error}");
                return;
            }
        }
    }
    if !sandbox.network.host
        && let Err(error) = shared.networks.detach(&sandbox.uid).await
    {
        tracing::error!(pod = sandbox.name, "orphan's network: {error}");
        return;
    }
    let (dir, run_dir, base) = (sandbox.dir.clone(), sandbox.run_dir.clone(), sandbox.id_base);
    let (data, namespace) = (shared.config.data_dir.clone(), sandbox.namespace.clone());
    let owner = sandbox.labels.get(kept_logs::OWNER).cloned();
    let work = move || {
        kept_logs::keep(&data, &namespace, owner.as_deref(), &dir, None);
        tree::remove(&run_dir).and_then(|()| tree::remove(&dir))
    };
    let removed = tokio::task::spawn_blocking(work).await;
    if let Ok(Err(error)) = removed {
        tracing::error!(pod = record.sandbox.name, "orphan's directory: {error}");
    }
    shared.ids.release(base);
}

/// Directories of set-ups that did not get as far as a record.
async fn remove_bare(shared: Arc<Shared>, uids: Vec<String>) {
    for uid in uids {
        if let Err(error) = shared.networks.detach(&uid).await {
            tracing::warn!(pod = uid, "leftovers of the network: {error}");
        }
        let (dir, run_dir) = (shared.config.pod_dir(&uid), shared.config.pod_run_dir(&uid));
        let _ = tokio::task::spawn_blocking(move || tree::remove(&run_dir).and_then(|()| tree::remove(&dir))).await;
    }
}

/// Lets the image store drop what nothing uses.
async fn collect(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(COLLECT_EVERY).await;
        let in_use = shared.views.all().iter().flat_map(|v| v.images.clone()).collect();
        match shared.images.collect(&in_use).await {
            Ok(0) => {}
            Ok(bytes) => tracing::info!("images: {bytes} bytes that nothing used are gone"),
            Err(error) => tracing::warn!("images: {error}"),
        }
    }
}
