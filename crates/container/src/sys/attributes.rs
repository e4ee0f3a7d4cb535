//! What a process is besides its ids: scheduling, input and output priority, personality, session keyring.

use std::ffi::CStr;
use std::io;

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct sched_attr` of sched_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

pub fn set_scheduler(mut attr: SchedAttr) -> io::Result<()> {
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: `attr` lives across the call and tells its own size; the kernel only reads it.
    done(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
}

/// Of this process. `class` as in ioprio_set(2): 1 real time, 2 best effort, 3 idle.
pub fn set_io_priority(class: u32, priority: u32) -> io::Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: integers only.
    done(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, (class << 13) | priority) })
}

pub fn set_personality(persona: u32) -> io::Result<()> {
    // SAFETY: an integer.
    done(libc::c_long::from(unsafe { libc::personality(libc::c_ulong::from(persona)) }))
}

pub fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length are of the same live string.
    done(libc::c_long::from(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }))
}

/// A new session keyring in place of the one inherited: of this name, or of none that another process could find it by.
pub fn join_session_keyring(name: Option<&CStr>) -> io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name = name.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: the name is null, which means none, or a C string that lives across the call.
    done(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name) })
}

/// Moves this process to a new time namespace for those cloned from now on.
pub fn unshare_time() -> io::Result<()> {
    // SAFETY: changes no memory and no descriptor table.
    done(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_NEWTIME) }))
}

/// A cgroup namespace whose root is the group that this process is in.
pub fn unshare_cgroup() -> io::Result<()> {
    // SAFETY: changes no memory and no descriptor table.
    done(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }))
}

/// The processors this process may run on; those past the kernel's own count are ignored by it.
pub fn set_affinity(processors: &[usize]) -> io::Result<()> {
    // SAFETY: `cpu_set_t` is plain data, for which all zeroes is a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &processor in processors.iter().filter(|p| **p < libc::CPU_SETSIZE as usize) {
        // SAFETY: the number has just been checked against the size of the set.
        unsafe { libc::CPU_SET(processor, &mut set) };
    }
    // SAFETY: the set lives across the call and its size is passed with it.
    done(libc::c_long::from(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) }))
}
