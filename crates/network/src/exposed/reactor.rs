//! The relay's one thread: waits for all sockets at once and does what each is ready for, a little at a time.

use super::datagram::{self, Parties, Session};
use super::health::Caller;
use super::sctp::Association;
use super::slots::{Slots, Token};
use super::stream::{Connection, Moved, Pool, reset};
use super::{Exposure, Key, Leads, Origin, connect};
use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::services::Protocol;
use crate::sys::datagram::receive_from;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections and sessions together; one port gets a quarter.
const MOST: usize = 8192;
/// Descriptors left to the rest of the process.
const RESERVED: u64 = 512;
/// Connections accepted, or datagrams taken, before others get their turn.
const TURN: usize = 64;
/// How often time limits are looked at, while there are any.
const TICK: Duration = Duration::from_secs(1);
const WAKE: u64 = u64::MAX;

pub enum Command {
    Open(Arc<Exposure>, OwnedFd),
    Change(Arc<Exposure>),
    Close(Key),
}

/// How the reactor is told what to do.
pub struct Mailbox {
    wake: OwnedFd,
    commands: Mutex<Vec<Command>>,
    done: Condvar,
    running: AtomicBool,
    stop: AtomicBool,
}

impl Mailbox {
    pub fn new() -> io::Result<Mailbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Mailbox { wake, commands: Mutex::default(), done: Condvar::new(), running, stop })
    }
    /// Waits until they are obeyed. Where nothing runs there is nothing to change or close.
    pub fn post(&self, commands: Vec<Command>) {
        if commands.is_empty() || !self.running.load(Ordering::Acquire) {
            return;
        }
        let mut pending = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        pending.extend(commands);
        self.wake();
        let unfinished = |pending: &mut Vec<Command>| !pending.is_empty() && self.running.load(Ordering::Acquire);
        drop(self.done.wait_while(pending, unfinished));
    }
    fn ended(&self) {
        let pending = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.store(false, Ordering::Release);
        drop(pending);
        self.done.notify_all();
    }
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

enum Entry {
    Port(Port),
    Datagrams(datagram::Port),
    Connection(Box<Connection>),
    Session(Box<Session>),
    Caller(Box<Caller>, Token),
}

/// A TCP port.
struct Port {
    socket: OwnedFd,
    exposure: Arc<Exposure>,
    turn: usize,
    live: usize,
}

/// Starts the thread in the caller's namespace.
pub fn spawn(mailbox: Arc<Mailbox>, config: RouterConfig) -> Result<JoinHandle<()>> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::errno("make an epoll descriptor"))?;
    epoll::add(&epoll, &mailbox.wake, EventData::new_u64(WAKE), EventFlags::IN)
        .map_err(Error::errno("wait for an event descriptor"))?;
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let affordable = usize::try_from(descriptors.saturating_sub(RESERVED) / 4).unwrap_or(MOST);
    let most = affordable.clamp(16, MOST);
    let mut reactor = Reactor {
        epoll,
        slots: Slots::new(),
        ports: HashMap::new(),
        pool: Pool::default(),
        unfinished: VecDeque::new(),
        associations: HashSet::new(),
        paused: Vec::new(),
        most,
        share: most / 4,
        live: 0,
        now: Instant::now(),
        buffer: vec![0; 64 << 10],
        config,
    };
    mailbox.running.store(true, Ordering::Release);
    let work = move || {
        reactor.run(&mailbox);
        mailbox.ended();
    };
    std::thread::Builder::new().name("atoll-exposed".into()).spawn(work).map_err(Error::system("start a thread"))
}

struct Reactor {
    epoll: OwnedFd,
    slots: Slots<Entry>,
    ports: HashMap<Key, Token>,
    pool: Pool,
    /// Connections with more to move than they had time for.
    unfinished: VecDeque<Token>,
    associations: HashSet<Association>,
    /// Ports that do not accept for a moment, for lack of descriptors.
    paused: Vec<Token>,
    most: usize,
    /// Of one port.
    share: usize,
    /// Connections, sessions and callers.
    live: usize,
    now: Instant,
    buffer: Vec<u8>,
    config: RouterConfig,
}

impl Reactor {
    fn run(&mut self, mailbox: &Mailbox) {
        let mut events = Vec::with_capacity(256);
        let mut swept = Instant::now();
        while !mailbox.stop.load(Ordering::Acquire) {
            let tick = Timespec { tv_sec: TICK.as_secs().cast_signed(), tv_nsec: 0 };
            let timeout = match (self.unfinished.is_empty(), self.live == 0 && self.paused.is_empty()) {
                (false, _) => Some(Timespec { tv_sec: 0, tv_nsec: 0 }),
                (true, false) => Some(tick),
                (true, true) => None,
            };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("the host's ports are closed: wait for sockets: {errno}");
                    return;
                }
            }
            self.now = Instant::now();
            for event in &events {
                let (data, flags) = (event.data, event.flags);
                match data.u64() {
                    WAKE => self.obey(mailbox),
                    other => self.event(Token::of_event(other), flags),
                }
            }
            for _ in 0..self.unfinished.len() {
                let Some(token) = self.unfinished.pop_front() else { break };
                self.connection(token, None);
            }
            if self.now.duration_since(swept) >= TICK {
                swept = self.now;
                self.sweep();
            }
        }
    }

    fn obey(&mut self, mailbox: &Mailbox) {
        let _ = rustix::io::read(&mailbox.wake, &mut [0; 8]);
        let mut pending = mailbox.commands.lock().unwrap_or_else(PoisonError::into_inner);
        for command in pending.drain(..) {
            match command {
                Command::Open(exposure, socket) => self.open(exposure, socket),
                Command::Change(exposure) => self.change(&exposure),
                Command::Close(key) => self.close(key),
            }
        }
        drop(pending);
        mailbox.done.notify_all();
    }

    fn open(&mut self, exposure: Arc<Exposure>, socket: OwnedFd) {
        let token = self.slots.reserve();
        self.watch(&socket, token, false, EventFlags::IN);
        self.ports.insert(exposure.key(), token);
        let entry = match exposure.protocol {
            Protocol::Udp | Protocol::Sctp => {
                Entry::Datagrams(datagram::Port { socket, exposure, sessions: HashMap::new(), turn: 0 })
            }
            Protocol::Tcp => Entry::Port(Port { socket, exposure, turn: 0, live: 0 }),
        };
        self.slots.put(token, entry);
    }

    /// A port leads elsewhere. What it would not take any more ends.
    fn change(&mut self, exposure: &Arc<Exposure>) {
        let Some(token) = self.ports.get(&exposure.key()).copied() else { return };
        let other = match self.slots.get(token) {
            Some(Entry::Port(port)) => std::mem::replace(&mut port.exposure, exposure.clone()),
            Some(Entry::Datagrams(port)) => std::mem::replace(&mut port.exposure, exposure.clone()),
            _ => return,
        };
        let same = (&other.namespace, &other.name) == (&exposure.namespace, &exposure.name);
        let ended = self.slots.tokens(|entry| match entry {
            Entry::Connection(own) => own.port == token && !(same && exposure.admits(own.peer)),
            Entry::Session(own) => {
                let stays = same && exposure.admits(own.parties.0.ip()) && exposure.endpoints().contains(&own.endpoint);
                own.port == token && !stays
            }
            Entry::Port(_) | Entry::Datagrams(_) | Entry::Caller(..) => false,
        });
        ended.into_iter().for_each(|token| self.end(token, true));
    }

    fn close(&mut self, key: Key) {
        let Some(port) = self.ports.remove(&key) else { return };
        let ended = self.slots.tokens(|entry| match entry {
            Entry::Connection(own) => own.port == port,
            Entry::Session(own) => own.port == port,
            Entry::Caller(_, own) => *own == port,
            Entry::Port(_) | Entry::Datagrams(_) => false,
        });
        ended.into_iter().for_each(|token| self.end(token, true));
        self.slots.remove(port);
    }

    /// Ends a connection, session or caller.
    fn end(&mut self, token: Token, broken: bool) {
        let Some(entry) = self.slots.remove(token) else { return };
        self.gone(entry, broken);
    }

    fn gone(&mut self, entry: Entry, broken: bool) {
        let port = match &entry {
            Entry::Connection(own) => own.port,
            Entry::Session(own) => {
                if let Some(association) = &own.association {
                    self.associations.remove(association);
                }
                own.port
            }
            Entry::Caller(_, port) => *port,
            Entry::Port(_) | Entry::Datagrams(_) => return,
        };
        self.live = self.live.saturating_sub(1);
        match self.slots.get(port) {
            Some(Entry::Port(port)) => port.live = port.live.saturating_sub(1),
            Some(Entry::Datagrams(port)) => {
                if let Entry::Session(own) = &entry {
                    port.sessions.remove(&own.parties);
                }
            }
            _ => {}
        }
        if let (Entry::Connection(own), true) = (entry, broken) {
            own.abort();
        }
    }

    fn watch(&self, socket: impl AsFd, token: Token, second: bool, flags: EventFlags) {
        if let Err(errno) = epoll::add(&self.epoll, socket, EventData::new_u64(token.event(second)), flags) {
            tracing::warn!("wait for a socket of the host's ports: {errno}");
        }
    }

    fn event(&mut self, (token, second): (Token, bool), flags: EventFlags) {
        match self.slots.get(token) {
            Some(Entry::Port(_)) => self.accept(token),
            Some(Entry::Datagrams(_)) => self.datagrams(token),
            Some(Entry::Connection(_)) => self.connection(token, Some((second, flags))),
            Some(Entry::Session(_)) => self.answers(token),
            Some(Entry::Caller(..)) => self.caller(token),
            None => {}
        }
    }

    fn accept(&mut self, token: Token) {
        let Some(Entry::Port(mut port)) = self.slots.take(token) else { return };
        for _ in 0..TURN {
            match rustix::net::acceptfrom_with(&port.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, Some(peer))) => {
                    // A socket that is not taken is dropped, which resets it.
                    if let Ok(peer) = SocketAddr::try_from(peer) {
                        self.accepted(token, &mut port, socket, peer.ip());
                    }
                }
                Ok((_, None)) | Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    let _ = epoll::delete(&self.epoll, &port.socket);
                    self.paused.push(token);
                    break;
                }
                Err(_) => break,
            }
        }
        self.slots.put(token, Entry::Port(port));
    }

    fn accepted(&mut self, token: Token, port: &mut Port, client: OwnedFd, peer: IpAddr) {
        reset(&client);
        let local = rustix::net::getsockname(&client).ok().and_then(|own| SocketAddr::try_from(own).ok());
        let origin = Origin::of(&self.config, peer, local.map(|own| own.ip()));
        let room = self.live < self.most && port.live < self.share;
        if origin == Origin::Nobody || !room || !port.exposure.admits(peer) {
            return;
        }
        let entry = match &port.exposure.leads {
            Leads::Health { .. } => {
                let _ = rustix::net::sockopt::set_socket_linger(&client, None);
                Entry::Caller(Box::new(Caller::new(TcpStream::from(client), self.now)), token)
            }
            Leads::To { .. } => {
                port.turn = port.turn.wrapping_add(1);
                let Some(endpoint) = port.exposure.pick(peer, port.turn) else { return };
                let Ok(socket) = connect(Protocol::Tcp, origin, endpoint.into()) else { return };
                let _ = rustix::net::sockopt::set_socket_linger(&client, None);
                match Connection::new(client, socket, token, peer, self.now) {
                    Ok(connection) => Entry::Connection(Box::new(connection)),
                    Err(_) => return,
                }
            }
        };
        let own = self.slots.reserve();
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        match &entry {
            Entry::Connection(connection) => {
                self.watch(&connection.client, own, false, edges);
                self.watch(&connection.endpoint, own, true, edges);
            }
            Entry::Caller(caller, _) => self.watch(caller.socket(), own, false, EventFlags::IN),
            Entry::Port(_) | Entry::Datagrams(_) | Entry::Session(_) => {}
        }
        self.slots.put(own, entry);
        self.live += 1;
        port.live += 1;
    }

    fn connection(&mut self, token: Token, event: Option<(bool, EventFlags)>) {
        let Some(Entry::Connection(mut own)) = self.slots.take(token) else { return };
        let ready = match event {
            Some((endpoint, flags)) => {
                let over = flags.intersects(EventFlags::ERR | EventFlags::HUP);
                let readable = over || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
                own.ready(endpoint, readable, over || flags.contains(EventFlags::OUT))
            }
            None => {
                own.queued = false;
                Ok(())
            }
        };
        let moved = ready.and_then(|()| own.advance(&mut self.pool));
        match moved {
            Ok(Moved::More) => {
                if !std::mem::replace(&mut own.queued, true) {
                    self.unfinished.push_back(token);
                }
                self.slots.put(token, Entry::Connection(own));
            }
            Ok(Moved::All) => self.slots.put(token, Entry::Connection(own)),
            done => {
                self.slots.put(token, Entry::Connection(own));
                self.end(token, done.is_err());
            }
        }
    }

    fn datagrams(&mut self, token: Token) {
        let Some(Entry::Datagrams(mut port)) = self.slots.take(token) else { return };
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..TURN {
            match receive_from(port.socket.as_fd(), &mut buffer) {
                Ok((length, client, local)) => {
                    let data = buffer.get_mut(..length).unwrap_or_default();
                    if let Some((client, data)) = port.heard(client, data) {
                        self.datagram(token, &mut port, (client, local), data);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.buffer = buffer;
        self.slots.put(token, Entry::Datagrams(port));
    }

    fn datagram(&mut self, token: Token, port: &mut datagram::Port, parties: Parties, data: &mut [u8]) {
        let now = self.now;
        let known = port.sessions.get(&parties).copied();
        let session = match known {
            Some(session) => session,
            None => match self.session(token, port, parties) {
                Some(session) => session,
                None => return,
            },
        };
        let Some(Entry::Session(own)) = self.slots.get(session) else { return };
        if own.forward(data, now).is_err() {
            // The endpoint is gone or refuses; the next datagram finds another.
            port.sessions.remove(&parties);
            self.end(session, true);
        }
    }

    fn session(&mut self, token: Token, port: &mut datagram::Port, parties: Parties) -> Option<Token> {
        let peer = parties.0.ip();
        // A port of one address does not tell it with every datagram.
        let local = parties.1.unwrap_or_else(|| port.exposure.listen.ip());
        let origin = Origin::of(&self.config, peer, Some(local));
        let room = self.live < self.most && port.sessions.len() < self.share;
        if origin == Origin::Nobody || !room || !port.exposure.admits(peer) {
            return None;
        }
        port.turn = port.turn.wrapping_add(1);
        let endpoint = port.exposure.pick(peer, port.turn)?;
        let session = Session::open((token, &port.exposure), parties, origin, endpoint, self.now).ok()?;
        if session.association.is_some_and(|own| !self.associations.insert(own)) {
            return None;
        }
        let own = self.slots.reserve();
        self.watch(&session.socket, own, false, EventFlags::IN);
        self.slots.put(own, Entry::Session(Box::new(session)));
        port.sessions.insert(parties, own);
        self.live += 1;
        Some(own)
    }

    fn answers(&mut self, token: Token) {
        let Some(Entry::Session(mut own)) = self.slots.take(token) else { return };
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut more = Ok(true);
        if let Some(Entry::Datagrams(port)) = self.slots.get(own.port) {
            for _ in 0..TURN {
                more = own.back(&port.socket, &mut buffer, self.now);
                if !matches!(more, Ok(true)) {
                    break;
                }
            }
        }
        self.buffer = buffer;
        self.slots.put(token, Entry::Session(own));
        if more.is_err() {
            self.end(token, true);
        }
    }

    fn caller(&mut self, token: Token) {
        let Some(Entry::Caller(mut caller, port)) = self.slots.take(token) else { return };
        let over = match self.slots.get(port) {
            Some(Entry::Port(port)) => match &port.exposure.leads {
                Leads::Health { endpoints } => caller.advance(&port.exposure, *endpoints).unwrap_or(true),
                Leads::To { .. } => true,
            },
            _ => true,
        };
        self.slots.put(token, Entry::Caller(caller, port));
        if over {
            self.end(token, false);
        }
    }

    /// Ends what has run out of time; ports that paused go on.
    fn sweep(&mut self) {
        let now = self.now;
        let over = self.slots.tokens(|entry| match entry {
            Entry::Connection(own) => own.deadline.is_some_and(|deadline| deadline <= now),
            Entry::Session(own) => own.is_over(now),
            Entry::Caller(own, _) => own.deadline <= now,
            Entry::Port(_) | Entry::Datagrams(_) => false,
        });
        over.into_iter().for_each(|token| self.end(token, true));
        for token in std::mem::take(&mut self.paused) {
            if let Some(Entry::Port(port)) = self.slots.get(token) {
                let data = EventData::new_u64(token.event(false));
                let _ = epoll::add(&self.epoll, &port.socket, data, EventFlags::IN);
            }
        }
    }
}
