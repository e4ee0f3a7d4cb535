//! The way out, between namespaces that the test makes: pods, a host, and the world behind it.
#![allow(clippy::unwrap_used)]

mod common;
use common::uplinked::*;
use common::*;
use network::{Attachment, Egress, NODE, Place, Protocol, Subnet, in_netns};
use rustix::fd::AsFd;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

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
    let sources = BTreeMap::from([(IpAddr::from(pod.address), ALIAS.into())]);
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
fn subnets_have_the_way_out_too() {
    let Some(mut lab) = lab() else { return };
    let outside = Outside::new();
    let edge = |name: &str, cidr: &str| Subnet { name: name.into(), cidr: cidr.parse().unwrap(), cidr6: None };
    lab.router().add_subnet(None, &edge("default/edge", "10.44.1.0/24")).unwrap();
    let place = Place { subnet: Some("default/edge".into()), moves: false };
    let pod = lab.attach(&network::AttachRequest { place, ..request("a") });
    let_out(&lab, &["0.0.0.0/0"]);
    outside.set(&lab, Egress::Nat);
    assert_eq!(seen(&pod), HOST.to_string());
    lab.router().sync_egress_addresses(&BTreeMap::from([(IpAddr::from(pod.address), ALIAS.into())])).unwrap();
    assert_eq!(seen(&pod), ALIAS.to_string());
    let routes = || run(&outside.host, "ip", &["route", "show", "dev", "atoll-run"]).1;
    assert!(routes().contains("10.44.1.0/24"), "{}", routes());
    lab.router().add_subnet(None, &edge("default/later", "10.44.2.0/24")).unwrap();
    assert!(routes().contains("10.44.2.0/24"), "{}", routes());
    lab.router().remove_subnet("default/later").unwrap();
    assert!(!routes().contains("10.44.2.0/24"), "{}", routes());
    lab.reopen();
    outside.set(&lab, Egress::Routed);
    ip(&outside.world, &format!("route add 10.44.1.0/24 via {HOST}"));
    assert_eq!(seen(&pod), pod.address.to_string());
    outside.set(&lab, Egress::None);
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
