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
//! The set-up process may be made long before the order comes: joining version 1 control groups can take 20 ms, which
//! then nobody waits for. The container's first process is the caller's own child.

use crate::cgroup::{Cgroup, Hierarchies};
use crate::error::{During, Error, Result};
use crate::process::{self, Confinement};
use crate::rootfs::{attach, prepare};
use crate::spec::{NamespaceKind, Process, Spec};
use crate::sys::{self, Cloned, SingleThreaded};
use crate::wire::{self, Filled, Reader};
use crate::{console, namespaces};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Where the root file system comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Rootfs {
    /// A tree that is ready, ids as in the image.
    Directory { path: PathBuf },
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
}

/// Another process for a container that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Join {
    pub process: Process,
    pub confinement: Confinement,
    /// The container has a user namespace of its own.
    pub user_namespace: bool,
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
    Go,
}

#[derive(Serialize, Deserialize)]
enum Event {
    Created {
        pid: u32,
    },
    /// The terminal's master comes along.
    Terminal,
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
    /// The set-up process, until it is reaped.
    stage: OwnedFd,
    pub pid: Option<u32>,
    pub terminal: Option<OwnedFd>,
    pub warnings: Vec<String>,
    reaped: bool,
}

#[derive(Debug)]
pub enum Progress {
    /// Nothing new; wait until the socket is readable.
    Pending,
    /// The process is there and waits for [`Launch::go`].
    Created(u32),
    Executed,
    Failed(Error),
}

impl Stage {
    /// Makes the set-up process in `cgroup`. `keep`: descriptors that orders will name (namespaces); all others are
    /// closed in it.
    pub fn prepare(alone: SingleThreaded, cgroup: Option<&Cgroup>, keep: &[RawFd]) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().during(|| "making a socket pair".into())?;
        let born_in = cgroup.and_then(Cgroup::v2_directory);
        let (child, joined_v2) = match alone.clone(0, born_in.as_ref().map(AsFd::as_fd)) {
            // A kernel or a delegation that refuses births there still lets processes move there.
            Err(_) if born_in.is_some() => (alone.clone(0, None), false),
            other => (other, born_in.is_some()),
        };
        match child.during(|| "making the set-up process".into())? {
            Cloned::Parent { pidfd, .. } => Ok(Self { socket: ours, pidfd }),
            Cloned::Child => {
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
        let mut launch = Launch {
            socket: self.socket,
            reader: Reader::default(),
            stage: self.pidfd,
            pid: None,
            terminal: None,
            warnings: Vec::new(),
            reaped: false,
        };
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
    /// Readable when [`Self::progress`] has something to say.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn progress(&mut self) -> Progress {
        loop {
            match self.reader.next::<Event>() {
                Ok(Some(Event::Created { pid })) => {
                    self.pid = Some(pid);
                    return Progress::Created(pid);
                }
                Ok(Some(Event::Terminal)) => self.terminal = self.reader.take_fd(),
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
        let _ = rustix::process::pidfd_send_signal(&self.stage, rustix::process::Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.stage.as_fd()), WaitIdOptions::EXITED);
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
        cgroup.join(!joined_v2)?;
    }
    let mut reader = Reader::default();
    match wire::receive::<Order>(socket, &mut reader) {
        Ok(Order::Create(plan)) => {
            let hierarchies = match cgroup {
                Some(cgroup) => cgroup.hierarchies().clone(),
                None => Hierarchies::discover()?,
            };
            create(alone, *plan, hierarchies, socket, reader)
        }
        Ok(Order::Join(order)) => join(alone, *order, socket, reader),
        Ok(Order::Go) => Ok(()),
        // The caller does not need this process any more.
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
        Err(e) => Err(Error::step("receiving orders", e)),
    }
}

fn take_stdio(reader: &mut Reader, terminal: bool) -> Result<Option<Stdio>> {
    if terminal {
        return Ok(None);
    }
    let mut next = || reader.take_fd().ok_or_else(|| Error::Refused("the standard streams are missing".into()));
    Ok(Some(Stdio { stdin: next()?, stdout: next()?, stderr: next()? }))
}

/// In the set-up process, with the host's rights.
fn create(
    alone: SingleThreaded,
    plan: Plan,
    hierarchies: Hierarchies,
    socket: &UnixStream,
    mut reader: Reader,
) -> Result<()> {
    let stdio = take_stdio(&mut reader, plan.spec.process.terminal)?;
    let spaces = Spaces::open(alone, &plan.spec)?;
    let id_map = spaces.id_map(&plan.spec);
    let mut mounts = prepare::sources(&plan.spec.mounts, id_map)?;
    let devices = prepare::devices()?;
    prepare::enter_scratch(&plan.scratch)?;
    let root = prepare::root(&plan.rootfs, id_map)?;
    if let Some(score) = plan.spec.process.oom_score_adj
        && std::fs::write("/proc/self/oom_score_adj", score.to_string()).is_err()
    {
        warn(socket, format!("oom_score_adj: this host does not let it be set to {score}"));
    }
    spaces.enter_shared()?;
    for mount in mounts.iter_mut().filter(|m| m.kind == "sysfs") {
        mount.source = Some(prepare::sysfs(&mount.options)?);
    }
    spaces.enter_user()?;
    let has_user = spaces.user.is_some();
    let flags = spaces.new_flags() | libc::CLONE_PARENT as u64;
    match alone.clone(flags, None).during(|| "making the container's process".into())? {
        Cloned::Parent { pid, .. } => wire::send(socket, &Event::Created { pid }, &[]).during(|| "reporting".into()),
        Cloned::Child => {
            drop(spaces);
            let prepared = prepare::Prepared { root, mounts, devices, hierarchies };
            report(socket, &first(&plan, prepared, stdio, has_user, socket, &mut reader));
            sys::exit_now(127)
        }
    }
}

/// In the container's first process. Returns only with what went wrong.
fn first(
    plan: &Plan,
    prepared: prepare::Prepared,
    stdio: Option<Stdio>,
    has_user: bool,
    socket: &UnixStream,
    reader: &mut Reader,
) -> Error {
    let spec = &plan.spec;
    let outcome = (|| {
        rustix::process::setsid().during(|| "setsid".into())?;
        if has_user {
            namespaces::become_root()?;
        }
        let terminal = attach::attach(spec, prepared, |root| {
            if spec.process.terminal { console::open(root, &spec.process).map(Some) } else { Ok(None) }
        })?;
        if spec.namespace(NamespaceKind::Uts).is_some_and(|n| n.path.is_none())
            && let Some(name) = &spec.hostname
        {
            sys::set_host_name(name).during(|| format!("hostname {name:?}"))?;
        }
        take_streams(stdio, terminal, socket)?;
        let ready = process::assume(&spec.process, plan.confinement, &mut |text| warn(socket, text))?;
        match wire::receive::<Order>(socket, reader) {
            Ok(Order::Go) => Ok(ready),
            _ => Err(Error::Refused("called off".into())),
        }
    })();
    match outcome {
        Ok(ready) => ready.execute(),
        Err(e) => e,
    }
}

/// In the set-up process of an exec.
fn join(alone: SingleThreaded, order: Join, socket: &UnixStream, mut reader: Reader) -> Result<()> {
    let target = reader.take_fd().ok_or_else(|| Error::Refused("the container's process is missing".into()))?;
    let stdio = take_stdio(&mut reader, order.process.terminal)?;
    let mut kinds = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK;
    if order.user_namespace {
        kinds |= ThreadNameSpaceType::USER;
    }
    move_into_thread_name_spaces(target.as_fd(), kinds).during(|| "entering the container".into())?;
    drop(target);
    match alone.clone(libc::CLONE_PARENT as u64, None).during(|| "making a process in the container".into())? {
        Cloned::Parent { pid, .. } => wire::send(socket, &Event::Created { pid }, &[]).during(|| "reporting".into()),
        Cloned::Child => {
            let error = (|| {
                rustix::process::setsid().during(|| "setsid".into())?;
                if order.user_namespace {
                    namespaces::become_root()?;
                }
                let terminal = if order.process.terminal {
                    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(|| "/".into())?;
                    Some(console::open(root.as_fd(), &order.process)?)
                } else {
                    None
                };
                take_streams(stdio, terminal, socket)?;
                process::assume(&order.process, order.confinement, &mut |text| warn(socket, text))
            })();
            report(socket, &error.map_or_else(|e| e, process::Ready::execute));
            sys::exit_now(127)
        }
    }
}

fn take_streams(stdio: Option<Stdio>, terminal: Option<(OwnedFd, OwnedFd)>, socket: &UnixStream) -> Result<()> {
    if let Some((slave, master)) = &terminal {
        wire::send(socket, &Event::Terminal, &[master.as_fd()]).during(|| "handing the terminal over".into())?;
        rustix::process::ioctl_tiocsctty(slave).during(|| "taking the terminal".into())?;
    }
    let streams = match (&stdio, &terminal) {
        (Some(s), _) => [s.stdin.as_fd(), s.stdout.as_fd(), s.stderr.as_fd()],
        (None, Some((slave, _))) => [slave.as_fd(), slave.as_fd(), slave.as_fd()],
        (None, None) => return Err(Error::Refused("neither standard streams nor a terminal".into())),
    };
    for (n, stream) in streams.into_iter().enumerate() {
        sys::dup_onto(stream, n as RawFd).during(|| "setting the standard streams".into())?;
    }
    Ok(())
}

/// The namespaces that a container joins, by descriptor; those it gets of its own are flags.
struct Spaces {
    user: Option<OwnedFd>,
    /// In the order in which they are entered.
    shared: Vec<(OwnedFd, LinkNameSpaceType)>,
    new: i32,
}

impl Spaces {
    fn open(alone: SingleThreaded, spec: &Spec) -> Result<Self> {
        let mut found = Self { user: None, shared: Vec::new(), new: libc::CLONE_NEWNS };
        for namespace in &spec.linux.namespaces {
            let (flag, link) = match namespace.kind {
                NamespaceKind::Pid => (libc::CLONE_NEWPID, LinkNameSpaceType::ProcessID),
                NamespaceKind::Network => (libc::CLONE_NEWNET, LinkNameSpaceType::Network),
                NamespaceKind::Mount => (libc::CLONE_NEWNS, LinkNameSpaceType::Mount),
                NamespaceKind::Ipc => (libc::CLONE_NEWIPC, LinkNameSpaceType::InterProcessCommunication),
                NamespaceKind::Uts => (libc::CLONE_NEWUTS, LinkNameSpaceType::HostNameAndNISDomainName),
                NamespaceKind::User => (libc::CLONE_NEWUSER, LinkNameSpaceType::User),
                NamespaceKind::Cgroup => (libc::CLONE_NEWCGROUP, LinkNameSpaceType::ControlGroup),
                NamespaceKind::Time => return Err(Error::Refused("time namespaces are not supported".into())),
            };
            let fd = match &namespace.path {
                Some(path) => Some(
                    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                        .during(|| format!("namespace {}", path.display()))?,
                ),
                None => None,
            };
            match (namespace.kind, fd) {
                (NamespaceKind::User, Some(fd)) => found.user = Some(fd),
                (NamespaceKind::User, None) => found.user = Some(new_user(alone, spec)?),
                (NamespaceKind::Mount, Some(_)) => {
                    return Err(Error::Refused("joining a mount namespace is not supported".into()));
                }
                (_, Some(fd)) => found.shared.push((fd, link)),
                (_, None) => found.new |= flag,
            }
        }
        Ok(found)
    }

    fn id_map(&self, spec: &Spec) -> Option<prepare::IdMap<'_>> {
        let first = |list: &[crate::spec::IdMapping]| list.iter().find(|m| m.container_id == 0).copied();
        let (uid, gid) = (first(&spec.linux.uid_mappings)?, first(&spec.linux.gid_mappings)?);
        let namespace = self.user.as_ref()?.as_fd();
        Some(prepare::IdMap { namespace, uid_base: uid.host_id, gid_base: gid.host_id, size: uid.size })
    }

    fn enter_shared(&self) -> Result<()> {
        for (fd, kind) in &self.shared {
            move_into_link_name_space(fd.as_fd(), Some(*kind)).during(|| format!("entering a namespace ({kind:?})"))?;
        }
        Ok(())
    }

    fn enter_user(&self) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
            .during(|| "entering the user namespace".into())
    }

    fn new_flags(&self) -> u64 {
        self.new as u64
    }
}

fn new_user(alone: SingleThreaded, spec: &Spec) -> Result<OwnedFd> {
    let wanted = namespaces::Wanted {
        uid_mappings: &spec.linux.uid_mappings,
        gid_mappings: &spec.linux.gid_mappings,
        network: namespaces::Network::Host,
        host_network: true,
        ipc_and_uts: false,
        hostname: "",
        sysctl: &std::collections::BTreeMap::new(),
    };
    let pinned = namespaces::pin(alone, &wanted, &mut |_| {})?;
    pinned.user.ok_or_else(|| Error::Refused("linux.uidMappings is empty: a user namespace needs one".into()))
}
