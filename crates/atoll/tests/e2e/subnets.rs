//! Networks (`atoll.dev`) with kubectl: pods of several subnets, what does not fit, and `kill -9`.

use crate::cluster::{Cluster, Said, json};
use crate::{Outcome, Test};
use rustix::process::Signal;

pub const TESTS: &[Test] = &[("subnets_of_a_namespace", subnets)];

fn network(namespace: &str, name: &str, cidr: &str, more: &str) -> String {
    format!(
        "---\napiVersion: atoll.dev/v1alpha1\nkind: Network\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{cidr: {cidr}{more}}}\n"
    )
}

/// A pod that serves its name on port 8000; `annotations` as in YAML.
fn server(namespace: &str, name: &str, annotations: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  labels: {{app: {name}}}\n  \
         annotations: {{{annotations}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    \
         image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, 'while true; do echo {name} | nc -l -p 8000; done']\n"
    )
}

fn subnets(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-subnets");
    let get = |what: &str, path: &str| c.kubectl(&["get", "-n", &ns, what, "-o", &format!("jsonpath={{{path}}}")]).out;
    let says = |name: &str, reason: &str| {
        c.until(&format!("network {name} is {reason}"), || {
            get(&format!("network/{name}"), ".status.conditions[0].reason") == reason
        });
        get(&format!("network/{name}"), ".status.conditions[0].message")
    };
    bad(c, &ns);
    let edge = "atoll.dev/network: edge";
    // In one go: pods wait for their Network.
    let service = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\n\
         spec: {{selector: {{app: far}}, ports: [{{port: 80, targetPort: 8000}}]}}\n"
    );
    let all = [
        server(&ns, "near", ""),
        server(&ns, "far", edge),
        server(&ns, "six", "atoll.dev/network: six"),
        network(&ns, "edge", "10.44.1.0/28", ", description: 'the edge'"),
        network(&ns, "six", "10.44.2.0/24", ", cidr6: 'fd00:10:44:2::/64'"),
        service,
    ];
    c.apply(&all.concat());
    let pods = ["near", "far", "six"];
    pods.iter().for_each(|pod| c.wait_ready(&ns, &format!("pod/{pod}")));
    let address = |pod: &str| get(&format!("pod/{pod}"), ".status.podIP");
    let six = |pod: &str| get(&format!("pod/{pod}"), ".status.podIPs[1].ip");
    let (far, near) = (address("far"), address("near"));
    assert!(far.starts_with("10.44.1.") && near.starts_with("10.42."), "{far} {near}");
    let ipv6 = !six("near").is_empty();
    if ipv6 {
        assert!(six("six").starts_with("fd00:10:44:2::") && six("far").starts_with("fd00:10:44::1"), "{}", six("six"));
    }
    let exec = |pod: &str, line: &str| -> Said { c.kubectl(&["exec", "-n", &ns, pod, "--", "sh", "-c", line]) };
    let call = |pod: &str, host: &str, port: u16| {
        exec(pod, &format!("nc -w 3 {host} {port} </dev/null")).out.trim().to_owned()
    };
    for client in pods {
        for server in pods {
            let to = address(server);
            c.until(&format!("{client} reaches {server}"), || call(client, &to, 8000) == server);
            if ipv6 {
                c.until(&format!("{client} reaches {server} by IPv6"), || call(client, &six(server), 8000) == server);
            }
        }
        c.until("the Service answers", || call(client, "web", 80) == "far");
    }
    assert!(exec("near", &format!("nslookup web.{ns}.svc.cluster.local 10.43.0.10")).ok);
    let table = c.kubectl(&["get", "net", "-n", &ns, "edge", "--no-headers"]).good();
    let row: Vec<&str> = table.split_whitespace().take(6).collect();
    assert_eq!(row, ["edge", "10.44.1.0/28", "1", "12", "True", "Ready"]);
    // What overlaps names what it overlaps.
    c.apply(&(network(&ns, "twin", "10.44.1.0/24", "") + &network(&ns, "pods", "10.42.8.0/24", "")));
    assert_eq!(says("twin", "Overlaps"), format!("overlaps Network {ns}/edge, 10.44.1.0/28"));
    assert_eq!(says("pods", "Overlaps"), "overlaps workloads' network, 10.42.0.0/16");
    c.apply(&network(&ns, "foreign", "192.0.2.0/24", ""));
    assert!(says("foreign", "Invalid").contains("atoll up --subnet-cidr"));
    // No namespace takes everything.
    c.apply(&network(&ns, "greedy", "10.44.128.0/17", ""));
    assert!(says("greedy", "ShareExceeded").contains("its share of 10.44.0.0/16 is 8192"));
    // What flows is shown by name.
    c.until("the flow is seen by name", || {
        let _ = call("six", &far, 8000);
        let data = c.data();
        let words = ["network", "top", "--every", "1", "-o", "json", "--data-dir", &data.to_string_lossy()];
        let flows = json(&c.atoll(&words).good());
        let is = |flow: &serde_json::Value, end: &str, pod: &str| {
            flow[end].as_str().is_some_and(|name| name.starts_with(&format!("{ns}/{pod} (10.44.")))
        };
        flows.as_array().expect("flows").iter().any(|flow| is(flow, "from", "six") && is(flow, "to", "far"))
    });
    through_the_gateway(c, &ns);
    // Policies mean the pods wherever they are.
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: far, namespace: NS}\nspec:\n  \
                  podSelector: {matchLabels: {app: far}}\n  ingress: [{from: [{podSelector: {matchLabels: {app: six}}}]}]\n";
    c.apply(&policy.replace("NS", &ns));
    c.until("the policy is in force", || call("near", &far, 8000).is_empty());
    assert_eq!(call("six", &far, 8000), "far");
    let data = c.data();
    let (from, to) = (format!("{ns}/near"), format!("{ns}/far"));
    let say = c.atoll(&["network", "explain", "--data-dir", &data.to_string_lossy(), &from, &to, "--port", "8000"]);
    assert!(!say.ok && say.out.contains(&format!("{ns}/far ({far})")), "{}", say.out);
    let log = c.atoll(&["network", "log", "--data-dir", &data.to_string_lossy()]).good();
    let refused = format!("{ns}/near ({near}) -> {ns}/far ({far})");
    assert!(log.lines().any(|line| line.contains(&refused)), "{refused}: {log}");
    // Killed and started again: the same addresses, and traffic.
    c.stop(Signal::KILL);
    c.up();
    assert_eq!(address("far"), far);
    assert_eq!(call("six", &far, 8000), "far");
    assert_eq!(call("near", &far, 8000), "", "the policy holds");
    says("edge", "Ready");
    // In use it stays, and says who uses it.
    c.kubectl(&["delete", "network", "-n", &ns, "edge", "--wait=false"]).good();
    assert!(says("edge", "Terminating").contains(&format!("pod {ns}/far")));
    assert_eq!(call("six", &far, 8000), "far");
    c.kubectl(&["delete", "pod", "-n", &ns, "far"]).good();
    c.kubectl(&["wait", "--for=delete", "-n", &ns, "network/edge", "--timeout=60s"]).good();
    c.until("the twin has room", || get("network/twin", ".status.conditions[0].reason") == "Ready");
    c.kubectl(&["delete", "namespace", &ns, "--timeout=60s"]).good();
    Outcome::Passed
}

/// The gateway reaches a workload wherever its address is from.
fn through_the_gateway(c: &Cluster, ns: &str) {
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: shop, namespace: {ns}, labels: {{app: shop}}, \
         annotations: {{atoll.dev/network: six}}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    \
         image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, 'mkdir /tmp/w && echo open > /tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w']\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: shop, namespace: {ns}}}\n\
         spec: {{selector: {{app: shop}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n\
         ---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: shop, namespace: {ns}}}\nspec:\n  \
         rules: [{{host: subnets.test, http: {{paths: [{{path: /, pathType: Prefix, \
         backend: {{service: {{name: shop, port: {{name: http}}}}}}}}]}}}}]\n"
    ));
    c.wait_ready(ns, "pod/shop");
    let curl = ["-sS", "-m", "20", "-H", "Host: subnets.test", "http://127.0.0.1:8080/"];
    c.until("the gateway reaches it", || {
        c.inside("curl").args(curl).output().is_ok_and(|said| said.stdout == b"open\n")
    });
}

fn bad(c: &Cluster, ns: &str) {
    for (yaml, wanted) in [
        (network(ns, "bad", "10.44.1.1/24", ""), "spec.cidr: Invalid value: \"10.44.1.1/24\""),
        (network(ns, "bad", "10.44.1.0/30", ""), "the prefix length must be 8 to 28"),
        (network(ns, "bad", "'fd00::/64'", ""), "spec.cidr: Invalid value: \"fd00::/64\": must be an IPv4 network"),
        (network(ns, "bad", "10.44.1.0/24", ", cidr6: x"), "spec.cidr6: Invalid value: \"x\""),
        (server(ns, "bad", "atoll.dev/network: Not_A_Name"), "metadata.annotations[atoll.dev/network]: Invalid value"),
    ] {
        let said = c.kubectl_with(&["apply", "-f", "-"], &yaml).bad();
        assert!(said.contains(wanted), "{yaml}: {said}");
    }
    c.apply(&network(ns, "fixed", "10.44.3.0/24", ""));
    let said = c.kubectl_with(&["apply", "-f", "-"], &network(ns, "fixed", "10.44.4.0/24", "")).bad();
    assert!(said.contains("spec.cidr: Invalid value: \"10.44.4.0/24\": field is immutable"), "{said}");
    let said = c.kubectl(&["annotate", "namespace", ns, "atoll.dev/network=No_Name"]).bad();
    assert!(said.contains("metadata.annotations[atoll.dev/network]"), "{said}");
    c.kubectl(&["delete", "network", "-n", ns, "fixed", "--timeout=60s"]).good();
    assert!(c.kubectl(&["explain", "network.spec.cidr6"]).good().contains("fd00:10:44:7::/64"));
}
