//! Connections through the relay.
//!
//! ```text
//! SYN from the link -> connecting (outside) -> offered (the SYN goes back in, to our listener) -> open -> done
//!                          refused: RST or ICMP to the workload, which has seen no SYN-ACK yet
//! ```
//!
//! Bytes go from socket to socket through a pipe that a direction has while it holds some. A direction takes more only
//! when it holds nothing, so a slow reader slows its writer down.

use super::packet::{self, Why};
use super::{Allowance, Cause, Links, Side, Token};
use rustix::event::epoll;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Bytes that a direction takes at once, and at most before others have their turn.
const CHUNK: usize = 256 << 10;
const TURN: usize = 1 << 20;
const SPARE_PIPES: usize = 64;
/// A workload that has been offered its connection takes it within this time.
const OFFER: Duration = Duration::from_secs(15);
/// No answer from outside.
const CONNECT: Duration = Duration::from_secs(60);
/// Nothing either way: RFC 5382 asks for no less than 2 hours and 4 minutes.
const IDLE: Duration = Duration::from_secs(7500);
/// Once one side has said all it has to.
const HALF_CLOSED: Duration = Duration::from_secs(900);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    inside: SocketAddr,
    outside: SocketAddr,
}

enum State {
    Connecting(Vec<u8>),
    Offered,
    Open,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

#[derive(Default)]
struct Way {
    pipe: Option<Pipe>,
    held: usize,
    ended: bool,
    shut: bool,
}

struct Connection {
    key: Key,
    state: State,
    outer: OwnedFd,
    inner: Option<OwnedFd>,
    /// Of the inner and the outer socket.
    readable: [bool; 2],
    writable: [bool; 2],
    /// From the inner socket out, and back.
    ways: [Way; 2],
    last: Instant,
}

/// What is left to do for a connection.
enum Outcome {
    Waits,
    Ready,
    Done,
    Broken,
}

#[derive(Default)]
pub struct Connections {
    all: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    of_workload: HashMap<IpAddr, usize>,
    next: u64,
    /// Those that had more to move when their turn was over.
    ready: VecDeque<u64>,
    pipes: Vec<Pipe>,
    limit: usize,
}

impl Connections {
    pub fn new(limit: usize) -> Connections {
        Connections { limit, ..Connections::default() }
    }
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A TCP packet that a workload sent out. Only those that ask for a connection come this way.
    pub fn opening(&mut self, bytes: &[u8], links: &mut Links, allowance: &mut Allowance) {
        let Some(packet) = packet::parse(bytes).filter(|packet| packet.fragment.is_none()) else { return };
        let (Some((inside, outside)), Some(flags)) = (packet.ends(), packet.flags()) else { return };
        if flags & (packet::SYN | packet::ACK | packet::RST) != packet::SYN {
            return;
        }
        let key = Key { inside, outside };
        match self.by_key.get(&key).and_then(|id| self.all.get(id)).map(|connection| &connection.state) {
            Some(State::Connecting(_)) => {}
            Some(State::Offered | State::Open) => links.write(bytes),
            None => {
                if let Err(cause) = self.connect(key, bytes, links, allowance) {
                    refuse(bytes, cause, links);
                }
            }
        }
    }

    fn connect(&mut self, key: Key, syn: &[u8], links: &mut Links, allowance: &mut Allowance) -> Result<(), Cause> {
        let workload = self.of_workload.get(&key.inside.ip()).copied().unwrap_or(0);
        if self.all.len() >= self.limit || workload >= self.limit / 4 {
            return Err(Cause::Refused);
        }
        allowance.check(key.outside.ip())?;
        let outer = socket(key.outside)?;
        allowance.bind(&outer, key.inside.ip())?;
        match rustix::net::connect(&outer, &key.outside) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(Cause::of(errno)),
        }
        let id = self.next;
        self.next += 1;
        links.watch(&outer, Token::Connection(id, Side::Outer))?;
        *self.of_workload.entry(key.inside.ip()).or_default() += 1;
        self.by_key.insert(key, id);
        let connection = Connection {
            key,
            state: State::Connecting(syn.to_vec()),
            outer,
            inner: None,
            readable: [false; 2],
            writable: [false; 2],
            ways: Default::default(),
            last: links.now,
        };
        self.all.insert(id, connection);
        Ok(())
    }

    /// Something happened to one of a connection's sockets.
    pub fn event(&mut self, id: u64, side: Side, flags: epoll::EventFlags, links: &mut Links) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        connection.last = links.now;
        let ended = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
        if let Some(readable) = connection.readable.get_mut(side as usize) {
            *readable |= ended || flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP);
        }
        if let Some(writable) = connection.writable.get_mut(side as usize) {
            *writable |= ended || flags.contains(epoll::EventFlags::OUT);
        }
        match &connection.state {
            State::Connecting(_) => self.connected(id, flags, links),
            State::Offered if ended => self.remove(id, true),
            State::Offered => {}
            State::Open => {
                let socket = match side {
                    Side::Inner => connection.inner.as_ref(),
                    Side::Outer => Some(&connection.outer),
                };
                let broken = flags.contains(epoll::EventFlags::ERR)
                    && socket.is_some_and(|socket| !matches!(sockopt::socket_error(socket), Ok(Ok(()))));
                if broken { self.remove(id, true) } else { self.turn(id) }
            }
        }
    }

    /// The outside has answered: the workload is offered the connection, or refused.
    fn connected(&mut self, id: u64, flags: epoll::EventFlags, links: &mut Links) {
        let all = epoll::EventFlags::OUT | epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        let Some(connection) = self.all.get_mut(&id).filter(|_| flags.intersects(all)) else { return };
        let State::Connecting(syn) = &connection.state else { return };
        let failed = match sockopt::socket_error(&connection.outer) {
            Ok(Err(errno)) | Err(errno) => Some(Cause::of(errno)),
            // An address that became this machine's own since it was looked up.
            Ok(Ok(())) if local_address(&connection.outer).map(|a| a.ip()) == Some(connection.key.outside.ip()) => {
                Some(Cause::Forbidden)
            }
            Ok(Ok(())) => None,
        };
        match failed {
            Some(cause) => {
                refuse(syn, cause, links);
                self.remove(id, true);
            }
            None => {
                links.write(syn);
                connection.state = State::Offered;
            }
        }
    }

    /// A workload has taken what it was offered.
    pub fn accepted(&mut self, inner: OwnedFd, peer: SocketAddr, links: &mut Links) {
        let key = local_address(&inner).map(|outside| Key { inside: peer, outside });
        let found = key.and_then(|key| self.by_key.get(&key).copied());
        let offered = |c: &&mut Connection| matches!(c.state, State::Offered);
        let Some(connection) = found.and_then(|id| self.all.get_mut(&id)).filter(offered) else {
            return reset(&inner);
        };
        let Some(id) = found.filter(|id| {
            prepare(&inner);
            links.watch(&inner, Token::Connection(*id, Side::Inner)).is_ok()
        }) else {
            return reset(&inner);
        };
        connection.inner = Some(inner);
        connection.state = State::Open;
        connection.last = links.now;
        connection.writable = [true; 2];
        connection.readable = [true; 2];
        self.turn(id);
    }

    /// Goes on with those that have had their turn.
    pub fn go_on(&mut self) {
        for id in std::mem::take(&mut self.ready) {
            self.turn(id);
        }
    }

    fn turn(&mut self, id: u64) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        match connection.pump(&mut self.pipes) {
            Outcome::Waits => {}
            Outcome::Ready => {
                if !self.ready.contains(&id) {
                    self.ready.push_back(id);
                }
            }
            Outcome::Done => self.remove(id, false),
            Outcome::Broken => self.remove(id, true),
        }
    }

    /// Ends those that have waited for too long.
    pub fn sweep(&mut self, links: &mut Links) {
        let mut late = Vec::new();
        for (id, connection) in &self.all {
            let limit = match connection.state {
                State::Connecting(_) => CONNECT,
                State::Offered => OFFER,
                State::Open if connection.ways.iter().any(|way| way.shut) => HALF_CLOSED,
                State::Open => IDLE,
            };
            if links.now.duration_since(connection.last) > limit {
                late.push(*id);
            }
        }
        for id in late {
            if let Some(Connection { state: State::Connecting(syn), .. }) = self.all.get(&id) {
                refuse(syn, Cause::Unreachable, links);
            }
            self.remove(id, true);
        }
    }

    /// Ends those that leave with another source than they would now.
    pub fn end_where(&mut self, stale: &BTreeSet<IpAddr>) {
        let ids: Vec<u64> =
            self.all.iter().filter(|(_, c)| stale.contains(&c.key.inside.ip())).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.remove(id, true));
    }

    fn remove(&mut self, id: u64, broken: bool) {
        let Some(connection) = self.all.remove(&id) else { return };
        self.by_key.remove(&connection.key);
        let workload = connection.key.inside.ip();
        if let Some(count) = self.of_workload.get_mut(&workload) {
            *count -= 1;
            if *count == 0 {
                self.of_workload.remove(&workload);
            }
        }
        if broken {
            [Some(&connection.outer), connection.inner.as_ref()].into_iter().flatten().for_each(reset);
        }
        for way in connection.ways {
            // A pipe that holds bytes goes with them.
            if let Some(pipe) = way.pipe.filter(|_| way.held == 0 && self.pipes.len() < SPARE_PIPES) {
                self.pipes.push(pipe);
            }
        }
    }
}

impl Connection {
    fn pump(&mut self, pipes: &mut Vec<Pipe>) -> Outcome {
        let Some(inner) = &self.inner else { return Outcome::Waits };
        let sockets = [inner, &self.outer];
        let mut more = false;
        for ((way, from), to) in self.ways.iter_mut().zip([0, 1]).zip([1, 0]) {
            let ([source, target], mut left) = ([sockets[from], sockets[to]], TURN);
            while !way.shut {
                let result = if way.held > 0 {
                    if !self.writable[to] {
                        break;
                    }
                    way.drain(target, &mut self.writable[to])
                } else if way.ended {
                    way.shut = true;
                    rustix::net::shutdown(target, Shutdown::Write)
                } else if !self.readable[from] {
                    break;
                } else if left == 0 {
                    more = true;
                    break;
                } else {
                    let taken = way.fill(source, &mut self.readable[from], pipes);
                    taken.map(|taken| left = left.saturating_sub(taken))
                };
                if result.is_err() {
                    return Outcome::Broken;
                }
            }
            if way.held == 0
                && let Some(pipe) = way.pipe.take()
                && pipes.len() < SPARE_PIPES
            {
                pipes.push(pipe);
            }
        }
        match self.ways.iter().all(|way| way.shut) {
            true => Outcome::Done,
            false if more => Outcome::Ready,
            false => Outcome::Waits,
        }
    }
}

impl Way {
    fn fill(&mut self, source: &OwnedFd, readable: &mut bool, pipes: &mut Vec<Pipe>) -> rustix::io::Result<usize> {
        let pipe = match &self.pipe {
            Some(pipe) => pipe,
            None => self.pipe.insert(pipes.pop().map_or_else(new_pipe, Ok)?),
        };
        match splice(source, None, &pipe.write, None, CHUNK, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            Ok(0) => self.ended = true,
            Ok(taken) => {
                self.held = taken;
                return Ok(taken);
            }
            Err(Errno::INTR) => {}
            // The pipe was empty, so it is the socket that has nothing.
            Err(Errno::AGAIN) => *readable = false,
            Err(errno) => return Err(errno),
        }
        Ok(0)
    }

    fn drain(&mut self, target: &OwnedFd, writable: &mut bool) -> rustix::io::Result<()> {
        let Some(pipe) = &self.pipe else { return Err(Errno::PIPE) };
        match splice(&pipe.read, None, target, None, self.held, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            Ok(0) => return Err(Errno::PIPE),
            Ok(given) => self.held = self.held.saturating_sub(given),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => *writable = false,
            Err(errno) => return Err(errno),
        }
        Ok(())
    }
}

fn new_pipe() -> rustix::io::Result<Pipe> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Smaller where the user's share is used up: slower, that is all.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, CHUNK);
    Ok(Pipe { read, write })
}

fn socket(to: SocketAddr) -> Result<OwnedFd, Cause> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(Cause::of)?;
    prepare(&socket);
    Ok(socket)
}

/// Sends at once, and notices a peer that has gone.
fn prepare(socket: &OwnedFd) {
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(socket, Duration::from_secs(15));
    let _ = sockopt::set_tcp_keepcnt(socket, 4);
}

/// The socket's closing is a reset.
fn reset(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

fn local_address(socket: &OwnedFd) -> Option<SocketAddr> {
    rustix::net::getsockname(socket.as_fd()).ok()?.try_into().ok()
}

fn refuse(syn: &[u8], cause: Cause, links: &mut Links) {
    let answer = match cause {
        Cause::Refused => packet::parse(syn).and_then(|syn| packet::reset(&syn)),
        Cause::Forbidden => packet::unreachable(syn, Why::Prohibited),
        Cause::NoRoute => packet::unreachable(syn, Why::Network),
        Cause::Unreachable => packet::unreachable(syn, Why::Host),
    };
    if let Some(answer) = answer {
        links.write(&answer);
    }
}
