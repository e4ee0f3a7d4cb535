//! The scheduler: gives each pod without a node the one that suits it best.
//!
//! One task owns the picture of the cluster ([`cluster::Cluster`]) and takes pods one after the other: `filter` says which
//! nodes are possible, `score` which is best, then it binds and counts the pod as placed at once. A pod for which there
//! is no node waits until something happens that could help, or a minute.

mod affinity;
mod cluster;
mod demand;
mod filter;
mod score;
#[cfg(test)]
mod tests;

use crate::context::{Context, NODES, PODS, RUNTIME_CLASSES};
use crate::objects::{condition_status, has_ended, list};
use crate::queue::Queue;
use api::client::Patch;
use api::informer::{Change, Informer, Key};
use api::object::{Meta, Object, SharedObject};
use api::status::{Reason, StatusResult};
use cluster::Cluster;
use demand::Demand;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

const COMPONENT: &str = "default-scheduler";
/// A pod that fits nowhere is looked at again after this time, whatever happens.
const RETRY: Duration = Duration::from_secs(60);

pub(crate) async fn run(context: Arc<Context>) {
    let informers = &context.informers;
    let (pods, nodes) = (informers.of(&PODS), informers.of(&NODES));
    let classes = informers.of(&RUNTIME_CLASSES);
    let (mut pod_changes, mut node_changes) = (pods.subscribe(), nodes.subscribe());
    for informer in [&pods, &nodes, &classes] {
        informer.synced().await;
    }
    let scheduler = Scheduler { cluster: Cluster::default(), queue: Queue::default(), stuck: HashSet::new() };
    let mut scheduler = Running { context: Arc::clone(&context), pods, nodes, classes, scheduler };
    scheduler.look_at_everything();
    loop {
        tokio::select! {
            biased;
            change = node_changes.next() => scheduler.node_changed(change),
            change = pod_changes.next() => scheduler.pod_changed(change),
            key = scheduler.scheduler.queue.next() => scheduler.take(&key).await,
        }
    }
}

struct Scheduler {
    cluster: Cluster,
    queue: Queue<Key>,
    /// Pods that fit nowhere at the moment.
    stuck: HashSet<Key>,
}

struct Running {
    context: Arc<Context>,
    pods: Informer,
    nodes: Informer,
    classes: Informer,
    scheduler: Scheduler,
}

/// Whether this scheduler has to find a node for the pod now.
fn wants_node(pod: &Object) -> bool {
    pod.str_at("/spec/nodeName").is_empty()
        && !pod.is_deleting()
        && !has_ended(pod)
        && matches!(pod.str_at("/spec/schedulerName"), "" | COMPONENT)
        && list(pod, "/spec/schedulingGates").is_empty()
}

impl Running {
    fn look_at_everything(&mut self) {
        let cluster = &mut self.scheduler.cluster;
        cluster.replace(&self.nodes.list(), &self.pods.list());
        for pod in self.pods.list().iter().filter(|pod| wants_node(pod)) {
            self.scheduler.queue.add(Key::of(pod));
        }
    }

    fn node_changed(&mut self, change: Change) {
        let Change::Object { old, new, .. } = change else { return self.look_at_everything() };
        match &new {
            Some(node) => self.scheduler.cluster.put_node(node),
            None => old.iter().for_each(|node| self.scheduler.cluster.remove_node(node.name())),
        }
        // A heartbeat helps nobody.
        let matters = |node: &SharedObject| {
            let part = |pointer: &str| node.pointer(pointer).cloned();
            [part("/spec"), part("/metadata/labels"), part("/status/allocatable")]
        };
        if old.as_ref().map(matters) != new.as_ref().map(matters) {
            self.scheduler.unstick();
        }
    }

    fn pod_changed(&mut self, change: Change) {
        let Change::Object { key, old, new } = change else { return self.look_at_everything() };
        let cluster = &mut self.scheduler.cluster;
        let placed = new.as_ref().filter(|pod| !has_ended(pod) && !pod.str_at("/spec/nodeName").is_empty());
        match placed {
            Some(pod) => cluster.put_pod(pod),
            None => {
                let freed = old.as_ref().is_some_and(|old| cluster.remove_pod(old.uid()));
                if freed {
                    self.scheduler.unstick();
                }
            }
        }
        match &new {
            Some(pod) if wants_node(pod) => {
                // What the scheduler itself wrote into the status is no news.
                let news = old.as_ref().is_none_or(|old| {
                    old.get("spec") != pod.get("spec")
                        || old.pointer("/metadata/labels") != pod.pointer("/metadata/labels")
                });
                if news {
                    self.scheduler.queue.add(key);
                }
            }
            Some(pod) => {
                self.scheduler.stuck.remove(&key);
                // Others may have been waiting for a pod like this one to be there.
                if old.is_none_or(|old| old.str_at("/spec/nodeName").is_empty())
                    && !pod.str_at("/spec/nodeName").is_empty()
                {
                    self.scheduler.unstick_affine(&self.pods);
                }
            }
            None => drop(self.scheduler.stuck.remove(&key)),
        }
    }

    async fn take(&mut self, key: &Key) {
        let outcome = self.place(key).await;
        let queue = &self.scheduler.queue;
        match outcome {
            Ok(again) => queue.done(key, false, again),
            Err(error) if matches!(error.reason, Reason::Conflict | Reason::NotFound) => queue.done(key, true, None),
            Err(error) => {
                tracing::warn!(pod = %key, %error, "scheduling failed, trying again");
                queue.done(key, true, None);
            }
        }
    }

    async fn place(&mut self, key: &Key) -> StatusResult<Option<Duration>> {
        self.scheduler.stuck.remove(key);
        let Some(pod) = self.pods.get_key(key).filter(|pod| wants_node(pod)) else { return Ok(None) };
        if self.scheduler.cluster.has_pod(pod.uid()) {
            // Bound a moment ago; the informer does not show it yet.
            return Ok(None);
        }
        tracing::trace!(target: "controllers::steps", pod = pod.name(), step = "scheduler");
        let class = self.classes.get("", pod.str_at("/spec/runtimeClassName"));
        let demand = Demand::of(&pod, class.as_deref());
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        let cluster = &self.scheduler.cluster;
        let filter = filter::Filter::new(cluster, &demand);
        let mut possible = Vec::new();
        for node in cluster.nodes() {
            match filter.check(node) {
                Ok(()) => possible.push(node),
                Err(why) => why.into_iter().for_each(|why| *reasons.entry(why).or_default() += 1),
            }
        }
        let Some(best) = score::best(cluster, &demand, &possible) else {
            let total = cluster.nodes().count();
            self.scheduler.stuck.insert(key.clone());
            self.refuse(&pod, total, &reasons).await?;
            return Ok(Some(RETRY));
        };
        let name = best.name.clone();
        self.context.client.bind(pod.namespace(), pod.name(), pod.uid(), &name).await?;
        tracing::trace!(target: "controllers::steps", pod = pod.name(), step = "binding");
        self.scheduler.cluster.assume(&pod, &name);
        let message = format!("Successfully assigned {key} to {name}");
        self.context.events.normal(COMPONENT, &pod, "Scheduled", message);
        Ok(None)
    }

    async fn refuse(&self, pod: &SharedObject, nodes: usize, reasons: &BTreeMap<String, usize>) -> StatusResult<()> {
        let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        parts.sort();
        let message = match nodes {
            0 => "no nodes available to schedule pods".to_owned(),
            _ => format!("0/{nodes} nodes are available: {}.", parts.join(", ")),
        };
        self.context.events.warning(COMPONENT, pod, "FailedScheduling", message.clone());
        let known = list(pod, "/status/conditions").iter().find(|c| c.str_at("/type") == "PodScheduled");
        if known.is_some_and(|known| known.str_at("/status") == "False" && known.str_at("/message") == message) {
            return Ok(());
        }
        let mut conditions: Vec<Value> = list(pod, "/status/conditions").to_vec();
        let since = match condition_status(pod, "PodScheduled") {
            "False" => known.map_or("", |known| known.str_at("/lastTransitionTime")).to_owned(),
            _ => self.context.timestamp(),
        };
        conditions.retain(|condition| condition.str_at("/type") != "PodScheduled");
        conditions.push(json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                               "message": message, "lastProbeTime": null, "lastTransitionTime": since}));
        let patch = json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": conditions}});
        let (namespace, name) = (pod.namespace(), pod.name());
        self.context.client.patch(&PODS, namespace, name, "status", Patch::Merge(patch)).await.map(drop)
    }
}

impl Scheduler {
    /// Something got free: all that wait try again.
    fn unstick(&mut self) {
        self.stuck.drain().for_each(|key| self.queue.add(key));
    }

    fn unstick_affine(&mut self, pods: &Informer) {
        let queue = &self.queue;
        self.stuck.retain(|key| {
            let affine = pods.get_key(key).is_some_and(|pod| pod.pointer("/spec/affinity/podAffinity").is_some());
            if affine {
                queue.add(key.clone());
            }
            !affine
        });
    }
}
