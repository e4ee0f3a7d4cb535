//! Passes questions about the world outside on to configured servers: a bounded queue and a few threads. A full queue is
//! answered with "server failure" at once.

use super::codec::{self, Code, Query};
use crate::error::{Error, Result};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
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
    pub fn start(upstreams: Vec<SocketAddr>) -> Result<Option<Forwarder>> {
        if upstreams.is_empty() {
            return Ok(None);
        }
        let (sender, receiver) = sync_channel::<Job>(QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..THREADS {
            let (receiver, upstreams) = (receiver.clone(), upstreams.clone());
            std::thread::Builder::new()
                .name("atoll-dns-fwd".into())
                .spawn(move || work(&receiver, &upstreams))
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

fn work(jobs: &Mutex<Receiver<Job>>, upstreams: &[SocketAddr]) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        match upstreams.iter().find_map(|upstream| ask(&job, *upstream)) {
            Some(reply) => (job.answer)(&reply),
            None => fail(job),
        }
    }
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
