//! A container's own making: the set-up process's work and that of the container's first process.

use super::spaces::Spaces;
use super::{Bundle, Event, Order, Plan, Rootfs, Stdio, report, take_stdio, take_streams, warn};
use crate::cgroup::Hierarchies;
use crate::error::{During, Error, Result};
use crate::process::{self, Constraints, Labels, Ready};
use crate::rootfs::{attach, prepare};
use crate::spec::{NamespaceKind, Spec};
use crate::sys::{self, Cloned, SingleThreaded};
use crate::wire::{self, Reader};
use crate::{console, hooks, namespaces};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// What the first process takes from the host's side.
struct Inherited {
    prepared: prepare::Prepared,
    stdio: Option<Stdio>,
    has_user: bool,
    fifo: Option<OwnedFd>,
    labels: Labels,
}

/// In the set-up process, with the host's rights; or in the container's first process if it is `direct`ly in its
/// namespaces.
pub fn create(
    alone: SingleThreaded,
    plan: Plan,
    hierarchies: Hierarchies,
    socket: &UnixStream,
    mut reader: Reader,
    direct: bool,
) -> Result<()> {
    let spec = &plan.spec;
    let bundle = plan.bundle.as_ref();
    let stdio = if bundle.is_some() { None } else { take_stdio(&mut reader, spec.process.terminal)? };
    let mut spaces = Spaces::open(alone, spec)?;
    let rootless = bundle.is_some_and(|b| b.rootless);
    let fifo = bundle.and_then(|b| b.start_fifo.as_ref()).map(|path| {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        open(path, flags, Mode::empty()).during(|| format!("{}", path.display()))
    });
    let fifo = fifo.transpose()?;
    if rootless {
        spaces.enter_user()?;
        namespaces::become_root()?;
        sys::unshare_mounts().during(|| "unsharing the mount namespace".into())?;
        spaces.has_mount_namespace();
    }
    let id_map = spaces.id_map(spec);
    let of_pod = bundle.is_none();
    let mut mounts = prepare::sources(&spec.mounts, id_map, bundle.map(|_| alone))?;
    let devices = if of_pod { prepare::devices()? } else { Vec::new() };
    if of_pod {
        prepare::enter_scratch(&plan.scratch)?;
    }
    let root = prepare::root(&plan.rootfs, id_map)?;
    if let Some(score) = spec.process.oom_score_adj
        && std::fs::write("/proc/self/oom_score_adj", score.to_string()).is_err()
    {
        warn(socket, format!("oom_score_adj: this host does not let it be set to {score}"));
    }
    let labels = Labels::open(&spec.process)?;
    if bundle.is_some() {
        // Others in namespaces that are shared must not look into this process while it is the host's.
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    }
    spaces.enter_shared()?;
    spaces.set_time_offsets(spec)?;
    // A new network namespace's is the container's own to mount.
    if !spaces.is_new(libc::CLONE_NEWNET) {
        for mount in mounts.iter_mut().filter(|m| m.kind == "sysfs") {
            mount.source = Some(prepare::sysfs(&mount.options, of_pod)?);
        }
    }
    if let Rootfs::Bundle { path } = &plan.rootfs {
        // Found again from here in the container's mount namespace, whoever may search the directories above.
        rustix::process::chdir(path).during(|| format!("root file system {}", path.display()))?;
    }
    if !rootless {
        spaces.enter_user()?;
    }
    let has_user = spaces.user.is_some();
    if direct {
        if spaces.is_new(libc::CLONE_NEWCGROUP) {
            sys::unshare_cgroup().during(|| "making a cgroup namespace".into())?;
        }
        drop(spaces);
        let prepared = prepare::Prepared { root, mounts, devices, hierarchies };
        let inherited = Inherited { prepared, stdio, has_user, fifo, labels };
        report(socket, &first(&plan, inherited, socket, &mut reader));
        sys::exit_now(127)
    }
    let flags = spaces.new_flags() | libc::CLONE_PARENT as u64;
    match alone.clone(flags, None).during(|| "making the container's process".into())? {
        Cloned::Parent { pid, .. } => wire::send(socket, &Event::Created { pid }, &[]).during(|| "reporting".into()),
        Cloned::Child => {
            drop(spaces);
            let prepared = prepare::Prepared { root, mounts, devices, hierarchies };
            let inherited = Inherited { prepared, stdio, has_user, fifo, labels };
            report(socket, &first(&plan, inherited, socket, &mut reader));
            sys::exit_now(127)
        }
    }
}

/// In the container's first process. Returns only with what went wrong.
fn first(plan: &Plan, inherited: Inherited, socket: &UnixStream, reader: &mut Reader) -> Error {
    match become_container(plan, inherited, socket, reader) {
        Ok(ready) => ready.execute(),
        Err(e) => e,
    }
}

fn become_container(plan: &Plan, inherited: Inherited, socket: &UnixStream, reader: &mut Reader) -> Result<Ready> {
    let Inherited { prepared, stdio, has_user, fifo, labels } = inherited;
    let spec = &plan.spec;
    let bundle = plan.bundle.as_ref();
    rustix::process::setsid().during(|| "setsid".into())?;
    if has_user {
        namespaces::become_root()?;
    }
    if bundle.is_some() {
        // Still the host's `/proc`: the container's may be anything.
        sysctls(spec)?;
        names(spec)?;
    }
    keyring(bundle, socket);
    let mut host_pid = 0;
    let terminal = attach::attach(
        spec,
        bundle,
        prepared,
        |root| if spec.process.terminal { console::open(root, &spec.process).map(Some) } else { Ok(None) },
        || {
            let (Some(hooks), Some(bundle)) = (&spec.hooks, bundle) else { return Ok(()) };
            wire::send(socket, &Event::Mounted, &[]).during(|| "reporting".into())?;
            match wire::receive::<Order>(socket, reader) {
                Ok(Order::Pivot { pid }) => host_pid = pid,
                _ => return Err(Error::Refused("called off".into())),
            }
            let state = hooks::State::of(spec, bundle, "creating", host_pid);
            hooks::run("createContainer", &hooks.create_container, &state)
        },
    )?;
    if bundle.is_none()
        && spec.namespace(NamespaceKind::Uts).is_some_and(|n| n.path.is_none())
        && let Some(name) = &spec.hostname
    {
        sys::set_host_name(name).during(|| format!("hostname {name:?}"))?;
    }
    take_streams(stdio, terminal, socket)?;
    if bundle.is_some() {
        own_streams(spec);
    }
    let under = Constraints {
        confinement: plan.confinement,
        seccomp: spec.linux.seccomp.as_ref(),
        personality: spec.linux.personality.as_ref(),
        preserved: bundle.map_or(0, |b| b.preserved),
        labels: Some(&labels),
    };
    let ready = process::assume(&spec.process, under, &mut |text| warn(socket, text))?;
    if let Some(listener) = &ready.listener {
        wire::send(socket, &Event::Listener, &[listener.as_fd()])
            .during(|| "handing the seccomp listener over".into())?;
    }
    match fifo {
        Some(fifo) => {
            wire::send(socket, &Event::Ready, &[]).during(|| "reporting".into())?;
            wait_for_start(&fifo)?;
        }
        None => match wire::receive::<Order>(socket, reader) {
            Ok(Order::Go) => {}
            _ => return Err(Error::Refused("called off".into())),
        },
    }
    if let (Some(hooks), Some(bundle)) = (&spec.hooks, bundle)
        && !hooks.start_container.is_empty()
    {
        hooks::run("startContainer", &hooks.start_container, &hooks::State::of(spec, bundle, "created", host_pid))?;
    }
    Ok(ready)
}

/// Until somebody writes to the FIFO. There was no writer before, so its end does not show until one has come.
fn wait_for_start(fifo: &OwnedFd) -> Result<()> {
    let what = || "waiting for the start".to_owned();
    loop {
        match poll(&mut [PollFd::new(fifo, PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.during(what)?,
        };
        let mut byte = [0];
        match rustix::io::read(fifo, &mut byte) {
            // Opened and closed without a word: not a start.
            Ok(0) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(Error::step(what(), e)),
        }
    }
}

/// Names are checked before; these are the namespaced ones.
fn sysctls(spec: &Spec) -> Result<()> {
    for (name, value) in &spec.linux.sysctl {
        namespaces::set_sysctl(name, value)?;
    }
    Ok(())
}

fn names(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname.as_ref().filter(|n| !n.is_empty()) {
        sys::set_host_name(name).during(|| format!("hostname {name:?}"))?;
    }
    if let Some(name) = spec.domainname.as_ref().filter(|n| !n.is_empty()) {
        sys::set_domain_name(name).during(|| format!("domainname {name:?}"))?;
    }
    Ok(())
}

/// Keys of the caller's session stay the caller's.
fn keyring(bundle: Option<&Bundle>, socket: &UnixStream) {
    if bundle.is_some_and(|b| !b.new_keyring) {
        return;
    }
    let name = bundle.and_then(|b| CString::new(format!("_ses.{}", b.id)).ok());
    match sys::join_session_keyring(name.as_deref()) {
        Err(e) if e.raw_os_error() != Some(libc::ENOSYS) => warn(socket, format!("session keyring: {e}")),
        _ => {}
    }
}

/// `/dev/stdout` can be opened again by the container's user.
fn own_streams(spec: &Spec) {
    use rustix::fs::{FileType, Gid, Uid, fchown, fstat};
    let user = &spec.process.user;
    if user.uid == 0 {
        return;
    }
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let pipe = |mode| matches!(FileType::from_raw_mode(mode), FileType::Fifo);
        if fstat(stream).is_ok_and(|s| pipe(s.st_mode) && s.st_uid != user.uid) {
            let _ = fchown(stream, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)));
        }
    }
}
