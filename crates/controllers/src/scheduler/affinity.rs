//! Affinity terms: which nodes, and which other pods, a term means.

use super::cluster::{Cluster, Node};
use crate::objects::list;
use api::object::{Meta, Object};
use api::selector::Selector;
use serde_json::{Value, json};

/// A node selector term of `nodeAffinity`; one without requirements matches nothing.
pub(super) fn node_matches(term: &Value, node: &Node) -> bool {
    let (labels, fields) = (list(term, "/matchExpressions"), list(term, "/matchFields"));
    if labels.is_empty() && fields.is_empty() {
        return false;
    }
    let holds = |expressions: &[Value], values: &Value| {
        Selector::from_object(&json!({"matchExpressions": expressions})).is_ok_and(|selector| selector.matches(values))
    };
    let own = json!({"metadata.name": node.name});
    holds(labels, node.labels()) && holds(fields, &own)
}

/// A term of `podAffinity` or `podAntiAffinity` of one pod.
pub(super) struct Term {
    selector: Selector,
    namespaces: Vec<String>,
    all_namespaces: bool,
    pub topology: String,
    pub weight: i64,
}

impl Term {
    pub fn of(owner: &Object, term: &Value, weight: i64) -> Term {
        let given: Vec<String> =
            list(term, "/namespaces").iter().filter_map(Value::as_str).map(str::to_owned).collect();
        // An empty selector of namespaces means all; labels of namespaces are not looked at.
        let all_namespaces = term.get("namespaceSelector").is_some_and(|selector| !selector.is_null());
        let namespaces = if given.is_empty() && !all_namespaces { vec![owner.namespace().to_owned()] } else { given };
        Term {
            selector: Selector::from_object(term.get("labelSelector").unwrap_or(&Value::Null))
                .unwrap_or_else(|_| Selector::nothing()),
            namespaces,
            all_namespaces,
            topology: term.str_at("/topologyKey").to_owned(),
            weight,
        }
    }

    pub fn matches(&self, pod: &Object) -> bool {
        let here = self.all_namespaces || self.namespaces.iter().any(|namespace| namespace == pod.namespace());
        here && self.selector.matches_object(pod)
    }

    /// Whether two nodes are in the same domain.
    pub fn joins(&self, a: &Node, b: &Node) -> bool {
        matches!((a.label(&self.topology), b.label(&self.topology)), (Some(a), Some(b)) if a == b)
    }

    /// Pods that the term means in the domain of `node`.
    pub fn count_near(&self, cluster: &Cluster, node: &Node) -> usize {
        let near = cluster.nodes().filter(|other| self.joins(other, node));
        near.map(|other| other.pods.values().filter(|placed| self.matches(&placed.pod)).count()).sum()
    }

    pub fn any(&self, cluster: &Cluster) -> bool {
        cluster.nodes().flat_map(|node| node.pods.values()).any(|placed| self.matches(&placed.pod))
    }
}

/// `kind` is `podAffinity` or `podAntiAffinity`.
pub(super) fn required(pod: &Object, kind: &str) -> Vec<Term> {
    let pointer = format!("/spec/affinity/{kind}/requiredDuringSchedulingIgnoredDuringExecution");
    list(pod, &pointer).iter().map(|term| Term::of(pod, term, 0)).collect()
}

pub(super) fn preferred(pod: &Object, kind: &str) -> Vec<Term> {
    let pointer = format!("/spec/affinity/{kind}/preferredDuringSchedulingIgnoredDuringExecution");
    list(pod, &pointer)
        .iter()
        .map(|weighted| {
            let weight = crate::objects::int(weighted, "/weight").unwrap_or(0);
            Term::of(pod, weighted.get("podAffinityTerm").unwrap_or(&Value::Null), weight)
        })
        .collect()
}
