use super::{CONTROLLER, DEFAULT_NAME, DEFAULT_NAMESPACE};
use crate::Config;
use crate::context::{GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, SERVICES};
use crate::objects::{int, list};
use crate::testing::World;
use api::client::{Client, Patch};
use api::object::{Meta, Object};
use serde_json::{Value, json};

fn route(parent: Value, backend: Value) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "x"},
           "spec": {"parentRefs": [parent], "hostnames": ["a.example"], "rules": [{"backendRefs": [backend]}]}})
}

/// `Accepted` and `ResolvedRefs` of the first parent: reasons.
fn reasons(route: &Object) -> (String, String) {
    let conditions = list(route, "/status/parents/0/conditions");
    let of = |kind: &str| {
        let found = conditions.iter().find(|condition| condition.str_at("/type") == kind);
        found.map_or("", |condition| condition.str_at("/reason")).to_owned()
    };
    (of("Accepted"), of("ResolvedRefs"))
}

async fn wait(world: &World, accepted: &str, resolved: &str) -> api::object::SharedObject {
    world.wait(&HTTP_ROUTES, "r", |route| reasons(route) == (accepted.to_owned(), resolved.to_owned())).await
}

#[tokio::test]
async fn defaults_and_a_route() {
    let config = Config { gateway_address: Some("127.0.0.1".into()), gateway_port: 8088, ..Config::default() };
    let world = World::with(config).await;
    world
        .wait_all(&GATEWAY_CLASSES, |classes| {
            classes.iter().any(|class| class.str_at("/status/conditions/0/type") == "Accepted")
        })
        .await;
    let served = |gateways: &[api::object::SharedObject]| {
        gateways.iter().any(|gateway| {
            gateway.namespace() == DEFAULT_NAMESPACE
                && gateway.name() == DEFAULT_NAME
                && list(gateway, "/status/conditions").iter().all(|c| c.str_at("/status") == "True")
                && list(gateway, "/status/conditions").len() == 2
        })
    };
    let gateways = world.wait_all(&GATEWAYS, served).await;
    assert_eq!(gateways[0]["status"]["addresses"][0]["value"], "127.0.0.1");
    assert_eq!(gateways[0]["spec"]["listeners"][0]["port"], 8088);

    let parent = json!({"name": "atoll", "namespace": "default"});
    world.create(&HTTP_ROUTES, route(parent.clone(), json!({"name": "web", "port": 80}))).await;
    let told = wait(&world, "Accepted", "BackendNotFound").await;
    assert_eq!(told["status"]["parents"][0]["controllerName"], CONTROLLER);
    assert_eq!(told["status"]["parents"][0]["parentRef"], parent);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "x"},
                         "spec": {"ports": [{"port": 80}]}});
    world.create(&SERVICES, service).await;
    wait(&world, "Accepted", "ResolvedRefs").await;
    world.wait_all(&GATEWAYS, |g| int(&g[0], "/status/listeners/0/attachedRoutes") == Some(1)).await;

    let backend = |backend: Value| json!({"spec": {"rules": [{"backendRefs": [backend]}]}});
    for (bad, reason) in [
        (json!({"name": "web", "port": 81}), "BackendNotFound"),
        (json!({"name": "web", "namespace": "y", "port": 80}), "RefNotPermitted"),
        (json!({"name": "web", "kind": "Bucket", "port": 80}), "InvalidKind"),
    ] {
        world.patch(&HTTP_ROUTES, "r", backend(bad)).await;
        wait(&world, "Accepted", reason).await;
    }
    world.patch(&HTTP_ROUTES, "r", backend(json!({"name": "web", "port": 80}))).await;

    let listeners = |listener: Value| Patch::Merge(json!({"spec": {"listeners": [listener]}}));
    let change = async |listener: Value| {
        world.client.patch(&GATEWAYS, "default", "atoll", "", listeners(listener)).await.unwrap();
    };
    change(json!({"name": "http", "protocol": "HTTP", "port": 80})).await;
    wait(&world, "NotAllowedByListeners", "ResolvedRefs").await;
    let all = json!({"namespaces": {"from": "All"}});
    change(json!({"name": "http", "protocol": "HTTP", "port": 80, "hostname": "*.other", "allowedRoutes": all})).await;
    wait(&world, "NoMatchingListenerHostname", "ResolvedRefs").await;
    change(json!({"name": "tcp", "protocol": "TCP", "port": 80, "allowedRoutes": all})).await;
    wait(&world, "NoMatchingParent", "ResolvedRefs").await;
    world.wait_all(&GATEWAYS, |g| g[0].str_at("/status/conditions/0/status") == "False").await;
    world.patch(&HTTP_ROUTES, "r", json!({"spec": {"parentRefs": [{"name": "absent"}]}})).await;
    let told = wait(&world, "NoMatchingParent", "ResolvedRefs").await;
    assert_eq!(list(&told, "/status/parents").len(), 1);
}

#[tokio::test]
async fn gateways_of_others_are_left_alone() {
    let world = World::new().await;
    let class = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": "other"},
                       "spec": {"controllerName": "example.com/other"}});
    world.client.create(&GATEWAY_CLASSES, "", class).await.unwrap();
    let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "g", "namespace": "x"},
                         "spec": {"gatewayClassName": "other", "listeners": []}});
    world.create(&GATEWAYS, gateway).await;
    world.create(&HTTP_ROUTES, route(json!({"name": "g"}), json!({"name": "web", "port": 80}))).await;
    let mut ours = route(json!({"name": "atoll", "namespace": "default"}), json!({"name": "web", "port": 80}));
    ours["metadata"]["name"] = json!("ours");
    world.create(&HTTP_ROUTES, ours).await;
    world.wait(&HTTP_ROUTES, "ours", |route| reasons(route).0 == "Accepted").await;
    assert_eq!(list(&world.get(&HTTP_ROUTES, "r").await.unwrap(), "/status/parents").len(), 0);
    assert!(world.get(&GATEWAYS, "g").await.unwrap().get("status").is_none());
}

fn condition(object: &Object, at: &str, kind: &str) -> (String, String) {
    let found = list(object, at).iter().find(|condition| condition.str_at("/type") == kind);
    let text = |field| found.map_or("", |condition| condition.str_at(field)).to_owned();
    (text("/reason"), text("/message"))
}

const HTTP: &str = "gateway.networking.k8s.io/v1";

#[tokio::test]
async fn references_across_namespaces_need_a_grant() {
    let world = World::new().await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "y"},
                         "spec": {"ports": [{"port": 80}]}});
    world.create(&SERVICES, service).await;
    let parent = json!({"name": "atoll", "namespace": "default"});
    world.create(&HTTP_ROUTES, route(parent, json!({"name": "web", "namespace": "y", "port": 80}))).await;
    wait(&world, "Accepted", "RefNotPermitted").await;
    let grant = json!({"apiVersion": HTTP, "kind": "ReferenceGrant", "metadata": {"name": "g", "namespace": "y"},
        "spec": {"from": [{"group": super::GROUP, "kind": "HTTPRoute", "namespace": "x"}],
                 "to": [{"group": "", "kind": "Service", "name": "web"}]}});
    world.create(&super::GRANTS, grant).await;
    wait(&world, "Accepted", "ResolvedRefs").await;
    world.client.delete(&super::GRANTS, "y", "g", &Default::default()).await.unwrap();
    wait(&world, "Accepted", "RefNotPermitted").await;
}

#[tokio::test]
async fn the_younger_of_two_routes_is_told() {
    let world = World::new().await;
    let parent = json!({"name": "atoll", "namespace": "default"});
    let made = |name: &str| {
        let mut route = route(parent.clone(), json!({"name": "web", "port": 80}));
        route["metadata"]["name"] = json!(name);
        route["spec"]["rules"][0]["matches"] = json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
        route
    };
    // Of one second: the first by name wins.
    world.create(&HTTP_ROUTES, made("a")).await;
    world.create(&HTTP_ROUTES, made("b")).await;
    let conflicted = |route: &Object| condition(route, "/status/parents/0/conditions", "atoll.dev/Conflicted");
    let told = world.wait(&HTTP_ROUTES, "b", |route| conflicted(route).0 == "OlderRouteWins").await;
    assert!(conflicted(&told).1.contains("x/a is older"), "{told:?}");
    world.delete(&HTTP_ROUTES, "a").await;
    world.wait(&HTTP_ROUTES, "b", |route| reasons(route).0 == "Accepted" && conflicted(route).0.is_empty()).await;
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_told() {
    use base64::Engine;
    let world = World::new().await;
    let listener =
        json!({"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "cert"}]}});
    let gateway = json!({"apiVersion": HTTP, "kind": "Gateway", "metadata": {"name": "g", "namespace": "x"},
                         "spec": {"gatewayClassName": "atoll", "listeners": [listener]}});
    world.create(&GATEWAYS, gateway).await;
    let told = async |reason: &str, part: &str| {
        let is = |gateway: &Object| condition(gateway, "/status/listeners/0/conditions", "ResolvedRefs");
        let found = world.wait(&GATEWAYS, "g", |gateway| is(gateway).0 == reason && is(gateway).1.contains(part)).await;
        let served = condition(&found, "/status/listeners/0/conditions", "Programmed").0;
        assert_eq!(served == "Programmed", reason == "ResolvedRefs");
    };
    told("InvalidCertificateRef", "Secret x/cert not found").await;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let issue = || {
        let made = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    };
    let ((certificate, key), (_, other)) = (issue(), issue());
    let secret = |key: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cert", "namespace": "x"},
        "type": "kubernetes.io/tls", "data": {"tls.crt": encode(&certificate), "tls.key": encode(key)}})
    };
    world.create(&super::SECRETS, secret(&other)).await;
    told("InvalidCertificateRef", "tls.key is not the key of the certificate").await;
    world.patch(&super::SECRETS, "cert", json!({"data": {"tls.key": encode(&key)}})).await;
    told("ResolvedRefs", "").await;
    let elsewhere = json!({"spec": {"listeners": [{"name": "https", "port": 443, "protocol": "HTTPS",
        "tls": {"certificateRefs": [{"name": "cert", "namespace": "y"}]}}]}});
    world.patch(&GATEWAYS, "g", elsewhere).await;
    told("RefNotPermitted", "ReferenceGrant").await;
}

#[tokio::test]
async fn ingresses_say_where_they_are_served() {
    let world = World::with(Config { gateway_address: Some("127.0.0.1".into()), ..Config::default() }).await;
    let ingress = |name: &str, class: Value| {
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress",
        "metadata": {"name": name, "namespace": "x"}, "spec": {"ingressClassName": class,
        "defaultBackend": {"service": {"name": "web", "port": {"number": 80}}}}})
    };
    world.create(&super::INGRESSES, ingress("other", json!("nginx"))).await;
    world.create(&super::INGRESSES, ingress("ours", Value::Null)).await;
    world.wait(&super::INGRESSES, "ours", |i| i.str_at("/status/loadBalancer/ingress/0/ip") == "127.0.0.1").await;
    assert!(world.get(&super::INGRESSES, "other").await.unwrap().get("status").is_none());
}

#[tokio::test]
async fn of_two_policies_for_a_service_the_older_counts() {
    let world = World::new().await;
    let policy = |name: &str, created: &str| {
        json!({"apiVersion": "gateway.atoll.dev/v1alpha1", "kind": "BackendPolicy",
            "metadata": {"name": name, "namespace": "x", "creationTimestamp": created},
            "spec": {"balancing": {"algorithm": "RoundRobin"}, "targetRefs": [{"kind": "Service", "name": "web"}]}})
    };
    world.create(&super::BACKEND_POLICIES, policy("a", "2026-01-01T00:00:00Z")).await;
    let told = async |name: &str, reason: &str| {
        let accepted = |policy: &Object| condition(policy, "/status/conditions", "Accepted").0 == reason;
        world.wait(&super::BACKEND_POLICIES, name, accepted).await
    };
    told("a", "TargetNotFound").await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "x"},
        "spec": {"ports": [{"port": 80}]}});
    world.create(&SERVICES, service).await;
    told("a", "Accepted").await;
    world.create(&super::BACKEND_POLICIES, policy("b", "2026-01-02T00:00:00Z")).await;
    told("b", "Conflicted").await;
    world.delete(&super::BACKEND_POLICIES, "a").await;
    told("b", "Accepted").await;
}

#[tokio::test]
async fn policies_say_what_is_missing() {
    let world = World::new().await;
    let policy = json!({"apiVersion": "gateway.atoll.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"name": "p", "namespace": "x"}, "spec": {"apiKeys": {"secretRef": {"name": "keys"}},
        "targetRefs": [{"group": super::GROUP, "kind": "HTTPRoute", "name": "r"}]}});
    world.create(&super::POLICIES, policy).await;
    let told = async |reason: &str| {
        world
            .wait(&super::POLICIES, "p", |policy| condition(policy, "/status/conditions", "Accepted").0 == reason)
            .await
    };
    told("TargetNotFound").await;
    let parent = json!({"name": "atoll", "namespace": "default"});
    world.create(&HTTP_ROUTES, route(parent, json!({"name": "web", "port": 80}))).await;
    told("Invalid").await;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys", "namespace": "x"}});
    world.create(&super::SECRETS, secret).await;
    told("Accepted").await;
    world.delete(&HTTP_ROUTES, "r").await;
    told("TargetNotFound").await;
}
