//! Expressions that lead connections to a transparent socket.

use super::{Family, R0, R4, Rule, octets};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const SYN_ACK: u8 = 0x12;
const SYN: u8 = 2;
const FLAGS_AT: u32 = 13;

impl Rule {
    /// Hands the packet to the transparent socket that listens on loopback; goes on only if there is one.
    pub fn to_transparent(self, port: u16) -> Rule {
        let loopback: IpAddr = match self.family {
            Family::Ip | Family::Arp => Ipv4Addr::LOCALHOST.into(),
            Family::Ip6 => Ipv6Addr::LOCALHOST.into(),
        };
        let family = self.family as u32;
        self.immediate(R0, &octets(loopback)).immediate(R4, &port.to_be_bytes()).expression("tproxy", |w| {
            w.be32(1, family);
            w.be32(2, R0.number());
            w.be32(3, R4.number());
        })
    }
    pub fn mark(self, value: u32) -> Rule {
        self.immediate(R0, &value.to_ne_bytes()).set_mark(R0)
    }
    /// Marks the connection that the packet belongs to.
    pub fn mark_connection(self, value: u32) -> Rule {
        self.immediate(R0, &value.to_ne_bytes()).set_connection_mark(R0)
    }
    pub fn unless_connection_mark(self, value: u32) -> Rule {
        self.load_connection_mark(R0).compare(R0, 1, &value.to_ne_bytes())
    }
    /// A TCP packet that asks for a connection.
    pub fn if_opening(self, protocol: u8) -> Rule {
        self.if_protocol(protocol).payload(2, FLAGS_AT, 1, R0).mask(R0, &[SYN_ACK]).equal(R0, &[SYN])
    }
}
