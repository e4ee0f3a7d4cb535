//! The short way between workloads: that it is taken, and that it carries nothing that the firewall would refuse, hides
//! nothing from those who look, and ends when what was allowed no longer is.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::{Attachment, Bandwidth, Isolation, Limits, Policies, Protocol, in_netns};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 80);
const TURNS: u64 = 300;

struct Talk {
    near: TcpStream,
    far: TcpStream,
    turn: u8,
}

impl Talk {
    /// From `client`, by the address `to`, to a server at `server`.
    fn new(client: &Attachment, server: &Attachment, to: IpAddr) -> Talk {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let listener = in_netns(&netns(server), || TcpListener::bind((any, 0)).unwrap()).unwrap();
        let port = if to == IpAddr::V4(CLUSTER_IP) { 80 } else { listener.local_addr().unwrap().port() };
        Talk::with(client, &listener, (to, port).into())
    }
    fn with(client: &Attachment, listener: &TcpListener, to: SocketAddr) -> Talk {
        let near = in_netns(&netns(client), || TcpStream::connect(to).unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        Talk { near, far, turn: 0 }
    }
    /// A question and its answer, both of many segments, arrive whole.
    fn turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        let said: Vec<u8> = (0..4000u32).map(|n| (n as u8).wrapping_mul(self.turn)).collect();
        let say = |from: &mut TcpStream, to: &mut TcpStream| {
            from.write_all(&said).unwrap();
            let mut heard = vec![0; said.len()];
            to.read_exact(&mut heard).unwrap();
            assert!(heard == said);
        };
        say(&mut self.near, &mut self.far);
        say(&mut self.far, &mut self.near);
    }
    fn turns(&mut self) {
        (0..TURNS).for_each(|_| self.turn());
    }
    /// Whether what the client says still comes.
    fn goes_on(&mut self) -> bool {
        self.near.write_all(b"ping").unwrap();
        self.far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        self.far.read_exact(&mut [0; 4]).is_ok()
    }
}

fn quick() -> Option<Lab> {
    let lab = lab()?;
    if !lab.router().has_short_way() {
        println!("SKIPPED: this kernel takes no programs for links");
        return None;
    }
    Some(lab)
}

fn address6(attachment: &Attachment) -> Ipv6Addr {
    attachment.address6.unwrap()
}

/// Packets that have gone to the workload: as its link's end in the router counted, and in all.
fn packets_to(lab: &Lab, to: &Attachment) -> (u64, u64) {
    let link = format!("veth{:08x}", to.address.to_bits());
    let (fine, text) = run(&lab.router().netns_path(), "ip", &["-j", "-s", "link", "show", &link]);
    assert!(fine, "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let counted = json[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
    let all = lab.router().link_counters().unwrap();
    let own = all.iter().find(|(address, _)| *address == to.address).unwrap().1;
    (counted, own.sent_packets)
}

#[test]
fn flows_take_the_short_way() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let listener = in_netns(&netns(&server), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let rule = service(CLUSTER_IP, Protocol::Tcp, 80, &[(server.address, port)]);
    lab.router().sync_services(&[rule]).unwrap();
    let through = Talk::with(&client, &listener, (CLUSTER_IP, 80).into());
    let mut talks = vec![Talk::new(&client, &server, server.address.into()), through];
    if lab.router().has_ipv6() {
        talks.push(Talk::new(&client, &server, address6(&server).into()));
    }
    for mut talk in talks {
        let before = packets_to(&lab, &server);
        talk.turns();
        let after = packets_to(&lab, &server);
        let (long, all) = (after.0 - before.0, after.1 - before.1);
        assert!(all >= TURNS && long * 4 < all, "{long} of {all} packets took the long way");
        drop(talk.near);
        assert_eq!(talk.far.read(&mut [0; 4]).unwrap(), 0, "the end comes too");
    }
}

#[test]
fn datagrams_are_translated_there_and_back() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    greet_udp(&server, 9000, "server");
    let rule = service(CLUSTER_IP, Protocol::Udp, 53, &[(server.address, 9000)]);
    lab.router().sync_services(&[rule]).unwrap();
    let socket = in_netns(&netns(&client), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    socket.connect((CLUSTER_IP, 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let ask = || socket.send(b"who?").is_ok() && socket.recv(&mut [0; 64]).is_ok_and(|length| length == 6);
    eventually("the first answer comes", ask);
    let before = packets_to(&lab, &server);
    for _ in 0..TURNS {
        eventually("an answer comes", ask);
    }
    let after = packets_to(&lab, &server);
    assert!((after.0 - before.0) * 4 < after.1 - before.1, "{before:?} {after:?}");
}

#[test]
fn a_flow_ends_when_it_is_no_longer_allowed() {
    let Some(lab) = quick() else { return };
    let (client, friend, server) = (lab.pod("client"), lab.pod("friend"), lab.pod("server"));
    let talk = |from| Talk::new(from, &server, server.address.into());
    let (mut cut, mut kept) = (talk(&client), talk(&friend));
    cut.turns();
    kept.turns();
    let policies = Policies::without_rules(
        Isolation::Private,
        [
            (friend.address, "default", "friend"),
            (server.address, "default", "server"),
            (client.address, "other", "client"),
        ],
    );
    assert_eq!(lab.router().sync_policies(policies).unwrap().ended, 1);
    assert!(!cut.goes_on());
    cut.far.write_all(b"pong").unwrap();
    cut.near.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(cut.near.read_exact(&mut [0; 4]).is_err());
    kept.turns();
}

#[test]
fn a_workload_that_is_gone_gets_nothing() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let mut talk = Talk::new(&client, &server, server.address.into());
    talk.turns();
    lab.router().detach("server").unwrap();
    assert!(!talk.goes_on());
}

#[test]
fn who_looks_sees_all() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    lab.router().connections().unwrap();
    let mut talk = Talk::new(&client, &server, server.address.into());
    lab.router().connections().unwrap();
    talk.turns();
    let all = lab.router().connections().unwrap();
    let port = talk.near.local_addr().unwrap().port();
    let own = all.iter().find(|entry| entry.original.source_port == port).unwrap();
    assert!(own.counted[0].0 >= TURNS, "{own:?}");

    let mut capture = lab.router().capture(server.address).unwrap();
    for _ in 0..20 {
        talk.turn();
    }
    let mut to_server = 0;
    while let Some(frame) = capture.next(Duration::from_millis(100)).unwrap() {
        to_server += usize::from(frame.bytes.get(30..34) == Some(&server.address.octets()));
    }
    assert!(to_server >= 20, "{to_server} frames were seen");
}

#[test]
fn a_limit_holds_for_what_flows_already() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let mut talk = Talk::new(&client, &server, server.address.into());
    talk.turns();
    let limit = Bandwidth { ingress: Some(1_000_000_000), egress: None };
    lab.router().set_bandwidth("server", limit).unwrap();
    let before = packets_to(&lab, &server);
    talk.turns();
    let after = packets_to(&lab, &server);
    assert_eq!(after.0 - before.0, after.1 - before.1, "all pass by the link's queue");
    lab.router().set_bandwidth("server", Bandwidth::default()).unwrap();
    let before = packets_to(&lab, &server);
    talk.turns();
    let after = packets_to(&lab, &server);
    assert!((after.0 - before.0) * 4 < after.1 - before.1, "{before:?} {after:?}");
}

#[test]
fn an_idle_connection_goes_on() {
    let Some(lab) = quick() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let mut talk = Talk::new(&client, &server, server.address.into());
    talk.turns();
    let port = talk.near.local_addr().unwrap().port();
    let (fine, all) = run(&lab.router().netns_path(), "cat", &["/proc/net/nf_conntrack"]);
    if !fine {
        return println!("SKIPPED: this kernel does not show its connections in /proc");
    }
    let own = all.lines().find(|line| line.contains(&format!("sport={port} "))).unwrap();
    // Whatever the tracker saw last, it remembers the connection for a day.
    let seconds: u32 = own.split_whitespace().nth(4).unwrap().parse().unwrap();
    assert!(own.contains("ESTABLISHED") && seconds > 80_000, "{own}");
    talk.turns();
}

/// Clients that say all they have to say first, then listen: what the kernel knows of their connections is gone with them.
#[test]
fn connections_that_have_ended_are_not_counted() {
    let Some(mut lab) = quick() else { return };
    const MOST: u32 = 256;
    lab.reopen_with(Limits { connections: MOST, ..Limits::default() });
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let listener = in_netns(&netns(&server), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    let to = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut said = Vec::new();
            if stream.read_to_end(&mut said).is_ok() {
                let _ = stream.write_all(&said);
            }
        }
    });
    let server = server.address;
    in_netns(&netns(&client), || {
        for n in 0..2 * MOST {
            let mut stream = TcpStream::connect((server, to)).unwrap_or_else(|error| panic!("connection {n}: {error}"));
            let said = [n as u8; 3000];
            stream.write_all(&said).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            assert!(heard == said);
            // Fewer in a second than it may open.
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .unwrap();
}
