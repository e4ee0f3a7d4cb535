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
