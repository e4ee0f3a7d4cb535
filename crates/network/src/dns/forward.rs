//! Passes questions about the world outside on to configured servers. One thread waits for all answers at once; how many
//! questions wait is bounded, for each client and altogether, so that names whose servers are slow hold up nobody else.
//! What is too much is answered with "server failure" at once.

use super::answers;
use super::codec::{self, Code, Query};
use crate::config::Networks;
use crate::error::{Error, Result};
use crate::firewall::is_metadata;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Questions that wait for answers.
const MOST: usize = 512;
const MOST_OF_CLIENT: usize = 64;
/// Answers that are fetched over TCP at once.
const MOST_TCP: usize = 16;
/// How long one server is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What to do with the reply's bytes.
pub type Answer = Box<dyn FnOnce(&[u8]) + Send>;

/// A question that waits for an answer from outside.
pub struct Job {
    pub packet: Vec<u8>,
    pub query: Query,
    pub client: IpAddr,
    pub answer: Answer,
}

/// Hands questions to the thread, which ends when the last clone is dropped.
#[derive(Clone)]
pub struct Forwarder(Arc<Handle>);

struct Handle(Arc<Shared>);

struct Shared {
    upstreams: Vec<SocketAddr>,
    own: Networks,
    queue: Mutex<Queue>,
    wake: OwnedFd,
    over_tcp: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    new: VecDeque<Job>,
    /// Questions under way, by client.
    clients: HashMap<IpAddr, usize>,
    waiting: usize,
    closed: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.wake();
    }
}

impl Forwarder {
    /// `None` without upstreams. The thread is started in the caller's namespace.
    /// Answers that name an address in `own` networks, or one that only this machine has, are not passed on: a page from
    /// outside could else make its reader talk to neighbours (DNS rebinding).
    pub fn start(upstreams: Vec<SocketAddr>, own: Networks) -> Result<Option<Forwarder>> {
        if upstreams.is_empty() {
            return Ok(None);
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(Error::errno("make an event descriptor"))?;
        let random = File::open("/dev/urandom").map_err(Error::file("open", "/dev/urandom"))?;
        let shared = Shared { upstreams, own, queue: Mutex::default(), wake, over_tcp: AtomicUsize::new(0) };
        let shared = Arc::new(shared);
        let its = shared.clone();
        std::thread::Builder::new()
            .name("atoll-dns-fwd".into())
            .spawn(move || Flights { shared: its, random, all: Vec::new(), buffer: vec![0; 64 << 10] }.run())
            .map_err(Error::system("start a DNS thread"))?;
        Ok(Some(Forwarder(Arc::new(Handle(shared)))))
    }

    pub fn submit(&self, job: Job) {
        let shared = &self.0.0;
        let mut queue = shared.queue();
        let of_client = queue.clients.get(&job.client).copied().unwrap_or(0);
        if queue.closed || queue.waiting >= MOST || of_client >= MOST_OF_CLIENT {
            drop(queue);
            return fail(job);
        }
        queue.waiting += 1;
        *queue.clients.entry(job.client).or_default() += 1;
        queue.new.push_back(job);
        drop(queue);
        shared.wake();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Ends a question, with an answer or without.
    fn finish(&self, job: Job, reply: Option<&[u8]>) {
        let mut queue = self.queue();
        queue.waiting = queue.waiting.saturating_sub(1);
        if let Some(count) = queue.clients.get_mut(&job.client) {
            *count -= 1;
            if *count == 0 {
                queue.clients.remove(&job.client);
            }
        }
        drop(queue);
        match reply {
            Some(reply) if names_inside(reply, &self.own) => {
                let absent = codec::write(&job.query, &codec::Reply::of(Code::NameError), true);
                (job.answer)(&absent);
            }
            Some(reply) => (job.answer)(reply),
            None => fail(job),
        }
    }
}

fn fail(job: Job) {
    let reply = codec::write(&job.query, &codec::Reply::of(Code::ServerFailure), true);
    (job.answer)(&reply);
}

/// A question on its way: a socket (a random source port) and a random id of its own, so that answers are hard to forge.
struct Flight {
    job: Job,
    socket: UdpSocket,
    id: [u8; 2],
    /// Which of the servers is asked.
    upstream: usize,
    until: Instant,
}

struct Flights {
    shared: Arc<Shared>,
    random: File,
    all: Vec<Flight>,
    /// No datagram is larger, so none is cut.
    buffer: Vec<u8>,
}

impl Flights {
    fn run(mut self) {
        loop {
            let (new, closed) = {
                let mut queue = self.shared.queue();
                (std::mem::take(&mut queue.new), queue.closed)
            };
            if closed {
                return new.into_iter().chain(self.all.into_iter().map(|flight| flight.job)).for_each(fail);
            }
            new.into_iter().for_each(|job| self.ask(job, 0));
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(_) => continue,
            };
            let now = Instant::now();
            // From the last one, so that those not looked at yet keep their places.
            for place in (0..self.all.len()).rev() {
                if ready.get(place).copied().unwrap_or(false) {
                    self.receive(place);
                } else if self.all.get(place).is_some_and(|flight| flight.until <= now) {
                    self.ask_next(place);
                }
            }
        }
    }

    /// Waits for answers, new questions, or the end of patience; says which sockets have something.
    fn wait(&self) -> rustix::io::Result<Vec<bool>> {
        let next = self.all.iter().map(|flight| flight.until).min();
        let left = next.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut fds: Vec<PollFd<'_>> =
            self.all.iter().map(|flight| PollFd::new(&flight.socket, PollFlags::IN)).collect();
        fds.push(PollFd::new(&self.shared.wake, PollFlags::IN));
        poll(&mut fds, left.as_ref())?;
        if fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
        Ok(fds.iter().take(self.all.len()).map(|fd| !fd.revents().is_empty()).collect())
    }

    /// Asks the servers from this one on, until one can be asked.
    fn ask(&mut self, job: Job, first: usize) {
        let mut id = [0; 2];
        for upstream in first..self.shared.upstreams.len() {
            let Some(address) = self.shared.upstreams.get(upstream).copied() else { break };
            if self.random.read_exact(&mut id).is_err() {
                break;
            }
            if let Ok(socket) = send(&job.packet, id, address) {
                self.all.push(Flight { job, socket, id, upstream, until: Instant::now() + PATIENCE });
                return;
            }
        }
        self.shared.finish(job, None);
    }

    fn ask_next(&mut self, place: usize) {
        let flight = self.all.swap_remove(place);
        self.ask(flight.job, flight.upstream + 1);
    }

    /// Reads all that a socket has; what is not the answer does not count.
    fn receive(&mut self, place: usize) {
        let Some(flight) = self.all.get_mut(place) else { return };
        loop {
            let length = match flight.socket.recv(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Nobody listens there.
                Err(_) => return self.ask_next(place),
            };
            let Some(reply) = self.buffer.get_mut(..length) else { continue };
            if !is_answer(reply, flight.id, &flight.job.query.question) {
                continue;
            }
            if answers::is_truncated(reply) {
                let flight = self.all.swap_remove(place);
                return ask_tcp(&self.shared, flight);
            }
            if let Some(id) = reply.get_mut(..2) {
                id.copy_from_slice(&flight.job.query.id.to_be_bytes());
            }
            let job = self.all.swap_remove(place).job;
            return self.shared.finish(job, self.buffer.get(..length));
        }
    }
}

fn with_id(packet: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(place) = packet.get_mut(..2) {
        place.copy_from_slice(&id);
    }
    packet
}

fn send(packet: &[u8], id: [u8; 2], upstream: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(upstream)?;
    socket.send(&with_id(packet, id))?;
    Ok(socket)
}

/// Whether an answer has an address that nobody outside can have; one that cannot be read counts as having one.
fn names_inside(reply: &[u8], own: &Networks) -> bool {
    let v4 = |address: Ipv4Addr| {
        let odd = address.is_loopback() || address.is_link_local() || address.octets()[0] == 0;
        odd || own.contains(address.into()) || is_metadata(address.into())
    };
    // RFC 6052, 2.1: an IPv4 address behind a translator.
    let translated = |address: Ipv6Addr| match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))),
        _ => false,
    };
    let inside = |address: IpAddr| match address {
        IpAddr::V4(address) => v4(address),
        IpAddr::V6(address) => {
            address.to_ipv4().is_some_and(v4)
                || address.is_unicast_link_local()
                || address.is_unique_local()
                || own.contains(address.into())
                || is_metadata(address.into())
                || translated(address)
        }
    };
    codec::addresses(reply).is_none_or(|all| all.into_iter().any(inside))
}

/// Whether this is the answer to that very question.
fn is_answer(reply: &[u8], id: [u8; 2], question: &[u8]) -> bool {
    let answers = reply.get(2).is_some_and(|flags| flags & 0x80 != 0);
    let one = reply.get(4..6) == Some(&[0, 1]);
    reply.get(..2) == Some(&id) && answers && one && reply.get(12..12 + question.len()) == Some(question)
}

/// Fetches the whole of what did not fit into a datagram, on a thread of its own.
fn ask_tcp(shared: &Arc<Shared>, flight: Flight) {
    let Flight { job, id, upstream, .. } = flight;
    let address = shared.upstreams.get(upstream).copied();
    if shared.over_tcp.fetch_add(1, Ordering::AcqRel) >= MOST_TCP || address.is_none() {
        shared.over_tcp.fetch_sub(1, Ordering::AcqRel);
        return shared.finish(job, None);
    }
    // Should no thread start, the job must still be there to be answered.
    let (job, its) = (Arc::new(Mutex::new(Some(job))), shared.clone());
    let taken = job.clone();
    let started = std::thread::Builder::new().name("atoll-dns-fwd-tcp".into()).spawn(move || {
        if let Some(job) = taken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let whole = address.and_then(|address| fetch(&job, address, id));
            its.finish(job, whole.as_deref());
        }
        its.over_tcp.fetch_sub(1, Ordering::AcqRel);
    });
    if started.is_err() {
        shared.over_tcp.fetch_sub(1, Ordering::AcqRel);
        if let Some(job) = job.lock().unwrap_or_else(PoisonError::into_inner).take() {
            shared.finish(job, None);
        }
    }
}

fn fetch(job: &Job, upstream: SocketAddr, id: [u8; 2]) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&upstream, PATIENCE).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut framed = u16::try_from(job.packet.len()).ok()?.to_be_bytes().to_vec();
    framed.extend(with_id(&job.packet, id));
    stream.write_all(&framed).ok()?;
    let until = Instant::now() + PATIENCE;
    let mut length = [0; 2];
    read_until(&mut stream, &mut length, until)?;
    let mut reply = vec![0; usize::from(u16::from_be_bytes(length))];
    read_until(&mut stream, &mut reply, until)?;
    let fine = is_answer(&reply, id, &job.query.question) && !answers::is_truncated(&reply);
    reply.get_mut(..2)?.copy_from_slice(&job.query.id.to_be_bytes());
    fine.then_some(reply)
}

/// Fills the buffer, however slowly the bytes come, or gives up.
fn read_until(stream: &mut TcpStream, buffer: &mut [u8], until: Instant) -> Option<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        stream.set_read_timeout(Some(left)).ok()?;
        match stream.read(buffer.get_mut(filled..)?) {
            Ok(0) => return None,
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use codec::{Data, Record, Reply, TYPE_A};

    fn answer(addresses: &[IpAddr]) -> Vec<u8> {
        let query = codec::parse(&codec::question(1, "www.example.org", TYPE_A, None)).unwrap();
        let mut reply = Reply::of(Code::NoError);
        let alias = Record { name: None, ttl: 1, data: Data::Cname("x.example.org".into()) };
        let data = |a: &IpAddr| match a {
            IpAddr::V4(a) => Data::A(*a),
            IpAddr::V6(a) => Data::Aaaa(*a),
        };
        let record = |a: &IpAddr| Record { name: Some("x.example.org".into()), ttl: 1, data: data(a) };
        reply.answers = std::iter::once(alias).chain(addresses.iter().map(record)).collect();
        codec::write(&query, &reply, false)
    }

    #[test]
    fn answers_that_point_inside_are_seen() {
        let own =
            crate::RouterConfig { pod_cidr6: "2001:db8:1::/64".parse().unwrap(), ..crate::RouterConfig::new("", "") };
        let own = own.networks();
        let outside = IpAddr::from([192, 0, 2, 1]);
        assert!(!names_inside(&answer(&[outside, "2001:db8:2::1".parse().unwrap()]), &own));
        assert!(!names_inside(&answer(&[]), &own));
        for bad in ["10.42.0.7", "10.43.0.1", "127.0.0.1", "169.254.169.254", "0.0.0.0", "2001:db8:1::7"] {
            assert!(names_inside(&answer(&[outside, bad.parse().unwrap()]), &own), "{bad}");
        }
        for bad in ["100.100.100.200", "168.63.129.16", "192.0.0.192", "64:ff9b::10.42.0.7", "64:ff9b::a9fe:a9fe"] {
            assert!(names_inside(&answer(&[outside, bad.parse().unwrap()]), &own), "{bad}");
        }
        assert!(!names_inside(&answer(&["64:ff9b::192.0.2.7".parse().unwrap()]), &own));
        for bad in ["fd00::1", "::1", "fe80::1", "::ffff:10.42.0.7", "::"] {
            assert!(names_inside(&answer(&[bad.parse().unwrap()]), &own), "{bad}");
        }
        let whole = answer(&[outside]);
        for cut in 12..whole.len() {
            assert!(names_inside(&whole[..cut], &own), "{cut}");
        }
    }
}
