//! Packets that the ruleset refused, as the kernel tells them through NFLOG (`linux/netfilter/nfnetlink_log.h`): a thread
//! reads their headers and keeps the newest. The kernel tells a bounded number a second, so nobody can flood it.

use crate::error::{Error, Result};
use crate::firewall::LOG_GROUP;
use crate::limits::Cause;
use crate::netlink::parse::{Attributes, Messages, text};
use crate::netlink::{Batch, Socket};
use crate::policy::Flow;
use crate::router::Router;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

const SUBSYSTEM: u16 = 4 << 8;
const PACKET: u16 = 0;
const CONFIG: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Refusals that are kept.
const KEPT: usize = 2048;

/// One refused packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Counts from 1.
    pub number: u64,
    pub at: SystemTime,
    pub flow: Flow,
    pub cause: Cause,
}

/// Collects until it is dropped.
pub struct RefusedLog {
    kept: Arc<Mutex<VecDeque<Refused>>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl RefusedLog {
    pub fn start(router: &Router) -> Result<RefusedLog> {
        let mut socket = router.run(Socket::netfilter)??;
        let mut batch = Batch::new();
        let mut configure = |attribute, value: &[u8]| {
            batch.request("listen to refused packets", SUBSYSTEM | CONFIG, NLM_F_ACK, &[], |w| {
                w.raw(&[0, 0]);
                w.raw(&LOG_GROUP.to_be_bytes());
                w.attr(attribute, value);
            });
        };
        // Bind; copy the packet's beginning.
        configure(1, &[1]);
        configure(2, &[0, 0, 0, 128, 2, 0]);
        socket.send(batch)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(Error::errno("make an event descriptor"))?);
        let kept: Arc<Mutex<VecDeque<Refused>>> = Arc::default();
        let (its_stop, its_kept) = (stop.clone(), kept.clone());
        let thread = std::thread::Builder::new()
            .name("atoll-refused".into())
            .spawn(move || collect(&mut socket, &its_stop, &its_kept))
            .map_err(Error::system("start a thread"))?;
        Ok(RefusedLog { kept, stop, thread: Some(thread) })
    }

    /// Those kept with a number above `after`, oldest first.
    pub fn since(&self, after: u64) -> Vec<Refused> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter(|refused| refused.number > after).copied().collect()
    }
}

impl Drop for RefusedLog {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn collect(socket: &mut Socket, stop: &OwnedFd, kept: &Mutex<VecDeque<Refused>>) {
    let mut number = 0;
    loop {
        {
            let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) if !fds[1].revents().is_empty() => return,
                Ok(_) => {}
            }
        }
        // Some lost for want of room are no reason to stop.
        let _ = socket.receive(|bytes| {
            for (flow, cause) in Messages::new(bytes).filter_map(|message| {
                (message.kind == SUBSYSTEM | PACKET).then(|| packet(message.payload.get(4..)?)).flatten()
            }) {
                number += 1;
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() >= KEPT {
                    kept.pop_front();
                }
                kept.push_back(Refused { number, at: SystemTime::now(), flow, cause });
            }
        });
    }
}

fn packet(attributes: &[u8]) -> Option<(Flow, Cause)> {
    const PAYLOAD: u16 = 9;
    const PREFIX: u16 = 10;
    let word = Attributes::get(attributes, PREFIX).map(text).unwrap_or_default();
    Some((flow(Attributes::get(attributes, PAYLOAD)?)?, Cause::of_word(word)))
}

/// Addresses, protocol and destination port of a packet's beginning. Behind IPv6 extension headers, which the router lets
/// nobody have, there is no port.
pub fn flow(packet: &[u8]) -> Option<Flow> {
    let first = *packet.first()?;
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
    let (source, destination, protocol, header) = match first >> 4 {
        4 => (v4(12)?, v4(16)?, *packet.get(9)?, usize::from(first & 15) * 4),
        6 => (v6(8)?, v6(24)?, *packet.get(6)?, 40),
        _ => return None,
    };
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let port = packet.get(header + 2..header + 4).filter(|_| has_ports).and_then(|bytes| bytes.try_into().ok());
    Some(Flow { source, destination, protocol, port: port.map_or(0, u16::from_be_bytes) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let _ = super::flow(&bytes);
            let _ = super::packet(&bytes);
        }
    }
}
