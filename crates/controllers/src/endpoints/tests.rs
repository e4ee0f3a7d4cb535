use super::{HEADLESS, SERVICE_NAME};
use crate::context::{ENDPOINT_SLICES, NODES, PODS, SERVICES};
use crate::objects::{is_controlled_by, list};
use crate::testing::World;
use api::client::{Client, Patch};
use api::object::{Meta, Object, SharedObject};
use serde_json::{Value, json};

fn service(ports: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "x", "labels": {"l": "m"}},
           "spec": {"selector": {"app": "web"}, "clusterIP": "10.43.0.7", "ports": ports}})
}

fn pod(name: &str, ip: &str, port: u16, ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    json!({"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": name, "namespace": "x", "labels": {"app": "web"}},
           "spec": {"nodeName": "n", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
           "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": ready}]}})
}

#[tokio::test]
async fn a_slice_for_each_family() {
    let world = World::new().await;
    let mut dual = service(json!([{"name": "p", "port": 80}]));
    dual["spec"]["ipFamilies"] = json!(["IPv6", "IPv4"]);
    world.create(&SERVICES, dual).await;
    let mut both = pod("a", "10.42.0.1", 8080, true);
    both["status"]["podIPs"] = json!([{"ip": "10.42.0.1"}, {"ip": "fd00:10:42::1"}]);
    world.client.put(&PODS, both);
    world.client.put(&PODS, pod("old", "10.42.0.2", 8080, true));
    let slices = wait(&world, &["10.42.0.1:80 rs-", "10.42.0.2:80 rs-", "fd00:10:42::1:80 rs-"]).await;
    let of = |family: &str| slices.iter().filter(|s| s.str_at("/addressType") == family).count();
    assert_eq!((slices.len(), of("IPv4"), of("IPv6")), (2, 1, 1));
    let single = Patch::Merge(json!({"spec": {"ipFamilies": ["IPv6"]}}));
    world.client.patch(&SERVICES, "x", "web", "", single).await.unwrap();
    world.wait_all(&ENDPOINT_SLICES, |slices| shown(slices) == ["fd00:10:42::1:80 rs-"]).await;
}

#[tokio::test]
async fn endpoints_say_where_they_are_and_whom_they_are_for() {
    let world = World::new().await;
    let mut close = service(json!([{"name": "p", "port": 80}]));
    close["spec"]["trafficDistribution"] = "PreferClose".into();
    world.create(&SERVICES, close).await;
    world.client.put(&PODS, pod("a", "10.42.0.1", 8080, true));
    world.client.put(&PODS, pod("b", "10.42.0.2", 8080, false));
    let told = |slices: &[SharedObject]| {
        let own = slices.iter().filter(|slice| slice.label(SERVICE_NAME) == Some("web"));
        let endpoints = own.flat_map(|slice| list(slice, "/endpoints"));
        let mut all: Vec<_> =
            endpoints.map(|e| (e["addresses"][0].clone(), e["zone"].clone(), e["hints"].clone())).collect();
        all.sort_by_key(|(address, ..)| address.to_string());
        all
    };
    let (a, b) = (json!("10.42.0.1"), json!("10.42.0.2"));
    let plain = vec![(a.clone(), Value::Null, Value::Null), (b.clone(), Value::Null, Value::Null)];
    world.wait_all(&ENDPOINT_SLICES, |slices| told(slices) == plain).await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "z"}}});
    world.client.put(&NODES, node);
    let zone = json!([{"name": "z"}]);
    let near = vec![(a.clone(), json!("z"), json!({"forZones": zone})), (b.clone(), json!("z"), Value::Null)];
    world.wait_all(&ENDPOINT_SLICES, |slices| told(slices) == near).await;
    let same_node = Patch::Merge(json!({"spec": {"trafficDistribution": "PreferSameNode"}}));
    world.client.patch(&SERVICES, "x", "web", "", same_node).await.unwrap();
    let hints = json!({"forNodes": [{"name": "n"}], "forZones": zone});
    let both = vec![(a, json!("z"), hints), (b, json!("z"), Value::Null)];
    world.wait_all(&ENDPOINT_SLICES, |slices| told(slices) == both).await;
}

fn shown(slices: &[SharedObject]) -> Vec<String> {
    let mut all: Vec<String> = slices
        .iter()
        .filter(|slice| slice.label(SERVICE_NAME) == Some("web"))
        .flat_map(|slice| {
            let port = slice.pointer("/ports/0/port").cloned().unwrap_or(Value::Null);
            list(slice, "/endpoints").iter().map(move |endpoint| {
                let conditions = &endpoint["conditions"];
                let on = |name: &str| if conditions[name] == true { &name[..1] } else { "-" }.to_owned();
                let address = endpoint.str_at("/addresses/0");
                format!("{address}:{port} {}{}{}", on("ready"), on("serving"), on("terminating"))
            })
        })
        .collect();
    all.sort();
    all
}

async fn wait(world: &World, wanted: &[&str]) -> Vec<SharedObject> {
    world.wait_all(&ENDPOINT_SLICES, |slices| shown(slices) == wanted).await
}

#[tokio::test]
async fn follow_the_pods() {
    let world = World::new().await;
    let made = world.create(&SERVICES, service(json!([{"name": "p", "port": 80, "targetPort": "http"}]))).await;
    world.client.put(&PODS, pod("a", "10.42.0.1", 8080, true));
    world.client.put(&PODS, pod("b", "10.42.0.2", 9090, false));
    world.client.put(&PODS, pod("c", "", 8080, false));
    let slices = wait(&world, &["10.42.0.1:8080 rs-", "10.42.0.2:9090 ---"]).await;
    assert_eq!(slices.len(), 2, "one for each set of port numbers");
    let slice = slices.iter().find(|slice| slice["ports"][0]["port"] == 8080).unwrap();
    assert!(is_controlled_by(slice, made.uid()));
    assert_eq!(slice.label("l"), Some("m"));
    assert_eq!(slice["ports"], json!([{"name": "p", "port": 8080, "protocol": "TCP"}]));
    assert_eq!(slice["endpoints"][0]["nodeName"], "n");
    assert_eq!(slice.str_at("/endpoints/0/targetRef/name"), "a");

    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    world.client.patch(&PODS, "x", "b", "status", Patch::Merge(ready)).await.unwrap();
    wait(&world, &["10.42.0.1:8080 rs-", "10.42.0.2:9090 rs-"]).await;
    world.delete(&PODS, "b").await;
    wait(&world, &["10.42.0.1:8080 rs-", "10.42.0.2:9090 -st"]).await;
    let now = api::client::DeleteOptions { grace_period_seconds: Some(0), ..Default::default() };
    world.client.delete(&PODS, "x", "b", &now).await.unwrap();
    wait(&world, &["10.42.0.1:8080 rs-"]).await;
    let ended = json!({"status": {"phase": "Failed"}});
    world.client.patch(&PODS, "x", "a", "status", Patch::Merge(ended)).await.unwrap();
    let slices = wait(&world, &[]).await;
    let slices = if slices.len() == 1 { slices } else { world.wait_all(&ENDPOINT_SLICES, |s| s.len() == 1).await };
    assert_eq!(slices.len(), 1, "an empty one stays");
    world.delete(&SERVICES, "web").await;
    world.wait_all(&ENDPOINT_SLICES, |slices| slices.is_empty()).await;
}

#[tokio::test]
async fn headless_unready_and_without_selector() {
    let world = World::new().await;
    let mut headless = service(json!([]));
    headless["spec"]["clusterIP"] = json!("None");
    headless["spec"]["publishNotReadyAddresses"] = json!(true);
    let mut named = pod("a", "10.42.0.1", 80, false);
    named["spec"]["hostname"] = json!("db-0");
    named["spec"]["subdomain"] = json!("web");
    world.client.put(&PODS, named);
    world.create(&SERVICES, headless).await;
    let slices = wait(&world, &["10.42.0.1:null r--"]).await;
    assert_eq!(slices[0].label(HEADLESS), Some(""));
    assert_eq!(slices[0].str_at("/endpoints/0/hostname"), "db-0");

    let mut bare = service(json!([{"port": 80}]));
    bare["metadata"]["name"] = json!("bare");
    bare["spec"]["selector"] = json!({});
    world.create(&SERVICES, bare).await;
    world.patch(&SERVICES, "web", json!({"spec": {"selector": null}})).await;
    world.wait_all(&ENDPOINT_SLICES, |slices| slices.is_empty()).await;
}

#[tokio::test]
async fn many_pods_are_split_and_stay_put() {
    let world = World::new().await;
    for at in 0..250 {
        world.client.put(&PODS, pod(&format!("p{at}"), &format!("10.42.1.{at}"), 80, true));
    }
    world.create(&SERVICES, service(json!([{"port": 80}]))).await;
    let total = |slices: &[SharedObject]| slices.iter().map(|s| list(s, "/endpoints").len()).sum::<usize>();
    let slices = world.wait_all(&ENDPOINT_SLICES, |slices| total(slices) == 250).await;
    assert_eq!(slices.len(), 3);
    assert!(slices.iter().all(|slice| list(slice, "/endpoints").len() <= 100));
    let before: Vec<(String, Object)> = slices.iter().map(|s| (s.name().to_owned(), (**s).clone())).collect();
    let now = api::client::DeleteOptions { grace_period_seconds: Some(0), ..Default::default() };
    world.client.delete(&PODS, "x", "p7", &now).await.unwrap();
    let after = world.wait_all(&ENDPOINT_SLICES, |slices| total(slices) == 249).await;
    let changed = after.iter().filter(|s| !before.iter().any(|(_, old)| old == &***s)).count();
    assert_eq!(changed, 1, "only the slice that held it");
}
