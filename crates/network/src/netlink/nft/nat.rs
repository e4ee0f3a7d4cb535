//! Expressions for the uplink and for Services: source and destination translation, segment sizes, maps that rules fill.

use super::{AnonymousSet, R0, Reg, Rule};
use std::net::Ipv4Addr;

const TCP: u8 = 6;
const SYN: u8 = 2;
const SYN_RST: u8 = 6;
const STATUS_DNAT: u32 = 1 << 5;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
/// `RTN_LOCAL`: an address of this machine.
const ADDRESS_LOCAL: u32 = 2;

impl Rule {
    pub fn unless_input(self, name: &str) -> Rule {
        self.load_input_name(R0).compare(R0, 1, &super::interface_name(name))
    }
    /// Whether the connection's destination has been translated.
    pub fn if_translated(self, yes: bool) -> Rule {
        let status = self.expression("ct", |w| {
            w.be32(1, R0.number());
            w.be32(2, CT_STATUS);
        });
        status.mask(R0, &STATUS_DNAT.to_ne_bytes()).compare(R0, u32::from(yes), &[0; 4])
    }
    pub fn if_mark(self, mark: u32) -> Rule {
        self.load_mark(R0).equal(R0, &mark.to_ne_bytes())
    }
    pub fn load_connection_mark(self, to: Reg) -> Rule {
        self.expression("ct", |w| {
            w.be32(1, to.number());
            w.be32(2, CT_MARK);
        })
    }
    /// Marks the connection with what is in the register.
    pub fn set_connection_mark(self, from: Reg) -> Rule {
        self.expression("ct", |w| {
            w.be32(2, CT_MARK);
            w.be32(4, from.number());
        })
    }
    /// Whether the destination is an address of this namespace.
    pub fn if_destination_local(self) -> Rule {
        let kind = self.expression("fib", |w| {
            w.be32(1, R0.number());
            w.be32(2, 3);
            w.be32(3, 2);
        });
        kind.equal(R0, &ADDRESS_LOCAL.to_ne_bytes())
    }
    /// Lowers the segment size that a TCP connection's opening packets offer to what the route carries.
    pub fn clamp_segments(self) -> Rule {
        let opening = self.if_protocol(TCP).payload(2, 13, 1, R0).mask(R0, &[SYN_RST]).equal(R0, &[SYN]);
        opening
            .expression("rt", |w| {
                w.be32(1, R0.number());
                w.be32(2, 3);
            })
            .expression("byteorder", |w| {
                w.be32(1, R0.number());
                w.be32(2, R0.number());
                w.be32(3, 1);
                w.be32(4, 2);
                w.be32(5, 2);
            })
            .expression("exthdr", |w| {
                w.u8(2, 2);
                w.be32(3, 2);
                w.be32(4, 2);
                w.be32(6, 1);
                w.be32(7, R0.number());
            })
    }
    /// Goes on if the key is not in the set.
    pub fn if_not_in(self, set: AnonymousSet, key: Reg) -> Rule {
        self.expression("lookup", |w| {
            w.string(1, "__set%d");
            w.be32(2, key.number());
            w.be32(4, set.0);
            w.be32(5, 1);
        })
    }
    /// The source becomes the address of the link that the packet leaves by.
    pub fn masquerade(self) -> Rule {
        self.expression("masq", |_| {})
    }
    /// The source becomes the address in the register.
    pub fn source_nat_from(self, address: Reg) -> Rule {
        self.nat(0, address)
    }
    /// The destination becomes this address; the port stays.
    pub fn destination_nat_to(self, address: Ipv4Addr) -> Rule {
        self.immediate(R0, &address.octets()).nat(1, R0)
    }
    fn nat(self, kind: u32, address: Reg) -> Rule {
        let family = self.family as u32;
        self.expression("nat", |w| {
            w.be32(1, kind);
            w.be32(2, family);
            w.be32(3, address.number());
        })
    }
    /// Writes the element with the key in consecutive registers from `key`, and a value from `data`. Its time begins anew;
    /// one that is there keeps its value. Goes on only if the map had room.
    pub fn remember(self, map: &str, key: Reg, data: Reg) -> Rule {
        self.dynamic(map, 1, key, data)
    }
    /// Removes the element with this key. The kernel wants to be shown a value for a map here too.
    pub fn forget(self, map: &str, key: Reg, data: Reg) -> Rule {
        self.dynamic(map, 2, key, data)
    }
    fn dynamic(self, map: &str, operation: u32, key: Reg, data: Reg) -> Rule {
        self.expression("dynset", |w| {
            w.string(1, map);
            w.be32(3, operation);
            w.be32(4, key.number());
            w.be32(5, data.number());
        })
    }
}
