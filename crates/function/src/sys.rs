//! The calls that need `unsafe`: a peer's user id, a socket to wait for, executable mappings, compiled code.

use rustix::fd::{AsFd, AsRawFd};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

/// A socket that a task can wait for to be readable. In a runtime's context.
pub(crate) fn pollable(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` gives the same open descriptor for as long as it lives, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
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
