//! What `attacks.rs` tries with IPv4, with IPv6: a machine with root inside writes frames to its own tap device. None of
//! it may reach a neighbour, the router's tables or the node.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::dns::Views;
use network::{AttachRequest, Attachment, DnsServer, Isolation, LinkKind, Protocol, in_netns};
use rustix::fd::OwnedFd;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const ROUTER_MAC: [u8; 6] = [0x0a, 0x58, 169, 254, 1, 1];
const UDP: u8 = 17;
const ICMP: u8 = 58;

/// A hostile machine and the neighbour it is after.
struct Field {
    lab: Lab,
    tap: OwnedFd,
    mac: [u8; 6],
    own: Ipv6Addr,
    victim: Attachment,
    to: Ipv6Addr,
    /// A UDP socket of the victim on port 99.
    ear: UdpSocket,
}

fn field() -> Option<Field> {
    let lab = lab()?;
    let victim = lab.pod("victim");
    let vm = match lab.router().attach(&AttachRequest { kind: LinkKind::Tap, ..request("vm") }) {
        Err(error) if format!("{error:?}").contains("/dev/net/tun") => {
            println!("SKIPPED: no /dev/net/tun here");
            return None;
        }
        other => other.unwrap(),
    };
    lab.defaults(Isolation::Private);
    let tap = lab.router().open_tap(vm.tap.as_ref().unwrap()).unwrap();
    let (Some(own), Some(to)) = (vm.address6, victim.address6) else {
        println!("SKIPPED: this kernel has no IPv6");
        return None;
    };
    let ear = listen(&victim, 99);
    let mac: Vec<u8> = vm.mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let field = Field { lab, tap, mac: mac.try_into().unwrap(), own, victim, to, ear };
    eventually("the machine's own packets arrive", || {
        field.send(field.mac, &udp(field.own, field.to, 99, b"own"));
        heard(&field.ear).contains(&b"own".to_vec())
    });
    Some(field)
}

fn listen(pod: &Attachment, port: u16) -> UdpSocket {
    let socket = in_netns(&netns(pod), || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// All that has come.
fn heard(socket: &UdpSocket) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok((length, _)) = socket.recv_from(&mut buffer) {
        all.push(buffer[..length].to_vec());
    }
    all
}

impl Field {
    fn frame(&self, to: [u8; 6], from: [u8; 6], packet: &[u8]) {
        let frame = [&[0; 10][..], &to, &from, &[0x86, 0xdd], packet].concat();
        while rustix::io::write(&self.tap, &frame).is_err() {}
    }
    fn send(&self, from: [u8; 6], packet: &[u8]) {
        self.frame(ROUTER_MAC, from, packet);
    }
    /// What reaches the victim of all that `attack` sends; a packet of our own follows and is waited for.
    fn reaches(&self, ear: &UdpSocket, attack: impl FnOnce()) -> Vec<Vec<u8>> {
        heard(&self.ear);
        heard(ear);
        attack();
        let mut all = Vec::new();
        self.send(self.mac, &udp(self.own, self.to, 99, b"last"));
        eventually("the last packet comes", || {
            all.extend(heard(ear));
            all.extend(heard(&self.ear));
            all.iter().any(|packet| packet == b"last")
        });
        all.extend(heard(ear));
        all.retain(|packet| packet != b"last");
        all
    }
    fn neighbours(&self) -> Vec<String> {
        let (_, text) = run(&self.lab.router().netns_path(), "ip", &["-6", "neigh"]);
        text.lines().map(str::to_owned).collect()
    }
    /// The address that its MAC gives the machine on its link.
    fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, ((a ^ 2) << 8) | b, (c << 8) | 0xff, 0xfe00 | d, (e << 8) | f)
    }
}

fn ip(from: Ipv6Addr, to: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16).to_be_bytes();
    [&[0x60, 0, 0, 0][..], &length, &[next, hops], &from.octets(), &to.octets(), payload].concat()
}

/// The checksum of an upper layer's packet, which has zeroes in its place.
fn sum(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> [u8; 2] {
    let length = (payload.len() as u32).to_be_bytes();
    let all = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, next], payload].concat();
    let words = all.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let total: u32 = words.sum();
    let folded = (total & 0xffff) + (total >> 16);
    (!(((folded & 0xffff) + (folded >> 16)) as u16)).to_be_bytes()
}

fn datagram(from: Ipv6Addr, to: Ipv6Addr, port: u16, text: &[u8]) -> Vec<u8> {
    let words = [4000, port, 8 + text.len() as u16, 0].map(u16::to_be_bytes);
    let mut packet = [&words.concat(), text].concat();
    let check = sum(from, to, UDP, &packet);
    packet[6..8].copy_from_slice(&check);
    packet
}

fn udp(from: Ipv6Addr, to: Ipv6Addr, port: u16, text: &[u8]) -> Vec<u8> {
    ip(from, to, UDP, 64, &datagram(from, to, port, text))
}

fn icmp(from: Ipv6Addr, to: Ipv6Addr, hops: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let check = sum(from, to, ICMP, &body);
    body[2..4].copy_from_slice(&check);
    ip(from, to, ICMP, hops, &body)
}

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

#[test]
fn spoofed_addresses() {
    let Some(field) = field() else { return };
    let other = field.lab.pod("other").address6.unwrap();
    let foreign = ["fd00:10:42::9999", "2001:db8::1", "fe80::1", "fe80::7", "::", "::1", "ff02::1", "::ffff:10.42.0.2"];
    let router = field.lab.router().config().router_address6();
    let found = field.reaches(&field.ear, || {
        for source in foreign.map(v6).into_iter().chain([other, field.to, router, field.link_local()]) {
            field.send(field.mac, &udp(source, field.to, 99, b"spoofed address"));
        }
        for mac in [[0x0a, 0x58, 1, 2, 3, 4], ROUTER_MAC, [0; 6], [0xff; 6]] {
            field.send(mac, &udp(field.own, field.to, 99, b"spoofed mac"));
        }
    });
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn neighbours_are_found_by_the_router_and_believed_by_nobody() {
    let Some(field) = field() else { return };
    let gateway = v6("fe80::1");
    // "Who has the next hop?", to its solicited-node group: the router answers, to the asker alone.
    let question = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &gateway.octets(), &[1, 1], &field.mac].concat();
    let mut buffer = [0; 2048];
    eventually("the router says that it has the next hop", || {
        let to = v6("ff02::1:ff00:1");
        field.frame([0x33, 0x33, 0xff, 0, 0, 1], field.mac, &icmp(field.link_local(), to, 255, &question));
        let mut found = false;
        while let Ok(length) = rustix::io::read(&field.tap, &mut buffer) {
            let packet = &buffer[24..length];
            found |= packet.len() >= 72 && packet[6] == ICMP && packet[40] == 136 && packet[66..72] == ROUTER_MAC;
        }
        found
    });
    let before = field.neighbours();
    let other = field.lab.pod("other").address6.unwrap();
    let settled = field.neighbours();
    let found = field.reaches(&field.ear, || {
        for claimed in [field.to, other, gateway, field.lab.router().config().router_address6(), v6("fd00:10:42::77")] {
            // Advertisements that override, and solicitations that carry a link-layer address.
            let advertisement = [&[136, 0, 0, 0, 0xe0, 0, 0, 0][..], &claimed.octets(), &[2, 1], &field.mac].concat();
            for (from, to) in [(field.own, gateway), (claimed, gateway), (field.link_local(), v6("ff02::1"))] {
                field.send(field.mac, &icmp(from, to, 255, &advertisement));
            }
            field.send(field.mac, &icmp(claimed, v6("ff02::1:ff00:1"), 255, &question));
        }
        // As many neighbours as there are addresses.
        for n in 0..3000u16 {
            for prefix in ["fe80::", "fd00:10:42::", "2001:db8::"] {
                let mut segments = v6(prefix).segments();
                segments[6..].copy_from_slice(&[0x7777, n]);
                field.send(field.mac, &icmp(segments.into(), v6("ff02::1:ff00:1"), 255, &question));
            }
        }
    });
    assert!(found.is_empty(), "{found:?}");
    let after = field.neighbours();
    assert!(after.len() <= settled.len() + 1, "{} became {}", settled.len(), after.len());
    for entry in before.iter().filter(|entry| entry.contains("PERMANENT")) {
        assert!(after.contains(entry), "{entry} became {after:?}");
    }
}

#[test]
fn rogue_routers_and_servers() {
    let Some(field) = field() else { return };
    let ear = listen(&field.victim, 546);
    field.lab.defaults(Isolation::Open);
    let by_service = v6("fd00:10:43::546");
    let rule = service(by_service, Protocol::Udp, 5460, &[(field.to, 546)]);
    field.lab.router().sync_services(&[rule]).unwrap();
    let routes = || {
        let of = |netns: &std::path::Path| run(netns, "ip", &["-6", "route", "show"]).1;
        (of(&netns(&field.victim)), of(&field.lab.router().netns_path()))
    };
    let before = routes();
    let advertisement = [
        &[134, 0, 0, 0, 64, 0, 7, 8][..],
        &[0; 8],
        // A prefix for everyone to make addresses of.
        &[3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        &v6("2001:db8:bad::").octets(),
    ]
    .concat();
    let redirect =
        [&[137, 0, 0, 0, 0, 0, 0, 0][..], &field.link_local().octets(), &v6("2001:db8::9").octets()].concat();
    let found = field.reaches(&ear, || {
        for from in [field.link_local(), field.own, v6("fe80::1")] {
            for to in [v6("ff02::1"), v6("fe80::1"), field.to, v6("ff05::1")] {
                field.send(field.mac, &icmp(from, to, 255, &advertisement));
                field.send(field.mac, &icmp(from, to, 255, &redirect));
                field.frame([0x33, 0x33, 0, 0, 0, 1], field.mac, &icmp(from, to, 255, &advertisement));
                // DHCPv6's "this is your address".
                field.send(field.mac, &udp(from, to, 546, &[7, 1, 2, 3]));
                field.send(field.mac, &udp(from, by_service, 5460, &[7, 1, 2, 3]));
                let whole = datagram(from, to, 546, b"12345678in two pieces");
                for (offset, more, piece) in [(0u16, 1, &whole[..8]), (1, 0, &whole[8..])] {
                    let word = ((offset * 8) | more).to_be_bytes();
                    let header = [&[UDP, 0][..], &word, &[0, 0, 0, 9]].concat();
                    field.send(field.mac, &ip(from, to, 44, 64, &[&header, piece].concat()));
                }
            }
        }
    });
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(routes(), before);
    let (_, addresses) = run(&netns(&field.victim), "ip", &["-6", "-o", "addr"]);
    assert!(!addresses.contains("2001:db8"), "{addresses}");
}

#[test]
fn extension_headers_lead_nowhere() {
    let Some(field) = field() else { return };
    let router = field.lab.router().config().router_address6();
    let inner = |to: Ipv6Addr| datagram(field.own, to, 99, b"extended");
    let found = field.reaches(&field.ear, || {
        for to in [field.to, router, v6("fe80::1")] {
            // Hop-by-hop and destination options that say nothing, a router alert, a home address.
            let alert = [&[UDP, 0, 5, 2, 0, 0, 1, 0][..], &inner(to)].concat();
            let padding = [&[UDP, 0, 1, 4, 0, 0, 0, 0][..], &inner(to)].concat();
            let home = [&[UDP, 2, 1, 2, 0, 0, 0xc9, 16][..], &field.to.octets(), &inner(to)].concat();
            for (header, payload) in [(0, &alert), (0, &padding), (60, &padding), (60, &home)] {
                field.send(field.mac, &ip(field.own, to, header, 64, payload));
            }
            // By way of the router, or of the victim, to the victim: types 0, 2 and 4.
            for kind in [0, 2, 4] {
                let route = [&[UDP, 2, kind, 1, 0, 0, 0, 0][..], &field.to.octets(), &inner(field.to)].concat();
                field.send(field.mac, &ip(field.own, to, 43, 64, &route));
                // Behind another header, and in a fragment of its own.
                let behind = [&[43, 0, 1, 4, 0, 0, 0, 0][..], &route].concat();
                field.send(field.mac, &ip(field.own, to, 60, 64, &behind));
                let fragment = [&[43, 0, 0, 0, 0, 0, 0, kind][..], &route].concat();
                field.send(field.mac, &ip(field.own, to, 44, 64, &fragment));
            }
        }
    });
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn fragments_are_put_together_before_they_are_judged() {
    let Some(field) = field() else { return };
    let stranger = AttachRequest { namespace: "elsewhere".into(), ..request("stranger") };
    let stranger = field.lab.attach(&stranger);
    let ear = listen(&stranger, 99);
    let send = |to: Ipv6Addr, id: u8, offset: u16, more: bool, piece: &[u8]| {
        let word = ((offset * 8) | u16::from(more)).to_be_bytes();
        let header = [&[UDP, 0][..], &word, &[0, 0, 0, id]].concat();
        field.send(field.mac, &ip(field.own, to, 44, 64, &[&header, piece].concat()));
    };
    let found = field.reaches(&ear, || {
        // Allowed, in two pieces; refused, in either order; and with a piece that overlaps (RFC 5722).
        let whole = datagram(field.own, field.to, 99, b"12345678fragments");
        send(field.to, 1, 0, true, &whole[..16]);
        send(field.to, 1, 2, false, &whole[16..]);
        let foe = stranger.address6.unwrap();
        let whole = datagram(field.own, foe, 99, b"12345678refused");
        send(foe, 2, 0, true, &whole[..16]);
        send(foe, 2, 2, false, &whole[16..]);
        send(foe, 3, 1, false, &whole[8..]);
        send(foe, 3, 0, true, &whole[..8]);
        let lie = datagram(field.own, field.to, 99, b"12345678overlap!");
        send(field.to, 4, 0, true, &lie[..16]);
        send(field.to, 4, 1, false, &lie[8..]);
    });
    assert_eq!(found, [b"12345678fragments".to_vec()]);
}

#[test]
fn the_node_shows_nothing_but_dns() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("pod");
    if pod.address6.is_none() {
        println!("SKIPPED: this kernel has no IPv6");
        return;
    }
    let config = lab.router().config().clone();
    let server = DnsServer::start(lab.router(), (config.dns_address, 53).into(), vec![]).unwrap();
    server.set_views(Views::open());
    let any = |port: &u16| lab.router().run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port)).unwrap()).unwrap();
    let _open: Vec<TcpListener> = [22, 80, 443, 7443, 8080, 5000, 10250].iter().map(any).collect();
    let reaches = |address: IpAddr, port: u16| {
        let to = SocketAddr::new(address, port);
        TcpStream::connect_timeout(&to, Duration::from_secs(2)).is_ok()
    };
    let dns = config.dns_address6();
    in_netns(&netns(&pod), || {
        for address in [config.router_address6(), dns, v6("fd00:10:43::1")] {
            for port in (1..1200).chain([5000, 7443, 8080, 10250, 65535]) {
                assert_eq!(reaches(address.into(), port), address == dns && port == 53, "[{address}]:{port}");
            }
        }
        // Where clouds keep their secrets, the outside, and this machine by another name.
        for address in ["fd00:ec2::254", "2001:db8::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"] {
            assert!(!reaches(address.parse().unwrap(), 80), "{address}");
        }
    })
    .unwrap();
}
