//! Services that the outside reaches: node ports, load balancers, external addresses. Beside the host is a world of its
//! own; the instance is stopped and started with what the administrator chose.

use crate::cluster::{Cluster, Said};
use crate::life::{compare, host_state};
use crate::{Outcome, Test};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub const TESTS: &[Test] = &[("exposed_services", exposed)];

const HOST: &str = "198.51.100.2";
const ALIAS: &str = "198.51.100.9";
const WORLD: &str = "198.51.100.1";
const OTHER: &str = "198.51.100.7";

/// A network namespace behind the host's link `wan`.
struct World<'a> {
    c: &'a Cluster,
    netns: String,
}

impl World<'_> {
    fn new(c: &Cluster) -> World<'_> {
        let netns = format!("atoll-e2e-far-{}", std::process::id());
        assert!(Command::new("ip").args(["netns", "add", &netns]).status().unwrap().success());
        let world = World { c, netns };
        let host = |line: &str| c.host("ip", &line.split(' ').collect::<Vec<_>>()).good();
        host(&format!("link add wan type veth peer name eth0 netns {}", world.netns));
        c.host("sysctl", &["-qw", "net.ipv6.conf.wan.disable_ipv6=1"]).good();
        for address in [HOST, ALIAS] {
            host(&format!("address add {address}/24 dev wan"));
        }
        host("link set wan up");
        for line in
            ["link set lo up".to_owned(), address("eth0", WORLD), address("eth0", OTHER), "link set eth0 up".to_owned()]
        {
            world.run("ip", &line.split(' ').collect::<Vec<_>>()).good();
        }
        world
    }

    fn run(&self, program: &str, args: &[&str]) -> Said {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program).args(args);
        Said::of(command.output().unwrap())
    }

    /// Who a web server on the host's address says that the one that asks from here is; empty where there is no answer.
    fn who(&self, from: &str, to: &str) -> String {
        let url = format!("http://{to}/cgi-bin/who");
        self.run("curl", &["-sS", "-m", "5", "--interface", from, &url]).out.trim().to_owned()
    }
}

fn address(link: &str, own: &str) -> String {
    format!("address add {own}/24 dev {link}")
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        self.c.host("ip", &["link", "del", "wan"]);
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

/// Runs `work` on a thread of its own in a network namespace.
fn inside<T: Send + 'static>(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = File::open(path).unwrap();
    let work = move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    };
    std::thread::spawn(work).join().unwrap()
}

/// A web server that tells clients their address.
fn pod(namespace: &str) -> String {
    let serve = "mkdir -p /tmp/www/cgi-bin && printf \"#!/bin/sh\\necho\\necho \\$REMOTE_ADDR\\n\" > /tmp/www/cgi-bin/who \
                 && chmod 755 /tmp/www/cgi-bin/who && exec busybox httpd -f -p 0.0.0.0:8000 -h /tmp/www";
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: {namespace}, labels: {{app: web}}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: main\n    image: 127.0.0.1:5000/test/busybox:1\n    \
         command: [sh, -c, '{serve}']\n    readinessProbe: {{tcpSocket: {{port: 8000}}, periodSeconds: 1}}\n"
    )
}

/// Answers datagrams at port 9000 of the pod with `udp`, as long as the namespace is there.
fn serve_udp(c: &Cluster, namespace: &str) {
    let uid = show(c, namespace, "pod/web", ".metadata.uid");
    let pins = fs::read_dir("/run/atoll").unwrap().flatten().map(|entry| entry.path().join("netns").join(&uid));
    let pin = pins.into_iter().find(|pin| pin.exists()).unwrap();
    let socket = inside(&pin, || UdpSocket::bind("0.0.0.0:9000").unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("udp {}", client.ip()).as_bytes(), client);
        }
    });
}

fn show(c: &Cluster, namespace: &str, what: &str, path: &str) -> String {
    c.kubectl(&["get", "-n", namespace, what, "-o", &format!("jsonpath={{{path}}}")]).good()
}

fn expose(c: &Cluster, namespace: &str, name: &str, more: &[&str]) {
    let args = ["expose", "-n", namespace, "pod", "web", "--target-port=8000", "--name", name];
    c.kubectl(&[&args[..], more].concat()).good();
}

fn patch(c: &Cluster, namespace: &str, service: &str, spec: &str) {
    let patch = format!("{{\"spec\":{spec}}}");
    c.kubectl(&["patch", "-n", namespace, "service", service, "--type=merge", "-p", &patch]).good();
}

fn here(c: &Cluster, to: &str) -> String {
    c.host("curl", &["-sS", "-m", "5", &format!("http://{to}/cgi-bin/who")]).out.trim().to_owned()
}

fn explain(c: &Cluster, from: &str, to: &str) -> String {
    c.atoll(&["network", "explain", "--data-dir", &c.data().to_string_lossy(), from, to, "--port", "8000"]).out
}

fn let_in(namespace: &str, block: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: in, namespace: {namespace}}}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Ingress]\n  ingress: [{{from: [{{ipBlock: {{cidr: {block}}}}}]}}]\n"
    )
}

fn exposed(c: &Cluster) -> Outcome {
    let world = World::new(c);
    let ns = c.namespace("t-exposed");
    c.apply(&pod(&ns));
    c.wait_ready(&ns, "pod/web");
    by_default(c, &world, &ns);
    c.stop(Signal::TERM);
    let all = ["--node-port-addr", "0.0.0.0,::", "--load-balancer-addr", HOST, "--external-ips", "198.51.100.8/29"];
    c.up_with(&all, &[]);
    opened(c, &world, &ns);
    datagrams(c, &world, &ns);
    // Killed: the ports are closed with it, and open again with the next one.
    let port = show(c, &ns, "service/np", ".spec.ports[0].nodePort");
    c.stop(Signal::KILL);
    assert_eq!(world.who(WORLD, &format!("{HOST}:{port}")), "");
    c.up_with(&all, &[]);
    c.until("open again", || world.who(WORLD, &format!("{HOST}:{port}")) == WORLD);
    left(c);
    drop(world);
    Outcome::Passed
}

/// Without flags the host alone reaches what is exposed.
fn by_default(c: &Cluster, world: &World, ns: &str) {
    let node = show(c, ns, "pod/web", ".status.hostIP");
    let ip = show(c, ns, "pod/web", ".status.podIP");
    assert!(explain(c, WORLD, &format!("{ns}/web")).contains("no port of the host leads here"));
    expose(c, ns, "np", &["--type=NodePort", "--port=80"]);
    let port = show(c, ns, "service/np", ".spec.ports[0].nodePort");
    c.until("the node port leads to the pod", || here(c, &format!("127.0.0.1:{port}")) == node);
    assert_eq!(world.who(WORLD, &format!("{HOST}:{port}")), "");
    let told = explain(c, WORLD, &ip);
    assert!(told.contains(&format!("port 127.0.0.1:{port} of the host (Service {ns}/np)")), "{told}");
    // A port of somebody's own choice, that is taken; and one that is not one.
    let clash = format!("{{\"spec\":{{\"type\":\"NodePort\",\"ports\":[{{\"port\":1,\"nodePort\":{port}}}]}}}}");
    expose(c, ns, "plain", &["--port=81"]);
    let refused = c.kubectl(&["patch", "-n", ns, "service", "plain", "--type=merge", "-p", &clash]).bad();
    assert!(refused.contains("spec.ports[0].nodePort") && refused.contains("already allocated"), "{refused}");
    // A load balancer's address is the gateway's; a port that is the gateway's own cannot be had.
    expose(c, ns, "lb", &["--type=LoadBalancer", "--port=18000"]);
    c.until("it has an address", || show(c, ns, "service/lb", ".status.loadBalancer.ingress[*].ip") == "127.0.0.1");
    c.until("and is there", || here(c, "127.0.0.1:18000") == node);
    let listed = c.kubectl(&["get", "service", "-n", ns, "lb"]).good();
    assert!(listed.contains("127.0.0.1") && listed.contains("18000:"), "{listed}");
    expose(c, ns, "taken", &["--type=LoadBalancer", "--port=8080"]);
    c.until("an event tells", || c.kubectl(&["describe", "service", "-n", ns, "taken"]).good().contains("PortNotOpen"));
    // The second Service with a port is told so, in its status and by an event; its other port works.
    expose(c, ns, "second", &["--type=LoadBalancer", "--port=18000"]);
    c.until("the clash is told", || {
        show(c, ns, "service/second", ".status.conditions[*].message").contains(&format!("{ns}/lb's, which is older"))
    });
    assert_eq!(show(c, ns, "service/second", ".status.loadBalancer.ingress"), "");
    patch(
        c,
        ns,
        "second",
        r#"{"ports":[{"name":"a","port":18000,"targetPort":8000},{"name":"b","port":18001,"targetPort":8000}]}"#,
    );
    c.until("the other port", || here(c, "127.0.0.1:18001") == node);
    c.kubectl(&["delete", "service", "-n", ns, "taken", "second"]).good();
    // An address that nobody allowed is not opened.
    patch(c, ns, "plain", &format!("{{\"externalIPs\":[\"{HOST}\"]}}"));
    c.until("an event tells", || {
        c.kubectl(&["describe", "service", "-n", ns, "plain"]).good().contains("ExternalAddressRefused")
    });
    assert_eq!(here(c, &format!("{HOST}:81")), "");
}

/// At the addresses that the administrator chose, for clients whose address is kept.
fn opened(c: &Cluster, world: &World, ns: &str) {
    let port = show(c, ns, "service/np", ".spec.ports[0].nodePort");
    let node = show(c, ns, "pod/web", ".status.hostIP");
    let np = format!("{HOST}:{port}");
    c.until("the world reaches the node port", || world.who(WORLD, &np) == WORLD);
    assert_eq!(world.who(OTHER, &format!("{ALIAS}:{port}")), OTHER);
    assert_eq!(here(c, &np), node);
    c.until("the load balancer has moved", || world.who(WORLD, &format!("{HOST}:18000")) == WORLD);
    // An address of the host that is allowed; one that is allowed but not the host's.
    patch(c, ns, "plain", &format!("{{\"externalIPs\":[\"{ALIAS}\",\"198.51.100.10\"]}}"));
    c.until("the external address leads there", || world.who(WORLD, &format!("{ALIAS}:81")) == WORLD);
    c.until("what the host does not have is told", || {
        let told = c.kubectl(&["describe", "service", "-n", ns, "plain"]).good();
        told.contains("198.51.100.10:81/TCP")
    });
    // Policies judge the client by its address; the node they do not concern.
    c.apply(&let_in(ns, &format!("{OTHER}/32")));
    c.until("the policy refuses", || world.who(WORLD, &np).is_empty());
    assert_eq!(world.who(OTHER, &np), OTHER);
    assert_eq!(here(c, &np), node);
    assert!(explain(c, WORLD, &format!("{ns}/web")).contains("isolates it, and no rule allows this"));
    assert!(explain(c, OTHER, &format!("{ns}/web")).contains("passes"));
    c.kubectl(&["delete", "networkpolicy", "-n", ns, "in"]).good();
    c.until("all again", || world.who(WORLD, &np) == WORLD);
    // Ranges of a load balancer; and whether it has endpoints here.
    patch(
        c,
        ns,
        "lb",
        &format!("{{\"loadBalancerSourceRanges\":[\"{OTHER}/32\"],\"externalTrafficPolicy\":\"Local\"}}"),
    );
    let lb = format!("{HOST}:18000");
    c.until("outside the ranges", || world.who(WORLD, &lb).is_empty());
    assert_eq!(world.who(OTHER, &lb), OTHER);
    let health = format!("http://{HOST}:{}/", show(c, ns, "service/lb", ".spec.healthCheckNodePort"));
    let ask = || world.run("curl", &["-s", "-m", "5", "-w", " %{http_code}", &health]).out;
    c.until("healthy", || ask().ends_with(" 200"));
    assert_eq!(crate::cluster::json(ask().trim_end_matches(" 200"))["localEndpoints"], 1);
    patch(c, ns, "lb", r#"{"selector":{"app":"nobody"}}"#);
    c.until("no endpoints", || ask().ends_with(" 503"));
    // What is exposed no longer is closed.
    patch(c, ns, "np", r#"{"type":"ClusterIP"}"#);
    c.until("closed", || world.who(WORLD, &np).is_empty());
    patch(c, ns, "np", r#"{"type":"NodePort"}"#);
    let np = format!("{HOST}:{}", show(c, ns, "service/np", ".spec.ports[0].nodePort"));
    c.until("open", || world.who(WORLD, &np) == WORLD);
}

fn datagrams(c: &Cluster, world: &World, ns: &str) {
    serve_udp(c, ns);
    expose(c, ns, "dgram", &["--type=NodePort", "--port=53", "--protocol=UDP", "--target-port=9000"]);
    let port: u16 = show(c, ns, "service/dgram", ".spec.ports[0].nodePort").parse().unwrap();
    let client = inside(&Path::new("/run/netns").join(&world.netns), || UdpSocket::bind((WORLD, 0)).unwrap());
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    for address in [HOST, ALIAS] {
        c.until("a datagram is answered from where it went", || {
            client.send_to(b"?", (address, port)).unwrap();
            let mut buffer = [0; 64];
            client.recv_from(&mut buffer).is_ok_and(|(length, from)| {
                from == (address.parse::<std::net::IpAddr>().unwrap(), port).into()
                    && buffer[..length] == *format!("udp {WORLD}").as_bytes()
            })
        });
    }
}

/// `atoll down` closes everything.
fn left(c: &Cluster) {
    let sockets = || c.host("ss", &["-Hltun"]).good();
    assert!(!sockets().is_empty());
    let during = host_state(c);
    c.stop(Signal::TERM);
    c.atoll(&["down", "--data-dir", &c.data().to_string_lossy()]).good();
    assert_eq!(sockets(), "", "something listens still");
    compare(&during, &host_state(c), "after atoll down");
    c.up();
}
