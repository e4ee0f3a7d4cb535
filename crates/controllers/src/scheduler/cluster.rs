//! The scheduler's picture of the cluster: nodes, and what is placed on each. Kept up to date change by change.

use super::demand::{Amounts, HostPort, host_ports, requests};
use crate::objects::has_ended;
use api::object::{Meta, SharedObject, child, object_of};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A pod on a node.
pub(super) struct Placed {
    pub pod: SharedObject,
    pub requests: Amounts,
    pub ports: Vec<HostPort>,
    /// Whether it keeps others away: `spec.affinity.podAntiAffinity` is there.
    pub repels: bool,
}

#[derive(Default)]
pub(super) struct Node {
    pub name: String,
    /// Absent while pods name a node that is not there.
    pub object: Option<SharedObject>,
    pub allocatable: Amounts,
    pub requested: Amounts,
    pub pods: HashMap<String, Placed>,
}

#[derive(Default)]
pub(super) struct Cluster {
    nodes: BTreeMap<String, Node>,
    /// Pod uid to node.
    places: HashMap<String, String>,
}

impl Node {
    pub fn label(&self, key: &str) -> Option<&str> {
        self.object.as_deref()?.label(key)
    }

    pub fn labels(&self) -> &Value {
        self.object.as_deref().and_then(|node| node.pointer("/metadata/labels")).unwrap_or(&Value::Null)
    }
}

impl Cluster {
    /// Begins anew, but keeps what was assumed and is not contradicted.
    pub fn replace(&mut self, nodes: &[SharedObject], pods: &[SharedObject]) {
        let assumed: Vec<(SharedObject, String)> = self
            .nodes
            .values()
            .flat_map(|node| node.pods.values().map(|placed| (placed.pod.clone(), node.name.clone())))
            .filter(|(pod, _)| pods.iter().any(|known| known.uid() == pod.uid() && !has_ended(known)))
            .collect();
        *self = Cluster::default();
        nodes.iter().for_each(|node| self.put_node(node));
        for pod in pods.iter().filter(|pod| !has_ended(pod) && !pod.str_at("/spec/nodeName").is_empty()) {
            self.put_pod(pod);
        }
        for (pod, node) in assumed {
            if !self.has_pod(pod.uid()) {
                self.assume(&pod, &node);
            }
        }
    }

    /// Nodes that are there.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| node.object.is_some())
    }

    fn node(&mut self, name: &str) -> &mut Node {
        self.nodes.entry(name.to_owned()).or_insert_with(|| Node { name: name.to_owned(), ..Node::default() })
    }

    pub fn put_node(&mut self, object: &SharedObject) {
        let node = self.node(object.name());
        node.allocatable = Amounts::of(object.pointer("/status/allocatable"));
        node.object = Some(Arc::clone(object));
    }

    pub fn remove_node(&mut self, name: &str) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.object = None;
        if node.pods.is_empty() {
            self.nodes.remove(name);
        }
    }

    pub fn has_pod(&self, uid: &str) -> bool {
        self.places.contains_key(uid)
    }

    pub fn put_pod(&mut self, pod: &SharedObject) {
        self.remove_pod(pod.uid());
        let name = pod.str_at("/spec/nodeName");
        let placed = Placed {
            requests: requests(pod, None),
            ports: host_ports(pod),
            repels: pod.pointer("/spec/affinity/podAntiAffinity").is_some(),
            pod: Arc::clone(pod),
        };
        let node = self.node(name);
        node.requested.add(&placed.requests);
        node.pods.insert(pod.uid().to_owned(), placed);
        self.places.insert(pod.uid().to_owned(), name.to_owned());
    }

    /// True if it was placed.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        let Some(name) = self.places.remove(uid) else { return false };
        let Some(node) = self.nodes.get_mut(&name) else { return false };
        let Some(placed) = node.pods.remove(uid) else { return false };
        node.requested.take(&placed.requests);
        if node.pods.is_empty() && node.object.is_none() {
            self.nodes.remove(&name);
        }
        true
    }

    /// Counts a pod as placed that has just been bound.
    pub fn assume(&mut self, pod: &SharedObject, node: &str) {
        let mut bound = (**pod).clone();
        child(object_of(&mut bound), "spec").insert("nodeName".into(), node.into());
        self.put_pod(&Arc::new(bound));
    }
}
