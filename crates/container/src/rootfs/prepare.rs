//! The host's half: every source becomes a detached mount. Runs in a mount namespace of its own, before the container's
//! user namespace is entered, because only the host's root may map ids and mount an overlay.

use super::options::Options;
use crate::cgroup::Hierarchies;
use crate::error::{During, Error, Result};
use crate::namespaces::{Network, Wanted};
use crate::runtime::Rootfs;
use crate::spec::Mount;
use crate::sys::{MountAttr, SingleThreaded, mount_setattr};
use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY};
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, fstat, mkdirat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsmount, fsopen, mount, mount_change, move_mount, open_tree,
};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Device nodes that every container has.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// What the container's half puts in place.
pub struct Prepared {
    pub root: OwnedFd,
    pub mounts: Vec<PreparedMount>,
    pub devices: Vec<(&'static str, OwnedFd)>,
    /// Found from outside: inside, the mounts' roots are no longer told.
    pub hierarchies: Hierarchies,
}

pub struct PreparedMount {
    pub destination: PathBuf,
    pub kind: String,
    pub options: Options,
    /// `source` of the configuration.
    pub from: PathBuf,
    /// Bind mounts and `/sys`, which need the host's rights; the container makes the others itself.
    pub source: Option<Source>,
}

pub struct Source {
    pub mount: OwnedFd,
    pub directory: bool,
}

/// Host ids of a container's range, and the user namespace that maps it.
#[derive(Clone, Copy)]
pub struct IdMap<'a> {
    pub namespace: BorrowedFd<'a>,
    pub uid_base: u32,
    pub gid_base: u32,
    pub size: u32,
}

/// First step, still in the host's mount namespace: shared bind sources have to stay peers of what they are on the
/// host.
pub fn sources(
    mounts: &[Mount],
    id_map: Option<IdMap<'_>>,
    bundle: Option<SingleThreaded>,
) -> Result<Vec<PreparedMount>> {
    mounts
        .iter()
        .map(|m| match bundle {
            Some(alone) => bundle_source(alone, m, id_map),
            None => source(m, id_map),
        })
        .collect()
}

fn parsed(spec: &Mount) -> Result<PreparedMount> {
    let mut options = Options::parse(&spec.options)
        .map_err(|e| Error::Refused(format!("mounts: {}: {e}", spec.destination.display())))?;
    let mut kind = spec.kind.clone().unwrap_or_default();
    options.bind |= kind == "bind";
    if options.bind {
        kind = "bind".into();
    }
    let from = spec.source.clone().unwrap_or_default();
    Ok(PreparedMount { destination: spec.destination.clone(), kind, options, from, source: None })
}

/// As the configuration says: options are of the mount itself, those with an `r` in front of all below too.
fn bundle_source(alone: SingleThreaded, spec: &Mount, id_map: Option<IdMap<'_>>) -> Result<PreparedMount> {
    let mut prepared = parsed(spec)?;
    if !prepared.options.bind {
        return Ok(prepared);
    }
    let path = spec.source.as_deref().filter(|p| !p.as_os_str().is_empty()).ok_or_else(|| {
        Error::Refused(format!("mounts: {}: a bind mount needs a source", spec.destination.display()))
    })?;
    let what = || format!("mount source {}", path.display());
    let options = &prepared.options;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, path, flags).during(what)?;
    let propagation = if options.propagation == 0 { libc::MS_PRIVATE } else { options.propagation };
    let below = options.propagation_below || options.propagation == 0;
    let mut steps = vec![
        (false, MountAttr { set: options.set, clear: options.clear, ..Default::default() }),
        (below, MountAttr { propagation, ..Default::default() }),
    ];
    if options.set_below | options.clear_below != 0 {
        let attr = MountAttr { set: options.set_below, clear: options.clear_below, ..Default::default() };
        steps.insert(1, (true, attr));
    }
    let own = mapping(alone, spec)?;
    if let Some(namespace) = own.as_ref().map(AsFd::as_fd).or(id_map.filter(|_| options.id_map).map(|m| m.namespace)) {
        steps.insert(0, (options.id_map_below, MountAttr { id_map: Some(namespace), ..Default::default() }));
    } else if options.id_map {
        let why = format!("mounts: {}: idmap without a user namespace or mappings", spec.destination.display());
        return Err(Error::Refused(why));
    }
    for (recursive, attr) in &steps {
        mount_setattr(tree.as_fd(), *recursive, attr)
            .during(|| format!("{}: setting mount attributes", path.display()))?;
    }
    let stat = fstat(&tree).during(what)?;
    let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    prepared.source = Some(Source { mount: tree, directory });
    Ok(prepared)
}

/// A user namespace that has the mount's own mappings.
fn mapping(alone: SingleThreaded, spec: &Mount) -> Result<Option<OwnedFd>> {
    if spec.uid_mappings.is_empty() && spec.gid_mappings.is_empty() {
        return Ok(None);
    }
    let wanted = Wanted {
        uid_mappings: &spec.uid_mappings,
        gid_mappings: &spec.gid_mappings,
        network: Network::Host,
        host_network: true,
        ipc_and_uts: false,
        hostname: "",
        sysctl: &BTreeMap::new(),
    };
    let pinned = crate::namespaces::pin(alone, &wanted, &mut |_| {})
        .map_err(|e| Error::Refused(format!("mounts: {}: id mappings: {e}", spec.destination.display())))?;
    Ok(pinned.user)
}

fn source(spec: &Mount, id_map: Option<IdMap<'_>>) -> Result<PreparedMount> {
    let mut prepared = parsed(spec)?;
    if !prepared.options.bind {
        return Ok(prepared);
    }
    // A pod's mounts are held to their options all the way down.
    prepared.options.set |= prepared.options.set_below;
    prepared.options.clear |= prepared.options.clear_below;
    let path = spec.source.as_deref().ok_or_else(|| {
        Error::Refused(format!("mounts: {}: a bind mount needs a source", spec.destination.display()))
    })?;
    let what = || format!("mount source {}", path.display());
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if prepared.options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, path, flags).during(what)?;
    let stat = fstat(&tree).during(what)?;
    let mut attr = MountAttr {
        set: prepared.options.set,
        clear: prepared.options.clear,
        propagation: match prepared.options.propagation {
            0 => libc::MS_PRIVATE,
            other => other,
        },
        id_map: None,
    };
    if let Some(map) = id_map.filter(|_| prepared.options.id_map) {
        // What the range already owns is shown as it is.
        if !(map.uid_base..map.uid_base.saturating_add(map.size)).contains(&stat.st_uid) {
            attr.id_map = Some(map.namespace);
        }
    }
    let mut outcome = mount_setattr(tree.as_fd(), prepared.options.recursive, &attr);
    if let (Some(map), Err(e)) = (id_map.filter(|_| attr.id_map.is_some()), &outcome)
        && e.raw_os_error() == Some(libc::EINVAL)
    {
        // No id-mapped mounts of this file system (tmpfs before Linux 6.3): the files are given to the range instead.
        super::shift::give(path, map).during(|| format!("{}: giving it to the pod's ids", path.display()))?;
        attr.id_map = None;
        outcome = mount_setattr(tree.as_fd(), prepared.options.recursive, &attr);
    }
    outcome.during(|| format!("{}: setting mount attributes", path.display()))?;
    let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    prepared.source = Some(Source { mount: tree, directory });
    Ok(prepared)
}

/// The host's device nodes, each as a mount of its own.
pub fn devices() -> Result<Vec<(&'static str, OwnedFd)>> {
    let clone = |name: &&'static str| {
        let path = format!("/dev/{name}");
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let node = open_tree(CWD, &path, flags).during(|| format!("device {path}"))?;
        mount_setattr(node.as_fd(), false, &MountAttr { propagation: libc::MS_PRIVATE, ..Default::default() })
            .during(|| format!("device {path}"))?;
        Ok((*name, node))
    };
    DEVICES.iter().map(clone).collect()
}

/// A mount namespace of this process's own with an empty scratch directory as working directory: `root` in it is where
/// the container's root goes.
pub fn enter_scratch(scratch: &Path) -> Result<()> {
    crate::sys::unshare_mounts().during(|| "unsharing the mount namespace".into())?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .during(|| "making / private".into())?;
    let what = || format!("scratch tmpfs on {}", scratch.display());
    mount("tmpfs", scratch, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"mode=755")
        .during(what)?;
    rustix::process::chdir(scratch).during(what)?;
    for name in ["root", "layers"] {
        mkdirat(CWD, name, Mode::from_raw_mode(0o755)).during(what)?;
    }
    Ok(())
}

/// The container's root as a detached mount. Without ids to map to (`hostUsers: true`) layers are used as they are.
/// Device nodes in an image are dead: without the devices cgroup of old, this is what keeps a container that may
/// `mknod` from the host's disks.
pub fn root(rootfs: &Rootfs, id_map: Option<IdMap<'_>>) -> Result<OwnedFd> {
    let tree = match rootfs {
        Rootfs::Bundle { path } => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
            return open_tree(CWD, path, flags).during(|| format!("root file system {}", path.display()));
        }
        Rootfs::Directory { path } => detach(path, id_map)?,
        Rootfs::Layers { lower, state } => overlay(lower, state, id_map)?,
    };
    let attr = MountAttr { set: MOUNT_ATTR_NODEV, propagation: libc::MS_PRIVATE, ..Default::default() };
    mount_setattr(tree.as_fd(), false, &attr).during(|| "root file system: setting nodev".into())?;
    Ok(tree)
}

fn detach(path: &Path, id_map: Option<IdMap<'_>>) -> Result<OwnedFd> {
    let what = || format!("root file system {}", path.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags).during(what)?;
    if let Some(map) = id_map {
        mount_setattr(tree.as_fd(), false, &MountAttr { id_map: Some(map.namespace), ..Default::default() })
            .during(|| format!("{}: mapping ids (its file system must support id-mapped mounts)", path.display()))?;
    }
    Ok(tree)
}

/// Layers are attached under short relative names first: overlayfs takes its options as one page of text, and on
/// kernels before 6.15 it takes no detached layers.
fn overlay(lower: &[PathBuf], state: &Path, id_map: Option<IdMap<'_>>) -> Result<OwnedFd> {
    let (upper, work) = (state.join("upper"), state.join("work"));
    for directory in [&upper, &work] {
        std::fs::create_dir_all(directory).during(|| format!("making {}", directory.display()))?;
    }
    if let Some(map) = id_map {
        let (uid, gid) = (Uid::from_raw(map.uid_base), Gid::from_raw(map.gid_base));
        rustix::fs::chown(&upper, Some(uid), Some(gid)).during(|| format!("giving {} away", upper.display()))?;
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&upper, mode).during(|| format!("mode of {}", upper.display()))?;
    let mut options = String::from("upperdir=state/upper,workdir=state/work,volatile,index=off,metacopy=off,lowerdir=");
    place(&detach(state, None)?, "state")?;
    // The highest layer comes first in overlayfs's list.
    for (n, path) in lower.iter().rev().enumerate() {
        let layer = detach(path, id_map)?;
        place(&layer, &format!("layers/{n}"))?;
        let _ = write!(options, "{}layers/{n}", if n == 0 { "" } else { ":" });
    }
    if lower.is_empty() {
        mkdirat(CWD, "layers/none", Mode::from_raw_mode(0o755)).during(|| "an empty layer".into())?;
        options.push_str("layers/none");
    }
    let data = CString::new(options).map_err(|_| Error::Refused("root file system: zero byte in a path".into()))?;
    mount("overlay", "root", "overlay", MountFlags::empty(), data.as_c_str())
        .during(|| format!("mounting an overlay of {} layers (limit 500)", lower.len()))?;
    open_tree(CWD, "root", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .during(|| "detaching the overlay".into())
}

fn place(tree: &OwnedFd, name: &str) -> Result<()> {
    let _ = mkdirat(CWD, name, Mode::from_raw_mode(0o755));
    move_mount(tree, "", CWD, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).during(|| format!("attaching {name}"))
}

/// `/sys` of the network namespace that this process is in. The container cannot mount it itself: its network
/// namespace belongs to the host, so that even its root cannot change links, addresses or rules.
pub fn sysfs(options: &Options, read_only: bool) -> Result<Source> {
    let what = || "mounting sysfs".to_owned();
    let fs = fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC).during(what)?;
    fsconfig_create(&fs).during(what)?;
    let mut attrs = MountAttrFlags::from_bits_retain(options.set as u32);
    if read_only && options.clear & MOUNT_ATTR_RDONLY == 0 {
        attrs |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs).during(what)?;
    Ok(Source { mount, directory: true })
}
