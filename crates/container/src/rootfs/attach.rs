//! The container's half: runs as root of the container's user namespace in its new mount namespace. The root file
//! system's contents are the image's and may be hostile, so every target is resolved by the kernel inside the root
//! (`openat2` with `RESOLVE_IN_ROOT`) and used through its descriptor; no path is walked twice.

use super::prepare::{Prepared, PreparedMount};
use crate::cgroup::Hierarchies;
use crate::error::{During, Error, Result};
use crate::spec::Spec;
use crate::sys::{MountAttr, mount_setattr};
use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, symlinkat};
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
/// there. Returns what it returned.
pub fn attach<T>(
    spec: &Spec,
    prepared: Prepared,
    console: impl FnOnce(BorrowedFd<'_>) -> Result<Option<(OwnedFd, T)>>,
) -> Result<Option<(OwnedFd, T)>> {
    let Prepared { root, mounts, devices, hierarchies } = prepared;
    // Lets nothing that happens here reach the host, and nothing of the host reach in.
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .during(|| "making / private".into())?;
    move_mount(&root, "", CWD, "root", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(|| "attaching the root".into())?;
    let mut own_dev = true;
    for mount in &mounts {
        own_dev &= !(mount.kind == "bind" && mount.destination == Path::new("/dev"));
        attach_one(root.as_fd(), mount, &hierarchies).map_err(|e| in_mount(&mount.destination, e))?;
    }
    if own_dev {
        device_nodes(root.as_fd(), &devices)?;
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
    mask(root.as_fd(), &spec.linux.masked_paths)?;
    for path in &spec.linux.readonly_paths {
        read_only(root.as_fd(), path)?;
    }
    if spec.root.as_ref().is_some_and(|r| r.readonly) {
        mount_setattr(root.as_fd(), false, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() })
            .during(|| "making the root read-only".into())?;
    }
    fchdir(&root).during(|| "entering the root".into())?;
    pivot_root(".", ".").during(|| "pivot_root".into())?;
    // The old root is now on top of the new one; this uncovers it.
    unmount(".", UnmountFlags::DETACH).during(|| "leaving the old root".into())?;
    rustix::process::chdir("/").during(|| "entering /".into())?;
    Ok(terminal)
}

fn in_mount(destination: &Path, error: Error) -> Error {
    match error {
        Error::Step { what, source } => Error::step(format!("mount {}: {what}", destination.display()), source),
        Error::Refused(why) => Error::Refused(format!("mount {}: {why}", destination.display())),
        other => other,
    }
}

fn attach_one(root: BorrowedFd<'_>, mount: &PreparedMount, hierarchies: &Hierarchies) -> Result<()> {
    let directory = mount.source.as_ref().is_none_or(|s| s.directory);
    let system = matches!(mount.kind.as_str(), "proc" | "sysfs" | "devpts" | "mqueue" | "cgroup");
    let target =
        if system { plain_target(root, &mount.destination)? } else { target(root, &mount.destination, directory)? };
    if !system {
        let magic = rustix::fs::fstatfs(&target).during(|| "target".into())?.f_type as u64;
        if magic == PROC_SUPER_MAGIC || (magic == SYSFS_MAGIC && mount.kind != "bind") {
            return Err(Error::Refused("the target lies in /proc or /sys".into()));
        }
    }
    match (&mount.source, mount.kind.as_str()) {
        (Some(source), _) => place(&source.mount, &target).during(|| "attaching".into()),
        (None, "cgroup") => cgroups(root, mount, hierarchies),
        (None, kind) => {
            let tree = make(kind, mount)?;
            place(&tree, &target).during(|| "attaching".into())
        }
    }
}

fn place(tree: &OwnedFd, target: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// A new file system of a kind that a user namespace may mount.
fn make(kind: &str, mount: &PreparedMount) -> Result<OwnedFd> {
    if !matches!(kind, "proc" | "tmpfs" | "devpts" | "mqueue") {
        return Err(Error::Refused(format!("type {kind:?} is not supported")));
    }
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).during(|| format!("opening {kind}"))?;
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
    let attrs = MountAttrFlags::from_bits_retain(mount.options.set as u32);
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs).during(|| format!("mounting {kind}"))
}

/// The container's own view of its control groups: version 2 alone, or a directory for each version 1 controller.
/// Programs size themselves by it. Where it cannot be had, the directory stays empty.
fn cgroups(root: BorrowedFd<'_>, mount: &PreparedMount, found: &Hierarchies) -> Result<()> {
    let attrs = MountAttrFlags::from_bits_retain(mount.options.set as u32);
    let new = |kind: &str, flag: &[&str]| -> rustix::io::Result<OwnedFd> {
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for flag in flag {
            fsconfig_set_flag(&fs, *flag)?;
        }
        fsconfig_create(&fs)?;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)
    };
    if found.v1.is_empty() {
        if let Ok(tree) = new("cgroup2", &[]) {
            place(&tree, &plain_target(root, &mount.destination)?).during(|| "attaching".into())?;
        }
        return Ok(());
    }
    let mut holder = PreparedMount {
        destination: mount.destination.clone(),
        kind: "tmpfs".into(),
        options: mount.options.clone(),
        source: None,
    };
    holder.options.set &= !MOUNT_ATTR_RDONLY;
    holder.options.data = vec![("mode".into(), Some("755".into())), ("size".into(), Some("64k".into()))];
    let tree = make("tmpfs", &holder)?;
    place(&tree, &plain_target(root, &mount.destination)?).during(|| "attaching".into())?;
    for hierarchy in &found.v1 {
        let controllers: Vec<&str> = hierarchy.controllers.iter().map(String::as_str).collect();
        let Ok(view) = new("cgroup", &controllers) else { continue };
        let name = controllers.join(",");
        place(&view, &target(root, &mount.destination.join(&name), true)?).during(|| format!("attaching {name}"))?;
        for alias in controllers.iter().filter(|_| controllers.len() > 1) {
            let _ = symlinkat(&name, &tree, *alias);
        }
    }
    mount_setattr(tree.as_fd(), false, &MountAttr { set: MOUNT_ATTR_RDONLY, ..Default::default() })
        .during(|| "making it read-only".into())
}

fn device_nodes(root: BorrowedFd<'_>, devices: &[(&str, OwnedFd)]) -> Result<()> {
    let dev = plain_target(root, Path::new("/dev"))?;
    for (name, node) in devices {
        let what = || format!("/dev/{name}");
        let file = target(dev.as_fd(), Path::new(name), false)?;
        place(node, &file).during(what)?;
    }
    let links = [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ];
    for (to, name) in links {
        match symlinkat(to, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::step(format!("/dev/{name}"), e)),
        }
    }
    Ok(())
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

fn existing(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<Option<OwnedFd>> {
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
fn plain_target(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
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
