//! The system calls that need `unsafe`: namespaces, Landlock, seccomp, id-mapped mounts.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::io;

/// Leaves the namespaces of the caller. The process has one thread.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: what is unsafe about it is unsharing the descriptor table under other owners of descriptors; callers here
    // unshare namespaces only, before any thread is started.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Closes every descriptor from `first` on. For a role at its very beginning: nothing in it owns a descriptor yet.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called before anything in this process has opened a descriptor, so no owner of one is left behind; standard
    // input, output and error are not touched.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0u32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Maps the owners in a mount that nobody else uses by a user namespace: what id 3 of the namespace writes there belongs
/// to id 3 on the disk (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
pub fn map_owners(mount: BorrowedFd<'_>, user_namespace: impl AsFd) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_fd().as_raw_fd() as u64,
    };
    // SAFETY: the path is a static C string, `attr` lives across the call and its size is passed with it; the kernel only
    // reads both. Both descriptors are borrowed, so they are open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// linux/landlock.h, `struct landlock_ruleset_attr` as of ABI 6.
#[repr(C)]
pub(crate) struct Ruleset {
    pub handled_access_fs: u64,
    pub handled_access_net: u64,
    pub scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

/// The kernel's Landlock ABI, 0 if it has none.
pub(crate) fn landlock_abi() -> u32 {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag and no attribute the call only answers a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION_FLAG) };
    u32::try_from(abi).unwrap_or(0)
}

/// `size`: how much of the structure this kernel knows.
pub(crate) fn landlock_create(attribute: &Ruleset, size: usize) -> io::Result<OwnedFd> {
    let size = size.min(size_of::<Ruleset>());
    // SAFETY: the attribute outlives the call and has at least `size` bytes.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::from_ref(attribute), size, 0u32) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned it; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

pub(crate) fn landlock_allow(ruleset: &OwnedFd, beneath: BorrowedFd<'_>, access: u64) -> io::Result<()> {
    const PATH_BENEATH: u32 = 1;
    let rule = PathBeneath { allowed_access: access, parent_fd: beneath.as_raw_fd() };
    // SAFETY: the rule outlives the call; both descriptors are borrowed, so they are open.
    let done =
        unsafe { libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), PATH_BENEATH, &raw const rule, 0u32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(crate) fn landlock_enter(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: an open descriptor and a zero.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Installs a seccomp filter on the calling thread and those it starts. `no_new_privs` must be set.
pub(crate) fn seccomp(program: &mut [libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    const SECCOMP_SET_MODE_FILTER: u32 = 1;
    // SAFETY: the kernel copies the program, which outlives the call and has `length` instructions.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0u32, &raw const filter) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
