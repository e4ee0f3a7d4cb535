//! Egress by name, with real packets, an uplink and a resolver outside that may be hostile.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::dns::Views;
use network::dns::answers;
use network::dns::codec::{self, Code, Data, Query, Record, Reply, TYPE_A, TYPE_AAAA};
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Rule};
use network::{
    AttachRequest, Attachment, DnsServer, Egress, Isolation, NameSet, Pattern, Policies, Protocol, in_netns,
};
use rustix::fd::AsFd;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)), 53);
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const TEN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const ELEVEN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
const TWELVE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 12);

/// What a resolver sends back: datagrams, or messages over TCP.
type Script = dyn Fn(&Query, bool) -> Vec<Vec<u8>> + Send + Sync;

/// A host with a link to a world, where web servers and a resolver are.
struct World {
    host: Netns,
    world: Netns,
    script: Arc<Mutex<Arc<Script>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl World {
    fn new() -> World {
        let of_world = [RESOLVER, TEN, ELEVEN, TWELVE].map(|address| format!("{address}/24"));
        let (host, world) = outside(&[format!("{HOST}/24")], &of_world);
        ip(&host, &format!("route add default via {RESOLVER}"));
        let nothing: Arc<Script> = Arc::new(|_, _| Vec::new());
        let world = World { host, world, script: Arc::new(Mutex::new(nothing)), asked: Arc::default() };
        for port in [80, 81] {
            world.serve(port);
        }
        world.resolve();
        world
    }

    /// Holds each connection open until the client ends it, and echoes.
    fn serve(&self, port: u16) {
        let listener = in_netns(&self.world, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
                });
            }
        });
    }

    fn resolve(&self) {
        let (udp, tcp) = in_netns(&self.world, || {
            (UdpSocket::bind((RESOLVER, 53)).unwrap(), TcpListener::bind((RESOLVER, 53)).unwrap())
        })
        .unwrap();
        let (script, asked) = (self.script.clone(), self.asked.clone());
        let answers = move |packet: &[u8], is_udp: bool| {
            let Ok(query) = codec::parse(packet) else { return Vec::new() };
            asked.lock().unwrap().push(query.name.clone().unwrap_or_default());
            let script = script.lock().unwrap().clone();
            script(&query, is_udp)
        };
        let of_tcp = answers.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, client)) = udp.recv_from(&mut buffer) {
                for packet in answers(&buffer[..length], true) {
                    let _ = udp.send_to(&packet, client);
                }
            }
        });
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut packet).unwrap();
                for packet in of_tcp(&packet, false) {
                    let _ = stream.write_all(&(packet.len() as u16).to_be_bytes());
                    let _ = stream.write_all(&packet);
                }
            }
        });
    }

    fn answers(&self, script: impl Fn(&Query, bool) -> Vec<Vec<u8>> + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }
    fn was_asked(&self, name: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|asked| asked == name)
    }
}

/// A well-behaved answer with these records.
fn reply(query: &Query, records: Vec<Record>) -> Vec<u8> {
    codec::write(query, &Reply { answers: records, ..Reply::of(Code::NoError) }, false)
}

fn record(name: Option<&str>, ttl: u32, address: impl Into<IpAddr>) -> Record {
    let data = match address.into() {
        IpAddr::V4(address) => Data::A(address),
        IpAddr::V6(address) => Data::Aaaa(address),
    };
    Record { name: name.map(str::to_owned), ttl, data }
}

fn alias(name: Option<&str>, target: &str) -> Record {
    Record { name: name.map(str::to_owned), ttl: 30, data: Data::Cname(target.into()) }
}

fn plain(name: &'static str, address: Ipv4Addr) -> impl Fn(&Query, bool) -> Vec<Vec<u8>> + Send + Sync {
    move |query, _| match (query.name.as_deref() == Some(name), query.kind) {
        (true, TYPE_A) => vec![reply(query, vec![record(None, 30, address)])],
        (true, _) => vec![reply(query, vec![])],
        (false, _) => vec![codec::write(query, &Reply::of(Code::NameError), false)],
    }
}

/// Lets the workloads of namespace `default` reach these names, at these ports, and nothing else.
fn let_out(lab: &Lab, names: &[&str], ports: &[u16]) -> Policies {
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    policies.outside = lab.router().outside();
    policies.nodes = vec![HOST.into()];
    let key: Arc<str> = format!("names {names:?}").into();
    let patterns: Vec<Pattern> = names.iter().map(|name| name.parse().unwrap()).collect();
    policies.names.insert(key.clone(), NameSet { namespace: "default".into(), patterns });
    let one = |port: &u16| Ports { protocol: Protocol::Tcp, first: *port, last: *port };
    let rule = Rule {
        origin: "by name".into(),
        action: Action::Allow,
        anyone: false,
        group: None,
        blocks: Default::default(),
        names: Some(key),
        ports: ports.iter().map(one).collect(),
    };
    let profile: Arc<str> = format!("out {names:?} {ports:?}").into();
    let made = Profile {
        direction: Direction::Egress,
        origin: profile.clone(),
        rules: vec![rule],
        otherwise: Otherwise::Refuse,
    };
    policies.profiles.insert(profile.clone(), made);
    for workload in policies.workloads.values_mut().filter(|workload| &*workload.namespace == "default") {
        workload.egress = Some(profile.clone());
    }
    lab.router().sync_policies(policies.clone()).unwrap();
    policies
}

fn views(policies: &Policies) -> Views {
    let named = |address: &Ipv4Addr| {
        let sets = policies.names_of(&policies.workloads[address]);
        (*address, sets.into_iter().flat_map(|set| set.patterns.clone()).collect::<Vec<_>>())
    };
    Views {
        namespaces: policies.workloads.iter().map(|(address, own)| (*address, own.namespace.clone())).collect(),
        named: policies.workloads.keys().map(named).collect(),
        ..Views::default()
    }
}

struct Setting {
    server: Option<DnsServer>,
    world: World,
    lab: Lab,
}

fn setting() -> Option<Setting> {
    let lab = lab()?;
    let world = World::new();
    lab.router().set_egress(File::open(&world.host).unwrap().as_fd(), Egress::Nat).unwrap();
    Some(Setting { server: None, world, lab })
}

impl Setting {
    /// Puts the policy in force as the node does: in the kernel first.
    fn allow(&mut self, names: &[&str], ports: &[u16]) {
        let policies = let_out(&self.lab, names, ports);
        let host = File::open(&self.world.host).unwrap();
        let upstream = vec![(RESOLVER, 53).into()];
        let server = self.server.get_or_insert_with(|| {
            DnsServer::start_with(self.lab.router(), DNS, upstream, Some(host.as_fd())).unwrap()
        });
        server.set_views(views(&policies));
    }

    fn held(&self) -> String {
        run(&self.lab.router().netns_path(), "nft", &["list", "ruleset"]).1
    }
}

/// The response code and addresses that a pod gets.
fn ask(pod: &Attachment, name: &str, kind: u16) -> (u8, Vec<(IpAddr, u32)>) {
    let packet = ask_raw(pod, name, kind);
    (packet[3] & 15, answers::resolved(&packet, &name.to_lowercase()).unwrap())
}

fn ask_raw(pod: &Attachment, name: &str, kind: u16) -> Vec<u8> {
    in_netns(&netns(pod), || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = vec![0; 64 << 10];
        // A link that has just come up may lose its first packet.
        for _ in 0..5 {
            socket.send_to(&codec::question(7, name, kind, Some(1232)), DNS).unwrap();
            if let Ok((length, _)) = socket.recv_from(&mut buffer) {
                return buffer[..length].to_vec();
            }
        }
        panic!("no answer for {name}");
    })
    .unwrap()
}

fn ask_tcp(pod: &Attachment, name: &str) -> (u8, Vec<(IpAddr, u32)>) {
    in_netns(&netns(pod), || {
        let mut stream = TcpStream::connect(DNS).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let question = codec::question(1, name, TYPE_A, None);
        stream.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut packet).unwrap();
        (packet[3] & 15, answers::resolved(&packet, name).unwrap())
    })
    .unwrap()
}

fn connect(pod: &Attachment, address: Ipv4Addr, port: u16) -> std::io::Result<TcpStream> {
    in_netns(&netns(pod), || TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(5))).unwrap()
}

#[track_caller]
fn echoes(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_name_opens_its_addresses_and_nothing_else() {
    let Some(mut s) = setting() else { return };
    let (pod, neighbour) = (s.lab.pod("a"), s.lab.pod("b"));
    let other = s.lab.attach(&AttachRequest { namespace: "other".into(), ..request("c") });
    s.allow(&["api.example.org", "*.wild.example"], &[80]);
    s.world.answers(plain("api.example.org", TEN));
    assert!(connect(&pod, TEN, 80).is_err(), "before anyone has asked");
    assert_eq!(ask(&pod, "API.example.org", TYPE_A), (0, vec![(TEN.into(), 30)]));
    // In the kernel before the answer was here; for all that the policy selects.
    echoes(&mut connect(&pod, TEN, 80).unwrap());
    echoes(&mut connect(&neighbour, TEN, 80).unwrap());
    assert!(connect(&pod, TEN, 81).is_err(), "another port");
    assert!(connect(&pod, ELEVEN, 80).is_err(), "another address");
    assert!(connect(&other, TEN, 80).is_err(), "another namespace");
    assert_eq!(ask(&other, "api.example.org", TYPE_A).0, 3, "does not exist for others");
    // Other names do not exist, and nobody outside hears of them.
    for name in ["secret.evil.example", "wild.example", "x.api.example.org"] {
        assert_eq!(ask(&pod, name, TYPE_A).0, 3, "{name}");
        assert!(!s.world.was_asked(name), "{name}");
    }
    s.world.answers(plain("a.b.wild.example", ELEVEN));
    assert_eq!(ask(&pod, "a.b.wild.example", TYPE_A).0, 0);
    let mut open = connect(&pod, ELEVEN, 80).unwrap();
    // Another policy over the same name keeps what was answered before; one without it ends what it opened.
    s.allow(&["*.wild.example"], &[80, 81]);
    echoes(&mut open);
    echoes(&mut connect(&pod, ELEVEN, 81).unwrap());
    assert!(connect(&pod, TEN, 80).is_err());
    s.allow(&["api.example.org"], &[]);
    open.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(open.write_all(b"x").and_then(|()| open.read_exact(&mut [0])).is_err(), "the connection has ended");
}

#[test]
fn aliases_count_as_answered_and_other_names_do_not() {
    let Some(mut s) = setting() else { return };
    let pod = s.lab.pod("a");
    s.allow(&["www.example.org"], &[]);
    s.world.answers(|query, _| {
        let records = vec![
            record(Some("other.example.org"), 30, ELEVEN),
            record(Some("cdn.example.net"), 900, TEN),
            alias(Some("edge.example.net"), "cdn.example.net"),
            alias(None, "edge.example.net"),
            alias(Some("cdn.example.org"), "loop.example.org"),
        ];
        vec![reply(query, records)]
    });
    assert_eq!(ask(&pod, "www.example.org", TYPE_A), (0, vec![(TEN.into(), 30)]));
    echoes(&mut connect(&pod, TEN, 80).unwrap());
    assert!(connect(&pod, ELEVEN, 80).is_err(), "of a name that was not asked for");
    // A name at the end of a chain is not allowed by being there.
    assert_eq!(ask(&pod, "cdn.example.net", TYPE_A).0, 3);
    // Circles lead nowhere.
    s.world.answers(|query, _| {
        let circle = vec![
            alias(None, "a.example"),
            alias(Some("a.example"), "www.example.org"),
            record(Some("b.example"), 30, TWELVE),
        ];
        vec![reply(query, circle)]
    });
    ask(&pod, "www.example.org", TYPE_A);
    assert!(connect(&pod, TWELVE, 80).is_err());
}

#[test]
fn a_hostile_resolver_opens_nothing_inside() {
    let Some(mut s) = setting() else { return };
    let (pod, neighbour) = (s.lab.pod("a"), s.lab.attach(&AttachRequest { namespace: "other".into(), ..request("b") }));
    greet(&neighbour, 80, "neighbour");
    s.allow(&["*.example.org"], &[]);
    let inside: [IpAddr; 13] = [
        neighbour.address.into(),
        Ipv4Addr::new(10, 43, 0, 10).into(),
        Ipv4Addr::LOCALHOST.into(),
        Ipv4Addr::new(169, 254, 169, 254).into(),
        Ipv4Addr::new(169, 254, 1, 1).into(),
        Ipv4Addr::UNSPECIFIED.into(),
        "::1".parse().unwrap(),
        "fe80::1".parse().unwrap(),
        "fd00:10:42::2".parse().unwrap(),
        "fd00:ec2::254".parse().unwrap(),
        "::ffff:10.42.0.2".parse().unwrap(),
        "fd00:10:43::a".parse().unwrap(),
        "::".parse().unwrap(),
    ];
    for address in inside {
        s.world.answers(move |query, _| vec![reply(query, vec![record(None, 30, TEN), record(None, 30, address)])]);
        let kind = if address.is_ipv4() { TYPE_A } else { TYPE_AAAA };
        assert_eq!(ask(&pod, "rebind.example.org", kind), (3, vec![]), "{address}: the whole answer is refused");
    }
    assert!(connect(&pod, TEN, 80).is_err(), "not even the good part of such an answer counts");
    assert!(connect(&pod, neighbour.address, 80).is_err());
    // Answers that are passed on, but open nothing: nodes and groups.
    for address in [HOST, Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::BROADCAST] {
        s.world.answers(move |query, _| vec![reply(query, vec![record(None, 30, address)])]);
        ask(&pod, "odd.example.org", TYPE_A);
        assert!(!s.held().contains(&format!("{address} timeout")), "{address}");
    }
    // Wrong ids, other questions, questions instead of answers, loops, garbage; then the true answer.
    s.world.answers(|query, _| {
        let good = reply(query, vec![record(None, 30, TWELVE)]);
        let bad = reply(query, vec![record(None, 30, ELEVEN)]);
        let mut wrong_id = bad.clone();
        wrong_id[1] ^= 1;
        let mut wrong_name = bad.clone();
        wrong_name[13] ^= 1;
        let mut no_answer = bad.clone();
        no_answer[2] &= 0x7f;
        vec![wrong_id, wrong_name, no_answer, vec![], vec![0xff; 12], good]
    });
    assert_eq!(ask(&pod, "a.example.org", TYPE_A), (0, vec![(TWELVE.into(), 30)]));
    echoes(&mut connect(&pod, TWELVE, 80).unwrap());
    assert!(connect(&pod, ELEVEN, 80).is_err());
    // Names that point at themselves and at each other, and records cut short: refused, and the next question is answered.
    for tail in
        [&[0xc0, 40][..], &[0xc0, 0xff, 0, 1], &[1, b'a', 0xc0, 41], &[63], &[0, 0, 1, 0, 1, 0, 0, 0, 9, 0xff, 0xff]]
    {
        let tail = tail.to_vec();
        s.world.answers(move |query, _| {
            let mut packet = reply(query, vec![]);
            packet[7] = 1;
            let end = 12 + query.question.len();
            packet.truncate(end);
            packet.extend(&tail);
            vec![packet]
        });
        assert_eq!(ask(&pod, "loop.example.org", TYPE_A).1, vec![]);
    }
    s.world.answers(plain("fine.example.org", TEN));
    assert_eq!(ask(&pod, "fine.example.org", TYPE_A).0, 0);
}

#[test]
fn large_answers_and_long_lives_have_limits() {
    let Some(mut s) = setting() else { return };
    let pod = s.lab.pod("a");
    s.allow(&["*.example.org"], &[]);
    s.world
        .answers(|query, _| vec![reply(query, vec![record(None, u32::MAX >> 1, TEN), record(None, u32::MAX, ELEVEN)])]);
    let (_, answers) = ask(&pod, "long.example.org", TYPE_A);
    assert!(answers.iter().all(|(_, ttl)| *ttl <= 24 * 3600), "{answers:?}");
    assert!(s.held().contains(&format!("{TEN} timeout 1d1m")), "{}", s.held());
    // Cut short over UDP: the whole comes over TCP, and the client is sent there in turn.
    let many = |count: u32, first: u32| {
        move |query: &Query, udp: bool| {
            let records = (0..count).map(|n| record(None, 30, Ipv4Addr::from_bits(first + n))).collect();
            let mut packet = reply(query, records);
            if udp {
                packet.truncate(12 + query.question.len());
                packet[2] |= 2;
                packet[6..12].fill(0);
            }
            vec![packet]
        }
    };
    s.world.answers(many(2000, 0xc612_0000));
    let cut = ask_raw(&pod, "many.example.org", TYPE_A);
    assert!(answers::is_truncated(&cut) && cut.len() < 512);
    assert_eq!(ask_tcp(&pod, "many.example.org").1.len(), 2000);
    // A namespace that asks for ever more addresses keeps a bounded number, and the newest.
    for turn in 0..4 {
        s.world.answers(many(1000, 0xc613_0000 + turn * 1000));
        ask_raw(&pod, &format!("n{turn}.example.org"), TYPE_A);
    }
    s.world.answers(plain("last.example.org", TWELVE));
    ask(&pod, "last.example.org", TYPE_A);
    echoes(&mut connect(&pod, TWELVE, 80).unwrap());
    assert!(s.lab.router().by_name().count().values().all(|count| *count <= 4096));
    // Elements have the name as their comment; comments of rules name the pattern.
    let listed = s.held();
    let held = listed.matches(".example.org\"").count() - listed.matches("*.example.org\"").count();
    assert!((1000..=1024).contains(&held), "{held}");
    // IPv6 answers are held for IPv6.
    let six: IpAddr = "2001:db8::7".parse().unwrap();
    s.world.answers(move |query, _| vec![reply(query, vec![record(None, 30, six)])]);
    ask(&pod, "six.example.org", TYPE_AAAA);
    assert!(s.held().contains("2001:db8::7 timeout"));
}

#[test]
fn pins_end_unless_they_are_used_and_outlive_the_process() {
    let Some(mut s) = setting() else { return };
    let pod = s.lab.pod("a");
    s.allow(&["*.example.org"], &[]);
    for (name, address) in [("used.example.org", TEN), ("idle.example.org", ELEVEN)] {
        s.world.answers(plain(name, address));
        ask(&pod, name, TYPE_A);
    }
    let mut open = connect(&pod, TEN, 80).unwrap();
    echoes(&mut open);
    let names = s.lab.router().by_name().clone();
    names.end(Instant::now() + Duration::from_secs(30)).unwrap();
    assert_eq!(names.count().values().sum::<usize>(), 2, "not yet");
    names.end(Instant::now() + Duration::from_secs(61)).unwrap();
    assert!(connect(&pod, ELEVEN, 80).is_err(), "nobody uses it");
    echoes(&mut connect(&pod, TEN, 80).unwrap());
    drop(names);
    // The process goes: what is open stays open, what is pinned is found again, and nothing else.
    s.server = None;
    s.lab.reopen();
    echoes(&mut open);
    echoes(&mut connect(&pod, TEN, 80).unwrap());
    s.lab.router().set_egress(File::open(&s.world.host).unwrap().as_fd(), Egress::Nat).unwrap();
    s.allow(&["*.example.org", "more.example.net"], &[]);
    echoes(&mut open);
    echoes(&mut connect(&pod, TEN, 80).unwrap());
    assert!(connect(&pod, ELEVEN, 80).is_err());
    assert_eq!(s.held().matches("set names/").count(), 2, "one for each family");
    s.allow(&["more.example.net"], &[]);
    assert!(connect(&pod, TEN, 80).is_err(), "the policy no longer names it");
}

#[test]
fn slow_names_hold_up_nobody_else() {
    let Some(mut s) = setting() else { return };
    let (greedy, modest) = (s.lab.pod("a"), s.lab.pod("b"));
    s.allow(&["*.slow.example", "fast.example.org"], &[]);
    s.world.answers(|query, udp| match query.name.as_deref() {
        Some("fast.example.org") => plain("fast.example.org", TEN)(query, udp),
        _ => Vec::new(),
    });
    let _held = in_netns(&netns(&greedy), || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for n in 0..1000u16 {
            socket.send_to(&codec::question(n, &format!("n{n}.slow.example"), TYPE_A, None), DNS).unwrap();
        }
        // More than its share is refused at once.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut buffer = [0; 512];
        socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[3] & 15, Code::ServerFailure as u8);
        // Connections too: it may hold some, and others still get one.
        (0..100).map(|_| TcpStream::connect(DNS).unwrap()).collect::<Vec<_>>()
    })
    .unwrap();
    let waiting = s.world.asked.lock().unwrap().iter().filter(|name| name.ends_with("slow.example")).count();
    assert!((1..=128).contains(&waiting), "{waiting} questions of one client were passed on");
    assert_eq!(ask(&modest, "fast.example.org", TYPE_A), (0, vec![(TEN.into(), 30)]));
    let (code, _) = ask_tcp(&modest, "cluster.local");
    assert_eq!(code, 0);
}
