//! UDP and SCTP: a client's datagrams to one port go by a socket of their own in the router's namespace, a session, which
//! answers come back to. It ends when nothing has passed for a while.

use super::slots::Token;
use super::{Exposure, Origin, connect, sctp};
use crate::services::Protocol;
use crate::sys::datagram::send_from;
use rustix::fd::{AsFd, OwnedFd};
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

impl Port {
    /// The client, with its port, and what it said.
    pub fn heard<'a>(&self, from: SocketAddr, data: &'a mut [u8]) -> Option<(SocketAddr, &'a mut [u8])> {
        if self.exposure.protocol != Protocol::Sctp {
            return Some((from, data));
        }
        let packet = sctp::packet(data, from.is_ipv6())?;
        let (port, to) = sctp::ports(packet)?;
        (to == self.exposure.listen.port()).then_some((SocketAddr::new(from.ip(), port), packet))
    }
}

pub struct Session {
    /// Of raw packets too: what is sent and received is the same.
    pub socket: UdpSocket,
    pub port: Token,
    pub parties: Parties,
    pub endpoint: (IpAddr, u16),
    /// Of SCTP.
    pub association: Option<sctp::Association>,
    /// The port of the host.
    number: u16,
    last: Instant,
    answered: bool,
}

impl Session {
    pub fn open(
        (port, exposure): (Token, &Exposure),
        parties: Parties,
        origin: Origin,
        endpoint: (IpAddr, u16),
        now: Instant,
    ) -> io::Result<Session> {
        let socket = UdpSocket::from(connect(exposure.protocol, origin, endpoint.into())?);
        let mut association = None;
        if exposure.protocol == Protocol::Sctp {
            let client = parties.0.port();
            sctp::hear_only(socket.as_fd(), endpoint.0.is_ipv6(), Some(endpoint.1), client)?;
            let address = if let Origin::Client(address) = origin { Some(address) } else { None };
            association = Some((address, client, endpoint));
        }
        let number = exposure.listen.port();
        Ok(Session { socket, port, parties, endpoint, association, number, last: now, answered: false })
    }

    /// Hands on what the client said.
    pub fn forward(&mut self, data: &mut [u8], now: Instant) -> io::Result<()> {
        self.last = now;
        if self.association.is_some() {
            sctp::readdress(data, self.parties.0.port(), self.endpoint.1);
        }
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
        let mut data = buffer.get_mut(..length).unwrap_or_default();
        let (mut to, from) = self.parties;
        if self.association.is_some() {
            let wanted = Some((self.endpoint.1, to.port()));
            // It may have come before only what is wanted was heard.
            let Some(packet) = sctp::packet(data, to.is_ipv6()).filter(|packet| sctp::ports(packet) == wanted) else {
                return Ok(true);
            };
            sctp::readdress(packet, self.number, to.port());
            to.set_port(0);
            data = packet;
        }
        (self.last, self.answered) = (now, true);
        // What the client cannot be sent is lost.
        let _ = send_from(by.as_fd(), data, to, from);
        Ok(true)
    }

    pub fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= if self.answered { ANSWERED } else { UNANSWERED }
    }
}
