//! A network card on a tap. Only frames from the machine's own hardware and network addresses leave it.

use super::Device;
use super::queue::{self, Segment};
use super::worker::Io;
use crate::kvm::Fault;
use crate::kvm::sys;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const MERGEABLE: u64 = 1 << 15;

const TUN_CSUM: u32 = 1;
const TUN_TSO4: u32 = 2;
const TUN_TSO6: u32 = 4;

const RECEIVE: usize = 0;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// The largest frame there can be with segmentation offload, and its header.
const MOST: usize = 65_550 + HEADER;

pub struct Net {
    tap: File,
    mac: [u8; 6],
    mtu: u16,
    filter: Filter,
    buffer: Vec<u8>,
    /// A frame that found no room in the guest.
    waiting: Option<usize>,
    mergeable: bool,
}

/// Whose frames may leave.
#[derive(Clone, Debug)]
pub struct Filter {
    pub mac: [u8; 6],
    /// Empty: any.
    pub addresses: Vec<IpAddr>,
}

impl Filter {
    /// Whether this Ethernet frame is from who the machine is.
    pub fn passes(&self, frame: &[u8]) -> bool {
        let Some((head, body)) = frame.split_at_checked(14) else { return false };
        if head.get(6..12) != Some(&self.mac) {
            return false;
        }
        if self.addresses.is_empty() {
            return true;
        }
        let at = |from: usize, len: usize| body.get(from..from + len);
        match head.get(12..14) {
            // IPv4; 0.0.0.0 asks for an address
            Some([8, 0]) => at(12, 4).is_some_and(|a| a == [0; 4] || self.is_v4(a)),
            // ARP: who says it is where
            Some([8, 6]) => at(8, 6) == Some(&self.mac) && at(14, 4).is_some_and(|a| a == [0; 4] || self.is_v4(a)),
            // IPv6; link-local and unspecified ones are how neighbours and routers are found
            Some([0x86, 0xdd]) => {
                at(8, 16).is_some_and(|a| a == [0; 16] || a.starts_with(&[0xfe, 0x80]) || self.is_v6(a))
            }
            // tagged and unknown frames could carry anything
            _ => false,
        }
    }

    fn is_v4(&self, bytes: &[u8]) -> bool {
        self.addresses.iter().any(|a| matches!(a, IpAddr::V4(a) if a.octets() == bytes))
    }
    fn is_v6(&self, bytes: &[u8]) -> bool {
        self.addresses.iter().any(|a| matches!(a, IpAddr::V6(a) if a.octets() == bytes))
    }
}

impl Net {
    /// `tap`: with `IFF_VNET_HDR`, non-blocking.
    pub fn new(tap: OwnedFd, filter: Filter, mtu: u16) -> io::Result<Self> {
        sys::tap_header(&tap, HEADER as i32)?;
        Ok(Self::on(tap.into(), filter, mtu))
    }

    /// On what speaks as such a tap does: frames with their headers.
    pub(super) fn on(tap: File, filter: Filter, mtu: u16) -> Self {
        let (mac, buffer) = (filter.mac, vec![0; MOST]);
        Net { tap, mac, mtu, filter, buffer, waiting: None, mergeable: false }
    }

    /// Puts the frame in the buffer into the guest; false if there is no room for it now.
    fn deliver(&mut self, length: usize, io: &mut Io) -> Result<bool, Fault> {
        let Some(frame) = self.buffer.get_mut(..length) else { return Ok(true) };
        let mut taken: Vec<(u16, Vec<Segment>)> = Vec::new();
        let mut room = 0;
        while room < length && (taken.is_empty() || self.mergeable) {
            let Some(chain) = io.take(RECEIVE)? else { break };
            room += queue::length(&chain.writable) as usize;
            taken.push((chain.head, chain.writable));
        }
        if room < length && (taken.is_empty() || self.mergeable) {
            for _ in &taken {
                io.untake(RECEIVE)?;
            }
            return Ok(false);
        }
        if let Some(count) = frame.get_mut(10..12) {
            count.copy_from_slice(&(taken.len() as u16).to_le_bytes());
        }
        let mut done = 0;
        // one too small for a frame without merging loses it
        let fits = room >= length;
        for (head, segments) in taken {
            let rest = if fits { frame.get(done..).unwrap_or_default() } else { &[] };
            let written = queue::scatter(&io.memory, &segments, rest)?;
            io.finish(RECEIVE, head, written as u32)?;
            done += written;
        }
        Ok(true)
    }

    fn send(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        let mut frame = vec![0u8; MOST];
        while let Some(chain) = io.take(index)? {
            let length = queue::length(&chain.readable) as usize;
            if length < HEADER {
                return Err(Fault(format!("chain {}: a frame of {length} bytes", chain.head)));
            }
            let n = queue::gather(&io.memory, &chain.readable, &mut frame)?;
            let whole = frame.get(..n).filter(|_| n == length);
            let allowed = whole.filter(|f| f.get(HEADER..).is_some_and(|f| self.filter.passes(f)));
            if let Some(bytes) = allowed {
                // a full or downed link loses frames
                let _ = self.tap.write(bytes);
            }
            io.finish(index, chain.head, 0)?;
        }
        io.notify(index)
    }
}

impl Device for Net {
    fn name(&self) -> &'static str {
        "net"
    }
    fn id(&self) -> u32 {
        1
    }
    fn features(&self) -> u64 {
        CSUM | GUEST_CSUM | MTU | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MERGEABLE
    }
    fn queues(&self) -> &'static [u16] {
        &[256, 256]
    }
    /// MAC, status, number of queue pairs, MTU.
    fn config(&self) -> (Vec<u8>, usize) {
        let config = [&self.mac[..], &[1, 0], &[1, 0], &self.mtu.to_le_bytes()].concat();
        (config, 0)
    }
    fn begin(&mut self, features: u64) -> io::Result<()> {
        let takes = |bit: u64, flag: u32| if features & bit != 0 { flag } else { 0 };
        let checksum = takes(GUEST_CSUM, TUN_CSUM);
        let segments = if checksum == 0 { 0 } else { takes(GUEST_TSO4, TUN_TSO4) | takes(GUEST_TSO6, TUN_TSO6) };
        self.mergeable = features & MERGEABLE != 0;
        self.waiting = None;
        sys::tap_offloads(&OwnedFd::from(self.tap.try_clone()?), checksum | segments)
    }
    fn drains(&self, index: usize) -> bool {
        index != RECEIVE
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        if index != RECEIVE {
            return self.send(index, io);
        }
        if let Some(length) = self.waiting
            && self.deliver(length, io)?
        {
            self.waiting = None;
            io.notify(RECEIVE)?;
        }
        Ok(())
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }
    fn wants_source(&self) -> bool {
        self.waiting.is_none()
    }
    fn ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        // so many at a time that sending is not starved
        for _ in 0..64 {
            match self.tap.read(&mut self.buffer) {
                Ok(n) if n > HEADER => {
                    if !self.deliver(n, io)? {
                        self.waiting = Some(n);
                        break;
                    }
                }
                _ => break,
            }
        }
        io.notify(RECEIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn frame(mac: [u8; 6], kind: [u8; 2], body: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &mac, &kind, body].concat()
    }
    fn v4(source: [u8; 4]) -> Vec<u8> {
        [&[0x45; 12][..], &source, &[0; 4]].concat()
    }

    #[test]
    fn only_its_own_addresses_leave() {
        let filter = Filter { mac: MAC, addresses: vec!["10.42.0.7".parse().unwrap()] };
        let arp = |mac: [u8; 6], ip: [u8; 4]| [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &ip, &[0; 10]].concat();
        let v6 = |source: [u8; 16]| [&[0x60; 8][..], &source, &[0; 16]].concat();
        let cases = [
            (frame(MAC, [8, 0], &v4([10, 42, 0, 7])), true),
            (frame(MAC, [8, 0], &v4([0; 4])), true),
            (frame(MAC, [8, 0], &v4([10, 42, 0, 8])), false),
            (frame([2, 0, 0, 0, 0, 2], [8, 0], &v4([10, 42, 0, 7])), false),
            (frame(MAC, [8, 6], &arp(MAC, [10, 42, 0, 7])), true),
            (frame(MAC, [8, 6], &arp(MAC, [169, 254, 1, 1])), false),
            (frame(MAC, [8, 6], &arp([2; 6], [10, 42, 0, 7])), false),
            (frame(MAC, [0x81, 0], &v4([10, 42, 0, 7])), false),
            (frame(MAC, [0x86, 0xdd], &v6([0xfe; 16])), false),
            (frame(MAC, [0x86, 0xdd], &v6([0; 16])), true),
            (frame(MAC, [8, 0], &[0x45; 15]), false),
            (vec![0; 13], false),
            (Vec::new(), false),
        ];
        for (index, (frame, passes)) in cases.iter().enumerate() {
            assert_eq!(filter.passes(frame), *passes, "{index}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_frame_makes_the_filter_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..100)) {
            let _ = Filter { mac: MAC, addresses: vec!["::1".parse().unwrap()] }.passes(&bytes);
        }
    }
}
