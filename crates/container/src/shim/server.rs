//! The loop: connections of the daemon, and everything that its requests set going.

use super::containers::Container;
use super::execs::Exec;
use super::protocol::{ErrorKind, Network, Request, Response, SOCKET, Sandbox, State, VERSION};
use super::state;
use crate::cgroup::{Cgroup, DefaultDevices};
use crate::error::{During, Error, Result};
use crate::namespaces::{self, Pinned};
use crate::runtime::Stage;
use crate::sys::SingleThreaded;
use crate::wire::{self, Filled, Reader};
use rustix::event::{Timespec, epoll};
use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// Connections at a time; each exec and each watch has one.
const MAX_CONNECTIONS: usize = 1024;
/// How long after a start the set-up process for the next is made: what was started is busy now.
const SPARE_REST: Duration = Duration::from_millis(20);
/// How long an unused set-up process is kept.
const SPARE_LIFE: Duration = Duration::from_secs(60);
/// A set-up that takes longer is called off.
pub const START_LIMIT: Duration = Duration::from_secs(60);
const KILL_LIMIT: Duration = Duration::from_secs(10);
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const MAX_OWN_LOG: usize = 256 * 1024;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    Listener,
    Connection(u32),
    /// Set-up of a container.
    Launch(u32),
    /// First process of a container.
    Process(u32),
    Stdout(u32),
    Stderr(u32),
    ExecLaunch(u32),
    ExecProcess(u32),
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Self::Listener => (0, 0),
            Self::Connection(id) => (1, id),
            Self::Launch(id) => (2, id),
            Self::Process(id) => (3, id),
            Self::Stdout(id) => (4, id),
            Self::Stderr(id) => (5, id),
            Self::ExecLaunch(id) => (6, id),
            Self::ExecProcess(id) => (7, id),
        };
        kind << 32 | u64::from(id)
    }

    fn unpack(data: u64) -> Option<Self> {
        let id = data as u32;
        Some(match data >> 32 {
            0 => Self::Listener,
            1 => Self::Connection(id),
            2 => Self::Launch(id),
            3 => Self::Process(id),
            4 => Self::Stdout(id),
            5 => Self::Stderr(id),
            6 => Self::ExecLaunch(id),
            7 => Self::ExecProcess(id),
            _ => return None,
        })
    }
}

pub struct Connection {
    stream: UnixStream,
    reader: Reader,
    watching: Option<u64>,
}

pub struct Spare {
    pub stage: Stage,
    pub cgroup: Cgroup,
    until: Instant,
}

pub struct Server {
    pub alone: SingleThreaded,
    pub sandbox: Sandbox,
    pub cgroup: Cgroup,
    pub devices: Option<DefaultDevices>,
    pub pinned: Pinned,
    /// First process of a shared PID namespace, and that namespace.
    pub pid_holder: Option<(OwnedFd, OwnedFd)>,
    pub containers: BTreeMap<u32, Container>,
    pub execs: BTreeMap<u32, Exec>,
    pub spare: Option<Spare>,
    spare_at: Option<Instant>,
    connections: BTreeMap<u32, Connection>,
    epoll: OwnedFd,
    listener: UnixListener,
    _lock: File,
    next_id: u32,
    next_slot: u32,
    sequence: u64,
    logged: usize,
    paused: bool,
    ended: bool,
}

impl Server {
    pub fn new(
        alone: SingleThreaded,
        sandbox: Sandbox,
        cgroup: Cgroup,
        devices: Option<DefaultDevices>,
    ) -> Result<Self> {
        let lock = lock(&sandbox)?;
        // What a shim that was killed has left behind.
        if cgroup.exists() && !(cgroup.kill(KILL_LIMIT) && cgroup.remove(KILL_LIMIT).is_ok()) {
            return Err(Error::Refused(format!("processes of an earlier sandbox in {:?} do not end", sandbox.cgroup)));
        }
        cgroup.create()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).during(|| "epoll".into())?;
        let path = sandbox.run_dir.join(SOCKET);
        let _ = std::fs::remove_file(&path);
        let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(&path);
        rustix::process::umask(mask);
        let listener = listener.during(|| format!("listening on {}", path.display()))?;
        listener.set_nonblocking(true).during(|| "making the socket non-blocking".into())?;
        let scope = if sandbox.scoped { crate::sys::scope_all() } else { Ok(()) };
        let mut server = Self {
            alone,
            cgroup,
            devices,
            pinned: Pinned::default(),
            pid_holder: None,
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            spare: None,
            spare_at: None,
            connections: BTreeMap::new(),
            epoll,
            listener,
            _lock: lock,
            next_id: 0,
            next_slot: 0,
            // Another one than any earlier shim of this sandbox has given out.
            sequence: super::containers::now() as u64,
            logged: 0,
            paused: false,
            ended: false,
            sandbox,
        };
        if let Err(e) = scope {
            server.warn(&format!("Landlock keeps no scope here (Linux 6.12 can): {e}"));
        }
        server.make_sandbox()?;
        server.recover();
        server.watch_fd(server.listener.as_fd(), Token::Listener)?;
        Ok(server)
    }

    fn make_sandbox(&mut self) -> Result<()> {
        let mappings: Vec<_> = self.sandbox.id_map.into_iter().collect();
        let mut warnings = self.cgroup.set_for_pod(&self.sandbox.resources, self.devices.as_ref())?;
        let wanted = namespaces::Wanted {
            uid_mappings: &mappings,
            gid_mappings: &mappings,
            network: match &self.sandbox.network {
                Network::Host => namespaces::Network::Host,
                Network::New => namespaces::Network::New,
                Network::At(path) => namespaces::Network::At(path),
            },
            host_network: self.sandbox.host_network,
            ipc_and_uts: true,
            hostname: &self.sandbox.hostname,
            sysctl: &self.sandbox.sysctl,
        };
        let outcome = namespaces::pin(self.alone, &wanted, &mut |w| warnings.push(w)).and_then(|pinned| {
            if self.sandbox.share_pid {
                let (_, pidfd, namespace) =
                    namespaces::pid_holder(self.alone, pinned.user.as_ref(), &self.sandbox.run_dir)?;
                self.pid_holder = Some((pidfd, namespace));
            }
            self.pinned = pinned;
            Ok(())
        });
        for warning in warnings {
            self.warn(&warning);
        }
        outcome.inspect_err(|_| {
            let _ = self.cgroup.remove(KILL_LIMIT);
        })
    }

    /// Containers of a shim that was killed: what ran is gone with it.
    fn recover(&mut self) {
        let (states, bad) = state::load(&self.sandbox.dir);
        for line in bad {
            self.warn(&line);
        }
        for state in states {
            let id = self.id();
            let container = Container::recovered(state, &self.sandbox.dir);
            self.containers.insert(id, container);
        }
    }

    /// A set-up process is made ahead, for what is started first; on version 1 again after every start: see
    /// [`crate::runtime`].
    fn make_spare(&mut self) {
        self.spare_at = None;
        if self.spare.is_some() || self.ended || self.paused {
            return;
        }
        match self.stage() {
            Ok((stage, cgroup)) => self.spare = Some(Spare { stage, cgroup, until: Instant::now() + SPARE_LIFE }),
            Err(e) => self.warn(&e.to_string()),
        }
    }

    pub fn spare_soon(&mut self) {
        if self.cgroup.has_v1() {
            self.spare_at = Some(Instant::now() + SPARE_REST);
        }
    }

    /// A set-up process in a new control group of the pod's.
    pub fn stage(&mut self) -> Result<(Stage, Cgroup)> {
        let cgroup = self.cgroup.child(&format!("c{}", self.next_slot))?;
        self.next_slot += 1;
        cgroup.create()?;
        match Stage::prepare(self.alone, Some(&cgroup), &self.namespace_fds()) {
            Ok(stage) => Ok((stage, cgroup)),
            Err(e) => {
                let _ = cgroup.remove(Duration::ZERO);
                Err(e)
            }
        }
    }

    fn namespace_fds(&self) -> Vec<RawFd> {
        let pid = self.pid_holder.as_ref().map(|(_, namespace)| namespace);
        let all = [&self.pinned.user, &self.pinned.network, &self.pinned.ipc, &self.pinned.uts];
        all.into_iter().flatten().chain(pid).map(AsRawFd::as_raw_fd).collect()
    }

    pub fn run(&mut self) {
        self.make_spare();
        let mut events = Vec::with_capacity(16);
        while !self.ended {
            let timeout = self.next_deadline().map(|at| {
                let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
            });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return self.warn(&format!("epoll: {e}")),
            }
            for event in &events {
                if let Some(token) = Token::unpack(event.data.u64()) {
                    self.handle(token);
                }
            }
            self.check_deadlines();
        }
    }

    fn handle(&mut self, token: Token) {
        match token {
            Token::Listener => self.accept(),
            Token::Connection(id) => self.receive(id),
            Token::Launch(id) => self.launch_progress(id),
            Token::Process(id) => self.process_ended(id),
            Token::Stdout(id) => self.pump(id, 0),
            Token::Stderr(id) => self.pump(id, 1),
            Token::ExecLaunch(id) => self.exec_progress(id),
            Token::ExecProcess(id) => self.exec_ended(id),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let launches = self.containers.values().filter_map(Container::deadline);
        let execs = self.execs.values().filter_map(Exec::deadline);
        launches.chain(execs).chain(self.spare.as_ref().map(|s| s.until)).chain(self.spare_at).min()
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        if self.spare.as_ref().is_some_and(|s| s.until <= now)
            && let Some(spare) = self.spare.take()
        {
            dismiss(spare);
        }
        let late = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if late(self.spare_at) {
            self.make_spare();
        }
        let launches: Vec<u32> =
            self.containers.iter().filter(|(_, c)| late(c.deadline())).map(|(id, _)| *id).collect();
        for id in launches {
            self.start_failed(id, Error::Refused(format!("the set-up took longer than {START_LIMIT:?}")));
        }
        let execs: Vec<u32> = self.execs.iter().filter(|(_, e)| late(e.deadline())).map(|(id, _)| *id).collect();
        for id in execs {
            self.exec_failed(id, &Error::Refused(format!("the set-up took longer than {START_LIMIT:?}")));
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.id();
            if self.watch_fd(stream.as_fd(), Token::Connection(id)).is_ok() {
                self.connections.insert(id, Connection { stream, reader: Reader::default(), watching: None });
            }
        }
    }

    fn receive(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let filled = connection.reader.fill(&connection.stream);
        if !matches!(filled, Ok(Filled::Some | Filled::Nothing)) {
            return self.close(id);
        }
        while let Some(connection) = self.connections.get_mut(&id) {
            match connection.reader.next::<Request>() {
                Ok(None) => break,
                Ok(Some(request)) => self.request(id, request),
                Err(e) => {
                    let message = format!("request not understood by this shim (version {VERSION}): {e}");
                    self.refuse(id, ErrorKind::Refused, message);
                    return self.close(id);
                }
            }
        }
    }

    pub fn close(&mut self, id: u32) {
        self.connections.remove(&id);
        for container in self.containers.values_mut() {
            container.viewers.retain(|v| v.connection != id);
        }
        self.abandon_execs(id);
    }

    fn request(&mut self, id: u32, request: Request) {
        let outcome = match request {
            Request::Hello { .. } => {
                let pid = rustix::process::getpid().as_raw_nonzero().get() as u32;
                self.respond(id, &Response::Hello { version: VERSION, pid }, &[]);
                Ok(())
            }
            Request::Start(start) => self.start(id, *start),
            Request::List => {
                let containers: Vec<State> = self.containers.values().filter_map(Container::state).collect();
                self.respond(id, &Response::List { sequence: self.sequence, containers }, &[]);
                Ok(())
            }
            Request::Watch { seen } if seen == self.sequence => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.watching = Some(seen);
                }
                Ok(())
            }
            Request::Watch { .. } => {
                self.respond(id, &Response::Changed { sequence: self.sequence }, &[]);
                Ok(())
            }
            Request::Signal { name, signal } => self.signal(&name, signal).map(|()| self.done(id)),
            Request::Remove { name } => self.remove(&name).map(|()| self.done(id)),
            Request::Exec { name, command, streams } => self.exec(id, &name, *command, streams),
            Request::Attach { name, streams } => self.attach(id, &name, streams),
            Request::Pause => self.pause().map(|()| self.done(id)),
            Request::Resume => {
                self.cgroup.thaw();
                self.paused = false;
                self.done(id);
                Ok(())
            }
            Request::Shutdown => self.shutdown().map(|()| self.done(id)),
        };
        if let Err(e) = outcome {
            self.refuse_with(id, &e);
        }
    }

    fn done(&mut self, id: u32) {
        self.respond(id, &Response::Done, &[]);
    }

    pub fn refuse_with(&mut self, id: u32, error: &Error) {
        let kind = match error {
            Error::NoContainer(_) => ErrorKind::NoContainer,
            Error::NotRunning(_) => ErrorKind::NotRunning,
            Error::Exec { code, .. } => ErrorKind::Exec(*code),
            Error::Refused(_) => ErrorKind::Refused,
            Error::Step { .. } | Error::NoShim { .. } | Error::Shim(_) => ErrorKind::Failed,
        };
        let message = match error {
            Error::NoContainer(name) | Error::NotRunning(name) => name.clone(),
            other => other.to_string(),
        };
        self.refuse(id, kind, message);
    }

    fn refuse(&mut self, id: u32, kind: ErrorKind, message: String) {
        self.respond(id, &Response::Error { kind, message }, &[]);
    }

    /// A daemon that does not read its answers loses its connection.
    pub fn respond(&mut self, id: u32, response: &Response, fds: &[BorrowedFd<'_>]) {
        let Some(connection) = self.connections.get(&id) else { return };
        if let Err(e) = wire::send(&connection.stream, response, fds) {
            self.warn(&format!("answering: {e}"));
            // Dropped at the end of file that this brings.
            let _ = connection_shutdown(self.connections.get(&id));
        }
    }

    pub fn is_connected(&self, id: u32) -> bool {
        self.connections.contains_key(&id)
    }

    /// Wakes all that watch.
    pub fn changed(&mut self) {
        self.sequence += 1;
        let waiting: Vec<u32> =
            self.connections.iter_mut().filter_map(|(id, c)| c.watching.take().map(|_| *id)).collect();
        for id in waiting {
            self.respond(id, &Response::Changed { sequence: self.sequence }, &[]);
        }
    }

    /// A set-up process must not be caught in it: waiting for one would stop this loop.
    fn pause(&mut self) -> Result<()> {
        if self.containers.values().any(|c| c.deadline().is_some())
            || self.execs.values().any(|e| e.deadline().is_some())
        {
            return Err(Error::Shim("a process is being started".into()));
        }
        if let Some(spare) = self.spare.take() {
            dismiss(spare);
        }
        self.cgroup.freeze()?;
        self.paused = true;
        Ok(())
    }

    pub fn check_not_paused(&self) -> Result<()> {
        if self.paused { Err(Error::Shim("the sandbox is paused".into())) } else { Ok(()) }
    }

    /// Everything of the sandbox's goes; then the loop ends.
    fn shutdown(&mut self) -> Result<()> {
        if !self.cgroup.kill(KILL_LIMIT) {
            return Err(Error::Shim(format!("processes do not end within {KILL_LIMIT:?} of SIGKILL")));
        }
        if let Some(spare) = self.spare.take() {
            dismiss(spare);
        }
        for container in self.containers.values_mut() {
            container.reap();
        }
        for exec in self.execs.values_mut() {
            exec.reap();
        }
        if let Some((pidfd, _)) = self.pid_holder.take() {
            super::containers::end_child(pidfd.as_fd());
        }
        let _ = std::fs::remove_file(self.sandbox.run_dir.join(SOCKET));
        self.cgroup.remove(KILL_LIMIT)?;
        self.ended = true;
        Ok(())
    }

    pub fn id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    pub fn watch_fd(&self, fd: BorrowedFd<'_>, token: Token) -> Result<()> {
        let data = epoll::EventData::new_u64(token.pack());
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN).during(|| format!("watching {token:?}"))
    }

    pub fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Into the shim's own log, which does not grow for ever.
    pub fn warn(&mut self, text: &str) {
        if self.logged < MAX_OWN_LOG {
            self.logged += text.len() + 1;
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    pub fn host_ids(&self, uid: u32, gid: u32) -> (u32, u32) {
        let shift = |id: u32| self.sandbox.id_map.map_or(id, |map| map.host_id.saturating_add(id));
        (shift(uid), shift(gid))
    }
}

fn connection_shutdown(connection: Option<&Connection>) -> Option<()> {
    connection?.stream.shutdown(std::net::Shutdown::Both).ok()
}

fn dismiss(spare: Spare) {
    spare.stage.dismiss();
    let _ = spare.cgroup.remove(Duration::from_millis(100));
}

/// One shim a sandbox: the lock is held as long as the process lives. One that is being killed may hold it a moment
/// longer than its socket.
fn lock(sandbox: &Sandbox) -> Result<File> {
    let path = sandbox.run_dir.join("shim.lock");
    let file = File::create(&path).during(|| format!("making {}", path.display()))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= deadline {
            return Err(Error::Shim(format!("{}: another shim of this sandbox is running", path.display())));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(file)
}
