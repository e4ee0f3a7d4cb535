//! What the role gives up before it reads a workload's first byte.

use crate::error::{Error, Result};
use ::jail::{Failed, Filter, Limits};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::UnshareFlags;
use std::path::Path;

/// System calls that the role needs beside sockets of its two families: on what is open, new connections, memory.
const ALLOWED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_fcntl,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// It connects from the host's network, which it keeps.
const NAMESPACES: UnshareFlags = UnshareFlags::NEWNS.union(UnshareFlags::NEWIPC).union(UnshareFlags::NEWUTS);
const FILTER: Filter = Filter {
    calls: ALLOWED,
    threads: false,
    sockets: &[libc::AF_INET as u32, libc::AF_INET6 as u32],
    prctl: &[],
    ioctl: &[],
};

/// Becomes an unprivileged user with an empty root, for good. The process has one thread.
pub fn enter(mount_point: &Path, uid: u32) -> Result<()> {
    ::jail::unshare(NAMESPACES).map_err(Error::system("leave the host's namespaces"))?;
    leave_all(mount_point, uid).map_err(|failed| Error::system(failed.step)(failed.source))
}

fn leave_all(mount_point: &Path, uid: u32) -> std::result::Result<(), Failed> {
    ::jail::empty_root(mount_point)?;
    // As many connections as the host lets it have.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })
        .map_err(|error| Failed { step: "set resource limits", source: error.into() })?;
    Limits { processes: Some(1), ..Limits::default() }.set()?;
    ::jail::become_user(uid)?;
    ::jail::no_way_back()?;
    ::jail::without_capabilities()?;
    ::jail::confine_files()?;
    FILTER.apply()
}
