//! What a workload may take of the network, and what is its own: bandwidth, its address.

use crate::cluster::Cluster;
use crate::{Outcome, Test};

pub const TESTS: &[Test] =
    &[("network_bandwidth_by_annotation", bandwidth), ("network_addresses_are_kept_by_name", kept)];

fn pod(namespace: &str, name: &str, annotations: &str, command: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, annotations: {{{annotations}}}}}\n\
         spec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    \
         image: 127.0.0.1:5000/test/busybox:1\n    command: [sh, -c, '{command}']\n---\n"
    )
}

const MEGABYTES: u64 = 10;

/// Bits a second that a pod sends to an address, over 10 MB.
fn rate(c: &Cluster, namespace: &str, from: &str, to: &str) -> f64 {
    let uptime = "cut -d\" \" -f1 /proc/uptime";
    let send = format!("dd if=/dev/zero bs=1000000 count={MEGABYTES} 2>/dev/null | nc {to} 9000");
    let line = format!("set -o pipefail; {uptime} && {send} && {uptime}");
    let mut out = String::new();
    c.until("the sink listens", || {
        let said = c.kubectl(&["exec", "-n", namespace, from, "--", "sh", "-c", &line]);
        out = said.out;
        said.ok
    });
    let times: Vec<f64> = out.split_whitespace().map(|text| text.parse().unwrap()).collect();
    MEGABYTES as f64 * 8e6 / (times[1] - times[0])
}

fn near(what: &str, rate: f64, limit: f64) {
    let ratio = rate / limit;
    assert!((0.4..1.3).contains(&ratio), "{what}: {rate} of {limit}");
}

fn bandwidth(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-net-bandwidth");
    let bad = c.kubectl_with(
        &["apply", "-f", "-"],
        &pod(&ns, "bad", "kubernetes.io/egress-bandwidth: quick", "sleep 1000000"),
    );
    assert!(!bad.ok && bad.err.contains("metadata.annotations[kubernetes.io/egress-bandwidth]"), "{}", bad.err);
    // Its input stays open, so that it is the sender who ends.
    let sink = "mkfifo /tmp/open; exec 3<>/tmp/open; while true; do nc -l -p 9000 <&3 >/dev/null; done";
    c.apply(&pod(&ns, "sink", "", sink));
    c.apply(&pod(&ns, "slow", "kubernetes.io/egress-bandwidth: 20M", "sleep 1000000"));
    c.apply(&pod(&ns, "free", "", "sleep 1000000"));
    for name in ["sink", "slow", "free"] {
        c.wait_ready(&ns, &format!("pod/{name}"));
    }
    let to = c.kubectl(&["get", "pod", "-n", &ns, "sink", "-o", "jsonpath={.status.podIP}"]).good();
    near("sending", rate(c, &ns, "slow", &to), 20e6);
    assert!(rate(c, &ns, "free", &to) > 60e6, "nobody else is limited");
    // A running pod follows its annotations, in both directions.
    c.kubectl(&["annotate", "pod", "-n", &ns, "sink", "kubernetes.io/ingress-bandwidth=10M"]).good();
    c.until("what is received is limited", || rate(c, &ns, "free", &to) < 13e6);
    c.kubectl(&["annotate", "pod", "-n", &ns, "sink", "kubernetes.io/ingress-bandwidth-"]).good();
    c.kubectl(&["annotate", "pod", "-n", &ns, "slow", "kubernetes.io/egress-bandwidth-"]).good();
    c.until("nothing is limited any more", || rate(c, &ns, "slow", &to) > 60e6);
    let bad = c.kubectl(&["annotate", "pod", "-n", &ns, "slow", "kubernetes.io/egress-bandwidth=10"]);
    assert!(!bad.ok && bad.err.contains("unreasonably small"), "{}", bad.err);
    Outcome::Passed
}

fn kept(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-net-kept");
    let start = |name: &str, annotations: &str| {
        c.apply(&pod(&ns, name, annotations, "sleep 1000000"));
        c.wait_ready(&ns, &format!("pod/{name}"));
        c.kubectl(&["get", "pod", "-n", &ns, name, "-o", "jsonpath={.status.podIP}"]).good()
    };
    let remove = |name: &str| c.kubectl(&["delete", "pod", "-n", &ns, name, "--wait=true"]).good();
    let keep = "atoll.dev/keep-address: \"true\"";
    let first = start("db-0", keep);
    remove("db-0");
    // Others come in between, so that it is not by chance.
    assert_ne!(start("other", ""), first);
    assert_eq!(start("db-0", keep), first);
    let other = c.namespace("t-net-kept-other");
    for key in [format!("vm/{ns}/db"), format!("pod/{ns}/db-0")] {
        c.apply(&pod(&other, "thief", &format!("atoll.dev/address-key: {key}"), "sleep 1000000"));
        c.until("nobody takes over another's address", || {
            let events = c.kubectl(&["get", "events", "-n", &other]).good();
            events.contains("atoll.dev/address-key") && events.contains(&key)
        });
        c.kubectl(&["delete", "pod", "-n", &other, "thief", "--wait=true"]).good();
    }
    Outcome::Passed
}
