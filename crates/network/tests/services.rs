//! ClusterIPs with real connections.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::{Protocol, Router, in_netns};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

const IP: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 80);

#[test]
fn connections_are_spread_and_hairpins_work() {
    let Some(lab) = lab() else { return };
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    greet(&a, 8080, "a");
    greet(&b, 8081, "b");
    let rules = [service(IP, Protocol::Tcp, 80, &[(a.address, 8080), (b.address, 8081)])];
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 1);
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 0);
    let mut counts = BTreeMap::new();
    for _ in 0..200 {
        let greeting = call_from(&client, IP, 80).unwrap();
        assert!(greeting.ends_with(&client.address.to_string()), "the client's address is kept: {greeting}");
        *counts.entry(greeting).or_insert(0) += 1;
    }
    assert!(counts.len() == 2 && counts.values().all(|n| *n > 50), "{counts:?}");
    // From the router's own namespace, where gateway and agent live.
    lab.router().run(|| call(IP, 80)).unwrap().unwrap();
    // A pod reaches itself through its Service.
    let only_a = [service(IP, Protocol::Tcp, 80, &[(a.address, 8080)])];
    assert_eq!(lab.router().sync_services(&only_a).unwrap(), 1);
    let seen = call_from(&a, IP, 80).unwrap();
    assert_eq!(seen, format!("a {}", lab.router().config().router_address()));
}

#[test]
fn without_endpoints_connections_are_refused_at_once() {
    let Some(mut lab) = lab() else { return };
    let (a, client) = (lab.pod("a"), lab.pod("client"));
    greet(&a, 8080, "a");
    let refused = |lab: &Lab| {
        for attempt in [call_from(&client, IP, 80), lab.router().run(|| call(IP, 80)).unwrap()] {
            assert_eq!(attempt.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    };
    refused(&lab);
    lab.router().sync_services(&[service(IP, Protocol::Tcp, 80, &[])]).unwrap();
    refused(&lab);
    lab.router().sync_services(&[service(IP, Protocol::Tcp, 80, &[(a.address, 8080)])]).unwrap();
    assert!(call_from(&client, IP, 80).is_ok());
    assert_eq!(call_from(&client, IP, 81).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // A new process keeps the services until it is told of new ones, then replaces what it does not know.
    lab.reopen();
    assert!(call_from(&client, IP, 80).is_ok());
    let other = Ipv4Addr::new(10, 43, 0, 81);
    lab.router().sync_services(&[service(other, Protocol::Tcp, 80, &[(a.address, 8080)])]).unwrap();
    assert!(call_from(&client, other, 80).is_ok());
    refused(&lab);
    lab.router().sync_services(&[]).unwrap();
    let (_, rules) = run(&lab.router().netns_path(), "nft", &["list", "ruleset"]);
    assert!(!rules.contains("svc/"), "{rules}");
}

#[test]
fn udp_follows_its_endpoints() {
    let Some(lab) = lab() else { return };
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    greet_udp(&a, 53, "a");
    greet_udp(&b, 53, "b");
    let socket = in_netns(&netns(&client), || UdpSocket::bind((client.address, 0)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let ask = || {
        let mut buffer = [0; 9];
        socket.send_to(b"?", (IP, 53)).ok()?;
        let (length, from) = socket.recv_from(&mut buffer).ok()?;
        assert_eq!(from.ip(), IP);
        String::from_utf8(buffer[..length].to_vec()).ok()
    };
    assert_eq!(ask(), None);
    for (endpoint, name) in [(&a, "a"), (&b, "b"), (&a, "a")] {
        let rules = [service(IP, Protocol::Udp, 53, &[(endpoint.address, 53)])];
        lab.router().sync_services(&rules).unwrap();
        // The same socket: without forgetting the old connection it would go on to the old endpoint.
        eventually("the new endpoint answers", || ask().as_deref() == Some(name));
    }
}

#[test]
fn affinity_keeps_a_client_with_its_endpoint_for_its_time() {
    let Some(lab) = lab() else { return };
    let (a, b, c, client) = (lab.pod("a"), lab.pod("b"), lab.pod("c"), lab.pod("client"));
    for (pod, name) in [(&a, "a"), (&b, "b"), (&c, "c")] {
        greet(pod, 80, name);
    }
    let with = |pods: &[&network::Attachment], seconds| {
        let endpoints: Vec<_> = pods.iter().map(|pod| (pod.address, 80)).collect();
        let mut rule = service(IP, Protocol::Tcp, 80, &endpoints);
        rule.affinity_seconds = Some(seconds);
        lab.router().sync_services(&[rule]).unwrap();
    };
    let ask = || call_from(&client, IP, 80).unwrap();
    with(&[&a, &b], 10_800);
    let first = ask();
    (0..20).for_each(|_| assert_eq!(ask(), first));
    // Endpoints that come do not matter, and neither do others that go.
    with(&[&a, &b, &c], 10_800);
    (0..20).for_each(|_| assert_eq!(ask(), first));
    let (own, other) = if first.starts_with('a') { (&a, &b) } else { (&b, &a) };
    with(&[own, &c], 10_800);
    (0..20).for_each(|_| assert_eq!(ask(), first));
    // Its own goes: another is found, and kept.
    with(&[other, &c], 10_800);
    let second = ask();
    assert_ne!(second, first);
    (0..20).for_each(|_| assert_eq!(ask(), second));
    // A client that stays away for longer than that is a new one.
    with(&[&a, &b], 1);
    let mut seen = std::collections::BTreeSet::new();
    eventually("the time runs out", || {
        seen.insert(ask());
        std::thread::sleep(Duration::from_millis(1100));
        seen.len() == 2
    });
    let (_, rules) = run(&lab.router().netns_path(), "nft", &["list", "maps"]);
    assert_eq!(rules.matches("map affinity/").count() + rules.matches("map \"affinity/").count(), 1, "{rules}");
}

#[test]
fn both_families() {
    let Some(lab) = lab() else { return };
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    let (Some(a6), Some(b6)) = (a.address6, b.address6) else { return println!("SKIPPED: IPv6 is off") };
    let ip: std::net::Ipv6Addr = "fd00:10:43::50".parse().unwrap();
    for (pod, name) in [(&a, "a"), (&b, "b")] {
        let listener = in_netns(&netns(pod), || std::net::TcpListener::bind(("::", 8080)).unwrap()).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = std::io::Write::write_all(&mut stream.unwrap(), name.as_bytes());
            }
        });
    }
    let ask = || -> std::io::Result<String> {
        in_netns(lab.router().netns_path().as_path(), || {
            let mut stream = std::net::TcpStream::connect_timeout(&(ip, 80).into(), Duration::from_secs(5))?;
            let mut text = String::new();
            std::io::Read::read_to_string(&mut stream, &mut text)?;
            Ok(text)
        })
        .unwrap()
    };
    drop(client);
    assert!(ask().is_err());
    let mut rule = service(ip, Protocol::Tcp, 80, &[(a6, 8080), (b6, 8080)]);
    lab.router().sync_services(std::slice::from_ref(&rule)).unwrap();
    let seen: std::collections::BTreeSet<String> = (0..40).map(|_| ask().unwrap()).collect();
    assert_eq!(seen.len(), 2);
    rule.affinity_seconds = Some(600);
    lab.router().sync_services(std::slice::from_ref(&rule)).unwrap();
    let first = ask().unwrap();
    (0..20).for_each(|_| assert_eq!(ask().unwrap(), first));
    lab.router().sync_services(&[]).unwrap();
    assert!(ask().is_err());
}

#[test]
fn thousands_of_services_are_one_transaction() {
    let Some(lab) = lab() else { return };
    let (a, client) = (lab.pod("a"), lab.pod("client"));
    greet(&a, 80, "a");
    let ip = |n: u16| Ipv4Addr::new(10, 43, 1 + (n >> 8) as u8, n as u8);
    let endpoints: Vec<_> = (0..5u8).map(|n| (Ipv4Addr::new(10, 42, 9, n), 80)).collect();
    let mut rules: Vec<_> = (0..2000).map(|n| service(ip(n), Protocol::Tcp, 80, &endpoints)).collect();
    rules.push(service(IP, Protocol::Tcp, 80, &[(a.address, 80)]));
    let start = Instant::now();
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 2001);
    let all = start.elapsed();
    assert!(call_from(&client, IP, 80).is_ok());
    rules[7].endpoints.pop();
    let start = Instant::now();
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 1);
    let one = start.elapsed();
    let before = rules[7].clone();
    rules[7].endpoints.pop();
    let start = Instant::now();
    assert_eq!(lab.router().change_services(&[before], &rules[7..8]).unwrap(), Some(1));
    println!("2001 services, 10001 endpoints in {all:?}; one change in {one:?}, alone in {:?}", start.elapsed());
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 0, "it is as if all had been handed over");
    // One service with ten thousand endpoints.
    rules[7].endpoints = (0..10_000u32).map(|n| (Ipv4Addr::from_bits(0x0a2a_1000 + n).into(), 80)).collect();
    assert_eq!(lab.router().sync_services(&rules).unwrap(), 1);
    let start = Instant::now();
    assert_eq!(lab.router().sync_services(&[]).unwrap(), 2001);
    println!("all removed in {:?}", start.elapsed());
}

#[test]
fn a_refused_change_changes_nothing() {
    let Some(lab) = lab() else { return };
    let (a, client) = (lab.pod("a"), lab.pod("client"));
    greet(&a, 80, "a");
    let good = service(IP, Protocol::Tcp, 80, &[(a.address, 80)]);
    let router: &Router = lab.router();
    router.sync_services(std::slice::from_ref(&good)).unwrap();
    let outside = service(Ipv4Addr::new(192, 0, 2, 1), Protocol::Tcp, 80, &[]);
    let error = router.sync_services(&[good.clone(), outside]).unwrap_err().to_string();
    assert!(error.contains("192.0.2.1") && error.contains("10.43.0.0/16"), "{error}");
    assert!(router.sync_services(&[good.clone(), good]).is_err());
    assert!(call_from(&client, IP, 80).is_ok());
}

#[test]
fn a_change_is_of_what_it_names_alone() {
    let Some(lab) = lab() else { return };
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    greet(&a, 80, "a");
    greet(&b, 80, "b");
    let router: &Router = lab.router();
    let other = Ipv4Addr::new(10, 43, 0, 81);
    let rule = |ip, to: Ipv4Addr| service(ip, Protocol::Tcp, 80, &[(to, 80)]);
    let (a, b) = (a.address, b.address);
    let says = |ip| call_from(&client, ip, 80).map(|greeting| greeting[..1].to_owned()).map_err(|error| error.kind());
    router.sync_services(&[rule(IP, a)]).unwrap();
    assert_eq!(router.change_services(&[], &[rule(other, b)]).unwrap(), Some(1));
    assert_eq!((says(IP), says(other)), (Ok("a".into()), Ok("b".into())));
    assert_eq!(router.change_services(&[rule(IP, a)], &[rule(IP, b)]).unwrap(), Some(1));
    assert_eq!(router.change_services(&[rule(IP, b)], &[rule(IP, b)]).unwrap(), Some(0));
    assert_eq!((says(IP), says(other)), (Ok("b".into()), Ok("b".into())));
    let error = router.change_services(&[], &[rule(IP, a)]).unwrap_err().to_string();
    assert!(error.contains("10.43.0.80:80/tcp") && error.contains("is both"), "{error}");
    assert_eq!(router.change_services(&[rule(IP, b)], &[]).unwrap(), Some(1));
    assert_eq!((says(IP), says(other)), (Err(ErrorKind::ConnectionRefused), Ok("b".into())));
    assert_eq!(router.sync_services(&[rule(other, b)]).unwrap(), 0, "nothing else is left");
}
