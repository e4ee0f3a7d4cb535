//! Events about objects, as `kubectl describe` and `kubectl get events` show them. Recording never waits: what does not
//! fit in the queue is dropped. The same event about the same object is counted up instead of written anew.

use crate::context::{Clock, EVENTS};
use api::client::{Client, Patch};
use api::object::{Meta, Object};
use api::status::StatusResult;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc;

const QUEUE: usize = 512;
/// Events remembered for counting; all are forgotten when there are more.
const REMEMBERED: usize = 2048;
/// The longest message Kubernetes takes.
const MESSAGE_LIMIT: usize = 1024;

struct Entry {
    about: Subject,
    component: &'static str,
    kind: &'static str,
    reason: String,
    message: String,
}

/// Which object an event is about.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Subject {
    api_version: String,
    kind: String,
    namespace: String,
    name: String,
    uid: String,
    resource_version: String,
}

#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Entry>,
}

impl Recorder {
    /// The task ends with the last recorder.
    pub fn spawn(client: Arc<dyn Client>, clock: Clock) -> Recorder {
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(write_all(client, clock, entries));
        Recorder { queue }
    }

    pub fn normal(&self, component: &'static str, object: &Object, reason: &str, message: String) {
        self.record(component, "Normal", object, reason, message);
    }

    pub fn warning(&self, component: &'static str, object: &Object, reason: &str, message: String) {
        self.record(component, "Warning", object, reason, message);
    }

    fn record(&self, component: &'static str, kind: &'static str, object: &Object, reason: &str, mut message: String) {
        while message.len() > MESSAGE_LIMIT {
            message.pop();
        }
        let about = Subject {
            api_version: object.str_at("/apiVersion").to_owned(),
            kind: object.str_at("/kind").to_owned(),
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            uid: object.uid().to_owned(),
            resource_version: object.resource_version().to_owned(),
        };
        let entry = Entry { about, component, kind, reason: reason.to_owned(), message };
        if self.queue.try_send(entry).is_err() {
            tracing::debug!(reason, "event dropped: too many at once");
        }
    }
}

type Same = (String, &'static str, String, String);

async fn write_all(client: Arc<dyn Client>, clock: Clock, mut entries: mpsc::Receiver<Entry>) {
    let mut known: HashMap<Same, (String, i64)> = HashMap::new();
    while let Some(entry) = entries.recv().await {
        if known.len() > REMEMBERED {
            known.clear();
        }
        let same = (entry.about.uid.clone(), entry.component, entry.reason.clone(), entry.message.clone());
        let now = api::time::rfc3339(clock());
        let namespace = if entry.about.namespace.is_empty() { "default" } else { &entry.about.namespace };
        if let Some((name, count)) = known.get_mut(&same) {
            *count += 1;
            let patch = Patch::Merge(json!({"count": *count, "lastTimestamp": now}));
            if client.patch(&EVENTS, namespace, name, "", patch).await.is_ok() {
                continue;
            }
        }
        match create(&*client, namespace, &entry, &now).await {
            Ok(name) => drop(known.insert(same, (name, 1))),
            Err(error) => {
                known.remove(&same);
                tracing::debug!(%error, reason = entry.reason, "event could not be written");
            }
        }
    }
}

async fn create(client: &dyn Client, namespace: &str, entry: &Entry, now: &str) -> StatusResult<String> {
    let about = &entry.about;
    let name = format!("{}.{:016x}", about.name, api::names::random_u64());
    let object = json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {"apiVersion": about.api_version, "kind": about.kind, "namespace": about.namespace,
                           "name": about.name, "uid": about.uid, "resourceVersion": about.resource_version},
        "type": entry.kind, "reason": entry.reason, "message": entry.message,
        "source": {"component": entry.component},
        "reportingComponent": entry.component, "reportingInstance": "",
        "firstTimestamp": now, "lastTimestamp": now, "count": 1, "eventTime": null,
    });
    client.create(&EVENTS, namespace, object).await?;
    Ok(name)
}
