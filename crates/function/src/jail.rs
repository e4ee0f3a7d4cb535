//! What both roles give up before they touch a tenant's bytes.
//!
//! From outside in: an empty network namespace, a mount namespace whose root is an empty, read-only tmpfs, an unprivileged
//! user of their own without capabilities, no new privileges, resource limits, Landlock that allows nothing, and a seccomp
//! filter that knows what the roles need and answers `EPERM` to the rest. What they work with are descriptors opened before.

use crate::error::{Error, Result, io};
use ::jail::Filter;
pub(crate) use ::jail::Limits;
use rustix::fs;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{UnshareFlags, set_thread_res_uid};
use std::path::Path;

/// Steps that need root, in a process of one thread. `mount_point` is any directory; it is covered in the new namespace
/// only.
pub(crate) fn leave_the_host(mount_point: &Path) -> Result<()> {
    ::jail::unshare(jail::NAMESPACES).map_err(io("leave the namespaces of", "the host"))?;
    ::jail::empty_root(mount_point).map_err(failed)
}

/// As [`leave_the_host`], for who stays in the network namespace it was started in.
pub(crate) fn leave_the_host_but_its_network(mount_point: &Path) -> Result<()> {
    let namespaces = ::jail::NAMESPACES.difference(UnshareFlags::NEWNET);
    ::jail::unshare(namespaces).map_err(io("leave the namespaces of", "the host"))?;
    ::jail::empty_root(mount_point).map_err(failed)
}

fn failed(error: ::jail::Failed) -> Error {
    Error::Start(format!("{error}: {}", error.source))
}

/// Does what has to be done before the jail but not as root: descriptors opened now remember whose they are.
pub(crate) fn as_user<T>(uid: u32, work: impl FnOnce() -> T) -> Result<T> {
    let failed = |e: rustix::io::Errno| io("change the effective user of", "this process")(e);
    let change = |to: u32| set_thread_res_uid(None, Some(fs::Uid::from_raw(to)), None).map_err(failed);
    change(uid)?;
    // Without it, the files in /proc/self would be root's.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(failed)?;
    let result = work();
    change(0)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed)?;
    Ok(result)
}

/// Becomes nobody in particular, for good. The process has one thread.
pub(crate) fn drop_privilege(uid: u32, limits: &Limits) -> Result<()> {
    give_up(uid, limits)?;
    ::jail::confine(None).map_err(failed)?;
    FILTER.apply().map_err(failed)
}

/// As [`drop_privilege`], for who connects to others: TCP and UDP sockets, but none that listens.
pub(crate) fn drop_privilege_but_connections(uid: u32, limits: &Limits) -> Result<()> {
    give_up(uid, limits)?;
    ::jail::confine_files().map_err(failed)?;
    let calls: Vec<i64> = ALLOWED.iter().filter(|call| !LISTENING.contains(call)).chain(CONNECTING).copied().collect();
    let filter = Filter { calls: &calls, sockets: &[libc::AF_INET as u32, libc::AF_INET6 as u32], ..FILTER };
    filter.apply().map_err(failed)
}

const LISTENING: [i64; 2] = [libc::SYS_listen, libc::SYS_accept4];
const CONNECTING: &[i64] = &[libc::SYS_connect];

fn give_up(uid: u32, limits: &Limits) -> Result<()> {
    limits.set().map_err(failed)?;
    ::jail::become_user(uid).map_err(failed)?;
    ::jail::no_way_back().map_err(failed)?;
    ::jail::without_capabilities().map_err(failed)
}

const FILTER: Filter =
    Filter { calls: ALLOWED, threads: true, sockets: &[], prctl: &PRCTL_ALLOWED, ioctl: &IOCTL_ALLOWED };

/// Thread names and the name of a mapping; nothing else.
const PRCTL_ALLOWED: [u32; 3] = [libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32, libc::PR_SET_VMA as u32];
/// `FIONBIO`, `FIOCLEX`, `PAGEMAP_SCAN`.
const IOCTL_ALLOWED: [u32; 3] = [0x5421, 0x5451, 0xc060_6610];

/// System calls the roles need: memory, threads, time, polling, and reading, writing and accepting on what is open.
const ALLOWED: &[i64] = &[
    // descriptors that are open
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_ftruncate,
    libc::SYS_memfd_create,
    // sockets that were handed in (bound, maybe not listening yet), and those they accept
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_socketpair,
    // waiting
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_restart_syscall,
    // memory
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // threads and signals
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // time and randomness
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_arch_prctl,
];
