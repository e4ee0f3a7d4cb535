//! The way out in IPv6, between namespaces that the test makes: pods, a host, and the world behind it.
#![allow(clippy::unwrap_used)]

mod common;
use common::uplinked::*;
use common::*;
use network::{Attachment, Egress, Place, Subnet, in_netns};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

/// `None` (said aloud) where the kernel forwards IPv6 for routers alone.
fn world() -> Option<(Lab, Outside)> {
    let lab = lab()?;
    if !lab.router().has_ipv6() || !Path::new("/proc/sys/net/ipv6/conf/all/force_forwarding").exists() {
        println!("SKIPPED: this kernel cannot forward IPv6 and stay a host (force_forwarding, Linux 6.17)");
        return None;
    }
    Some((lab, Outside::dual()))
}

fn call6(to: Ipv6Addr, port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map(|_| text)
}

fn from(pod: &Attachment, to: Ipv6Addr, port: u16) -> std::io::Result<String> {
    in_netns(&netns(pod), || call6(to, port)).unwrap()
}

/// Who the world says that the pod is.
fn seen(pod: &Attachment) -> String {
    let mut said = String::new();
    eventually("the world answers", || {
        from(pod, WORLD6, 81).is_ok_and(|text| {
            said = text;
            !said.is_empty()
        })
    });
    said
}

#[track_caller]
fn refused(pod: &Attachment, address: Ipv6Addr) {
    let error = from(pod, address, 81).unwrap_err();
    // EACCES: administratively prohibited.
    let kinds = [
        ErrorKind::ConnectionRefused,
        ErrorKind::HostUnreachable,
        ErrorKind::NetworkUnreachable,
        ErrorKind::PermissionDenied,
    ];
    assert!(kinds.contains(&error.kind()), "{address}: {error}");
}

fn greet6(pod: &Attachment, port: u16) {
    let listener = in_netns(&netns(pod), || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(format!("pod {peer}").as_bytes());
        }
    });
}

#[test]
fn the_kernel_translates_ipv6() {
    let Some((lab, outside)) = world() else { return };
    let pod = lab.pod("a");
    outside.set(&lab, Egress::Nat);
    let (good, links) = lab.router().run(|| run(&lab.router().netns_path(), "ip", &["-o", "link"])).unwrap();
    assert!(good && !links.contains("relay"), "no relay is needed: {links}");
    refused(&pod, WORLD6);
    let_out(&lab, &["::/0"]);
    assert_eq!(seen(&pod), HOST6.to_string());
    // Never: the host, and its end of the link.
    for address in [HOST6, ALIAS6, "fd00:10:42::ffff".parse().unwrap()] {
        refused(&pod, address);
    }
    let six = IpAddr::from(pod.address6.unwrap());
    lab.router().sync_egress_addresses(&BTreeMap::from([(six, ALIAS6.into())])).unwrap();
    assert_eq!(seen(&pod), ALIAS6.to_string());
    lab.router().sync_egress_addresses(&BTreeMap::new()).unwrap();
    assert_eq!(seen(&pod), HOST6.to_string());
    // Nobody outside opens a connection to a workload.
    greet6(&pod, 8080);
    assert!(in_netns(&outside.world, || call6(pod.address6.unwrap(), 8080)).unwrap().is_err());
    // Where the host has no way further on, that is said at once.
    ip(&outside.host, "-6 route del default");
    refused(&pod, "2001:db8:99::1".parse().unwrap());
    for address in [HOST6, ALIAS6] {
        ip(&outside.host, &format!("-6 address del {address}/64 dev wan"));
    }
    refused(&pod, "2001:db8:99::2".parse().unwrap());
    let_out(&lab, &["0.0.0.0/0"]);
    refused(&pod, WORLD6);
    outside.set(&lab, Egress::None);
}

#[test]
fn routed_keeps_addresses_and_policies_judge_who_comes() {
    let Some((lab, outside)) = world() else { return };
    let edge = |name: &str, cidr: &str, cidr6: Option<&str>| Subnet {
        name: name.into(),
        cidr: cidr.parse().unwrap(),
        cidr6: cidr6.map(|text| text.parse().unwrap()),
    };
    lab.router().add_subnet(None, &edge("default/edge", "10.44.1.0/24", None)).unwrap();
    outside.set(&lab, Egress::Routed);
    lab.router().add_subnet(None, &edge("default/six", "10.44.2.0/24", Some("fd00:10:44:2::/64"))).unwrap();
    let place = |name: &str| Place { subnet: Some(name.into()), moves: false };
    let pods = [
        lab.pod("a"),
        lab.attach(&network::AttachRequest { place: place("default/edge"), ..request("b") }),
        lab.attach(&network::AttachRequest { place: place("default/six"), ..request("c") }),
    ];
    let_out(&lab, &["2001:db8::/64"]);
    for pod in &pods {
        assert_eq!(seen(pod), pod.address6.unwrap().to_string());
        greet6(pod, 8080);
        let inwards = || in_netns(&outside.world, || call6(pod.address6.unwrap(), 8080)).unwrap();
        assert!(inwards().is_err(), "a namespace is private");
    }
    lab.defaults(network::Isolation::Open);
    for pod in &pods {
        let greeting = in_netns(&outside.world, || call6(pod.address6.unwrap(), 8080)).unwrap().unwrap();
        assert_eq!(greeting, format!("pod {WORLD6}"));
    }
    outside.set(&lab, Egress::None);
    refused(&pods[0], WORLD6);
}

#[test]
fn the_host_stays_a_host_and_is_as_before_afterwards() {
    let Some((mut lab, outside)) = world() else { return };
    let pod = lab.pod("a");
    let_out(&lab, &["::/0"]);
    let switch =
        |name: &str| run(&outside.host, "sysctl", &["-n", &format!("net.ipv6.conf.{name}")]).1.trim().to_owned();
    // One that somebody has set stays set.
    run(&outside.host, "sysctl", &["-qw", "net.ipv6.conf.wan.force_forwarding=1"]);
    for egress in [Egress::Nat, Egress::Routed] {
        let before: BTreeSet<String> = outside.state();
        outside.set(&lab, egress);
        seen(&pod);
        assert_eq!(
            (switch("all.forwarding"), switch("wan.forwarding"), switch("wan.accept_ra")),
            ("0".into(), "0".into(), "1".into())
        );
        let during = outside.state();
        let mut open = in_netns(&netns(&pod), || TcpStream::connect((WORLD6, 81)).unwrap()).unwrap();
        lab.reopen();
        outside.set(&lab, egress);
        same(&outside.state(), &during);
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        ip(&outside.host, "link del atoll-run");
        outside.set(&lab, egress);
        seen(&pod);
        outside.set(&lab, Egress::None);
        same(&outside.state(), &before);
    }
    // A host that is a router already is left one, and no switch of its own is written.
    run(&outside.host, "sysctl", &["-qw", "net.ipv6.conf.all.forwarding=1"]);
    let before = outside.state();
    outside.set(&lab, Egress::Nat);
    assert_eq!(seen(&pod), HOST6.to_string());
    outside.set(&lab, Egress::None);
    same(&outside.state(), &before);
}

#[test]
fn a_host_that_uses_the_network_is_left_alone() {
    let Some((lab, outside)) = world() else { return };
    ip(&outside.host, &format!("-6 route add fd00:10:42:0:7::/80 via {WORLD6}"));
    let before = outside.state();
    let host = std::fs::File::open(&outside.host).unwrap();
    let error = lab.router().set_egress(std::os::fd::AsFd::as_fd(&host), Egress::Nat).unwrap_err().to_string();
    assert!(error.contains("fd00:10:42:0:7::/80 by wan"), "{error}");
    same(&outside.state(), &before);
}
