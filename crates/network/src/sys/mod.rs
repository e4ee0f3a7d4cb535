//! The system calls that have no safe wrapper. All `unsafe` of this crate is here.
#![allow(unsafe_code)]

pub mod bpf;
pub mod datagram;

use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::io;

/// Moves the calling thread into a new, empty network namespace.
pub fn unshare_net() -> io::Result<()> {
    // SAFETY: unsharing the network namespace changes neither memory nor the file descriptor table of this process; it
    // touches only the calling thread's view of the network.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.map_err(Into::into)
}

/// Short answers (no echo of the request) that carry the kernel's explanation.
pub fn netlink_options(fd: BorrowedFd<'_>) -> io::Result<()> {
    for option in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
        let on: libc::c_int = 1;
        // SAFETY: the pointer and length describe `on`, which outlives the call; the kernel only reads it.
        let result = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A socket option that is one number.
pub fn set_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, which outlives the call; the kernel only reads it.
    let result = unsafe {
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets a socket have an address that is not this machine's, and marks what it sends.
pub fn speak_for_others(fd: BorrowedFd<'_>, v6: bool, mark: u32) -> io::Result<()> {
    match v6 {
        true => set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT, 1)?,
        false => set_option(fd, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1)?,
    }
    // The port is chosen when the socket is connected, so that only pairs of addresses run out.
    if rustix::net::sockopt::socket_type(fd)? != rustix::net::SocketType::RAW {
        set_option(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    }
    set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// Binds an open `/dev/net/tun` to the tap device `name` of the thread's network namespace, making it if absent.
/// Frames carry a virtio-net header and no packet information.
pub fn tap_bind(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    device_bind(fd, name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
}

/// The same for a device that carries IP packets and nothing around them.
pub fn tun_bind(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    device_bind(fd, name, libc::IFF_TUN | libc::IFF_NO_PI)
}

fn device_bind(fd: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> io::Result<()> {
    if name.len() >= libc::IFNAMSIZ || name.is_empty() || name.contains(['\0', '/']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `ifreq` is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is and which outlives the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The clock that the kernel's programs read.
pub fn monotonic_time() -> std::time::Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`, which `now` is and which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    std::time::Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Keeps a bound tap device when its last descriptor is closed.
pub fn tap_persist(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes an integer argument, no pointer.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST as _, 1 as libc::c_ulong) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket that is handed every frame of one link of the thread's network namespace, in both directions.
pub fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Protocol 0: nothing is received before the link is chosen.
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    // SAFETY: `sockaddr_ll` is plain old data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = i32::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the pointer and length describe `address`, which outlives the call; the kernel only reads it.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// `/dev/net/tun`, not yet bound.
pub fn tap_open() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}
