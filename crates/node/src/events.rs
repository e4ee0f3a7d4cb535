//! Events as kubelet writes them: `Pulling`, `Started`, `BackOff`, ... Recording never waits; a task behind a bounded
//! queue writes them, counts repetitions up instead of writing them again, and limits how many one object gets.

use api::client::{Client, Patch};
use api::kind::Resource;
use api::object::{Meta, Object};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant};

const QUEUE: usize = 1024;
/// Remembered events; the oldest half goes when it is full.
const REMEMBERED: usize = 4096;
/// One object may have this many writes at once and one more every [`REFILL`].
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Level {
    Normal,
    Warning,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct About {
    pub api_version: &'static str,
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    /// `spec.containers{name}` or empty.
    pub field_path: String,
}

impl About {
    pub fn pod(pod: &Object) -> Self {
        About {
            api_version: "v1",
            kind: "Pod",
            namespace: pod.namespace().to_owned(),
            name: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            resource_version: pod.resource_version().to_owned(),
            field_path: String::new(),
        }
    }
    pub fn service(service: &Object) -> Self {
        About { kind: "Service", ..Self::pod(service) }
    }
    pub fn container(pod: &Object, name: &str, init: bool) -> Self {
        let list = if init { "initContainers" } else { "containers" };
        About { field_path: format!("spec.{list}{{{name}}}"), ..Self::pod(pod) }
    }
}

struct Record {
    about: About,
    level: Level,
    reason: &'static str,
    message: String,
    at: i64,
}

/// Cloneable handle.
#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Record>,
}

impl Recorder {
    /// Must be called inside a tokio runtime; the task ends with the last handle.
    pub fn spawn(client: Arc<dyn Client>, node: &str) -> Recorder {
        let (queue, inbox) = mpsc::channel(QUEUE);
        let writer = Writer { client, node: node.to_owned(), known: HashMap::new(), budgets: HashMap::new(), last: 0 };
        tokio::spawn(writer.run(inbox));
        Recorder { queue }
    }

    pub fn record(&self, about: About, level: Level, reason: &'static str, message: impl Into<String>) {
        let mut message = message.into();
        if message.len() > 1024 {
            let cut = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(cut);
            message.push_str("...");
        }
        let record = Record { about, level, reason, message, at: api::time::now() };
        if self.queue.try_send(record).is_err() {
            tracing::debug!("too many events, one was dropped");
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    field_path: String,
    warning: bool,
    reason: &'static str,
    message: String,
}

struct Known {
    name: String,
    count: i64,
    used: Instant,
}

struct Budget {
    left: f64,
    at: Instant,
}

struct Writer {
    client: Arc<dyn Client>,
    node: String,
    known: HashMap<Key, Known>,
    budgets: HashMap<String, Budget>,
    /// Unix nanoseconds in the newest event's name.
    last: u64,
}

impl Writer {
    async fn run(mut self, mut inbox: mpsc::Receiver<Record>) {
        while let Some(record) = inbox.recv().await {
            if self.may_write(&record.about.uid) {
                self.write(record).await;
            }
        }
    }

    fn may_write(&mut self, uid: &str) -> bool {
        let now = Instant::now();
        if self.budgets.len() > REMEMBERED {
            self.budgets.retain(|_, b| now.duration_since(b.at) < REFILL);
        }
        let budget = self.budgets.entry(uid.to_owned()).or_insert(Budget { left: BURST, at: now });
        let refilled = now.duration_since(budget.at).as_secs_f64() / REFILL.as_secs_f64();
        budget.left = (budget.left + refilled).min(BURST);
        budget.at = now;
        if budget.left < 1.0 {
            return false;
        }
        budget.left -= 1.0;
        true
    }

    async fn write(&mut self, record: Record) {
        let resource = Resource::new("", "v1", "events");
        let namespace =
            if record.about.namespace.is_empty() { "default" } else { record.about.namespace.as_str() }.to_owned();
        let key = Key {
            uid: record.about.uid.clone(),
            field_path: record.about.field_path.clone(),
            warning: record.level == Level::Warning,
            reason: record.reason,
            message: record.message.clone(),
        };
        if let Some(known) = self.known.get_mut(&key) {
            let patch = json!({"count": known.count + 1, "lastTimestamp": api::time::rfc3339(record.at)});
            match self.client.patch(&resource, &namespace, &known.name, "", Patch::Merge(patch)).await {
                Ok(_) => {
                    known.count += 1;
                    known.used = Instant::now();
                    return;
                }
                Err(status) if status.is_not_found() => {}
                Err(status) => {
                    tracing::debug!("event {}: {status}", known.name);
                    return;
                }
            }
        }
        // Names grow with time, so that a list by name is in the order things happened.
        self.last = self.last.wrapping_add(1).max(u64::try_from(api::time::now_micros()).unwrap_or(0) * 1000);
        let name = format!("{}.{:016x}", record.about.name, self.last);
        let event = self.object(&record, &namespace, &name);
        match self.client.create(&resource, &namespace, event).await {
            Ok(_) => {
                self.forget_old();
                self.known.insert(key, Known { name, count: 1, used: Instant::now() });
            }
            Err(status) => tracing::debug!("event {name}: {status}"),
        }
    }

    fn object(&self, record: &Record, namespace: &str, name: &str) -> Value {
        let about = &record.about;
        let at = api::time::rfc3339(record.at);
        let mut involved = json!({"apiVersion": about.api_version, "kind": about.kind, "name": about.name,
            "uid": about.uid});
        for (key, value) in [
            ("namespace", &about.namespace),
            ("resourceVersion", &about.resource_version),
            ("fieldPath", &about.field_path),
        ] {
            if !value.is_empty() {
                involved[key] = value.as_str().into();
            }
        }
        json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": involved,
            "type": if record.level == Level::Warning { "Warning" } else { "Normal" },
            "reason": record.reason, "message": record.message, "count": 1,
            "firstTimestamp": at, "lastTimestamp": at,
            "source": {"component": "kubelet", "host": self.node},
            "reportingComponent": "kubelet", "reportingInstance": self.node,
        })
    }

    fn forget_old(&mut self) {
        if self.known.len() < REMEMBERED {
            return;
        }
        let mut times: Vec<Instant> = self.known.values().map(|k| k.used).collect();
        times.sort();
        if let Some(middle) = times.get(times.len() / 2).copied() {
            self.known.retain(|_, k| k.used > middle);
        }
    }
}
