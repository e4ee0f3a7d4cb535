//! Ports of the host that lead to workloads: listening sockets in the host's network namespace, and a relay that hands
//! what comes there to sockets made in the router's. Nothing of the host is changed, and nothing stays when the process
//! ends.
//!
//! ```text
//! client ---> [listening socket, host]  relay  [socket with the client's address, router] ---> endpoint
//! ```
//!
//! The relay's sockets have the client's own address (`IP_TRANSPARENT`), so workloads see who it is and policies judge the
//! connection as one from outside: its packets carry a mark that leads them through chain `ingress`, and answers back
//! (`firewall.rs`, `router.rs`). Whoever connects on the host itself is the node, which reaches every workload.
//!
//! One thread does it all ([`reactor`]); bytes are moved by splice(2) without being copied. It is started with the first
//! port. Everything is bounded: connections, datagram sessions, and each port's share of them.

mod datagram;
mod health;
mod reactor;
mod sctp;
mod slots;
mod stream;

use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::ns;
use crate::policy::Ranges;
use crate::router::{Leased, Router};
use crate::services::Protocol;
use crate::sys;
use reactor::{Command, Mailbox};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Connections that wait to be accepted at one port.
const BACKLOG: i32 = 1024;

/// One port of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exposure {
    /// Of the Service that it belongs to.
    pub namespace: String,
    pub name: String,
    /// An address of the host, or the unspecified one for all of a family.
    pub listen: SocketAddr,
    /// SCTP only where the kernel does not speak it itself.
    pub protocol: Protocol,
    pub leads: Leads,
    /// Who may connect; empty: anyone.
    pub sources: Ranges,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leads {
    /// To one of these, of the address's family. `sticky`: always the same for one client, as long as it is there.
    To { endpoints: Vec<(IpAddr, u16)>, sticky: bool },
    /// Nowhere: HTTP requests are told how many endpoints there are here, as by kube-proxy.
    Health { endpoints: usize },
}

impl Exposure {
    fn key(&self) -> Key {
        (self.listen, self.protocol)
    }

    fn endpoints(&self) -> &[(IpAddr, u16)] {
        match &self.leads {
            Leads::To { endpoints, .. } => endpoints,
            Leads::Health { .. } => &[],
        }
    }

    /// Where this client's next connection goes. `turn` goes up with every one.
    fn pick(&self, client: IpAddr, turn: usize) -> Option<(IpAddr, u16)> {
        let Leads::To { endpoints, sticky } = &self.leads else { return None };
        if *sticky {
            // The highest of all pairs' hashes: an endpoint that comes or goes moves no other's clients.
            let weight = |endpoint: &&(IpAddr, u16)| {
                let mut hasher = DefaultHasher::new();
                (client, endpoint).hash(&mut hasher);
                hasher.finish()
            };
            return endpoints.iter().max_by_key(weight).copied();
        }
        endpoints.get(turn.checked_rem(endpoints.len())?).copied()
    }

    /// Whether this client may connect.
    pub fn admits(&self, client: IpAddr) -> bool {
        (self.sources.v4.is_empty() && self.sources.v6.is_empty()) || self.sources.contains(client)
    }
}

/// What a raw socket hears, given other ports.
pub fn fuzz_sctp(data: &[u8]) {
    for v6 in [false, true] {
        let mut heard = data.to_vec();
        let Some(packet) = sctp::packet(&mut heard, v6) else { continue };
        let length = packet.len();
        sctp::readdress(packet, 1, 2);
        assert!(sctp::ports(packet) == Some((1, 2)));
        assert!(heard.ends_with(data.get(data.len() - length + 12..).unwrap_or_default()));
    }
}

type Key = (SocketAddr, Protocol);

fn is_sctp(exposure: &Exposure) -> bool {
    exposure.protocol == Protocol::Sctp
}

const SCTP_OF_KERNEL: &str = "this host's kernel speaks SCTP itself (module sctp) and refuses what comes for others: unload that, or use the ClusterIP";

/// Whom a connection is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The host itself.
    Node,
    Client(IpAddr),
    /// Nobody whom an answer could reach: a link's, a group's, or a workload's address.
    Nobody,
}

impl Origin {
    /// `local`: the address of the host that it was sent to.
    fn of(config: &RouterConfig, peer: IpAddr, local: Option<IpAddr>) -> Origin {
        match peer {
            _ if peer.is_loopback() || Some(peer) == local => Origin::Node,
            _ if config.is_foreign(peer) => Origin::Client(peer),
            _ => Origin::Nobody,
        }
    }
}

/// The ports that are open. Dropping it closes them and ends their connections.
pub struct Exposer {
    host: OwnedFd,
    open: BTreeMap<Key, Arc<Exposure>>,
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    router: OwnedFd,
    config: RouterConfig,
}

/// A port that could not be opened.
#[derive(Debug)]
pub struct NotOpen {
    pub exposure: Exposure,
    pub why: io::Error,
}

impl Exposer {
    /// For ports in the network namespace `host`. Nothing is open yet.
    pub fn new(router: &Router, host: OwnedFd) -> Result<Exposer> {
        let config = router.config().clone();
        let router = rustix::io::dup(&router.netns).map_err(Error::errno("duplicate the namespace's descriptor"))?;
        let mailbox = Arc::new(Mailbox::new().map_err(Error::system("make an event descriptor"))?);
        Ok(Exposer { host, open: BTreeMap::new(), mailbox, thread: None, router, config })
    }

    /// The same, with the namespace named by a path.
    pub fn open(router: &Router, host: &Path) -> Result<Exposer> {
        Exposer::new(router, ns::open(host)?)
    }

    /// Makes the open ports exactly these. A port that stays keeps its connections, but those that it would not take any
    /// more. Endpoints that are no workloads of the Service's namespace are left out: whoever may write endpoints opens
    /// nobody else's. Answers the ports that are not open, each with the reason; a later call tries them again.
    pub fn sync(&mut self, router: &Router, mut wanted: Vec<Exposure>) -> Result<Vec<NotOpen>> {
        keep_own_endpoints(router, &mut wanted);
        let (mut keys, mut new, mut failed) = (HashSet::new(), Vec::new(), Vec::new());
        if wanted.iter().any(is_sctp) && sctp::kernel_has_its_own() {
            let refused = wanted.extract_if(.., |exposure| is_sctp(exposure));
            failed.extend(refused.map(|exposure| NotOpen { exposure, why: io::Error::other(SCTP_OF_KERNEL) }));
        }
        let mut changed = Vec::new();
        for exposure in wanted {
            let key = exposure.key();
            if !keys.insert(key) {
                failed.push(NotOpen { exposure, why: io::Error::other("another Service has this port") });
            } else if !self.open.contains_key(&key) {
                new.push(exposure);
            } else if self.open.get(&key).is_some_and(|old| **old != exposure) {
                changed.push(Arc::new(exposure));
            }
        }
        let gone: Vec<Key> = self.open.keys().filter(|key| !keys.contains(*key)).copied().collect();
        let mut commands: Vec<Command> = gone.iter().map(|key| Command::Close(*key)).collect();
        for exposure in changed {
            self.open.insert(exposure.key(), exposure.clone());
            commands.push(Command::Change(exposure));
        }
        for key in gone {
            self.open.remove(&key);
        }
        // What is closed frees ports that may be opened next.
        self.mailbox.post(commands);
        if new.is_empty() {
            return Ok(failed);
        }
        self.start()?;
        let opened = ns::in_ns(self.host.as_fd(), || {
            new.into_iter().map(|exposure| (bind(&exposure), exposure)).collect::<Vec<_>>()
        })?;
        let mut commands = Vec::new();
        for (socket, exposure) in opened {
            match socket {
                Ok(socket) => {
                    let exposure = Arc::new(exposure);
                    self.open.insert(exposure.key(), exposure.clone());
                    commands.push(Command::Open(exposure, socket));
                }
                Err(why) => failed.push(NotOpen { exposure, why }),
            }
        }
        self.mailbox.post(commands);
        Ok(failed)
    }

    /// The thread lives in the router's namespace, and so do the sockets that it makes.
    fn start(&mut self) -> Result<()> {
        if self.thread.is_some() {
            return Ok(());
        }
        let (mailbox, config) = (self.mailbox.clone(), self.config.clone());
        self.thread = Some(ns::in_ns(self.router.as_fd(), || reactor::spawn(mailbox, config))??);
        Ok(())
    }
}

impl Drop for Exposer {
    fn drop(&mut self) {
        self.mailbox.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn keep_own_endpoints(router: &Router, wanted: &mut [Exposure]) {
    if wanted.is_empty() {
        return;
    }
    let leases = router.leases();
    let both = |lease: &Leased| [lease.address.into(), router.config().v6_of(lease.address).into()];
    let owners: HashMap<IpAddr, &str> =
        leases.iter().flat_map(|lease| both(lease).map(|address| (address, &*lease.namespace))).collect();
    for exposure in wanted {
        if let Leads::To { endpoints, .. } = &mut exposure.leads {
            endpoints.retain(|(address, _)| owners.get(address) == Some(&&*exposure.namespace));
        }
    }
}

/// In the thread's namespace.
fn bind(exposure: &Exposure) -> io::Result<OwnedFd> {
    let v6 = exposure.listen.is_ipv6();
    let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket(family, exposure.protocol)?;
    // A raw socket is of one family.
    if v6 && !is_sctp(exposure) {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    match exposure.protocol {
        Protocol::Tcp => {
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &exposure.listen)?;
            rustix::net::listen(&socket, BACKLOG)?;
        }
        Protocol::Udp | Protocol::Sctp => {
            let mut listen = exposure.listen;
            if is_sctp(exposure) {
                sctp::hear_only(socket.as_fd(), v6, None, listen.port())?;
                listen.set_port(0);
            }
            rustix::net::bind(&socket, &listen)?;
            if exposure.listen.ip().is_unspecified() {
                sys::datagram::tell_local_address(socket.as_fd(), v6)?;
            }
        }
    }
    Ok(socket)
}

fn socket(family: AddressFamily, protocol: Protocol) -> io::Result<OwnedFd> {
    let (kind, number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, None),
        Protocol::Udp => (SocketType::DGRAM, None),
        Protocol::Sctp => (SocketType::RAW, Some(ipproto::SCTP)),
    };
    Ok(rustix::net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, number)?)
}

/// A socket in the thread's namespace that is connected, or about to be, in the name of whoever it is from.
fn connect(protocol: Protocol, origin: Origin, mut to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket(family, protocol)?;
    match origin {
        Origin::Node => {}
        Origin::Client(address) => {
            sys::speak_for_others(socket.as_fd(), to.is_ipv6(), crate::firewall::RELAYED)?;
            rustix::net::bind(&socket, &SocketAddr::new(address, 0))?;
        }
        Origin::Nobody => return Err(io::ErrorKind::AddrNotAvailable.into()),
    }
    if protocol == Protocol::Sctp {
        to.set_port(0);
    }
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposure(endpoints: &[&str], sticky: bool) -> Exposure {
        let endpoints = endpoints.iter().map(|text| (text.parse().unwrap(), 80)).collect();
        Exposure {
            namespace: "shop".into(),
            name: "web".into(),
            listen: "127.0.0.1:30080".parse().unwrap(),
            protocol: Protocol::Tcp,
            leads: Leads::To { endpoints, sticky },
            sources: Ranges::default(),
        }
    }

    #[test]
    fn a_client_stays_with_its_endpoint_while_it_is_there() {
        let clients: Vec<IpAddr> = (0..200).map(|n| IpAddr::from([203, 0, 113, n])).collect();
        let all = exposure(&["10.42.0.3", "10.42.0.4", "10.42.0.5"], true);
        let fewer = exposure(&["10.42.0.3", "10.42.0.5"], true);
        let mut counts = BTreeMap::new();
        for client in clients {
            let first = all.pick(client, 0).unwrap();
            *counts.entry(first).or_insert(0) += 1;
            assert_eq!(all.pick(client, 1), Some(first));
            let gone = first.0 == "10.42.0.4".parse::<IpAddr>().unwrap();
            assert!(gone || fewer.pick(client, 7) == Some(first));
        }
        assert!(counts.len() == 3 && counts.values().all(|count| *count > 30), "{counts:?}");
        assert_eq!(exposure(&[], true).pick([203, 0, 113, 1].into(), 0), None);
    }

    #[test]
    fn others_are_spread_in_turn() {
        let all = exposure(&["10.42.0.3", "10.42.0.4"], false);
        let client = [203, 0, 113, 1].into();
        let picked: Vec<String> = (0..4).filter_map(|turn| Some(all.pick(client, turn)?.0.to_string())).collect();
        assert_eq!(picked, ["10.42.0.3", "10.42.0.4", "10.42.0.3", "10.42.0.4"]);
        assert_eq!(exposure(&[], false).pick(client, 0), None);
    }

    #[test]
    fn who_a_connection_is_from() {
        let config = RouterConfig::new("/x", "/y");
        let local: Option<IpAddr> = Some([192, 0, 2, 1].into());
        for (peer, wanted) in [
            ("127.0.0.1", Some(false)),
            ("::1", Some(false)),
            ("192.0.2.1", Some(false)),
            ("192.0.2.2", Some(true)),
            ("2001:db8::1", Some(true)),
            ("10.42.0.7", None),
            ("10.43.0.10", None),
            ("fd00:10:42::7", None),
            ("fe80::1", None),
            ("169.254.169.254", None),
            ("224.0.0.1", None),
            ("0.0.0.0", None),
            ("::ffff:10.42.0.7", None),
            ("255.255.255.255", None),
        ] {
            let peer: IpAddr = peer.parse().unwrap();
            let wanted = match wanted {
                Some(true) => Origin::Client(peer),
                Some(false) => Origin::Node,
                None => Origin::Nobody,
            };
            assert_eq!(Origin::of(&config, peer, local), wanted, "{peer}");
        }
    }
}
