//! SCTP by Services and policies, with real packets. The ends speak it themselves by raw sockets, so that a kernel without
//! an SCTP of its own shows it too; where one has it, it answers them as well, and the test is skipped.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Ranges, Rule};
use network::{Attachment, Isolation, Policies, Protocol, in_netns};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, bind, recv, sendto, socket, sockopt};
use std::net::{Ipv4Addr, SocketAddr};
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
        let open = || {
            let socket = socket(AddressFamily::INET, SocketType::RAW, Some(rustix::net::ipproto::SCTP)).unwrap();
            bind(&socket, &SocketAddr::new(pod.address.into(), 0)).unwrap();
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(700))).unwrap();
            End(socket)
        };
        in_netns(&netns(pod), open).unwrap()
    }

    fn send(&self, to: Ipv4Addr, packet: &Packet) {
        sendto(&self.0, &packet.bytes(), SendFlags::empty(), &SocketAddr::new(to.into(), 0)).unwrap();
    }

    /// Who sent the next packet, and what it is; `None`: none came.
    fn next(&self) -> Option<(Ipv4Addr, Packet)> {
        let mut buffer = [0; 2048];
        let (length, _) = recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty()).ok()?;
        let header = usize::from(buffer[0] & 15) * 4;
        let from: [u8; 4] = buffer[12..16].try_into().unwrap();
        Some((from.into(), Packet::of(&buffer[header..length])))
    }
}

/// A server that says its name in answer to data.
fn serve(pod: &Attachment, name: &'static str) {
    let end = End::of(pod);
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
                DATA => packet.answer(theirs, DATA, data(name.as_bytes())),
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

/// An association of its own: the server's name, as its data says, and from whom all answers came.
fn ask(end: &End, from: u16, to: Ipv4Addr) -> Option<(String, Ipv4Addr)> {
    let packet = |tag, chunk, body| Packet { from, to: PORT, tag, chunk, body };
    let turn = |packet: &Packet, wanted: u8| {
        end.send(to, packet);
        let (sender, answer) = end.next()?;
        assert_eq!((sender, answer.chunk, answer.from, answer.to), (to, wanted, PORT, from));
        Some(answer)
    };
    let own = 0xc0c0_0000 | u32::from(from);
    let tag = turn(&packet(0, INIT, init(own)), INIT_ACK)?.its_tag();
    turn(&packet(tag, COOKIE_ECHO, b"cook".to_vec()), COOKIE_ACK)?;
    let answer = turn(&packet(tag, DATA, data(b"who?")), DATA)?;
    end.send(to, &packet(tag, SACK, [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0].to_vec()));
    assert_eq!(answer.tag, own);
    Some((String::from_utf8(answer.body[12..].to_vec()).unwrap(), to))
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
    serve(&a, "a");
    serve(&b, "b");
    let end = End::of(&client);
    let to = [(a.address, PORT), (b.address, PORT)];
    assert_eq!(ask(&end, OWN, a.address).unwrap().0, "a");
    lab.router().sync_services(&[service(IP, Protocol::Sctp, PORT, &to)]).unwrap();
    let mut heard: Vec<String> = (1..=24).map(|turn| ask(&end, OWN + turn, IP).unwrap().0).collect();
    heard.sort();
    heard.dedup();
    assert_eq!(heard, ["a", "b"], "associations are spread");
    lab.router().sync_services(&[service(IP, Protocol::Sctp, PORT, &to[..1])]).unwrap();
    assert!((100..108).all(|turn| ask(&end, OWN + turn, IP).unwrap().0 == "a"));
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
    serve(&a, "a");
    serve(&b, "b");
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
    assert_eq!(ask(&end, OWN, a.address).unwrap().0, "a");
    assert_eq!(ask(&end, OWN + 1, b.address), None, "only TCP is allowed there");
}
