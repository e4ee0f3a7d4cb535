//! UDP and ping: a connected socket in the host's namespace for each flow, which only its peer can answer to, for as long
//! as something is sent. ICMP's other messages go nowhere.

use super::packet::{self, ICMP, ICMP6, Packet, Reassembly, UDP, Why};
use super::{Allowance, Cause, Links, Token};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Datagrams that one flow hands in before others have their turn.
const TURN: usize = 64;
const UNANSWERED: Duration = Duration::from_secs(30);
/// RFC 4787 asks for no less than 2 minutes.
const ANSWERED: Duration = Duration::from_secs(180);
/// A resolver's questions have had their answers after this.
const NAMES: Duration = Duration::from_secs(5);
const DNS: u16 = 53;
const PING: Duration = Duration::from_secs(15);
const IP_MTU_DISCOVER: (i32, i32) = (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
const IPV6_MTU_DISCOVER: (i32, i32) = (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);

/// A ping's identifier stands in the place of ports, on both sides.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    protocol: u8,
    inside: SocketAddr,
    outside: SocketAddr,
}

struct Flow {
    key: Key,
    socket: OwnedFd,
    last: Instant,
    answered: bool,
}

pub struct Flows {
    all: HashMap<u64, Flow>,
    by_key: HashMap<Key, u64>,
    of_workload: HashMap<IpAddr, usize>,
    next: u64,
    limit: usize,
    reassembly: Reassembly,
    buffer: Vec<u8>,
    fragment_id: u32,
}

impl Flows {
    pub fn new(limit: usize) -> Flows {
        Flows {
            all: HashMap::new(),
            by_key: HashMap::new(),
            of_workload: HashMap::new(),
            next: 0,
            limit,
            reassembly: Reassembly::default(),
            buffer: vec![0; 64 << 10],
            fragment_id: 0,
        }
    }
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// A packet that a workload sent out.
    pub fn outward(&mut self, bytes: &[u8], links: &mut Links, allowance: &mut Allowance) {
        let Some(packet) = packet::parse(bytes) else { return };
        if packet.fragment.is_some() {
            if let Some(whole) = self.reassembly.add(&packet) {
                self.outward(&whole, links, allowance);
            }
            return;
        }
        let why = match (key(&packet), packet.payload.split_at_checked(8)) {
            (Some(key), Some((_, data))) => {
                let message = if key.protocol == UDP { data } else { packet.payload };
                match self.send(key, message, links, allowance) {
                    Ok(()) => return,
                    Err(Cause::Refused) => Why::Port,
                    Err(Cause::Forbidden) => Why::Prohibited,
                    Err(Cause::NoRoute) => Why::Network,
                    Err(Cause::Unreachable) => Why::Host,
                }
            }
            _ => Why::Prohibited,
        };
        if let Some(error) = packet::unreachable(bytes, why) {
            links.write(&error);
        }
    }

    fn send(&mut self, key: Key, message: &[u8], links: &mut Links, allowance: &mut Allowance) -> Result<(), Cause> {
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => self.open(key, links, allowance)?,
        };
        let Some(flow) = self.all.get_mut(&id) else { return Ok(()) };
        flow.last = links.now;
        match rustix::net::send(&flow.socket, message, SendFlags::DONTWAIT) {
            // What does not fit is lost, as on any link.
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => Ok(()),
            Err(errno) => Err(Cause::of(errno)),
        }
    }

    fn open(&mut self, key: Key, links: &mut Links, allowance: &mut Allowance) -> Result<u64, Cause> {
        let workload = self.of_workload.get(&key.inside.ip()).copied().unwrap_or(0);
        if self.all.len() >= self.limit || workload >= self.limit / 4 {
            return Err(Cause::Forbidden);
        }
        allowance.check(key.outside.ip())?;
        let v4 = key.outside.is_ipv4();
        let family = if v4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let protocol = match key.protocol {
            ICMP => Some(ipproto::ICMP),
            ICMP6 => Some(ipproto::ICMPV6),
            _ => None,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::socket_with(family, SocketType::DGRAM, flags, protocol) {
            // The host lets this user send no pings (net.ipv4.ping_group_range).
            Err(Errno::ACCESS | Errno::PERM | Errno::PROTONOSUPPORT) => return Err(Cause::Forbidden),
            other => other.map_err(Cause::of)?,
        };
        // The workload's own packets are whole or were put together: they go out in pieces where they must.
        let (level, name) = if v4 { IP_MTU_DISCOVER } else { IPV6_MTU_DISCOVER };
        let _ = crate::sys::set_option(rustix::fd::AsFd::as_fd(&socket), level, name, libc::IP_PMTUDISC_DONT);
        allowance.bind(&socket, key.inside.ip())?;
        rustix::net::connect(&socket, &key.outside).map_err(Cause::of)?;
        let id = self.next;
        self.next += 1;
        links.watch(&socket, Token::Flow(id))?;
        *self.of_workload.entry(key.inside.ip()).or_default() += 1;
        self.by_key.insert(key, id);
        self.all.insert(id, Flow { key, socket, last: links.now, answered: false });
        Ok(id)
    }

    /// Answers have come, or an error. True if more may be there.
    pub fn event(&mut self, id: u64, links: &mut Links) -> bool {
        let Some(flow) = self.all.get_mut(&id) else { return false };
        for _ in 0..TURN {
            match rustix::net::recv(&flow.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    flow.last = links.now;
                    flow.answered = true;
                    let message = self.buffer.get(..length).unwrap_or_default();
                    let packet = match flow.key.protocol {
                        UDP => packet::udp(flow.key.outside, flow.key.inside, message),
                        _ => match echo_reply(flow.key, message) {
                            Some(packet) => packet,
                            None => continue,
                        },
                    };
                    self.fragment_id = self.fragment_id.wrapping_add(1);
                    for packet in packet::fragments(packet, self.fragment_id) {
                        links.write(&packet);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(errno) => {
                    let why = if errno == Errno::CONNREFUSED { Why::Port } else { Why::Host };
                    let sent = match flow.key.protocol {
                        UDP => packet::udp(flow.key.inside, flow.key.outside, &[]),
                        _ => return false,
                    };
                    if let Some(error) = packet::unreachable(&sent, why) {
                        links.write(&error);
                    }
                }
            }
        }
        true
    }

    /// Forgets flows that nothing has been heard of.
    pub fn sweep(&mut self, now: Instant) {
        let late = |flow: &Flow| {
            let limit = match (flow.key.protocol, flow.key.outside.port(), flow.answered) {
                (UDP, DNS, true) => NAMES,
                (UDP, _, true) => ANSWERED,
                (UDP, _, false) => UNANSWERED,
                _ => PING,
            };
            now.duration_since(flow.last) > limit
        };
        let ids: Vec<u64> = self.all.iter().filter(|(_, flow)| late(flow)).map(|(id, _)| *id).collect();
        self.remove(&ids);
    }

    pub fn end_where(&mut self, stale: &std::collections::BTreeSet<IpAddr>) {
        let of = |flow: &Flow| stale.contains(&flow.key.inside.ip());
        let ids: Vec<u64> = self.all.iter().filter(|(_, flow)| of(flow)).map(|(id, _)| *id).collect();
        self.remove(&ids);
    }

    fn remove(&mut self, ids: &[u64]) {
        for flow in ids.iter().filter_map(|id| self.all.remove(id)) {
            self.by_key.remove(&flow.key);
            let workload = flow.key.inside.ip();
            if let Some(count) = self.of_workload.get_mut(&workload) {
                *count -= 1;
                if *count == 0 {
                    self.of_workload.remove(&workload);
                }
            }
        }
    }
}

/// Which flow a packet is of; `None` for what has no way out.
fn key(packet: &Packet<'_>) -> Option<Key> {
    match packet.protocol {
        UDP => packet.ends().map(|(inside, outside)| Key { protocol: UDP, inside, outside }),
        ICMP | ICMP6 => {
            let echo = if packet.protocol == ICMP { [8, 0] } else { [128, 0] };
            if packet.payload.get(..2)? != echo {
                return None;
            }
            let id = u16::from_be_bytes(packet.payload.get(4..6)?.try_into().ok()?);
            let inside = SocketAddr::new(packet.source, id);
            Some(Key { protocol: packet.protocol, inside, outside: SocketAddr::new(packet.destination, id) })
        }
        _ => None,
    }
}

/// The reply with the identifier that the workload chose: the host's kernel has put its own there.
fn echo_reply(key: Key, message: &[u8]) -> Option<Vec<u8>> {
    let expected = if key.protocol == ICMP { 0 } else { 129 };
    let mut message = message.to_vec();
    if *message.first()? != expected {
        return None;
    }
    message.get_mut(4..6)?.copy_from_slice(&key.inside.port().to_be_bytes());
    Some(packet::icmp(key.outside.ip(), key.inside.ip(), &message))
}
