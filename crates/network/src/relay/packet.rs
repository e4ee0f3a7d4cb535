//! IP packets as they come by the relay's link, and those that it answers with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP6: u8 = 58;
const FRAGMENT: u8 = 44;
const TTL: u8 = 64;
/// Largest packet that is written whole to a link of the family's: IPv6 routers do not fragment, IPv4 routers do.
const MTU6: usize = crate::config::MTU as usize;
/// How much of an offending packet an ICMP error quotes (RFC 1812, 4.3.2.3; RFC 4443, 2.4).
const QUOTE: usize = 512;

/// Part of a larger packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub id: u32,
    /// Bytes.
    pub offset: usize,
    pub more: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub payload: &'a [u8],
    pub fragment: Option<Fragment>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Reads a packet; `None` for what is not one.
pub fn parse(bytes: &[u8]) -> Option<Packet<'_>> {
    match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(bytes.first()? & 0xf) * 4;
            let total = usize::from(u16_at(bytes, 2)?);
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
            let fragment = u16_at(bytes, 6)?;
            let (offset, more) = (usize::from(fragment & 0x1fff) * 8, fragment & 0x2000 != 0);
            let id = u32::from(u16_at(bytes, 4)?);
            Some(Packet {
                source: address(12)?.into(),
                destination: address(16)?.into(),
                protocol: *bytes.get(9)?,
                payload: bytes.get(header.max(20)..total)?,
                fragment: (offset > 0 || more).then_some(Fragment { id, offset, more }),
            })
        }
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
            let payload = bytes.get(40..40 + usize::from(u16_at(bytes, 4)?))?;
            let (protocol, payload, fragment) = match *bytes.get(6)? {
                FRAGMENT => {
                    let place = u16_at(payload, 2)?;
                    let id = u32::from_be_bytes(payload.get(4..8)?.try_into().ok()?);
                    let (offset, more) = (usize::from(place & 0xfff8), place & 1 != 0);
                    let whole = offset == 0 && !more;
                    let fragment = (!whole).then_some(Fragment { id, offset, more });
                    (*payload.first()?, payload.get(8..)?, fragment)
                }
                other => (other, payload, None),
            };
            Some(Packet { source: address(8)?.into(), destination: address(24)?.into(), protocol, payload, fragment })
        }
        _ => None,
    }
}

impl Packet<'_> {
    /// Source and destination with the ports of TCP or UDP.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        let port = |at| u16_at(self.payload, at);
        Some((SocketAddr::new(self.source, port(0)?), SocketAddr::new(self.destination, port(2)?)))
    }
    /// TCP's flags.
    pub fn flags(&self) -> Option<u8> {
        self.payload.get(13).copied()
    }
}

pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

fn sum(bytes: &[u8]) -> u64 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let whole: u64 = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum();
    whole + rest.first().map_or(0, |byte| u64::from(*byte) << 8)
}

/// The Internet checksum (RFC 1071) of summed up words.
fn checksum(mut sum: u64) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => sum(&source.octets()) + sum(&destination.octets()),
        (IpAddr::V6(source), IpAddr::V6(destination)) => sum(&source.octets()) + sum(&destination.octets()),
        _ => 0,
    };
    addresses + u64::from(protocol) + length as u64
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(48 + length);
    let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            out.extend([0x45, 0]);
            out.extend(short(20 + length));
            out.extend([0, 0, 0, 0, TTL, protocol, 0, 0]);
            out.extend(source.octets());
            out.extend(destination.octets());
            let check = checksum(sum(&out));
            put(&mut out, 10, &check);
        }
        (source, destination) => {
            let v6 = |address| match address {
                IpAddr::V4(address) => Ipv4Addr::to_ipv6_mapped(&address),
                IpAddr::V6(address) => address,
            };
            out.extend([0x60, 0, 0, 0]);
            out.extend(short(length));
            out.extend([protocol, TTL]);
            out.extend(v6(source).octets());
            out.extend(v6(destination).octets());
        }
    }
    out
}

/// A packet around `payload`, whose checksum at `check` is filled in.
fn packet(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8], check: usize) -> Vec<u8> {
    let mut out = header(source, destination, protocol, payload.len());
    let start = out.len();
    out.extend_from_slice(payload);
    put(&mut out, start + check, &[0, 0]);
    let body = sum(out.get(start..).unwrap_or_default());
    let pseudo = if protocol == ICMP { 0 } else { pseudo_header(source, destination, protocol, payload.len()) };
    let mut value = checksum(body + pseudo);
    if protocol == UDP && value == [0, 0] {
        value = [0xff, 0xff];
    }
    put(&mut out, start + check, &value);
    out
}

/// A UDP datagram.
pub fn udp(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + data.len());
    payload.extend(from.port().to_be_bytes());
    payload.extend(to.port().to_be_bytes());
    payload.extend(u16::try_from(8 + data.len()).unwrap_or(u16::MAX).to_be_bytes());
    payload.extend([0, 0]);
    payload.extend_from_slice(data);
    packet(from.ip(), to.ip(), UDP, &payload, 6)
}

/// An ICMP or ICMPv6 message; its checksum is filled in.
pub fn icmp(source: IpAddr, destination: IpAddr, message: &[u8]) -> Vec<u8> {
    packet(source, destination, if source.is_ipv4() { ICMP } else { ICMP6 }, message, 2)
}

/// The refusal of a connection that `syn` asks for.
pub fn reset(syn: &Packet<'_>) -> Option<Vec<u8>> {
    let (from, to) = syn.ends()?;
    let sequence = u32::from_be_bytes(syn.payload.get(4..8)?.try_into().ok()?);
    let data = syn.payload.len().checked_sub(usize::from(syn.payload.get(12)? >> 4) * 4)?;
    let next = sequence.wrapping_add(1).wrapping_add(u32::try_from(data).ok()?);
    let mut payload = Vec::with_capacity(20);
    payload.extend(to.port().to_be_bytes());
    payload.extend(from.port().to_be_bytes());
    payload.extend([0; 4]);
    payload.extend(next.to_be_bytes());
    payload.extend([5 << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
    Some(packet(to.ip(), from.ip(), TCP, &payload, 16))
}

/// What an ICMP error says about a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Network,
    Host,
    Port,
    Prohibited,
}

/// The ICMP error about `offending`, from where that was sent to. `None` if nothing may be said about it.
pub fn unreachable(offending: &[u8], why: Why) -> Option<Vec<u8>> {
    let about = parse(offending)?;
    let quiet = about.fragment.is_some_and(|fragment| fragment.offset > 0);
    let kind = about.payload.first().copied().unwrap_or(0);
    // No error about an error (RFC 1122, 3.2.2; RFC 4443, 2.4).
    let error = match about.protocol {
        ICMP => !matches!(kind, 8 | 13 | 15 | 17),
        ICMP6 => kind < 128,
        _ => false,
    };
    if quiet || error {
        return None;
    }
    let (kind, code) = match (about.source, why) {
        (IpAddr::V4(_), Why::Network) => (3, 0),
        (IpAddr::V4(_), Why::Host) => (3, 1),
        (IpAddr::V4(_), Why::Port) => (3, 3),
        (IpAddr::V4(_), Why::Prohibited) => (3, 13),
        (IpAddr::V6(_), Why::Network) => (1, 0),
        (IpAddr::V6(_), Why::Host) => (1, 3),
        (IpAddr::V6(_), Why::Port) => (1, 4),
        (IpAddr::V6(_), Why::Prohibited) => (1, 1),
    };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(offending.get(..offending.len().min(QUOTE))?);
    Some(icmp(about.destination, about.source, &message))
}

/// The packet as it may go on the link: an IPv6 packet that is too large in fragments.
pub fn fragments(packet: Vec<u8>, id: u32) -> Vec<Vec<u8>> {
    if packet.len() <= MTU6 || packet.first().is_none_or(|first| first >> 4 != 6) {
        return vec![packet];
    }
    let Some((header, payload)) = packet.split_at_checked(40) else { return Vec::new() };
    let each = (MTU6 - 48) & !7;
    let count = payload.len().div_ceil(each);
    let fragment = |(index, part): (usize, &[u8])| {
        let place = u16::try_from(index * each).unwrap_or(u16::MAX) | u16::from(index + 1 < count);
        let mut out = header.to_vec();
        put(&mut out, 4, &u16::try_from(part.len() + 8).unwrap_or(u16::MAX).to_be_bytes());
        out.extend([header.get(6).copied().unwrap_or(0), 0]);
        out.extend(place.to_be_bytes());
        out.extend(id.to_be_bytes());
        out.extend_from_slice(part);
        put(&mut out, 6, &[FRAGMENT]);
        out
    };
    payload.chunks(each).enumerate().map(fragment).collect()
}

/// Puts together packets whose fragments come in order, as the router sends them on after it has checked them.
#[derive(Default)]
pub struct Reassembly {
    open: Vec<Partial>,
}

struct Partial {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
    payload: Vec<u8>,
}

impl Reassembly {
    /// Packets in the making; the oldest goes for a new one.
    const LIMIT: usize = 32;

    /// Takes a fragment; the whole packet when that was its last.
    pub fn add(&mut self, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let fragment = packet.fragment?;
        let same = |open: &Partial| {
            (open.source, open.destination, open.protocol, open.id)
                == (packet.source, packet.destination, packet.protocol, fragment.id)
        };
        let found = self.open.iter().position(same).map(|at| self.open.remove(at));
        let mut partial = match found {
            Some(partial) if partial.payload.len() == fragment.offset => partial,
            None if fragment.offset == 0 => Partial {
                source: packet.source,
                destination: packet.destination,
                protocol: packet.protocol,
                id: fragment.id,
                payload: Vec::new(),
            },
            _ => return None,
        };
        partial.payload.extend_from_slice(packet.payload);
        if partial.payload.len() > usize::from(u16::MAX) - 40 {
            return None;
        }
        if !fragment.more {
            let mut whole = header(packet.source, packet.destination, packet.protocol, partial.payload.len());
            whole.extend_from_slice(&partial.payload);
            return Some(whole);
        }
        if self.open.len() == Self::LIMIT {
            self.open.remove(0);
        }
        self.open.push(partial);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ends(v6: bool) -> (SocketAddr, SocketAddr) {
        match v6 {
            false => ("10.42.0.3:4000".parse().unwrap(), "192.0.2.1:53".parse().unwrap()),
            true => ("[fd00:10:42::3]:4000".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()),
        }
    }

    /// All of a packet that its checksum covers sums up to nothing.
    fn intact(bytes: &[u8]) -> bool {
        let packet = parse(bytes).unwrap();
        let pseudo = match packet.protocol {
            ICMP => 0,
            other => pseudo_header(packet.source, packet.destination, other, packet.payload.len()),
        };
        let header = bytes[0] >> 4 == 6 || checksum(sum(&bytes[..20])) == [0, 0];
        header && checksum(sum(packet.payload) + pseudo) == [0, 0]
    }

    #[test]
    fn what_is_written_can_be_read() {
        for v6 in [false, true] {
            let (from, to) = ends(v6);
            let bytes = udp(from, to, b"abc");
            assert!(intact(&bytes));
            let packet = parse(&bytes).unwrap();
            assert_eq!(packet.ends(), Some((from, to)));
            assert_eq!(&packet.payload[8..], b"abc");
            let error = unreachable(&bytes, Why::Port).unwrap();
            assert!(intact(&error));
            assert_eq!(parse(&error).unwrap().destination, from.ip());
            assert_eq!(unreachable(&error, Why::Port), None, "no error about an error");
        }
    }

    #[test]
    fn a_reset_answers_its_syn() {
        for v6 in [false, true] {
            let (from, to) = ends(v6);
            let mut tcp = Vec::new();
            tcp.extend(from.port().to_be_bytes());
            tcp.extend(to.port().to_be_bytes());
            tcp.extend([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 5 << 4, SYN, 0, 0, 0, 0, 0, 0]);
            let syn = packet(from.ip(), to.ip(), TCP, &tcp, 16);
            let bytes = reset(&parse(&syn).unwrap()).unwrap();
            assert!(intact(&bytes));
            let reset = parse(&bytes).unwrap();
            assert_eq!((reset.ends(), reset.flags()), (Some((to, from)), Some(RST | ACK)));
            assert_eq!(&reset.payload[8..12], [0, 0, 0, 0], "the next number after 2^32-1");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x40 | (*first & 0xf) };
            }
            if let Some(packet) = parse(&bytes) {
                let _ = (packet.ends(), packet.flags(), reset(&packet));
                let _ = Reassembly::default().add(&packet);
            }
            let _ = unreachable(&bytes, Why::Host);
        }

        #[test]
        fn large_packets_go_in_pieces_and_come_together(length in 0usize..20_000) {
            let (from, to) = ends(true);
            let data: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            let whole = udp(from, to, &data);
            let pieces = fragments(whole.clone(), 7);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= MTU6));
            let mut reassembly = Reassembly::default();
            let mut out = None;
            for piece in &pieces {
                let packet = parse(piece).unwrap();
                out = if packet.fragment.is_some() { reassembly.add(&packet) } else { Some(piece.clone()) };
            }
            prop_assert_eq!(out, Some(whole));
            prop_assert!(reassembly.open.is_empty());
        }
    }
}
