//! Temporary until api's tables land.
use api::kind::*;
use api::object::{Meta, Object};
use serde_json::{Value, json};
use std::sync::Arc;
pub fn cells(_k: &Kind, o: &Object, now: i64) -> Vec<Value> {
    vec![o.name().into(), api::time::age(o.str_at("/metadata/creationTimestamp"), now).into()]
}
pub fn columns(_k: &Kind) -> Value {
    json!([{"name":"Name","type":"string","format":"name","description":"","priority":0},{"name":"Age","type":"string","format":"","description":"","priority":0}])
}
pub fn kinds() -> Vec<Arc<Kind>> {
    let k = |g: &str, p: &str, n: &str, t: &str, s: Scope, st: bool| {
        Arc::new(Kind {
            resource: Resource::new(g, "v1", p),
            kind: n.into(),
            list_kind: format!("{n}List"),
            singular: n.to_lowercase(),
            short_names: if n == "Namespace" { vec!["ns".into()] } else { vec![] },
            categories: vec![],
            scope: s,
            subresources: Subresources { status: st, scale: (n == "Deployment").then(|| ScalePaths { spec_replicas: "/spec/replicas".into(), status_replicas: "/status/replicas".into(), selector: "/spec/selector".into() }) },
            schema: api::schema::builtin::schema(t),
            type_name: t.into(),
            types: api::schema::builtin::types(),
            columns: vec![],
            hooks: Hooks::default(),
            counts_generation: n == "Deployment",
            storage_version: "v1".into(),
        })
    };
    use Scope::*;
    vec![
        k("", "namespaces", "Namespace", "io.k8s.api.core.v1.Namespace", Cluster, true),
        k("", "nodes", "Node", "io.k8s.api.core.v1.Node", Cluster, true),
        k("", "pods", "Pod", "io.k8s.api.core.v1.Pod", Namespaced, true),
        k("", "services", "Service", "io.k8s.api.core.v1.Service", Namespaced, true),
        k("", "configmaps", "ConfigMap", "io.k8s.api.core.v1.ConfigMap", Namespaced, false),
        k("", "secrets", "Secret", "io.k8s.api.core.v1.Secret", Namespaced, false),
        k("", "events", "Event", "io.k8s.api.core.v1.Event", Namespaced, false),
        k("", "serviceaccounts", "ServiceAccount", "io.k8s.api.core.v1.ServiceAccount", Namespaced, false),
        k("apps", "deployments", "Deployment", "io.k8s.api.apps.v1.Deployment", Namespaced, true),
        k("node.k8s.io", "runtimeclasses", "RuntimeClass", "io.k8s.api.node.v1.RuntimeClass", Cluster, false),
    ]
}
