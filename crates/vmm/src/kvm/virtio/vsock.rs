//! Streams between the host and the guest (Virtio 1.2, 5.10), over one listening unix socket: a client sends
//! `CONNECT <port>\n`, reads `OK <its port>\n` and then speaks to who listens on that port in the guest. The guest answers;
//! it cannot call out: a request of its own is refused, so there is nothing on the host for it to reach.

mod connection;
mod packet;

use super::Device;
use super::queue;
use super::worker::Io;
use crate::kvm::Fault;
use connection::{Connection, Stage};
use packet::{Header, Op};
use rustix::event::epoll;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

pub const HOST: u64 = 2;
pub const GUEST: u64 = 3;
const RECEIVE: usize = 0;
const SEND: usize = 1;
const EVENTS: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: the driver shall forget its streams.
const TRANSPORT_RESET: [u8; 4] = [0; 4];
const MOST_CONNECTIONS: usize = 256;
/// Answers that wait for the guest to take them; a guest that takes none and goes on asking is broken.
const MOST_ANSWERS: usize = 1024;
/// Ports of the host's side begin here.
const FIRST_PORT: u32 = 1 << 30;
const LISTENER: u64 = 0;

pub struct Vsock {
    listener: UnixListener,
    poll: OwnedFd,
    /// By the host's port.
    connections: BTreeMap<u32, Connection>,
    answers: VecDeque<Header>,
    next_port: u32,
    /// The guest has no buffer left.
    full: bool,
    /// The guest has streams of another life and does not know yet.
    stale: bool,
}

impl Vsock {
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        let (connections, answers) = (BTreeMap::new(), VecDeque::new());
        Ok(Vsock { listener, poll, connections, answers, next_port: FIRST_PORT, full: false, stale: false })
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        if self.connections.len() >= MOST_CONNECTIONS || stream.set_nonblocking(true).is_err() {
            return;
        }
        while self.connections.contains_key(&self.next_port) || self.next_port < FIRST_PORT {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        }
        let port = self.next_port;
        self.next_port = port.wrapping_add(1).max(FIRST_PORT);
        let data = epoll::EventData::new_u64(u64::from(port));
        if epoll::add(&self.poll, &stream, data, epoll::EventFlags::IN).is_ok() {
            self.connections.insert(port, Connection::new(stream, port));
        }
    }

    fn answer(&mut self, header: Header) -> Result<(), Fault> {
        if self.answers.len() >= MOST_ANSWERS {
            return Err(Fault(format!("{MOST_ANSWERS} answers wait and the guest takes none")));
        }
        self.answers.push_back(header);
        Ok(())
    }

    /// Listens to a connection for what it can go on with; forgets it when it is over.
    fn settle(&mut self, port: u32) {
        let Some(connection) = self.connections.get(&port) else { return };
        if connection.over() {
            let _ = epoll::delete(&self.poll, &connection.stream);
            self.connections.remove(&port);
            return;
        }
        let mut wanted = epoll::EventFlags::empty();
        wanted.set(epoll::EventFlags::IN, connection.wants_input());
        wanted.set(epoll::EventFlags::OUT, connection.wants_output());
        let _ = epoll::modify(&self.poll, &connection.stream, epoll::EventData::new_u64(u64::from(port)), wanted);
    }

    /// Answers first, as far as the guest has buffers.
    fn flush(&mut self, io: &mut Io) -> Result<(), Fault> {
        while let Some(header) = self.answers.front() {
            let Some(chain) = io.take(RECEIVE)? else {
                self.full = true;
                return Ok(());
            };
            let written = queue::scatter(&io.memory, &chain.writable, &header.encode())?;
            if written < packet::SIZE {
                return Err(Fault(format!("chain {}: a receive buffer of {written} bytes", chain.head)));
            }
            io.finish(RECEIVE, chain.head, written as u32)?;
            self.answers.pop_front();
        }
        Ok(())
    }

    /// The host's side of a connection has something to say or can take more.
    fn host_ready(&mut self, port: u32, io: &mut Io) -> Result<(), Fault> {
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        let news = match connection.stage {
            Stage::Asking(_) => connection.ask(),
            Stage::Requested | Stage::Closing => None,
            Stage::Open => {
                let update = connection.drain();
                let Some(chain) = io.take(RECEIVE)? else {
                    self.full = true;
                    return Ok(());
                };
                match connection.read(&io.memory, &chain.writable)? {
                    Some(written) => {
                        io.finish(RECEIVE, chain.head, written)?;
                        update
                    }
                    None => {
                        io.untake(RECEIVE)?;
                        connection.ended().or(update)
                    }
                }
            }
        };
        if let Some(header) = news {
            self.answer(header)?;
        }
        self.settle(port);
        Ok(())
    }

    /// One packet from the guest.
    fn packet(&mut self, header: &Header, data: Vec<u8>) -> Result<(), Fault> {
        if header.source_cid != GUEST || header.target_cid != HOST || !header.is_stream {
            return if header.op == Op::Reset { Ok(()) } else { self.answer(header.refused()) };
        }
        let port = header.target_port;
        let known = self.connections.get_mut(&port).filter(|c| c.guest_port == header.source_port);
        let Some(connection) = known else {
            return if header.op == Op::Reset { Ok(()) } else { self.answer(header.refused()) };
        };
        let news = connection.packet(header, data);
        if let Some(header) = news {
            self.answer(header)?;
        }
        self.settle(port);
        Ok(())
    }
}

impl Device for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }
    fn id(&self) -> u32 {
        19
    }
    fn queues(&self) -> &'static [u16] {
        &[256, 256, 16]
    }
    fn config(&self) -> (Vec<u8>, usize) {
        (GUEST.to_le_bytes().to_vec(), 0)
    }
    fn begin(&mut self, _: u64) -> io::Result<()> {
        self.connections.clear();
        self.answers.clear();
        (self.full, self.stale) = (false, false);
        Ok(())
    }
    fn restored(&mut self) {
        self.stale = true;
    }
    fn drains(&self, index: usize) -> bool {
        index == SEND
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        if index == SEND {
            while let Some(chain) = io.take(SEND)? {
                let (header, data) = packet::decode(&io.memory, &chain)?;
                io.finish(SEND, chain.head, 0)?;
                self.packet(&header, data)?;
            }
            io.notify(SEND)?;
        }
        if index == RECEIVE {
            self.full = false;
        }
        if self.stale
            && let Some(chain) = io.take(EVENTS)?
        {
            let written = queue::scatter(&io.memory, &chain.writable, &TRANSPORT_RESET)?;
            io.finish(EVENTS, chain.head, written as u32)?;
            io.notify(EVENTS)?;
            self.stale = false;
        }
        self.flush(io)?;
        io.notify(RECEIVE)
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poll.as_fd())
    }
    fn wants_source(&self) -> bool {
        !self.full
    }
    fn ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut events = Vec::with_capacity(16);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&now));
        for event in &events {
            match event.data.u64() {
                LISTENER => self.accept(),
                port => self.host_ready(u32::try_from(port).unwrap_or(0), io)?,
            }
        }
        self.flush(io)?;
        io.notify(RECEIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_calls_out_is_refused_and_one_that_takes_no_answer_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::new(UnixListener::bind(dir.path().join("s")).unwrap()).unwrap();
        let (source_cid, target_cid) = (GUEST, HOST);
        let request = Header { source_cid, target_cid, ..Header::to_guest(1000, 22, Op::Request) };
        vsock.packet(&request, Vec::new()).unwrap();
        let answer = vsock.answers.front().unwrap();
        assert_eq!((answer.op, answer.source_port, answer.target_port), (Op::Reset, 22, 1000));
        assert!(vsock.connections.is_empty());
        // one in another's name is refused too, and a reset is not answered
        vsock.packet(&Header { source_cid: HOST, ..request.clone() }, Vec::new()).unwrap();
        vsock.packet(&Header { op: Op::Reset, ..request.clone() }, Vec::new()).unwrap();
        assert_eq!(vsock.answers.len(), 2);
        let broken = (0..MOST_ANSWERS).find_map(|_| vsock.packet(&request, Vec::new()).err());
        assert!(broken.unwrap().0.contains("takes none"));
    }
}
