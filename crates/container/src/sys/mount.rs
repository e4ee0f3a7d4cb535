//! `mount_setattr(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `MOUNT_ATTR_*` bits to set and clear, a propagation (`MS_SHARED`, ...; 0 leaves it) and the user namespace to map
/// ids by.
#[derive(Clone, Copy, Default)]
pub struct MountAttr<'a> {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub id_map: Option<BorrowedFd<'a>>,
}

/// Changes the mount that `fd` is the root of, and with `recursive` those below it.
pub fn mount_setattr(fd: BorrowedFd<'_>, recursive: bool, attr: &MountAttr<'_>) -> io::Result<()> {
    let mut set = attr.set;
    if attr.id_map.is_some() {
        set |= libc::MOUNT_ATTR_IDMAP;
    }
    let raw = libc::mount_attr {
        attr_set: set,
        attr_clr: attr.clear,
        propagation: attr.propagation,
        userns_fd: attr.id_map.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, `raw` lives across the call and its size is passed with it; the kernel
    // only reads both. The file descriptors are borrowed, so they are open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const raw,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
