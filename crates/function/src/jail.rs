//! What both roles give up before they touch a tenant's bytes.
//!
//! From outside in: an empty network namespace, a mount namespace whose root is an empty, read-only tmpfs, an unprivileged
//! user of their own without capabilities, no new privileges, resource limits, Landlock that allows nothing, and a seccomp
//! filter that knows what the roles need and answers `EPERM` to the rest. What they work with are descriptors opened before.

use crate::error::{Error, Result, io};
use ::jail::Filter;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_thread_res_uid;
use rustix::{fs, thread};
use std::path::Path;

/// Steps that need root, in a process of one thread. `mount_point` is any directory; it is covered in the new namespace
/// only.
pub(crate) fn leave_the_host(mount_point: &Path) -> Result<()> {
    ::jail::unshare(jail::NAMESPACES).map_err(io("leave the namespaces of", "the host"))?;
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

/// Limits of one role.
pub(crate) struct Limits {
    pub processes: u64,
    pub descriptors: u64,
    /// Bytes of address space; `None` for whoever reserves large pools.
    pub address_space: Option<u64>,
    /// Seconds of processor time.
    pub cpu: Option<u64>,
}

/// Becomes nobody in particular, for good. The process has one thread.
pub(crate) fn drop_privilege(uid: u32, limits: &Limits) -> Result<()> {
    let bounds = ::jail::Limits {
        processes: Some(limits.processes),
        descriptors: Some(limits.descriptors),
        address_space: limits.address_space,
        cpu: limits.cpu,
        file: None,
    };
    bounds.set().map_err(failed)?;
    ::jail::become_user(uid).map_err(failed)?;
    ::jail::no_way_back().map_err(failed)?;
    if thread::capabilities(None).is_ok_and(|sets| !sets.effective.is_empty() || !sets.permitted.is_empty()) {
        return Err(Error::Start("capabilities are left after the change of user".into()));
    }
    ::jail::confine(None).map_err(failed)?;
    FILTER.apply().map_err(failed)
}

const FILTER: Filter = Filter { calls: ALLOWED, threads: true, prctl: &PRCTL_ALLOWED, ioctl: &IOCTL_ALLOWED };

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
