//! A terminal out of the container's own `/dev/pts`, for a process that has one.

use crate::error::{During, Error, Result};
use crate::spec::Process;
use rustix::fs::{Mode, OFlags, ResolveFlags, fchown, fstatfs, openat2};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{Gid, Uid};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

const PATIENCE: Duration = Duration::from_secs(2);

/// A container's rules for devices are written while it is being made, and on version 1 of control groups all is denied
/// before the first is allowed: what is refused then is tried again.
fn opened(open: impl Fn() -> rustix::io::Result<OwnedFd>) -> rustix::io::Result<OwnedFd> {
    let until = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(Errno::PERM) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            other => return other,
        }
    }
}

/// (slave, master). The container may have put anything in place of `/dev/pts/ptmx` by the time of an exec, so links
/// are not followed and the file system is looked at.
pub fn open(root: BorrowedFd<'_>, process: &Process) -> Result<(OwnedFd, OwnedFd)> {
    let what = || "opening a terminal (/dev/pts/ptmx)".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let master = opened(|| openat2(root, "dev/pts/ptmx", flags, Mode::empty(), resolve)).during(what)?;
    if fstatfs(&master).during(what)?.f_type as u64 != DEVPTS_SUPER_MAGIC {
        return Err(Error::Refused("/dev/pts/ptmx of the container is no terminal device".into()));
    }
    unlockpt(&master).during(what)?;
    let slave =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).during(what)?;
    if let Some(size) = process.console_size {
        let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).during(what)?;
    }
    fchown(&slave, Some(Uid::from_raw(process.user.uid)), Some(Gid::from_raw(process.user.gid))).during(what)?;
    Ok((slave, master))
}
