//! `subPath`: a path inside a volume, which a container that shares the volume may be changing at this very moment.
//! It is resolved by the kernel with `RESOLVE_BENEATH`, so no link and no `..` leads out, and what was resolved is pinned
//! by a bind mount from the open descriptor: nothing can be swapped afterwards.

use super::{VolumeError, io, tree};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

fn safe() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS
}

fn open_beneath(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    rustix::fs::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), safe())
}

/// Opens `sub` below `root`, making missing directories.
pub(crate) fn resolve(root: &Path, sub: &Path, fs_group: Option<u32>) -> Result<OwnedFd, VolumeError> {
    let refuse = |why: &str| VolumeError::Invalid(format!("subPath \"{}\": {why}", sub.display()));
    if sub.as_os_str().len() > 4096 {
        return Err(refuse("longer than 4096 bytes"));
    }
    for part in sub.components() {
        match part {
            Component::Normal(_) | Component::CurDir => {}
            Component::ParentDir => return Err(refuse("must not contain '..'")),
            Component::RootDir | Component::Prefix(_) => return Err(refuse("must be relative")),
        }
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root_fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| io("open", root)(e.into()))?;
    let mut at = PathBuf::new();
    let mut fd = open_beneath(&root_fd, &at).map_err(|e| io("open", root)(e.into()))?;
    for part in sub.components().filter(|c| *c != Component::CurDir) {
        at.push(part);
        let outside = |e: rustix::io::Errno| match e {
            rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => refuse("leads out of its volume"),
            other => io("open", &root.join(&at))(other.into()),
        };
        fd = match open_beneath(&root_fd, &at) {
            Ok(found) => found,
            Err(rustix::io::Errno::NOENT) => {
                let name = Path::new(part.as_os_str());
                match rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o750)) {
                    Ok(()) => {
                        let made =
                            rustix::fs::openat2(&fd, name, flags, Mode::empty(), safe() | ResolveFlags::NO_SYMLINKS)
                                .map_err(outside)?;
                        give(&made, fs_group).map_err(outside)?;
                        made
                    }
                    // Somebody made it meanwhile, or a dangling link stands there.
                    Err(rustix::io::Errno::EXIST) => open_beneath(&root_fd, &at).map_err(outside)?,
                    Err(other) => return Err(outside(other)),
                }
            }
            Err(other) => return Err(outside(other)),
        };
    }
    Ok(fd)
}

/// A directory made for a subPath belongs to the pod's root user and the pod's group, open like the volume itself.
fn give(dir: &OwnedFd, fs_group: Option<u32>) -> rustix::io::Result<()> {
    let group = Gid::from_raw(fs_group.unwrap_or(0));
    rustix::fs::chownat(dir, "", Some(Uid::from_raw(0)), Some(group), AtFlags::EMPTY_PATH)?;
    let mode = if fs_group.is_some() { 0o2777 } else { 0o777 };
    rustix::fs::chmod(format!("/proc/self/fd/{}", dir.as_raw_fd()), Mode::from_raw_mode(mode))
}

/// Resolves `sub` below `root` and pins it at `pin`; returns `pin`. An existing pin is kept.
pub(crate) fn pin(root: &Path, sub: &Path, pin: &Path, fs_group: Option<u32>) -> Result<PathBuf, VolumeError> {
    if tree::is_mounted(pin) {
        return Ok(pin.to_owned());
    }
    let fd = resolve(root, sub, fs_group)?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| io("look at", sub)(e.into()))?;
    let parent = pin.parent().unwrap_or(pin);
    std::fs::create_dir_all(parent).map_err(io("make", parent))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => std::fs::create_dir_all(pin).map_err(io("make", pin))?,
        FileType::RegularFile | FileType::Socket | FileType::Fifo => {
            std::fs::OpenOptions::new().create(true).append(true).open(pin).map(drop).map_err(io("make", pin))?;
        }
        other => {
            let sub = sub.display();
            return Err(VolumeError::Invalid(format!(
                "subPath \"{sub}\": is neither a file nor a directory ({other:?})"
            )));
        }
    }
    let source = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::mount::mount_bind(&source, pin).map_err(|e| io("bind", pin)(e.into()))?;
    Ok(pin.to_owned())
}
