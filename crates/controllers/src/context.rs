//! What all reconcilers share: the client, one informer per resource, the clock, the recorder of events, the settings.

use crate::events::Recorder;
use crate::objects::condition;
use api::client::{Client, ListOptions};
use api::demand::Demand;
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::StatusResult;
use serde_json::Value;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

/// Unix seconds now.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Settings of [`crate::run`].
#[derive(Clone)]
pub struct Config {
    /// Knative services are reachable from outside as `<name>.<namespace>.<domain>`.
    pub domain: String,
    /// The domain of Services' DNS names.
    pub cluster_domain: String,
    /// The port of the default Gateway's listener and of the URLs in Knative statuses; 80 is left out of URLs.
    pub gateway_port: u16,
    /// An address of the gateway, for `Gateway.status.addresses`.
    pub gateway_address: Option<String>,
    /// The gateway has a socket for TLS.
    pub gateway_tls: bool,
    /// Addresses of the host that Services of type LoadBalancer get.
    pub load_balancers: Vec<IpAddr>,
    /// Every object is looked at again this often, whatever the watches said.
    pub resync: Duration,
    /// A node whose lease is older than this is no longer trusted, seconds.
    pub node_grace_seconds: i64,
    /// Ended pods that nobody owns are kept up to this number.
    pub ended_pods: usize,
    /// What requests want of Services; the gateway's, too.
    pub demand: Arc<Demand>,
    pub clock: Clock,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            domain: "atoll.local".into(),
            cluster_domain: "cluster.local".into(),
            gateway_port: 8080,
            gateway_address: None,
            gateway_tls: true,
            load_balancers: Vec::new(),
            resync: Duration::from_secs(600),
            node_grace_seconds: 40,
            ended_pods: 500,
            demand: Arc::default(),
            clock: Arc::new(api::time::now),
        }
    }
}

macro_rules! resources {
    ($($name:ident = $group:literal $version:literal $plural:literal;)*) => {
        $(pub(crate) static $name: LazyLock<Resource> = LazyLock::new(|| Resource::new($group, $version, $plural));)*
    };
}

resources! {
    NAMESPACES = "" "v1" "namespaces";
    NODES = "" "v1" "nodes";
    PODS = "" "v1" "pods";
    SERVICES = "" "v1" "services";
    EVENTS = "" "v1" "events";
    ENDPOINT_SLICES = "discovery.k8s.io" "v1" "endpointslices";
    LEASES = "coordination.k8s.io" "v1" "leases";
    RUNTIME_CLASSES = "node.k8s.io" "v1" "runtimeclasses";
    DEPLOYMENTS = "apps" "v1" "deployments";
    REPLICA_SETS = "apps" "v1" "replicasets";
    GATEWAY_CLASSES = "gateway.networking.k8s.io" "v1" "gatewayclasses";
    GATEWAYS = "gateway.networking.k8s.io" "v1" "gateways";
    HTTP_ROUTES = "gateway.networking.k8s.io" "v1" "httproutes";
    MACHINES = "kubevirt.io" "v1" "virtualmachines";
    INSTANCES = "kubevirt.io" "v1" "virtualmachineinstances";
    SNAPSHOTS = "snapshot.kubevirt.io" "v1beta1" "virtualmachinesnapshots";
    SNAPSHOT_CONTENTS = "snapshot.kubevirt.io" "v1beta1" "virtualmachinesnapshotcontents";
    RESTORES = "snapshot.kubevirt.io" "v1beta1" "virtualmachinerestores";
    CLONES = "clone.kubevirt.io" "v1beta1" "virtualmachineclones";
    KN_SERVICES = "serving.knative.dev" "v1" "services";
    KN_CONFIGURATIONS = "serving.knative.dev" "v1" "configurations";
    KN_REVISIONS = "serving.knative.dev" "v1" "revisions";
    KN_ROUTES = "serving.knative.dev" "v1" "routes";
}

/// One informer per resource, made when first asked for.
pub(crate) struct Informers {
    client: Arc<dyn Client>,
    running: Mutex<HashMap<Resource, Informer>>,
}

impl Informers {
    pub fn of(&self, resource: &Resource) -> Informer {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let spawn = || Informer::spawn(Arc::clone(&self.client), resource.clone(), "", ListOptions::default());
        running.entry(resource.clone()).or_insert_with(spawn).clone()
    }

    /// The informer if some reconciler already follows the resource.
    pub fn existing(&self, resource: &Resource) -> Option<Informer> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).get(resource).cloned()
    }
}

pub(crate) struct Context {
    pub client: Arc<dyn Client>,
    pub informers: Informers,
    pub events: Recorder,
    pub config: Config,
}

impl Context {
    pub fn new(client: Arc<dyn Client>, config: Config) -> Arc<Context> {
        let informers = Informers { client: Arc::clone(&client), running: Mutex::default() };
        let events = Recorder::spawn(Arc::clone(&client), Arc::clone(&config.clock));
        Arc::new(Context { client, informers, events, config })
    }

    pub fn now(&self) -> i64 {
        (self.config.clock)()
    }

    pub fn timestamp(&self) -> String {
        api::time::rfc3339(self.now())
    }

    /// Writes `status` if it differs from what `object` has; refused with a conflict when `object` is not the newest.
    pub async fn write_status(&self, resource: &Resource, object: &SharedObject, status: Value) -> StatusResult<()> {
        if object.get("status").unwrap_or(&Value::Null) == &status {
            return Ok(());
        }
        let mut new = (**object).clone();
        object_of(&mut new).insert("status".into(), status);
        self.client.update_status(resource, object.namespace(), new).await.map(drop)
    }

    /// Writes `new` if it differs from `old`.
    pub async fn write(&self, resource: &Resource, old: &SharedObject, new: Object) -> StatusResult<SharedObject> {
        if **old == new {
            return Ok(Arc::clone(old));
        }
        self.client.update(resource, old.namespace(), new).await
    }

    /// Creates; an object of that name that is there already is returned as it is.
    pub async fn create_or_get(
        &self,
        resource: &Resource,
        namespace: &str,
        object: Object,
    ) -> StatusResult<SharedObject> {
        let name = object.name().to_owned();
        match self.client.create(resource, namespace, object).await {
            Err(status) if status.reason == api::status::Reason::AlreadyExists => {
                self.client.get(resource, namespace, &name).await
            }
            other => other,
        }
    }
}

/// Sets a condition in `status.conditions`: `lastTransitionTime` moves only when its status changes, and nothing changes
/// when nothing did. `extra` fields are set beside.
pub(crate) fn set_condition(status: &mut Value, new: Condition<'_>, now: &str, extra: &[(&str, Value)]) {
    let since = condition(status, new.kind)
        .filter(|old| old.str_at("/status") == new.status)
        .map(|old| old.str_at("/lastTransitionTime").to_owned())
        .filter(|since| !since.is_empty());
    let mut fields = serde_json::Map::new();
    fields.insert("type".into(), new.kind.into());
    fields.insert("status".into(), new.status.into());
    fields.insert("lastTransitionTime".into(), since.unwrap_or_else(|| now.to_owned()).into());
    for (key, value) in [("reason", new.reason), ("message", new.message)] {
        if !value.is_empty() {
            fields.insert(key.into(), value.into());
        }
    }
    for (key, value) in extra {
        fields.insert((*key).into(), value.clone());
    }
    let list = object_of(status).entry("conditions").or_insert_with(|| Value::Array(Vec::new()));
    if !list.is_array() {
        *list = Value::Array(Vec::new());
    }
    let Value::Array(list) = list else { return };
    match list.iter_mut().find(|old| old.str_at("/type") == new.kind) {
        Some(old) => *old = Value::Object(fields),
        None => list.push(Value::Object(fields)),
    }
}

/// One condition to set.
#[derive(Clone, Copy)]
pub(crate) struct Condition<'a> {
    pub kind: &'a str,
    /// `True`, `False` or `Unknown`.
    pub status: &'a str,
    pub reason: &'a str,
    pub message: &'a str,
}

pub(crate) fn remove_condition(status: &mut Value, kind: &str) {
    if let Some(Value::Array(list)) = status.get_mut("conditions") {
        list.retain(|condition| condition.str_at("/type") != kind);
    }
}
