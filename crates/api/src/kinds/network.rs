//! Kinds that shape the virtual network.

use super::{Entry, Scope, Traits, columns, hooks};

const POLICY: &str = "policy.networking.k8s.io";

pub(super) fn entries() -> Vec<Entry> {
    vec![
        entry!(
            ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
            &["netpol"],
            &[],
            Namespaced,
            Generation,
            "io.k8s.api.networking.v1.NetworkPolicy",
            network_policy
        ),
        entry!(
            (POLICY, "v1alpha1", "adminnetworkpolicies", "AdminNetworkPolicy"),
            &["anp"],
            &[],
            Cluster,
            Full,
            "io.k8s.networking.policy.v1alpha1.AdminNetworkPolicy",
            admin_network_policy
        ),
        entry!(
            (POLICY, "v1alpha1", "baselineadminnetworkpolicies", "BaselineAdminNetworkPolicy"),
            &["banp"],
            &[],
            Cluster,
            Full,
            "io.k8s.networking.policy.v1alpha1.BaselineAdminNetworkPolicy",
            baseline_admin_network_policy
        ),
        entry!(
            ("atoll.dev", "v1alpha1", "egresspolicies", "EgressPolicy"),
            &["egp"],
            &[],
            Namespaced,
            Full,
            "dev.atoll.v1alpha1.EgressPolicy",
            egress_policy
        ),
        entry!(
            ("atoll.dev", "v1alpha1", "networks", "Network"),
            &["net"],
            &[],
            Namespaced,
            Full,
            "dev.atoll.v1alpha1.Network",
            subnet
        ),
    ]
}
