//! For the tests: all reconcilers over an in-memory API, and a node that makes pods run.

use crate::Config;
use crate::context::{EVENTS, NODES, PODS};
use api::client::{Client, DeleteOptions, ListOptions, Patch};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use api::testing::MemoryClient;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(20);

/// A running control plane. Dropped, everything stops.
pub(crate) struct World {
    pub client: Arc<MemoryClient>,
    /// Unix seconds as the reconcilers see them.
    pub now: Arc<AtomicI64>,
    _shutdown: watch::Sender<bool>,
}

impl World {
    pub async fn new() -> World {
        Self::with(Config::default()).await
    }

    pub async fn with(config: Config) -> World {
        let client = MemoryClient::new();
        let now = Arc::new(AtomicI64::new(api::time::now()));
        let clock = Arc::clone(&now);
        let config = Config { clock: Arc::new(move || clock.load(Ordering::Relaxed)), ..config };
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(crate::run(client.clone(), config, receiver));
        World { client, now, _shutdown: sender }
    }

    /// A node with room, whose pods become ready by themselves unless `ready` says no.
    pub async fn node(&self, name: &str, ready: fn(&Object) -> bool) {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"allocatable": {"cpu": "8", "memory": "16Gi", "pods": "110"},
                       "conditions": [{"type": "Ready", "status": "True"}]}});
        self.client.create(&NODES, "", node).await.expect("node");
        tokio::spawn(play_node(self.client.clone(), name.to_owned(), ready));
    }

    pub async fn create(&self, resource: &Resource, object: Value) -> SharedObject {
        let namespace = object.namespace().to_owned();
        self.client.create(resource, &namespace, object).await.expect("create")
    }

    pub async fn patch(&self, resource: &Resource, name: &str, patch: Value) -> SharedObject {
        self.client.patch(resource, "x", name, "", Patch::Merge(patch)).await.expect("patch")
    }

    pub async fn delete(&self, resource: &Resource, name: &str) {
        self.client.delete(resource, "x", name, &DeleteOptions::default()).await.expect("delete");
    }

    pub async fn list(&self, resource: &Resource) -> Vec<SharedObject> {
        self.client.list(resource, "", &ListOptions::default()).await.expect("list").items
    }

    pub async fn get(&self, resource: &Resource, name: &str) -> Option<SharedObject> {
        self.client.get(resource, "x", name).await.ok()
    }

    /// The object of namespace `x`, once it is as `test` wants it.
    pub async fn wait(&self, resource: &Resource, name: &str, test: impl Fn(&Object) -> bool) -> SharedObject {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let found = self.get(resource, name).await;
            if let Some(object) = found.as_ref().filter(|object| test(object)) {
                return SharedObject::clone(object);
            }
            if tokio::time::Instant::now() > deadline {
                let everything = self.describe().await;
                panic!("{} {name} never came to be as wanted: {found:#?}\n{everything}", resource.plural);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// All objects of a resource, once they are as `test` wants them.
    pub async fn wait_all(&self, resource: &Resource, test: impl Fn(&[SharedObject]) -> bool) -> Vec<SharedObject> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let found = self.list(resource).await;
            if test(&found) {
                return found;
            }
            if tokio::time::Instant::now() > deadline {
                panic!("{} never came to be as wanted: {found:#?}", resource.plural);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn events(&self) -> Vec<String> {
        let events = self.list(&EVENTS).await;
        events.iter().map(|e| format!("{}: {}", e.str_at("/reason"), e.str_at("/message"))).collect()
    }

    pub async fn wait_event(&self, text: &str) {
        self.wait_all(&EVENTS, |events| {
            let is = |e: &SharedObject| format!("{}: {}", e.str_at("/reason"), e.str_at("/message")).contains(text);
            events.iter().any(is)
        })
        .await;
    }

    async fn describe(&self) -> String {
        let mut text = String::new();
        for (resource, ..) in self.client.resources() {
            for object in self.list(&resource).await {
                text += &format!("{} {}/{}\n", resource.plural, object.namespace(), object.name());
            }
        }
        text + &self.events().await.join("\n")
    }
}

async fn play_node(client: Arc<MemoryClient>, name: String, ready: fn(&Object) -> bool) {
    let options = ListOptions { field_selector: format!("spec.nodeName={name}"), ..Default::default() };
    let pods = Informer::spawn(client.clone(), PODS.clone(), "", options);
    let mut changes = pods.subscribe();
    let mut addresses = 0;
    loop {
        for pod in pods.list() {
            if pod.is_deleting() {
                let now = DeleteOptions { grace_period_seconds: Some(0), ..Default::default() };
                // It may be gone already.
                drop(client.delete(&PODS, pod.namespace(), pod.name(), &now).await);
            } else if matches!(pod.str_at("/status/phase"), "Pending" | "") {
                addresses += 1;
                run_pod(&client, &pod, addresses, ready(&pod)).await;
            }
        }
        changes.next().await;
    }
}

async fn run_pod(client: &MemoryClient, pod: &SharedObject, address: u32, ready: bool) {
    let now = api::time::now_rfc3339();
    let status = if ready { "True" } else { "False" };
    let status = json!({"status": {
        "phase": "Running", "podIP": format!("10.42.0.{address}"), "podIPs": [{"ip": format!("10.42.0.{address}")}],
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
                       {"type": "Ready", "status": status, "lastTransitionTime": now}]}});
    // It may be gone already.
    drop(client.patch(&PODS, pod.namespace(), pod.name(), "status", Patch::Merge(status)).await);
}

/// A template of pods labelled `app=<app>`.
pub(crate) fn template(app: &str, image: &str) -> Value {
    json!({"metadata": {"labels": {"app": app}},
           "spec": {"containers": [{"name": "c", "image": image, "resources": {"requests": {"cpu": "10m"}}}]}})
}
