//! The system calls that need `unsafe`: sockets of a family that neither `std` nor `rustix` has, the clock and the kernel's
//! random numbers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Listens on a vsock port. An error where the machine has no such device.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the descriptor it returns is owned by nobody else.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `address` is a live `sockaddr_vm` of `size` bytes; the call only reads it.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is passed.
    if unsafe { libc::listen(socket.as_raw_fd(), 4) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// The next connection.
pub fn accept(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let (none, no_size) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null asks for no address; the descriptor it returns is owned by nobody else.
    let fd = unsafe { libc::accept4(socket.as_raw_fd(), none, no_size, libc::SOCK_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `unix` nanoseconds since 1970.
pub fn set_clock(unix: i64) -> io::Result<()> {
    let time = libc::timespec { tv_sec: unix.div_euclid(1_000_000_000), tv_nsec: unix.rem_euclid(1_000_000_000) };
    // SAFETY: `time` is a live `timespec`; the call only reads it.
    match unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Stirs `seed` into the kernel's random numbers, and has it begin anew with it: what it gave out before a snapshot may
/// have been given out again since.
pub fn reseed(seed: &[u8; 32]) -> io::Result<()> {
    #[repr(C)]
    struct Entropy {
        bits: libc::c_int,
        bytes: libc::c_int,
        seed: [u8; 32],
    }
    // <linux/random.h>: RNDADDENTROPY, RNDRESEEDCRNG
    const ADD: libc::c_ulong = 0x4008_5203;
    const AGAIN: libc::c_ulong = 0x5207;
    let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    let entropy = Entropy { bits: 256, bytes: 32, seed: *seed };
    // SAFETY: `entropy` is a live `rand_pool_info` with its 32 bytes; the call only reads it.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), ADD as _, &raw const entropy) };
    // SAFETY: no memory is passed.
    match added == 0 && unsafe { libc::ioctl(device.as_raw_fd(), AGAIN as _) } == 0 {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}
