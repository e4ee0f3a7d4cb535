//! From a configuration to a running process, in the order in which it happens:
//!
//! ```text
//! caller (the shim)                     set-up process                       container
//! Stage::prepare ---- clone3 ---------> joins the cgroups
//! Stage::create  ---- order, stdio ---> host::create: sources, overlay,
//!                                       enters net, ipc, uts, pid, user
//!                <--- Created{pid} ---- clone3(CLONE_PARENT) -------------> container::first:
//! Launch::go     ---- go (limits are set, nothing can run before) ------->  mounts, pivot_root, user,
//!                                       exits                               capabilities, seccomp,
//!                <--- end of file: executed; or Failed{why} --------------- execve
//! ```
//!
//! The set-up process may be made long before the order comes: nobody then waits for its clone and for the control
//! groups of version 1 that it joins. The container's first process is the caller's own child.

mod create;
mod join;
mod spaces;

use crate::cgroup::{Cgroup, Hierarchies};
use crate::error::{During, Error, Result};
use crate::process::Confinement;
use crate::spec::{Process, Seccomp, Spec};
use crate::sys::{self, Cloned, SingleThreaded};
use crate::wire::{self, Filled, Reader};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};
use spaces::Spaces;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Where the root file system comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Rootfs {
    /// A tree that is ready, ids as in the image.
    Directory { path: PathBuf },
    /// The same with all that is mounted in it, as a bundle has it.
    Bundle { path: PathBuf },
    /// Layers to be stacked, lowest first. `state` is a directory of the container's own for what it writes.
    Layers { lower: Vec<PathBuf>, state: PathBuf },
}

/// A container, complete.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub spec: Spec,
    pub rootfs: Rootfs,
    /// An existing directory that nothing else is mounted on; covered for a moment in a mount namespace that nobody
    /// else sees.
    pub scratch: PathBuf,
    pub confinement: Confinement,
    #[serde(skip)]
    pub bundle: Option<Bundle>,
}

/// What a container of a bundle has besides: its configuration is taken as it is, with nothing of a pod's.
#[derive(Clone, Debug, Default)]
pub struct Bundle {
    pub id: String,
    pub path: PathBuf,
    pub new_keyring: bool,
    pub no_pivot: bool,
    /// Descriptors from 3 on that the program inherits.
    pub preserved: u32,
    /// Relative to the hierarchies' mounts.
    pub cgroup: Option<PathBuf>,
    /// The process waits for a byte in this FIFO instead of for [`Launch::go`].
    pub start_fifo: Option<PathBuf>,
    /// A plain user's: everything is made inside the container's own user namespace.
    pub rootless: bool,
}

/// Another process for a container that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Join {
    pub process: Process,
    pub confinement: Confinement,
    /// The container has a user namespace of its own.
    pub user_namespace: bool,
    /// `CLONE_NEW*` of what differs from the caller's; none: all that a pod's container has.
    #[serde(skip)]
    pub namespaces: Option<u32>,
    #[serde(skip)]
    pub seccomp: Option<Seccomp>,
    #[serde(skip)]
    pub preserved: u32,
}

/// The process's standard streams; with a terminal there are none to give.
pub struct Stdio {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

#[derive(Serialize, Deserialize)]
enum Order {
    Create(Box<Plan>),
    Join(Box<Join>),
    /// Hooks of the runtime have run; `pid` is the container's as the caller sees it.
    Pivot {
        pid: u32,
    },
    Go,
}

#[derive(Serialize, Deserialize)]
enum Event {
    Created {
        pid: u32,
    },
    /// The tree is there, the root is still the host's.
    Mounted,
    /// All is done; the process waits for its FIFO.
    Ready,
    /// The terminal's master comes along.
    Terminal,
    /// The seccomp listener comes along.
    Listener,
    Warning {
        text: String,
    },
    Failed {
        code: Option<i32>,
        message: String,
    },
}

/// A set-up process that waits for its order, already in its control group.
pub struct Stage {
    socket: UnixStream,
    pidfd: OwnedFd,
}

/// A process on its way.
pub struct Launch {
    socket: UnixStream,
    reader: Reader,
    /// The set-up process, until it is reaped; none where the container's own process is all there is.
    stage: Option<OwnedFd>,
    /// Made and not told of yet.
    made: Option<u32>,
    pub pid: Option<u32>,
    pub terminal: Option<OwnedFd>,
    pub listener: Option<OwnedFd>,
    pub warnings: Vec<String>,
    reaped: bool,
}

#[derive(Debug)]
pub enum Progress {
    /// Nothing new; wait until the socket is readable.
    Pending,
    /// The process is there and waits for [`Launch::go`].
    Created(u32),
    /// Hooks of the runtime are due, then [`Launch::pivot`]. Only where the configuration has hooks.
    Mounted,
    /// Waits for its FIFO.
    Ready,
    Executed,
    Failed(Error),
}

impl Stage {
    /// Makes the set-up process in `cgroup`. `keep`: descriptors that orders will name (namespaces); all others are
    /// closed in it.
    pub fn prepare(alone: SingleThreaded, cgroup: Option<&Cgroup>, keep: &[RawFd]) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().during(|| "making a socket pair".into())?;
        match clone_into(alone, cgroup, 0).during(|| "making the set-up process".into())? {
            (Cloned::Parent { pidfd, .. }, _) => Ok(Self { socket: ours, pidfd }),
            (Cloned::Child, joined_v2) => {
                drop(ours);
                let outcome = run_stage(alone, cgroup, joined_v2, keep, &theirs);
                if let Err(e) = outcome {
                    report(&theirs, &e);
                }
                sys::exit_now(0)
            }
        }
    }

    pub fn create(self, plan: Plan, stdio: Option<&Stdio>) -> Result<Launch> {
        self.order(&Order::Create(Box::new(plan)), None, stdio)
    }

    /// `target` is a pidfd of the container's first process.
    pub fn join(self, join: Join, target: BorrowedFd<'_>, stdio: Option<&Stdio>) -> Result<Launch> {
        self.order(&Order::Join(Box::new(join)), Some(target), stdio)
    }

    fn order(self, order: &Order, target: Option<BorrowedFd<'_>>, stdio: Option<&Stdio>) -> Result<Launch> {
        let mut fds: Vec<BorrowedFd<'_>> = target.into_iter().collect();
        if let Some(stdio) = stdio {
            fds.extend([stdio.stdin.as_fd(), stdio.stdout.as_fd(), stdio.stderr.as_fd()]);
        }
        let sent = wire::send(&self.socket, order, &fds);
        let mut launch = Launch::of(self.socket, Some(self.pidfd), None);
        // A set-up process that failed before has said why and is gone: that is read in due course.
        if let Err(e) = sent
            && e.kind() != std::io::ErrorKind::BrokenPipe
        {
            launch.reap();
            return Err(Error::step("giving orders to the set-up process", e));
        }
        launch.socket.set_nonblocking(true).during(|| "making a socket non-blocking".into())?;
        Ok(launch)
    }

    /// Not needed after all.
    pub fn dismiss(self) {
        let Self { socket, pidfd } = self;
        drop(socket);
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

impl Launch {
    fn of(socket: UnixStream, stage: Option<OwnedFd>, made: Option<u32>) -> Self {
        Self {
            socket,
            reader: Reader::default(),
            stage,
            made,
            pid: None,
            terminal: None,
            listener: None,
            warnings: Vec::new(),
            reaped: false,
        }
    }

    /// Makes the set-up process with its order in memory: nothing is sent. `keep` as in [`Stage::prepare`]. With
    /// `direct` it is born into these new namespaces and is the container's own process.
    fn fork(
        alone: SingleThreaded,
        cgroup: Option<&Cgroup>,
        keep: &[RawFd],
        direct: Option<u64>,
        work: impl FnOnce(&UnixStream) -> Result<()>,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().during(|| "making a socket pair".into())?;
        match clone_into(alone, cgroup, direct.unwrap_or(0)).during(|| "making the set-up process".into())? {
            (Cloned::Parent { pid, .. }, _) if direct.is_some() => Ok(Self::of(ours, None, Some(pid))),
            (Cloned::Parent { pidfd, .. }, _) => Ok(Self::of(ours, Some(pidfd), None)),
            (Cloned::Child, joined_v2) => {
                drop(ours);
                let mut keep = keep.to_vec();
                keep.push(theirs.as_raw_fd());
                let outcome = sys::close_all_but(&keep)
                    .during(|| "closing descriptors".into())
                    .and_then(|()| cgroup.map_or(Ok(()), |c| c.join(alone, !joined_v2)))
                    .and_then(|()| work(&theirs));
                if let Err(e) = outcome {
                    report(&theirs, &e);
                }
                sys::exit_now(0)
            }
        }
    }

    /// A container of a bundle. Its streams are the caller's own, or a terminal.
    pub fn create(
        alone: SingleThreaded,
        cgroup: Option<&Cgroup>,
        hierarchies: Hierarchies,
        plan: Plan,
        preserved: u32,
    ) -> Result<Self> {
        let keep: Vec<RawFd> = (3..3 + preserved as RawFd).collect();
        let direct = Spaces::direct(&plan.spec);
        Self::fork(alone, cgroup, &keep, direct, |socket| {
            create::create(alone, plan, hierarchies, socket, Reader::default(), direct.is_some())
        })
    }

    /// Another process for a container of a bundle; streams as in [`Self::create`].
    pub fn join(alone: SingleThreaded, cgroup: Option<&Cgroup>, join: Join, target: BorrowedFd<'_>) -> Result<Self> {
        let mut keep: Vec<RawFd> = (3..3 + join.preserved as RawFd).collect();
        keep.push(target.as_raw_fd());
        let target = target.try_clone_to_owned().during(|| "sharing a pidfd".into())?;
        keep.push(target.as_raw_fd());
        Self::fork(alone, cgroup, &keep, None, |socket| join::join(alone, join, target, None, socket))
    }

    /// Hooks of the runtime have run.
    pub fn pivot(&self, pid: u32) {
        let _ = wire::send(&self.socket, &Order::Pivot { pid }, &[]);
    }

    /// Readable when [`Self::progress`] has something to say.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn progress(&mut self) -> Progress {
        if let Some(pid) = self.made.take() {
            self.pid = Some(pid);
            return Progress::Created(pid);
        }
        loop {
            match self.reader.next::<Event>() {
                Ok(Some(Event::Created { pid })) => {
                    self.pid = Some(pid);
                    return Progress::Created(pid);
                }
                Ok(Some(Event::Mounted)) => return Progress::Mounted,
                Ok(Some(Event::Ready)) => return Progress::Ready,
                Ok(Some(Event::Terminal)) => self.terminal = self.reader.take_fd(),
                Ok(Some(Event::Listener)) => self.listener = self.reader.take_fd(),
                Ok(Some(Event::Warning { text })) => self.warnings.push(text),
                Ok(Some(Event::Failed { code, message })) => {
                    self.reap();
                    return Progress::Failed(match code {
                        Some(code) => Error::Exec { code, message },
                        None => Error::Refused(message),
                    });
                }
                Ok(None) => match self.reader.fill(&self.socket) {
                    Ok(Filled::Some) => {}
                    Ok(Filled::Nothing) => return Progress::Pending,
                    Ok(Filled::End) => {
                        self.reap();
                        return match self.pid {
                            Some(_) => Progress::Executed,
                            None => Progress::Failed(Error::Refused("the set-up process died".into())),
                        };
                    }
                    Err(e) => return Progress::Failed(Error::step("listening to the set-up process", e)),
                },
                Err(e) => return Progress::Failed(Error::step("listening to the set-up process", e)),
            }
        }
    }

    /// Lets the container's program run.
    pub fn go(&self) {
        let _ = wire::send(&self.socket, &Order::Go, &[]);
    }

    fn reap(&mut self) {
        if std::mem::replace(&mut self.reaped, true) {
            return;
        }
        let Some(stage) = &self.stage else { return };
        let _ = rustix::process::pidfd_send_signal(stage, rustix::process::Signal::KILL);
        let _ = waitid(WaitId::PidFd(stage.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Called off: the set-up process goes. What it has made is the caller's to end.
impl Drop for Launch {
    fn drop(&mut self) {
        self.reap();
    }
}

fn report(socket: &UnixStream, error: &Error) {
    let code = if let Error::Exec { code, .. } = error { Some(*code) } else { None };
    let _ = wire::send(socket, &Event::Failed { code, message: error.to_string() }, &[]);
}

fn warn(socket: &UnixStream, text: String) {
    let _ = wire::send(socket, &Event::Warning { text }, &[]);
}

fn run_stage(
    alone: SingleThreaded,
    cgroup: Option<&Cgroup>,
    joined_v2: bool,
    keep: &[RawFd],
    socket: &UnixStream,
) -> Result<()> {
    let mut keep = keep.to_vec();
    keep.push(socket.as_raw_fd());
    sys::close_all_but(&keep).during(|| "closing descriptors".into())?;
    if let Some(cgroup) = cgroup {
        cgroup.join(alone, !joined_v2)?;
    }
    let mut reader = Reader::default();
    match wire::receive::<Order>(socket, &mut reader) {
        Ok(Order::Create(plan)) => {
            let hierarchies = match cgroup {
                Some(cgroup) => cgroup.hierarchies().clone(),
                None => Hierarchies::discover()?,
            };
            create::create(alone, *plan, hierarchies, socket, reader, false)
        }
        Ok(Order::Join(order)) => {
            let target = reader.take_fd().ok_or_else(|| Error::Refused("the container's process is missing".into()))?;
            let stdio = take_stdio(&mut reader, order.process.terminal)?;
            join::join(alone, *order, target, stdio, socket)
        }
        Ok(Order::Go | Order::Pivot { .. }) => Ok(()),
        // The caller does not need this process any more.
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
        Err(e) => Err(Error::step("receiving orders", e)),
    }
}

/// A clone that is born in `cgroup` as far as that is version 2, and whether it was.
pub(crate) fn clone_into(
    alone: SingleThreaded,
    cgroup: Option<&Cgroup>,
    flags: u64,
) -> std::io::Result<(Cloned, bool)> {
    let born_in = cgroup.and_then(Cgroup::v2_directory);
    match alone.clone(flags, born_in.as_ref().map(AsFd::as_fd)) {
        // A kernel or a delegation that refuses births there still lets processes move there.
        Err(_) if born_in.is_some() => Ok((alone.clone(flags, None)?, false)),
        other => Ok((other?, born_in.is_some())),
    }
}

fn take_stdio(reader: &mut Reader, terminal: bool) -> Result<Option<Stdio>> {
    if terminal {
        return Ok(None);
    }
    let mut next = || reader.take_fd().ok_or_else(|| Error::Refused("the standard streams are missing".into()));
    Ok(Some(Stdio { stdin: next()?, stdout: next()?, stderr: next()? }))
}

/// Without `stdio` and terminal the streams stay the caller's.
fn take_streams(stdio: Option<Stdio>, terminal: Option<(OwnedFd, OwnedFd)>, socket: &UnixStream) -> Result<()> {
    if let Some((slave, master)) = &terminal {
        wire::send(socket, &Event::Terminal, &[master.as_fd()]).during(|| "handing the terminal over".into())?;
        rustix::process::ioctl_tiocsctty(slave).during(|| "taking the terminal".into())?;
    }
    let streams = match (&stdio, &terminal) {
        (Some(s), _) => [s.stdin.as_fd(), s.stdout.as_fd(), s.stderr.as_fd()],
        (None, Some((slave, _))) => [slave.as_fd(), slave.as_fd(), slave.as_fd()],
        (None, None) => return Ok(()),
    };
    for (n, stream) in streams.into_iter().enumerate() {
        sys::dup_onto(stream, n as RawFd).during(|| "setting the standard streams".into())?;
    }
    Ok(())
}
