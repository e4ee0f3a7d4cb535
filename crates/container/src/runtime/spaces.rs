//! The namespaces of a container that is being made.

use crate::error::{During, Error, Result};
use crate::namespaces;
use crate::rootfs::prepare::IdMap;
use crate::spec::{NamespaceKind, Spec};
use crate::sys::{self, SingleThreaded};
use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::{AsFd, OwnedFd};

/// The namespaces that a container joins, by descriptor; those it gets of its own are flags.
pub struct Spaces {
    pub user: Option<OwnedFd>,
    /// In the order in which they are entered.
    shared: Vec<(OwnedFd, LinkNameSpaceType)>,
    new: i32,
}

impl Spaces {
    pub fn open(alone: SingleThreaded, spec: &Spec) -> Result<Self> {
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
                NamespaceKind::Time => (libc::CLONE_NEWTIME, LinkNameSpaceType::Time),
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

    pub fn id_map(&self, spec: &Spec) -> Option<IdMap<'_>> {
        let first = |list: &[crate::spec::IdMapping]| list.iter().find(|m| m.container_id == 0).copied();
        let (uid, gid) = (first(&spec.linux.uid_mappings)?, first(&spec.linux.gid_mappings)?);
        let namespace = self.user.as_ref()?.as_fd();
        Some(IdMap { namespace, uid_base: uid.host_id, gid_base: gid.host_id, size: uid.size })
    }

    pub fn enter_shared(&self) -> Result<()> {
        for (fd, kind) in &self.shared {
            move_into_link_name_space(fd.as_fd(), Some(*kind)).during(|| format!("entering a namespace ({kind:?})"))?;
        }
        Ok(())
    }

    pub fn enter_user(&self) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
            .during(|| "entering the user namespace".into())
    }

    /// For clone3(2). A time namespace is unshared before.
    pub fn new_flags(&self) -> u64 {
        (self.new & !libc::CLONE_NEWTIME) as u64
    }

    /// `CLONE_NEW*` of a container whose first process can be cloned right into its namespaces, with no process in
    /// between: one without a user or time namespace, and not in the PID namespace of others.
    pub fn direct(spec: &Spec) -> Option<u64> {
        // Whoever maps ids has to find its helper by its number in the host's `/proc`.
        if spec.mounts.iter().any(|m| !m.uid_mappings.is_empty()) {
            return None;
        }
        let mut flags = libc::CLONE_NEWNS;
        for namespace in &spec.linux.namespaces {
            let shared = namespace.path.is_some();
            flags |= match (namespace.kind, shared) {
                (NamespaceKind::User | NamespaceKind::Time, _) | (NamespaceKind::Pid | NamespaceKind::Mount, true) => {
                    return None;
                }
                (NamespaceKind::Pid, false) => libc::CLONE_NEWPID,
                (NamespaceKind::Network, false) => libc::CLONE_NEWNET,
                (NamespaceKind::Ipc, false) => libc::CLONE_NEWIPC,
                (NamespaceKind::Uts, false) => libc::CLONE_NEWUTS,
                // Its root is the group of whoever makes it: it comes when the process is in its group.
                (NamespaceKind::Cgroup, false) | (NamespaceKind::Mount, false) => 0,
                (NamespaceKind::Network | NamespaceKind::Ipc | NamespaceKind::Uts | NamespaceKind::Cgroup, true) => 0,
            };
        }
        Some(flags as u64)
    }

    pub fn is_new(&self, flag: i32) -> bool {
        self.new & flag != 0
    }

    /// It has been made by other means.
    pub fn has_mount_namespace(&mut self) {
        self.new &= !libc::CLONE_NEWNS;
    }

    /// A new time namespace, with its clocks set before its first process is there.
    pub fn set_time_offsets(&self, spec: &Spec) -> Result<()> {
        if !self.is_new(libc::CLONE_NEWTIME) {
            return Ok(());
        }
        sys::unshare_time().during(|| "making a time namespace".into())?;
        let lines: Vec<String> = spec
            .linux
            .time_offsets
            .iter()
            .map(|(clock, offset)| format!("{clock} {} {}\n", offset.secs, offset.nanosecs))
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        std::fs::write("/proc/self/timens_offsets", lines.concat())
            .during(|| format!("linux.timeOffsets: {}", lines.concat().trim_end()))
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
