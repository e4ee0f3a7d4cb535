//! Rules: expressions evaluated in order until one does not match.

use super::{AnonymousSet, DATA_VALUE, Family, LIST_ELEM, R0, Reg, Verdict, interface_name, octets, write_verdict};
use crate::netlink::Writer;
use std::net::IpAddr;

/// What an ICMP or ICMPv6 "destination unreachable" says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    Port,
    Prohibited,
}

/// A rule: expressions evaluated in order until one does not match. Addresses in it are of its family: registers hold 4
/// bytes of one in family `ip`, 16 in `ip6`.
#[derive(Default)]
pub struct Rule {
    pub(super) family: Family,
    pub(super) writer: Writer,
    pub(super) comment: String,
}

impl Rule {
    /// Of family `ip`, or of any if it names no address.
    pub fn new() -> Rule {
        Rule::default()
    }
    pub fn of(family: Family) -> Rule {
        Rule { family, ..Rule::default() }
    }
    fn address_length(&self) -> u32 {
        self.family.address().length()
    }
    pub fn comment(mut self, comment: &str) -> Rule {
        comment.clone_into(&mut self.comment);
        self
    }
    pub(super) fn expression(mut self, name: &str, fill: impl FnOnce(&mut Writer)) -> Rule {
        self.writer.nest(LIST_ELEM, |w| {
            w.string(1, name);
            w.nest(2, fill);
        });
        self
    }
    pub(super) fn meta(self, key: u32, to: Reg) -> Rule {
        self.expression("meta", |w| {
            w.be32(2, key);
            w.be32(1, to.number());
        })
    }
    pub fn load_input_name(self, to: Reg) -> Rule {
        self.meta(6, to)
    }
    pub fn load_protocol(self, to: Reg) -> Rule {
        self.meta(16, to)
    }
    pub fn load_mark(self, to: Reg) -> Rule {
        self.meta(3, to)
    }
    /// Marks the packet with what is in the register.
    pub fn set_mark(self, from: Reg) -> Rule {
        self.expression("meta", |w| {
            w.be32(2, 3);
            w.be32(3, from.number());
        })
    }
    pub(super) fn payload(self, base: u32, offset: u32, length: u32, to: Reg) -> Rule {
        self.expression("payload", |w| {
            w.be32(1, to.number());
            w.be32(2, base);
            w.be32(3, offset);
            w.be32(4, length);
        })
    }
    pub fn load_source(self, to: Reg) -> Rule {
        let (offset, length) = if self.family == Family::Ip6 { (8, 16) } else { (12, 4) };
        self.payload(1, offset, length, to)
    }
    /// The frame's source address, 6 bytes.
    pub fn load_link_source(self, to: Reg) -> Rule {
        self.payload(0, 6, 6, to)
    }
    /// An ARP packet's sender: hardware address (6 bytes) and protocol address.
    pub fn load_arp_sender(self, hardware: Reg, protocol: Reg) -> Rule {
        self.payload(1, 8, 6, hardware).payload(1, 14, 4, protocol)
    }
    pub fn load_destination(self, to: Reg) -> Rule {
        let (offset, length) = if self.family == Family::Ip6 { (24, 16) } else { (16, 4) };
        self.payload(1, offset, length, to)
    }
    pub fn load_destination_port(self, to: Reg) -> Rule {
        self.payload(2, 2, 2, to)
    }
    pub fn if_source_port(self, port: u16) -> Rule {
        self.payload(2, 0, 2, R0).equal(R0, &port.to_be_bytes())
    }
    pub fn equal(self, register: Reg, value: &[u8]) -> Rule {
        self.compare(register, 0, value)
    }
    pub(super) fn compare(self, register: Reg, operator: u32, value: &[u8]) -> Rule {
        self.expression("cmp", |w| {
            w.be32(1, register.number());
            w.be32(2, operator);
            w.nest(3, |w| w.attr(DATA_VALUE, value));
        })
    }
    pub(super) fn mask(self, register: Reg, mask: &[u8]) -> Rule {
        self.expression("bitwise", |w| {
            w.be32(1, register.number());
            w.be32(2, register.number());
            w.be32(3, mask.len() as u32);
            w.nest(4, |w| w.attr(DATA_VALUE, mask));
            w.nest(5, |w| w.attr(DATA_VALUE, &vec![0; mask.len()]));
        })
    }
    pub fn if_input(self, name: &str) -> Rule {
        self.load_input_name(R0).equal(R0, &interface_name(name))
    }
    pub fn if_output(self, name: &str) -> Rule {
        self.meta(7, R0).equal(R0, &interface_name(name))
    }
    pub fn if_protocol(self, protocol: u8) -> Rule {
        self.load_protocol(R0).equal(R0, &[protocol])
    }
    pub fn if_destination(self, address: impl Into<IpAddr>) -> Rule {
        self.load_destination(R0).equal(R0, &octets(address))
    }
    pub fn if_destination_in(self, base: impl Into<IpAddr>, prefix: u8) -> Rule {
        self.load_destination(R0).if_within(R0, base, prefix)
    }
    /// The address in this register, which is spoilt, is in a network.
    pub fn if_within(self, register: Reg, base: impl Into<IpAddr>, prefix: u8) -> Rule {
        let mask = mask_of(prefix, self.address_length());
        self.mask(register, &mask).equal(register, &octets(base))
    }
    pub fn if_source(self, address: impl Into<IpAddr>) -> Rule {
        self.load_source(R0).equal(R0, &octets(address))
    }
    pub fn if_destination_port(self, port: u16) -> Rule {
        self.load_destination_port(R0).equal(R0, &port.to_be_bytes())
    }
    /// ICMP, or ICMPv6, of this type.
    pub fn if_icmp_type(self, kind: u8) -> Rule {
        let protocol = if self.family == Family::Ip6 { 58 } else { 1 };
        self.if_protocol(protocol).payload(2, 0, 1, R0).equal(R0, &[kind])
    }
    /// ICMP, or ICMPv6, of a type in this inclusive range.
    pub fn if_icmp_types(self, first: u8, last: u8) -> Rule {
        let protocol = if self.family == Family::Ip6 { 58 } else { 1 };
        let kind = self.if_protocol(protocol).payload(2, 0, 1, R0);
        kind.compare(R0, 5, &[first]).compare(R0, 3, &[last])
    }
    /// IPv6's hop limit is 255: the packet came by no router (RFC 4861, 6.1.1).
    pub fn if_on_link(self) -> Rule {
        self.payload(1, 7, 1, R0).equal(R0, &[255])
    }
    /// An IPv6 packet with an extension header of this type.
    pub fn if_extension(self, header: u8) -> Rule {
        self.expression("exthdr", |w| {
            w.be32(1, R0.number());
            w.u8(2, header);
            w.be32(3, 0);
            w.be32(4, 1);
            w.be32(5, 1);
        })
        .equal(R0, &[1])
    }
    /// Connection tracking state is one of these bits (1 invalid, 2 established, 4 related, 8 new).
    pub fn if_state(self, bits: u32) -> Rule {
        self.expression("ct", |w| {
            w.be32(1, R0.number());
            w.be32(2, 0);
        })
        .mask(R0, &bits.to_ne_bytes())
        .compare(R0, 1, &[0; 4])
    }
    /// Goes on if the key in consecutive registers from `key` is in the set.
    pub fn if_in_set(self, set: &str, key: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, set);
            w.be32(2, key.number());
        })
    }
    pub fn if_in(self, set: AnonymousSet, key: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, "__set%d");
            w.be32(2, key.number());
            w.be32(4, set.0);
        })
    }
    /// Loads what the map has for the key; goes on only if it has something.
    pub fn load_mapped(self, map: &str, key: Reg, to: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, map);
            w.be32(2, key.number());
            w.be32(3, to.number());
        })
    }
    /// Takes the verdict that the map has for the key.
    pub fn verdict_map(self, map: &str, key: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, map);
            w.be32(2, key.number());
            w.be32(3, 0);
        })
    }
    pub fn lookup(self, map: AnonymousSet, key: Reg, to: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, "__map%d");
            w.be32(2, key.number());
            w.be32(3, to.number());
            w.be32(4, map.0);
        })
    }
    /// A random number below `modulus`, in host byte order.
    pub fn random(self, modulus: u32, to: Reg) -> Rule {
        self.expression("numgen", |w| {
            w.be32(1, to.number());
            w.be32(2, modulus);
            w.be32(3, 1);
        })
    }
    /// A hash of the address at `from` below `modulus`, in host byte order.
    pub fn hash(self, from: Reg, modulus: u32, to: Reg) -> Rule {
        let length = self.address_length();
        self.expression("hash", |w| {
            w.be32(1, from.number());
            w.be32(2, to.number());
            w.be32(3, length);
            w.be32(4, modulus);
            w.be32(5, 0);
            w.be32(7, 0);
        })
    }
    pub(super) fn immediate(self, to: Reg, value: &[u8]) -> Rule {
        self.expression("immediate", |w| {
            w.be32(1, to.number());
            w.nest(2, |w| w.attr(DATA_VALUE, value));
        })
    }
    pub fn verdict(self, verdict: &Verdict) -> Rule {
        self.expression("immediate", |w| {
            w.be32(1, 0);
            w.nest(2, |w| write_verdict(w, verdict));
        })
    }
    pub fn goto(self, chain: &str) -> Rule {
        self.verdict(&Verdict::Goto(chain.to_owned()))
    }
    /// Goes on for at most this many packets a second, after a burst of as many.
    pub fn at_most(self, per_second: u32) -> Rule {
        self.expression("limit", |w| {
            w.be64(1, u64::from(per_second));
            w.be64(2, 1);
            w.be32(3, per_second);
            w.be32(4, 0);
            w.be32(5, 0);
        })
    }
    /// Hands the beginning of the packet to the listener of an NFLOG group.
    pub fn log(self, group: u16, bytes: u32) -> Rule {
        self.expression("log", |w| {
            w.attr(1, &group.to_be_bytes());
            w.be32(3, bytes);
            w.attr(4, &1u16.to_be_bytes());
        })
    }
    pub fn count(self) -> Rule {
        self.expression("counter", |w| {
            w.be64(1, 0);
            w.be64(2, 0);
        })
    }
    pub fn accept(self) -> Rule {
        self.verdict(&Verdict::Accept)
    }
    pub fn drop(self) -> Rule {
        self.verdict(&Verdict::Drop)
    }
    pub fn reject_reset(self) -> Rule {
        self.expression("reject", |w| {
            w.be32(1, 1);
            w.u8(2, 0);
        })
    }
    pub fn reject_unreachable(self, why: Unreachable) -> Rule {
        let code = match (self.family, why) {
            (Family::Ip | Family::Arp, Unreachable::Port) => 3,
            (Family::Ip | Family::Arp, Unreachable::Prohibited) => 13,
            (Family::Ip6, Unreachable::Port) => 4,
            (Family::Ip6, Unreachable::Prohibited) => 1,
        };
        self.expression("reject", |w| {
            w.be32(1, 0);
            w.u8(2, code);
        })
    }
    /// Redirects the connection to the address and port in consecutive registers.
    pub fn destination_nat(self, address: Reg) -> Rule {
        let (family, port) = (self.family, address.after(self.family.address()));
        self.expression("nat", |w| {
            w.be32(1, 1);
            w.be32(2, u32::from(family as u8));
            w.be32(3, address.number());
            w.be32(5, port.number());
        })
    }
    pub fn source_nat(self, address: impl Into<IpAddr>) -> Rule {
        let family = self.family;
        self.immediate(R0, &octets(address)).expression("nat", |w| {
            w.be32(1, 0);
            w.be32(2, u32::from(family as u8));
            w.be32(3, R0.number());
        })
    }
}

/// `prefix` one bits in `length` bytes.
fn mask_of(prefix: u8, length: u32) -> Vec<u8> {
    let bits = |byte: u32| u32::from(prefix).saturating_sub(byte * 8).min(8);
    (0..length).map(|byte| !(0xffu16 >> bits(byte)) as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_as_many_ones_as_the_prefix_says() {
        assert_eq!(mask_of(16, 4), [255, 255, 0, 0]);
        assert_eq!(mask_of(0, 4), [0; 4]);
        assert_eq!(mask_of(32, 4), [255; 4]);
        assert_eq!(mask_of(19, 4), [255, 255, 0xe0, 0]);
        assert_eq!(mask_of(108, 16)[12..], [255, 0xf0, 0, 0]);
    }
}
