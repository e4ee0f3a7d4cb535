//! A TCP connection handed on: two sockets, and a way for bytes in each direction. Bytes go from a socket to a pipe and from
//! there to the other socket, inside the kernel. A pipe is borrowed while there is something to move, and kept only while
//! the receiver does not take it: that is all that waits for a slow reader.

use super::slots::Token;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What a pipe holds.
const CHUNK: usize = 64 << 10;
/// Chunks moved one way before others get their turn.
const TURN: usize = 16;
/// Pipes kept for the next that needs one.
const SPARE: usize = 32;
/// How long an endpoint has to take a connection.
pub const CONNECT: Duration = Duration::from_secs(10);
/// A peer that says nothing for this long is asked whether it is still there.
const QUIET: Duration = Duration::from_secs(120);

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

#[derive(Default)]
pub struct Pool(Vec<Pipe>);

impl Pool {
    fn take(&mut self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pop() {
            return Ok(pipe);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Pipe { read, write })
    }
    /// Only an empty one.
    fn give(&mut self, pipe: Pipe) {
        if self.0.len() < SPARE {
            self.0.push(pipe);
        }
    }
}

/// Bytes one way.
#[derive(Default)]
struct Way {
    pipe: Option<Pipe>,
    held: usize,
    readable: bool,
    writable: bool,
    /// The sender has said all.
    ended: bool,
    /// And the receiver has been told.
    told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Nothing to do until a socket is ready.
    All,
    /// There is more; others first.
    More,
    /// Both sides have said all.
    Done,
}

impl Way {
    fn advance(&mut self, from: &OwnedFd, to: &OwnedFd, pool: &mut Pool) -> io::Result<Moved> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        for _ in 0..TURN {
            if self.held > 0 {
                let Some(pipe) = self.pipe.as_ref().filter(|_| self.writable) else { return Ok(Moved::All) };
                match splice(&pipe.read, None, to, None, self.held, flags) {
                    Ok(moved) => self.held = self.held.saturating_sub(moved),
                    Err(Errno::AGAIN) => self.writable = false,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
                continue;
            }
            if let Some(pipe) = self.pipe.take_if(|_| self.ended || !self.readable) {
                pool.give(pipe);
            }
            if self.ended {
                if !self.told {
                    self.told = true;
                    rustix::net::shutdown(to, Shutdown::Write)?;
                }
                return Ok(Moved::Done);
            }
            if !self.readable {
                return Ok(Moved::All);
            }
            let pipe = match self.pipe.take() {
                Some(pipe) => pipe,
                None => pool.take()?,
            };
            match splice(from, None, &pipe.write, None, CHUNK, flags) {
                Ok(0) => self.ended = true,
                Ok(moved) => self.held = moved,
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            self.pipe = Some(pipe);
        }
        Ok(Moved::More)
    }
}

pub struct Connection {
    pub client: OwnedFd,
    pub endpoint: OwnedFd,
    /// The port that it came by.
    pub port: Token,
    pub peer: IpAddr,
    /// Until when the endpoint has to answer; `None`: it has.
    pub deadline: Option<Instant>,
    /// Waits for its next turn.
    pub queued: bool,
    out: Way,
    back: Way,
}

impl Connection {
    pub fn new(client: OwnedFd, endpoint: OwnedFd, port: Token, peer: IpAddr, now: Instant) -> io::Result<Connection> {
        for socket in [&client, &endpoint] {
            sockopt::set_tcp_nodelay(socket, true)?;
            sockopt::set_socket_keepalive(socket, true)?;
            sockopt::set_tcp_keepidle(socket, QUIET)?;
            sockopt::set_tcp_keepintvl(socket, QUIET / 8)?;
            sockopt::set_tcp_keepcnt(socket, 4)?;
        }
        let deadline = Some(now + CONNECT);
        let (out, back) = (Way::default(), Way::default());
        Ok(Connection { client, endpoint, port, peer, deadline, queued: false, out, back })
    }

    /// Notes what a socket is ready for.
    pub fn ready(&mut self, endpoint: bool, readable: bool, writable: bool) -> io::Result<()> {
        let (from, to) = if endpoint { (&mut self.back, &mut self.out) } else { (&mut self.out, &mut self.back) };
        from.readable |= readable;
        to.writable |= writable;
        if endpoint && self.deadline.is_some() && (readable || writable) {
            sockopt::socket_error(&self.endpoint)??;
            self.deadline = None;
        }
        Ok(())
    }

    pub fn advance(&mut self, pool: &mut Pool) -> io::Result<Moved> {
        if self.deadline.is_some() {
            return Ok(Moved::All);
        }
        let out = self.out.advance(&self.client, &self.endpoint, pool)?;
        let back = self.back.advance(&self.endpoint, &self.client, pool)?;
        Ok(match (out, back) {
            (Moved::Done, Moved::Done) => Moved::Done,
            (Moved::More, _) | (_, Moved::More) => Moved::More,
            _ => Moved::All,
        })
    }

    /// Both sides are told that it broke off, rather than that all has been said.
    pub fn abort(self) {
        reset(&self.client);
        reset(&self.endpoint);
    }
}

/// Closing the socket will reset the connection.
pub fn reset(socket: impl AsFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
