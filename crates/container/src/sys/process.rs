//! Making processes and preparing one to execute another program.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Proof that this process has one thread, which is what makes a fork safe to go on from in ordinary code.
#[derive(Clone, Copy, Debug)]
pub struct SingleThreaded(());

/// Where a clone came out.
pub enum Cloned {
    Child,
    Parent { pid: u32, pidfd: OwnedFd },
}

impl SingleThreaded {
    /// Counts the threads. Whoever holds the proof must not start another; this crate starts none in the roles that
    /// fork.
    pub fn prove() -> io::Result<Self> {
        let threads = std::fs::read_dir("/proc/self/task")?.count();
        if threads == 1 {
            Ok(Self(()))
        } else {
            Err(io::Error::other(format!("{threads} threads where one was expected")))
        }
    }

    /// `clone3(2)` with a copy of the memory. `flags` are `CLONE_NEW*` and `CLONE_PARENT`; `cgroup` is the directory of
    /// a version 2 control group to be born in.
    pub fn clone(self, flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
        let mut pidfd: RawFd = -1;
        // SAFETY: `clone_args` is a plain structure of integers, for which all zeroes is a valid value.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = flags | libc::CLONE_PIDFD as u64;
        args.pidfd = &raw mut pidfd as u64;
        if flags & libc::CLONE_PARENT as u64 == 0 {
            args.exit_signal = libc::SIGCHLD as u64;
        }
        if let Some(cgroup) = cgroup {
            const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: no `CLONE_VM` is ever among the flags (callers are in this crate and pass namespaces only), so the
        // child has its own copy of the memory and of the stack; `self` proves that there is no other thread whose
        // locks could be held in that copy. `args` and `pidfd` live across the call.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(Cloned::Child),
            // SAFETY: the kernel has just stored a new descriptor there that nobody else owns.
            pid => Ok(Cloned::Parent { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
        }
    }
}

/// Leaves at once: no destructors, no exit handlers, nothing flushed that belongs to the parent.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` takes any value and does not return.
    unsafe { libc::_exit(code) }
}

/// A mount namespace of this process's own, with its working and root directories in it.
pub fn unshare_mounts() -> io::Result<()> {
    // SAFETY: `CLONE_NEWNS` changes no memory and no descriptor table.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub fn set_host_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length are of the same live string.
    if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Brings `lo` up in the network namespace of this process.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`; `request` is one and lives across the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// All signals as a new program expects them: default action, none blocked.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL runs no code of ours. Numbers that cannot be changed are refused by the kernel, harmlessly.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// Waits until a child has ended since the last call. Blocks the signal for good.
pub fn wait_for_child_signal() {
    // SAFETY: the set is initialised by sigemptyset before it is read; a null pointer means that no details are wanted.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        libc::sigwaitinfo(&raw const set, ptr::null_mut());
    }
}

/// Any signal by number, real-time ones too.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = ptr::null::<libc::siginfo_t>();
    // SAFETY: an open descriptor, integers and a null pointer, which means: as kill(2) would.
    if unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes `fd` also number `onto` (0, 1 or 2), open across an exec.
pub fn dup_onto(fd: BorrowedFd<'_>, onto: RawFd) -> io::Result<()> {
    // SAFETY: `onto` is a standard stream, which no `OwnedFd` of this crate stands for in the roles that call this.
    let done = unsafe {
        if fd.as_raw_fd() == onto { libc::fcntl(onto, libc::F_SETFD, 0) } else { libc::dup2(fd.as_raw_fd(), onto) }
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets `fd` live on when the next program is executed.
pub fn inherit_fd(fd: RawFd) -> io::Result<()> {
    // SAFETY: integers only; a descriptor that is not open is an error.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Blocks `signals` and has them come on a descriptor instead.
pub fn signals_as_descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is read; the kernel returns a new descriptor or an error.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Closes every descriptor from 3 on that is not in `keep`. The caller forgets all others: they are the parent's.
pub fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut from: u32 = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        let fd = fd as u32;
        if fd > from {
            close_range(from, fd - 1, 0)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX, 0)
}

/// Marks every descriptor from `first` on to be closed when the next program is executed.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: integers only. Closing is called in freshly cloned children alone, which never drop the parent's owners.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns only with the error.
pub fn execve(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and their strings live across the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}
