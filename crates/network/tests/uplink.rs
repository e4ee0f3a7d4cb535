//! The way out, between namespaces that the test makes: pods, a host, and the world behind it.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::policy::{Action, Direction, Network, Otherwise, Profile, Rule, ranges};
use network::{Attachment, Egress, NODE, Protocol, in_netns};
use rustix::fd::AsFd;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const ALIAS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A host with one link to a world that has servers; both go with it.
struct Outside {
    host: PathBuf,
    world: PathBuf,
}

fn ip(netns: &Path, line: &str) {
    let (good, said) = run(netns, "ip", &line.split(' ').collect::<Vec<_>>());
    assert!(good, "ip {line}: {said}");
}

impl Outside {
    fn new() -> Outside {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let [host, world] = ["host", "world"].map(|what| {
            let name = format!("atoll-t-{what}-{}-{number}", std::process::id());
            assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
            Path::new("/run/netns").join(name)
        });
        let peer = world.file_name().unwrap().to_str().unwrap();
        ip(&host, &format!("link add wan type veth peer name eth0 netns {peer}"));
        run(&host, "sysctl", &["-qw", "net.ipv6.conf.wan.disable_ipv6=1"]);
        ip(&host, &format!("address add {HOST}/24 dev wan"));
        ip(&host, &format!("address add {ALIAS}/24 dev wan"));
        ip(&world, &format!("address add {WORLD}/24 dev eth0"));
        ip(&world, &format!("address add {METADATA}/32 dev eth0"));
        for netns in [&host, &world] {
            ip(netns, "link set lo up");
            ip(netns, if netns == &host { "link set wan up" } else { "link set eth0 up" });
        }
        ip(&host, &format!("route add default via {WORLD}"));
        ip(&world, &format!("route add 10.42.0.0/16 via {HOST}"));
        let outside = Outside { host, world };
        for netns in [&outside.host, &outside.world] {
            serve(netns, 80);
        }
        outside
    }

    fn set(&self, lab: &Lab, egress: Egress) {
        lab.router().set_egress(File::open(&self.host).unwrap().as_fd(), egress).unwrap();
    }

    /// Everything of the host that could have been touched.
    fn state(&self) -> BTreeSet<String> {
        let look = |program: &str, args: &[&str]| run(&self.host, program, args).1;
        let sysctls: Vec<String> = look("sysctl", &["-a"])
            .lines()
            .filter(|line| {
                ["net.ipv4.conf", "net.ipv4.ip_forward", "net.ipv6.conf"].iter().any(|part| line.starts_with(part))
            })
            .map(str::to_owned)
            .collect();
        let looks: [(&str, &[&str]); 5] = [
            // Not `ip link`, which stumbles over peers in namespaces that other tests remove.
            ("cut", &["-d:", "-f1", "/proc/net/dev"]),
            ("ip", &["-o", "address"]),
            ("ip", &["route", "show", "table", "all"]),
            ("ip", &["neighbour", "show", "nud", "permanent"]),
            ("nft", &["list", "ruleset"]),
        ];
        let said = looks.iter().flat_map(|(program, args)| {
            look(program, args).lines().map(|line| format!("{program} {args:?}: {line}")).collect::<Vec<_>>()
        });
        said.chain(sysctls).collect()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for path in [&self.host, &self.world] {
            let _ = Command::new("ip").args(["netns", "del"]).arg(path.file_name().unwrap()).status();
        }
    }
}

#[track_caller]
fn same(now: &BTreeSet<String>, then: &BTreeSet<String>) {
    let (new, gone): (Vec<_>, Vec<_>) = (now.difference(then).collect(), then.difference(now).collect());
    assert!(new.is_empty() && gone.is_empty(), "new {new:#?}, gone {gone:#?}");
}

/// Tells each client who it seems to be, and the segment size that it offered.
fn serve(netns: &Path, port: u16) {
    let listener = in_netns(netns, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(peer.to_string().as_bytes());
        }
    });
}

/// Lets workloads out, to addresses in these networks.
fn let_out(lab: &Lab, networks: &[&str]) {
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = network::Policies::without_rules(network::Isolation::Private, workloads);
    let key: Arc<str> = "out".into();
    let blocks: Vec<_> = networks
        .iter()
        .map(|text| network::policy::Block { network: text.parse::<Network>().unwrap(), except: Vec::new() })
        .collect();
    let rule = Rule {
        origin: key.clone(),
        action: Action::Allow,
        anyone: false,
        group: None,
        blocks: ranges(&blocks),
        names: None,
        ports: Vec::new(),
    };
    let otherwise = Otherwise::Refuse;
    let profile = Profile { direction: Direction::Egress, origin: key.clone(), rules: vec![rule], otherwise };
    policies.profiles.insert(key.clone(), profile);
    policies.workloads.values_mut().for_each(|workload| workload.egress = Some(key.clone()));
    lab.router().sync_policies(policies).unwrap();
}

/// Who the world says that the pod is.
fn seen(pod: &Attachment) -> String {
    let mut said = String::new();
    eventually("the world answers", || {
        call_from(pod, WORLD, 80).is_ok_and(|text| {
            said = text;
            !said.is_empty()
        })
    });
    said
}

fn refused(pod: &Attachment, address: Ipv4Addr) {
    let error = call_from(pod, address, 80).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable), "{address}: {error}");
}

#[test]
fn only_what_policies_let_out_gets_out() {
    let Some(lab) = lab() else { return };
    let outside = Outside::new();
    let pod = lab.pod("a");
    refused(&pod, WORLD);
    outside.set(&lab, Egress::Nat);
    refused(&pod, WORLD);
    let_out(&lab, &["0.0.0.0/0"]);
    assert_eq!(seen(&pod), HOST.to_string());
    // Never: the host, addresses where clouds keep their secrets, neighbours of the link.
    for address in [HOST, ALIAS, METADATA, NODE, Ipv4Addr::new(169, 254, 1, 2)] {
        refused(&pod, address);
    }
    // The router itself has no business outside.
    assert!(lab.router().run(|| call(WORLD, 80)).unwrap().is_err());
    let sources = BTreeMap::from([(pod.address, ALIAS)]);
    lab.router().sync_egress_addresses(&sources).unwrap();
    assert_eq!(seen(&pod), ALIAS.to_string());
    lab.router().sync_egress_addresses(&BTreeMap::new()).unwrap();
    assert_eq!(seen(&pod), HOST.to_string());
    // Nobody outside opens a connection to a workload.
    greet(&pod, 8080, "pod");
    assert!(in_netns(&outside.world, || call(pod.address, 8080)).unwrap().is_err());
    let_out(&lab, &["192.0.2.0/24"]);
    refused(&pod, WORLD);
    outside.set(&lab, Egress::None);
}

#[test]
fn routed_keeps_addresses_and_policies_judge_who_comes() {
    let Some(lab) = lab() else { return };
    let outside = Outside::new();
    let pod = lab.pod("a");
    let_out(&lab, &["203.0.113.0/24"]);
    outside.set(&lab, Egress::Routed);
    assert_eq!(seen(&pod), pod.address.to_string());
    greet(&pod, 8080, "pod");
    assert!(in_netns(&outside.world, || call(pod.address, 8080)).unwrap().is_err(), "a namespace is private");
    lab.defaults(network::Isolation::Open);
    let greeting = in_netns(&outside.world, || call(pod.address, 8080)).unwrap().unwrap();
    assert_eq!(greeting, format!("pod {WORLD}"));
    outside.set(&lab, Egress::None);
    refused(&pod, WORLD);
}

#[test]
fn ports_of_the_node_lead_to_services() {
    let Some(lab) = lab() else { return };
    let outside = Outside::new();
    let pod = lab.pod("a");
    greet(&pod, 8080, "pod");
    outside.set(&lab, Egress::Nat);
    lab.router().sync_services(&[service(NODE, Protocol::Tcp, 30080, &[(pod.address, 8080)])]).unwrap();
    let from_world = |port| in_netns(&outside.world, || call(HOST, port)).unwrap();
    assert!(from_world(30080).is_err(), "not exposed yet");
    lab.router().sync_exposed(&BTreeSet::from([(Protocol::Tcp, 30080)])).unwrap();
    assert_eq!(from_world(30080).unwrap(), format!("pod {WORLD}"));
    assert!(from_world(30081).is_err());
    // From the router itself, as without an uplink.
    lab.router().run(|| call(NODE, 30080)).unwrap().unwrap();
    lab.router().sync_exposed(&BTreeSet::new()).unwrap();
    assert!(from_world(30080).is_err());
    outside.set(&lab, Egress::None);
}

#[test]
fn the_host_is_as_before_afterwards() {
    let Some(mut lab) = lab() else { return };
    let outside = Outside::new();
    let pod = lab.pod("a");
    let_out(&lab, &["0.0.0.0/0"]);
    for egress in [Egress::Nat, Egress::Routed] {
        let before = outside.state();
        outside.set(&lab, Egress::None);
        same(&outside.state(), &before);
        outside.set(&lab, egress);
        seen(&pod);
        let during = outside.state();
        assert_ne!(during, before);
        // Another process finds what the first left, and connections go on.
        let mut open = in_netns(&netns(&pod), || TcpStream::connect((WORLD, 80)).unwrap()).unwrap();
        lab.reopen();
        outside.set(&lab, egress);
        same(&outside.state(), &during);
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        // One that ended, and lost half of it.
        ip(&outside.host, "link del atoll-run");
        outside.set(&lab, egress);
        seen(&pod);
        outside.set(&lab, Egress::None);
        same(&outside.state(), &before);
    }
}

#[test]
fn a_host_that_uses_the_network_is_left_alone() {
    let Some(lab) = lab() else { return };
    let outside = Outside::new();
    ip(&outside.host, &format!("route add 10.42.7.0/24 via {WORLD}"));
    let before = outside.state();
    let host = File::open(&outside.host).unwrap();
    let error = lab.router().set_egress(host.as_fd(), Egress::Nat).unwrap_err().to_string();
    assert!(error.contains("10.42.7.0/24 by wan"), "{error}");
    same(&outside.state(), &before);
}

#[test]
fn segments_fit_the_way_out() {
    let Some(lab) = lab() else { return };
    let outside = Outside::new();
    let pod = lab.pod("a");
    let_out(&lab, &["0.0.0.0/0"]);
    outside.set(&lab, Egress::Nat);
    seen(&pod);
    ip(&outside.host, "link set wan mtu 1300");
    let listener = in_netns(&outside.world, || TcpListener::bind((WORLD, 81)).unwrap()).unwrap();
    let _client = in_netns(&netns(&pod), || TcpStream::connect((WORLD, 81)).unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let (_, said) = run(&outside.world, "ss", &["-tino", "sport", "=", ":81"]);
    drop(accepted);
    // 1300 less 40 of headers and 12 of timestamps, though the world's own link carries 1500.
    assert!(said.contains(" mss:1248 pmtu:1500"), "{said}");
    outside.set(&lab, Egress::None);
}
