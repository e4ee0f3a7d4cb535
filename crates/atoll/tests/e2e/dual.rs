//! Both address families, from inside workloads and through kubectl.

use crate::cluster::Cluster;
use crate::{Outcome, Test};

pub const TESTS: &[Test] = &[("dual_stack_pods_and_services", both)];

const BUSYBOX: &str = "127.0.0.1:5000/test/busybox:1";

fn pod(namespace: &str, name: &str, line: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: {BUSYBOX}\n    \
         env: [{{name: IPS, valueFrom: {{fieldRef: {{fieldPath: status.podIPs}}}}}}]\n    command: [sh, -c, '{line}']\n"
    )
}

fn service(namespace: &str, name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{selector: {{app: web}}, ports: [{{port: 8000}}], {more}}}\n"
    )
}

fn show(c: &Cluster, namespace: &str, what: &str, path: &str) -> Vec<String> {
    let path = format!("jsonpath={{{path}}}");
    let said = c.kubectl(&["get", "-n", namespace, what, "-o", &path]).good();
    said.split_whitespace().map(str::to_owned).collect()
}

fn exec(c: &Cluster, namespace: &str, pod: &str, line: &str) -> String {
    c.kubectl(&["exec", "-n", namespace, pod, "--", "sh", "-c", line]).out
}

fn both(c: &Cluster) -> Outcome {
    let (ours, theirs) = (c.namespace("t-dual-ours"), c.namespace("t-dual-theirs"));
    let serve = "while true; do echo web | nc -l -p 8000; done";
    c.apply(&pod(&ours, "web", serve));
    c.apply(&pod(&ours, "friend", "sleep 1000000"));
    c.apply(&pod(&theirs, "stranger", "sleep 1000000"));
    c.apply(&service(&ours, "plain", ""));
    c.apply(&service(&ours, "dual", "ipFamilyPolicy: PreferDualStack"));
    c.apply(&service(&ours, "six", "clusterIP: None, ipFamilies: [IPv6]"));
    for (namespace, name) in [(&ours, "web"), (&ours, "friend"), (&theirs, "stranger")] {
        c.wait_ready(namespace, &format!("pod/{name}"));
    }
    // Every pod has two addresses, the second made from the first, and knows them.
    let ips = show(c, &ours, "pod/web", ".status.podIPs[*].ip");
    let v4: std::net::Ipv4Addr = ips[0].parse().unwrap();
    let v6: std::net::Ipv6Addr = ips[1].parse().unwrap();
    assert_eq!(v4.to_bits() & 0xffff, v6.to_bits() as u32 & 0xffff, "{ips:?}");
    assert_eq!(exec(c, &ours, "web", "echo $IPS").trim(), ips.join(","));
    assert_eq!(show(c, &ours, "pod/web", ".status.hostIPs[*].ip").len(), 2);
    assert_eq!(
        c.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].spec.podCIDRs[*]}"]).good().split(' ').count(),
        2
    );
    // Services have the families that they ask for.
    assert_eq!(show(c, &ours, "service/plain", ".spec.ipFamilies[*]"), ["IPv4"]);
    assert_eq!(show(c, &ours, "service/dual", ".spec.ipFamilies[*]"), ["IPv4", "IPv6"]);
    let cluster_ips = show(c, &ours, "service/dual", ".spec.clusterIPs[*]");
    assert!(cluster_ips.len() == 2 && cluster_ips[1].starts_with("fd00:10:43::"), "{cluster_ips:?}");
    let described = c.kubectl(&["describe", "service", "-n", &ours, "dual"]).good();
    assert!(described.contains(&cluster_ips.join(",")) && described.contains("PreferDualStack"), "{described}");
    let refused = c.kubectl(&[
        "patch",
        "-n",
        &ours,
        "service/plain",
        "--type=merge",
        "-p",
        r#"{"spec":{"ipFamilies":["IPv6"]}}"#,
    ]);
    assert!(!refused.ok && refused.err.contains("spec.ipFamilies[0]"), "{}", refused.err);
    c.until("an EndpointSlice of each family", || {
        let slices = ["get", "endpointslices", "-n", &ours, "-l", "kubernetes.io/service-name=dual", "-o"];
        let said = c.kubectl(&[&slices[..], &["jsonpath={.items[*].endpoints[*].addresses[*]}"]].concat()).good();
        let mut found: Vec<&str> = said.split_whitespace().collect();
        found.sort_unstable();
        found == [ips[0].as_str(), ips[1].as_str()]
    });
    // Names, asked by IPv6; and a neighbour by IPv6, not a stranger.
    c.until("an AAAA record", || {
        exec(c, &ours, "friend", "nslookup six.$(cut -d' ' -f2 /etc/resolv.conf | head -1) fd00:10:43::a")
            .contains(&ips[1])
    });
    let call = |namespace: &str, pod: &str, address: &str| {
        exec(c, namespace, pod, &format!("nc -w 3 {address} 8000 </dev/null")).trim().to_owned()
    };
    c.until("a neighbour answers by IPv6", || call(&ours, "friend", &ips[1]) == "web");
    assert_eq!(call(&theirs, "stranger", &ips[1]), "");
    // Both of a Service's addresses lead to it, and its name has both.
    for address in &cluster_ips {
        c.until("the Service answers", || call(&ours, "friend", address) == "web");
        assert_eq!(call(&theirs, "stranger", address), "");
    }
    let names = exec(c, &ours, "friend", &format!("nslookup dual.{ours}.svc.cluster.local"));
    assert!(cluster_ips.iter().all(|address| names.contains(address)), "{names}");
    Outcome::Passed
}
