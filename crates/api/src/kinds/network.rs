//! Kinds of `networking.k8s.io` that shape the virtual network.

use super::{Entry, Scope, Traits, columns, hooks};

pub(super) fn entries() -> Vec<Entry> {
    vec![entry!(
        ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
        &["netpol"],
        &[],
        Namespaced,
        Generation,
        "io.k8s.api.networking.v1.NetworkPolicy",
        network_policy
    )]
}
