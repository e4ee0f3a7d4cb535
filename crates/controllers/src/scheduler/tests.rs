use super::cluster::Cluster;
use super::demand::{Demand, requests};
use super::filter::Filter;
use super::score;
use crate::context::PODS;
use crate::testing::{World, template};
use api::object::{Meta, SharedObject};
use serde_json::{Value, json};
use std::sync::Arc;

fn node(name: &str, change: Value) -> SharedObject {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10"}}});
    merge(&mut node, &change);
    Arc::new(node)
}

fn pod(name: &str, change: Value) -> SharedObject {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "x", "uid": name, "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}}}]}});
    merge(&mut pod, &change);
    Arc::new(pod)
}

fn merge(to: &mut Value, from: &Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            from.iter().for_each(|(key, value)| merge(to.entry(key.clone()).or_insert(Value::Null), value));
        }
        (to, from) => *to = from.clone(),
    }
}

fn cluster(nodes: &[SharedObject], placed: &[(&str, SharedObject)]) -> Cluster {
    let mut cluster = Cluster::default();
    cluster.replace(nodes, &[]);
    placed.iter().for_each(|(node, pod)| cluster.assume(pod, node));
    cluster
}

fn refusal(cluster: &Cluster, pod: &SharedObject) -> Vec<String> {
    refusal_on(cluster, pod, cluster.nodes().next().unwrap().name.as_str())
}

fn refusal_on(cluster: &Cluster, pod: &SharedObject, name: &str) -> Vec<String> {
    let demand = Demand::of(pod, None);
    let node = cluster.nodes().find(|node| node.name == name).unwrap();
    Filter::new(cluster, &demand).check(node).err().unwrap_or_default()
}

#[test]
fn resources() {
    let placed = [("n", pod("a", json!({}))), ("n", pod("b", json!({})))];
    let full = cluster(&[node("n", json!({}))], &placed);
    assert_eq!(refusal(&full, &pod("c", json!({}))), [""; 0]);
    let large = json!({"spec": {"containers": [{"resources": {"requests": {"cpu": "1100m", "memory": "3Gi"}}}]}});
    assert_eq!(refusal(&full, &pod("c", large)), ["Insufficient cpu", "Insufficient memory"]);
    let gpu = json!({"spec": {"containers": [{"resources": {"requests": {"example.com/gpu": "1"}}}]}});
    assert_eq!(refusal(&full, &pod("c", gpu)), ["Insufficient example.com/gpu"]);
    let overhead = json!({"spec": {"overhead": {"cpu": "600m"}}});
    assert_eq!(refusal(&full, &pod("c", overhead)), ["Insufficient cpu"]);
    let crowded = cluster(&[node("n", json!({"status": {"allocatable": {"pods": "2"}}}))], &placed);
    assert_eq!(refusal(&crowded, &pod("c", json!({}))), ["Too many pods"]);
}

#[test]
fn init_containers_and_sidecars_count_as_kubernetes_counts() {
    let of = |cpu: &str, always: bool| {
        let mut container = json!({"resources": {"requests": {"cpu": cpu}}});
        if always {
            container["restartPolicy"] = json!("Always");
        }
        container
    };
    let pod = json!({"spec": {
        "initContainers": [of("300m", false), of("100m", true), of("700m", false)],
        "containers": [of("200m", false), of("300m", false)]}});
    assert_eq!(requests(&pod, None).get("cpu"), 800, "the last init container beside the sidecar");
    let class = json!({"overhead": {"podFixed": {"cpu": "50m"}}});
    assert_eq!(requests(&pod, Some(&class)).get("cpu"), 850);
}

#[test]
fn taints_selectors_and_affinity_to_nodes() {
    let tainted = json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}});
    let one = cluster(&[node("n", tainted)], &[]);
    assert_eq!(refusal(&one, &pod("a", json!({}))), ["node(s) had untolerated taint {k: v}"]);
    for toleration in [
        json!({"key": "k", "value": "v"}),
        json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}),
        json!({"operator": "Exists"}),
    ] {
        assert_eq!(refusal(&one, &pod("a", json!({"spec": {"tolerations": [toleration]}}))), [""; 0]);
    }
    let other = json!({"spec": {"tolerations": [{"key": "k", "value": "w"}]}});
    assert_eq!(refusal(&one, &pod("a", other)).len(), 1);

    let closed = cluster(&[node("n", json!({"spec": {"unschedulable": true}}))], &[]);
    assert_eq!(refusal(&closed, &pod("a", json!({}))), ["node(s) were unschedulable"]);

    let labelled = cluster(&[node("n", json!({"metadata": {"labels": {"disk": "ssd", "size": "5"}}}))], &[]);
    let mismatch = ["node(s) didn't match Pod's node affinity/selector"];
    assert_eq!(refusal(&labelled, &pod("a", json!({"spec": {"nodeSelector": {"disk": "hdd"}}}))), mismatch);
    assert_eq!(refusal(&labelled, &pod("a", json!({"spec": {"nodeSelector": {"disk": "ssd"}}}))), [""; 0]);
    let required = |terms: Value| {
        json!({"spec": {"affinity": {"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}})
    };
    let expression = |key: &str, operator: &str, value: &str| {
        json!({"matchExpressions":
        [{"key": key, "operator": operator, "values": [value]}]})
    };
    let either = json!([expression("disk", "In", "hdd"), expression("size", "Gt", "4")]);
    assert_eq!(refusal(&labelled, &pod("a", required(either))), [""; 0]);
    assert_eq!(refusal(&labelled, &pod("a", required(json!([expression("size", "Lt", "4")])))), mismatch);
    assert_eq!(refusal(&labelled, &pod("a", required(json!([{}])))), mismatch, "an empty term matches nothing");
    let by_name = json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}]);
    assert_eq!(refusal(&labelled, &pod("a", required(by_name))), [""; 0]);
}

#[test]
fn ports_of_the_host() {
    let port = |ip: &str, protocol: &str| json!({"spec": {"containers": [{"ports": [{"hostPort": 80, "hostIP": ip, "protocol": protocol}]}]}});
    let one = cluster(&[node("n", json!({}))], &[("n", pod("a", port("10.0.0.1", "TCP")))]);
    let taken = ["node(s) didn't have free ports for the requested pod ports"];
    assert_eq!(refusal(&one, &pod("b", port("", "TCP"))), taken);
    assert_eq!(refusal(&one, &pod("b", port("10.0.0.1", "TCP"))), taken);
    assert_eq!(refusal(&one, &pod("b", port("10.0.0.2", "TCP"))), [""; 0]);
    assert_eq!(refusal(&one, &pod("b", port("", "UDP"))), [""; 0]);
}

fn zone(name: &str, zone: &str) -> SharedObject {
    node(name, json!({"metadata": {"labels": {"zone": zone}}}))
}

fn affinity(kind: &str, app: &str) -> Value {
    let terms = json!([{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}}]);
    json!({"spec": {"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}})
}

#[test]
fn affinity_between_pods() {
    let nodes = [zone("n1", "a"), zone("n2", "a"), zone("n3", "b")];
    let three = cluster(&nodes, &[("n1", pod("db", json!({})))]);
    let near = pod("web", affinity("podAffinity", "db"));
    assert_eq!(refusal_on(&three, &near, "n2"), [""; 0]);
    assert_eq!(refusal_on(&three, &near, "n3"), ["node(s) didn't match pod affinity rules"]);
    let apart = pod("web", affinity("podAntiAffinity", "db"));
    assert_eq!(refusal_on(&three, &apart, "n2"), ["node(s) didn't match pod anti-affinity rules"]);
    assert_eq!(refusal_on(&three, &apart, "n3"), [""; 0]);
    let first = pod("self", affinity("podAffinity", "self"));
    assert_eq!(refusal_on(&three, &first, "n3"), [""; 0], "the first of its kind may be anywhere");
    let shy = pod("shy", affinity("podAntiAffinity", "web"));
    let repelled = cluster(&nodes, &[("n1", shy)]);
    let why = ["node(s) didn't satisfy existing pods anti-affinity rules"];
    assert_eq!(refusal_on(&repelled, &pod("web", json!({})), "n2"), why);
}

#[test]
fn spreading() {
    let nodes = [zone("n1", "a"), zone("n2", "b")];
    let labels = json!({"metadata": {"labels": {"app": "s"}}});
    let mut one = pod("s2", labels.clone());
    Arc::make_mut(&mut one)["spec"]["topologySpreadConstraints"] = json!([{"maxSkew": 1, "topologyKey": "zone",
        "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "s"}}}]);
    let cluster = cluster(&nodes, &[("n1", pod("s1", labels))]);
    assert_eq!(refusal_on(&cluster, &one, "n1"), ["node(s) didn't match pod topology spread constraints"]);
    assert_eq!(refusal_on(&cluster, &one, "n2"), [""; 0]);
}

#[test]
fn the_best_node() {
    let owner = json!({"metadata": {"ownerReferences": [{"uid": "rs", "controller": true}]}});
    let choose = |cluster: &Cluster, pod: &SharedObject| {
        let demand = Demand::of(pod, None);
        let nodes: Vec<_> = cluster.nodes().collect();
        score::best(cluster, &demand, &nodes).unwrap().name.clone()
    };
    let nodes = [zone("n1", "a"), zone("n2", "b")];
    let busy = cluster(&nodes, &[("n1", pod("a", json!({})))]);
    assert_eq!(choose(&busy, &pod("b", json!({}))), "n2", "the emptier one");
    let sibling = cluster(&nodes, &[("n1", pod("a", owner.clone())), ("n2", pod("z", json!({})))]);
    assert_eq!(choose(&sibling, &pod("b", owner)), "n2", "away from its like");
    let wish = json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution":
        [{"weight": 10, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}}]}}}});
    assert_eq!(choose(&busy, &pod("b", wish)), "n1", "where it wants to be");
    let avoid = zone("n2", "b");
    let mut avoid = (*avoid).clone();
    avoid["spec"]["taints"] = json!([{"key": "k", "effect": "PreferNoSchedule"}]);
    let avoided = cluster(&[zone("n1", "a"), Arc::new(avoid)], &[("n1", pod("a", json!({})))]);
    assert_eq!(choose(&avoided, &pod("b", json!({}))), "n1");
}

fn plain(name: &str, cpu: &str) -> Value {
    let mut spec = template("a", "i")["spec"].clone();
    spec["containers"][0]["resources"]["requests"]["cpu"] = json!(cpu);
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "x"}, "spec": spec})
}

#[tokio::test]
async fn binds_says_why_not_and_tries_again() {
    let world = World::new().await;
    world.create(&PODS, plain("early", "1")).await;
    let told = |message: &'static str| {
        move |pod: &Value| {
            let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
            conditions.is_some_and(|all| {
                all.iter().any(|c| c.str_at("/reason") == "Unschedulable" && c.str_at("/message") == message)
            })
        }
    };
    world.wait(&PODS, "early", told("no nodes available to schedule pods")).await;
    world.node("n", |_| true).await;
    world.wait(&PODS, "early", |pod| pod.str_at("/spec/nodeName") == "n").await;
    world.wait_event("Scheduled: Successfully assigned x/early to n").await;

    world.create(&PODS, plain("big", "7500m")).await;
    world.wait(&PODS, "big", told("0/1 nodes are available: 1 Insufficient cpu.")).await;
    world.wait_event("FailedScheduling: 0/1 nodes are available: 1 Insufficient cpu.").await;
    world.delete(&PODS, "early").await;
    world.wait(&PODS, "big", |pod| pod.str_at("/spec/nodeName") == "n").await;

    let mut other = plain("other", "1m");
    other["spec"]["schedulerName"] = json!("mine");
    world.create(&PODS, other).await;
    let mut gated = plain("gated", "1m");
    gated["spec"]["schedulingGates"] = json!([{"name": "g"}]);
    world.create(&PODS, gated).await;
    world.create(&PODS, plain("last", "1m")).await;
    world.wait(&PODS, "last", |pod| pod.str_at("/spec/nodeName") == "n").await;
    for name in ["other", "gated"] {
        assert_eq!(world.get(&PODS, name).await.unwrap().str_at("/spec/nodeName"), "");
    }
}

#[tokio::test]
async fn never_gives_out_more_than_there_is() {
    let world = World::new().await;
    for name in ["n1", "n2"] {
        world.node(name, |_| true).await;
    }
    for at in 0..30 {
        world.create(&PODS, plain(&format!("p{at:02}"), "700m")).await;
    }
    // 11 of 700m fit on 8 CPUs.
    let count = |pods: &[SharedObject], node: &str| pods.iter().filter(|p| p.str_at("/spec/nodeName") == node).count();
    world
        .wait_all(&PODS, |pods| {
            assert!(count(pods, "n1") <= 11 && count(pods, "n2") <= 11);
            count(pods, "n1") == 11 && count(pods, "n2") == 11
        })
        .await;
}
