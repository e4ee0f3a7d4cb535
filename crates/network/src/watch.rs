//! Seeing what happens: connections with their counters, counters of links, and the frames of one link. All of it reads;
//! nothing here changes what passes.

use crate::attach::{TAP_PREFIX, VETH_PREFIX};
use crate::error::{Error, Result};
use crate::express::Express;
use crate::firewall::TABLE;
use crate::limits::Cause;
use crate::netlink::nft::{self, Family};
use crate::netlink::{Socket, conntrack, route};
use crate::router::Router;
use crate::{ns, sys};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use crate::netlink::conntrack::{Entry, Tuple};
pub use crate::netlink::route::Counters;

/// Most of a frame that is captured; frames of links are no longer.
const FRAME: usize = 64 << 10;

/// For so long after somebody looked at connections, packets are counted for the next look.
const LOOK: Duration = Duration::from_secs(10);

/// One frame of a link, as it began.
#[derive(Clone, Debug)]
pub struct Frame {
    pub at: SystemTime,
    pub bytes: Vec<u8>,
}

/// Frames of one workload's link, in both directions, from when it is made until it is dropped.
pub struct Capture {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// What goes to the workload passes by its link while this is held.
    detour: Option<(Arc<Express>, Ipv4Addr)>,
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Some((express, address)) = &self.detour
            && let Err(error) = express.end_capture(*address)
        {
            tracing::warn!(%address, %error, "packets to a workload go on taking the long way");
        }
    }
}

impl Router {
    /// Tracked connections with what they have carried. Counting begins with the first call; connections that were open
    /// before it have no counters.
    pub fn connections(&self) -> Result<Vec<Entry>> {
        if let Some(express) = &self.express {
            express.watch(LOOK).map_err(Error::system("have packets counted"))?;
        }
        self.run(|| {
            ns::sysctl("netfilter/nf_conntrack_acct", "1")?;
            conntrack::find(&mut Socket::netfilter()?, |_| true)
        })?
    }

    /// Counters of all workloads' links, by the workload's IPv4 address. `received` is what the workload sent.
    pub fn link_counters(&self) -> Result<Vec<(Ipv4Addr, Counters)>> {
        let links = self.run(|| route::counters(&mut Socket::route()?))??;
        let mut all: Vec<_> =
            links.into_iter().filter_map(|(name, counters)| Some((address_of_link(&name)?, counters))).collect();
        let leased: HashSet<Ipv4Addr> = self.leases().into_iter().map(|lease| lease.address).collect();
        all.retain(|(address, _)| leased.contains(address));
        if let Some(express) = &self.express {
            for (address, counters) in &mut all {
                let (packets, bytes) = express.counters(*address).map_err(Error::system("read the link's counters"))?;
                counters.sent_packets += packets;
                counters.sent_bytes += bytes;
            }
        }
        Ok(all)
    }

    /// Packets refused since the ruleset was made.
    pub fn refused_packets(&self) -> Result<u64> {
        self.run(|| {
            let mut socket = Socket::netfilter()?;
            let mut packets = 0;
            for family in Family::INET {
                for chain in Cause::chains() {
                    packets += nft::counted(&mut socket, TABLE, family, chain)?;
                }
            }
            Ok(packets)
        })?
    }

    /// How many connections are tracked, and how many can be.
    pub fn tracked_connections(&self) -> Result<(u64, u64)> {
        self.run(|| {
            let read = |name: &str| {
                let path = format!("/proc/sys/net/netfilter/{name}");
                let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
                Ok(text.trim().parse().unwrap_or(0))
            };
            Ok((read("nf_conntrack_count")?, read("nf_conntrack_max")?))
        })?
    }

    /// Begins to capture at the link of the workload with this address.
    pub fn capture(&self, address: Ipv4Addr) -> Result<Capture> {
        self.run(|| {
            let links = route::links(&mut Socket::route()?)?;
            let link = links.into_iter().find(|link| address_of_link(&link.name) == Some(address));
            let link = link.ok_or_else(|| Error::NoLink(address.to_string()))?;
            let socket = sys::packet_socket(link.index).map_err(Error::system("open a packet socket"))?;
            let detour = match &self.express {
                Some(express) => {
                    express.capture(address).map_err(Error::system("have packets pass by the link"))?;
                    Some((express.clone(), address))
                }
                None => None,
            };
            Ok(Capture { socket, buffer: vec![0; FRAME], detour })
        })?
    }
}

impl Capture {
    /// The next frame; `None` when none came for so long.
    pub fn next(&mut self, patience: Duration) -> Result<Option<Frame>> {
        let limit = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(Error::errno("wait for a frame")(errno)),
        }
        match rustix::io::read(&self.socket, &mut self.buffer[..]) {
            Ok(read) => {
                let bytes = self.buffer.get(..read).unwrap_or_default().to_vec();
                Ok(Some(Frame { at: SystemTime::now(), bytes }))
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(errno) => Err(Error::errno("receive a frame")(errno)),
        }
    }
}

/// The address that a link's name is made from.
fn address_of_link(name: &str) -> Option<Ipv4Addr> {
    let hex = name.strip_prefix(VETH_PREFIX).or_else(|| name.strip_prefix(TAP_PREFIX))?;
    (hex.len() == 8).then(|| u32::from_str_radix(hex, 16).ok().map(Ipv4Addr::from_bits))?
}

/// Ports of a frame's packet, source and destination; `None` if it has none, or is a later fragment.
pub fn ports(frame: &[u8]) -> Option<[u16; 2]> {
    let kind = frame.get(12..14)?;
    let packet = frame.get(14..)?;
    let (protocol, header) = match kind {
        [8, 0] => {
            let fragment = u16::from_be_bytes([*packet.get(6)? & 0x1f, *packet.get(7)?]);
            (*packet.get(9).filter(|_| fragment == 0)?, usize::from(packet.first()? & 15) * 4)
        }
        [0x86, 0xdd] => (*packet.get(6)?, 40),
        _ => return None,
    };
    if !matches!(protocol, 6 | 17 | 132) {
        return None;
    }
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    Some([port(header)?, port(header + 2)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_links_are_addresses() {
        let address = Ipv4Addr::new(10, 42, 1, 2);
        assert_eq!(address_of_link(&format!("{VETH_PREFIX}0a2a0102")), Some(address));
        assert_eq!(address_of_link(&format!("{TAP_PREFIX}0a2a0102")), Some(address));
        for other in ["lo", "void", VETH_PREFIX, &format!("{VETH_PREFIX}0a2a01022")] {
            assert_eq!(address_of_link(other), None, "{other}");
        }
    }

    #[test]
    fn ports_of_frames() {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x46, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1]);
        frame.extend([0x1f, 0x90, 0, 53]);
        assert_eq!(ports(&frame), Some([8080, 53]));
        frame[14 + 7] = 1;
        assert_eq!(ports(&frame), None, "a later fragment");
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..90)) {
            let _ = ports(&bytes);
        }
    }
}
