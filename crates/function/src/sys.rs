//! The system calls that need `unsafe`: namespaces, Landlock, seccomp, executable mappings.

use rustix::fd::{AsFd, AsRawFd};
use std::io;
use std::ptr::NonNull;

/// Leaves the namespaces of the caller. The process has one thread.
pub(crate) fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: what is unsafe about it is unsharing the descriptor table under other owners of descriptors; callers here
    // unshare namespaces only, before any thread is started.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// linux/landlock.h, `struct landlock_ruleset_attr` as of ABI 6.
#[repr(C)]
struct RulesetAttribute {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// Denies every file system access, every TCP bind and connect, and signals and abstract sockets outside of this domain,
/// as far as the kernel knows how to. No rule allows anything: descriptors open already are all there is. Returns the
/// kernel's Landlock ABI, 0 if it has none.
pub(crate) fn landlock_deny_all() -> io::Result<u32> {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag and no attribute the call only answers a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION_FLAG) };
    if abi < 1 {
        return Ok(0);
    }
    let fs_rights = match abi {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let attribute = RulesetAttribute {
        handled_access_fs: (1u64 << fs_rights) - 1,
        handled_access_net: if abi >= 4 { 0b11 } else { 0 },
        scoped: if abi >= 6 { 0b11 } else { 0 },
    };
    let size = match abi {
        1..=3 => 8,
        4 | 5 => 16,
        _ => size_of::<RulesetAttribute>(),
    };
    // SAFETY: the attribute outlives the call and has at least `size` bytes.
    let ruleset = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attribute, size, 0u32) };
    if ruleset < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `ruleset` was opened just now; it is closed after its one use and known to no one else.
    let result = unsafe {
        let result = libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0u32);
        libc::close(ruleset as i32);
        result
    };
    if result == 0 { Ok(abi as u32) } else { Err(io::Error::last_os_error()) }
}

/// User id of the other end of a Unix socket. (rustix's reading of the same needs a process id, and there is none for a
/// process of another PID namespace.)
pub(crate) fn peer_uid(socket: impl AsFd) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes into `peer`; both outlive the call.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut length) };
    if result == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
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

/// Maps a file read-only and private, for as long as the process lives: wasmtime's code registry may refer to machine code
/// at any time, so it is never unmapped. Hosts map each code once.
pub(crate) fn map_for_ever(file: impl AsFd, length: usize) -> io::Result<NonNull<[u8]>> {
    // SAFETY: a new mapping chosen by the kernel; the file is open for the call and the mapping does not need it after.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_fd().as_raw_fd(), 0)
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = NonNull::new(at.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    Ok(NonNull::slice_from_raw_parts(start, length))
}

/// Makes part of a code mapping executable; never writable.
pub(crate) fn make_executable(at: *const u8, length: usize) -> io::Result<()> {
    // SAFETY: wasmtime calls this with the text section of a mapping made by `map_for_ever` (page-aligned, checked by the
    // kernel); it was readable and private before and nobody has it writable.
    let result = unsafe { libc::mprotect(at.cast_mut().cast(), length, libc::PROT_READ | libc::PROT_EXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Turns compiled code into a component.
///
/// The bytes have to be the compile role's output. The daemon guarantees that: it kept them in a directory only root can
/// write, and checked their digest before it passed the descriptor.
pub(crate) fn component(
    engine: &wasmtime::Engine,
    code: NonNull<[u8]>,
) -> wasmtime::Result<wasmtime::component::Component> {
    // SAFETY: see above; and the mapping lives as long as the process and is private.
    unsafe { wasmtime::component::Component::deserialize_raw(engine, code) }
}
