//! Administrators' policies through kubectl, and what `atoll network` shows of traffic.

use crate::cluster::{Cluster, Said, json};
use crate::{Outcome, Test};
use std::process::Stdio;

pub const TESTS: &[Test] = &[("policies_of_administrators", administrators), ("policies_traffic_can_be_seen", seen)];

fn server(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, 'while true; do echo {name} | nc -l -p 8000; done']\n"
    )
}

fn call(c: &Cluster, namespace: &str, pod: &str, host: &str) -> String {
    let line = format!("nc -w 3 {host} 8000 </dev/null");
    c.kubectl(&["exec", "-n", namespace, pod, "--", "sh", "-c", &line]).out.trim().to_owned()
}

fn address(c: &Cluster, namespace: &str, pod: &str) -> String {
    c.wait_ready(namespace, &format!("pod/{pod}"));
    c.kubectl(&["get", "pod", "-n", namespace, pod, "-o", "jsonpath={.status.podIP}"]).good()
}

fn network(c: &Cluster, words: &[&str]) -> Said {
    let data = c.data();
    let mut all = vec!["network"];
    all.extend(words);
    let data = data.to_string_lossy();
    all.extend(["--data-dir", &data]);
    c.atoll(&all)
}

/// How many packets a capture holds, each as long as its header says.
fn records(file: &[u8]) -> usize {
    let mut rest = &file[24..];
    let mut count = 0;
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[8..12].try_into().expect("a length")) as usize;
        rest = &rest[16 + length..];
        count += 1;
    }
    count
}

fn administrators(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-anp");
    c.apply(&server(&ns, "web"));
    c.apply(&server(&ns, "client"));
    let web = address(c, &ns, "web");
    address(c, &ns, "client");
    c.until("open inside the namespace", || call(c, &ns, "client", &web) == "web");
    c.apply(&format!(
        "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {{name: t-anp}}\nspec:\n  \
         priority: 7\n  subject: {{pods: {{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {ns}}}}}, \
         podSelector: {{matchLabels: {{app: web}}}}}}}}\n  ingress:\n  - {{name: shut, action: Deny, from: [{{namespaces: {{}}}}]}}\n"
    ));
    c.until("the administrator's word counts", || call(c, &ns, "client", &web).is_empty());
    let say = network(c, &["explain", &format!("{ns}/client"), &format!("{ns}/web"), "--port", "8000"]);
    assert!(!say.ok && say.out.contains("AdminNetworkPolicy t-anp ingress[0] (shut) denies it"), "{}", say.out);
    c.until("the policy says that it is in force", || {
        c.kubectl(&["get", "anp", "t-anp", "--no-headers"]).out.split_whitespace().take(3).eq(["t-anp", "7", "True"])
    });
    let bad = "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: BaselineAdminNetworkPolicy\nmetadata: {name: mine}\n\
               spec: {subject: {namespaces: {}}, egress: [{action: Deny, to: [{networks: [10.0.0.0]}]}]}\n";
    let error = c.kubectl_with(&["apply", "-f", "-"], bad).bad();
    assert!(error.contains("metadata.name: Invalid value: \"mine\""), "{error}");
    assert!(error.contains("spec.egress[0].to[0].networks[0]: Invalid value: \"10.0.0.0\""), "{error}");
    c.kubectl(&["delete", "anp", "t-anp"]).good();
    c.until("without it all is as before", || call(c, &ns, "client", &web) == "web");
    Outcome::Passed
}

/// What the network is asked goes through the API: it takes nothing of this node, but a user who may.
fn by_anyone_with_a_kubeconfig(c: &Cluster, ns: &str) {
    let own = std::fs::read_to_string(c.data().join("kubeconfig")).expect("the kubeconfig");
    let token = c.kubectl(&["create", "token", "-n", ns, "default"]).good();
    let lines = own.lines().filter(|line| !line.contains("client-key-data:"));
    let poor: Vec<String> = lines
        .map(|line| match line.split_once("client-certificate-data:") {
            Some((indent, _)) => format!("{indent}token: {}", token.trim()),
            None => line.to_owned(),
        })
        .collect();
    let files = [("own", own), ("poor", poor.join("\n"))].map(|(name, text)| {
        let file = c.scratch(&format!("{ns}-{name}"));
        std::fs::write(&file, text).expect("written");
        file
    });
    let asked = |file: &std::path::Path, words: &[&str]| {
        let mut command = c.inside(env!("CARGO_BIN_EXE_atoll"));
        command.arg("network").args(words).args(["--data-dir", "/nonexistent"]).env("KUBECONFIG", file);
        Said::of(command.output().expect("atoll runs"))
    };
    let flows = json(&asked(&files[0], &["top", "--every", "1", "-o", "json"]).good());
    assert!(flows.is_array(), "{flows}");
    let ends = [format!("{ns}/client"), format!("{ns}/web")];
    assert!(asked(&files[0], &["explain", &ends[0], &ends[1], "--port", "8000"]).good().contains("passes"));
    asked(&files[0], &["log"]).good();
    assert!(asked(&files[0], &["metrics"]).good().contains("atoll_network_tracked_connections "));
    for words in [&["top"][..], &["log"], &["capture", "web", "-n", ns, "-w", "-"], &["metrics"]] {
        let refused = asked(&files[1], words).bad();
        assert!(refused.contains("may not do that"), "{words:?}: {refused}");
    }
}

fn seen(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-seen");
    c.apply(&server(&ns, "web"));
    c.apply(&server(&ns, "client"));
    let web = address(c, &ns, "web");
    address(c, &ns, "client");
    c.until("there is a way", || call(c, &ns, "client", &web) == "web");
    // Frames of one connection, in a file that says what it is.
    let (file, data) = (c.scratch("web.pcap"), c.data());
    let mut capture = c.inside(env!("CARGO_BIN_EXE_atoll"));
    let pod = format!("{ns}/web");
    capture.args(["network", "capture", &pod, "--port", "8000", "--count", "6", "--data-dir"]).arg(&data);
    let mut capture = capture.arg("-w").arg(&file).stderr(Stdio::null()).spawn().expect("atoll runs");
    c.until("the capture has begun", || std::fs::metadata(&file).is_ok_and(|found| found.len() == 24));
    assert_eq!(call(c, &ns, "client", &web), "web");
    assert!(capture.wait().expect("wait").success());
    let bytes = std::fs::read(&file).expect("the capture");
    assert_eq!(bytes[..4], 0xa1b2_3c4du32.to_le_bytes());
    assert!(bytes.windows(4).any(|four| four == b"web\n"), "what the server said");
    assert_eq!(records(&bytes), 6);
    match c.inside("sh").args(["-c", "command -v tcpdump >/dev/null"]).status().is_ok_and(|status| status.success()) {
        true => {
            let text =
                Said::of(c.inside("tcpdump").args(["-Z", "root", "-nr"]).arg(&file).output().expect("tcpdump runs"))
                    .good();
            assert_eq!(text.lines().filter(|line| line.contains(&format!("{web}.8000"))).count(), 6, "{text}");
        }
        false => println!("tcpdump is not installed: the capture was read by this test alone"),
    }
    by_anyone_with_a_kubeconfig(c, &ns);
    let error = network(c, &["capture", &format!("{ns}/nobody"), "-w", "/dev/null"]).bad();
    assert!(error.contains("no pod nobody"), "{error}");
    c.until("the flow is seen by name", || {
        let _ = call(c, &ns, "client", &web);
        let flows = json(&network(c, &["top", "--every", "1", "-o", "json"]).good());
        flows.as_array().expect("flows").iter().any(|flow| {
            flow["to"].as_str().is_some_and(|to| to.starts_with(&pod))
                && flow["port"] == 8000
                && flow["protocol"] == "tcp"
        })
    });
    let metrics = network(c, &["metrics"]).good();
    let sent = format!("atoll_network_workload_transmit_bytes_total{{namespace=\"{ns}\",pod=\"web\"}} ");
    let sent = metrics.lines().find_map(|line| line.strip_prefix(&sent)).expect("a counter of the pod");
    assert!(sent.parse::<u64>().expect("a number") > 0, "{metrics}");
    assert!(metrics.contains("\natoll_network_refused_packets_total "), "{metrics}");
    Outcome::Passed
}
