//! What both roles give up before they touch a tenant's bytes.
//!
//! From outside in: an empty network namespace, a mount namespace whose root is an empty, read-only tmpfs, an unprivileged
//! user of their own without capabilities, no new privileges, resource limits, Landlock that allows nothing, and a seccomp
//! filter that knows what the roles need and answers `EPERM` to the rest. What they work with are descriptors opened before.

use crate::error::{Error, Result, io};
use crate::sys;
use rustix::fs::Mode;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{UnshareFlags, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::{fs, process, thread};
use std::path::Path;

/// Steps that need root, in a process of one thread. `mount_point` is any directory; it is covered in the new namespace
/// only.
pub(crate) fn leave_the_host(mount_point: &Path) -> Result<()> {
    // rustix reads the auxiliary vector at its first need, which the filter would deny.
    let _ = rustix::param::page_size();
    // The engine asks for it later; the answer comes from /proc, which will be gone, and is kept.
    let _ = rustix::param::page_size();
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    sys::unshare(flags).map_err(io("leave the namespaces of", "the host"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(io("make private", "/"))?;
    let options = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", mount_point, "tmpfs", options, c"size=4k,nr_inodes=4,mode=0555")
        .map_err(io("mount on", mount_point))?;
    process::chdir(mount_point).map_err(io("enter", mount_point))?;
    // pivot_root(2): with both the same directory, the old root ends up on top of the new one and is let go.
    process::pivot_root(".", ".").map_err(io("make the root", mount_point))?;
    unmount(".", UnmountFlags::DETACH).map_err(io("let go of", "the old root"))?;
    let read_only = options | MountFlags::RDONLY;
    rustix::mount::mount_remount("/", read_only, c"").map_err(io("make read-only", "/"))?;
    process::chdir("/").map_err(io("enter", "/"))
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
    let failed = |operation: &'static str| move |e: rustix::io::Errno| io(operation, "this process")(e);
    let limit = |what: Resource, wanted: u64| {
        // Raising a hard limit needs a capability that containers lack; lowering never does.
        let hard = getrlimit(what).maximum.map_or(wanted, |m| m.min(wanted));
        setrlimit(what, Rlimit { current: Some(hard), maximum: Some(hard) }).map_err(failed("set limits of"))
    };
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, limits.descriptors)?;
    limit(Resource::Nproc, limits.processes)?;
    if let Some(bytes) = limits.address_space {
        limit(Resource::As, bytes)?;
    }
    if let Some(seconds) = limits.cpu {
        limit(Resource::Cpu, seconds)?;
    }
    let (user, group) = (fs::Uid::from_raw(uid), fs::Gid::from_raw(uid));
    set_thread_groups(&[]).map_err(failed("drop the groups of"))?;
    set_thread_res_gid(group, group, group).map_err(failed("change the group of"))?;
    set_thread_res_uid(user, user, user).map_err(failed("change the user of"))?;
    process::umask(Mode::from_raw_mode(0o077));
    set_no_new_privs(true).map_err(failed("bar new privileges from"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("make undumpable"))?;
    if thread::capabilities(None).is_ok_and(|sets| !sets.effective.is_empty() || !sets.permitted.is_empty()) {
        return Err(Error::Start("capabilities are left after the change of user".into()));
    }
    sys::landlock_deny_all().map_err(io("restrict by Landlock", "this process"))?;
    sys::seccomp(&mut filter()).map_err(io("filter the system calls of", "this process"))
}

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

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// `CLONE_NEW*`.
const NAMESPACES: u32 = 0x7e02_0080;
/// Thread names and the name of a mapping; nothing else.
const PRCTL_ALLOWED: [u32; 3] = [libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32, libc::PR_SET_VMA as u32];
/// `FIONBIO`, `FIOCLEX`, `PAGEMAP_SCAN`.
const IOCTL_ALLOWED: [u32; 3] = [0x5421, 0x5451, 0xc060_6610];

// linux/bpf_common.h, linux/seccomp.h
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const KILL: u32 = 0x8000_0000;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENT_0: u32 = 16;
const ARGUMENT_1: u32 = 24;

fn filter() -> Vec<libc::sock_filter> {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let give = |value| step(RETURN, 0, 0, value);
    let number = |nr: i64| u32::try_from(nr).unwrap_or(u32::MAX);
    let mut program =
        vec![step(LOAD, 0, 0, ARCH), step(EQUAL, 1, 0, ARCHITECTURE), give(KILL), step(LOAD, 0, 0, NUMBER)];
    for nr in ALLOWED {
        program.extend([step(EQUAL, 0, 1, number(*nr)), give(ALLOW)]);
    }
    // Threads, no namespaces. The C library falls back to `clone`, whose flags can be seen, if there is no `clone3`.
    program.extend([step(EQUAL, 0, 1, number(libc::SYS_clone3)), give(ERRNO | libc::ENOSYS as u32)]);
    program.extend([
        step(EQUAL, 0, 4, number(libc::SYS_clone)),
        step(LOAD, 0, 0, ARGUMENT_0),
        step(ANY_BIT, 1, 0, NAMESPACES),
        give(ALLOW),
        give(ERRNO | libc::EPERM as u32),
    ]);
    for (nr, offset, values) in
        [(libc::SYS_prctl, ARGUMENT_0, &PRCTL_ALLOWED[..]), (libc::SYS_ioctl, ARGUMENT_1, &IOCTL_ALLOWED[..])]
    {
        let length = values.len() as u8 * 2 + 2;
        program.extend([step(EQUAL, 0, length, number(nr)), step(LOAD, 0, 0, offset)]);
        for value in values {
            program.extend([step(EQUAL, 0, 1, *value), give(ALLOW)]);
        }
        program.push(give(ERRNO | libc::EPERM as u32));
    }
    program.push(give(ERRNO | libc::EPERM as u32));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(nr: i64, argument_0: u32, argument_1: u32) -> u32 {
        let program = filter();
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD => {
                    accumulator = match step.k {
                        NUMBER => nr as u32,
                        ARCH => ARCHITECTURE,
                        ARGUMENT_0 => argument_0,
                        ARGUMENT_1 => argument_1,
                        other => panic!("load of {other}"),
                    }
                }
                EQUAL => at += usize::from(if accumulator == step.k { step.jt } else { step.jf }),
                ANY_BIT => at += usize::from(if accumulator & step.k != 0 { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    #[test]
    fn the_filter_allows_work_and_nothing_else() {
        let denied = ERRNO | libc::EPERM as u32;
        for nr in [libc::SYS_read, libc::SYS_accept4, libc::SYS_futex, libc::SYS_getrandom] {
            assert_eq!(verdict(nr, 0, 0), ALLOW, "{nr}");
        }
        for nr in [
            libc::SYS_openat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_bpf,
        ] {
            assert_eq!(verdict(nr, 0, 0), denied, "{nr}");
        }
        assert_eq!(verdict(libc::SYS_clone, libc::CLONE_VM as u32, 0), ALLOW);
        assert_eq!(verdict(libc::SYS_clone, libc::CLONE_NEWUSER as u32, 0), denied);
        assert_eq!(verdict(libc::SYS_clone3, 0, 0), ERRNO | libc::ENOSYS as u32);
        assert_eq!(verdict(libc::SYS_prctl, libc::PR_SET_NAME as u32, 0), ALLOW);
        assert_eq!(verdict(libc::SYS_prctl, libc::PR_SET_DUMPABLE as u32, 0), denied);
        assert_eq!(verdict(libc::SYS_ioctl, 0, 0x5421), ALLOW);
        assert_eq!(verdict(libc::SYS_ioctl, 0, 0x5412), denied);
    }
}
