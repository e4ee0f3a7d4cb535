//! The role `atoll egress-relay`: workloads' way out through a process of its own, which changes nothing of the host.
//!
//! ```text
//! router's namespace                                   | host's namespace
//! workload -> policies -> link `relay` (tun) -- SYN ---> connect --+
//!                            <-- RST or ICMP, or the SYN again ----+ connected
//! workload <== TCP ==> listener on loopback (tproxy) == splice ==> socket
//! workload -> policies -> link `relay` (tun) -- UDP, ping -------> socket
//! ```
//!
//! What the policies let out comes by a tun device. A connection is made outside first; only then the workload's SYN is
//! written back into the namespace, where `tproxy` hands it to our listener. So a refusal outside is a refusal inside, and
//! bytes are moved by the kernel from one socket to the other. UDP and pings are read and written as packets.
//!
//! The role opens the device, its listeners and a netlink socket as root, then becomes a user of its own, without
//! capabilities or files, under seccomp. It looks at each destination again: what is inside, or one of the host's own
//! addresses, it does not connect to. It outlives `atoll up`, and ends when its link is removed.

mod control;
mod flows;
mod jail;
mod packet;
mod tcp;

use crate::error::{Error, Result};
use crate::netlink::{Socket, rules};
use crate::policy::Ranges;
use crate::uplink::RELAY;
use crate::{ns, sys};
use control::Control;
pub(crate) use control::socket_path as control_path;
use flows::Flows;
use rustix::event::epoll;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tcp::Connections;

/// For fuzz targets: reads what workloads send.
pub fn fuzz_packet(bytes: &[u8]) {
    if let Some(packet) = packet::parse(bytes) {
        let _ = (packet.ends(), packet.flags(), packet::reset(&packet));
        let _ = packet::Reassembly::default().add(&packet);
        let _ = packet::unreachable(bytes, packet::Why::Port);
    }
}

/// Where the listeners are, on the router's loopback.
pub(crate) const PORT: u16 = 15001;
/// Marks packets that are for them.
pub(crate) const MARK: u32 = 0x6174_6f6c;
/// Marks what they send.
pub(crate) const OWN_MARK: u32 = 0x6174_6f6d;
/// What the role says once it serves.
pub(crate) const READY: &[u8] = b"ready\n";
/// Goes up with every change of what it does or is told.
const VERSION: u32 = 1;

const FLOWS: usize = 4096;
const CONNECTIONS: usize = 16_384;
/// Descriptors of a connection at most: two sockets, two pipes.
const EACH: usize = 6;
const SPARE: usize = 256;
const BACKLOG: i32 = 4096;
/// Packets read before sockets have their turn.
const PACKETS: usize = 128;
const EVENTS: usize = 256;
const SWEEP: Duration = Duration::from_secs(1);

/// What the role is started with, as its one argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub run_dir: PathBuf,
    /// Where the router's namespace is pinned. The host's is the standard input.
    pub netns: PathBuf,
    /// Inode of the host's.
    pub host: u64,
    pub uid: u32,
    /// Addresses that are not outside.
    pub inside4: Vec<(Ipv4Addr, Ipv4Addr)>,
    pub inside6: Vec<(Ipv6Addr, Ipv6Addr)>,
}

impl Settings {
    /// How a role that runs with these introduces itself.
    pub fn hello(&self) -> String {
        format!("atoll egress-relay {VERSION} {}", serde_json::to_string(self).unwrap_or_default())
    }
}

/// Entry of `atoll egress-relay SETTINGS`; its standard input is the host's network namespace.
pub fn main(args: &[String]) -> i32 {
    let settings = match args {
        [text] => serde_json::from_str::<Settings>(text).ok(),
        _ => None,
    };
    let Some(settings) = settings else {
        eprintln!("usage: atoll egress-relay SETTINGS (started by atoll up)");
        return 2;
    };
    match Relay::start(&settings).and_then(Relay::run) {
        Ok(()) => 0,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                text.push_str(&format!(": {inner}"));
                source = inner.source();
            }
            eprintln!("{text}");
            1
        }
    }
}

/// Which of a connection's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Inner = 0,
    Outer = 1,
}

/// What a descriptor is, as epoll gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Link,
    Listener(usize),
    ControlListener,
    Control,
    Connection(u64, Side),
    Flow(u64),
}

impl Token {
    fn data(self) -> u64 {
        match self {
            Token::Link => 0,
            Token::Listener(index) => 1 + ((index as u64) << 3),
            Token::ControlListener => 2,
            Token::Control => 3,
            Token::Connection(id, side) => 4 + side as u64 + (id << 3),
            Token::Flow(id) => 6 + (id << 3),
        }
    }
    fn of(data: u64) -> Token {
        let id = data >> 3;
        match data & 7 {
            0 => Token::Link,
            1 => Token::Listener(id as usize),
            2 => Token::ControlListener,
            3 => Token::Control,
            4 => Token::Connection(id, Side::Inner),
            5 => Token::Connection(id, Side::Outer),
            _ => Token::Flow(id),
        }
    }
}

/// Why a destination cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Refused,
    Forbidden,
    NoRoute,
    Unreachable,
}

impl Cause {
    fn of(errno: Errno) -> Cause {
        match errno {
            Errno::CONNREFUSED | Errno::CONNRESET => Cause::Refused,
            Errno::NETUNREACH | Errno::AFNOSUPPORT => Cause::NoRoute,
            Errno::ACCESS | Errno::PERM => Cause::Forbidden,
            _ => Cause::Unreachable,
        }
    }
}

/// Where workloads may be led to, and as whom.
struct Allowance {
    inside: Ranges,
    /// rtnetlink in the host's namespace.
    routes: Socket,
    sources: BTreeMap<IpAddr, IpAddr>,
}

impl Allowance {
    /// Whether an address is outside, by a link of the host's as it is now.
    fn check(&mut self, to: IpAddr) -> std::result::Result<(), Cause> {
        if self.inside.contains(to) {
            return Err(Cause::Forbidden);
        }
        match rules::leads_out(&mut self.routes, to) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Cause::Forbidden),
            Err(_) => Err(Cause::NoRoute),
        }
    }

    /// Gives a socket the source that the workload has outside, if it is not the host's choice.
    fn bind(&self, socket: &OwnedFd, workload: IpAddr) -> std::result::Result<(), Cause> {
        let Some(source) = self.sources.get(&workload) else { return Ok(()) };
        let no_port = sys::set_option(socket.as_fd(), libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
        let bound = rustix::net::bind(socket, &SocketAddr::new(*source, 0));
        no_port.map_err(|_| Cause::Unreachable).and(bound.map_err(|_| Cause::Unreachable))
    }
}

/// What all parts write to.
struct Links {
    epoll: OwnedFd,
    tun: OwnedFd,
    now: Instant,
}

impl Links {
    fn watch(&self, fd: &OwnedFd, token: Token) -> std::result::Result<(), Cause> {
        let flags = match token {
            Token::Connection(..) => {
                epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
            }
            _ => epoll::EventFlags::IN,
        };
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.data()), flags).map_err(Cause::of)
    }
    /// A packet into the router's namespace. What it does not take is lost.
    fn write(&mut self, packet: &[u8]) {
        let _ = rustix::io::write(&self.tun, packet);
    }
}

struct Relay {
    links: Links,
    listeners: Vec<OwnedFd>,
    control: Control,
    allowance: Allowance,
    connections: Connections,
    flows: Flows,
    swept: Instant,
}

impl Relay {
    fn start(settings: &Settings) -> Result<Relay> {
        let host = std::io::stdin().as_fd().try_clone_to_owned().map_err(Error::system("take over the namespace"))?;
        ns::enter(ns::open(&settings.netns)?.as_fd())?;
        let tun = sys::tap_open().map_err(Error::file("open", "/dev/net/tun"))?;
        sys::tun_bind(tun.as_fd(), RELAY).map_err(Error::system("take the relay's link"))?;
        let mut listeners = vec![listener(Ipv4Addr::LOCALHOST.into())?];
        // A kernel without IPv6 has no other.
        listeners.extend(listener(Ipv6Addr::LOCALHOST.into()));
        ns::enter(host.as_fd())?;
        drop(host);
        let routes = Socket::route()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::errno("make an epoll set"))?;
        let control = Control::listen(settings)?;
        let _ = rustix::process::setsid();
        let links = Links { epoll, tun, now: Instant::now() };
        let failed = |_| Error::System { operation: "watch a descriptor", source: Errno::NOSPC.into() };
        links.watch(&links.tun, Token::Link).map_err(failed)?;
        for (index, listener) in listeners.iter().enumerate() {
            links.watch(listener, Token::Listener(index)).map_err(failed)?;
        }
        links.watch(control.listener(), Token::ControlListener).map_err(failed)?;
        let descriptors = getrlimit(Resource::Nofile).maximum.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(0));
        jail::enter(&settings.run_dir, settings.uid)?;
        let (v4, v6) = (settings.inside4.clone(), settings.inside6.clone());
        let relay = Relay {
            allowance: Allowance { inside: Ranges { v4, v6 }, routes, sources: BTreeMap::new() },
            connections: Connections::new((descriptors.saturating_sub(FLOWS + SPARE) / EACH).clamp(16, CONNECTIONS)),
            flows: Flows::new(FLOWS.min(descriptors / 4)),
            swept: links.now,
            links,
            listeners,
            control,
        };
        let mut out = std::io::stdout();
        out.write_all(READY).and_then(|()| out.flush()).map_err(Error::system("report"))?;
        Ok(relay)
    }

    fn run(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        let mut packets = vec![0; 66 << 10];
        loop {
            let timeout = match (self.connections.has_ready(), self.connections.is_empty() && self.flows.is_empty()) {
                (true, _) => Some(rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }),
                (false, false) => Some(rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 }),
                (false, true) => None,
            };
            events.clear();
            match epoll::wait(&self.links.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::errno("wait for events")(errno)),
            }
            self.links.now = Instant::now();
            for event in &events {
                let flags = event.flags;
                match Token::of(event.data.u64()) {
                    Token::Link => {
                        if !self.read_link(&mut packets) {
                            return Ok(());
                        }
                    }
                    Token::Listener(index) => self.accept(index),
                    Token::ControlListener => self.control.accept(&self.links),
                    Token::Control => self.told(),
                    Token::Connection(id, side) => self.connections.event(id, side, flags, &mut self.links),
                    Token::Flow(id) => {
                        self.flows.event(id, &mut self.links);
                    }
                }
            }
            self.connections.go_on();
            if self.links.now.duration_since(self.swept) >= SWEEP {
                self.swept = self.links.now;
                self.connections.sweep(&mut self.links);
                self.flows.sweep(self.links.now);
            }
        }
    }

    /// False when the link has gone.
    fn read_link(&mut self, buffer: &mut [u8]) -> bool {
        for _ in 0..PACKETS {
            let length = match rustix::io::read(&self.links.tun, &mut *buffer) {
                Ok(length) => length,
                Err(Errno::AGAIN | Errno::INTR) => return true,
                Err(_) => return false,
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            match packet::parse(bytes).map(|packet| packet.protocol) {
                Some(packet::TCP) => self.connections.opening(bytes, &mut self.links, &mut self.allowance),
                Some(_) => self.flows.outward(bytes, &mut self.links, &mut self.allowance),
                None => {}
            }
        }
        true
    }

    fn accept(&mut self, index: usize) {
        let Some(listener) = self.listeners.get(index) else { return };
        for _ in 0..PACKETS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Ok((socket, Some(peer))) = rustix::net::acceptfrom_with(listener, flags) else { return };
            if let Ok(peer) = SocketAddr::try_from(peer) {
                self.connections.accepted(socket, peer, &mut self.links);
            }
        }
    }

    /// Workloads' sources are these now; what leaves with another ends.
    fn told(&mut self) {
        if let Some(sources) = self.control.read() {
            let old = std::mem::replace(&mut self.allowance.sources, sources);
            let new = &self.allowance.sources;
            let stale = old.keys().chain(new.keys()).filter(|w| old.get(w) != new.get(w)).copied().collect();
            self.connections.end_where(&stale);
            self.flows.end_where(&stale);
        }
    }
}

fn listener(address: IpAddr) -> Result<OwnedFd> {
    let make = || -> std::io::Result<OwnedFd> {
        let (family, level, option) = match address {
            IpAddr::V4(_) => (AddressFamily::INET, libc::IPPROTO_IP, libc::IP_TRANSPARENT),
            IpAddr::V6(_) => (AddressFamily::INET6, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        sys::set_option(socket.as_fd(), level, option, 1)?;
        sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, OWN_MARK as i32)?;
        rustix::net::bind(&socket, &SocketAddr::new(address, PORT))?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    make().map_err(Error::system("listen for the relay's connections"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back() {
        for token in [
            Token::Link,
            Token::Listener(0),
            Token::Listener(1),
            Token::ControlListener,
            Token::Control,
            Token::Connection(7, Side::Inner),
            Token::Connection(u64::MAX >> 3, Side::Outer),
            Token::Flow(9),
        ] {
            assert_eq!(Token::of(token.data()), token);
        }
    }
}
