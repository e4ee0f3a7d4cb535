//! Which rule serves a request: objects in, table out.
#![allow(clippy::unwrap_used)]

use api::object::SharedObject;
use gateway::policy::Attached;
use gateway::routing::{Objects, Seen, Table, Target, build};
use gateway::upstream::{Settings, Upstreams};
use http::{HeaderMap, HeaderName, Method};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn object(namespace: &str, name: &str, age: u32, spec: Value) -> SharedObject {
    let created = format!("2026-01-01T00:00:{:02}Z", 59 - age);
    Arc::new(json!({"metadata": {"name": name, "namespace": namespace, "creationTimestamp": created}, "spec": spec}))
}

fn gateway(name: &str, listeners: Value) -> SharedObject {
    object("infra", name, 0, json!({"gatewayClassName": "atoll", "listeners": listeners}))
}

fn all(hostname: &str) -> Value {
    json!({"name": "l", "port": 80, "protocol": "HTTP", "hostname": hostname, "allowedRoutes": {"namespaces": {"from": "All"}}})
}

fn route(name: &str, age: u32, hostnames: &[&str], rules: Value) -> SharedObject {
    let spec = json!({"parentRefs": [{"name": "gw", "namespace": "infra"}], "hostnames": hostnames, "rules": rules});
    object("shop", name, age, spec)
}

/// A rule with one backend; a service of that name exists.
fn rule(matches: Value, backend: &str) -> Value {
    json!({"matches": matches, "backendRefs": [{"name": backend, "port": 80}]})
}

fn prefix(path: &str) -> Value {
    json!({"path": {"type": "PathPrefix", "value": path}})
}

fn service(namespace: &str, name: &str) -> SharedObject {
    object(namespace, name, 0, json!({"ports": [{"name": "http", "port": 80}]}))
}

fn table(gateways: Vec<SharedObject>, routes: Vec<SharedObject>) -> Table {
    let mut services = vec![service("other", "a")];
    services.extend(["a", "b", "c", "d", "e"].map(|name| service("shop", name)));
    let namespaces = vec![Arc::new(json!({"metadata": {"name": "shop", "labels": {"team": "x"}}}))];
    let objects = Objects { gateways, routes, services, namespaces, ..Objects::default() };
    build(&objects, "atoll", &mut Upstreams::new(Settings::default()), &Attached::default())
}

struct Ask<'a> {
    host: &'a str,
    path: &'a str,
    method: Method,
    headers: &'a [(&'a str, &'a str)],
    query: Option<&'a str>,
}

fn ask<'a>(host: &'a str, path: &'a str) -> Ask<'a> {
    Ask { host, path, method: Method::GET, headers: &[], query: None }
}

/// The service that a request reaches.
fn backend(table: &Table, ask: &Ask<'_>) -> String {
    let mut headers = HeaderMap::new();
    for (name, value) in ask.headers {
        headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
    }
    let seen = Seen { method: &ask.method, path: ask.path, query: ask.query, headers: &headers };
    match table.find(ask.host, &seen).and_then(|entry| entry.rule.pick(0)).map(|backend| &backend.target) {
        Some(Target::Upstream(upstream)) => upstream.service.clone(),
        Some(Target::Invalid(why)) => format!("invalid: {why}"),
        None => "none".to_owned(),
    }
}

#[test]
fn paths_methods_headers_and_queries_in_the_specifications_order() {
    let rules = json!([
        rule(json!([prefix("/")]), "a"),
        rule(json!([prefix("/x")]), "b"),
        rule(json!([{"path": {"type": "Exact", "value": "/x/exact"}}]), "c"),
        rule(json!([{"path": {"value": "/x"}, "method": "POST"}]), "d"),
        rule(json!([{"path": {"value": "/x"}, "headers": [{"name": "V", "value": "2"}]}]), "e"),
        rule(json!([{"path": {"value": "/x"}, "queryParams": [{"name": "v", "value": "3"}]}]), "c"),
        rule(json!([{"path": {"type": "RegularExpression", "value": "/re/[0-9]+"}}]), "d"),
    ]);
    let table = table(vec![gateway("gw", json!([all("")]))], vec![route("r", 0, &[], rules)]);
    let at = |path| backend(&table, &ask("h", path));
    assert_eq!(at("/"), "a");
    assert_eq!(at("/xy"), "a");
    assert_eq!(at("/x/y"), "b");
    assert_eq!(at("/x/exact"), "c");
    assert_eq!(at("/re/12"), "d");
    assert_eq!(at("/re/12/"), "a");
    assert_eq!(backend(&table, &Ask { method: Method::POST, ..ask("h", "/x") }), "d");
    let both = Ask { method: Method::POST, headers: &[("v", "2")], ..ask("h", "/x") };
    assert_eq!(backend(&table, &both), "d", "a method goes before headers");
    assert_eq!(backend(&table, &Ask { headers: &[("v", "2")], query: Some("v=3"), ..ask("h", "/x") }), "e");
    assert_eq!(backend(&table, &Ask { query: Some("v=3"), ..ask("h", "/x") }), "c");
}

#[test]
fn equal_matches_go_to_the_oldest_route_then_the_first_by_name() {
    let to = |name| json!([rule(json!([prefix("/x")]), name)]);
    let gateways = || vec![gateway("gw", json!([all("")]))];
    let old = table(gateways(), vec![route("r1", 1, &[], to("a")), route("r2", 5, &[], to("b"))]);
    assert_eq!(backend(&old, &ask("h", "/x")), "b");
    let name = table(gateways(), vec![route("r2", 1, &[], to("b")), route("r1", 1, &[], to("a"))]);
    assert_eq!(backend(&name, &ask("h", "/x")), "a");
    let twice = json!([rule(json!([prefix("/x")]), "c"), rule(json!([prefix("/x")]), "d")]);
    assert_eq!(backend(&table(gateways(), vec![route("r", 0, &[], twice)]), &ask("h", "/x")), "c");
}

#[test]
fn the_most_specific_hostname_goes_first_and_others_catch_what_it_lacks() {
    let to = |name, path: &str| json!([rule(json!([prefix(path)]), name)]);
    let table = table(
        vec![gateway("gw", json!([all("")]))],
        vec![
            route("any", 9, &[], to("a", "/long/path")),
            route("wild", 8, &["*.example.com"], to("b", "/")),
            route("wilder", 7, &["*.b.example.com"], to("c", "/")),
            route("exact", 6, &["a.b.example.com"], to("d", "/only")),
        ],
    );
    let at = |host, path| backend(&table, &ask(host, path));
    assert_eq!(at("a.b.example.com", "/only"), "d");
    assert_eq!(at("a.b.example.com", "/long/path"), "c");
    assert_eq!(at("x.example.com", "/long/path"), "b");
    assert_eq!(at("example.com", "/long/path"), "a");
    assert_eq!(at("example.com", "/"), "none");
}

#[test]
fn listeners_narrow_their_routes() {
    let same = json!({"name": "same", "port": 80, "protocol": "HTTP"});
    let picky = json!({"name": "picky", "port": 81, "protocol": "HTTP", "hostname": "picky.test",
        "allowedRoutes": {"namespaces": {"from": "Selector", "selector": {"matchLabels": {"team": "x"}}}}});
    let tcp = json!({"name": "tcp", "port": 82, "protocol": "TCP", "allowedRoutes": {"namespaces": {"from": "All"}}});
    let grpc = json!({"name": "grpc", "port": 83, "protocol": "HTTP", "hostname": "grpc.test",
        "allowedRoutes": {"namespaces": {"from": "All"}, "kinds": [{"kind": "GRPCRoute"}]}});
    let gateways = vec![gateway("gw", json!([same, picky, tcp, grpc, all("*.wild.test")]))];
    let rules = || json!([rule(json!([]), "a")]);
    let everywhere = table(gateways.clone(), vec![route("r", 0, &[], rules())]);
    let at = |table: &Table, host| backend(table, &ask(host, "/"));
    assert_eq!(at(&everywhere, "picky.test"), "a");
    assert_eq!(at(&everywhere, "x.wild.test"), "a");
    for host in ["grpc.test", "other.test"] {
        assert_eq!(at(&everywhere, host), "none", "{host}");
    }
    let narrow = table(gateways.clone(), vec![route("r", 0, &["x.wild.test", "y.test"], rules())]);
    assert_eq!((at(&narrow, "x.wild.test"), at(&narrow, "y.test")), ("a".into(), "none".into()));
    // By section name and port.
    let parents = |parent: Value| {
        let spec = json!({"parentRefs": [parent], "rules": rules()});
        table(gateways.clone(), vec![object("shop", "r", 0, spec)])
    };
    let section = parents(json!({"name": "gw", "namespace": "infra", "sectionName": "picky"}));
    assert_eq!((at(&section, "picky.test"), at(&section, "x.wild.test")), ("a".into(), "none".into()));
    assert!(parents(json!({"name": "gw", "namespace": "infra", "port": 84})).is_empty());
    assert!(parents(json!({"name": "gw"})).is_empty(), "a gateway of the route's own namespace was meant");
    assert!(parents(json!({"name": "gw", "namespace": "infra", "kind": "Service", "group": ""})).is_empty());
}

#[test]
fn a_more_specific_listener_keeps_its_hosts_to_itself() {
    let listener = |name: &str, hostname: &str| {
        let mut listener = all(hostname);
        listener["name"] = name.into();
        listener
    };
    let gateways =
        vec![gateway("gw", json!([listener("any", ""), listener("wild", "*.test"), listener("one", "a.test")]))];
    let attached = |section: &str, backend: &str| {
        let parent = json!({"name": "gw", "namespace": "infra", "sectionName": section});
        object("shop", section, 0, json!({"parentRefs": [parent], "rules": [rule(json!([]), backend)]}))
    };
    let table = table(gateways, vec![attached("any", "a"), attached("wild", "b")]);
    let at = |host| backend(&table, &ask(host, "/"));
    assert_eq!((at("x.org"), at("b.test"), at("a.test")), ("a".into(), "b".into(), "none".into()));
}

#[test]
fn other_classes_are_not_served_and_our_controller_is() {
    let mut other = (*gateway("gw", json!([all("")]))).clone();
    other["spec"]["gatewayClassName"] = "nginx".into();
    let routes = vec![route("r", 0, &[], json!([rule(json!([]), "a")]))];
    let mut objects =
        Objects { gateways: vec![Arc::new(other)], routes, services: vec![service("shop", "a")], ..Objects::default() };
    let mut upstreams = Upstreams::new(Settings::default());
    assert!(build(&objects, "atoll", &mut upstreams, &Attached::default()).is_empty());
    objects.classes = vec![object("", "nginx", 0, json!({"controllerName": "atoll.dev/gateway-controller"}))];
    assert_eq!(build(&objects, "atoll", &mut upstreams, &Attached::default()).len(), 1);
}

#[test]
fn bad_references_are_invalid_backends() {
    for (reference, text) in [
        (json!({"name": "nope", "port": 80}), "no service shop/nope"),
        (json!({"name": "a", "port": 81}), "no port 81"),
        (json!({"name": "a"}), "names no port"),
        (json!({"name": "a", "port": 80, "kind": "Bucket", "group": "x"}), "only Services"),
        (json!({"name": "a", "port": 80, "namespace": "other"}), "ReferenceGrant"),
        (json!({"name": "a", "port": 80, "filters": [{"type": "URLRewrite"}]}), "not supported on a backend"),
    ] {
        let rules = json!([{"backendRefs": [reference]}]);
        let table = table(vec![gateway("gw", json!([all("")]))], vec![route("r", 0, &[], rules)]);
        let found = backend(&table, &ask("h", "/"));
        assert!(found.starts_with("invalid") && found.contains(text), "{reference}: {found}");
    }
    let grant = object(
        "other",
        "g",
        0,
        json!({
        "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop"}],
        "to": [{"group": "", "kind": "Service", "name": "a"}]}),
    );
    let rules = json!([{"backendRefs": [{"name": "a", "port": 80, "namespace": "other"}]}]);
    let objects = Objects {
        gateways: vec![gateway("gw", json!([all("")]))],
        routes: vec![route("r", 0, &[], rules)],
        services: vec![service("other", "a")],
        grants: vec![grant],
        ..Objects::default()
    };
    let table = build(&objects, "atoll", &mut Upstreams::new(Settings::default()), &Attached::default());
    assert_eq!(backend(&table, &ask("h", "/")), "a");
}

#[test]
fn a_rule_that_cannot_be_understood_is_marked() {
    for rule in [
        json!({"filters": [{"type": "ExtensionRef"}]}),
        json!({"filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 200}}]}),
        json!({"timeouts": {"request": "soon"}}),
        json!({"matches": [{"path": {"value": "/"}}, {"path": {"type": "RegularExpression", "value": "("}}]}),
    ] {
        let table = table(vec![gateway("gw", json!([all("")]))], vec![route("r", 0, &[], json!([rule]))]);
        let headers = HeaderMap::new();
        let seen = Seen { method: &Method::GET, path: "/", query: None, headers: &headers };
        assert!(table.find("h", &seen).unwrap().rule.invalid.is_some(), "{rule}");
    }
}

#[test]
fn weights_are_kept() {
    let rules = json!([{"backendRefs": [
        {"name": "a", "port": 80, "weight": 1}, {"name": "b", "port": 80, "weight": 0}, {"name": "c", "port": 80, "weight": 3}]}]);
    let table = table(vec![gateway("gw", json!([all("")]))], vec![route("r", 0, &[], rules)]);
    let headers = HeaderMap::new();
    let seen = Seen { method: &Method::GET, path: "/", query: None, headers: &headers };
    let rule = &table.find("h", &seen).unwrap().rule;
    let picked: Vec<u32> = (0..8).map(|random| rule.pick(random).unwrap().weight).collect();
    assert_eq!(picked, [1, 3, 3, 3, 1, 3, 3, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// The table's answer is the best of all matching rules by a plain reading of the specification.
    #[test]
    fn the_best_rule_wins(
        rules in proptest::collection::vec((0usize..4, 0usize..5, 0u8..3, any::<bool>()), 1..8),
        host in 0usize..4,
        path in 0usize..5,
    ) {
        let hosts = ["", "*.b.c", "*.c", "a.b.c"];
        let asked = ["a.b.c", "x.b.c", "x.c", "c"][host];
        let paths = ["/", "/p", "/p/q", "/p/q/r", "/p/qr"];
        let routes: Vec<SharedObject> = rules.iter().enumerate().map(|(index, (host, path, age, exact))| {
            let kind = if *exact { "Exact" } else { "PathPrefix" };
            let rules = json!([{"matches": [{"path": {"type": kind, "value": paths[*path]}}],
                "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {}}], "backendRefs": []}]);
            let names: Vec<&str> = Some(hosts[*host]).filter(|h| !h.is_empty()).into_iter().collect();
            route(&format!("r{index}"), u32::from(*age), &names, rules)
        }).collect();
        let table = table(vec![gateway("gw", json!([all("")]))], routes);
        let headers = HeaderMap::new();
        let seen = Seen { method: &Method::GET, path: paths[path], query: None, headers: &headers };
        let found = table.find(asked, &seen).map(|entry| entry.rule.route.to_string());
        let rank = |(index, (host, rule_path, age, exact)): (usize, &(usize, usize, u8, bool))| {
            let host_fits = match hosts[*host] {
                "" => Some((0, 0)),
                h if h == asked => Some((2, h.len())),
                h => h.strip_prefix('*').filter(|s| asked.ends_with(s) && asked.len() > s.len()).map(|s| (1, s.len())),
            };
            let (p, asked_path) = (paths[*rule_path], paths[path]);
            let fits = if *exact { p == asked_path } else {
                p == "/" || asked_path == p || asked_path.starts_with(&format!("{p}/"))
            };
            host_fits.filter(|_| fits).map(|h| (h, *exact, p.trim_end_matches('/').len(), *age, std::cmp::Reverse(index)))
        };
        let best = rules.iter().enumerate().filter_map(rank).max();
        prop_assert_eq!(found, best.map(|best| format!("shop/r{}", best.4.0)));
    }
}
