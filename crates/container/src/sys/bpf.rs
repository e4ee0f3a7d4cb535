//! `bpf(2)`, for the one use of it: which devices a version 2 control group may use.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpfInstruction {
    pub code: u8,
    /// Destination in the low four bits, source in the high ones.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

/// The members of `union bpf_attr` for `BPF_PROG_LOAD` that are used, up to `prog_flags`.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    // SAFETY: every `T` here is a prefix of `union bpf_attr`, lives across the call and its size is passed with it;
    // the pointers in it are of vectors and strings that the callers below hold until they return.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: called with what PROG_LOAD and PROG_GET_FD_BY_ID have just returned: a new descriptor that nobody owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A program that decides about devices, of no group yet. The kernel takes a millisecond to check it.
pub fn load_device_program(program: &[BpfInstruction]) -> io::Result<OwnedFd> {
    let mut load = Load {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    bpf(PROG_LOAD, &mut load).map(owned)
}

/// Makes `program` the one that decides about devices in the group `cgroup` is the directory of; those that decided
/// before go.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let target_fd = cgroup.as_raw_fd() as u32;
    let mut ids = [0u32; 64];
    let mut query = Query {
        target_fd,
        attach_type: CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: ids.len() as u32,
        ..Default::default()
    };
    bpf(PROG_QUERY, &mut query)?;
    let mut attach = Attach {
        target_fd,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &mut attach)?;
    // All programs have to agree, so the new one holds from here on; the old ones may only go now.
    for &id in ids.iter().take(query.prog_cnt as usize) {
        let old = owned(bpf(PROG_GET_FD_BY_ID, &mut ById { id, ..Default::default() })?);
        let fd = old.as_raw_fd() as u32;
        bpf(PROG_DETACH, &mut Attach { target_fd, attach_bpf_fd: fd, attach_type: CGROUP_DEVICE, attach_flags: 0 })?;
    }
    Ok(())
}
