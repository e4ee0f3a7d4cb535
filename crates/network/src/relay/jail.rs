//! What the role gives up before it reads a workload's first byte.

use crate::error::{Error, Result};
use crate::sys::jail as sys;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount};
use rustix::process::{DumpableBehavior, Resource, Rlimit, chdir, getrlimit, pivot_root, setrlimit};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::{fs, process, thread};
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

/// Becomes an unprivileged user with an empty root, for good. The process has one thread.
pub fn enter(mount_point: &Path, uid: u32) -> Result<()> {
    let failed = |operation: &'static str| move |e: rustix::io::Errno| Error::errno(operation)(e);
    // rustix reads the auxiliary vector at its first need, which the filter would deny.
    let _ = rustix::param::page_size();
    sys::unshare().map_err(Error::system("leave the host's namespaces"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("make the mounts private"))?;
    let options = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", mount_point, "tmpfs", options, c"size=4k,nr_inodes=4,mode=0555").map_err(failed("mount a root"))?;
    chdir(mount_point).map_err(failed("enter the root"))?;
    // pivot_root(2): with both the same directory, the old root ends up on top of the new one and is let go.
    pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    mount_remount("/", options | MountFlags::RDONLY, c"").map_err(failed("make the root read-only"))?;
    chdir("/").map_err(failed("enter the root"))?;
    let limit = |what: Resource, wanted: Option<u64>| {
        let hard = getrlimit(what).maximum;
        let value = wanted.map_or(hard, |wanted| Some(hard.map_or(wanted, |hard| hard.min(wanted))));
        setrlimit(what, Rlimit { current: value, maximum: value }).map_err(failed("set limits"))
    };
    limit(Resource::Core, Some(0))?;
    limit(Resource::Nofile, None)?;
    limit(Resource::Nproc, Some(1))?;
    let (user, group) = (fs::Uid::from_raw(uid), fs::Gid::from_raw(uid));
    set_thread_groups(&[]).map_err(failed("drop the groups"))?;
    set_thread_res_gid(group, group, group).map_err(failed("change the group"))?;
    set_thread_res_uid(user, user, user).map_err(failed("change the user"))?;
    set_no_new_privs(true).map_err(failed("bar new privileges"))?;
    process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("make undumpable"))?;
    if thread::capabilities(None).is_ok_and(|sets| !sets.effective.is_empty() || !sets.permitted.is_empty()) {
        return Err(Error::Protocol("capabilities are left after the change of user"));
    }
    sys::landlock_files().map_err(Error::system("restrict by Landlock"))?;
    sys::seccomp(ALLOWED, &[libc::AF_INET, libc::AF_INET6]).map_err(Error::system("filter system calls"))
}
