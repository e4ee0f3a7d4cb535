//! Scales revisions with the requests that the gateway carries for them, to zero and from zero where `min-scale: "0"`
//! asks for it.
//!
//! ```text
//!  pods ──(a window without requests)──▶ held, none under way ──▶ zero ──(a request waits)──▶ starting ──▶ pods, let go
//! ```
//! Zero is no pods, or one that sleeps (`functions.atoll.dev/sleep`): then the Deployment keeps one replica and says so in
//! an annotation, which the revision's pods are given.
//!
//! *Invariant:* the last pod is taken away, or put to sleep, only while its Services are held, so no request is on its way
//! to it.

use super::scale::{History, Rules};
use super::{REVISION_UID, ROUTE, ROUTING_STATE, SERVICE, child_name, pods_asleep, sleep_of};
use crate::context::{Context, DEPLOYMENTS, KN_REVISIONS, PODS, SERVICES};
use crate::objects::{condition_status, int};
use crate::runner::is_race;
use api::client::Patch;
use api::demand::Load;
use api::informer::{Change, Informer, Key};
use api::object::{Meta, Object, SharedObject};
use api::sleep::{ASLEEP, Sleep};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// Requests under way are counted this often, decisions made every fourth time.
const SAMPLE: Duration = Duration::from_millis(250);
const SAMPLES: u32 = 4;

pub(crate) async fn run(context: Arc<Context>) {
    let informers = &context.informers;
    let mut autoscaler = Autoscaler {
        revisions: informers.of(&KN_REVISIONS),
        deployments: informers.of(&DEPLOYMENTS),
        services: informers.of(&SERVICES),
        pods: informers.of(&PODS),
        scaled: HashMap::new(),
        samples: 0,
        context: Arc::clone(&context),
    };
    let mut subscriptions = [&autoscaler.revisions, &autoscaler.services, &autoscaler.pods].map(Informer::subscribe);
    for informer in [&autoscaler.revisions, &autoscaler.deployments, &autoscaler.services, &autoscaler.pods] {
        informer.synced().await;
    }
    let mut sampling = ticks();
    loop {
        let [revisions, services, pods] = &mut subscriptions;
        tokio::select! {
            _ = sampling.tick(), if !autoscaler.scaled.is_empty() => autoscaler.sample().await,
            () = context.config.demand.wanted() => autoscaler.wake().await,
            change = revisions.next() => autoscaler.changed(&change),
            change = services.next() => autoscaler.changed(&change),
            change = pods.next() => autoscaler.let_go(&change),
        }
    }
}

fn ticks() -> Interval {
    let mut ticks = interval(SAMPLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

struct Autoscaler {
    context: Arc<Context>,
    revisions: Informer,
    deployments: Informer,
    services: Informer,
    pods: Informer,
    scaled: HashMap<Key, Scaled>,
    samples: u32,
}

/// A revision whose pods follow its requests.
struct Scaled {
    uid: String,
    rules: Rules,
    /// What its pods do at zero; `None`: they go.
    sleep: Option<Sleep>,
    /// It was put to sleep, whether or not the informers know already.
    sleeps: bool,
    /// Of the Services that lead to it.
    loads: Vec<Arc<Load>>,
    history: History,
    /// Requests under way, summed over the samples since the last decision.
    sampled: usize,
    arrived: u64,
}

impl Scaled {
    fn wants(&self) -> usize {
        self.loads.iter().map(|load| load.wants()).sum()
    }

    fn arrived(&self) -> u64 {
        self.loads.iter().map(|load| load.arrived()).sum()
    }

    fn hold_if_idle(&self) -> bool {
        let held = self.loads.iter().all(|load| load.hold_if_idle());
        if !held {
            self.release();
        }
        held
    }

    fn release(&self) {
        self.loads.iter().for_each(|load| load.release());
    }

    /// It is scaled by requests no longer.
    fn leave(&self) {
        self.loads.iter().for_each(|load| load.manage(false));
        self.release();
    }
}

/// One whose number of pods is not fixed. A function serves as many requests as it may with one pod.
fn is_scalable(revision: &Object, rules: &Rules) -> bool {
    let fixed = rules.min > 0 && (rules.max == rules.min || revision.str_at("/spec/runtimeClassName") == "wasm");
    revision.label(ROUTING_STATE) == Some("active") && !revision.is_deleting() && !fixed
}

impl Autoscaler {
    /// A revision or a Service changed: what leads to the namespace's revisions is looked up anew.
    fn changed(&mut self, change: &Change) {
        match change {
            Change::Everything => {
                let mut namespaces: Vec<String> =
                    self.revisions.list().iter().map(|revision| revision.namespace().to_owned()).collect();
                namespaces.sort();
                namespaces.dedup();
                self.scaled.retain(|key, _| namespaces.iter().any(|namespace| *namespace == *key.namespace));
                namespaces.iter().for_each(|namespace| self.look_up(namespace));
            }
            Change::Object { old, new, .. } => {
                if let Some(object) = new.as_ref().or(old.as_ref()) {
                    let namespace = object.namespace().to_owned();
                    self.look_up(&namespace);
                }
            }
        }
    }

    fn look_up(&mut self, namespace: &str) {
        let now = self.context.now();
        let revisions = self.revisions.list_in(namespace);
        self.scaled.retain(|key, scaled| {
            let still = |r: &SharedObject| r.name() == &*key.name && r.uid() == scaled.uid;
            let stays = &*key.namespace != namespace || revisions.iter().any(still);
            if !stays {
                scaled.leave();
            }
            stays
        });
        if revisions.is_empty() {
            return;
        }
        let services = self.services.list_in(namespace);
        for revision in revisions {
            let rules = Rules::of(&revision);
            let key = Key::of(&revision);
            if !is_scalable(&revision, &rules) {
                if let Some(gone) = self.scaled.remove(&key) {
                    gone.leave();
                }
                continue;
            }
            let demand = &self.context.config.demand;
            let loads: Vec<Arc<Load>> = services
                .iter()
                .filter(|service| leads_to(service, &revision))
                .map(|service| demand.of(namespace, service.name()))
                .collect();
            loads.iter().for_each(|load| load.manage(true));
            let scaled = self.scaled.entry(key).or_insert_with(|| Scaled {
                uid: revision.uid().to_owned(),
                rules: rules.clone(),
                sleep: None,
                sleeps: false,
                loads: Vec::new(),
                history: History::begin(now),
                sampled: 0,
                arrived: 0,
            });
            scaled.rules = rules;
            scaled.sleep = sleep_of(&revision);
            scaled.loads = loads;
            scaled.arrived = scaled.arrived.max(scaled.arrived());
        }
    }

    async fn sample(&mut self) {
        self.samples += 1;
        let decide = self.samples.is_multiple_of(SAMPLES);
        let now = self.context.now();
        let mut changes = Vec::new();
        for (key, scaled) in &mut self.scaled {
            scaled.sampled += scaled.wants();
            if !decide {
                continue;
            }
            let concurrency = std::mem::take(&mut scaled.sampled) as f64 / f64::from(SAMPLES);
            let arrived = scaled.arrived();
            let came = arrived.saturating_sub(std::mem::replace(&mut scaled.arrived, arrived));
            scaled.history.record(&scaled.rules, now, concurrency, came);
            let Some(deployment) = deployment(&self.deployments, key) else { continue };
            let there = int(&deployment, "/spec/replicas").unwrap_or(0);
            if there == 0 || scaled.sleeps || pods_asleep(&deployment).is_some() {
                continue;
            }
            let ready = int(&deployment, "/status/availableReplicas").unwrap_or(0);
            // One that is still starting is not judged yet.
            let wanted = scaled.history.decide(&scaled.rules, now, if ready == 0 { there } else { ready });
            if wanted == there || (wanted == 0 && !scaled.hold_if_idle()) {
                continue;
            }
            let asleep = scaled.sleep.filter(|_| wanted == 0);
            scaled.sleeps = asleep.is_some();
            changes.push((key.clone(), wanted.max(i64::from(scaled.sleeps)), asleep));
        }
        for (key, wanted, asleep) in changes {
            let done = self.set(&key, wanted, asleep).await;
            if !done && let Some(scaled) = self.scaled.get_mut(&key) {
                scaled.sleeps = false;
                scaled.release();
            }
        }
    }

    /// Requests wait: whoever has no pods gets some.
    async fn wake(&mut self) {
        let mut changes = Vec::new();
        for (key, scaled) in &mut self.scaled {
            let waiting: usize = scaled.loads.iter().map(|load| load.waiting()).sum();
            if waiting == 0 {
                continue;
            }
            let Some(deployment) = deployment(&self.deployments, key) else { continue };
            if int(&deployment, "/spec/replicas") == Some(0) || scaled.sleeps || pods_asleep(&deployment).is_some() {
                scaled.history = History::begin(self.context.now());
                changes.push((key.clone(), scaled.rules.within(1)));
            } else if pod_is_ready(&self.pods, key, &scaled.uid) {
                scaled.release();
            }
        }
        for (key, wanted) in changes {
            let woken = self.set(&key, wanted.max(1), None).await;
            if let Some(scaled) = self.scaled.get_mut(&key).filter(|_| woken) {
                scaled.sleeps = false;
            }
        }
    }

    /// A pod became ready: requests that were held back for it go on.
    fn let_go(&self, change: &Change) {
        let Change::Object { new: Some(pod), .. } = change else { return };
        let Some(revision) = pod.label(super::REVISION) else { return };
        let key = Key::new(pod.namespace(), revision);
        let Some(scaled) = self.scaled.get(&key).filter(|scaled| scaled.loads.iter().any(|load| load.is_held())) else {
            return;
        };
        let deployment = deployment(&self.deployments, &key);
        let wanted = deployment.as_ref().and_then(|d| int(d, "/spec/replicas")).unwrap_or(0);
        let sleeps = scaled.sleeps || deployment.is_some_and(|d| pods_asleep(&d).is_some());
        if wanted > 0 && !sleeps && is_ready(pod) {
            scaled.release();
        }
    }

    /// Whether the Deployment has that many now.
    async fn set(&self, key: &Key, replicas: i64, asleep: Option<Sleep>) -> bool {
        let name = child_name(&key.name, "-deployment");
        let annotations = json!({ASLEEP: asleep.map(Sleep::word)});
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}, "spec": {"replicas": replicas}}));
        match self.context.client.patch(&DEPLOYMENTS, &key.namespace, &name, "", patch).await {
            Ok(_) => true,
            Err(error) => {
                if !is_race(&error) {
                    tracing::warn!(revision = %key, %error, "cannot be scaled");
                }
                false
            }
        }
    }
}

fn deployment(deployments: &Informer, key: &Key) -> Option<SharedObject> {
    deployments.get(&key.namespace, &child_name(&key.name, "-deployment"))
}

/// The revision's own Service, those of its Route with it alone, and that of a Route that shares requests among several.
fn leads_to(service: &Object, revision: &Object) -> bool {
    match service.pointer("/spec/selector").and_then(|selector| selector.get(REVISION_UID)) {
        Some(uid) => uid == revision.uid(),
        None => {
            service.label(ROUTE).is_some()
                && service.label(SERVICE).is_some()
                && service.label(SERVICE) == revision.label(SERVICE)
        }
    }
}

fn is_ready(pod: &Object) -> bool {
    !pod.is_deleting() && pod.annotation(ASLEEP).is_none() && condition_status(pod, "Ready") == "True"
}

fn pod_is_ready(pods: &Informer, key: &Key, uid: &str) -> bool {
    pods.list_in(&key.namespace).iter().any(|pod| pod.label(REVISION_UID) == Some(uid) && is_ready(pod))
}
