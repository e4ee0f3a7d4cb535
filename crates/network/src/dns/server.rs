//! The DNS server's sockets and threads: UDP answered in place by two threads, TCP by a bounded number of short-lived
//! ones. All of them live in the router's namespace and end when the server is dropped.

use super::answers;
use super::codec::{self, Code, Malformed, Query, Reply};
use super::forward::{Forwarder, Job};
use super::records::{Authority, Records};
use super::views::{View, Views};
use super::zone::{Outcome, Zone};
use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::names::Names;
use crate::ns;
use crate::router::Router;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

const UDP_THREADS: usize = 2;
const MAX_CONNECTIONS: usize = 64;
const MAX_CONNECTIONS_OF_CLIENT: usize = 8;
/// A TCP client that says nothing for this long is let go.
const TCP_IDLE: Duration = Duration::from_secs(5);
const MAX_QUESTION: usize = 4096;
/// Seconds; addresses are pinned for as long at most.
const MAX_TTL: u32 = 24 * 3600;
const DOMAIN: &str = "cluster.local";

/// Answers until it is dropped.
pub struct DnsServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

/// What became of questions.
#[derive(Clone, Copy)]
enum Outcomes {
    /// Answered from the cluster's names, be it that there is none.
    Own,
    Forwarded,
    /// For a name outside that the asker may not ask for.
    Shut,
    Malformed,
}

/// Names of [`Outcomes`].
const OUTCOMES: [&str; 4] = ["answered", "forwarded", "not_allowed", "malformed"];

struct Shared {
    zone: RwLock<Arc<Zone>>,
    views: RwLock<Arc<Views>>,
    serial: AtomicU32,
    turn: AtomicUsize,
    /// Open TCP connections by client.
    connections: Mutex<HashMap<IpAddr, usize>>,
    forwarder: Option<Forwarder>,
    by_name: Arc<Names>,
    config: RouterConfig,
    questions: [AtomicU64; OUTCOMES.len()],
}

impl DnsServer {
    /// Serves `cluster.local` at `address` inside the router's namespace; at the DNS service's address also at its IPv6
    /// address. Names outside go to `upstreams`, asked from that namespace too; with none they do not exist.
    pub fn start(router: &Router, address: SocketAddr, upstreams: Vec<SocketAddr>) -> Result<DnsServer> {
        DnsServer::start_with(router, address, upstreams, None)
    }

    /// As [`DnsServer::start`], but servers outside are asked from the namespace `from`.
    pub fn start_with(
        router: &Router,
        address: SocketAddr,
        upstreams: Vec<SocketAddr>,
        from: Option<BorrowedFd<'_>>,
    ) -> Result<DnsServer> {
        let config = router.config();
        let second = (router.ipv6 && address.ip() == config.dns_address).then(|| config.dns_address6());
        let ask = || Forwarder::start(upstreams, config.networks());
        let forwarder = match from {
            Some(from) => ns::in_ns(from, ask)??,
            None => router.run(ask)??,
        };
        let by_name = router.by_name().clone();
        router.run(|| start(config.clone(), address, second.map(IpAddr::V6), forwarder, by_name))?
    }

    /// Where it listens; of interest if port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many questions there were, by what became of them.
    pub fn questions(&self) -> impl Iterator<Item = (&'static str, u64)> {
        OUTCOMES.into_iter().zip(&self.shared.questions).map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }

    /// Answers at one address, with so many threads for UDP.
    fn listen(&mut self, address: SocketAddr, udp_threads: usize) -> Result<SocketAddr> {
        let udp = UdpSocket::bind(address).map_err(Error::system("bind the DNS server's UDP socket"))?;
        let address = udp.local_addr().map_err(Error::system("read the DNS server's address"))?;
        let tcp = TcpListener::bind(address).map_err(Error::system("bind the DNS server's TCP socket"))?;
        for result in [udp.set_nonblocking(true), tcp.set_nonblocking(true)] {
            result.map_err(Error::system("prepare the DNS server's sockets"))?;
        }
        let udp = Arc::new(udp);
        for _ in 0..udp_threads {
            let (udp, shared, stop) = (udp.clone(), self.shared.clone(), self.stop.clone());
            self.threads.push(spawn("atoll-dns-udp", move || serve_udp(&udp, &shared, &stop))?);
        }
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        self.threads.push(spawn("atoll-dns-tcp", move || serve_tcp(&tcp, &shared, &stop))?);
        Ok(address)
    }

    /// Replaces all records at once.
    pub fn set(&self, records: &Records) {
        let shared = &self.shared;
        let serial = shared.serial.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let zone = Arc::new(Zone::new(authority(&shared.config), serial, records));
        *shared.zone.write().unwrap_or_else(PoisonError::into_inner) = zone;
    }

    /// Replaces who sees what; nobody sees anything at first.
    pub fn set_views(&self, views: Views) {
        *self.shared.views.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(views);
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        // An eventfd that is never read wakes every thread that polls it.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        self.shared.by_name.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn authority(config: &RouterConfig) -> Authority {
    let dns_addresses = vec![config.dns_address.into(), config.dns_address6().into()];
    Authority { domain: DOMAIN.to_owned(), networks: config.networks(), dns_addresses }
}

/// Runs in the router's namespace: sockets and threads made here belong to it.
fn start(
    config: RouterConfig,
    address: SocketAddr,
    second: Option<IpAddr>,
    forwarder: Option<Forwarder>,
    by_name: Arc<Names>,
) -> Result<DnsServer> {
    let zone = Zone::new(authority(&config), 0, &Records::default());
    let shared = Arc::new(Shared {
        zone: RwLock::new(Arc::new(zone)),
        views: RwLock::default(),
        serial: AtomicU32::new(0),
        turn: AtomicUsize::new(0),
        connections: Mutex::default(),
        forwarder,
        by_name: by_name.clone(),
        config,
        questions: Default::default(),
    });
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let stop = Arc::new(stop.map_err(Error::errno("make an event descriptor"))?);
    let mut server = DnsServer { shared, address, stop, threads: Vec::new() };
    server.address = server.listen(address, UDP_THREADS)?;
    if let Some(second) = second {
        server.listen(SocketAddr::new(second, server.address.port()), 1)?;
    }
    if server.shared.forwarder.is_some() {
        by_name.start();
        server.threads.push(spawn("atoll-dns-pins", move || by_name.sweep())?);
    }
    Ok(server)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(Error::system("start a DNS thread"))
}

/// Waits for the socket; false means stop.
fn readable(socket: impl AsFd, stop: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => return fds[1].revents().is_empty(),
        }
    }
}

fn serve_udp(socket: &Arc<UdpSocket>, shared: &Arc<Shared>, stop: &OwnedFd) {
    let mut buffer = [0; MAX_QUESTION];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, client)) => {
                let packet = buffer.get(..length).unwrap_or_default();
                let back = socket.clone();
                shared.handle(packet, client.ip(), true, move |reply| {
                    let _ = back.send_to(reply, client);
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !readable(&**socket, stop) {
                    return;
                }
            }
            // ICMP errors of earlier answers surface here; they concern nobody.
            Err(_) => {}
        }
    }
}

fn serve_tcp(listener: &TcpListener, shared: &Arc<Shared>, stop: &OwnedFd) {
    while readable(listener, stop) {
        let Ok((stream, client)) = listener.accept() else { continue };
        let Some(place) = Place::take(shared, client.ip()) else { continue };
        // Should no thread start, the place is free again all the same.
        let _ = spawn("atoll-dns-conn", move || {
            let _ = serve_connection(stream, place.client, &place.shared);
        });
    }
}

/// One of a bounded number of connections, until it is dropped.
struct Place {
    shared: Arc<Shared>,
    client: IpAddr,
}

impl Place {
    /// `None` where there are too many; one client cannot take them all.
    fn take(shared: &Arc<Shared>, client: IpAddr) -> Option<Place> {
        let mut open = shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = open.get(&client).copied().unwrap_or(0);
        if of_client >= MAX_CONNECTIONS_OF_CLIENT || open.values().sum::<usize>() >= MAX_CONNECTIONS {
            return None;
        }
        open.insert(client, of_client + 1);
        Some(Place { shared: shared.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&self.client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(open.remove(&self.client)),
        }
    }
}

/// RFC 7766: messages with their length before them, several on one connection.
fn serve_connection(mut stream: TcpStream, client: IpAddr, shared: &Arc<Shared>) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TCP_IDLE))?;
    stream.set_write_timeout(Some(TCP_IDLE))?;
    let mut buffer = [0; MAX_QUESTION];
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let Some(packet) = buffer.get_mut(..usize::from(u16::from_be_bytes(length))) else { return Ok(()) };
        stream.read_exact(packet)?;
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        shared.handle(packet, client, false, move |reply| {
            let _ = sender.send(reply.to_vec());
        });
        // Nothing is sent for what deserves no answer.
        let Ok(reply) = receiver.recv() else { return Ok(()) };
        let mut out = (reply.len() as u16).to_be_bytes().to_vec();
        out.extend(reply);
        stream.write_all(&out)?;
    }
}

impl Shared {
    fn count(&self, outcome: Outcomes) {
        self.questions[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the router itself asks.
    fn is_own(&self, address: IpAddr) -> bool {
        let config = &self.config;
        let own: [IpAddr; 4] = [
            config.dns_address.into(),
            config.router_address().into(),
            config.dns_address6().into(),
            config.router_address6().into(),
        ];
        address.is_loopback() || own.contains(&address)
    }

    /// The workload that has an address, by its IPv4 address.
    fn workload(&self, address: IpAddr) -> Option<Ipv4Addr> {
        match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(address) => self.config.v4_of(address),
        }
    }

    /// Answers one packet, now or from a forwarding thread.
    fn handle(&self, packet: &[u8], client: IpAddr, udp: bool, answer: impl FnOnce(&[u8]) + Send + 'static) {
        let query = match codec::parse(packet) {
            Ok(query) => query,
            Err(malformed) => {
                self.count(Outcomes::Malformed);
                return match malformed {
                    Malformed::Silent => {}
                    Malformed::Reply { id, code } => answer(&codec::write_error(id, code)),
                };
            }
        };
        if query.version > 0 {
            return answer(&codec::write_bad_version(&query));
        }
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner).clone();
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner).clone();
        let view = match self.workload(client) {
            _ if self.is_own(client) => View::Everything,
            Some(address) => views.of(address),
            None => View::Nothing,
        };
        let name = query.name.as_deref().unwrap_or_default();
        let outside = self.is_own(client) || self.workload(client).is_some_and(|asker| views.may_ask(asker, name));
        match zone.answer(&query, self.turn.fetch_add(1, Ordering::Relaxed), view) {
            Outcome::Reply(reply) => {
                self.count(Outcomes::Own);
                answer(&codec::write(&query, &reply, udp));
            }
            Outcome::Elsewhere if !outside => {
                self.count(Outcomes::Shut);
                answer(&codec::write(&query, &Reply::of(Code::NameError), udp));
            }
            Outcome::Elsewhere => {
                self.count(Outcomes::Forwarded);
                let namespace = self.workload(client).and_then(|asker| views.namespaces.get(&asker)).cloned();
                self.elsewhere(packet, query, (client, udp), namespace, answer);
            }
        }
    }

    /// Asks others. What they answer to a workload is pinned before it learns it.
    fn elsewhere(
        &self,
        packet: &[u8],
        query: Query,
        (client, udp): (IpAddr, bool),
        namespace: Option<Arc<str>>,
        answer: impl FnOnce(&[u8]) + Send + 'static,
    ) {
        match &self.forwarder {
            Some(forwarder) if query.recursion_desired => {
                let (names, asked) = (self.by_name.clone(), query.clone());
                let pinned = move |reply: &[u8]| {
                    let mut reply = reply.to_vec();
                    answers::limit_ttls(&mut reply, MAX_TTL);
                    match namespace.map_or(Ok(()), |namespace| pin(&names, &namespace, &asked, &reply)) {
                        Ok(()) => answer(&codec::fit(&asked, &reply, udp)),
                        Err(error) => {
                            tracing::warn!("an answer is held back, since its addresses cannot be let out to: {error}");
                            answer(&codec::write(&asked, &Reply::of(Code::ServerFailure), udp));
                        }
                    }
                };
                forwarder.submit(Job { packet: packet.to_vec(), query, client, answer: Box::new(pinned) });
            }
            Some(_) => answer(&codec::write(&query, &Reply::of(Code::Refused), udp)),
            // "Does not exist" rather than "refused": resolvers then say so at once instead of trying again.
            None => answer(&codec::write(&query, &Reply::of(Code::NameError), udp)),
        }
    }
}

/// What cannot be read pins nothing.
fn pin(names: &Names, namespace: &str, asked: &Query, reply: &[u8]) -> Result<()> {
    let name = asked.name.as_deref().unwrap_or_default();
    let answers = answers::resolved(reply, name).unwrap_or_default();
    if answers.is_empty() { Ok(()) } else { names.pin(namespace, name, &answers).map(drop) }
}
