//! Which nodes are possible for a pod, and for the others why not, in Kubernetes' words.

use super::affinity::{Term, node_matches, required};
use super::cluster::{Cluster, Node};
use super::demand::Demand;
use crate::objects::{flag, int, list};
use api::object::Meta;
use api::selector::Selector;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const MAX_PODS: i64 = 110;

pub(super) struct Filter<'a> {
    cluster: &'a Cluster,
    demand: &'a Demand<'a>,
    near: Vec<Term>,
    apart: Vec<Term>,
    /// Terms of placed pods that keep this one away, with the node they are on.
    repelling: Vec<(Term, &'a Node)>,
    spread: Vec<Spread>,
}

/// A `DoNotSchedule` topology spread constraint with what is there now.
struct Spread {
    key: String,
    skew: i64,
    own: i64,
    counts: BTreeMap<String, i64>,
}

impl<'a> Filter<'a> {
    pub fn new(cluster: &'a Cluster, demand: &'a Demand<'a>) -> Filter<'a> {
        let mut repelling = Vec::new();
        for node in cluster.nodes() {
            for placed in node.pods.values().filter(|placed| placed.repels) {
                for term in required(&placed.pod, "podAntiAffinity") {
                    if term.matches(demand.pod) {
                        repelling.push((term, node));
                    }
                }
            }
        }
        Filter {
            cluster,
            demand,
            near: required(demand.pod, "podAffinity"),
            apart: required(demand.pod, "podAntiAffinity"),
            repelling,
            spread: list(demand.pod, "/spec/topologySpreadConstraints")
                .iter()
                .filter(|constraint| constraint.str_at("/whenUnsatisfiable") != "ScheduleAnyway")
                .map(|constraint| Spread::of(cluster, demand, constraint))
                .collect(),
        }
    }

    /// The first check that fails tells its reasons.
    pub fn check(&self, node: &Node) -> Result<(), Vec<String>> {
        let Some(object) = node.object.as_deref() else { return Err(vec!["node(s) were gone".into()]) };
        let no = |why: &str| Err(vec![why.to_owned()]);
        let closed = json!({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"});
        if flag(object, "/spec/unschedulable") && !self.demand.tolerates(&closed) {
            return no("node(s) were unschedulable");
        }
        if let Some(taint) = self.untolerated(object) {
            let (key, value) = (taint.str_at("/key"), taint.str_at("/value"));
            return Err(vec![format!("node(s) had untolerated taint {{{key}: {value}}}")]);
        }
        if !selected(self.demand, node) {
            return no("node(s) didn't match Pod's node affinity/selector");
        }
        let taken = |ours: &super::demand::HostPort| {
            node.pods.values().any(|placed| placed.ports.iter().any(|theirs| theirs.conflicts(ours)))
        };
        if self.demand.ports.iter().any(taken) {
            return no("node(s) didn't have free ports for the requested pod ports");
        }
        self.fits(node)?;
        if self.spread.iter().any(|spread| !spread.allows(node)) {
            return no("node(s) didn't match pod topology spread constraints");
        }
        if self.repelling.iter().any(|(term, other)| term.joins(other, node)) {
            return no("node(s) didn't satisfy existing pods anti-affinity rules");
        }
        if self.apart.iter().any(|term| term.count_near(self.cluster, node) > 0) {
            return no("node(s) didn't match pod anti-affinity rules");
        }
        if !self.near.iter().all(|term| self.is_near(term, node)) {
            return no("node(s) didn't match pod affinity rules");
        }
        Ok(())
    }

    fn untolerated<'n>(&self, node: &'n Value) -> Option<&'n Value> {
        list(node, "/spec/taints").iter().find(|taint| {
            matches!(taint.str_at("/effect"), "NoSchedule" | "NoExecute") && !self.demand.tolerates(taint)
        })
    }

    fn fits(&self, node: &Node) -> Result<(), Vec<String>> {
        let mut why = Vec::new();
        let room = node.allocatable.0.get("pods").copied().unwrap_or(MAX_PODS);
        if i64::try_from(node.pods.len()).unwrap_or(i64::MAX) >= room {
            why.push("Too many pods".to_owned());
        }
        for (name, wanted) in self.demand.requests.0.iter().filter(|(_, wanted)| **wanted > 0) {
            if node.requested.get(name).saturating_add(*wanted) > node.allocatable.get(name) {
                why.push(format!("Insufficient {name}"));
            }
        }
        if why.is_empty() { Ok(()) } else { Err(why) }
    }

    /// The first pod of a group that wants to be together may be anywhere.
    fn is_near(&self, term: &Term, node: &Node) -> bool {
        if node.label(&term.topology).is_none() {
            return false;
        }
        term.count_near(self.cluster, node) > 0 || (term.matches(self.demand.pod) && !term.any(self.cluster))
    }
}

/// Labels that the pod, its runtime class and its required node affinity ask for.
fn selected(demand: &Demand<'_>, node: &Node) -> bool {
    if !demand.selector.iter().all(|(key, value)| node.label(key) == Some(value)) {
        return false;
    }
    let required = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    match demand.pod.pointer(required) {
        Some(required) => list(required, "/nodeSelectorTerms").iter().any(|term| node_matches(term, node)),
        None => true,
    }
}

impl Spread {
    fn of(cluster: &Cluster, demand: &Demand<'_>, constraint: &Value) -> Spread {
        let key = constraint.str_at("/topologyKey").to_owned();
        let selector = Selector::from_object(constraint.get("labelSelector").unwrap_or(&Value::Null))
            .unwrap_or_else(|_| Selector::nothing());
        let mut counts: BTreeMap<String, i64> = BTreeMap::new();
        for node in cluster.nodes().filter(|node| selected(demand, node)) {
            let Some(domain) = node.label(&key) else { continue };
            let counted = |pod: &Value| {
                pod.namespace() == demand.pod.namespace() && !pod.is_deleting() && selector.matches_object(pod)
            };
            let here = node.pods.values().filter(|placed| counted(&placed.pod)).count();
            *counts.entry(domain.to_owned()).or_default() += i64::try_from(here).unwrap_or(i64::MAX);
        }
        Spread {
            skew: int(constraint, "/maxSkew").unwrap_or(1).max(1),
            own: i64::from(selector.matches_object(demand.pod)),
            key,
            counts,
        }
    }

    fn allows(&self, node: &Node) -> bool {
        let Some(domain) = node.label(&self.key) else { return false };
        let least = self.counts.values().min().copied().unwrap_or(0);
        let here = self.counts.get(domain).copied().unwrap_or(0);
        here + self.own - least <= self.skew
    }
}
