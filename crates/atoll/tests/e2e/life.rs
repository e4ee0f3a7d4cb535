//! Restarts, crashes and what they must not change. These run last: they stop and start the instance.

use crate::cluster::{Cluster, Said, json, sleeper};
use crate::{Outcome, Test};
use rustix::process::Signal;

pub const TESTS: &[Test] = &[
    ("service_dns_and_cluster_ip", service),
    ("gateway_routes_to_pods", gateway),
    ("workloads_survive_kill_and_restart", survive),
    ("systemd_is_notified", notifies),
    ("up_right_after_a_kill", restarts_at_once),
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

/// Links, addresses, routes, rules and sysctls of the network namespace that an instance is started from.
pub fn host_state(c: &Cluster) -> Vec<(&'static str, String)> {
    let look = |program: &str, args: &[&str]| Said::of(c.inside(program).args(args).output().unwrap()).good();
    // what the kernel itself counts in the whole machine, or draws anew at every reading
    let moving = ["random.", "netfilter.nf_conntrack_count", "fs.", "kernel.", "vm."];
    let sysctls = Said::of(c.inside("sysctl").arg("-a").output().unwrap()).out;
    let sysctls: Vec<&str> = sysctls.lines().filter(|l| !moving.iter().any(|m| l.contains(m))).collect();
    vec![
        ("ip -d link", look("ip", &["-d", "link"])),
        ("ip address", look("ip", &["address"])),
        ("ip rule", look("ip", &["rule"])),
        ("ip route", look("ip", &["route", "show", "table", "all"])),
        ("ip neighbour", look("ip", &["neighbour"])),
        ("nft list ruleset", look("nft", &["list", "ruleset"])),
        ("sysctl -a", sysctls.join("\n")),
    ]
}

pub fn compare(before: &[(&str, String)], now: &[(&str, String)], when: &str) {
    for ((what, said), (_, then)) in now.iter().zip(before) {
        // What ARP has learnt meanwhile is no setting.
        let lines = |text: &str| -> Vec<String> {
            let learnt = *what == "ip neighbour";
            text.lines().filter(|line| !learnt || line.contains("PERMANENT")).map(str::to_owned).collect()
        };
        let (now, then) = (lines(said), lines(then));
        let new: Vec<_> = now.iter().filter(|line| !then.contains(line)).collect();
        let gone: Vec<_> = then.iter().filter(|line| !now.contains(line)).collect();
        assert!(new.is_empty() && gone.is_empty(), "{what}, {when}: new {new:?}, gone {gone:?}");
    }
}

/// What the host's network says before, while and after an instance runs workloads is the same, to the letter.
fn host_untouched(c: &Cluster) -> Outcome {
    let running = host_state(c);
    assert!(running.iter().all(|(what, said)| !said.is_empty() || !what.starts_with("sysctl")), "{running:?}");
    c.clear();
    c.stop(Signal::TERM);
    c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    let before = host_state(c);
    c.up();
    let ns = c.namespace("t-untouched");
    c.apply(&web(&ns));
    c.kubectl(&["rollout", "status", "-n", &ns, "deploy/web", "--timeout=60s"]).good();
    let during = host_state(c);
    c.stop(Signal::TERM);
    c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    let after = host_state(c);
    c.up();
    for (at, (what, said)) in before.iter().enumerate() {
        for (when, then) in [("with earlier workloads", &running), ("during", &during), ("after", &after)] {
            assert_eq!(&then[at].1, said, "{what}, {when}");
        }
    }
    Outcome::Passed
}

/// A service manager that asked to be told (sd_notify(3)) hears of readiness and of the end.
fn notifies(c: &Cluster) -> Outcome {
    let path = c.scratch("notify.sock");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let heard = || {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).expect("a notification");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    c.stop(Signal::TERM);
    c.up_with(&[], &[("NOTIFY_SOCKET", path.as_os_str())]);
    assert_eq!(heard(), "READY=1");
    c.stop(Signal::TERM);
    assert_eq!(heard(), "STOPPING=1");
    c.up();
    Outcome::Passed
}

/// Whoever starts an instance right after killing one need not wait for the kernel to clear up.
fn restarts_at_once(c: &Cluster) -> Outcome {
    for _ in 0..5 {
        let child = c.signal(Signal::KILL);
        c.up();
        child.map(|mut child| child.wait());
    }
    assert!(c.kubectl(&["get", "nodes"]).ok);
    Outcome::Passed
}
