//! The way out through the relay, between namespaces that the test makes: pods, a host, and the world behind it.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::policy::{Action, Block, Direction, Otherwise, Profile, Rule, ranges};
use network::{Attachment, Egress, Router, RouterConfig, in_netns};
use rustix::fd::AsFd;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const HOST: &str = "203.0.113.2";
const ALIAS: &str = "203.0.113.9";
const WORLD: &str = "203.0.113.1";
const HOST6: &str = "2001:db8::2";
const WORLD6: &str = "2001:db8::1";
const METADATA: &str = "169.254.169.254";
const WORLDS: [&str; 2] = [WORLD, WORLD6];

/// Not a test: the relay's process, which the tests start from their own executable.
#[test]
fn relay_role() {
    if let Some(settings) = std::env::args().next_back().filter(|last| last.starts_with('{')) {
        std::process::exit(network::relay::main(&[settings]));
    }
}

struct Outside {
    lab: Lab,
    host: Netns,
    world: Netns,
    pod: Attachment,
}

fn open(dir: &Path) -> network::Result<Router> {
    Router::open(settings(dir))
}

fn settings(dir: &Path) -> RouterConfig {
    let exe = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let args = ["relay_role", "--exact", "--nocapture", "--test-threads=1"].map(str::to_owned);
    let relay = [vec![exe], args.to_vec()].concat();
    RouterConfig { relay, ..config(dir) }
}

impl Outside {
    fn new() -> Option<Outside> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let lab = Lab { router: Some(open(dir.path()).unwrap()), dir };
        let of_host = [format!("{HOST}/24"), format!("{ALIAS}/24"), format!("{HOST6}/64 nodad")];
        let of_world = [format!("{WORLD}/24"), format!("{METADATA}/32"), format!("{WORLD6}/64 nodad")];
        let (host, world) = outside(&of_host, &of_world);
        for hop in [WORLD, WORLD6] {
            ip(&host, &format!("route add default via {hop}"));
        }
        let pod = lab.pod("a");
        let outside = Outside { lab, host, world, pod };
        for netns in [&outside.host, &outside.world] {
            serve(netns);
        }
        eventually("the links are up", || {
            let reached = |to: &&str| TcpStream::connect_timeout(&address(to, 80), Duration::from_secs(1)).is_ok();
            in_netns(&outside.host, || WORLDS.iter().all(reached)).unwrap()
        });
        Some(outside)
    }

    fn set(&self, egress: Egress) {
        self.lab.router().set_egress(File::open(&self.host).unwrap().as_fd(), egress).unwrap();
    }

    fn let_out(&self, networks: &[&str]) {
        let router = self.lab.router();
        let leases = router.leases();
        let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
        let mut policies = network::Policies::without_rules(network::Isolation::Private, workloads);
        policies.outside = router.outside();
        let key: Arc<str> = "out".into();
        let block = |text: &&str| Block { network: text.parse().unwrap(), except: Vec::new() };
        let rule = Rule {
            origin: key.clone(),
            action: Action::Allow,
            anyone: false,
            group: None,
            blocks: ranges(&networks.iter().map(block).collect::<Vec<_>>()),
            names: None,
            ports: Vec::new(),
        };
        let otherwise = Otherwise::Refuse;
        let profile = Profile { direction: Direction::Egress, origin: key.clone(), rules: vec![rule], otherwise };
        policies.profiles.insert(key.clone(), profile);
        policies.workloads.values_mut().for_each(|workload| workload.egress = Some(key.clone()));
        router.sync_policies(policies).unwrap();
    }

    /// As root outside would do it: everything may go out, by the relay.
    fn opened() -> Option<Outside> {
        let outside = Outside::new()?;
        outside.set(Egress::User);
        outside.let_out(&["0.0.0.0/0", "::/0"]);
        Some(outside)
    }

    fn connect(&self, address: &str, port: u16) -> std::io::Result<TcpStream> {
        connect(&self.pod, address, port)
    }

    /// Everything of the host that could have been touched.
    fn state(&self) -> BTreeSet<String> {
        let looks: [(&str, &[&str]); 6] = [
            ("cut", &["-d:", "-f1", "/proc/net/dev"]),
            ("ip", &["-o", "address"]),
            ("ip", &["route", "show", "table", "all"]),
            ("ip", &["-6", "route", "show", "table", "all"]),
            ("nft", &["list", "ruleset"]),
            ("sysctl", &["-a", "-r", "^net.(ipv4.conf|ipv4.ip_forward|ipv6.conf|netfilter)"]),
        ];
        let said = looks.iter().flat_map(|(program, args)| {
            let lines = run(&self.host, program, args).1;
            let lines = lines.lines().filter(|line| !line.contains("nf_conntrack_count"));
            lines.map(|line| format!("{program} {args:?}: {line}")).collect::<Vec<_>>()
        });
        said.collect()
    }

    /// The relay's process.
    fn pid(&self) -> Option<u32> {
        let run_dir = self.lab.dir.path().join("run").display().to_string();
        fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line);
            (line.contains("relay_role") && line.contains(&run_dir)).then_some(pid)
        })
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid().unwrap())).unwrap().count()
    }

    fn memory(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid().unwrap())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.lab.router.is_some() {
            let _ = self.lab.router().set_egress(File::open(&self.host).unwrap().as_fd(), Egress::None);
        }
    }
}

fn address(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(text.parse().unwrap(), port)
}

fn connect(pod: &Attachment, to: &str, port: u16) -> std::io::Result<TcpStream> {
    in_netns(&netns(pod), || TcpStream::connect_timeout(&address(to, port), Duration::from_secs(5))).unwrap()
}

/// At 80, tells each client who it seems to be. At 81, gives back what it is sent until the client has said all, and then
/// how much that was. At 82, resets. UDP at 53 gives back what it gets and the client's address.
fn serve(netns: &Path) {
    let listen = |port: u16| in_netns(netns, || TcpListener::bind(address("::", port)).unwrap()).unwrap();
    let peer = |stream: &TcpStream| Some(stream.peer_addr().ok()?.ip().to_canonical().to_string());
    let each = |listener: TcpListener, work: fn(TcpStream, String)| {
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // None: it has gone already.
                let Some(name) = peer(&stream) else { continue };
                std::thread::spawn(move || work(stream, name));
            }
        });
    };
    each(listen(80), |mut stream, peer| {
        let _ = stream.write_all(peer.as_bytes());
    });
    each(listen(81), |mut stream, _| {
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        while let Ok(length) = stream.read(&mut buffer) {
            if length == 0 {
                let _ = stream.write_all(format!("/{total}").as_bytes());
                return;
            }
            total += length;
            if stream.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
    });
    each(listen(82), |mut stream, _| {
        let _ = stream.read(&mut [0; 1]);
        let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    });
    let socket = in_netns(netns, || UdpSocket::bind(address("::", 53)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let mut answer = client.ip().to_canonical().to_string().into_bytes();
            answer.push(b' ');
            answer.extend_from_slice(&buffer[..length]);
            let _ = socket.send_to(&answer, client);
        }
    });
}

fn whole(stream: std::io::Result<TcpStream>) -> std::io::Result<String> {
    let mut text = String::new();
    let mut stream = stream?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn ask(pod: &Attachment, to: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    in_netns(&netns(pod), || {
        let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
        let socket = UdpSocket::bind(address(any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut buffer = vec![0; 64 << 10];
        let mut last = ErrorKind::TimedOut.into();
        // A datagram may be lost.
        for _ in 0..5 {
            match socket.send(question).and_then(|_| socket.recv(&mut buffer)) {
                Ok(length) => return Ok(buffer[..length].to_vec()),
                Err(error) => last = error,
            }
            if !matches!(last.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                break;
            }
        }
        Err(last)
    })
    .unwrap()
}

/// What comes back with the echo.
fn ping(pod: &Attachment, to: &str) -> std::io::Result<Vec<u8>> {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
    in_netns(&netns(pod), || {
        let to = address(to, 0);
        let (family, protocol, kind) = match to.ip() {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128),
        };
        let socket = rustix::net::socket(family, SocketType::DGRAM, Some(protocol))?;
        rustix::net::connect(&socket, &to)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(2)))?;
        let message = [&[kind, 0, 0, 0, 0, 0, 0, 1], &b"are you there?"[..]].concat();
        let mut buffer = [0; 100];
        let mut last = rustix::io::Errno::TIMEDOUT;
        for _ in 0..5 {
            let sent = rustix::net::send(&socket, &message, SendFlags::empty());
            match sent.and_then(|_| rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())) {
                Ok((length, _)) => return Ok(buffer[8..length].to_vec()),
                Err(errno) => last = errno,
            }
            if last != rustix::io::Errno::AGAIN {
                break;
            }
        }
        Err(last.into())
    })
    .unwrap()
}

#[track_caller]
fn same(now: &BTreeSet<String>, then: &BTreeSet<String>) {
    let (new, gone): (Vec<_>, Vec<_>) = (now.difference(then).collect(), then.difference(now).collect());
    assert!(new.is_empty() && gone.is_empty(), "new {new:#?}, gone {gone:#?}");
}

#[track_caller]
fn refused<T>(result: std::io::Result<T>) {
    let Err(error) = result else { panic!("was let through") };
    let kinds = [
        ErrorKind::ConnectionRefused,
        ErrorKind::HostUnreachable,
        ErrorKind::NetworkUnreachable,
        ErrorKind::PermissionDenied,
    ];
    assert!(kinds.contains(&error.kind()), "{error}");
}

#[test]
fn both_families_get_out_and_the_host_is_as_it_was() {
    let Some(outside) = Outside::new() else { return };
    let before = outside.state();
    refused(outside.connect(WORLD, 80));
    outside.set(Egress::User);
    refused(outside.connect(WORLD, 80));
    outside.let_out(&["0.0.0.0/0", "::/0"]);
    assert_eq!(whole(outside.connect(WORLD, 80)).unwrap(), HOST);
    assert_eq!(whole(outside.connect(WORLD6, 80)).unwrap(), HOST6);
    for (to, from) in [(WORLD, HOST), (WORLD6, HOST6)] {
        let answer = ask(&outside.pod, address(to, 53), b"name?").unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("{from} name?"));
    }
    same(&outside.state(), &before);
    outside.set(Egress::None);
    refused(outside.connect(WORLD, 80));
    assert_eq!(outside.pid(), None, "the relay has ended");
    same(&outside.state(), &before);
}

#[test]
fn what_is_inside_cannot_be_reached_through_it() {
    let Some(outside) = Outside::opened() else { return };
    for to in [HOST, ALIAS, METADATA, "127.0.0.1", "169.254.1.3", "100.100.100.200", "224.0.0.1", "255.255.255.255"] {
        refused(outside.connect(to, 80));
    }
    for to in [HOST6, "::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"] {
        assert!(outside.connect(to, 80).is_err(), "{to}");
    }
    for to in [HOST, HOST6] {
        assert!(ask(&outside.pod, address(to, 53), b"?").is_err());
    }
    // An address that the host gets later is its own at once.
    ip(&outside.world, "address add 203.0.113.77/24 dev eth0");
    assert_eq!(whole(outside.connect("203.0.113.77", 80)).unwrap(), HOST);
    ip(&outside.world, "address del 203.0.113.77/24 dev eth0");
    ip(&outside.host, "address add 203.0.113.77/24 dev wan");
    refused(outside.connect("203.0.113.77", 80));
    // The listeners themselves are nobody's to talk to.
    for (to, port) in [("169.254.1.1", 15001), ("10.42.0.1", 15001)] {
        refused(outside.connect(to, port));
    }
}

#[test]
fn refusals_outside_are_refusals_inside() {
    let Some(outside) = Outside::opened() else { return };
    for to in WORLDS {
        let error = outside.connect(to, 9).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
        let error = ask(&outside.pod, address(to, 9), b"?").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
    }
    // Nobody answers there: no connection is accepted only to die.
    run(
        &outside.world,
        "nft",
        &["add table inet t; add chain inet t in { type filter hook input priority 0; }; \
         add rule inet t in tcp dport 84 drop; add rule inet t in tcp dport 85 reject with icmpx admin-prohibited"],
    );
    for to in WORLDS {
        let error = in_netns(&netns(&outside.pod), || {
            TcpStream::connect_timeout(&address(to, 84), Duration::from_millis(1500)).unwrap_err()
        })
        .unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        refused(outside.connect(to, 85));
    }
    ip(&outside.host, "-6 route del default");
    ip(&outside.host, "route del default");
    refused(outside.connect("192.0.2.1", 80));
    refused(outside.connect("2001:db8:1::1", 80));
}

#[test]
fn bytes_arrive_whole_and_each_side_ends_alone() {
    let Some(outside) = Outside::opened() else { return };
    for to in WORLDS {
        let mut stream = outside.connect(to, 81).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut sender = stream.try_clone().unwrap();
        const LENGTH: usize = 96 << 20;
        let byte = |n: usize| (n.wrapping_mul(2_654_435_761) >> 13) as u8;
        let writer = std::thread::spawn(move || {
            let mut at = 0;
            while at < LENGTH {
                let part: Vec<u8> = (at..(at + 100_003).min(LENGTH)).map(byte).collect();
                sender.write_all(&part).unwrap();
                at += part.len();
            }
            // Half closed: what comes back still comes.
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut buffer = vec![0; 256 << 10];
        let mut at = 0;
        while at < LENGTH {
            let length = stream.read(&mut buffer).unwrap();
            assert!(length > 0, "ended at {at}");
            let length = length.min(LENGTH - at);
            assert!(buffer[..length].iter().enumerate().all(|(n, b)| *b == byte(at + n)), "differs after {at}");
            at += length;
            if at == LENGTH {
                break;
            }
        }
        writer.join().unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(format!("/{LENGTH}").ends_with(&rest), "{rest}");
    }
    // Resets pass, both ways.
    let mut stream = outside.connect(WORLD, 82).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let listener = in_netns(&outside.world, || TcpListener::bind(address(WORLD, 83)).unwrap()).unwrap();
    let stream = outside.connect(WORLD, 83).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    assert_eq!(accepted.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Datagrams larger than any link's.
    for to in WORLDS {
        let question: Vec<u8> = (0..9000).map(|n| (n % 253) as u8).collect();
        let answer = ask(&outside.pod, address(to, 53), &question).unwrap();
        assert!(answer.ends_with(&question) && answer.len() > question.len());
    }
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    let Some(outside) = Outside::opened() else { return };
    let burst = |count: usize| {
        in_netns(&netns(&outside.pod), || {
            std::thread::scope(|scope| {
                for lane in 0..4 {
                    scope.spawn(move || {
                        for number in 0..count / 4 {
                            let to = if (number + lane) % 8 == 0 { WORLD6 } else { WORLD };
                            let stream = TcpStream::connect(address(to, 80));
                            assert!(!whole(stream).unwrap().is_empty());
                        }
                    });
                }
            });
        })
        .unwrap();
    };
    let idle = outside.descriptors();
    burst(400);
    let settled = || eventually("all its sockets are closed", || outside.descriptors() <= idle + 2 * 64);
    settled();
    let memory = outside.memory();
    burst(4000);
    settled();
    let now = outside.memory();
    assert!(now <= memory + 2048, "{memory} kB grew to {now} kB");
    // More than one workload may have: refused at once, and all others go on.
    let other = outside.lab.pod("b");
    outside.let_out(&["0.0.0.0/0", "::/0"]);
    let mut held = Vec::new();
    let error = loop {
        match outside.connect(WORLD, 81) {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        assert!(held.len() <= 4096, "no limit");
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error} after {}", held.len());
    assert_eq!(whole(connect(&other, WORLD, 80)).unwrap(), HOST);
    drop(held);
    settled();
}

#[test]
fn it_outlives_the_router_and_comes_back_when_killed() {
    let Some(mut outside) = Outside::opened() else { return };
    let mut held = outside.connect(WORLD, 81).unwrap();
    held.write_all(b"one").unwrap();
    held.read_exact(&mut [0; 3]).unwrap();
    let pid = outside.pid();
    outside.lab.router = None;
    held.write_all(b"two").unwrap();
    held.read_exact(&mut [0; 3]).unwrap();
    // A process that another test starts just now may hold the lock until it runs.
    eventually("the router is there again", || {
        outside.lab.router = open(outside.lab.dir.path()).ok();
        outside.lab.router.is_some()
    });
    outside.set(Egress::User);
    assert_eq!(outside.pid(), pid, "it was found again");
    held.write_all(b"six").unwrap();
    held.read_exact(&mut [0; 3]).unwrap();
    outside.let_out(&["0.0.0.0/0", "::/0"]);
    let sources = BTreeMap::from([(outside.pod.address.into(), ALIAS.parse().unwrap())]);
    outside.lab.router().sync_egress_addresses(&sources).unwrap();
    let seen = || whole(outside.connect(WORLD, 80)).unwrap_or_default();
    eventually("the source is another", || seen() == ALIAS);
    assert!(held.read(&mut [0; 1]).is_err(), "what left with the old one has ended");
    let process = rustix::process::Pid::from_raw(pid.unwrap() as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    eventually("another process", || outside.pid().is_some_and(|new| Some(new) != pid));
    eventually("out again, with the source that was asked for", || seen() == ALIAS);
    outside.lab.router().sync_egress_addresses(&BTreeMap::new()).unwrap();
    eventually("the host's choice again", || seen() == HOST);
}

#[test]
fn a_policy_that_goes_takes_connections_with_it() {
    let Some(outside) = Outside::opened() else { return };
    let listener = in_netns(&outside.world, || TcpListener::bind(address(WORLD, 83)).unwrap()).unwrap();
    let mut stream = outside.connect(WORLD, 83).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    stream.write_all(b"before").unwrap();
    accepted.read_exact(&mut [0; 6]).unwrap();
    outside.let_out(&["192.0.2.0/24"]);
    refused(outside.connect(WORLD, 80));
    stream.write_all(b"after").unwrap();
    accepted.write_all(b"back").unwrap();
    for (stream, name) in [(&mut accepted, "out"), (&mut stream, "in")] {
        stream.set_read_timeout(Some(Duration::from_millis(800))).unwrap();
        let error = stream.read(&mut [0; 8]).unwrap_err();
        let kinds = [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::ConnectionReset];
        assert!(kinds.contains(&error.kind()), "{name}: {error}");
    }
}

#[test]
fn pings_pass_where_the_host_has_them() {
    let Some(outside) = Outside::opened() else { return };
    let allow = |netns: &Path| run(netns, "sysctl", &["-qw", "net.ipv4.ping_group_range=0 2147483647"]);
    allow(&netns(&outside.pod));
    refused(ping(&outside.pod, WORLD));
    allow(&outside.host);
    for to in WORLDS {
        assert_eq!(ping(&outside.pod, to).unwrap(), b"are you there?");
    }
    refused(ping(&outside.pod, HOST));
}

#[test]
fn nat_leads_ipv6_by_it() {
    let Some(mut outside) = Outside::new() else { return };
    // As on a kernel before 6.17.
    outside.lab.router = None;
    let router = Router::open(RouterConfig { force_forwarding: false, ..settings(outside.lab.dir.path()) });
    outside.lab.router = Some(router.unwrap());
    let before = outside.state();
    outside.set(Egress::Nat);
    outside.let_out(&["0.0.0.0/0", "::/0"]);
    let during = outside.state();
    let of_ipv6 = |state: &BTreeSet<String>| -> BTreeSet<String> {
        let of_it = |line: &String| line.contains(": net.ipv6.") || line.contains("\"-6\"");
        let foreign = |line: &&String| of_it(line) && !line.contains("atoll-run");
        state.iter().filter(foreign).cloned().collect()
    };
    same(&of_ipv6(&during), &of_ipv6(&before));
    assert_eq!(whole(outside.connect(WORLD, 80)).unwrap(), HOST);
    assert_eq!(whole(outside.connect(WORLD6, 80)).unwrap(), HOST6);
    let routes = run(&outside.lab.router().netns_path(), "ip", &["route", "get", WORLD]).1;
    assert!(routes.contains("dev uplink"), "{routes}");
    // One way out becomes another, and back.
    outside.set(Egress::User);
    assert_eq!(whole(outside.connect(WORLD, 80)).unwrap(), HOST);
    same(&outside.state(), &before);
    outside.set(Egress::Nat);
    assert_eq!(whole(outside.connect(WORLD, 80)).unwrap(), HOST);
    outside.set(Egress::Routed);
    refused(outside.connect(WORLD6, 80));
    assert_eq!(outside.pid(), None);
    outside.set(Egress::None);
    same(&outside.state(), &before);
}
