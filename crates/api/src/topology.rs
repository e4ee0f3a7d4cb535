//! For whom endpoints are, as their hints say
//! (<https://kubernetes.io/docs/concepts/services-networking/topology-aware-routing/>).

use crate::informer::Informer;
use crate::object::Meta;

/// The label of a node that says where it is.
pub const ZONE: &str = "topology.kubernetes.io/zone";

/// Where a node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub node: String,
    pub zone: Option<String>,
}

/// The nodes and zones that an endpoint is for; of either there may be none.
#[derive(Default)]
pub struct Hints<'a> {
    pub nodes: Vec<&'a str>,
    pub zones: Vec<&'a str>,
}

impl Place {
    /// `own`: the node's object, as soon as there is one.
    pub fn of(node: &str, own: &Informer) -> Place {
        let zone = own.get("", node).and_then(|object| object.label(ZONE).map(str::to_owned));
        Place { node: node.to_owned(), zone: zone.filter(|zone| !zone.is_empty()) }
    }

    /// Those endpoints that hints lead here; all, unless each has hints and one is for here: first for the node, then for
    /// its zone, as kube-proxy has it.
    pub fn near<T>(&self, all: Vec<T>, hints: impl for<'a> Fn(&'a T) -> Hints<'a>) -> Vec<T> {
        let zone = self.zone.as_deref();
        let nodes = |one: &T| hints(one).nodes.contains(&&*self.node);
        let zones = |one: &T| zone.is_some_and(|zone| hints(one).zones.contains(&zone));
        if all.iter().all(|one| !hints(one).nodes.is_empty()) && all.iter().any(nodes) {
            return all.into_iter().filter(nodes).collect();
        }
        if all.iter().all(|one| !hints(one).zones.is_empty()) && all.iter().any(zones) {
            return all.into_iter().filter(zones).collect();
        }
        all
    }
}
