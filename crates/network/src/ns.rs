//! Pinned network namespaces: a bind mount of `/proc/thread-self/ns/net` on a file keeps a namespace alive without a
//! process in it.

use crate::error::{Error, Result};
use crate::sys;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;
use std::fs;
use std::path::Path;

/// `statfs` type of namespace files.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Runs `work` on a thread of its own inside the network namespace pinned at `path`; the caller's is left alone.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let ns = open(path)?;
    in_ns(ns.as_fd(), work)
}

/// As [`in_netns`], by descriptor.
pub(crate) fn in_ns<T: Send>(ns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    on_thread(|| {
        enter(ns)?;
        Ok(work())
    })
}

/// Moves the calling thread, and only it, into the namespace.
pub(crate) fn enter(ns: BorrowedFd<'_>) -> Result<()> {
    rustix::thread::move_into_link_name_space(ns, Some(LinkNameSpaceType::Network))
        .map_err(Error::errno("enter the network namespace"))
}

/// Opens a pinned namespace; `NotFound` and plain files are errors.
pub(crate) fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::file("open the network namespace", path)(errno.into()))
}

/// Whether a namespace is pinned at `path` (rather than nothing, or the bare file of a half-done pin).
pub(crate) fn is_pinned(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// Makes a new namespace and runs `work` in it. It lives as long as its descriptor, or where it is pinned.
pub(crate) fn fresh(work: impl FnOnce(BorrowedFd<'_>) -> Result<()> + Send) -> Result<OwnedFd> {
    on_thread(|| {
        sys::unshare_net().map_err(Error::system("make a network namespace"))?;
        let ns = open(Path::new("/proc/thread-self/ns/net"))?;
        work(ns.as_fd())?;
        Ok(ns)
    })
}

/// Pins a namespace at `path`.
pub(crate) fn pin(ns: BorrowedFd<'_>, path: &Path) -> Result<()> {
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::file("create the namespace's mount point", path))?;
    rustix::mount::mount_bind(format!("/proc/self/fd/{}", ns.as_raw_fd()), path)
        .map_err(|errno| Error::file("pin the network namespace at", path)(errno.into()))
}

/// Unpins; the namespace goes once no process is in it. Nothing there is no error.
pub(crate) fn unpin(path: &Path) -> Result<()> {
    while is_pinned(path) {
        rustix::mount::unmount(path, UnmountFlags::DETACH)
            .map_err(|errno| Error::file("unmount the network namespace", path)(errno.into()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove the namespace's mount point", path)(error))
        }
        _ => Ok(()),
    }
}

/// Makes `dir` a shared mount of its own, so that unpinning reaches mount namespaces that were copied from ours; else
/// a container's copy of the mount would keep a dead pod's namespace alive.
pub(crate) fn share(dir: &Path) -> Result<()> {
    let error = |errno: rustix::io::Errno| Error::file("prepare the namespaces' directory", dir)(errno.into());
    if !is_mount_point(dir) {
        rustix::mount::mount_bind(dir, dir).map_err(error)?;
    }
    rustix::mount::mount_change(dir, MountPropagationFlags::SHARED).map_err(error)
}

pub(crate) fn unshare_dir(dir: &Path) -> Result<()> {
    while is_mount_point(dir) {
        rustix::mount::unmount(dir, UnmountFlags::DETACH).map_err(|errno| Error::file("unmount", dir)(errno.into()))?;
    }
    Ok(())
}

fn is_mount_point(dir: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
    rustix::fs::statx(CWD, dir, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("atoll-netns".into())
            .spawn_scoped(scope, work)
            .map_err(Error::system("start a thread"))?
            .join()
            .map_err(|_| Error::Panicked("atoll-netns"))?
    })
}

/// Writes one sysctl of the calling thread's network namespace. What this kernel was built without is passed over.
pub(crate) fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    match fs::write(&path, value) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::file("write the sysctl", path)),
    }
}

/// Runs `work` in a new network namespace that is gone when it returns.
pub(crate) fn in_scratch<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread(|| {
        sys::unshare_net().map_err(Error::system("make a network namespace"))?;
        work()
    })
}
