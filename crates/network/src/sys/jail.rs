//! What a role gives up: namespaces, files, all system calls but those that it names.

use rustix::thread::UnshareFlags;
use std::io;

/// Leaves the mount, IPC and UTS namespaces of the caller. The process has one thread.
pub fn unshare() -> io::Result<()> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: what is unsafe about it is unsharing the descriptor table under other owners of descriptors; only
    // namespaces are unshared here.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// linux/landlock.h, `struct landlock_ruleset_attr` as of ABI 6.
#[repr(C)]
struct RulesetAttribute {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// Denies every file system access, and signals and abstract sockets outside of this domain, as far as the kernel knows
/// how to. Connections are left alone.
pub fn landlock_files() -> io::Result<()> {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag and no attribute the call only answers a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION_FLAG) };
    if abi < 1 {
        return Ok(());
    }
    let rights = match abi {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let attribute = RulesetAttribute {
        handled_access_fs: (1u64 << rights) - 1,
        handled_access_net: 0,
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
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const DENY: u32 = 0x0005_0000 | libc::EPERM as u32;
const KILL: u32 = 0x8000_0000;

/// Allows these system calls, and sockets of these address families, for good; the rest is answered with `EPERM`.
/// `no_new_privs` must be set.
pub fn seccomp(allowed: &[i64], families: &[i32]) -> io::Result<()> {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = |nr: i64| u32::try_from(nr).unwrap_or(u32::MAX);
    // `struct seccomp_data`: the number is at 0, the architecture at 4, the first argument at 16.
    let mut program =
        vec![step(LOAD, 0, 0, 4), step(EQUAL, 1, 0, ARCHITECTURE), step(RETURN, 0, 0, KILL), step(LOAD, 0, 0, 0)];
    for nr in allowed {
        program.extend([step(EQUAL, 0, 1, number(*nr)), step(RETURN, 0, 0, ALLOW)]);
    }
    let length = u8::try_from(families.len() * 2 + 2).map_err(|_| io::ErrorKind::InvalidInput)?;
    program.extend([step(EQUAL, 0, length, number(libc::SYS_socket)), step(LOAD, 0, 0, 16)]);
    for family in families {
        program.extend([step(EQUAL, 0, 1, *family as u32), step(RETURN, 0, 0, ALLOW)]);
    }
    program.push(step(RETURN, 0, 0, DENY));
    program.push(step(RETURN, 0, 0, DENY));
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    const SECCOMP_SET_MODE_FILTER: u32 = 1;
    // SAFETY: the kernel copies the program, which outlives the call and has `length` instructions.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0u32, &raw const filter) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
