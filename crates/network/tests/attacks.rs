//! A machine with root inside does what it wants with frames: it writes them to its own tap device. None of it may reach
//! a neighbour, the router's tables or the node.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::dns::{Views, codec};
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Rule, Workload};
use network::refused::RefusedLog;
use network::{
    AttachRequest, Attachment, Cause, DnsServer, Isolation, LinkKind, Policies, Protocol, Records, in_netns,
};
use rustix::fd::OwnedFd;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

const ROUTER_MAC: [u8; 6] = [0x0a, 0x58, 169, 254, 1, 1];
const BROADCAST: [u8; 6] = [0xff; 6];

/// A hostile machine and the neighbours it is after.
struct Field {
    lab: Lab,
    tap: OwnedFd,
    mac: [u8; 6],
    own: Ipv4Addr,
    victim: Attachment,
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
    let ear = listen(&victim, 99);
    let mac: Vec<u8> = vm.mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let field = Field { lab, tap, mac: mac.try_into().unwrap(), own: vm.address, victim, ear };
    // The kernel opens the tap's queue a moment after the device is opened.
    eventually("the machine's own packets arrive", || {
        field.send(field.mac, &udp(field.own, field.victim.address, 99, b"own"));
        heard(&field.ear).contains(&b"own".to_vec())
    });
    Some(field)
}

fn listen(pod: &Attachment, port: u16) -> UdpSocket {
    let socket = in_netns(&netns(pod), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
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
    fn frame(&self, to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) {
        let frame = [&[0; 10][..], &to, &from, &kind.to_be_bytes(), payload].concat();
        while rustix::io::write(&self.tap, &frame).is_err() {}
    }
    /// An IPv4 packet to the router, from this MAC.
    fn send(&self, from: [u8; 6], packet: &[u8]) {
        self.frame(ROUTER_MAC, from, 0x0800, packet);
    }
    /// What reaches the victim of all that `attack` sends. A packet of our own follows: what was sent before it has been
    /// dealt with when it comes.
    fn reaches(&self, ear: &UdpSocket, attack: impl FnOnce()) -> Vec<Vec<u8>> {
        heard(&self.ear);
        heard(ear);
        attack();
        let mut all = Vec::new();
        self.send(self.mac, &udp(self.own, self.victim.address, 99, b"last"));
        eventually("the last packet comes", || {
            all.extend(heard(ear));
            all.extend(heard(&self.ear));
            all.iter().any(|packet| packet == b"last")
        });
        all.extend(heard(ear));
        all.retain(|packet| packet != b"last");
        all
    }
    fn neighbours(&self) -> String {
        run(&self.lab.router().netns_path(), "ip", &["neigh"]).1
    }
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let total: u32 = words.sum();
    let folded = (total & 0xffff) + (total >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// An IPv4 header before `payload`; `fragment` is the flags-and-offset word, `options` a multiple of four bytes.
fn ip(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, id: u16, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = (20 + options.len() + payload.len()) as u16;
    let mut header = vec![0x40 | (5 + options.len() / 4) as u8, 0];
    for word in [length, id, fragment] {
        header.extend(word.to_be_bytes());
    }
    header.extend([64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    header.extend(options);
    let check = sum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&check);
    [header, payload.to_vec()].concat()
}

/// A datagram without a checksum.
fn datagram(port: u16, text: &[u8]) -> Vec<u8> {
    let words = [4000, port, 8 + text.len() as u16, 0].map(u16::to_be_bytes);
    [&words.concat(), text].concat()
}

fn udp(from: Ipv4Addr, to: Ipv4Addr, port: u16, text: &[u8]) -> Vec<u8> {
    ip(from, to, 17, 1, 0, &[], &datagram(port, text))
}

fn arp(operation: u16, hardware: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4][..], &operation.to_be_bytes(), &hardware, &sender.octets(), &ROUTER_MAC, &target.octets()]
        .concat()
}

#[test]
fn spoofed_addresses() {
    let Some(field) = field() else { return };
    let other = field.lab.pod("other");
    let to = field.victim.address;
    let sources = [other.address, to, Ipv4Addr::new(10, 42, 99, 1), Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::UNSPECIFIED]
        .into_iter()
        .chain([field.victim.gateway, field.lab.router().config().router_address(), Ipv4Addr::LOCALHOST]);
    let found = field.reaches(&field.ear, || {
        for source in sources {
            field.send(field.mac, &udp(source, to, 99, b"spoofed address"));
        }
        for mac in [[0x0a, 0x58, 10, 42, 0, 2], ROUTER_MAC, [2, 0, 0, 0, 0, 1]] {
            field.send(mac, &udp(field.own, to, 99, b"spoofed MAC"));
        }
    });
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_flow_is_its_own_links_alone() {
    let Some(field) = field() else { return };
    let other = field.lab.pod("other");
    let to = field.victim.address;
    let from = in_netns(&netns(&other), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 4000)).unwrap()).unwrap();
    // The flow is known: what is sent takes the short way, for as long as the attack goes on.
    let known = || {
        heard(&field.ear);
        from.send_to(b"known", (to, 99)).unwrap();
        eventually("what belongs to the flow arrives", || {
            let came = heard(&field.ear).contains(&b"known".to_vec());
            from.send_to(b"known", (to, 99)).unwrap();
            came
        });
    };
    known();
    let other_mac: Vec<u8> = other.mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let found = field.reaches(&field.ear, || {
        for mac in [field.mac, other_mac.try_into().unwrap()] {
            field.send(mac, &udp(other.address, to, 99, b"in its name"));
        }
        // To somebody else's MAC, as if there were a shared wire.
        field.frame(BROADCAST, field.mac, 0x0800, &udp(field.own, to, 99, b"to all"));
    });
    assert!(!found.contains(&b"in its name".to_vec()) && !found.contains(&b"to all".to_vec()), "{found:?}");
    known();
}

#[test]
fn arp_is_answered_by_the_router_and_believed_by_nobody() {
    let Some(field) = field() else { return };
    let other = field.lab.pod("other");
    greet(&field.victim, 80, "victim");
    let before = field.neighbours();
    field.reaches(&field.ear, || {
        for claimed in [field.victim.address, other.address, field.victim.gateway, Ipv4Addr::new(10, 42, 7, 7)] {
            for operation in [1, 2] {
                for to in [ROUTER_MAC, BROADCAST] {
                    field.frame(to, field.mac, 0x0806, &arp(operation, field.mac, claimed, field.victim.gateway));
                    field.frame(to, field.mac, 0x0806, &arp(operation, field.mac, claimed, claimed));
                }
            }
        }
        // The table of neighbours is the whole node's: one machine must not fill it.
        for n in 0..2000u32 {
            let claimed = Ipv4Addr::from_bits(0x0a2a_8000 + n);
            field.frame(BROADCAST, field.mac, 0x0806, &arp(1, field.mac, claimed, field.victim.gateway));
        }
        // Its own address, but another's MAC.
        field.frame(BROADCAST, field.mac, 0x0806, &arp(1, [2, 0, 0, 0, 0, 9], field.own, field.victim.gateway));
    });
    assert_eq!(field.neighbours(), before);
    assert_eq!(call_from(&other, field.victim.address, 80).unwrap(), format!("victim {}", other.address));
}

#[test]
fn rogue_servers_and_multicast() {
    let Some(field) = field() else { return };
    let ear = listen(&field.victim, 68);
    let routes = || {
        let of = |netns: &std::path::Path| run(netns, "ip", &["-6", "route", "show", "default"]).1;
        (of(&netns(&field.victim)), of(&field.lab.router().netns_path()))
    };
    let before = routes();
    let found = field.reaches(&ear, || {
        let offer = [&[2, 1, 6, 0][..], &[0; 232], &[99, 130, 83, 99, 53, 1, 2, 255]].concat();
        for to in [Ipv4Addr::BROADCAST, Ipv4Addr::new(10, 42, 255, 255), Ipv4Addr::new(224, 0, 0, 251)] {
            let mut packet = datagram(68, &offer);
            packet[..2].copy_from_slice(&67u16.to_be_bytes());
            field.frame(BROADCAST, field.mac, 0x0800, &ip(field.own, to, 17, 1, 0, &[], &packet));
            field.frame(BROADCAST, field.mac, 0x0800, &udp(field.own, to, 99, b"to everyone"));
        }
        // "I am your router" (RFC 4861), to all nodes.
        let advertisement = [&[134, 0, 0, 0, 64, 0, 7, 8][..], &[0; 8]].concat();
        let header =
            [&[0x60, 0, 0, 0, 0, 16, 58, 255, 0xfe, 0x80][..], &[0; 13], &[9, 0xff, 2], &[0; 13], &[1]].concat();
        field.frame([0x33, 0x33, 0, 0, 0, 1], field.mac, 0x86dd, &[header, advertisement].concat());
    });
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(routes(), before);
}

/// A socket that hears the victim's ICMP.
fn icmp_ear(pod: &Attachment) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = || socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP)).unwrap();
    in_netns(&netns(pod), open).unwrap()
}

/// Types of ICMP that have come.
fn kinds(ear: &OwnedFd) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok((length, _)) = rustix::net::recv(ear, &mut buffer, rustix::net::RecvFlags::empty()) {
        all.extend(buffer[..length].get(20));
    }
    all
}

/// What attacker and victim do is allowed: only what the router alone may send is not.
#[test]
fn addresses_and_routes_come_from_the_router_alone() {
    let Some(field) = field() else { return };
    let other = field.lab.pod("other");
    field.lab.defaults(Isolation::Open);
    let log = RefusedLog::start(field.lab.router()).unwrap();
    let (ear, icmp) = (listen(&field.victim, 68), icmp_ear(&field.victim));
    let to = field.victim.address;
    let by_service = Ipv4Addr::new(10, 43, 0, 68);
    let rule = service(by_service, Protocol::Udp, 6868, &[(to, 68)]);
    field.lab.router().sync_services(&[rule]).unwrap();
    let offer = [&[2, 1, 6, 0][..], &[0; 232], &[99, 130, 83, 99, 53, 1, 5, 255]].concat();
    let mut found = field.reaches(&ear, || {
        for port in [67u16, 68, 4000] {
            let mut packet = datagram(68, &offer);
            packet[..2].copy_from_slice(&port.to_be_bytes());
            // More than once: what the firewall has let pass would take the short way from then on.
            for _ in 0..5 {
                field.send(field.mac, &ip(field.own, to, 17, 1, 0, &[], &packet));
                packet[2..4].copy_from_slice(&6868u16.to_be_bytes());
                field.send(field.mac, &ip(field.own, by_service, 17, 1, 0, &[], &packet));
                packet[2..4].copy_from_slice(&68u16.to_be_bytes());
            }
            for (id, cut) in [(21, 8), (22, 16)] {
                field.send(field.mac, &ip(field.own, to, 17, id + port, 0x2000, &[], &packet[..cut]));
                field.send(field.mac, &ip(field.own, to, 17, id + port, (cut / 8) as u16, &[], &packet[cut..]));
                packet[2..4].copy_from_slice(&6868u16.to_be_bytes());
                field.send(field.mac, &ip(field.own, by_service, 17, id + port, 0x2000, &[], &packet[..cut]));
                field.send(field.mac, &ip(field.own, by_service, 17, id + port, (cut / 8) as u16, &[], &packet[cut..]));
                packet[2..4].copy_from_slice(&68u16.to_be_bytes());
            }
        }
        // From a container, which needs no frames of its own for this.
        let server = in_netns(&netns(&other), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 67)).unwrap()).unwrap();
        for destination in [(to, 68), (by_service, 6868)] {
            let _ = server.send_to(&offer, destination);
        }
    });
    found.retain(|packet| packet != b"own");
    assert!(found.is_empty(), "{found:?}");
    eventually("the refusals are told", || {
        let all = log.since(0);
        all.iter().any(|refused| refused.cause == Cause::Announcements && refused.flow.source == field.own)
    });
    // Redirects and router advertisements, alone and about a connection that is there.
    field.ear.send_to(b"opens a connection", (field.own, 4000)).unwrap();
    let about =
        ip(to, field.own, 17, 1, 0, &[], &[&99u16.to_be_bytes()[..], &4000u16.to_be_bytes(), &[0, 26, 0, 0]].concat());
    let said = |kind: u8, rest: &[u8]| {
        let mut body = [&[kind, 1, 0, 0][..], &field.own.octets(), rest].concat();
        let check = sum(&body).to_be_bytes();
        body[2..4].copy_from_slice(&check);
        body
    };
    field.reaches(&ear, || {
        for kind in [5, 9] {
            for source in [field.own, field.victim.gateway] {
                let body = said(kind, &about);
                field.send(field.mac, &ip(source, to, 1, 3, 0, &[], &body));
                field.send(field.mac, &ip(source, to, 1, 40 + u16::from(kind), 0x2000, &[], &body[..16]));
                field.send(field.mac, &ip(source, to, 1, 40 + u16::from(kind), 2, &[], &body[16..]));
            }
        }
        field.send(field.mac, &ip(field.own, to, 1, 4, 0, &[], &said(8, b"ping")));
    });
    assert_eq!(kinds(&icmp), [8]);
}

#[test]
fn source_routes_lead_nowhere() {
    let Some(field) = field() else { return };
    let stranger = AttachRequest { namespace: "elsewhere".into(), ..request("stranger") };
    let stranger = field.lab.attach(&stranger);
    let ear = listen(&stranger, 99);
    let router = field.lab.router().config().router_address();
    let found = field.reaches(&ear, || {
        for kind in [131u8, 137] {
            for via in [router, field.victim.gateway, field.victim.address] {
                let options = [&[1, kind, 7, 4][..], &stranger.address.octets()].concat();
                field.send(field.mac, &ip(field.own, via, 17, 1, 0, &options, &datagram(99, b"routed")));
            }
        }
    });
    assert!(found.is_empty(), "{found:?}");
}

/// The victim takes UDP port 99 from its own namespace, and nothing else.
fn only_port_99(field: &Field) {
    let leases = field.lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    let ports = vec![Ports { protocol: Protocol::Udp, first: 99, last: 99 }];
    let rule = Rule {
        origin: "test".into(),
        action: Action::Allow,
        anyone: true,
        group: None,
        blocks: Default::default(),
        names: None,
        ports,
    };
    let profile = Profile {
        direction: Direction::Ingress,
        origin: "test".into(),
        rules: vec![rule],
        otherwise: Otherwise::Refuse,
    };
    policies.profiles.insert("only 99".into(), profile);
    let victim: &mut Workload = policies.workloads.get_mut(&field.victim.address).unwrap();
    victim.ingress = Some("only 99".into());
    field.lab.router().sync_policies(policies).unwrap();
}

#[test]
fn fragments_are_put_together_before_they_are_judged() {
    let Some(field) = field() else { return };
    only_port_99(&field);
    let ear = listen(&field.victim, 100);
    let to = field.victim.address;
    let more = 0x2000;
    let send = |id, fragment, payload: &[u8]| field.send(field.mac, &ip(field.own, to, 17, id, fragment, &[], payload));
    let found = field.reaches(&ear, || {
        // Allowed, in two pieces.
        let whole = datagram(99, b"12345678fragments");
        send(10, more, &whole[..16]);
        send(10, 2, &whole[16..]);
        // Refused, in two pieces, in either order; with the ports in a piece of their own.
        let whole = datagram(100, b"12345678refused");
        for (id, cut) in [(11, 16), (12, 8)] {
            send(id, more, &whole[..cut]);
            send(id, (cut / 8) as u16, &whole[cut..]);
            send(id + 10, (cut / 8) as u16, &whole[cut..]);
            send(id + 10, more, &whole[..cut]);
        }
        // A first piece that is allowed, and one that overwrites its ports (RFC 1858).
        let mut lie = datagram(99, b"12345678overlap!");
        send(31, more, &lie[..16]);
        lie[2..4].copy_from_slice(&100u16.to_be_bytes());
        send(31, more, &lie[..8]);
        send(31, 1, &lie[8..]);
    });
    assert_eq!(found, [b"12345678fragments".to_vec()]);
}

#[test]
fn the_node_shows_nothing_but_dns() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("pod");
    let dns = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)), 53);
    let _server = DnsServer::start(lab.router(), dns, vec![]).unwrap();
    let open: Vec<TcpListener> = [22, 80, 443, 7443, 8080, 5000, 10250]
        .iter()
        .map(|port| lab.router().run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).unwrap()).unwrap())
        .collect();
    let node = [lab.router().config().router_address(), pod.gateway, Ipv4Addr::new(10, 43, 0, 10)];
    for address in node {
        for port in (1..1200).chain([5000, 7443, 8080, 10250, 65535]) {
            let answer = call_from_all(&pod, address, port);
            assert_eq!(answer, address == node[2] && port == 53, "{address}:{port}");
        }
    }
    // Nor do the addresses at which clouds keep their secrets.
    for address in ["169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.2.1", "127.0.0.1"] {
        assert!(!call_from_all(&pod, address.parse().unwrap(), 80), "{address}");
    }
    drop(open);
}

fn call_from_all(pod: &Attachment, address: Ipv4Addr, port: u16) -> bool {
    let to = SocketAddr::new(address.into(), port);
    in_netns(&netns(pod), || std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5)).is_ok()).unwrap()
}

#[test]
fn answers_from_outside_that_point_inside_are_withheld() {
    let Some(lab) = lab() else { return };
    let (pod, upstream) = (lab.pod("pod"), lab.pod("upstream"));
    let socket = in_netns(&netns(&upstream), || UdpSocket::bind((upstream.address, 53)).unwrap()).unwrap();
    let inside = pod.address;
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let query = codec::parse(&buffer[..length]).unwrap();
            let mut reply = codec::Reply::of(codec::Code::NoError);
            let rebind = query.name.as_deref() == Some("rebind.example.org");
            let address = if rebind { inside } else { Ipv4Addr::new(192, 0, 2, 99) };
            reply.answers.push(codec::Record { name: None, ttl: 60, data: codec::Data::A(address) });
            let _ = socket.send_to(&codec::write(&query, &reply, true), client);
        }
    });
    let dns = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)), 53);
    let server = DnsServer::start(lab.router(), dns, vec![(upstream.address, 53).into()]).unwrap();
    server.set(&Records::default());
    server.set_views(Views::open());
    let ask = |name: &str| {
        let question = codec::question(7, name, codec::TYPE_A, None);
        in_netns(&netns(&pod), || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket.send_to(&question, dns).unwrap();
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).unwrap();
            (buffer[3] & 15, codec::addresses(&buffer[..length]).unwrap())
        })
        .unwrap()
    };
    assert_eq!(ask("www.example.org"), (0, vec![IpAddr::from([192, 0, 2, 99])]));
    assert_eq!(ask("rebind.example.org"), (3, vec![]));
}
