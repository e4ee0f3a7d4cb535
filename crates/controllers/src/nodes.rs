//! Nodes: one that no longer renews its lease is not trusted; taints follow its conditions, so that the scheduler avoids
//! it. Pods are not moved. And pods: those that ended long ago, or whose node is gone, are removed.

use crate::context::{Condition, Context, LEASES, NODES, PODS, set_condition};
use crate::objects::{condition, condition_status, flag, has_ended, list};
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::DeleteOptions;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const LEASE_NAMESPACE: &str = "kube-node-lease";
const CONDITIONS: &[&str] = &["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const CLOSED: &str = "node.kubernetes.io/unschedulable";

/// A sign of life and when it was first seen here: the node's own clock is not believed.
struct Seen {
    sign: String,
    at: i64,
}

pub(crate) struct Nodes {
    context: Arc<Context>,
    nodes: Informer,
    leases: Informer,
    seen: Mutex<HashMap<Key, Seen>>,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (nodes, leases) = (context.informers.of(&NODES), context.informers.of(&LEASES));
    let lease = Source::new(leases.clone(), |lease| match lease.namespace() {
        LEASE_NAMESPACE => vec![Key::new("", lease.name())],
        _ => Vec::new(),
    });
    let sources = vec![Source::own(nodes.clone()), lease];
    (Arc::new(Nodes { context: Arc::clone(context), nodes, leases, seen: Mutex::default() }), sources)
}

#[async_trait]
impl Reconcile for Nodes {
    fn name(&self) -> &'static str {
        "node-lifecycle-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(node) = self.nodes.get_key(key) else {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            return Ok(None);
        };
        let left = self.left(key, &node);
        let node = match left {
            Some(left) if left <= 0 => self.distrust(&node).await?,
            _ => node,
        };
        self.taint(&node).await?;
        Ok(left.map(|left| Duration::from_secs(u64::try_from(left.max(1)).unwrap_or(1))))
    }
}

impl Nodes {
    /// Seconds for which the node is still trusted. `None` for one that never gave a sign of life: a node somebody made
    /// by hand.
    fn left(&self, key: &Key, node: &SharedObject) -> Option<i64> {
        let lease = self.leases.get(LEASE_NAMESPACE, node.name());
        let renewed = lease.as_ref().map_or("", |lease| lease.str_at("/spec/renewTime"));
        let ready = node.get("status").and_then(|status| condition(status, "Ready"));
        let beat = ready.map_or("", |ready| ready.str_at("/lastHeartbeatTime"));
        if renewed.is_empty() && beat.is_empty() {
            return None;
        }
        // What is written here when a node is no longer trusted is no sign of life of its own.
        let beat = if condition_status(node, "Ready") == "Unknown" { "" } else { beat };
        let sign = format!("{renewed} {beat}");
        let now = self.context.now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = seen.entry(key.clone()).or_insert_with(|| Seen { sign: sign.clone(), at: now });
        if seen.sign != sign && !(beat.is_empty() && seen.sign.starts_with(&format!("{renewed} "))) {
            *seen = Seen { sign, at: now };
        }
        Some(seen.at + self.context.config.node_grace_seconds - now)
    }

    async fn distrust(&self, node: &SharedObject) -> StatusResult<SharedObject> {
        let mut status = node.get("status").cloned().unwrap_or_else(|| json!({}));
        for kind in CONDITIONS {
            let beat = condition(&status, kind).and_then(|old| old.get("lastHeartbeatTime")).cloned();
            let reason = if beat.is_some() { "NodeStatusUnknown" } else { "NodeStatusNeverUpdated" };
            let message = match beat {
                Some(_) => "Kubelet stopped posting node status.",
                None => "Kubelet never posted node status.",
            };
            let new = Condition { kind, status: "Unknown", reason, message };
            let extra: Vec<(&str, Value)> = beat.into_iter().map(|beat| ("lastHeartbeatTime", beat)).collect();
            set_condition(&mut status, new, &self.context.timestamp(), &extra);
        }
        if node.get("status") == Some(&status) {
            return Ok(Arc::clone(node));
        }
        let message = format!("Node {} status is now: NodeNotReady", node.name());
        self.context.events.normal("node-controller", node, "NodeNotReady", message);
        let mut new = (**node).clone();
        object_of(&mut new).insert("status".into(), status);
        self.context.client.update_status(&NODES, "", new).await
    }

    async fn taint(&self, node: &SharedObject) -> StatusResult<()> {
        let ready = condition_status(node, "Ready");
        let wanted = [
            (NOT_READY, "NoSchedule", ready == "False"),
            (NOT_READY, "NoExecute", ready == "False"),
            (UNREACHABLE, "NoSchedule", ready == "Unknown"),
            (UNREACHABLE, "NoExecute", ready == "Unknown"),
            (CLOSED, "NoSchedule", flag(node, "/spec/unschedulable")),
        ];
        let old = list(node, "/spec/taints");
        let mut taints: Vec<Value> = old.to_vec();
        for (key, effect, on) in wanted {
            let is = |taint: &Value| taint.str_at("/key") == key && taint.str_at("/effect") == effect;
            if !on {
                taints.retain(|taint| !is(taint));
            } else if !taints.iter().any(is) {
                taints.push(json!({"key": key, "effect": effect, "timeAdded": self.context.timestamp()}));
            }
        }
        if taints == old {
            return Ok(());
        }
        let mut new = (**node).clone();
        let spec = child(object_of(&mut new), "spec");
        match taints.is_empty() {
            true => drop(spec.remove("taints")),
            false => drop(spec.insert("taints".into(), taints.into())),
        }
        self.context.write(&NODES, node, new).await.map(drop)
    }
}

/// Removes pods that have no future.
pub(crate) struct EndedPods {
    context: Arc<Context>,
    pods: Informer,
    nodes: Informer,
    /// Since when a node that pods name has been missing.
    missing: Mutex<HashMap<String, i64>>,
}

pub(crate) fn ended_pods(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (pods, nodes) = (context.informers.of(&PODS), context.informers.of(&NODES));
    let one = |_: &Object| vec![Key::new("", "all")];
    let ended = |old: Option<&Object>, new: Option<&Object>| {
        new.is_some_and(|new| has_ended(new) && !old.is_some_and(has_ended))
    };
    let gone = |_: Option<&Object>, new: Option<&Object>| new.is_none();
    let sources = vec![Source::new(pods.clone(), one).filtered(ended), Source::new(nodes.clone(), one).filtered(gone)];
    (Arc::new(EndedPods { context: Arc::clone(context), pods, nodes, missing: Mutex::default() }), sources)
}

#[async_trait]
impl Reconcile for EndedPods {
    fn name(&self) -> &'static str {
        "pod-garbage-collector"
    }

    async fn reconcile(&self, _: &Key) -> StatusResult<Again> {
        let pods = self.pods.list();
        let mut ended: Vec<SharedObject> =
            pods.iter().filter(|pod| has_ended(pod) && !pod.is_deleting()).cloned().collect();
        let surplus = ended.len().saturating_sub(self.context.config.ended_pods);
        crate::objects::by_age(&mut ended);
        for pod in ended.iter().take(surplus) {
            self.remove(pod).await?;
        }
        let (lost, waiting) = self.lost(&pods);
        for pod in &lost {
            self.remove(pod).await?;
        }
        Ok(waiting.then(|| Duration::from_secs(u64::try_from(self.context.config.node_grace_seconds).unwrap_or(40))))
    }
}

impl EndedPods {
    /// Pods whose node has been gone for a while, and whether others may become such.
    fn lost(&self, pods: &[SharedObject]) -> (Vec<SharedObject>, bool) {
        let now = self.context.now();
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        missing.retain(|name, _| self.nodes.get("", name).is_none());
        let mut lost = Vec::new();
        for pod in pods {
            let node = pod.str_at("/spec/nodeName");
            if node.is_empty() || self.nodes.get("", node).is_some() {
                continue;
            }
            let since = *missing.entry(node.to_owned()).or_insert(now);
            if since + self.context.config.node_grace_seconds <= now {
                lost.push(Arc::clone(pod));
            }
        }
        (lost, !missing.is_empty())
    }

    async fn remove(&self, pod: &SharedObject) -> StatusResult<()> {
        let options =
            DeleteOptions { grace_period_seconds: Some(0), uid: Some(pod.uid().to_owned()), ..Default::default() };
        match self.context.client.delete(&PODS, pod.namespace(), pod.name(), &options).await {
            Err(error) if !is_race(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::testing::World;
    use api::client::{Client, Patch};
    use std::sync::atomic::Ordering;

    fn node(name: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {},
               "status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2024-01-01T00:00:00Z"}]}})
    }

    fn lease(name: &str, renewed: &str) -> Value {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
               "metadata": {"name": name, "namespace": LEASE_NAMESPACE}, "spec": {"renewTime": renewed}})
    }

    async fn wait_node(world: &World, test: impl Fn(&Object) -> bool) {
        world.wait_all(&NODES, |nodes| nodes.iter().any(|node| test(node))).await;
    }

    fn tainted(node: &Object, key: &str) -> bool {
        list(node, "/spec/taints").iter().any(|taint| taint.str_at("/key") == key)
    }

    #[tokio::test]
    async fn silence_is_noticed_and_forgiven() {
        let world = World::new().await;
        world.client.put(&LEASES, lease("n", "2024-01-01T00:00:00.000000Z"));
        world.client.create(&NODES, "", node("n")).await.unwrap();
        let by_hand = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "by-hand"}, "spec": {}});
        world.client.create(&NODES, "", by_hand).await.unwrap();
        let label = |value: &str| Patch::Merge(json!({"metadata": {"labels": {"look": value}}}));
        world.client.patch(&NODES, "", "n", "", label("1")).await.unwrap();
        wait_node(&world, |node| node.label("look") == Some("1")).await;
        // Seen once before time goes on.
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.now.fetch_add(41, Ordering::Relaxed);
        world.client.patch(&NODES, "", "n", "", label("2")).await.unwrap();
        wait_node(&world, |node| {
            condition_status(node, "Ready") == "Unknown" && tainted(node, UNREACHABLE) && node.name() == "n"
        })
        .await;
        world.client.put(&LEASES, lease("n", "2024-01-01T00:01:00.000000Z"));
        let alive = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2024-01-01T00:01:00Z"}]}});
        world.client.patch(&NODES, "", "n", "status", Patch::Merge(alive)).await.unwrap();
        wait_node(&world, |node| {
            node.name() == "n" && condition_status(node, "Ready") == "True" && !tainted(node, UNREACHABLE)
        })
        .await;
        let by_hand = world.client.get(&NODES, "", "by-hand").await.unwrap();
        assert_eq!(condition_status(&by_hand, "Ready"), "");
    }

    #[tokio::test]
    async fn taints_follow_conditions_and_cordons() {
        let world = World::new().await;
        world.client.create(&NODES, "", node("n")).await.unwrap();
        let not_ready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        world.client.patch(&NODES, "", "n", "status", Patch::Merge(not_ready)).await.unwrap();
        wait_node(&world, |node| tainted(node, NOT_READY)).await;
        let cordon = json!({"spec": {"unschedulable": true}});
        world.client.patch(&NODES, "", "n", "", Patch::Merge(cordon)).await.unwrap();
        wait_node(&world, |node| tainted(node, CLOSED) && tainted(node, NOT_READY)).await;
        let uncordon = json!({"spec": {"unschedulable": null}});
        world.client.patch(&NODES, "", "n", "", Patch::Merge(uncordon)).await.unwrap();
        wait_node(&world, |node| !tainted(node, CLOSED)).await;
    }

    fn pod(name: &str, node: &str, phase: &str, age: i64) -> Value {
        let created = api::time::rfc3339(api::time::now() - age);
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "x", "creationTimestamp": created},
               "spec": {"nodeName": node}, "status": {"phase": phase}})
    }

    #[tokio::test]
    async fn ended_and_lost_pods_go() {
        let world = World::with(Config { ended_pods: 2, ..Config::default() }).await;
        world.client.create(&NODES, "", node("n")).await.unwrap();
        world.client.create(&NODES, "", node("gone")).await.unwrap();
        for (name, age) in [("old", 50), ("older", 90), ("young", 10), ("younger", 5)] {
            world.client.put(&PODS, pod(name, "n", "Succeeded", age));
        }
        world.client.put(&PODS, pod("runs", "n", "Running", 500));
        world.client.put(&PODS, pod("lost", "gone", "Running", 500));
        let names = |pods: &[SharedObject]| pods.iter().map(|pod| pod.name().to_owned()).collect::<Vec<_>>();
        world.wait_all(&PODS, |pods| names(pods) == ["lost", "runs", "young", "younger"]).await;
        world.client.delete(&NODES, "", "gone", &DeleteOptions::default()).await.unwrap();
        // The time it is missing counts from when that was seen.
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.now.fetch_add(41, Ordering::Relaxed);
        world.client.put(&PODS, pod("last", "n", "Failed", 1));
        world.wait_all(&PODS, |pods| names(pods) == ["last", "runs", "younger"]).await;
    }
}
