//! Connection tracking: finding and removing entries (`linux/netfilter/nfnetlink_conntrack.h`).

use super::parse::Attributes;
use super::{Batch, NLM_F_ACK, NLM_F_DUMP, Socket};
use crate::error::Result;
use rustix::io::Errno;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
/// Counters of the original direction and of the reply.
const COUNTERS: [u16; 2] = [9, 10];

/// One direction of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
}

/// A tracked connection: as it was opened, and as answers come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    family: u8,
    pub original: Tuple,
    pub reply: Tuple,
    /// Packets and bytes, as it was opened and back; zero where they are not counted.
    pub counted: [(u64, u64); 2],
    /// The original direction as the kernel told it: what it finds the entry by, whatever the protocol.
    key: Vec<u8>,
    id: Option<[u8; 4]>,
}

/// All entries of the socket's namespace, of both families, that `keep` chooses.
pub fn find(socket: &mut Socket, mut keep: impl FnMut(&Entry) -> bool) -> Result<Vec<Entry>> {
    let mut batch = Batch::new();
    batch.request("list tracked connections", SUBSYSTEM | GET, NLM_F_DUMP, &[], |w| w.raw(&[0; 4]));
    let mut found = Vec::new();
    socket.query(batch, |kind, payload| {
        if kind == SUBSYSTEM | NEW {
            found.extend(entry(payload).filter(|entry| keep(entry)));
        }
    })?;
    Ok(found)
}

/// Forgets these connections; those that have gone meanwhile are no error.
pub fn delete(socket: &mut Socket, entries: &[Entry]) -> Result<()> {
    for some in entries.chunks(256) {
        let mut batch = Batch::new();
        for Entry { family, key, id, .. } in some {
            batch.request("forget the connection", SUBSYSTEM | DELETE, NLM_F_ACK, &[Errno::NOENT], |w| {
                w.raw(&[*family, 0, 0, 0]);
                w.nest(ORIGINAL, |w| w.raw(key));
                if let Some(id) = id {
                    w.attr(ID, id);
                }
            });
        }
        socket.send(batch)?;
    }
    Ok(())
}

/// Reads one entry's payload.
pub fn entry(payload: &[u8]) -> Option<Entry> {
    let attributes = payload.get(4..)?;
    let key = Attributes::get(attributes, ORIGINAL)?;
    Some(Entry {
        family: *payload.first()?,
        original: tuple(key)?,
        key: key.to_vec(),
        reply: tuple(Attributes::get(attributes, REPLY)?)?,
        counted: COUNTERS.map(|kind| counters(attributes, kind)),
        id: Attributes::get(attributes, ID).and_then(|bytes| bytes.try_into().ok()),
    })
}

fn counters(attributes: &[u8], kind: u16) -> (u64, u64) {
    let bytes = Attributes::get(attributes, kind).unwrap_or_default();
    let number = |kind| {
        let bytes = Attributes::get(bytes, kind).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    };
    (number(1), number(2))
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (ip, protocol) = (Attributes::get(bytes, 1)?, Attributes::get(bytes, 2)?);
    // IPv4 addresses have the attributes 1 and 2, IPv6 addresses 3 and 4.
    let address = |kind| match Attributes::get(ip, kind) {
        Some(bytes) => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))),
        None => Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(Attributes::get(ip, kind + 2)?).ok()?))),
    };
    let port = |kind| {
        let bytes = Attributes::get(protocol, kind).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u16::from_be_bytes)
    };
    Some(Tuple {
        source: address(1)?,
        destination: address(2)?,
        protocol: *Attributes::get(protocol, 1)?.first()?,
        source_port: port(2),
        destination_port: port(3),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = super::entry(&bytes);
            let _ = super::super::route::link(&bytes);
            let _ = super::super::route::link_counters(&bytes);
        }
    }
}
