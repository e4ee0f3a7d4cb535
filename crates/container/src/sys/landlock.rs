//! Landlock's scopes: what comes from a process that has put itself under one reaches no abstract Unix socket, which no
//! file permission guards, and signals no process but those that came from it too.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

const ABSTRACT_UNIX_SOCKETS: u64 = 1;
const SIGNALS: u64 = 1 << 1;

/// Keeps abstract sockets of others out of reach.
pub fn scope_abstract_sockets() -> io::Result<()> {
    scope(ABSTRACT_UNIX_SOCKETS)
}

/// The same for signals too.
pub fn scope_all() -> io::Result<()> {
    scope(ABSTRACT_UNIX_SOCKETS | SIGNALS)
}

/// Needs Linux 6.12 (ABI 6) and no_new_privs or CAP_SYS_ADMIN.
fn scope(scoped: u64) -> io::Result<()> {
    let attr = RulesetAttr { handled_access_fs: 0, handled_access_net: 0, scoped };
    // SAFETY: `attr` lives across the call, its size is passed with it.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned it; nobody else owns it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // SAFETY: an open descriptor and a zero.
    if unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The first ABI that has scopes.
pub const LANDLOCK_SCOPES: u32 = 6;

/// The Landlock ABI this kernel speaks; `None` where it is absent or turned off.
pub fn landlock_abi() -> Option<u32> {
    const VERSION: u32 = 1;
    // SAFETY: with the version flag the kernel takes no attributes and makes no descriptor; it answers a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<RulesetAttr>(), 0, VERSION) };
    u32::try_from(abi).ok().filter(|abi| *abi > 0)
}
