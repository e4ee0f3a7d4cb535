//! Egress by name with the real binary: EgressPolicies, a resolver in the world outside, `atoll network explain`.

use crate::cluster::{Cluster, Said, sleeper};
use crate::egress::{WORLD, World, who};
use crate::{Outcome, Test};
use network::dns::codec::{self, Code, Data, Record, Reply};
use rustix::process::Signal;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

pub const TESTS: &[Test] = &[("names_that_are_none", bad), ("names_open_what_they_lead_to", names)];

/// Answers in the world: `api.example.org` is the web server there, `inside.example.org` a Service of ours.
fn resolver(world: &World<'_>) {
    let netns = Path::new("/run/netns").join(&world.netns);
    let address: SocketAddr = format!("{WORLD}:53").parse().expect("an address");
    let socket = network::in_netns(&netns, || UdpSocket::bind(address)).expect("the namespace").expect("a socket");
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let Ok(query) = codec::parse(&buffer[..length]) else { continue };
            let address: Option<&str> = match (query.name.as_deref(), query.kind) {
                (Some("api.example.org" | "www.example.net"), codec::TYPE_A) => Some(WORLD),
                (Some("inside.example.org"), codec::TYPE_A) => Some("10.43.0.1"),
                (Some("api.example.org" | "www.example.net" | "inside.example.org"), _) => None,
                _ => {
                    let _ = socket.send_to(&codec::write(&query, &Reply::of(Code::NameError), true), client);
                    continue;
                }
            };
            let data = address.and_then(|address| address.parse().ok()).map(|address| match address {
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
