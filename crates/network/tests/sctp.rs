//! SCTP by Services and policies, with real packets. The ends speak it themselves by raw sockets, so that a kernel without
//! an SCTP of its own shows it too; where one has it, it answers them as well, and the test is skipped.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Ranges, Rule};
use network::{Attachment, Exposer, Exposure, Isolation, Leads, Policies, Protocol, in_netns};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, bind, recvfrom, sendto, socket, sockopt};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const IP: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 90);
const PORT: u16 = 3868;
const OWN: u16 = 40_000;
/// Chunks of RFC 9260, section 3.2.
const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const SACK: u8 = 3;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;

/// CRC-32c as RFC 9260, appendix A, has it.
fn checksum(packet: &[u8]) -> u32 {
    !packet.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg()))
    })
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    from: u16,
    to: u16,
    tag: u32,
    chunk: u8,
    body: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut all = [self.from.to_be_bytes(), self.to.to_be_bytes()].concat();
        all.extend(self.tag.to_be_bytes());
        all.extend([0; 4]);
        all.extend([self.chunk, if self.chunk == DATA { 3 } else { 0 }]);
        all.extend((self.body.len() as u16 + 4).to_be_bytes());
        all.extend(&self.body);
        all.resize(all.len().next_multiple_of(4), 0);
        let sum = checksum(&all);
        all[8..12].copy_from_slice(&sum.to_le_bytes());
        all
    }

    /// Panics where the sum is wrong: the kernel changes addresses and ports, and has to make it anew.
    fn of(packet: &[u8]) -> Packet {
        let mut bare = packet.to_vec();
        let sum = u32::from_le_bytes(packet[8..12].try_into().unwrap());
        bare[8..12].fill(0);
        assert_eq!(sum, checksum(&bare), "the checksum of {packet:?}");
        let short = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let length = usize::from(short(14));
        let tag = u32::from_be_bytes(packet[4..8].try_into().unwrap());
        Packet { from: short(0), to: short(2), tag, chunk: packet[12], body: packet[16..12 + length].to_vec() }
    }

    fn answer(&self, tag: u32, chunk: u8, body: Vec<u8>) -> Packet {
        Packet { from: self.to, to: self.from, tag, chunk, body }
    }

    /// The tag that answers to an INIT, or its answer, have to have.
    fn its_tag(&self) -> u32 {
        u32::from_be_bytes(self.body[..4].try_into().unwrap())
    }
}

struct End(OwnedFd);

impl End {
    fn of(pod: &Attachment) -> End {
        End::at(&netns(pod), pod.address)
    }

    fn at(netns: &Path, address: impl Into<IpAddr>) -> End {
        let address = address.into();
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let open = || {
            let socket = socket(family, SocketType::RAW, Some(rustix::net::ipproto::SCTP)).unwrap();
            bind(&socket, &SocketAddr::new(address, 0)).unwrap();
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(700))).unwrap();
            End(socket)
        };
        in_netns(netns, open).unwrap()
    }

    fn send(&self, to: IpAddr, packet: &Packet) {
        sendto(&self.0, &packet.bytes(), SendFlags::empty(), &SocketAddr::new(to, 0)).unwrap();
    }

    /// Who sent the next packet, and what it is; `None`: none came.
    fn next(&self) -> Option<(IpAddr, Packet)> {
        let mut buffer = [0; 2048];
        let (length, _, from) = recvfrom(&self.0, buffer.as_mut_slice(), RecvFlags::empty()).ok()?;
        let from = SocketAddr::try_from(from.unwrap()).unwrap().ip();
        let header = if from.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
        Some((from, Packet::of(&buffer[header..length])))
    }
}

/// A server that says its name, and whom it answers, in answer to data.
fn serve(end: End, name: &'static str) {
    std::thread::spawn(move || {
        let (own, mut theirs) = (0x5e5e_0001u32, 0);
        loop {
            let Some((from, packet)) = end.next() else { continue };
            let answer = match packet.chunk {
                INIT => {
                    theirs = packet.its_tag();
                    packet.answer(theirs, INIT_ACK, [&init(own)[..], &[0, 7, 0, 8], b"cook"].concat())
                }
                COOKIE_ECHO => packet.answer(theirs, COOKIE_ACK, Vec::new()),
                DATA => packet.answer(theirs, DATA, data(format!("{name} {from}").as_bytes())),
                _ => continue,
            };
            end.send(from, &answer);
        }
    });
}

/// Tag, window, streams out and in, first number.
fn init(tag: u32) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &65_536u32.to_be_bytes(), &[0, 1, 0, 1], &1u32.to_be_bytes()].concat()
}

/// Number, stream, number in it, protocol.
fn data(said: &[u8]) -> Vec<u8> {
    [&1u32.to_be_bytes()[..], &[0; 8], said].concat()
}

/// What the server says in an association of its own. All answers have to come from whom they were asked of.
fn ask(end: &End, from: u16, to: impl Into<IpAddr>) -> Option<String> {
    let to = to.into();
    let packet = |tag, chunk, body| Packet { from, to: PORT, tag, chunk, body };
    let turn = |packet: &Packet, wanted: u8| {
        end.send(to, packet);
        // An end on the host hears what it says to the host itself.
        let (sender, answer) = std::iter::from_fn(|| end.next()).find(|(_, packet)| packet.to == from)?;
        assert_eq!((sender, answer.chunk, answer.from, answer.to), (to, wanted, PORT, from));
        Some(answer)
    };
    let own = 0xc0c0_0000 | u32::from(from);
    let tag = turn(&packet(0, INIT, init(own)), INIT_ACK)?.its_tag();
    turn(&packet(tag, COOKIE_ECHO, b"cook".to_vec()), COOKIE_ACK)?;
    let answer = turn(&packet(tag, DATA, data(b"who?")), DATA)?;
    end.send(to, &packet(tag, SACK, [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0].to_vec()));
    assert_eq!(answer.tag, own);
    Some(String::from_utf8(answer.body[12..].to_vec()).unwrap())
}

fn kernel_has_its_own() -> bool {
    let has = std::fs::read_to_string("/proc/net/protocols")
        .is_ok_and(|all| all.lines().any(|line| line.starts_with("SCTP")));
    if has {
        println!("SKIPPED: this kernel's own SCTP would answer");
    }
    has
}

#[test]
fn services_carry_sctp() {
    let Some(lab) = lab() else { return };
    if kernel_has_its_own() {
        return;
    }
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    serve(End::of(&a), "a");
    serve(End::of(&b), "b");
    let end = End::of(&client);
    let to = [(a.address, PORT), (b.address, PORT)];
    let whom = format!("a {}", client.address);
    assert_eq!(ask(&end, OWN, a.address).unwrap(), whom);
    lab.router().sync_services(&[service(IP, Protocol::Sctp, PORT, &to)]).unwrap();
    let mut heard: Vec<String> = (1..=24).map(|turn| ask(&end, OWN + turn, IP).unwrap()).collect();
    heard.sort();
    heard.dedup();
    assert_eq!(heard, [whom.clone(), format!("b {}", client.address)], "associations are spread");
    lab.router().sync_services(&[service(IP, Protocol::Sctp, PORT, &to[..1])]).unwrap();
    assert!((100..108).all(|turn| ask(&end, OWN + turn, IP).unwrap() == whom));
    // The same number of another protocol is another port.
    lab.router().sync_services(&[service(IP, Protocol::Tcp, PORT, &to)]).unwrap();
    assert_eq!(ask(&end, OWN + 200, IP), None);
}

#[test]
fn policies_tell_sctp_from_others() {
    let Some(lab) = lab() else { return };
    if kernel_has_its_own() {
        return;
    }
    let (a, b, client) = (lab.pod("a"), lab.pod("b"), lab.pod("client"));
    serve(End::of(&a), "a");
    serve(End::of(&b), "b");
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    for (pod, protocol) in [(&a, Protocol::Sctp), (&b, Protocol::Tcp)] {
        let key: Arc<str> = format!("{protocol:?} alone").into();
        let rule = Rule {
            origin: key.clone(),
            action: Action::Allow,
            anyone: true,
            group: None,
            blocks: Ranges::default(),
            names: None,
            ports: vec![Ports { protocol, first: PORT, last: PORT }],
        };
        let (direction, otherwise) = (Direction::Ingress, Otherwise::Refuse);
        policies.profiles.insert(key.clone(), Profile { direction, origin: key.clone(), rules: vec![rule], otherwise });
        policies.workloads.get_mut(&pod.address).unwrap().ingress = Some(key);
    }
    lab.router().sync_policies(policies).unwrap();
    let end = End::of(&client);
    assert_eq!(ask(&end, OWN, a.address).unwrap(), format!("a {}", client.address));
    assert_eq!(ask(&end, OWN + 1, b.address), None, "only TCP is allowed there");
}

#[test]
fn ports_of_the_host_carry_sctp() {
    let Some(lab) = lab() else { return };
    if kernel_has_its_own() {
        return;
    }
    let (address, other) = (Ipv4Addr::new(203, 0, 113, 2), Ipv4Addr::new(203, 0, 113, 3));
    let address6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
    let (client, client6) = (Ipv4Addr::new(203, 0, 113, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    let of_host = [format!("{address}/24"), format!("{other}/24"), format!("{address6}/64 nodad")];
    let (host, world) = outside(&of_host, &[format!("{client}/24"), format!("{client6}/64 nodad")]);
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    serve(End::of(&a), "a");
    serve(End::of(&b), "b");
    let (own6, router) = (a.address6.unwrap(), lab.router().config().router_address());
    serve(End::at(&netns(&a), own6), "six");
    let mut exposer = Exposer::new(lab.router(), File::open(&host).unwrap().into()).unwrap();
    let exposure = |listen: IpAddr, to: &[(IpAddr, u16)]| Exposure {
        namespace: "default".into(),
        name: "diameter".into(),
        listen: (listen, PORT).into(),
        protocol: Protocol::Sctp,
        leads: Leads::To { endpoints: to.to_vec(), sticky: false },
        sources: Ranges::default(),
    };
    let mut open = |exposures: Vec<Exposure>| {
        let failed = exposer.sync(lab.router(), exposures).unwrap();
        assert!(failed.is_empty(), "{failed:?}");
    };
    // The pod's port is another one than the host's.
    let to = |pod: &Attachment| (IpAddr::from(pod.address), 5000);
    let everywhere = |v6: bool| if v6 { Ipv6Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv4Addr::UNSPECIFIED) };
    open(vec![exposure(everywhere(false), &[to(&a), to(&b)]), exposure(everywhere(true), &[(own6.into(), 5000)])]);
    let (end, end6) = (End::at(&world, client), End::at(&world, client6));
    let mut heard: Vec<String> = (0..8).map(|turn| ask(&end, OWN + turn, address).unwrap()).collect();
    heard.sort();
    heard.dedup();
    assert_eq!(heard, [format!("a {client}"), format!("b {client}")]);
    assert_eq!(ask(&end6, OWN, address6).unwrap(), format!("six {client6}"));
    // A client's port leads to an endpoint once, by whichever of the host's addresses; then to the other.
    let ways = [address, other].map(|address| ask(&end, OWN + 20, address).unwrap());
    assert_ne!(ways[0], ways[1]);
    // The host itself is the node.
    let inside = End::at(&host, address);
    assert!(ask(&inside, OWN, address).is_some_and(|said| said.ends_with(&format!(" {router}"))));
    // An endpoint that has gone takes its associations along: a new one of the same port finds the other.
    open(vec![exposure(address.into(), &[to(&b)])]);
    assert!((0..8).all(|turn| ask(&end, OWN + turn, address).unwrap() == format!("b {client}")));
    assert_eq!(ask(&end, OWN + 30, other), None, "that address has no port any more");
    lab.defaults(Isolation::Private);
    open(Vec::new());
    assert_eq!(ask(&end, OWN + 31, address), None);
}
