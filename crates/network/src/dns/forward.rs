//! Passes questions about the world outside on to configured servers: a bounded queue and a few threads. A full queue is
//! answered with "server failure" at once.

use super::codec::{self, Code, Query};
use crate::config::Networks;
use crate::error::{Error, Result};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const THREADS: usize = 4;
const QUEUE: usize = 256;
const PATIENCE: Duration = Duration::from_secs(2);

/// What to do with the reply's bytes.
pub type Answer = Box<dyn FnOnce(&[u8]) + Send>;

/// A question that waits for an answer from outside.
pub struct Job {
    pub packet: Vec<u8>,
    pub query: Query,
    pub answer: Answer,
}

/// Hands questions to the threads; they end when the last clone is dropped.
#[derive(Clone)]
pub struct Forwarder(SyncSender<Job>);

impl Forwarder {
    /// `None` without upstreams. The threads are started in the caller's namespace.
    /// Answers that name an address in `own` networks, or one that only this machine has, are not passed on: a page from
    /// outside could else make its reader talk to neighbours (DNS rebinding).
    pub fn start(upstreams: Vec<SocketAddr>, own: Networks) -> Result<Option<Forwarder>> {
        if upstreams.is_empty() {
            return Ok(None);
        }
        let (sender, receiver) = sync_channel::<Job>(QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..THREADS {
            let (receiver, upstreams, own) = (receiver.clone(), upstreams.clone(), own.clone());
            std::thread::Builder::new()
                .name("atoll-dns-fwd".into())
                .spawn(move || work(&receiver, &upstreams, &own))
                .map_err(Error::system("start a DNS thread"))?;
        }
        Ok(Some(Forwarder(sender)))
    }

    pub fn submit(&self, job: Job) {
        if let Err(error) = self.0.try_send(job) {
            let (std::sync::mpsc::TrySendError::Full(job) | std::sync::mpsc::TrySendError::Disconnected(job)) = error;
            fail(job);
        }
    }
}

fn fail(job: Job) {
    let reply = codec::write(&job.query, &codec::Reply::of(Code::ServerFailure), true);
    (job.answer)(&reply);
}

fn work(jobs: &Mutex<Receiver<Job>>, upstreams: &[SocketAddr], own: &Networks) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        match upstreams.iter().find_map(|upstream| ask(&job, *upstream)) {
            Some(reply) if names_inside(&reply, own) => {
                let absent = codec::write(&job.query, &codec::Reply::of(Code::NameError), true);
                (job.answer)(&absent);
            }
            Some(reply) => (job.answer)(&reply),
            None => fail(job),
        }
    }
}

/// Whether an answer has an address that nobody outside can have; one that cannot be read counts as having one.
fn names_inside(reply: &[u8], own: &Networks) -> bool {
    let v4 = |address: Ipv4Addr| {
        address.is_loopback() || address.is_link_local() || address.octets()[0] == 0 || own.contains(address.into())
    };
    let inside = |address: IpAddr| match address {
        IpAddr::V4(address) => v4(address),
        IpAddr::V6(address) => {
            address.to_ipv4().is_some_and(v4)
                || address.is_unicast_link_local()
                || address.is_unique_local()
                || own.contains(address.into())
        }
    };
    codec::addresses(reply).is_none_or(|all| all.into_iter().any(inside))
}

/// A fresh socket (a random source port) and a random id for every question, so that answers are hard to forge.
fn ask(job: &Job, upstream: SocketAddr) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(upstream).ok()?;
    let mut id = [0; 2];
    std::fs::File::open("/dev/urandom").ok()?.read_exact(&mut id).ok()?;
    let mut packet = job.packet.clone();
    packet.get_mut(..2)?.copy_from_slice(&id);
    socket.send(&packet).ok()?;
    let until = Instant::now() + PATIENCE;
    let mut buffer = [0; 4096];
    loop {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        socket.set_read_timeout(Some(left)).ok()?;
        let length = socket.recv(&mut buffer).ok()?;
        let reply = buffer.get_mut(..length)?;
        let echoed = reply.get(12..12 + job.query.question.len());
        if reply.get(..2) == Some(&id) && echoed == Some(job.query.question.as_slice()) {
            reply.get_mut(..2)?.copy_from_slice(&job.query.id.to_be_bytes());
            return Some(reply.to_vec());
        }
    }
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
        for bad in ["fd00::1", "::1", "fe80::1", "::ffff:10.42.0.7", "::"] {
            assert!(names_inside(&answer(&[bad.parse().unwrap()]), &own), "{bad}");
        }
        let whole = answer(&[outside]);
        for cut in 12..whole.len() {
            assert!(names_inside(&whole[..cut], &own), "{cut}");
        }
    }
}
