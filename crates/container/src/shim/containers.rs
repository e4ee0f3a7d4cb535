//! A container in the shim: its start, its output, its end.

use super::log::{Log, Partial};
use super::protocol::{Phase, Response, Start, State};
use super::server::{START_LIMIT, Server, Token};
use super::state;
use super::viewers::{Viewer, show};
use crate::cgroup::Cgroup;
use crate::error::{During, Error, Result};
use crate::runtime::{Launch, Plan, Progress, Rootfs, Stdio};
use crate::spec::{Namespace, NamespaceKind, Process, Resources, Spec};
use crate::sys;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use rustix::thread::{Gid, Uid};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

const STREAM_NAMES: [&str; 2] = ["stdout", "stderr"];
/// Read from one stream before others get their turn.
const TURN: usize = 4;

pub struct Container {
    name: String,
    attempt: u32,
    cgroup: Option<Cgroup>,
    pid: Option<u32>,
    pidfd: Option<OwnedFd>,
    life: Life,
    pub streams: [Option<Stream>; 2],
    log: Option<Log>,
    pub stdin: Option<OwnedFd>,
    pub stdin_once: bool,
    pub terminal: Option<OwnedFd>,
    resources: Resources,
    /// For what is executed in it later.
    pub process: Process,
    pub confinement: crate::process::Confinement,
    pub viewers: Vec<Viewer>,
}

enum Life {
    Starting { launch: Box<Launch>, waiters: Vec<u32>, deadline: Instant },
    Running { started: i64 },
    Exited(Phase),
}

pub struct Stream {
    fd: OwnedFd,
    partial: Partial,
}

impl Container {
    /// From what an earlier shim left.
    pub fn recovered(state: State, base: &Path) -> Self {
        let phase = match state.phase {
            Phase::Running { started } => Phase::Exited {
                started,
                finished: now(),
                code: 137,
                signal: Some(9),
                oom_killed: false,
                message: "the process that supervised it was killed".into(),
            },
            exited => exited,
        };
        let recovered = Self {
            name: state.name,
            attempt: state.attempt,
            cgroup: None,
            pid: None,
            pidfd: None,
            life: Life::Exited(phase),
            streams: [None, None],
            log: None,
            stdin: None,
            stdin_once: false,
            terminal: None,
            resources: Resources::default(),
            process: Process::default(),
            confinement: Default::default(),
            viewers: Vec::new(),
        };
        if let Some(state) = recovered.state() {
            let _ = state::save(base, &state, true);
        }
        recovered
    }

    pub fn deadline(&self) -> Option<Instant> {
        if let Life::Starting { deadline, .. } = &self.life { Some(*deadline) } else { None }
    }

    /// `None` until it has been started.
    pub fn state(&self) -> Option<State> {
        let phase = match &self.life {
            Life::Starting { .. } => return None,
            Life::Running { started } => Phase::Running { started: *started },
            Life::Exited(phase) => phase.clone(),
        };
        let pid = self.pid.filter(|_| matches!(self.life, Life::Running { .. }));
        let cgroup = self.cgroup.as_ref().map(|c| c.path().to_owned()).unwrap_or_default();
        Some(State { name: self.name.clone(), attempt: self.attempt, pid, cgroup, phase })
    }

    fn is_running(&self) -> bool {
        matches!(self.life, Life::Running { .. })
    }

    /// What a process that joins the container needs.
    pub fn join_target(&self, name: &str) -> Result<(OwnedFd, Cgroup)> {
        let pidfd = self.pidfd.as_ref().ok_or_else(|| Error::NotRunning(name.into()))?;
        let cgroup = self.cgroup.clone().ok_or_else(|| Error::NotRunning(name.into()))?;
        Ok((pidfd.try_clone().during(|| "sharing a pidfd".into())?, cgroup))
    }

    /// For the shutdown: the process is dead, take its remains.
    pub fn reap(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            end_child(pidfd.as_fd());
        }
    }
}

pub fn end_child(pidfd: BorrowedFd<'_>) {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let _ = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED);
}

pub fn now() -> i64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}

/// Exit code as a shell gives it, and the signal if there was one.
pub fn exit_code(pidfd: BorrowedFd<'_>) -> (i32, Option<i32>) {
    match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => (code, None),
            (None, Some(signal)) => (128 + signal, Some(signal)),
            (None, None) => (255, None),
        },
        _ => (255, None),
    }
}

/// (read end, write end). The end that stays here does not block; the process's end belongs to its user, so that
/// `/dev/stdout` can be opened again.
pub fn pipe_for(process_reads: bool, owner: (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(|| "making a pipe".into())?;
    let (ours, theirs) = if process_reads { (&write, &read) } else { (&read, &write) };
    rustix::io::ioctl_fionbio(ours, true).during(|| "making a pipe non-blocking".into())?;
    let _ = rustix::fs::fchown(theirs, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
    Ok((read, write))
}

pub fn null() -> Result<OwnedFd> {
    open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).during(|| "/dev/null".into())
}

fn check_name(name: &str) -> Result<()> {
    let plain = !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if plain { Ok(()) } else { Err(Error::Refused(format!("container name {name:?}: letters, digits and `-` only"))) }
}

impl Server {
    pub fn find(&self, name: &str) -> Option<u32> {
        self.containers.iter().find(|(_, c)| c.name == name).map(|(id, _)| *id)
    }

    /// A running container, for signals, exec and attach.
    pub fn running(&mut self, name: &str) -> Result<(u32, &mut Container)> {
        let id = self.find(name).ok_or_else(|| Error::NoContainer(name.into()))?;
        match self.containers.get_mut(&id) {
            Some(container) if container.is_running() => Ok((id, container)),
            _ => Err(Error::NotRunning(name.into())),
        }
    }

    pub fn start(&mut self, connection: u32, start: Start) -> Result<()> {
        check_name(&start.name)?;
        if let Some(id) = self.find(&start.name)
            && let Some(container) = self.containers.get_mut(&id)
        {
            let same = container.attempt == start.attempt;
            match (&mut container.life, same) {
                (Life::Starting { waiters, .. }, true) => {
                    waiters.push(connection);
                    return Ok(());
                }
                (Life::Running { .. } | Life::Exited(_), true) => {
                    if let Some(state) = container.state() {
                        self.respond(connection, &Response::Started(state), &[]);
                    }
                    return Ok(());
                }
                (Life::Exited(_), false) => self.remove(&start.name)?,
                (_, false) => {
                    let message = format!("container {}: attempt {} is still there", start.name, container.attempt);
                    return Err(Error::Shim(message));
                }
            }
        }
        self.check_not_paused()?;
        let directory = state::directory(&self.sandbox.dir, &start.name, start.attempt);
        let outcome = self.begin(connection, start, &directory);
        if outcome.is_err() {
            let _ = std::fs::remove_dir_all(&directory);
        }
        outcome
    }

    fn begin(&mut self, connection: u32, start: Start, directory: &Path) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        // Left by a start that a kill of this shim interrupted: an overlay must not find it.
        let _ = std::fs::remove_dir_all(directory);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .during(|| format!("making {}", directory.display()))?;
        let log = Log::open(&start.log_path, start.log_max_bytes)
            .during(|| format!("opening the log {}", start.log_path.display()))?;
        let mut spec = start.spec;
        let resources = std::mem::take(&mut spec.linux.resources);
        self.complete(&mut spec);
        let user = &spec.process.user;
        let owner = self.host_ids(user.uid, user.gid);
        let (mut stdio, mut ours) = (None, (None, None, None));
        if !spec.process.terminal {
            let (stdin, keep) = if start.stdin {
                let (read, write) = pipe_for(true, owner)?;
                (read, Some(write))
            } else {
                (null()?, None)
            };
            let (out_read, stdout) = pipe_for(false, owner)?;
            let (err_read, stderr) = pipe_for(false, owner)?;
            stdio = Some(Stdio { stdin, stdout, stderr });
            ours = (keep, Some(out_read), Some(err_read));
        }
        let (stage, cgroup) = match self.spare.take() {
            Some(spare) => (spare.stage, spare.cgroup),
            None => self.stage()?,
        };
        let mut process = spec.process.clone();
        process.args = Vec::new();
        let plan = Plan {
            spec,
            rootfs: Rootfs::Layers { lower: start.layers, state: directory.to_owned() },
            scratch: self.sandbox.run_dir.clone(),
            confinement: start.confinement,
            bundle: None,
        };
        let launch = stage.create(plan, stdio.as_ref())?;
        let id = self.id();
        self.watch_fd(launch.socket(), Token::Launch(id))?;
        let stream = |fd: Option<OwnedFd>| fd.map(|fd| Stream { fd, partial: Partial::default() });
        let life = Life::Starting {
            launch: Box::new(launch),
            waiters: vec![connection],
            deadline: Instant::now() + START_LIMIT,
        };
        self.containers.insert(
            id,
            Container {
                name: start.name,
                attempt: start.attempt,
                cgroup: Some(cgroup),
                pid: None,
                pidfd: None,
                life,
                streams: [stream(ours.1), stream(ours.2)],
                log: Some(log),
                stdin: ours.0,
                stdin_once: start.stdin_once,
                terminal: None,
                resources,
                process,
                confinement: start.confinement,
                viewers: Vec::new(),
            },
        );
        Ok(())
    }

    /// The sandbox's share of a container's configuration.
    fn complete(&self, spec: &mut Spec) {
        let mappings: Vec<_> = self.sandbox.id_map.into_iter().collect();
        spec.linux.uid_mappings.clone_from(&mappings);
        spec.linux.gid_mappings = mappings;
        let at = |fd: &OwnedFd| Some(PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())));
        let pid = self.pid_holder.as_ref().map(|(_, namespace)| namespace);
        let mut list = vec![
            Namespace { kind: NamespaceKind::Mount, path: None },
            Namespace { kind: NamespaceKind::Cgroup, path: None },
            Namespace { kind: NamespaceKind::Pid, path: pid.and_then(at) },
        ];
        for (kind, fd) in [
            (NamespaceKind::User, &self.pinned.user),
            (NamespaceKind::Network, &self.pinned.network),
            (NamespaceKind::Ipc, &self.pinned.ipc),
            (NamespaceKind::Uts, &self.pinned.uts),
        ] {
            if let Some(fd) = fd {
                list.push(Namespace { kind, path: at(fd) });
            }
        }
        spec.linux.namespaces = list;
    }

    pub fn launch_progress(&mut self, id: u32) {
        loop {
            let Some(container) = self.containers.get_mut(&id) else { return };
            let Life::Starting { launch, .. } = &mut container.life else { return };
            match launch.progress() {
                Progress::Pending => return,
                Progress::Created(pid) => {
                    container.pid = Some(pid);
                    container.pidfd = Pid::from_raw(pid as i32).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
                    // Limits come before anything of the tenant's runs, and after the set-up has made its processes.
                    let set = container
                        .cgroup
                        .as_ref()
                        .map(|c| c.set_for_pod(&container.resources, self.devices.as_ref()))
                        .unwrap_or(Ok(Vec::new()));
                    let warnings = match set {
                        Ok(warnings) => warnings,
                        Err(e) => return self.start_failed(id, e),
                    };
                    launch.go();
                    for warning in warnings {
                        self.warn(&warning);
                    }
                }
                // Only containers of a bundle stop here.
                Progress::Mounted | Progress::Ready => {}
                Progress::Executed => return self.started(id),
                Progress::Failed(error) => return self.start_failed(id, error),
            }
        }
    }

    fn started(&mut self, id: u32) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        let Life::Starting { launch, waiters, .. } =
            std::mem::replace(&mut container.life, Life::Running { started: now() })
        else {
            return;
        };
        let mut launch = *launch;
        if let Some(master) = launch.terminal.take() {
            container.streams = [Stream::of(&master), None];
            container.terminal = Some(master);
        }
        let state = container.state();
        let warnings = std::mem::take(&mut launch.warnings);
        self.unwatch(launch.socket());
        drop(launch);
        for warning in warnings {
            self.warn(&warning);
        }
        let Some(state) = state else { return };
        if let Err(e) = state::save(&self.sandbox.dir, &state, false) {
            self.warn(&format!("saving the state of {}: {e}", state.name));
        }
        let mut failed = Vec::new();
        if let Some(container) = self.containers.get(&id) {
            let fds = [
                (container.pidfd.as_ref(), Token::Process(id)),
                (container.streams[0].as_ref().map(|s| &s.fd), Token::Stdout(id)),
                (container.streams[1].as_ref().map(|s| &s.fd), Token::Stderr(id)),
            ];
            for (fd, token) in fds {
                if let Some(fd) = fd {
                    failed.extend(self.watch_fd(fd.as_fd(), token).err());
                }
            }
        }
        for error in failed {
            self.warn(&error.to_string());
        }
        for waiter in waiters {
            self.respond(waiter, &Response::Started(state.clone()), &[]);
        }
        self.changed();
        self.spare_soon();
    }

    pub fn start_failed(&mut self, id: u32, error: Error) {
        let Some(mut container) = self.containers.remove(&id) else { return };
        container.reap();
        if let Some(cgroup) = container.cgroup.take() {
            cgroup.kill(Duration::from_secs(1));
            if let Err(e) = cgroup.remove(Duration::from_secs(1)) {
                self.warn(&e.to_string());
            }
        }
        let _ = std::fs::remove_dir_all(state::directory(&self.sandbox.dir, &container.name, container.attempt));
        if let Life::Starting { launch, waiters, .. } = container.life {
            self.unwatch(launch.socket());
            for waiter in waiters {
                self.refuse_with(waiter, &error);
            }
        }
        self.spare_soon();
    }

    /// One stream has something to say.
    pub fn pump(&mut self, id: u32, which: usize) {
        let mut chunk = [0; 16 * 1024];
        let mut trouble = None;
        let Some(container) = self.containers.get_mut(&id) else { return };
        for _ in 0..TURN {
            let Some(stream) = container.streams.get_mut(which).and_then(Option::as_mut) else { return };
            let name = STREAM_NAMES.get(which).copied().unwrap_or_default();
            match rustix::io::read(&stream.fd, &mut chunk) {
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // A terminal says EIO when its last slave is closed.
                Ok(0) | Err(_) => {
                    if let Some(log) = &mut container.log {
                        trouble = log.finish(name, &mut stream.partial, now()).err();
                    }
                    for viewer in &mut container.viewers {
                        if let Some(output) = viewer.outputs.get_mut(which) {
                            *output = None;
                        }
                    }
                    if let Some(stream) = container.streams.get_mut(which).and_then(Option::take) {
                        self.unwatch(stream.fd.as_fd());
                    }
                    break;
                }
                Ok(length) => {
                    let data = chunk.get(..length).unwrap_or_default();
                    if let Some(log) = &mut container.log {
                        trouble = log.feed(name, &mut stream.partial, data, now()).err();
                    }
                    show(&mut container.viewers, which, data);
                }
            }
        }
        if let Some(e) = trouble {
            self.warn(&format!("writing a log: {e}"));
        }
    }

    pub fn process_ended(&mut self, id: u32) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        let Some(pidfd) = container.pidfd.take() else { return };
        let (code, signal) = exit_code(pidfd.as_fd());
        self.unwatch(pidfd.as_fd());
        self.end(id, code, signal);
    }

    fn end(&mut self, id: u32, code: i32, signal: Option<i32>) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        let Life::Running { started } = container.life else { return };
        let mut oom_killed = false;
        if let Some(cgroup) = &container.cgroup {
            oom_killed = code != 0 && cgroup.oom_kills() > 0;
            // In a shared PID namespace others of the container may be left.
            cgroup.kill(Duration::from_millis(500));
        }
        // All that was written is in the pipes now. A process outside of the container may still hold them.
        for which in 0..2 {
            for _ in 0..1024 {
                let open = self.containers.get(&id).is_some_and(|c| c.streams.get(which).is_some_and(Option::is_some));
                if !open || !self.readable(id, which) {
                    break;
                }
                self.pump(id, which);
            }
        }
        let Some(container) = self.containers.get_mut(&id) else { return };
        let mut closed = Vec::new();
        for (stream, name) in container.streams.iter_mut().zip(STREAM_NAMES) {
            if let Some(mut stream) = stream.take() {
                if let Some(log) = &mut container.log {
                    let _ = log.finish(name, &mut stream.partial, now());
                }
                closed.push(stream.fd);
            }
        }
        (container.log, container.stdin, container.terminal) = (None, None, None);
        container.process = Process::default();
        let message = String::new();
        container.life = Life::Exited(Phase::Exited { started, finished: now(), code, signal, oom_killed, message });
        let viewers = std::mem::take(&mut container.viewers);
        let cgroup = container.cgroup.clone();
        let state = container.state();
        for fd in closed {
            self.unwatch(fd.as_fd());
        }
        if let Some(state) = state
            && let Err(e) = state::save(&self.sandbox.dir, &state, true)
        {
            self.warn(&format!("saving the state of {}: {e}", state.name));
        }
        if let Some(cgroup) = cgroup
            && let Err(e) = cgroup.remove(Duration::from_millis(200))
        {
            self.warn(&e.to_string());
        }
        for viewer in viewers {
            self.respond(viewer.connection, &Response::Exited { code }, &[]);
        }
        self.changed();
    }

    fn readable(&self, id: u32, which: usize) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let Some(Some(stream)) = self.containers.get(&id).and_then(|c| c.streams.get(which)) else { return false };
        let mut fds = [PollFd::new(&stream.fd, PollFlags::IN)];
        poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
    }

    pub fn signal(&mut self, name: &str, signal: i32) -> Result<()> {
        let (_, container) = self.running(name)?;
        let pidfd = container.pidfd.as_ref().ok_or_else(|| Error::NotRunning(name.into()))?;
        if !(1..=64).contains(&signal) {
            return Err(Error::Refused(format!("signal {signal}: must be 1 to 64")));
        }
        sys::send_signal(pidfd.as_fd(), signal).during(|| format!("signal {signal} to {name}"))
    }

    /// Forgets an ended container. Its directory stays for the daemon to delete: it may be large.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let Some(id) = self.find(name) else { return Ok(()) };
        let Some(container) = self.containers.get(&id) else { return Ok(()) };
        if !matches!(container.life, Life::Exited(_)) {
            return Err(Error::Shim(format!("container {name} is still running")));
        }
        let directory = state::directory(&self.sandbox.dir, &container.name, container.attempt);
        if let Some(cgroup) = &container.cgroup {
            cgroup.remove(Duration::from_secs(1))?;
        }
        match std::fs::remove_file(directory.join("state.json")) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::step(format!("removing {}", directory.display()), e));
            }
            _ => {}
        }
        self.containers.remove(&id);
        self.changed();
        Ok(())
    }
}

impl Stream {
    fn of(fd: &OwnedFd) -> Option<Self> {
        Some(Self { fd: fd.try_clone().ok()?, partial: Partial::default() })
    }
}
