//! The system calls that need `unsafe`: guest memory, fork, taps, namespaces, changing user.

use crate::machine::{Error, Link, Result};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// One anonymous page shared with a measuring guest.
pub struct GuestPage {
    at: *mut libc::c_void,
}

const PAGE: usize = 4096;

impl GuestPage {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a fresh anonymous mapping; nothing else knows its address.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(GuestPage { at }) }
    }
    pub fn len(&self) -> usize {
        PAGE
    }
    pub fn address(&self) -> u64 {
        self.at as u64
    }
    pub fn write(&self, code: &[u8]) {
        assert!(code.len() <= PAGE);
        // SAFETY: the mapping is PAGE bytes, checked above, and no vCPU runs: the caller owns it and is here.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.at.cast(), code.len()) }
    }
    pub fn give_to(
        &self,
        vm: &kvm_ioctls::VmFd,
        region: kvm_bindings::kvm_userspace_memory_region,
    ) -> std::result::Result<(), kvm_ioctls::Error> {
        // SAFETY: the region is this mapping, which outlives the VM: both are dropped at the end of the probe, VM last
        // used before that.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl Drop for GuestPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, unmapped once.
        unsafe { libc::munmap(self.at, PAGE) };
    }
}

/// Two instructions a turn: what the measuring guest does, here.
pub fn count_down(turns: u32) {
    // SAFETY: a loop over one register, which is said to change; it touches neither memory nor stack. One turn at least.
    unsafe {
        std::arch::asm!(
            "2:",
            "dec {turns:e}",
            "jnz 2b",
            turns = inout(reg) turns.max(1) => _,
            options(nomem, nostack)
        );
    }
}

pub enum Fork {
    Parent { child: i32 },
    Child,
}

/// Forks. Only for the `vmm` role while it has one thread.
pub fn fork() -> io::Result<Fork> {
    debug_assert_eq!(std::fs::read_dir("/proc/self/task").map(|d| d.count()).unwrap_or(1), 1);
    // SAFETY: the process has one thread here (the role's main has started none yet), so the child may run any code.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        child => Ok(Fork::Parent { child }),
    }
}

/// Waits for a child; `(exit code, signal)`.
pub fn wait(pid: i32) -> io::Result<(i32, Option<i32>)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        if unsafe { libc::waitpid(pid, &mut status, 0) } >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        return Ok((128 + signal, Some(signal)));
    }
    Ok((libc::WEXITSTATUS(status), None))
}

/// Becomes this user and group for good: no supplementary groups, no capabilities, no way to gain any.
pub fn become_user(uid: u32) -> io::Result<()> {
    let check = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: plain calls on this process, which has one thread; no memory is passed but an empty list.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(uid, uid, uid))?;
        check(libc::setresuid(uid, uid, uid))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
}

/// Dies with the monitor. Call after `become_user`: a change of user clears it.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: sets a flag of this process.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `unshare(2)` with CLONE_* flags.
pub fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: changes only which namespaces this single-threaded process is in.
    if unsafe { libc::unshare(flags) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub fn setns(fd: &OwnedFd, kind: i32) -> io::Result<()> {
    // SAFETY: `fd` is open for the length of the call.
    if unsafe { libc::setns(fd.as_raw_fd(), kind) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts each descriptor at its number, inherited over exec. Numbers must be above every descriptor not in the list.
pub fn place(descriptors: Vec<(i32, OwnedFd)>) -> io::Result<()> {
    let base = 200;
    let mut parked = Vec::new();
    for (number, fd) in descriptors {
        // SAFETY: duplicates an open descriptor to a free number; the result is owned below.
        let high = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, base) };
        if high < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `high` was made just now and belongs to nobody else.
        parked.push((number, unsafe { OwnedFd::from_raw_fd(high) }));
    }
    for (number, fd) in &parked {
        // SAFETY: the target number is one the plan reserves; whatever was open there is meant to be replaced.
        if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Closes every descriptor from `first` on when the process executes another program.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: only sets flags.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens the machine's tap, from a thread that enters its namespace.
pub fn open_tap(link: &Link) -> Result<OwnedFd> {
    let link = link.clone();
    let name = link.tap.clone();
    std::thread::spawn(move || -> io::Result<OwnedFd> {
        if let Some(path) = &link.netns {
            let netns = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            setns(&netns, libc::CLONE_NEWNET)?;
        }
        attach_tap(&link.tap)
    })
    .join()
    .map_err(|_| Error::Monitor("the thread that opens the tap died".into()))?
    .map_err(Error::io("open tap", name))
}

fn attach_tap(name: &str) -> io::Result<OwnedFd> {
    let tun = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}
