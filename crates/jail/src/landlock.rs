//! Landlock: no file but those beneath one directory, or none at all.

use crate::{Result, step, sys};
use std::os::fd::BorrowedFd;

/// `LANDLOCK_ACCESS_FS_EXECUTE`, `LANDLOCK_ACCESS_FS_IOCTL_DEV`.
const NEVER: u64 = 1 | 1 << 15;

/// Denies every file system access but beneath `open` (and there execution and devices), every TCP bind and connect, and
/// signals and abstract sockets outside of this domain, as far as the kernel knows how to. Descriptors open already are not
/// touched. Tells the kernel's Landlock ABI, 0 if it has none.
pub fn confine(open: Option<BorrowedFd<'_>>) -> Result<u32> {
    restrict(open, 0b11)
}

/// The same without any directory, for a role that connects: TCP is left alone.
pub fn confine_files() -> Result<u32> {
    restrict(None, 0)
}

/// `network`: the `LANDLOCK_ACCESS_NET_*` that are denied.
fn restrict(open: Option<BorrowedFd<'_>>, network: u64) -> Result<u32> {
    let abi = sys::landlock_abi();
    if abi == 0 {
        return Ok(0);
    }
    let fs_rights = match abi {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let handled = (1u64 << fs_rights) - 1;
    let attribute = sys::Ruleset {
        handled_access_fs: handled,
        handled_access_net: if abi >= 4 { network } else { 0 },
        scoped: if abi >= 6 { 0b11 } else { 0 },
    };
    let size = match abi {
        1..=3 => 8,
        4 | 5 => 16,
        _ => size_of::<sys::Ruleset>(),
    };
    let ruleset = sys::landlock_create(&attribute, size).map_err(step("make Landlock rules"))?;
    if let Some(directory) = open {
        sys::landlock_allow(&ruleset, directory, handled & !NEVER).map_err(step("make a Landlock rule"))?;
    }
    sys::landlock_enter(&ruleset).map_err(step("enter Landlock rules"))?;
    Ok(abi)
}
