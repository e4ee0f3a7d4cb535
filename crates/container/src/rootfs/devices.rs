//! `/dev`: nodes and links.

use super::attach::{place as attach, plain_target, target};
use crate::error::{During, Error, Result};
use crate::spec::Device;
use crate::sys::{MountAttr, mount_setattr};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, openat, statat, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Nodes that every container has (runtime-spec, config-linux.md, "Default Devices").
const DEFAULT: &[(&str, i64, i64)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// For a pod: nodes of the host, each as a mount of its own.
pub fn place(root: BorrowedFd<'_>, devices: &[(&str, OwnedFd)]) -> Result<()> {
    let dev = plain_target(root, Path::new("/dev"))?;
    for (name, node) in devices {
        let what = || format!("/dev/{name}");
        let file = target(dev.as_fd(), Path::new(name), false)?;
        attach(node, &file).during(what)?;
    }
    Ok(())
}

/// For a bundle: the default ones and those the configuration lists.
pub fn make(root: BorrowedFd<'_>, wanted: &[Device]) -> Result<()> {
    let mask = rustix::process::umask(Mode::empty());
    let outcome = make_all(root, wanted);
    rustix::process::umask(mask);
    outcome
}

fn make_all(root: BorrowedFd<'_>, wanted: &[Device]) -> Result<()> {
    for &(path, major, minor) in DEFAULT {
        if !wanted.iter().any(|d| d.path == Path::new(path)) {
            let device = Device {
                path: path.into(),
                kind: "c".into(),
                major,
                minor,
                file_mode: Some(0o666),
                ..Default::default()
            };
            node(root, &device)?;
        }
    }
    // As the field's runtimes: the container's own ptmx is a link into its own devpts.
    wanted.iter().filter(|d| d.path != Path::new("/dev/ptmx")).try_for_each(|device| node(root, device))
}

fn node(root: BorrowedFd<'_>, device: &Device) -> Result<()> {
    let what = || format!("linux.devices: {}", device.path.display());
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => return Err(Error::Refused(format!("{}: type {other:?}: c, b, u or p", what()))),
    };
    let (Some(directory), Some(name)) = (device.path.parent(), device.path.file_name()) else {
        return Err(Error::Refused(format!("{}: needs a path", what())));
    };
    let parent =
        if directory == Path::new("/dev") { plain_target(root, directory)? } else { target(root, directory, true)? };
    let number = |n: i64| u32::try_from(n).map_err(|_| Error::Refused(format!("{}: number {n}", what())));
    let dev = if kind == FileType::Fifo { 0 } else { makedev(number(device.major)?, number(device.minor)?) };
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    match mknodat(&parent, name, kind, mode, dev) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let there = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).during(what)?;
            if FileType::from_raw_mode(there.st_mode) == kind && (kind == FileType::Fifo || there.st_rdev == dev) {
                return Ok(());
            }
            return Err(Error::Refused(format!("{}: something else is there already", what())));
        }
        // In a user namespace nodes cannot be made, but those of the host can be shown.
        Err(Errno::PERM) if kind != FileType::Fifo => return show(&parent, name, device, dev),
        Err(e) => return Err(Error::step(what(), e)),
    }
    if let (uid, gid @ Some(_)) | (uid @ Some(_), gid) = (device.uid, device.gid) {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).during(what)?;
    }
    Ok(())
}

/// The host's root is still this process's: the node is found there under the same name.
fn show(parent: &OwnedFd, name: &std::ffi::OsStr, device: &Device, dev: u64) -> Result<()> {
    let what = || format!("linux.devices: {}", device.path.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, &device.path, flags).during(what)?;
    if rustix::fs::fstat(&tree).during(what)?.st_rdev != dev {
        let why = format!("{}: the host has another device of that name, and a user namespace may make none", what());
        return Err(Error::Refused(why));
    }
    mount_setattr(tree.as_fd(), false, &MountAttr { propagation: libc::MS_PRIVATE, ..Default::default() })
        .during(what)?;
    let new = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
    match openat(parent, name, new, Mode::from_raw_mode(0o644)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(e) => return Err(Error::step(what(), e)),
    }
    let file = openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).during(what)?;
    attach(&tree, &file).during(what)
}

pub fn links(root: BorrowedFd<'_>) -> Result<()> {
    let dev = plain_target(root, Path::new("/dev"))?;
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
