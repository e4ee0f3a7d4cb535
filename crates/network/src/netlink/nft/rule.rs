//! Rules: expressions evaluated in order until one does not match.

use super::{AnonymousSet, DATA_VALUE, LIST_ELEM, NFPROTO_IPV4, R0, Reg, Verdict, interface_name, write_verdict};
use crate::netlink::Writer;
use std::net::Ipv4Addr;

/// A rule: expressions evaluated in order until one does not match.
#[derive(Default)]
pub struct Rule {
    pub(super) writer: Writer,
    pub(super) comment: String,
}

impl Rule {
    pub fn new() -> Rule {
        Rule::default()
    }
    pub fn comment(mut self, comment: &str) -> Rule {
        comment.clone_into(&mut self.comment);
        self
    }
    fn expression(mut self, name: &str, fill: impl FnOnce(&mut Writer)) -> Rule {
        self.writer.nest(LIST_ELEM, |w| {
            w.string(1, name);
            w.nest(2, fill);
        });
        self
    }
    fn meta(self, key: u32, to: Reg) -> Rule {
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
    fn payload(self, base: u32, offset: u32, length: u32, to: Reg) -> Rule {
        self.expression("payload", |w| {
            w.be32(1, to.number());
            w.be32(2, base);
            w.be32(3, offset);
            w.be32(4, length);
        })
    }
    pub fn load_source(self, to: Reg) -> Rule {
        self.payload(1, 12, 4, to)
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
        self.payload(1, 16, 4, to)
    }
    pub fn load_destination_port(self, to: Reg) -> Rule {
        self.payload(2, 2, 2, to)
    }
    pub fn equal(self, register: Reg, value: &[u8]) -> Rule {
        self.compare(register, 0, value)
    }
    fn compare(self, register: Reg, operator: u32, value: &[u8]) -> Rule {
        self.expression("cmp", |w| {
            w.be32(1, register.number());
            w.be32(2, operator);
            w.nest(3, |w| w.attr(DATA_VALUE, value));
        })
    }
    fn mask(self, register: Reg, mask: [u8; 4]) -> Rule {
        self.expression("bitwise", |w| {
            w.be32(1, register.number());
            w.be32(2, register.number());
            w.be32(3, 4);
            w.nest(4, |w| w.attr(DATA_VALUE, &mask));
            w.nest(5, |w| w.attr(DATA_VALUE, &[0; 4]));
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
    pub fn if_destination(self, address: Ipv4Addr) -> Rule {
        self.load_destination(R0).equal(R0, &address.octets())
    }
    pub fn if_destination_in(self, base: Ipv4Addr, mask: u32) -> Rule {
        self.load_destination(R0).mask(R0, mask.to_be_bytes()).equal(R0, &base.octets())
    }
    pub fn if_destination_port(self, port: u16) -> Rule {
        self.load_destination_port(R0).equal(R0, &port.to_be_bytes())
    }
    pub fn if_icmp_type(self, kind: u8) -> Rule {
        self.if_protocol(1).payload(2, 0, 1, R0).equal(R0, &[kind])
    }
    /// Connection tracking state is one of these bits (1 invalid, 2 established, 4 related, 8 new).
    pub fn if_state(self, bits: u32) -> Rule {
        self.expression("ct", |w| {
            w.be32(1, R0.number());
            w.be32(2, 0);
        })
        .mask(R0, bits.to_ne_bytes())
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
    /// A hash of 4 bytes at `from` below `modulus`, in host byte order.
    pub fn hash(self, from: Reg, modulus: u32, to: Reg) -> Rule {
        self.expression("hash", |w| {
            w.be32(1, from.number());
            w.be32(2, to.number());
            w.be32(3, 4);
            w.be32(4, modulus);
            w.be32(5, 0);
            w.be32(7, 0);
        })
    }
    fn immediate(self, to: Reg, value: &[u8]) -> Rule {
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
    /// ICMP "destination unreachable" with this code (3 port, 13 prohibited).
    pub fn reject_unreachable(self, code: u8) -> Rule {
        self.expression("reject", |w| {
            w.be32(1, 0);
            w.u8(2, code);
        })
    }
    /// Redirects the connection to the address and port in two consecutive registers.
    pub fn destination_nat(self, address: Reg) -> Rule {
        self.expression("nat", |w| {
            w.be32(1, 1);
            w.be32(2, u32::from(NFPROTO_IPV4));
            w.be32(3, address.number());
            w.be32(5, Reg(address.0 + 1).number());
        })
    }
    pub fn source_nat(self, address: Ipv4Addr) -> Rule {
        self.immediate(R0, &address.octets()).expression("nat", |w| {
            w.be32(1, 0);
            w.be32(2, u32::from(NFPROTO_IPV4));
            w.be32(3, R0.number());
        })
    }
}
