//! The DNS server through real clients inside a workload's namespace.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::dns::{EndpointRecord, Outside, PortRecord, ServiceKind, ServiceRecord, Views, answers, codec};
use network::{DnsServer, Protocol, Records, in_netns};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const DNS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)), 53);

fn records() -> Records {
    let endpoints = |count: u8| {
        (0..count)
            .map(|n| EndpointRecord { address: Ipv4Addr::new(10, 42, 3, n).into(), hostname: Some(format!("db-{n}")) })
            .collect()
    };
    let service = |name: &str, kind| ServiceRecord {
        namespace: "shop".into(),
        name: name.into(),
        kind,
        ports: vec![PortRecord { name: Some("http".into()), protocol: Protocol::Tcp, port: 80 }],
    };
    Records {
        services: vec![
            service(
                "web",
                ServiceKind::ClusterIp(vec![Ipv4Addr::new(10, 43, 0, 5).into(), "fd00:10:43::5".parse().unwrap()]),
            ),
            service("db", ServiceKind::Headless(endpoints(3))),
            service("many", ServiceKind::Headless(endpoints(120))),
        ],
    }
}

#[test]
fn the_c_library_resolves_names() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("a");
    let server = DnsServer::start(lab.router(), DNS, vec![]).unwrap();
    server.set(&records());
    server.set_views(Views::open());
    let resolv = lab.dir.path().join("resolv.conf");
    std::fs::write(
        &resolv,
        "search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n",
    )
    .unwrap();
    let resolve = |command: &str| {
        let script = format!("mount --bind {} /etc/resolv.conf && {command}", resolv.display());
        run(&netns(&pod), "unshare", &["--mount", "--propagation", "private", "sh", "-c", &script])
    };
    for (name, wanted) in [("web", "10.43.0.5"), ("web.shop", "10.43.0.5"), ("db-1.db", "10.42.3.1")] {
        let (ok, text) = resolve(&format!("getent ahostsv4 {name}"));
        assert!(ok && text.contains(wanted), "{name}: {text}");
    }
    let (ok, text) = resolve("getent ahostsv6 web");
    assert!(ok && text.contains("fd00:10:43::5"), "{text}");
    // The same questions by IPv6.
    let v4 = std::fs::read_to_string(&resolv).unwrap();
    std::fs::write(&resolv, v4.replace("10.43.0.10", "fd00:10:43::a")).unwrap();
    let (ok, text) = resolve("getent ahostsv6 web && getent ahostsv4 db-1.db && getent hosts fd00:10:43::5");
    assert!(ok && ["fd00:10:43::5", "10.42.3.1", "web.shop."].iter().all(|part| text.contains(part)), "{text}");
    let (ok, text) = resolve("getent -i ahostsv4 many | wc -l");
    assert!(ok && text.trim().parse::<u32>().unwrap_or(0) >= 120, "over TCP: {text}");
    std::fs::write(&resolv, v4).unwrap();
    let (_, text) = resolve("getent hosts 10.43.0.5");
    assert!(text.contains("web.shop.svc.cluster.local"), "{text}");
    // Too large for UDP: the C library comes again over TCP.
    let (_, text) = resolve("getent ahostsv4 many | wc -l");
    assert!(text.trim().parse::<u32>().unwrap_or(0) >= 120, "{text}");
    let start = Instant::now();
    let (ok, text) = resolve("getent ahosts www.example.org");
    assert!(!ok, "{text}");
    assert!(start.elapsed() < Duration::from_secs(4), "a name that is not there must not be waited for");
    // The records change, the server stays.
    server.set(&Records::default());
    assert!(!resolve("getent ahostsv4 web").0);
    drop(server);
    DnsServer::start(lab.router(), DNS, vec![]).unwrap();
}

#[test]
fn others_names_are_forwarded_where_allowed() {
    let Some(lab) = lab() else { return };
    let (pod, upstream) = (lab.pod("a"), lab.pod("upstream"));
    let socket = in_netns(&netns(&upstream), || UdpSocket::bind((upstream.address, 53)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let query = codec::parse(&buffer[..length]).unwrap();
            let mut reply = codec::Reply::of(codec::Code::NoError);
            let data = codec::Data::A(Ipv4Addr::new(192, 0, 2, 99));
            reply.answers.push(codec::Record { name: None, ttl: 60, data });
            let _ = socket.send_to(&codec::write(&query, &reply, true), client);
        }
    });
    let server = DnsServer::start(lab.router(), DNS, vec![(upstream.address, 53).into()]).unwrap();
    server.set(&records());
    server.set_views(Views::open());
    let answer =
        in_netns(&netns(&pod), || ask_udp(&codec::question(77, "www.example.org", codec::TYPE_A, None))).unwrap();
    assert!(answer[..2] == [0, 77] && answer.ends_with(&[192, 0, 2, 99]));
    // Who is not let out learns nothing, and tells nothing, by asking for names.
    let closed = Views { outside: Outside::These([upstream.address].into()), ..Views::open() };
    server.set_views(closed);
    let question = codec::question(78, "secret.example.org", codec::TYPE_A, None);
    let answer = in_netns(&netns(&pod), || ask_udp(&question)).unwrap();
    assert_eq!(answer[3] & 15, 3, "does not exist");
}

#[test]
fn tcp_and_hostile_packets() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("a");
    let server = DnsServer::start(lab.router(), DNS, vec![]).unwrap();
    server.set(&records());
    server.set_views(Views::open());
    in_netns(&netns(&pod), || {
        // Two questions on one connection.
        let mut stream = TcpStream::connect(DNS).unwrap();
        for id in [1u16, 2] {
            let question = codec::question(id, "many.shop.svc.cluster.local", codec::TYPE_A, None);
            stream.write_all(&(question.len() as u16).to_be_bytes()).unwrap();
            stream.write_all(&question).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!((answer[1], answer[7]), (id as u8, 120));
        }
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for length in 0..200 {
            socket.send_to(&vec![length as u8; length], DNS).unwrap();
        }
        let answer = ask_udp(&codec::question(9, "WEB.shop.svc.cluster.local", codec::TYPE_A, Some(1232)));
        assert!(answer.windows(4).any(|window| window == [10, 43, 0, 5]));
    })
    .unwrap();
}

fn ask_udp(question: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 2048];
    // A link that has just come up may lose its first packet.
    for _ in 0..5 {
        socket.send_to(question, DNS).unwrap();
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            assert_eq!(from, DNS);
            return buffer[..length].to_vec();
        }
    }
    panic!("no answer");
}

#[test]
fn a_thousand_questions() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("a");
    let server = DnsServer::start(lab.router(), DNS, vec![]).unwrap();
    server.set(&records());
    server.set_views(Views::open());
    let took = in_netns(&netns(&pod), || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.connect(DNS).unwrap();
        let question = codec::question(9, "web.shop.svc.cluster.local", codec::TYPE_A, Some(1232));
        // A link that has just come up may lose its first packet.
        socket.send(&question).unwrap();
        while socket.recv(&mut [0; 512]).is_err() {
            socket.send(&question).unwrap();
        }
        let start = Instant::now();
        for _ in 0..1000 {
            socket.send(&question).unwrap();
            socket.recv(&mut [0; 512]).unwrap();
        }
        start.elapsed()
    })
    .unwrap();
    println!("1000 questions one after another in {took:?}");
}

#[test]
fn ten_thousand_endpoints() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("a");
    let server = DnsServer::start(lab.router(), DNS, vec![]).unwrap();
    let endpoint = |n: u32| EndpointRecord {
        address: Ipv4Addr::from_bits(0x0a2a_0100 + n).into(),
        hostname: Some(format!("host-{n}")),
    };
    let ports = vec![PortRecord { name: Some("pg".into()), protocol: Protocol::Tcp, port: 5432 }];
    let kind = ServiceKind::Headless((0..10_000).map(endpoint).collect());
    let huge = ServiceRecord { namespace: "shop".into(), name: "huge".into(), kind, ports };
    let mut all = records();
    all.services.push(huge);
    server.set(&all);
    server.set_views(Views::open());
    in_netns(&netns(&pod), || {
        let tcp = |name: &str, kind: u16| {
            let mut stream = TcpStream::connect(DNS).unwrap();
            let question = codec::question(1, name, kind, Some(1232));
            stream.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat()).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut answer).unwrap();
            answer
        };
        let name = "huge.shop.svc.cluster.local";
        let cut = ask_udp(&codec::question(1, name, codec::TYPE_A, Some(1232)));
        assert!(answers::is_truncated(&cut) && cut.len() < 200);
        let (first, second) = (tcp(name, codec::TYPE_A), tcp(name, codec::TYPE_A));
        for whole in [&first, &second] {
            assert!(!answers::is_truncated(whole), "nothing would come after TCP");
            assert!(answers::resolved(whole, name).unwrap().len() > 4000);
        }
        assert_ne!(first, second, "others each time");
        let srv = tcp("_pg._tcp.huge.shop.svc.cluster.local", codec::TYPE_SRV);
        assert!(u16::from_be_bytes([srv[6], srv[7]]) > 500);
        let one = ask_udp(&codec::question(1, "host-9999.huge.shop.svc.cluster.local", codec::TYPE_A, None));
        assert_eq!(answers::resolved(&one, "host-9999.huge.shop.svc.cluster.local").unwrap().len(), 1);
        let web = ask_udp(&codec::question(1, "web.shop.svc.cluster.local", codec::TYPE_A, None));
        assert_eq!(web[3] & 15, 0);
        // A version of EDNS that nobody has.
        let mut future = codec::question(1, "web.shop.svc.cluster.local", codec::TYPE_A, Some(1232));
        let at = future.len() - 5;
        future[at] = 1;
        let told = ask_udp(&future);
        assert_eq!(told[told.len() - 6], 1, "bad version");
    })
    .unwrap();
}

#[test]
fn absence_says_for_how_long() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("a");
    let server = DnsServer::start(lab.router(), DNS, vec![]).unwrap();
    server.set(&records());
    server.set_views(Views::open());
    in_netns(&netns(&pod), || {
        for (name, kind, code) in [
            ("nothing.shop.svc.cluster.local", codec::TYPE_A, 3),
            ("web.shop.svc.cluster.local", codec::TYPE_SRV, 0),
            ("9.9.42.10.in-addr.arpa", codec::TYPE_PTR, 3),
        ] {
            let answer = ask_udp(&codec::question(1, name, kind, None));
            assert_eq!((answer[3] & 15, answer[7], answer[9]), (code, 0, 1), "{name}");
            // RFC 2308: the smaller of the SOA record's TTL and its last field, both here.
            assert!(answer.ends_with(&5u32.to_be_bytes()), "{name}");
        }
    })
    .unwrap();
}
