//! Policies over time: changes, crashes, connections that are open, and how much there may be of everything. What policies
//! mean is tested with real packets in `node`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Rule};
use network::{AttachRequest, Cause, Isolation, LinkKind, Policies, Protocol, Router, in_netns};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

fn defaults(router: &Router) -> Policies {
    let leases = router.leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    Policies::without_rules(Isolation::Private, workloads)
}

fn allow(group: &str, ports: &[(u16, u16)]) -> Rule {
    let ports = ports.iter().map(|(first, last)| Ports { protocol: Protocol::Tcp, first: *first, last: *last });
    Rule {
        origin: format!("allow {group}").into(),
        action: Action::Allow,
        anyone: false,
        group: Some(group.into()),
        blocks: Default::default(),
        names: None,
        ports: ports.collect(),
    }
}

fn isolate(policies: &mut Policies, address: Ipv4Addr, key: &str, rules: Vec<Rule>) {
    let profile = Profile { direction: Direction::Ingress, origin: key.into(), rules, otherwise: Otherwise::Refuse };
    policies.profiles.insert(key.into(), profile);
    policies.workloads.get_mut(&address).unwrap().ingress = Some(key.into());
}

#[test]
fn nobody_talks_before_policies_know_it() {
    let Some(lab) = lab() else { return };
    let (a, b) = (lab.router().attach(&request("a")).unwrap(), lab.router().attach(&request("b")).unwrap());
    greet(&b, 80, "b");
    assert_eq!(call_from(&a, b.address, 80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    lab.defaults(Isolation::Private);
    assert!(call_from(&a, b.address, 80).is_ok());
    // Nor does one that leaves and comes back with the same address.
    let key = AttachRequest { address_key: Some("default/kept".into()), ..request("one") };
    let one = lab.attach(&key);
    assert!(call_from(&one, b.address, 80).is_ok());
    lab.router().detach("one").unwrap();
    let two = lab.router().attach(&AttachRequest { uid: "two".into(), ..key }).unwrap();
    assert_eq!(two.address, one.address);
    assert!(call_from(&two, b.address, 80).is_err());
    lab.defaults(Isolation::Private);
    assert!(call_from(&two, b.address, 80).is_ok());
}

#[test]
fn a_namespace_is_private_unless_the_network_is_open() {
    let Some(lab) = lab() else { return };
    let a = lab.pod("a");
    let stranger = lab.attach(&AttachRequest { namespace: "other".into(), ..request("stranger") });
    greet(&a, 80, "a");
    assert_eq!(call_from(&stranger, a.address, 80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // An address that nobody has is refused in the same way: a scan tells nothing.
    let nobody = Ipv4Addr::new(10, 42, 200, 9);
    assert_eq!(call_from(&stranger, nobody, 80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    lab.defaults(Isolation::Open);
    assert!(call_from(&stranger, a.address, 80).is_ok());
    lab.defaults(Isolation::Private);
    assert!(call_from(&stranger, a.address, 80).is_err());
}

#[test]
fn open_connections_end_when_they_are_no_longer_allowed() {
    let Some(lab) = lab() else { return };
    let (server, client, friend) = (lab.pod("server"), lab.pod("client"), lab.pod("friend"));
    let listener = in_netns(&netns(&server), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap()).unwrap();
    let connect = |from| {
        let stream: TcpStream = in_netns(&netns(from), || TcpStream::connect((server.address, 80)).unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (stream, far)
    };
    let talks = |(near, far): &mut (TcpStream, TcpStream)| {
        near.write_all(b"ping").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        far.read_exact(&mut [0; 4]).is_ok()
    };
    let (mut cut, mut kept) = (connect(&client), connect(&friend));
    assert!(talks(&mut cut) && talks(&mut kept));
    let mut policies = defaults(lab.router());
    policies.groups.insert("friends".into(), BTreeSet::from([friend.address]));
    isolate(&mut policies, server.address, "friends only", vec![allow("friends", &[(80, 80)])]);
    let changed = lab.router().sync_policies(policies).unwrap();
    assert_eq!(changed.ended, 1);
    assert!(talks(&mut kept), "what is still allowed goes on");
    assert!(!talks(&mut cut));
    // The server cannot take it up again from its side either.
    cut.1.write_all(b"pong").unwrap();
    cut.0.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(cut.0.read_exact(&mut [0; 4]).is_err());
}

/// The state that every run of changes ends with.
fn last(router: &Router, server: Ipv4Addr, friend: Ipv4Addr) -> Policies {
    let mut policies = defaults(router);
    policies.groups.insert("friends".into(), BTreeSet::from([friend]));
    isolate(&mut policies, server, "last", vec![allow("friends", &[(80, 80), (90, 99)])]);
    policies
}

/// One of many states; in all of them `friend` may call port 80 of `server`.
fn state(router: &Router, server: Ipv4Addr, friend: Ipv4Addr, n: u32) -> Policies {
    let mut policies = defaults(router);
    for group in 0..n % 7 {
        let others = (0..n % 50).map(|m| Ipv4Addr::from_bits(server.to_bits() + 100 + m * (group + 1)));
        policies.groups.insert(format!("others {group}").into(), others.collect());
    }
    let name = if n.is_multiple_of(2) { "friends" } else { "more friends" };
    policies.groups.insert(name.into(), BTreeSet::from([friend]));
    let mut allows: Vec<Rule> = (0..n % 7).map(|group| allow(&format!("others {group}"), &[(1, 9)])).collect();
    allows.push(allow(name, &[(80, 80 + (n % 3) as u16)]));
    isolate(&mut policies, server, &format!("profile {}", n % 5), allows);
    policies
}

/// Not a test of its own: what [`kill_in_the_middle_of_changes`] kills.
#[test]
fn helper_changes_until_killed() {
    let Some(dir) = std::env::var_os("ATOLL_TEST_POLICY_DIR") else { return };
    let router = Router::open(config(Path::new(&dir))).unwrap();
    let [server, friend] = ["server", "friend"].map(|uid| address_of(&router, uid));
    for n in 0u32.. {
        router.sync_policies(state(&router, server, friend, n)).unwrap();
        println!("{n}");
    }
}

fn address_of(router: &Router, uid: &str) -> Ipv4Addr {
    router.leases().iter().find(|lease| lease.uid == uid).unwrap().address
}

/// The ruleset as nft lists it, without what counts packets; elements of sets sorted, numbers of ours by first appearance.
fn ruleset(lab: &Lab) -> String {
    let (ok, text) = run(&lab.router().netns_path(), "nft", &["-j", "-s", "list", "ruleset"]);
    assert!(ok, "{text}");
    let mut whole: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut seen = Vec::new();
    tidy(&mut whole, &mut seen);
    serde_json::to_string_pretty(&whole).unwrap()
}

fn tidy(value: &mut serde_json::Value, seen: &mut Vec<String>) {
    use serde_json::Value;
    match value {
        Value::Object(fields) => {
            fields.remove("handle");
            if let Some(Value::Array(elements)) = fields.get_mut("elem") {
                elements.sort_by_key(|element| element.to_string());
            }
            // What rules counted by key.
            if fields.get("name").and_then(Value::as_str).is_some_and(|name| name.ends_with("_of")) {
                fields.remove("elem");
            }
            // Numbers of namespaces: the only values of `namespaces`, and half of the keys of `members`.
            if ["namespaces", "members"].iter().any(|name| fields.get("name") == Some(&Value::from(*name))) {
                let count = fields.get("elem").and_then(Value::as_array).map_or(0, Vec::len);
                fields.insert("elem".into(), count.into());
            }
            fields.values_mut().for_each(|field| tidy(field, seen));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| tidy(item, seen)),
        Value::String(text) => {
            let name = text.trim_start_matches('@');
            if name.starts_with("policy/") || name.starts_with("peers/") {
                if !seen.iter().any(|known| known == name) {
                    seen.push(name.to_owned());
                }
                let place = seen.iter().position(|known| known == name).unwrap();
                *text = format!("ours {place}");
            }
        }
        _ => {}
    }
}

#[test]
fn kill_in_the_middle_of_changes() {
    let Some(mut lab) = lab() else { return };
    let (server, friend, foe) = (lab.pod("server"), lab.pod("friend"), lab.pod("foe"));
    greet(&server, 80, "server");
    lab.router().sync_policies(state(lab.router(), server.address, friend.address, 0)).unwrap();
    // The test makes tens of thousands of connections; they need not be remembered when they have ended.
    let brief = || std::fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1").unwrap();
    lab.router().run(brief).unwrap();
    let (stop, calls, changes) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            in_netns(&netns(&friend), || {
                while !stop.load(Ordering::Relaxed) {
                    call(server.address, 80).expect("allowed traffic never stops");
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            })
            .unwrap();
        });
        for round in 0..15u64 {
            lab.router = None;
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["helper_changes_until_killed", "--exact", "--nocapture"])
                .env("ATOLL_TEST_POLICY_DIR", lab.dir.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            // Once it has made some changes, the moment is meant to be any.
            let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
            for made in 0..3 + round * 7 % 11 {
                let mut line = String::new();
                while !line.trim_end().ends_with(&made.to_string()) {
                    line.clear();
                    assert!(std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0, "the helper ended");
                }
                changes.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(round * 17 % 40));
            child.kill().unwrap();
            child.wait().unwrap();
            lab.reopen();
            assert!(call_from(&foe, server.address, 80).is_err(), "what was refused stays so");
            lab.router().sync_policies(last(lab.router(), server.address, friend.address)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        caller.join().unwrap();
    });
    println!("{} changes, {} calls meanwhile", changes.into_inner(), calls.into_inner());
    let survived = ruleset(&lab);
    let fresh = {
        let Some(other) = self::lab() else { return };
        for uid in ["server", "friend", "foe"] {
            other.router().attach(&request(uid)).unwrap();
        }
        other.router().sync_policies(last(other.router(), server.address, friend.address)).unwrap();
        ruleset(&other)
    };
    assert_eq!(survived, fresh, "the kernel's state is the wanted one, with nothing left over");
}

#[test]
fn machines_and_rules_by_the_thousand() {
    let Some(lab) = lab() else { return };
    let (server, client) = (lab.pod("server"), lab.pod("client"));
    greet(&server, 80, "server");
    let vm = AttachRequest { kind: LinkKind::Tap, ..request("vm") };
    let _ = lab.router().attach(&vm);
    let mut policies = defaults(lab.router());
    for n in 0..500u32 {
        let group = format!("group {n}");
        let members = (0..100).map(|m| Ipv4Addr::from_bits(0x0a2a_1000 + n * 100 + m)).chain([client.address]);
        policies.groups.insert(group.as_str().into(), members.collect());
        let profile = Profile {
            direction: Direction::Ingress,
            origin: "many".into(),
            rules: vec![allow(&group, &[(80, 80)]), allow(&group, &[(1000, 2000), (3000, 3001)])],
            otherwise: Otherwise::Refuse,
        };
        policies.profiles.insert(format!("profile {n}").into(), profile);
    }
    policies.workloads.get_mut(&server.address).unwrap().ingress = Some("profile 499".into());
    let begun = Instant::now();
    lab.router().sync_policies(policies.clone()).unwrap();
    let all = begun.elapsed();
    assert!(call_from(&client, server.address, 80).is_ok());
    policies.groups.get_mut("group 499").unwrap().remove(&client.address);
    let begun = Instant::now();
    assert_eq!(lab.router().sync_policies(policies).unwrap().objects, 1);
    println!("500 profiles and groups in {all:?}; one member less in {:?}", begun.elapsed());
    assert!(call_from(&client, server.address, 80).is_err());
}

#[test]
fn what_is_refused_is_told() {
    let Some(lab) = lab() else { return };
    let a = lab.pod("a");
    let stranger = lab.attach(&AttachRequest { namespace: "other".into(), ..request("stranger") });
    let log = network::refused::RefusedLog::start(lab.router()).unwrap();
    assert!(call_from(&stranger, a.address, 80).is_err());
    assert!(call_from(&stranger, Ipv4Addr::new(169, 254, 169, 254), 443).is_err());
    let by_policy = || log.since(0).into_iter().filter(|refused| refused.cause == Cause::Policy).collect::<Vec<_>>();
    eventually("both are told", || by_policy().len() == 2);
    let told: Vec<_> =
        by_policy().iter().map(|r| (r.flow.source, r.flow.destination, r.flow.protocol, r.flow.port)).collect();
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    let from = stranger.address.into();
    assert_eq!(told, [(from, a.address.into(), 6, 80), (from, metadata.into(), 6, 443)]);
    assert!(log.since(2).is_empty());
    // A flood of them is cut to some tens a second.
    let begun = Instant::now();
    for _ in 0..400 {
        assert!(call_from(&stranger, a.address, 80).is_err());
    }
    let most = 100.0 + begun.elapsed().as_secs_f64() * 50.0;
    assert!((log.since(2).len() as f64) < most, "{} of 400 told", log.since(2).len());
}
