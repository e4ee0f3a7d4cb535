//! Namespaces that outlive the process that made them: the pod's sandbox. Kept as open descriptors; nothing stands in
//! them, except, when the pod shares its PID namespace, a first process that has to.

use crate::error::{During, Error, Result};
use crate::spec::IdMapping;
use crate::sys::{self, Cloned, SingleThreaded};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What to make. The owner of all of them is the new user namespace, if there is one.
pub struct Wanted<'a> {
    /// Empty: stay in the host's user namespace.
    pub uid_mappings: &'a [IdMapping],
    pub gid_mappings: &'a [IdMapping],
    pub network: Network<'a>,
    /// `network` is the host's, by path or not at all: nothing is set in it.
    pub host_network: bool,
    pub ipc_and_uts: bool,
    pub hostname: &'a str,
    /// `kernel.*`, `fs.mqueue.*` and `net.*` names that are namespaced; others are refused.
    pub sysctl: &'a BTreeMap<String, String>,
}

#[derive(Clone, Copy)]
pub enum Network<'a> {
    Host,
    /// One of its own with nothing but `lo`.
    New,
    /// A pinned one, with `lo` up and ports and ping open to all by whoever made it.
    At(&'a Path),
}

#[derive(Debug, Default)]
pub struct Pinned {
    pub user: Option<OwnedFd>,
    pub network: Option<OwnedFd>,
    pub ipc: Option<OwnedFd>,
    pub uts: Option<OwnedFd>,
}

/// Makes what is wanted. `warn` hears of what this host cannot do.
pub fn pin(alone: SingleThreaded, wanted: &Wanted<'_>, warn: &mut dyn FnMut(String)) -> Result<Pinned> {
    let host_network = wanted.host_network || matches!(wanted.network, Network::Host);
    for name in wanted.sysctl.keys() {
        check_sysctl(name, host_network)?;
    }
    let mut flags = 0;
    if !wanted.uid_mappings.is_empty() {
        flags |= libc::CLONE_NEWUSER;
    }
    if wanted.ipc_and_uts {
        flags |= libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    }
    if matches!(wanted.network, Network::New) {
        flags |= libc::CLONE_NEWNET;
    }
    let mut pinned = if flags == 0 { Pinned::default() } else { hold(alone, flags, wanted)? };
    if let Network::At(path) = wanted.network {
        let fd = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("network namespace {}", path.display()))?;
        pinned.network = Some(fd);
    }
    let own = matches!(wanted.network, Network::New);
    let furnish = !host_network && (own || wanted.sysctl.keys().any(|name| name.starts_with("net.")));
    if let Some(network) = pinned.network.as_ref().filter(|_| furnish) {
        in_network(alone, network, own, wanted.sysctl, warn)?;
    }
    Ok(pinned)
}

/// A child in the new namespaces sets them up while its descriptors of them are opened from here.
fn hold(alone: SingleThreaded, flags: i32, wanted: &Wanted<'_>) -> Result<Pinned> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().during(|| "making a socket pair".into())?;
    match alone.clone(flags as u64, None).during(|| "making the sandbox's namespaces".into())? {
        Cloned::Child => {
            drop(ours);
            let mut byte = [0];
            let mapped = io::Read::read_exact(&mut &theirs, &mut byte);
            let outcome = mapped.map_err(|e| e.to_string()).and_then(|()| furnish(wanted).map_err(|e| e.to_string()));
            let _ = io::Write::write_all(&mut &theirs, outcome.err().unwrap_or_default().as_bytes());
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            // Until the other side has opened what it wants.
            let _ = io::Read::read(&mut &theirs, &mut byte);
            sys::exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            drop(theirs);
            let outcome = (|| {
                if !wanted.uid_mappings.is_empty() {
                    write_map(pid, "uid_map", wanted.uid_mappings)?;
                    write_map(pid, "gid_map", wanted.gid_mappings)?;
                }
                io::Write::write_all(&mut &ours, &[1]).during(|| "starting the sandbox".into())?;
                let mut text = String::new();
                io::Read::read_to_string(&mut &ours, &mut text).during(|| "setting up the sandbox".into())?;
                if !text.is_empty() {
                    return Err(Error::Refused(format!("setting up the sandbox: {text}")));
                }
                let open_one = |flag: i32, name: &str| -> Result<Option<OwnedFd>> {
                    if flags & flag == 0 {
                        return Ok(None);
                    }
                    let path = format!("/proc/{pid}/ns/{name}");
                    open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during(|| path).map(Some)
                };
                Ok(Pinned {
                    user: open_one(libc::CLONE_NEWUSER, "user")?,
                    network: open_one(libc::CLONE_NEWNET, "net")?,
                    ipc: open_one(libc::CLONE_NEWIPC, "ipc")?,
                    uts: open_one(libc::CLONE_NEWUTS, "uts")?,
                })
            })();
            drop(ours);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            outcome
        }
    }
}

fn furnish(wanted: &Wanted<'_>) -> Result<()> {
    // Mappings for a mount alone need not have a root.
    if wanted.uid_mappings.iter().any(|m| m.container_id == 0)
        && wanted.gid_mappings.iter().any(|m| m.container_id == 0)
    {
        become_root()?;
    }
    if wanted.ipc_and_uts {
        sys::set_host_name(wanted.hostname).during(|| format!("hostname {:?}", wanted.hostname))?;
        for (name, value) in wanted.sysctl.iter().filter(|(n, _)| !n.starts_with("net.")) {
            set_sysctl(name, value)?;
        }
    }
    Ok(())
}

/// Root of the user namespace that this process is in.
pub fn become_root() -> Result<()> {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    match set_thread_groups(&[]) {
        // A namespace that a plain user made has no say over groups; the user's own stay.
        Err(rustix::io::Errno::PERM) => {}
        other => other.during(|| "setgroups in the user namespace".into())?,
    }
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).during(|| "setgid 0 in the user namespace".into())?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).during(|| "setuid 0 in the user namespace".into())
}

fn write_map(pid: u32, file: &str, mappings: &[IdMapping]) -> Result<()> {
    let mut text = String::new();
    for m in mappings {
        let _ = writeln!(text, "{} {} {}", m.container_id, m.host_id, m.size);
    }
    // One write: the kernel takes a map once.
    let what = || format!("writing {file} ({})", text.trim_end());
    match std::fs::write(format!("/proc/{pid}/{file}"), &text) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        other => return other.during(what),
    }
    // A plain user: ids of /etc/subuid through the system's helper, or the user's own id alone.
    if let [_, _, ..] = mappings {
        return with_helper(pid, file, mappings);
    }
    if file == "gid_map" {
        std::fs::write(format!("/proc/{pid}/setgroups"), "deny").during(|| "denying setgroups".into())?;
        return std::fs::write(format!("/proc/{pid}/{file}"), &text).during(what);
    }
    with_helper(pid, file, mappings)
}

/// newuidmap(1) and newgidmap(1).
fn with_helper(pid: u32, file: &str, mappings: &[IdMapping]) -> Result<()> {
    let helper = if file == "uid_map" { "newuidmap" } else { "newgidmap" };
    let mut command = std::process::Command::new(helper);
    command.arg(pid.to_string());
    for m in mappings {
        command.args([m.container_id.to_string(), m.host_id.to_string(), m.size.to_string()]);
    }
    let output = command.output().map_err(|e| {
        Error::step(format!("{helper} (package uidmap): needed to map more than this user's own id"), e)
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Refused(format!("{helper}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// With the host's rights in the pod's network namespace, which the host owns.
fn in_network(
    alone: SingleThreaded,
    network: &OwnedFd,
    own: bool,
    sysctl: &BTreeMap<String, String>,
    warn: &mut dyn FnMut(String),
) -> Result<()> {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().during(|| "making a socket pair".into())?;
    match alone.clone(0, None).during(|| "forking".into())? {
        Cloned::Child => {
            drop(ours);
            let outcome = furnish_network(network, own, sysctl);
            let text = match outcome {
                Ok(warnings) => warnings.into_iter().map(|w| format!("w{w}\n")).collect(),
                Err(e) => format!("e{e}\n"),
            };
            let _ = io::Write::write_all(&mut &theirs, text.as_bytes());
            sys::exit_now(0)
        }
        Cloned::Parent { pidfd, .. } => {
            drop(theirs);
            let mut text = String::new();
            let read = io::Read::read_to_string(&mut ours, &mut text);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            read.during(|| "setting up the network namespace".into())?;
            for line in text.lines() {
                match line.strip_prefix('w') {
                    Some(warning) => warn(warning.to_owned()),
                    None => return Err(Error::Refused(line.get(1..).unwrap_or_default().to_owned())),
                }
            }
            Ok(())
        }
    }
}

fn furnish_network(network: &OwnedFd, own: bool, sysctl: &BTreeMap<String, String>) -> Result<Vec<String>> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .during(|| "entering the network namespace".into())?;
    let mut warnings = Vec::new();
    if own {
        sys::loopback_up().during(|| "bringing lo up".into())?;
    }
    // The pod's root has no capability over a network namespace of the host's; ports below 1,024 and ping need none
    // this way, as in the field's runtimes.
    const OPEN: &[(&str, &str)] =
        &[("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
    for (name, value) in OPEN.iter().filter(|_| own) {
        if !sysctl.contains_key(*name)
            && let Err(e) = set_sysctl(name, value)
        {
            warnings.push(e.to_string());
        }
    }
    for (name, value) in sysctl.iter().filter(|(n, _)| n.starts_with("net.")) {
        set_sysctl(name, value)?;
    }
    Ok(warnings)
}

pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path: PathBuf = ["/proc/sys", &name.replace('.', "/")].iter().collect();
    std::fs::write(path, value).during(|| format!("sysctl {name}={value}"))
}

/// Only what belongs to a namespace of the pod may be set; everything else is the host's.
pub fn check_sysctl(name: &str, host_network: bool) -> Result<()> {
    const IPC: &[&str] = &["kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced"];
    let plain =
        name.split('.').all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)));
    let ipc = IPC.contains(&name) || name.starts_with("kernel.msg") || name.starts_with("fs.mqueue.");
    let network = name.starts_with("net.");
    if !plain || !(ipc || network) {
        return Err(Error::Refused(format!("sysctl {name:?} is not namespaced: it would change the host")));
    }
    if network && host_network {
        return Err(Error::Refused(format!("sysctl {name:?}: the pod uses the host's network")));
    }
    Ok(())
}

/// The first process of a PID namespace that the pod's containers share: it only reaps. It sees nothing of the host's
/// files, and goes when it is killed. Returns its pidfd and the namespace.
pub fn pid_holder(alone: SingleThreaded, user: Option<&OwnedFd>, scratch: &Path) -> Result<(u32, OwnedFd, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().during(|| "making a socket pair".into())?;
    let (mut reader, writer) = (crate::wire::Reader::default(), theirs.as_fd());
    match alone.clone(0, None).during(|| "forking".into())? {
        Cloned::Child => {
            drop(ours);
            let outcome = (|| -> Result<()> {
                sys::close_all_but(&[writer.as_raw_fd(), user.map_or(-1, AsRawFd::as_raw_fd)])
                    .during(|| "closing descriptors".into())?;
                crate::rootfs::prepare::enter_scratch(scratch)?;
                rustix::process::pivot_root(".", ".").during(|| "pivot_root".into())?;
                rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)
                    .during(|| "leaving the host".into())?;
                if let Some(user) = user {
                    move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
                        .during(|| "entering the user namespace".into())?;
                }
                let flags = (libc::CLONE_NEWPID | libc::CLONE_PARENT) as u64;
                match alone.clone(flags, None).during(|| "making the PID namespace".into())? {
                    Cloned::Child => hold_pids(),
                    Cloned::Parent { pid, .. } => crate::wire::send(writer, &pid, &[]).during(|| "reporting".into()),
                }
            })();
            if let Err(e) = outcome {
                let _ = crate::wire::send(writer, &e.to_string(), &[]);
            }
            sys::exit_now(0)
        }
        Cloned::Parent { pidfd: middle, .. } => {
            drop(theirs);
            let got: io::Result<serde_json::Value> = crate::wire::receive(&ours, &mut reader);
            let _ = waitid(WaitId::PidFd(middle.as_fd()), WaitIdOptions::EXITED);
            let got = got.during(|| "making the shared PID namespace".into())?;
            let pid = got.as_u64().and_then(|p| u32::try_from(p).ok()).ok_or_else(|| {
                Error::Refused(format!("making the shared PID namespace: {}", got.as_str().unwrap_or("no answer")))
            })?;
            let raw = rustix::process::Pid::from_raw(pid as i32).ok_or_else(|| Error::Refused("pid 0".into()))?;
            let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
                .during(|| "opening the first process".into())?;
            let path = format!("/proc/{pid}/ns/pid");
            let namespace = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during(|| path)?;
            Ok((pid, pidfd, namespace))
        }
    }
}

/// Reaps for ever.
fn hold_pids() -> ! {
    if become_root().is_err() || sys::close_all_but(&[]).is_err() {
        sys::exit_now(1);
    }
    loop {
        while let Ok(Some(_)) = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {}
        sys::wait_for_child_signal();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_sysctls() {
        for good in ["net.core.somaxconn", "kernel.shmmax", "kernel.msgmax", "fs.mqueue.msg_max"] {
            assert!(check_sysctl(good, false).is_ok(), "{good}");
        }
        for bad in ["kernel.core_pattern", "vm.swappiness", "net/../kernel", "net..x", "fs.file-max", "net.a/b"] {
            assert!(check_sysctl(bad, false).is_err(), "{bad}");
        }
        assert!(check_sysctl("net.core.somaxconn", true).is_err());
    }
}
