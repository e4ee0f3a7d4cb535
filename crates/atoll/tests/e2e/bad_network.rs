//! What nobody should ask of the network: told clearly, and nothing else stops working.

use crate::cluster::{Cluster, sleeper};
use crate::{Outcome, Test};
use rustix::process::Signal;
use serde_json::{Value, json};

pub const TESTS: &[Test] = &[
    ("bad_network_objects_are_told", objects),
    ("bad_network_ten_thousand_endpoints", endpoints),
    ("bad_network_no_address_is_left", exhausted),
];

fn look_up(c: &Cluster, namespace: &str, name: &str) -> String {
    c.kubectl(&["exec", "-n", namespace, "pod", "--", "nslookup", "-type=a", name]).out
}

fn service(namespace: &str, name: &str, spec: &Value) -> String {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec})
        .to_string()
}

fn policy(namespace: &str, spec: &Value) -> String {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "bad", "namespace": namespace}, "spec": spec})
    .to_string()
}

fn slice(namespace: &str, name: &str, of: &str, endpoints: Value) -> String {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": of}},
        "ports": [{"name": "web", "port": 8000}], "endpoints": endpoints})
    .to_string()
}

fn objects(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-bad-network");
    let ports = json!([{"port": 80}]);
    let rule = |rule: Value| policy(&ns, &json!({"podSelector": {}, "ingress": [rule]}));
    let selects = |expression: Value| policy(&ns, &json!({"podSelector": {"matchExpressions": [expression]}}));
    c.apply(&service(&ns, "first", &json!({"clusterIP": "10.43.77.77", "ports": ports})));
    for (object, wanted) in [
        (rule(json!({"ports": [{"port": 0}]})), "spec.ingress[0].ports[0].port: Invalid value: 0"),
        (rule(json!({"ports": [{"port": 70000}]})), "spec.ingress[0].ports[0].port: Invalid value: 70000"),
        (rule(json!({"ports": [{"port": 9, "endPort": 8}]})), "spec.ingress[0].ports[0].endPort: Invalid value: 8"),
        (rule(json!({"ports": [{"endPort": 8}]})), "spec.ingress[0].ports[0].endPort: Required value"),
        (rule(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]})), "spec.ingress[0].from[0].ipBlock.cidr"),
        (
            rule(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/16", "except": ["10.0.0.0/8"]}}]})),
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (selects(json!({"key": "a", "operator": "In"})), "spec.podSelector.matchExpressions[0].values: Required value"),
        (
            selects(json!({"key": "a", "operator": "NotIn", "values": []})),
            "spec.podSelector.matchExpressions[0].values",
        ),
        (
            selects(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
            "spec.podSelector.matchExpressions[0].values: Forbidden",
        ),
        (
            selects(json!({"key": "a", "operator": "DoesNotExist", "values": ["b"]})),
            "spec.podSelector.matchExpressions[0].values: Forbidden",
        ),
        (selects(json!({"key": "a", "operator": "Near"})), "spec.podSelector.matchExpressions[0].operator"),
        (selects(json!({"key": "a b", "operator": "Exists"})), "spec.podSelector.matchExpressions[0].key"),
        (service(&ns, "Upper", &json!({"ports": ports})), "metadata.name: Invalid value: \"Upper\""),
        (service(&ns, "second", &json!({"clusterIP": "10.43.77.77", "ports": ports})), "10.43.77.77"),
        (service(&ns, "second", &json!({"clusterIP": "10.99.0.1", "ports": ports})), "10.99.0.1"),
        (service(&ns, "second", &json!({"ports": [{"port": 80}, {"port": 81}]})), "spec.ports[0].name: Required value"),
        (
            service(&ns, "second", &json!({"type": "ExternalName", "externalName": "no name"})),
            "spec.externalName: Invalid value: \"no name\"",
        ),
        (slice(&ns, "s", "first", json!([{"addresses": ["127.0.0.1"]}])), "endpoints[0].addresses[0]"),
        (slice(&ns, "s", "first", json!([{"addresses": ["169.254.169.254"]}])), "may not be in the link-local range"),
        (slice(&ns, "s", "first", json!([{"addresses": ["10.0.0.300"]}])), "must be a valid IPv4 address"),
        (slice(&ns, "s", "first", json!([{"addresses": ["10.0.0.3"], "hostname": "a.b"}])), "endpoints[0].hostname"),
    ] {
        let said = c.kubectl_with(&["create", "-f", "-"], &object).bad();
        assert!(said.contains(wanted), "{object}: {said}");
    }
    let clash = c.kubectl_with(&["create", "-f", "-"], &service(&ns, "first", &json!({"ports": ports}))).bad();
    assert!(clash.contains("services \"first\" already exists"), "{clash}");
    Outcome::Passed
}

/// Ten slices of a thousand, one after the other, beside a Service that goes on.
fn endpoints(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-endpoints");
    c.apply(&sleeper("pod", &ns));
    c.wait_ready(&ns, "pod/pod");
    c.apply(&service(&ns, "small", &json!({"clusterIP": "10.43.78.1", "ports": [{"port": 80}]})));
    let ports = json!([{"name": "web", "port": 80}]);
    c.apply(&service(&ns, "huge", &json!({"clusterIP": "None", "ports": ports})));
    c.apply(&service(&ns, "spread", &json!({"clusterIP": "10.43.78.2", "ports": ports})));
    for of in ["huge", "spread"] {
        for turn in 0..10 {
            let one = |n: u32| {
                let address = std::net::Ipv4Addr::from_bits(0x0a2a_1000 + turn * 1000 + n);
                json!({"addresses": [address.to_string()], "conditions": {"ready": true}})
            };
            let all: Vec<Value> = (0..1000).map(one).collect();
            c.kubectl_with(&["create", "-f", "-"], &slice(&ns, &format!("{of}-{turn}"), of, all.into())).good();
        }
    }
    let told = c.kubectl_with(
        &["create", "-f", "-"],
        &slice(&ns, "too-many", "huge", (0..1001).map(|_| json!({"addresses": ["10.42.9.9"]})).collect()),
    );
    assert!(told.bad().contains("endpoints: Invalid value: 1001: must have at most 1000 items"));
    c.until("the last of ten thousand has a name", || {
        look_up(c, &ns, "10-42-55-15.huge.t-endpoints.svc.cluster.local").contains("10.42.55.15")
    });
    c.until("the Service leads to all of them", || {
        // Nobody has those addresses, so no connection can tell.
        kernel_knows("10.42.55.15")
    });
    assert!(look_up(c, &ns, "small.t-endpoints.svc.cluster.local").contains("10.43.78.1"), "others go on");
    c.kubectl(&["delete", "service", "-n", &ns, "spread", "huge", "--wait=false"]).good();
    c.until("they go", || !kernel_knows("10.42.55.15"));
    c.kubectl(&["delete", "namespace", &ns]).good();
    Outcome::Passed
}

/// Whether some instance's ruleset names the address.
fn kernel_knows(address: &str) -> bool {
    let router = std::fs::read_dir("/run/atoll").into_iter().flatten().flatten();
    let pins = router.map(|instance| instance.path().join("netns/router")).filter(|pin| pin.exists());
    let mut lists = pins.map(|pin| {
        let list = std::process::Command::new("nsenter")
            .arg(format!("--net={}", pin.display()))
            .args(["nft", "list", "table", "ip", "atoll"])
            .output();
        list.map(|output| String::from_utf8_lossy(&output.stdout).contains(address)).unwrap_or(false)
    });
    lists.any(|found| found)
}

/// A network of sixteen addresses: those that do not get one say why, and get one when it is free again.
fn exhausted(c: &Cluster) -> Outcome {
    let down = || c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    let data = c.data();
    // What other tests left takes addresses too.
    c.clear();
    let ns = c.namespace("t-exhausted");
    c.stop(Signal::TERM);
    for (flags, wanted) in [
        (["--pod-cidr", "10.43.0.0/16"], "--service-cidr 10.43.0.0/16: overlaps pod_cidr"),
        (["--service-cidr", "10.42.128.0/20"], "--service-cidr 10.42.128.0/20: overlaps pod_cidr"),
        (["--pod-cidr", "127.0.0.0/16"], "not a unicast network"),
        (["--pod-cidr", "10.42.0.0/30"], "must be 8 to 28"),
        (["--pod-cidr", "10.42.0.1/16"], "zero them"),
        (["--pod-cidr", "nonsense"], "--pod-cidr nonsense"),
    ] {
        let said = c.atoll(&[&["up", "--data-dir", &data.to_string_lossy()], &flags[..]].concat()).bad();
        assert!(said.contains("-cidr ") && said.contains(wanted), "{flags:?}: {said}");
    }
    down();
    c.up_with(&["--pod-cidr", "10.42.0.0/28"], &[]);
    for n in 0..16 {
        c.apply(&sleeper(&format!("p{n}"), &ns));
    }
    let ready = || {
        let said = c.kubectl(&["get", "pods", "-n", &ns, "--no-headers"]).out;
        said.lines()
            .filter(|line| line.contains("Running"))
            .map(|line| line.split(' ').next().unwrap_or("").to_owned())
            .collect::<Vec<_>>()
    };
    let events = || c.kubectl(&["get", "events", "-n", &ns, "-o", "jsonpath={.items[*].message}"]).out;
    c.until("a pod says that there is no address", || events().contains("no free address in 10.42.0.0/28"));
    assert!(events().contains("choose a larger pod CIDR"), "{}", events());
    c.until("others run", || ready().len() > 2);
    let runs = ready();
    let others = || ready().into_iter().filter(|pod| !runs.contains(pod)).count();
    c.kubectl(&["delete", "pod", "-n", &ns, &runs[0], &runs[1]]).good();
    c.until("what is free is taken", || others() > 0);
    c.kubectl(&["delete", "namespace", &ns]).good();
    c.stop(Signal::TERM);
    down();
    c.up_with(&["--pod-cidr", "10.42.0.0/16,fd00:10:42::/64"], &[]);
    Outcome::Passed
}
