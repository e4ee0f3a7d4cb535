//! The Gateway API's kinds, and Ingress.

use super::{Entry, Scope, Traits, columns, hooks};
use crate::kind::{Kind, Resource};

const GATEWAY: &str = "gateway.networking.k8s.io";
const INGRESS: &str = "networking.k8s.io";
const CATEGORIES: &[&str] = &["gateway-api"];

pub(super) fn entries() -> Vec<Entry> {
    vec![
        entry!(
            (GATEWAY, "v1", "gatewayclasses", "GatewayClass"),
            &["gc"],
            CATEGORIES,
            Cluster,
            Full,
            "io.k8s.networking.gateway.v1.GatewayClass",
            gateway_class
        ),
        entry!(
            (GATEWAY, "v1", "gateways", "Gateway"),
            &["gtw"],
            CATEGORIES,
            Namespaced,
            Full,
            "io.k8s.networking.gateway.v1.Gateway",
            gateway
        ),
        entry!(
            (GATEWAY, "v1", "httproutes", "HTTPRoute"),
            &[],
            CATEGORIES,
            Namespaced,
            Full,
            "io.k8s.networking.gateway.v1.HTTPRoute",
            http_route
        ),
        entry!(
            (GATEWAY, "v1", "grpcroutes", "GRPCRoute"),
            &[],
            CATEGORIES,
            Namespaced,
            Full,
            "io.k8s.networking.gateway.v1.GRPCRoute",
            grpc_route
        ),
        entry!(
            (GATEWAY, "v1", "tlsroutes", "TLSRoute"),
            &[],
            CATEGORIES,
            Namespaced,
            Full,
            "io.k8s.networking.gateway.v1.TLSRoute",
            tls_route
        ),
        entry!(
            (GATEWAY, "v1", "referencegrants", "ReferenceGrant"),
            &["refgrant"],
            CATEGORIES,
            Namespaced,
            Generation,
            "io.k8s.networking.gateway.v1.ReferenceGrant",
            reference_grant
        ),
        entry!(
            ("gateway.atoll.dev", "v1alpha1", "trafficpolicies", "TrafficPolicy"),
            &[],
            CATEGORIES,
            Namespaced,
            Full,
            "dev.atoll.gateway.v1alpha1.TrafficPolicy",
            traffic_policy
        ),
        entry!(
            ("gateway.atoll.dev", "v1alpha1", "backendpolicies", "BackendPolicy"),
            &[],
            CATEGORIES,
            Namespaced,
            Full,
            "dev.atoll.gateway.v1alpha1.BackendPolicy",
            backend_policy
        ),
        entry!(
            (INGRESS, "v1", "ingresses", "Ingress"),
            &["ing"],
            &[],
            Namespaced,
            Full,
            "io.k8s.api.networking.v1.Ingress",
            ingress
        ),
        entry!(
            (INGRESS, "v1", "ingressclasses", "IngressClass"),
            &[],
            &[],
            Cluster,
            Generation,
            "io.k8s.api.networking.v1.IngressClass",
            ingress_class
        ),
    ]
}

/// Versions under which a kind was known before `v1`; manifests still say them. The same objects, stored as `v1`.
pub(super) fn older(kind: &Kind) -> Option<Kind> {
    let version = match (&*kind.resource.group, &*kind.resource.plural) {
        (GATEWAY, "referencegrants") => "v1beta1",
        (GATEWAY, "tlsroutes") => "v1alpha2",
        _ => return None,
    };
    let mut older = kind.clone();
    older.resource = Resource::new(GATEWAY, version, &kind.resource.plural);
    older.short_names.clear();
    Some(older)
}
