//! UDP: a client's datagrams to one port go by a socket of their own in the router's namespace, a session, which answers
//! come back to. It ends when nothing has passed for a while.

use super::slots::Token;
use super::{Exposure, Origin, connect};
use crate::sys::datagram::send_from;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SocketType;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// As connection tracking has it: without an answer, and with one.
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(120);

/// A client, and the host's address that it speaks to.
pub type Parties = (SocketAddr, Option<IpAddr>);

pub struct Port {
    pub socket: OwnedFd,
    pub exposure: Arc<Exposure>,
    pub sessions: HashMap<Parties, Token>,
    pub turn: usize,
}

pub struct Session {
    pub socket: UdpSocket,
    pub port: Token,
    pub parties: Parties,
    pub endpoint: (IpAddr, u16),
    last: Instant,
    answered: bool,
}

impl Session {
    pub fn open(
        port: Token,
        parties: Parties,
        origin: Origin,
        endpoint: (IpAddr, u16),
        now: Instant,
    ) -> io::Result<Session> {
        let socket = UdpSocket::from(connect(SocketType::DGRAM, origin, endpoint.into())?);
        Ok(Session { socket, port, parties, endpoint, last: now, answered: false })
    }

    /// Hands on what the client said.
    pub fn forward(&mut self, data: &[u8], now: Instant) -> io::Result<()> {
        self.last = now;
        match self.socket.send(data) {
            // Datagrams may be lost.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other.map(drop),
        }
    }

    /// Hands back one answer by the port's socket. False: there is none at present.
    pub fn back(&mut self, by: impl AsFd, buffer: &mut [u8], now: Instant) -> io::Result<bool> {
        let length = match self.socket.recv(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        (self.last, self.answered) = (now, true);
        let data = buffer.get(..length).unwrap_or_default();
        // What the client cannot be sent is lost.
        let _ = send_from(by.as_fd(), data, self.parties.0, self.parties.1);
        Ok(true)
    }

    pub fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= if self.answered { ANSWERED } else { UNANSWERED }
    }
}
