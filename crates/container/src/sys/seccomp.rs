//! `seccomp(2)`: loading a classic BPF program.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// One instruction of classic BPF: code, jump if true, jump if false, constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

const NEW_LISTENER: u64 = 1 << 3;

/// Puts this thread and all that come from it under `program`. Needs no_new_privs, or CAP_SYS_ADMIN in the user
/// namespace. The kernel checks the program itself. `flags` are `SECCOMP_FILTER_FLAG_*`.
pub fn load_filter(program: &[Instruction], flags: u64) -> io::Result<()> {
    load(program, flags & !NEW_LISTENER).map(|_| ())
}

/// The same; system calls that the program hands on are told on the descriptor.
pub fn load_filter_with_listener(program: &[Instruction], flags: u64) -> io::Result<OwnedFd> {
    let fd = load(program, flags | NEW_LISTENER)?;
    // SAFETY: with this flag the kernel returns a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn load(program: &[Instruction], flags: u64) -> io::Result<i32> {
    let mut filter: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let prog = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    // SAFETY: `prog` points at `length` instructions that live across the call; the kernel copies them.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const prog) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}
