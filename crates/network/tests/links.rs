//! Attaching, reaching, spoofing, crashing, leaving nothing behind.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::{AttachRequest, Error, LinkKind, Router, in_netns};
use rustix::fd::AsFd;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

#[test]
fn two_workloads_reach_each_other_and_nothing_else() {
    let Some(lab) = lab() else { return };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    greet(&b, 80, "b");
    assert_eq!(call_from(&a, b.address, 80).unwrap(), format!("b {}", a.address));
    let (ok, text) = run(&netns(&a), "ping", &["-c1", "-W2", &b.address.to_string()]);
    assert!(ok || text.contains("No such file"), "{text}");
    // The router's own ports: refused, though something listens there.
    let listener = lab.router().run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9000)).unwrap()).unwrap();
    for address in [lab.router().config().router_address(), a.gateway] {
        let error = call_from(&a, address, 9000).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    drop(listener);
    // Nobody has this pod address; there is no way outside.
    assert!(call_from(&a, Ipv4Addr::new(10, 42, 200, 1), 80).is_err());
    assert!(call_from(&a, Ipv4Addr::new(192, 0, 2, 1), 80).is_err());
    assert!(call_from(&a, Ipv4Addr::new(169, 254, 169, 254), 80).is_err());
    // The router itself reaches workloads.
    assert!(lab.router().run(|| call(b.address, 80)).unwrap().unwrap().starts_with("b "));
}

#[test]
fn a_foreign_source_address_is_dropped() {
    let Some(lab) = lab() else { return };
    let (a, b, c) = (lab.pod("a"), lab.pod("b"), lab.pod("c"));
    let server = network::in_netns(&netns(&b), || UdpSocket::bind((b.address, 99)).unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let send = |source: Ipv4Addr| {
        network::in_netns(&netns(&a), || {
            UdpSocket::bind((source, 0)).unwrap().send_to(b"x", (b.address, 99)).unwrap();
        })
        .unwrap();
    };
    for foreign in [c.address, Ipv4Addr::new(10, 42, 77, 77), Ipv4Addr::new(192, 0, 2, 7), a.gateway] {
        let (ok, text) = run(&netns(&a), "ip", &["addr", "add", &format!("{foreign}/32"), "dev", "eth0"]);
        assert!(ok, "{text}");
        send(foreign);
    }
    assert!(server.recv_from(&mut [0; 9]).is_err(), "a spoofed packet arrived");
    send(a.address);
    assert_eq!(server.recv_from(&mut [0; 9]).unwrap().1.ip(), a.address);
}

#[test]
fn a_workload_has_what_it_expects() {
    let Some(lab) = lab() else { return };
    let a = lab.pod("a");
    assert_eq!((a.gateway, a.mtu), (Ipv4Addr::new(169, 254, 1, 1), 1500));
    let (_, text) = run(&netns(&a), "ip", &["-o", "addr"]);
    assert!(text.contains(&format!("{}/32", a.address)) && text.contains("127.0.0.1/8"), "{text}");
    let (_, link) = run(&netns(&a), "ip", &["link", "show", "eth0"]);
    assert!(link.contains(&a.mac), "{link}");
    let (_, text) = run(&netns(&a), "ip", &["route"]);
    assert!(text.contains("default via 169.254.1.1 dev eth0 proto static onlink"), "{text}");
    let (_, text) = run(&netns(&a), "sysctl", &["-n", "net.ipv4.ip_unprivileged_port_start"]);
    assert_eq!(text.trim(), "0");
}

#[test]
fn ipv6_comes_beside_ipv4() {
    let Some(lab) = lab() else { return };
    let a = lab.pod("a");
    let address = lab.router().config().v6_of(a.address);
    assert_eq!(a.address6, Some(address));
    // Its address and no other: no link-local one, none by autoconfiguration.
    let (_, text) = run(&netns(&a), "ip", &["-6", "-o", "addr", "show", "dev", "eth0"]);
    assert!(text.lines().count() == 1 && text.contains(&format!("{address}/128")), "{text}");
    assert!(!text.contains("tentative"), "{text}");
    let (_, text) = run(&netns(&a), "ip", &["-6", "route", "show", "default"]);
    assert!(text.contains("default via fe80::1 dev eth0"), "{text}");
    // The router reaches it, from its own address, and it the router.
    let listener = in_netns(&netns(&a), || TcpListener::bind((address, 80)).unwrap()).unwrap();
    let _held = lab.router().run(|| TcpStream::connect((address, 80)).unwrap()).unwrap();
    let peer = listener.accept().unwrap().1.ip();
    assert_eq!(peer, lab.router().config().router_address6());
    let (ok, text) = run(&netns(&a), "ping", &["-6", "-c1", "-W2", &peer.to_string()]);
    assert!(ok || text.contains("No such file"), "{text}");
    // The router's own ports, what nobody has, and the outside: refused at once.
    let listener = lab.router().run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 9000)).unwrap()).unwrap();
    let refused = |to: SocketAddr| in_netns(&netns(&a), || TcpStream::connect(to)).unwrap().unwrap_err().kind();
    for to in ["[fd00:10:42::1]:9000", "[fd00:10:42::77]:80", "[fd00:10:43::77]:80", "[2001:db8::1]:80"] {
        assert_eq!(refused(to.parse().unwrap()), std::io::ErrorKind::ConnectionRefused, "{to}");
    }
    drop(listener);
}

#[test]
fn attaching_again_finds_the_same_and_mends_what_is_broken() {
    let Some(mut lab) = lab() else { return };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    greet(&b, 80, "b");
    assert_eq!(lab.pod("a"), a);
    // A new process finds everything as it was, and traffic never stopped.
    lab.reopen();
    assert_eq!(call_from(&a, b.address, 80).unwrap(), format!("b {}", a.address));
    assert_eq!(lab.pod("a"), a);
    let mut list = lab.router().list();
    list.sort();
    assert_eq!(list, ["a", "b"]);
    // The link was cut from outside; the namespace, in which a process may live, is kept.
    let (ok, text) = run(&netns(&a), "ip", &["link", "del", "eth0"]);
    assert!(ok, "{text}");
    assert_eq!(lab.pod("a"), a);
    assert!(call_from(&a, b.address, 80).is_ok());
    // Half-done: a pin without a namespace.
    lab.router().detach("a").unwrap();
    std::fs::write(lab.dir.path().join("run/netns/a"), "").unwrap();
    let again = lab.pod("a");
    assert!(call_from(&again, b.address, 80).is_ok());
}

#[test]
fn after_a_reboot_addresses_are_the_same() {
    let Some(mut lab) = lab() else { return };
    let a = lab.pod("a");
    let machine = AttachRequest { address_key: Some("default/vm".into()), kind: LinkKind::Tap, ..request("vm-1") };
    let vm = lab.router().attach(&machine).unwrap();
    lab.router.take().unwrap().teardown().unwrap();
    assert!(!lab.dir.path().join("run/netns").exists());
    lab.reopen();
    assert_eq!(lab.pod("a"), a);
    lab.router().detach("vm-1").unwrap();
    let next = AttachRequest { uid: "vm-2".into(), ..machine.clone() };
    assert_eq!(lab.router().attach(&next).unwrap().address, vm.address);
    assert!(matches!(lab.router().attach(&machine), Err(Error::KeyInUse { .. })));
    lab.router().detach("vm-2").unwrap();
    lab.router().release_address("default/vm").unwrap();
}

#[test]
fn a_tap_carries_frames_and_answers_arp() {
    let Some(lab) = lab() else { return };
    let b = lab.pod("b");
    let request = AttachRequest { kind: LinkKind::Tap, ..request("vm") };
    let vm = match lab.router().attach(&request) {
        Err(error) if format!("{error:?}").contains("/dev/net/tun") => {
            println!("SKIPPED: no /dev/net/tun here");
            return;
        }
        other => other.unwrap(),
    };
    assert_eq!(lab.attach(&request), vm);
    let tap = lab.router().open_tap(vm.tap.as_ref().unwrap()).unwrap();
    assert!(matches!(lab.router().open_tap("lo"), Err(Error::NoLink(_))));
    // "Who has the gateway?"
    let mac: Vec<u8> = vm.mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let me = vm.address.octets();
    let arp = [&[0; 10][..], &[255; 6], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &me, &[0; 6], &[169, 254, 1, 1]];
    let ask = || {
        rustix::io::write(&tap, &arp.concat()).unwrap();
    };
    let answer = frame(&tap, ask, |frame| frame[12..14] == [8, 6]);
    assert_eq!((&answer[20..22], &answer[28..32]), (&[0, 2][..], &[169, 254, 1, 1][..]));
    // A datagram to it from a pod comes out as a frame for it.
    let socket = network::in_netns(&netns(&b), || UdpSocket::bind((b.address, 7)).unwrap()).unwrap();
    let greet = || {
        socket.send_to(b"hello", (vm.address, 9)).unwrap();
    };
    let datagram = frame(&tap, greet, |frame| frame[12..14] == [8, 0]);
    assert_eq!((&datagram[..6], &datagram[26..30]), (&mac[..], &b.address.octets()[..]));
    assert!(datagram.ends_with(b"hello"));
    drop(tap);
    lab.router().detach("vm").unwrap();
    assert!(lab.router().open_tap(vm.tap.as_ref().unwrap()).is_err());
}

/// The first frame that `wanted` accepts, without its virtio-net header. What causes it is sent again as a guest would:
/// the kernel opens a tap's queue a moment after the device is opened.
fn frame(tap: &impl AsFd, cause: impl Fn(), wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = [0; 4096];
    let mut found = Vec::new();
    eventually("a frame", || {
        cause();
        while let Ok(length) = rustix::io::read(tap, &mut buffer) {
            if length > 24 && wanted(&buffer[10..length]) {
                found = buffer[10..length].to_vec();
                return true;
            }
        }
        false
    });
    found
}

#[test]
fn strays_of_a_lost_journal_are_removed() {
    let Some(mut lab) = lab() else { return };
    lab.pod("a");
    lab.router = None;
    std::fs::remove_file(lab.dir.path().join("data/addresses")).unwrap();
    lab.reopen();
    assert!(!lab.dir.path().join("run/netns/a").exists());
    let (_, links) = run(&lab.router().netns_path(), "ip", &["-o", "link"]);
    assert!(!links.contains("veth"), "{links}");
}

/// Not a test of its own: what [`kill_at_any_moment`] kills.
#[test]
fn helper_attaches_until_killed() {
    let Some(dir) = std::env::var_os("ATOLL_TEST_DIR") else { return };
    let router = Router::open(config(std::path::Path::new(&dir))).unwrap();
    for n in 0usize.. {
        let kind = if n % 3 == 2 { LinkKind::Tap } else { LinkKind::Namespace };
        router.attach(&AttachRequest { kind, ..request(&format!("p{}", n % 6)) }).unwrap();
        router.detach(&format!("p{}", (n + 3) % 6)).unwrap();
    }
}

#[test]
fn kill_at_any_moment() {
    let Some(mut lab) = lab() else { return };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    greet(&b, 80, "b");
    for round in 0..15u64 {
        lab.router = None;
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["helper_attaches_until_killed", "--exact"])
            .env("ATOLL_TEST_DIR", lab.dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Not a wait for something: the moment is meant to be any.
        std::thread::sleep(Duration::from_millis(5 + round * 11 % 70));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(call_from(&a, b.address, 80).is_ok(), "traffic went on without a process");
        lab.reopen();
        assert_eq!((lab.pod("a"), lab.pod("b")), (a.clone(), b.clone()));
        let p0 = lab.pod("p0");
        assert_eq!(call_from(&p0, b.address, 80).unwrap(), format!("b {}", p0.address));
        for uid in lab.router().list() {
            if uid.starts_with('p') {
                lab.router().detach(&uid).unwrap();
            }
        }
        let pins = std::fs::read_dir(lab.dir.path().join("run/netns")).unwrap().count();
        let (_, links) = run(&lab.router().netns_path(), "ip", &["-o", "link"]);
        let count = links.lines().filter(|line| line.contains("veth") || line.contains("tap")).count();
        assert_eq!((pins, count), (3, 2), "{links}");
    }
}

#[test]
fn one_router_per_data_directory() {
    let Some(lab) = lab() else { return };
    assert!(matches!(Router::open(config(lab.dir.path())), Err(Error::InUse { .. })));
    network::probe().unwrap();
    for uid in ["", "router", "../x", "a/b", ".x", "a b"] {
        assert!(matches!(lab.router().attach(&request(uid)), Err(Error::Config { .. })), "{uid:?}");
    }
}

#[test]
fn two_hundred_come_and_go() {
    let Some(lab) = lab() else { return };
    let mut times: Vec<Duration> = Vec::new();
    let mut away: Vec<Duration> = Vec::new();
    for n in 0..200 {
        let start = Instant::now();
        lab.pod(&format!("p{n}"));
        times.push(start.elapsed());
        if n >= 20 {
            let start = Instant::now();
            lab.router().detach(&format!("p{}", n - 20)).unwrap();
            away.push(start.elapsed());
        }
    }
    assert_eq!(lab.router().list().len(), 20);
    let (start, rest) = (Instant::now(), lab.router().list());
    std::thread::scope(|scope| {
        for uid in &rest {
            scope.spawn(|| lab.router().detach(uid).unwrap());
        }
    });
    println!("20 detached side by side in {:?}", start.elapsed());
    lab.router().detach("never-there").unwrap();
    let router = lab.router().netns_path();
    let (_, links) = run(&router, "ip", &["-o", "link"]);
    assert_eq!(links.lines().filter(|line| line.contains("veth")).count(), 0, "{links}");
    let (_, rules) = run(&router, "nft", &["list", "ruleset"]);
    assert!(!rules.contains("elements"), "{rules}");
    let pins: Vec<_> = std::fs::read_dir(lab.dir.path().join("run/netns")).unwrap().collect();
    assert_eq!(pins.len(), 1, "{pins:?}");
    times.sort();
    away.sort();
    println!("attach median {:?} p95 {:?}; detach median {:?}", times[100], times[190], away[90]);
}

#[test]
fn the_host_is_left_alone() {
    let Some(lab) = lab() else { return };
    drop(lab);
    // A namespace of the test's own plays the host, so that nobody else changes it meanwhile.
    let host = std::thread::spawn(|| {
        let dir = tempfile::tempdir().unwrap();
        let look = || {
            let say = |program: &str, args: &[&str]| {
                let output = std::process::Command::new(program).args(args).output().unwrap();
                String::from_utf8_lossy(&output.stdout).into_owned()
            };
            let sysctls: String = say("sysctl", &["-a"])
                .lines()
                .filter(|line| line.starts_with("net.") && !line.contains("nf_conntrack_count"))
                .map(|line| format!("{line}\n"))
                .collect();
            assert!(sysctls.len() > 1000);
            [say("ip", &["-j", "a"]), say("ip", &["-j", "r"]), say("nft", &["list", "ruleset"]), sysctls]
        };
        let pin = dir.path().join("host");
        std::fs::write(&pin, "").unwrap();
        let output =
            std::process::Command::new("unshare").args([&format!("--net={}", pin.display()), "true"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let outcome = network::in_netns(&pin, || {
            let before = look();
            let router = Router::open(config(dir.path())).unwrap();
            router.attach(&request("a")).unwrap();
            router.attach(&AttachRequest { kind: LinkKind::Tap, ..request("vm") }).unwrap();
            assert_eq!(before, look());
            router.teardown().unwrap();
            assert_eq!(before, look());
        });
        rustix::mount::unmount(&pin, rustix::mount::UnmountFlags::DETACH).unwrap();
        outcome.unwrap();
    });
    host.join().unwrap();
}
