//! Restarts, crashes and what they must not change. These run last: they stop and start the instance.

use crate::cluster::{Cluster, Said, json, sleeper};
use crate::{Outcome, Test};
use rustix::process::Signal;

pub const TESTS: &[Test] = &[
    ("service_dns_and_cluster_ip", service),
    ("gateway_routes_to_pods", gateway),
    ("workloads_survive_kill_and_restart", survive),
    ("host_network_is_untouched", host_untouched),
];

const WEB: &str = "containers:
      - name: main
        image: 127.0.0.1:5000/test/busybox:1
        command: [sh, -c, 'mkdir /tmp/w; hostname > /tmp/w/index.html; exec httpd -f -p 8000 -h /tmp/w']
        readinessProbe: {httpGet: {path: /, port: 8000}, periodSeconds: 1}
";

fn web(ns: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: {ns}}}\nspec:\n  replicas: 2\n  \
         selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 0\n      {WEB}---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\nspec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8000}}]}}\n"
    )
}

fn service(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-service");
    c.apply(&web(&ns));
    c.apply(&sleeper("client", &ns));
    c.kubectl(&["rollout", "status", "-n", &ns, "deploy/web", "--timeout=60s"]).good();
    c.wait_ready(&ns, "pod/client");
    // Debian's static busybox has a wget that crashes; nc does
    let get = |host: &str| {
        let line = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {host} 80 | grep ^web-");
        c.kubectl(&["exec", "-n", &ns, "client", "--", "sh", "-c", &line])
    };
    let mut seen = std::collections::BTreeSet::new();
    c.until("both replicas answer through the Service's name", || {
        seen.insert(get("web").out);
        seen.remove("");
        seen.len() == 2
    });
    assert!(get(&format!("web.{ns}.svc.cluster.local")).ok);
    assert!(!get("nothing-here").ok);
    Outcome::Passed
}

fn gateway(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-gateway");
    c.apply(&web(&ns));
    c.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {ns}}}\nspec:\n  \
         parentRefs: [{{name: atoll, namespace: default}}]\n  hostnames: [gw.example]\n  rules:\n  \
         - {{matches: [{{path: {{type: PathPrefix, value: /}}}}], backendRefs: [{{name: web, port: 80}}]}}\n"
    ));
    let get = |host: &str| {
        c.inside("curl")
            .args(["-fsS", "-m", "5", "-H", &format!("host: {host}"), "http://127.0.0.1:8080/"])
            .output()
            .unwrap()
    };
    c.until("the route answers", || get("gw.example").status.success());
    assert!(!get("other.example").status.success());
    let h2 = c
        .inside("curl")
        .args(["-fsS", "--http2-prior-knowledge", "-H", "host: gw.example", "http://127.0.0.1:8080/"])
        .output();
    assert!(h2.unwrap().status.success());
    Outcome::Passed
}

fn containers(c: &Cluster, ns: &str) -> serde_json::Value {
    let list = json(&c.kubectl(&["get", "pods", "-n", ns, "-o", "json"]).good());
    let pods = list["items"].as_array().unwrap();
    pods.iter()
        .map(|p| {
            let s = &p["status"]["containerStatuses"][0];
            serde_json::json!([
                p["metadata"]["name"],
                s["containerID"],
                s["restartCount"],
                s["state"]["running"]["startedAt"],
                p["status"]["podIP"]
            ])
        })
        .collect()
}

fn survive(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-survive");
    c.apply(&web(&ns));
    c.kubectl(&["rollout", "status", "-n", &ns, "deploy/web", "--timeout=60s"]).good();
    let before = containers(c, &ns);
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        c.stop(signal);
        c.up();
        c.until("the node reports again", || c.kubectl(&["get", "node"]).out.contains(" Ready"));
        assert_eq!(containers(c, &ns), before, "after {signal:?}");
        let name = before[0][0].as_str().unwrap();
        assert_eq!(c.kubectl(&["exec", "-n", &ns, name, "--", "hostname"]).good().trim(), name);
    }
    c.kubectl(&["scale", "-n", &ns, "deploy/web", "--replicas=3"]).good();
    c.kubectl(&["rollout", "status", "-n", &ns, "deploy/web", "--timeout=60s"]).good();
    Outcome::Passed
}

/// What `ip` and `nft` say in the instance's host namespace while it runs: nothing of Atoll's.
fn host_untouched(c: &Cluster) -> Outcome {
    let look = |program: &str, args: &[&str]| Said::of(c.inside(program).args(args).output().unwrap());
    assert_eq!(look("ip", &["-o", "link"]).good().lines().count(), 1, "only lo");
    assert_eq!(look("ip", &["route"]).good(), "");
    let rules = look("nft", &["list", "ruleset"]);
    assert_eq!(rules.good(), "");
    let forward = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let inside = look("cat", &["/proc/sys/net/ipv4/ip_forward"]).good();
    assert!(inside == "0\n" || inside == forward);
    Outcome::Passed
}
