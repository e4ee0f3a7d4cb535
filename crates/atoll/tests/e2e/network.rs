//! The virtual network from inside workloads: private namespaces, NetworkPolicies, names, and what `atoll network` says.

use crate::cluster::Cluster;
use crate::{Outcome, Test};

pub const TESTS: &[Test] = &[
    ("network_namespaces_are_private", private),
    ("network_policies_through_kubectl", policies),
    ("network_shop_under_default_deny", shop),
    ("network_services_lead_to_what_is_near", near),
];

/// A pod that serves its name on some ports.
fn server(namespace: &str, name: &str, labels: &str, ports: &[u16]) -> String {
    let serve: Vec<String> =
        ports.iter().map(|port| format!("while true; do echo {name} | nc -l -p {port}; done &")).collect();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, '{} sleep 1000000']\n",
        serve.join(" ")
    )
}

fn service(namespace: &str, name: &str, selector: &str, port: u16, target: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{selector: {{{selector}}}, ports: [{{port: {port}, targetPort: {target}}}]}}\n"
    )
}

fn exec(c: &Cluster, namespace: &str, pod: &str, line: &str) -> crate::cluster::Said {
    c.kubectl(&["exec", "-n", namespace, pod, "--", "sh", "-c", line])
}

/// What a server answers; empty where there is no way.
fn call(c: &Cluster, (namespace, pod): (&str, &str), host: &str, port: u16) -> String {
    exec(c, namespace, pod, &format!("nc -w 3 {host} {port} </dev/null")).out.trim().to_owned()
}

fn address(c: &Cluster, namespace: &str, pod: &str) -> String {
    c.wait_ready(namespace, &format!("pod/{pod}"));
    c.kubectl(&["get", "pod", "-n", namespace, pod, "-o", "jsonpath={.status.podIP}"]).good()
}

fn explain(c: &Cluster, from: &str, to: &str, port: &str) -> crate::cluster::Said {
    c.atoll(&["network", "explain", "--data-dir", &c.data().to_string_lossy(), from, to, "--port", port])
}

fn private(c: &Cluster) -> Outcome {
    let (ours, theirs) = (c.namespace("t-net-ours"), c.namespace("t-net-theirs"));
    c.apply(&(server(&ours, "web", "app: web", &[8000]) + &service(&ours, "web", "app: web", 80, 8000)));
    c.apply(&server(&ours, "friend", "app: friend", &[]));
    c.apply(&server(&theirs, "stranger", "app: stranger", &[9000]));
    let web = address(c, &ours, "web");
    address(c, &ours, "friend");
    let stranger = address(c, &theirs, "stranger");
    let (friend, foe) = ((ours.as_str(), "friend"), (theirs.as_str(), "stranger"));
    c.until("a neighbour answers", || call(c, friend, "web", 80) == "web");
    assert_eq!(call(c, friend, &web, 8000), "web");
    // Neither by address, nor by a Service's address, nor by name; not even whether the name is there.
    let cluster_ip = c.kubectl(&["get", "service", "-n", &ours, "web", "-o", "jsonpath={.spec.clusterIP}"]).good();
    for (host, port) in [(web.as_str(), 8000), (cluster_ip.as_str(), 80), ("10.42.0.1", 7443), ("169.254.169.254", 80)]
    {
        assert_eq!(call(c, foe, host, port), "", "{host}");
    }
    assert_eq!(call(c, friend, &stranger, 9000), "");
    let name = format!("web.{ours}.svc.cluster.local");
    assert!(exec(c, &ours, "friend", &format!("nslookup {name} 10.43.0.10")).out.contains(&cluster_ip));
    let (there, nowhere) = (
        exec(c, &theirs, "stranger", &format!("nslookup {name} 10.43.0.10")),
        exec(c, &theirs, "stranger", "nslookup nothing.nowhere.svc.cluster.local 10.43.0.10"),
    );
    assert!(!there.out.contains(&cluster_ip), "{}", there.out);
    assert_eq!(there.out.contains("NXDOMAIN"), nowhere.out.contains("NXDOMAIN"), "{}{}", there.out, nowhere.out);
    // Both sides agree, and it passes.
    let say = explain(c, &format!("{theirs}/stranger"), &format!("{ours}/web"), "8000");
    assert!(!say.ok && say.out.contains("is refused") && say.out.contains("a namespace is private"), "{}", say.out);
    c.until("the refusal is told with names", || {
        let log = c.atoll(&["network", "log", "--data-dir", &c.data().to_string_lossy()]).good();
        log.contains(&format!("{theirs}/stranger"))
            && log.contains(&format!("{ours}/web"))
            && log.contains("169.254.169.254")
    });
    let peer =
        |namespace: &str| format!("namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}}");
    c.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: open, namespace: {ours}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n  ingress: [{{from: [{{{}}}, {{podSelector: {{}}}}], ports: [{{port: 8000}}]}}]\n---\n\
         apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: out, namespace: {theirs}}}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Egress]\n  egress: [{{to: [{{{}}}]}}]\n",
        peer(&theirs),
        peer(&ours)
    ));
    c.until("the stranger is let in by name", || call(c, foe, &name, 80) == "web");
    let say = explain(c, &format!("{theirs}/stranger"), &format!("svc/{ours}/web"), "80").good();
    assert!(say.contains("passes") && say.contains(&format!("NetworkPolicy {ours}/open ingress[0]")), "{say}");
    assert!(say.contains(&format!("NetworkPolicy {theirs}/out egress[0]")), "{say}");
    assert_eq!(call(c, friend, &stranger, 9000), "", "the other way stays closed");
    Outcome::Passed
}

/// Hints of somebody's own EndpointSlices, and those that `trafficDistribution` asks for.
fn near(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-net-near");
    c.apply(&server(&ns, "one", "app: near", &[8000]));
    c.apply(&server(&ns, "two", "app: near", &[8000]));
    c.apply(&server(&ns, "client", "app: client", &[]));
    let slice = |pod: &str, zone: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: web-{zone}, namespace: {ns}, \
             labels: {{kubernetes.io/service-name: web}}}}\nports: [{{name: '', port: 8000, protocol: TCP}}]\n\
             endpoints: [{{addresses: [{}], conditions: {{ready: true}}, hints: {{forZones: [{{name: {zone}}}]}}}}]\n",
            address(c, &ns, pod)
        )
    };
    address(c, &ns, "client");
    let services = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {ns}}}\nspec: {{ports: [{{port: 80, targetPort: 8000}}]}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: own, namespace: {ns}}}\nspec: {{selector: {{app: near}}, \
         trafficDistribution: PreferClose, ports: [{{port: 80, targetPort: 8000}}]}}\n"
    );
    c.apply(&(services + &slice("one", "t-a") + &slice("two", "t-b")));
    let zone = |label: &str| {
        c.kubectl(&["label", "node", "--all", "--overwrite", label]).good();
    };
    let heard = || {
        let line = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do nc -w 3 web 80 </dev/null; done | sort -u";
        exec(c, &ns, "client", line).out.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (label, wanted) in [("t-a", "one"), ("t-b", "two"), ("t-c", "one two")] {
        zone(&format!("topology.kubernetes.io/zone={label}"));
        c.until("the zone's endpoints answer alone", || heard() == wanted);
    }
    c.until("endpoints say for whom they are", || {
        let shown = ["get", "endpointslices", "-n", &ns, "-l", "kubernetes.io/service-name=own", "-o"];
        let path = "jsonpath={.items[*].endpoints[*].zone} {.items[*].endpoints[*].hints.forZones[*].name}";
        c.kubectl(&[&shown[..], &[path]].concat()).good().trim() == "t-c t-c t-c t-c"
    });
    zone("topology.kubernetes.io/zone-");
    c.until("without a zone all answer", || heard() == "one two");
    Outcome::Passed
}

fn policies(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-net-policy");
    c.apply(&(server(&ns, "db", "app: db", &[5432, 22])));
    c.apply(&server(&ns, "api", "app: api", &[]));
    c.apply(&server(&ns, "web", "app: web", &[]));
    let db = address(c, &ns, "db");
    for pod in ["api", "web"] {
        address(c, &ns, pod);
        c.until("open inside the namespace", || call(c, (&ns, pod), &db, 5432) == "db");
    }
    c.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: db, namespace: {ns}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: db}}}}\n  ingress:\n  - from: [{{podSelector: {{matchLabels: {{app: api}}}}}}]\n    \
         ports: [{{port: 5432}}]\n"
    ));
    c.until("the policy is in force", || call(c, (&ns, "web"), &db, 5432).is_empty());
    assert_eq!(call(c, (&ns, "api"), &db, 5432), "db");
    assert_eq!(call(c, (&ns, "api"), &db, 22), "");
    // A label makes a peer of a pod.
    c.kubectl(&["label", "pod", "-n", &ns, "web", "app=api", "--overwrite"]).good();
    c.until("the label counts", || call(c, (&ns, "web"), &db, 5432) == "db");
    let table = c.kubectl(&["get", "netpol", "-n", &ns]).good();
    assert!(table.contains("POD-SELECTOR") && table.contains("app=db"), "{table}");
    let text = c.kubectl(&["describe", "networkpolicy", "-n", &ns, "db"]).good();
    assert!(text.contains("To Port: 5432/TCP") && text.contains("PodSelector: app=api"), "{text}");
    let bad = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: bad, namespace: {ns}}}\nspec:\n  \
         podSelector: {{}}\n  ingress: [{{ports: [{{port: 70000}}], from: [{{ipBlock: {{cidr: 10.0.0.0/99}}}}]}}]\n"
    );
    let error = c.kubectl_with(&["apply", "-f", "-"], &bad).bad();
    assert!(error.contains("spec.ingress[0].ports[0].port: Invalid value: 70000"), "{error}");
    assert!(error.contains("spec.ingress[0].from[0].ipBlock.cidr: Invalid value: \"10.0.0.0/99\""), "{error}");
    c.kubectl(&["delete", "netpol", "-n", &ns, "db"]).good();
    c.until("without it all is as before", || call(c, (&ns, "api"), &db, 22) == "db");
    Outcome::Passed
}

/// The policies of `examples/shop`, over stand-ins with the shop's labels and ports.
fn shop(c: &Cluster) -> Outcome {
    let ns = c.namespace("shop");
    let intruder = c.namespace("t-net-intruder");
    let pricing = "\"serving.knative.dev/service\": pricing";
    c.apply(&(server(&ns, "orders", "app: orders", &[5432, 22]) + &service(&ns, "orders", "app: orders", 5432, 5432)));
    c.apply(&(server(&ns, "catalog", "app: catalog", &[8000]) + &service(&ns, "catalog", "app: catalog", 80, 8000)));
    c.apply(&(server(&ns, "pricing", pricing, &[8080]) + &service(&ns, "pricing", pricing, 80, 8080)));
    c.apply(&server(&intruder, "thief", "app: catalog", &[]));
    let policies = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/shop/60-policies.yaml");
    c.kubectl(&["apply", "-f", policies]).good();
    let addresses = ["orders", "catalog", "pricing"].map(|pod| address(c, &ns, pod));
    address(c, &intruder, "thief");
    let catalog = (ns.as_str(), "catalog");
    c.until("the catalog reaches the database by name", || call(c, catalog, "orders", 5432) == "orders");
    c.until("and the function", || call(c, catalog, "pricing", 80) == "pricing");
    let [orders, front, function] = &addresses;
    let closed = [
        (catalog, orders, 22),
        ((ns.as_str(), "orders"), front, 8000),
        ((ns.as_str(), "orders"), function, 8080),
        ((ns.as_str(), "pricing"), orders, 5432),
        ((intruder.as_str(), "thief"), orders, 5432),
        ((intruder.as_str(), "thief"), front, 8000),
        ((intruder.as_str(), "thief"), function, 8080),
    ];
    for (from, to, port) in closed {
        assert_eq!(call(c, from, to, port), "", "{from:?} -> {to}:{port}");
    }
    // The gateway reaches what it exposes.
    let say = explain(c, "node", &format!("{ns}/catalog"), "8000").good();
    assert!(say.contains("passes"), "{say}");
    c.kubectl(&["delete", "namespace", &ns, "--wait=false"]).good();
    Outcome::Passed
}
