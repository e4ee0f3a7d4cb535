//! Egress by name with the real binary: EgressPolicies, a resolver in the world outside, `atoll network explain`.

use crate::cluster::{Cluster, Said, sleeper};
use crate::egress::{HOST, WORLD, World, let_out, who};
use crate::{Outcome, Test};
use network::dns::codec::{self, Code, Data, Record, Reply};
use rustix::process::Signal;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("names_that_are_none", bad),
    ("names_open_what_they_lead_to", names),
    ("names_that_lead_inside_lead_nowhere", rebinding),
];

/// Where clouds keep their machines' secrets.
const METADATA: &str = "169.254.169.254";

/// The address in `10-42-0-5.rebind.example.org` or `fd00--1.rebind.example.org`.
fn rebound(name: &str) -> Option<IpAddr> {
    let label = name.strip_suffix(".rebind.example.org")?;
    [".", ":"].iter().find_map(|separator| label.replace('-', separator).parse().ok())
}

/// Answers in the world: `api.example.org` is the web server there, `inside.example.org` a Service of ours, and names in
/// `rebind.example.org` whatever they say.
pub fn resolver(world: &World<'_>) {
    let netns = Path::new("/run/netns").join(&world.netns);
    let address: SocketAddr = format!("{WORLD}:53").parse().expect("an address");
    let socket = network::in_netns(&netns, || UdpSocket::bind(address)).expect("the namespace").expect("a socket");
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let Ok(query) = codec::parse(&buffer[..length]) else { continue };
            let rebound = query.name.as_deref().and_then(rebound);
            let address: Option<&str> = match (query.name.as_deref(), query.kind) {
                (Some("api.example.org" | "www.example.net"), codec::TYPE_A) => Some(WORLD),
                (Some("inside.example.org"), codec::TYPE_A) => Some("10.43.0.1"),
                (Some("api.example.org" | "www.example.net" | "inside.example.org"), _) => None,
                _ if rebound.is_some() => None,
                _ => {
                    let _ = socket.send_to(&codec::write(&query, &Reply::of(Code::NameError), true), client);
                    continue;
                }
            };
            let rebound = rebound
                .filter(|address| query.kind == if address.is_ipv4() { codec::TYPE_A } else { codec::TYPE_AAAA });
            let data = address.and_then(|address| address.parse().ok()).or(rebound).map(|address| match address {
                IpAddr::V4(address) => Data::A(address),
                IpAddr::V6(address) => Data::Aaaa(address),
            });
            let answers = data.map(|data| Record { name: None, ttl: 5, data }).into_iter().collect();
            let reply = Reply { answers, ..Reply::of(Code::NoError) };
            let _ = socket.send_to(&codec::write(&query, &reply, true), client);
        }
    });
}

fn policy(namespace: &str, rules: &str) -> String {
    format!(
        "apiVersion: atoll.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: out, namespace: {namespace}}}\n\
         spec: {{podSelector: {{}}, egress: {rules}}}\n"
    )
}

fn look_up(c: &Cluster, namespace: &str, name: &str) -> Said {
    c.kubectl(&["exec", "-n", namespace, "pod", "--", "nslookup", "-type=a", name])
}

fn bad(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-bad-names");
    for (rules, wanted) in [
        (
            "[{to: [{dnsName: 'http://example.org'}]}]",
            "spec.egress[0].to[0].dnsName: Invalid value: \"http://example.org\"",
        ),
        ("[{to: [{dnsName: 10.0.0.1}]}]", "is an address; allow addresses by ipBlock"),
        ("[{to: [{dnsName: '*.org'}]}]", "at least two labels"),
        ("[{to: [{dnsName: web.shop.svc.cluster.local}]}]", "is inside the cluster"),
        ("[{to: []}]", "spec.egress[0].to"),
        (
            "[{to: [{dnsName: a.example}], ports: [{port: 70000}]}]",
            "spec.egress[0].ports[0].port: Invalid value: 70000",
        ),
        ("[{to: [{dnsName: a.example}], ports: [{port: 9, endPort: 8}]}]", "spec.egress[0].ports[0].endPort"),
        ("[{to: [{dnsName: a.example}], ports: [{port: web}]}]", "give its number"),
        ("[{to: [{dnsNam: a.example}]}]", "unknown field \"spec.egress[0].to[0].dnsNam\""),
    ] {
        let said = c.kubectl_with(&["apply", "-f", "-"], &policy(&ns, rules)).bad();
        assert!(said.contains(wanted), "{rules}: {said}");
    }
    let told = c.kubectl(&["explain", "egresspolicy.spec.egress.to.dnsName"]).good();
    assert!(told.contains("*.example.org"), "{told}");
    // Without an uplink the policy says that it leads nowhere.
    c.apply(&policy(&ns, "[{to: [{dnsName: api.example.org}, {dnsName: '*.b.example'}]}]"));
    c.until("the policy tells its state", || {
        let said = c.kubectl(&["get", "egp", "-n", &ns, "--no-headers"]).out;
        said.split_whitespace().take(4).eq(["out", "<none>", "api.example.org,*.b.example", "False"])
    });
    let why = c.kubectl(&["get", "egp", "-n", &ns, "out", "-o", "jsonpath={.status.conditions[0].message}"]).good();
    assert!(why.contains("atoll up --egress"), "{why}");
    Outcome::Passed
}

fn names(c: &Cluster) -> Outcome {
    let world = World::new(c);
    resolver(&world);
    c.stop(Signal::TERM);
    let out: &[&str] = &["--egress", "nat", "--dns-servers", WORLD];
    c.up_with(out, &[]);
    let (ns, other) = (c.namespace("t-names"), c.namespace("t-names-other"));
    for namespace in [&ns, &other] {
        c.apply(&sleeper("pod", namespace));
        c.wait_ready(namespace, "pod/pod");
    }
    let data = c.data();
    let explain = |host: &str| {
        let pod = format!("{ns}/pod");
        c.atoll(&["network", "explain", "--data-dir", &data.to_string_lossy(), &pod, host, "--port", "80"])
    };
    assert!(!look_up(c, &ns, "api.example.org").ok, "nothing lets it out");
    c.apply(&policy(&ns, "[{to: [{dnsName: api.example.org}, {dnsName: inside.example.org}], ports: [{port: http}]}]"));
    c.until("the policy is in force", || {
        c.kubectl(&["get", "egp", "-n", &ns, "out", "--no-headers"]).out.contains("True")
    });
    assert_eq!(who(c, &ns), "", "nobody has asked for the name yet");
    let say = explain("api.example.org").good();
    assert!(say.contains("EgressPolicy t-names/out egress[0] allows it, from when it has asked"), "{say}");
    let said = look_up(c, &ns, "api.example.org").good();
    assert!(said.contains(WORLD), "{said}");
    assert_eq!(who(c, &ns), "203.0.113.2", "open before the answer was here");
    assert!(explain(WORLD).good().contains("EgressPolicy t-names/out egress[0] allows it\n"));
    // The same address by another name, other names, and other namespaces stay shut.
    assert_eq!(who(c, &other), "");
    assert!(!look_up(c, &other, "api.example.org").ok && !look_up(c, &ns, "www.example.net").ok);
    assert!(!look_up(c, &ns, "inside.example.org").ok, "an answer that points inside is none");
    let say = explain("nowhere.example.org");
    assert!(!say.ok && say.err.contains("has no address"), "{}", say.err);
    // Killed and started again, it knows what it had answered.
    c.stop(Signal::KILL);
    c.up_with(out, &[]);
    c.until("what was pinned is pinned", || who(c, &ns) == "203.0.113.2");
    c.apply(&policy(&ns, "[{to: [{dnsName: '*.example.net'}]}]"));
    c.until("another name has no part in it", || who(c, &ns).is_empty());
    c.until("another name", || look_up(c, &ns, "www.example.net").ok);
    assert_eq!(who(c, &ns), "203.0.113.2");
    c.kubectl(&["delete", "egp", "-n", &ns, "out"]).good();
    c.until("no policy, no way out", || who(c, &ns).is_empty() && !look_up(c, &ns, "www.example.net").ok);
    c.stop(Signal::TERM);
    c.up();
    drop(world);
    Outcome::Passed
}

/// DNS rebinding: a name outside that is allowed, whose answer is an address inside where something listens.
fn rebinding(c: &Cluster) -> Outcome {
    let world = World::new(c);
    resolver(&world);
    assert!(world.command("ip").args(["address", "add", METADATA, "dev", "eth0"]).status().unwrap().success());
    let root = c.scratch("world");
    let serve =
        |mut command: Command, at: &str| command.args(["httpd", "-f", "-p", at, "-h"]).arg(&root).spawn().unwrap();
    let mut servers = [
        serve(world.command("/bin/busybox"), "169.254.169.254:80"),
        serve(c.inside("/bin/busybox"), "203.0.113.2:80"),
        serve(c.inside("/bin/busybox"), "127.0.0.1:80"),
    ];
    c.stop(Signal::TERM);
    c.up_with(&["--egress", "user", "--dns-servers", WORLD], &[]);
    let (ns, other) = (c.namespace("t-rebind"), c.namespace("t-rebind-other"));
    c.apply(&sleeper("pod", &ns));
    // A neighbour in another namespace that lets in anyone: only the pod's own side is in the way.
    let web = sleeper("web", &other).replace("exec sleep 1000000", "exec httpd -f -p 80 -h /etc");
    c.apply(&web);
    c.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: all, namespace: {other}}}\n\
         spec: {{podSelector: {{}}, policyTypes: [Ingress], ingress: [{{}}]}}\n---\napiVersion: v1\nkind: Service\n\
         metadata: {{name: web, namespace: {other}}}\nspec: {{selector: {{app: web}}, ports: [{{port: 80}}], \
         ipFamilyPolicy: PreferDualStack}}\n"
    ));
    c.wait_ready(&ns, "pod/pod");
    c.wait_ready(&other, "pod/web");
    let told = |what: &str, path: &str| {
        let said = c.kubectl(&["get", "-n", &other, what, "-o", path]).good();
        said.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut inside = told("pod/web", "jsonpath={.status.podIPs[*].ip}");
    inside.extend(told("service/web", "jsonpath={.spec.clusterIPs[*]}"));
    assert_eq!(inside.len(), 4, "{inside:?}");
    let node = ["203.0.113.2", "127.0.0.1", "0.0.0.0", "10.42.0.1", "169.254.1.1", METADATA, "100.100.100.200"];
    let node6 =
        ["::1", "::", "fe80::1", "fd00:10:42::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "::ffff:169.254.169.254"];
    inside.extend(node.into_iter().chain(node6).map(str::to_owned));
    let wide = let_out(&ns, "0.0.0.0/0, except: [10.42.0.0/16]");
    // Pinned by name; and for all of the outside, where nothing is pinned.
    for (kind, allowed) in [("egp", policy(&ns, "[{to: [{dnsName: '*.rebind.example.org'}]}]")), ("netpol", wide)] {
        c.apply(&allowed);
        let name = |address: &str| format!("{}.rebind.example.org", address.replace(['.', ':'], "-"));
        let within = |line: &str| c.kubectl(&["exec", "-n", &ns, "pod", "--", "sh", "-c", line]).out;
        let answers = |names: &[String]| {
            let script = "for kind in a aaaa; do nslookup -type=$kind $name | sed -n '/^Name:/,$p'; done";
            within(&format!("for name in {}; do {script}; done", names.join(" ")))
        };
        let reached = |addresses: &[String]| {
            let script =
                "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 $to 80 2>/dev/null | grep -q HTTP/1 && echo $to";
            within(&format!("for to in {}; do {script}; done", addresses.join(" ")))
        };
        let honest = [WORLD.to_owned()];
        c.until("a name outside leads outside", || {
            answers(&[name(WORLD)]).contains(WORLD) && reached(&honest) == format!("{WORLD}\n")
        });
        // The host's own address is an answer like others: the way out refuses it.
        let names: Vec<String> = inside.iter().filter(|own| *own != HOST).map(|address| name(address)).collect();
        assert_eq!(answers(&names), "", "{kind}: names that lead inside have no answer");
        let metrics = c.atoll(&["network", "metrics", "--data-dir", &c.data().to_string_lossy()]).good();
        let pinned = format!("atoll_network_pinned_addresses{{namespace=\"{ns}\"}} 1\n");
        assert!(kind != "egp" || metrics.contains(&pinned), "the address outside is pinned, no other: {metrics}");
        answers(&[name(HOST)]);
        assert_eq!(reached(&inside), "", "{kind}: nothing of what they lead to is opened");
        c.kubectl(&["delete", kind, "-n", &ns, "--all"]).good();
    }
    for server in &mut servers {
        let _ = server.kill();
        let _ = server.wait();
    }
    c.kubectl(&["delete", "namespace", &ns, &other]).good();
    c.stop(Signal::TERM);
    c.up();
    drop(world);
    Outcome::Passed
}
