//! One workload with raw sockets takes what it can of the router; the others must not notice.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::refused::RefusedLog;
use network::{Attachment, Cause, Limits, Router, in_netns};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use std::net::{Ipv4Addr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::time::Duration;

/// Sends IPv4 packets that it has written itself, whatever their source.
struct Raw(OwnedFd);

fn raw(pod: &Attachment) -> Raw {
    let open = || {
        let kind = SocketType::RAW;
        rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap()
    };
    Raw(in_netns(&netns(pod), open).unwrap())
}

impl Raw {
    fn send(&self, to: Ipv4Addr, packet: &[u8]) {
        while rustix::net::sendto(&self.0, packet, SendFlags::empty(), &SocketAddrV4::new(to, 0)).is_err() {}
    }
}

/// The kernel fills in the length and the checksum. `fragment` is the flags-and-offset word.
fn ip(from: Ipv4Addr, to: Ipv4Addr, id: u16, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

fn datagram(from: u16, to: u16, text: &[u8]) -> Vec<u8> {
    [&[from, to, 8 + text.len() as u16, 0].map(u16::to_be_bytes).concat(), text].concat()
}

fn listen(pod: &Attachment, port: u16) -> UdpSocket {
    let socket = in_netns(&netns(pod), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    socket
}

fn connections_of(router: &Router, source: Ipv4Addr) -> usize {
    let all = router.connections().unwrap();
    all.iter().filter(|entry| entry.original.source == source).count()
}

/// What of this cause the log says that this workload did.
fn told(log: &RefusedLog, cause: Cause, source: Ipv4Addr) -> bool {
    log.since(0).iter().any(|refused| refused.cause == cause && refused.flow.source == source)
}

#[test]
fn a_hundred_thousand_flows_leave_room_for_others() {
    let Some(lab) = lab() else { return };
    let log = RefusedLog::start(lab.router()).unwrap();
    let (offender, accomplice) = (lab.pod("offender"), lab.pod("accomplice"));
    let (server, client) = (lab.pod("server"), lab.pod("client"));
    greet(&server, 80, "server");
    greet(&offender, 80, "offender");
    let before = lab.router().refused_packets().unwrap();
    let flood = raw(&offender);
    let begun = std::time::Instant::now();
    for n in 0..100_000u32 {
        let (from, to) = (1024 + (n % 50_000) as u16, 9 + (n / 50_000) as u16);
        flood.send(accomplice.address, &ip(offender.address, accomplice.address, 1, 0, &datagram(from, to, b"flow")));
    }
    println!("sent after {:?}", begun.elapsed());
    let limit = lab.router().config().limits.connections as usize;
    let open = connections_of(lab.router(), offender.address);
    println!("{open} connections of {limit}");
    assert!(open <= limit, "{open}");
    // Each shard is full: by chance none is far from its share.
    assert!(open > limit * 3 / 4, "{open}");
    let refused = lab.router().refused_packets().unwrap() - before;
    // Some of a flood never come out of the veth pair.
    assert!(refused > 20_000, "{refused}");
    eventually("the refusals are told", || told(&log, Cause::Connections, offender.address));
    for _ in 0..100 {
        assert_eq!(call_from(&client, server.address, 80).unwrap(), format!("server {}", client.address));
    }
    println!("others after {:?}", begun.elapsed());
    // The offender is still reached, and hears that it may not have more.
    assert_eq!(call_from(&client, offender.address, 80).unwrap(), format!("offender {}", client.address));
    let failure = (0..1000).find_map(|_| call_from(&offender, server.address, 80).err());
    assert_eq!(failure.unwrap().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_client_that_closes_what_it_opens_is_not_refused() {
    let Some(mut lab) = lab() else { return };
    // Fewer at once than are made: what is closed must not be counted.
    lab.reopen_with(Limits { connections: 1024, ..Limits::default() });
    let (server, client) = (lab.pod("server"), lab.pod("client"));
    greet(&server, 80, "server");
    let (mut made, mut refused) = (0, 0);
    in_netns(&netns(&client), || {
        while made < 3 * 1024 {
            match call(server.address, 80) {
                Ok(text) => made += usize::from(text.starts_with("server")),
                // More a second than the limit are refused too.
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    })
    .unwrap();
    println!("{made} connections, {refused} refused");
    assert!(refused < made, "{refused} of {made} were refused");
}

#[test]
fn parts_of_packets_are_each_workloads_own() {
    let Some(lab) = lab() else { return };
    let log = RefusedLog::start(lab.router()).unwrap();
    let (offender, victim, other) = (lab.pod("offender"), lab.pod("victim"), lab.pod("other"));
    let ear = listen(&victim, 99);
    let (bad, good) = (raw(&offender), raw(&other));
    let whole = datagram(4000, 99, &[b'x'; 24]);
    let part = |from: Ipv4Addr, id, offset: u16, more: bool, bytes: &[u8]| {
        ip(from, victim.address, id, (offset / 8) | if more { 0x2000 } else { 0 }, bytes)
    };
    // Beginnings without ends, until the router keeps no more of it.
    for id in 0..20_000 {
        bad.send(victim.address, &part(offender.address, id, 0, true, &whole[..16]));
    }
    eventually("the refusals are told", || told(&log, Cause::Fragments, offender.address));
    let mut buffer = [0; 64];
    // 0 would have the kernel choose.
    for id in 1..20 {
        // Another's end in this one's name changes nothing.
        good.send(victim.address, &part(other.address, id, 0, true, &whole[..16]));
        bad.send(victim.address, &part(other.address, id, 16, false, &[b'!'; 16]));
        good.send(victim.address, &part(other.address, id, 16, false, &whole[16..]));
        let read = ear.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..read], [b'x'; 24]);
    }
}

#[test]
fn questions_and_groups_are_refused_by_name() {
    let Some(mut lab) = lab() else { return };
    lab.reopen_with(Limits { questions: 100, ..Limits::default() });
    let log = RefusedLog::start(lab.router()).unwrap();
    let (offender, other) = (lab.pod("offender"), lab.pod("other"));
    let dns = lab.router().config().dns_address;
    let server = lab.router().run(|| UdpSocket::bind((dns, 53)).unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let flood = raw(&offender);
    for n in 0..1000 {
        flood.send(dns, &ip(offender.address, dns, 1, 0, &datagram(1024 + n, 53, b"?")));
    }
    eventually("the refusals are told", || told(&log, Cause::Questions, offender.address));
    assert_eq!(connections_of(lab.router(), offender.address), 0, "a question leaves nothing behind");
    // Another's question comes through, and so does its answer.
    let asks = listen(&other, 5353);
    let mut buffer = [0; 64];
    eventually("the other is heard and answered", || {
        asks.send_to(b"mine", (dns, 53)).unwrap();
        while let Ok((read, from)) = server.recv_from(&mut buffer) {
            if &buffer[..read] == b"mine" {
                server.send_to(b"yours", from).unwrap();
                break;
            }
        }
        rustix::net::recv(&asks, &mut buffer[..], RecvFlags::DONTWAIT)
            .is_ok_and(|(read, _)| &buffer[..read] == b"yours")
            || asks.recv(&mut buffer).is_ok_and(|read| &buffer[..read] == b"yours")
    });
    let speaker = listen(&offender, 5354);
    speaker.set_broadcast(true).unwrap();
    for group in [Ipv4Addr::new(224, 0, 0, 251), Ipv4Addr::BROADCAST] {
        speaker.send_to(b"to all", (group, 5353)).unwrap();
    }
    eventually("what was sent to a group is told", || told(&log, Cause::Groups, offender.address));
}

#[test]
fn a_workload_fills_no_table_of_neighbours() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("offender");
    if pod.address6.is_none() {
        println!("SKIPPED: no IPv6 here");
        return;
    }
    let speaker = in_netns(&netns(&pod), || UdpSocket::bind("[::]:0").unwrap()).unwrap();
    let index = run(&netns(&pod), "cat", &["/sys/class/net/eth0/ifindex"]).1.trim().parse().unwrap_or(2);
    for n in 2..2000u16 {
        let _ = speaker.send_to(b"?", SocketAddrV6::new(format!("fe80::{n:x}").parse().unwrap(), 9, 0, index));
        let _ = speaker.send_to(b"?", format!("[fd00:10:42::ffff:{n:x}]:9"));
    }
    for place in [netns(&pod), lab.router().netns_path()] {
        let (_, neighbours) = run(&place, "ip", &["-6", "neigh", "show", "nud", "all"]);
        let count = neighbours.lines().count();
        assert!(count < 20, "{count} neighbours: {}", &neighbours[..200]);
    }
}
