//! GRPCRoute and Ingress, as the HTTPRoutes they mean.

use super::references::References;
use super::wire::{
    BackendRef, GrpcMatchSpec, GrpcRouteSpec, IngressBackend, IngressSpec, MatchSpec, PathSpec, RouteSpec,
};
use super::wire::{RuleSpec, TextSpec};

/// A gRPC method is the path `/service/method` of a POST.
pub fn grpc(spec: GrpcRouteSpec) -> RouteSpec {
    let rules = spec.rules.into_iter().map(|rule| {
        let matches = if rule.matches.is_empty() { vec![GrpcMatchSpec::default()] } else { rule.matches };
        RuleSpec {
            matches: matches.into_iter().map(grpc_match).collect(),
            filters: rule.filters,
            backend_refs: rule.backend_refs,
            session_persistence: rule.session_persistence,
            ..RuleSpec::default()
        }
    });
    let rules = Some(rules.collect());
    RouteSpec { parent_refs: spec.parent_refs, hostnames: spec.hostnames, rules }
}

fn grpc_match(spec: GrpcMatchSpec) -> MatchSpec {
    let method = spec.method.unwrap_or_default();
    let (service, name) = (method.service.unwrap_or_default(), method.method.unwrap_or_default());
    let of = |kind: &str, value: String| Some(PathSpec { r#type: Some(kind.into()), value: Some(value) });
    let or_any = |pattern: String| if pattern.is_empty() { "[^/]+".to_owned() } else { format!("(?:{pattern})") };
    let path = match (method.r#type.as_deref().unwrap_or("Exact"), service.is_empty(), name.is_empty()) {
        (_, true, true) => of("PathPrefix", "/".into()),
        ("Exact", false, false) => of("Exact", format!("/{service}/{name}")),
        ("Exact", false, true) => of("PathPrefix", format!("/{service}")),
        ("Exact", true, false) => of("RegularExpression", format!("/[^/]+/{}", regex::escape(&name))),
        ("RegularExpression", _, _) => of("RegularExpression", format!("/{}/{}", or_any(service), or_any(name))),
        // Not known: the rule is marked when the type of its path is read.
        (other, _, _) => of(other, "/".into()),
    };
    MatchSpec { path, headers: spec.headers, query_params: Vec::<TextSpec>::new(), method: Some("POST".into()) }
}

/// One route for each host of an Ingress; the default backend takes what is left, on any host.
pub fn ingress(spec: IngressSpec, namespace: &str, references: &References<'_>) -> Vec<RouteSpec> {
    let mut routes = Vec::new();
    let route = |host: String, rules: Vec<RuleSpec>| RouteSpec {
        parent_refs: Vec::new(),
        hostnames: Some(host).filter(|host| !host.is_empty()).into_iter().collect(),
        rules: Some(rules),
    };
    for rule in spec.rules {
        let paths = rule.http.unwrap_or_default().paths.into_iter().map(|one| {
            let kind = if one.path_type == "Exact" { "Exact" } else { "PathPrefix" };
            let value = if one.path.is_empty() { "/".to_owned() } else { one.path };
            to(kind, value, backend(&one.backend, namespace, references))
        });
        let paths: Vec<RuleSpec> = paths.collect();
        if !paths.is_empty() {
            routes.push(route(rule.host, paths));
        }
    }
    if let Some(default) = &spec.default_backend {
        let rule = to("PathPrefix", "/".into(), backend(default, namespace, references));
        routes.push(route(String::new(), vec![rule]));
    }
    routes
}

fn to(kind: &str, path: String, backend: BackendRef) -> RuleSpec {
    let path = Some(PathSpec { r#type: Some(kind.into()), value: Some(path) });
    RuleSpec {
        matches: vec![MatchSpec { path, ..MatchSpec::default() }],
        backend_refs: vec![backend],
        ..RuleSpec::default()
    }
}

fn backend(backend: &IngressBackend, namespace: &str, references: &References<'_>) -> BackendRef {
    let Some(service) = &backend.service else {
        // What is not a Service is told as such when it is resolved.
        let kind = backend.resource.as_ref().and_then(|resource| resource.get("kind")?.as_str().map(str::to_owned));
        return BackendRef { kind: Some(kind.unwrap_or_default()), ..BackendRef::default() };
    };
    let port = service.port.number.or_else(|| references.port_named(namespace, &service.name, &service.port.name));
    BackendRef { name: service.name.clone(), port, ..BackendRef::default() }
}
