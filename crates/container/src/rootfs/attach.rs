//! The container's half: runs as root of the container's user namespace in its new mount namespace. The root file
//! system's contents are the image's and may be hostile, so every target is resolved by the kernel inside the root
//! (`openat2` with `RESOLVE_IN_ROOT`) and used through its descriptor; no path is walked twice.

use super::prepare::{Prepared, PreparedMount};
use crate::cgroup::Hierarchies;
use crate::error::{During, Error, Result};
use crate::runtime::Bundle;
use crate::spec::Spec;
use crate::sys::{MountAttr, mount_setattr};
use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use rustix::process::{fchdir, pivot_root};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

const PROC_SUPER_MAGIC: u64 = 0x9fa0;
const SYSFS_MAGIC: u64 = 0x6265_6572;

/// Builds the tree and makes it the root. `console` is the terminal's slave side opener, called when `/dev/pts` is
/// there; `before_pivot` is called when all is in place and the host's tree still there. Returns what `console` did.
pub fn attach<T>(
    spec: &Spec,
    bundle: Option<&Bundle>,
    prepared: Prepared,
    console: impl FnOnce(BorrowedFd<'_>) -> Result<Option<(OwnedFd, T)>>,
    before_pivot: impl FnOnce() -> Result<()>,
) -> Result<Option<(OwnedFd, T)>> {
    let Prepared { root, mounts, devices, hierarchies } = prepared;
    // Lets nothing that happens here reach the host, and nothing of the host reach in.
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .during(|| "making / private".into())?;
    let place_of_root = if bundle.is_some() { "." } else { "root" };
    move_mount(&root, "", CWD, place_of_root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(|| "attaching the root".into())?;
    let propagation = match bundle {
        Some(_) => Some(root_propagation(spec.linux.rootfs_propagation.as_deref())?),
        None => None,
    };
    if let Some((kind, _)) = propagation {
        // What is mounted from here on must not show on the host.
        let now = if kind == libc::MS_SLAVE { libc::MS_SLAVE } else { libc::MS_PRIVATE };
        set_propagation(root.as_fd(), now, true)?;
    }
    let mut own_dev = true;
    for mount in &mounts {
        own_dev &= !(mount.kind == "bind" && mount.destination == Path::new("/dev"));
        attach_one(root.as_fd(), spec, bundle, mount, &hierarchies).map_err(|e| in_mount(&mount.destination, e))?;
    }
    if own_dev {
        match bundle {
            Some(_) => super::devices::make(root.as_fd(), &spec.linux.devices)?,
            None => super::devices::place(root.as_fd(), &devices)?,
        }
        super::devices::links(root.as_fd())?;
    }
    let terminal = console(root.as_fd())?;
    if let Some((slave, _)) = &terminal {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let clone = open_tree(slave, "", flags).during(|| "/dev/console".into())?;
        let target = target(root.as_fd(), Path::new("/dev/console"), false)?;
        place(&clone, &target).during(|| "/dev/console".into())?;
    }
    let cwd = Path::new(&spec.process.cwd);
    if cwd.is_absolute() {
        // As the field's runtimes do: a working directory that the image lacks is made.
        let _ = target(root.as_fd(), cwd, true);
    }
    before_pivot()?;
    mask(root.as_fd(), &spec.linux.masked_paths)?;
    for path in &spec.linux.readonly_paths {
        read_only(root.as_fd(), path)?;
    }
    if spec.root.as_ref().is_some_and(|r| r.readonly) {
        mount_setattr(root.as_fd(), false, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() })
            .during(|| "making the root read-only".into())?;
    }
    change_root(&root, bundle.is_some_and(|b| b.no_pivot))?;
    // A shared one cannot be pivoted to.
    if let Some((kind @ (libc::MS_SHARED | libc::MS_UNBINDABLE), below)) = propagation {
        set_propagation(root.as_fd(), kind, below)?;
    }
    Ok(terminal)
}

fn change_root(root: &OwnedFd, no_pivot: bool) -> Result<()> {
    fchdir(root).during(|| "entering the root".into())?;
    if no_pivot {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(root, "", CWD, "/", flags).during(|| "moving the root over /".into())?;
        rustix::process::chroot(".").during(|| "chroot".into())?;
    } else {
        pivot_root(".", ".").during(|| "pivot_root (a host that runs from a ramdisk needs --no-pivot)".into())?;
        // The old root is now on top of the new one; this uncovers it.
        unmount(".", UnmountFlags::DETACH).during(|| "leaving the old root".into())?;
    }
    rustix::process::chdir("/").during(|| "entering /".into())
}

/// `linux.rootfsPropagation`, and whether it is of all mounts below; private where nothing is said.
fn root_propagation(wanted: Option<&str>) -> Result<(u64, bool)> {
    Ok(match wanted {
        None | Some("" | "private") => (libc::MS_PRIVATE, false),
        Some("rprivate") => (libc::MS_PRIVATE, true),
        Some("slave") => (libc::MS_SLAVE, false),
        Some("rslave") => (libc::MS_SLAVE, true),
        Some("shared") => (libc::MS_SHARED, false),
        Some("rshared") => (libc::MS_SHARED, true),
        Some("unbindable") => (libc::MS_UNBINDABLE, false),
        Some("runbindable") => (libc::MS_UNBINDABLE, true),
        Some(other) => {
            return Err(Error::Refused(format!("linux.rootfsPropagation: {other:?}: no such propagation")));
        }
    })
}

fn set_propagation(root: BorrowedFd<'_>, propagation: u64, below: bool) -> Result<()> {
    mount_setattr(root, below, &MountAttr { propagation, ..Default::default() })
        .during(|| "linux.rootfsPropagation".into())
}

fn in_mount(destination: &Path, error: Error) -> Error {
    match error {
        Error::Step { what, source } => Error::step(format!("mount {}: {what}", destination.display()), source),
        Error::Refused(why) => Error::Refused(format!("mount {}: {why}", destination.display())),
        other => other,
    }
}

fn attach_one(
    root: BorrowedFd<'_>,
    spec: &Spec,
    bundle: Option<&Bundle>,
    mount: &PreparedMount,
    hierarchies: &Hierarchies,
) -> Result<()> {
    let directory = mount.source.as_ref().is_none_or(|s| s.directory);
    let system = matches!(mount.kind.as_str(), "proc" | "sysfs" | "devpts" | "mqueue" | "cgroup");
    let target =
        if system { plain_target(root, &mount.destination)? } else { target(root, &mount.destination, directory)? };
    if !system {
        let magic = rustix::fs::fstatfs(&target).during(|| "target".into())?.f_type as u64;
        let fake = bundle.is_some()
            && mount.kind == "bind"
            && MAY_BE_COVERED.iter().any(|p| mount.destination == Path::new(p));
        if (magic == PROC_SUPER_MAGIC && !fake) || (magic == SYSFS_MAGIC && mount.kind != "bind" && bundle.is_none()) {
            return Err(Error::Refused("the target lies in /proc or /sys".into()));
        }
    }
    match (&mount.source, mount.kind.as_str()) {
        (Some(source), _) => {
            place(&source.mount, &target).during(|| "attaching".into())?;
            if bundle.is_some() { propagate(source.mount.as_fd(), mount) } else { Ok(()) }
        }
        (None, "cgroup") => super::cgroups::mount(root, mount, hierarchies, own_cgroup_view(spec, bundle)),
        (None, kind) => {
            let tree = make(kind, mount, bundle.is_some())?;
            if mount.options.copy_up && kind == "tmpfs" {
                super::copy_up::copy(&target, &tree).during(|| "tmpcopyup".into())?;
            }
            if mount.options.set_at_top() & MOUNT_ATTR_RDONLY != 0 {
                mount_setattr(tree.as_fd(), false, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() })
                    .during(|| "making it read-only".into())?;
            }
            place(&tree, &target).during(|| "attaching".into())?;
            // Only here: below a shared mount it has just become one.
            propagate(tree.as_fd(), mount)
        }
    }
}

fn propagate(tree: BorrowedFd<'_>, mount: &PreparedMount) -> Result<()> {
    if mount.options.propagation == 0 {
        return Ok(());
    }
    let attr = MountAttr { propagation: mount.options.propagation, ..Default::default() };
    mount_setattr(tree, mount.options.propagation_below, &attr).during(|| "setting its propagation".into())
}

/// Files of `/proc` that others put a container's own view over.
const MAY_BE_COVERED: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// The group to show where the container has no cgroup namespace of its own.
fn own_cgroup_view<'a>(spec: &Spec, bundle: Option<&'a Bundle>) -> Option<&'a Path> {
    let path = bundle?.cgroup.as_deref()?;
    spec.namespace(crate::spec::NamespaceKind::Cgroup).is_none().then_some(path)
}

pub fn place(tree: &OwnedFd, target: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// A new file system: of a kind that a user namespace may mount for a pod, of any kind for a bundle.
pub fn make(kind: &str, mount: &PreparedMount, any: bool) -> Result<OwnedFd> {
    if !any && !matches!(kind, "proc" | "tmpfs" | "devpts" | "mqueue") {
        return Err(Error::Refused(format!("type {kind:?} is not supported")));
    }
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).during(|| format!("opening {kind}"))?;
    if any && !mount.from.as_os_str().is_empty() {
        fsconfig_set_string(&fs, "source", &mount.from).during(|| format!("{kind}: source"))?;
    }
    for (key, value) in &mount.options.data {
        let what = || format!("{kind}: option {key}");
        match value {
            Some(value) => fsconfig_set_string(&fs, key, value).during(what)?,
            // Since Linux 4.7 every devpts is an instance of its own.
            None if key == "newinstance" => {}
            None => fsconfig_set_flag(&fs, key).during(what)?,
        }
    }
    fsconfig_create(&fs).during(|| format!("creating {kind}"))?;
    // Read-only comes last: the tree may have to be filled first.
    let attrs = MountAttrFlags::from_bits_retain((mount.options.set_at_top() & !MOUNT_ATTR_RDONLY) as u32);
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs).during(|| format!("mounting {kind}"))
}

/// Hides files behind `/dev/null` and directories behind an empty file system.
fn mask(root: BorrowedFd<'_>, paths: &[PathBuf]) -> Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let what = || format!("masking {}", path.display());
        let Some(target) = existing(root, path).during(what)? else { continue };
        let stat = fstat(&target).during(what)?;
        let cover = if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            let null = existing(root, Path::new("/dev/null")).during(what)?.ok_or(Errno::NOENT).during(what)?;
            // Whoever else can write to this `/dev` may have put anything there.
            let found = fstat(&null).during(what)?;
            let device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice;
            if !device || found.st_rdev != rustix::fs::makedev(1, 3) {
                return Err(Error::Refused(format!("{}: /dev/null of the container is another file", what())));
            }
            open_tree(&null, "", flags).during(what)?
        } else if let Some(attached) = &empty {
            open_tree(attached, "", flags).during(what)?
        } else {
            let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).during(what)?;
            fsconfig_set_string(&fs, "size", "0").during(what)?;
            fsconfig_set_string(&fs, "mode", "555").during(what)?;
            fsconfig_create(&fs).during(what)?;
            let attrs = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
            let attrs = MountAttrFlags::from_bits_retain(attrs as u32);
            fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs).during(what)?
        };
        place(&cover, &target).during(what)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && empty.is_none() {
            empty = Some(cover);
        }
    }
    Ok(())
}

fn read_only(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let what = || format!("making {} read-only", path.display());
    let Some(target) = existing(root, path).during(what)? else { return Ok(()) };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(&target, "", flags).during(what)?;
    mount_setattr(clone.as_fd(), true, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() }).during(what)?;
    place(&clone, &target).during(what)
}

pub fn existing(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<Option<OwnedFd>> {
    match openat2(root, inside(path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => Ok(None),
        Err(e) => Err(e),
    }
}

fn resolve() -> ResolveFlags {
    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS
}

fn inside(path: &Path) -> &Path {
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// A directory of the system's own (`/proc`, `/sys`, `/dev` and below): no link on the way, so that an image cannot put
/// them elsewhere and see writes meant for them.
pub fn plain_target(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let no_links = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let open =
        || openat2(root, inside(path), OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY, Mode::empty(), no_links);
    match open() {
        Ok(fd) => Ok(fd),
        Err(Errno::NOENT) => {
            target(root, path, true)?;
            open().during(|| format!("{}", path.display()))
        }
        Err(Errno::LOOP | Errno::NOTDIR) => {
            Err(Error::Refused(format!("{} is no plain directory in the image", path.display())))
        }
        Err(e) => Err(Error::step(format!("{}", path.display()), e)),
    }
}

/// The place for a mount, made if it is missing. Links on the way are followed as the container itself would.
pub fn target(root: BorrowedFd<'_>, path: &Path, directory: bool) -> Result<OwnedFd> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::Refused(format!("{}: `..` in the target", path.display())));
            }
        }
    }
    if names.is_empty() {
        return Err(Error::Refused("the target is the root itself".into()));
    }
    let shown = || format!("target {}", path.display());
    let fd = match openat2(root, inside(path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => create(root, &names, directory).during(shown)?,
        Err(e) => return Err(Error::step(shown(), e)),
    };
    let kind = FileType::from_raw_mode(fstat(&fd).during(shown)?.st_mode);
    match (directory, kind == FileType::Directory, kind == FileType::Symlink) {
        (_, _, true) => Err(Error::Refused(format!("{}: is a link that leads nowhere", path.display()))),
        (true, false, _) => Err(Error::Refused(format!("{}: is no directory, the source is", path.display()))),
        (false, true, _) => Err(Error::Refused(format!("{}: is a directory, the source is none", path.display()))),
        _ => Ok(fd),
    }
}

fn create(root: BorrowedFd<'_>, names: &[&std::ffi::OsStr], directory: bool) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut parent: Option<OwnedFd> = None;
    let mut so_far = PathBuf::new();
    for (n, name) in names.iter().enumerate() {
        so_far.push(name);
        let last = n + 1 == names.len();
        let next = match openat2(root, &so_far, flags, Mode::empty(), resolve()) {
            Err(Errno::NOENT) => {
                let here = parent.as_ref().map_or(root, AsFd::as_fd);
                if last && !directory {
                    let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                    match openat(here, *name, new, Mode::from_raw_mode(0o644)) {
                        Ok(_) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(e),
                    }
                } else {
                    match mkdirat(here, *name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(e),
                    }
                }
                // A dangling link is opened as itself, and refused by who looks at it.
                openat(here, *name, flags | OFlags::NOFOLLOW, Mode::empty())?
            }
            other => other?,
        };
        parent = Some(next);
    }
    parent.ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root(directory: &Path) -> OwnedFd {
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("opened")
    }

    #[test]
    fn targets_stay_inside_the_root() {
        let outside = tempfile::tempdir().expect("directory");
        let inside = tempfile::tempdir().expect("directory");
        symlink(outside.path(), inside.path().join("abs")).expect("link");
        symlink("../../../../../../../../..", inside.path().join("up")).expect("link");
        symlink("missing", inside.path().join("dangling")).expect("link");
        let fd = root(inside.path());
        target(fd.as_fd(), Path::new("/up/a/b"), true).expect("made");
        assert!(inside.path().join("a/b").is_dir());
        // An absolute link means the container's own root, where that path is missing.
        assert!(target(fd.as_fd(), Path::new("/abs/x"), true).is_err());
        assert_eq!(fs::read_dir(outside.path()).expect("read").count(), 0);
        assert!(target(fd.as_fd(), Path::new("/dangling"), true).is_err());
        assert!(target(fd.as_fd(), Path::new("/dangling"), false).is_err());
        assert!(target(fd.as_fd(), Path::new("/x/../../y"), true).is_err());
        assert!(target(fd.as_fd(), Path::new("/"), true).is_err());
        target(fd.as_fd(), Path::new("/new/file"), false).expect("made");
        assert!(inside.path().join("new/file").is_file());
        assert!(target(fd.as_fd(), Path::new("/new/file"), true).is_err());
        assert!(target(fd.as_fd(), Path::new("/new"), false).is_err());
    }

    #[test]
    fn system_directories_are_no_links() {
        let inside = tempfile::tempdir().expect("directory");
        fs::create_dir(inside.path().join("elsewhere")).expect("made");
        symlink("/elsewhere", inside.path().join("proc")).expect("link");
        let fd = root(inside.path());
        assert!(plain_target(fd.as_fd(), Path::new("/proc")).is_err());
        assert!(plain_target(fd.as_fd(), Path::new("/sys/fs/cgroup")).is_ok());
    }
}
