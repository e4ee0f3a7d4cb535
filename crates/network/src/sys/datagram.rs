//! Datagrams with the local address that they were sent to, or are to come from (ip(7) `IP_PKTINFO`, ipv6(7)).

use rustix::fd::{AsRawFd, BorrowedFd};
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Room for one control message, aligned as the kernel's header is.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Asks that datagrams received by a socket of this family tell their local address.
pub fn tell_local_address(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    match v6 {
        true => super::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        false => super::set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
    }
}

/// One datagram: its length, who sent it, and to which address of this machine where the socket was asked to tell.
pub fn receive_from(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
    let mut name = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut control = Control([0; 64]);
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `msghdr` is plain old data, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: every pointer of `message` is to a local above, or to `buffer`, with its length; all outlive the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: zeroed, so initialised whatever the kernel has written of it.
    let from = address_of(&unsafe { name.assume_init() }).ok_or(io::ErrorKind::InvalidData)?;
    let mut local = None;
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR stay within `msg_controllen` bytes of `control`, which the kernel has set to
    // what it wrote; a header that they answer is followed by the data that its length says, read unaligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    local = Some(IpAddr::V4(u32::from_be(info.ipi_spec_dst.s_addr).into()));
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    local = Some(IpAddr::V6(info.ipi6_addr.s6_addr.into()));
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((length, from, local))
}

/// Sends one datagram, from this address of the machine; `None`: the socket's own.
pub fn send_from(fd: BorrowedFd<'_>, data: &[u8], to: SocketAddr, from: Option<IpAddr>) -> io::Result<usize> {
    let (mut name, length) = raw_address(to);
    let mut control = Control([0; 64]);
    let mut piece = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: `msghdr` is plain old data, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = length;
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if let Some(from) = from {
        message.msg_control = control.0.as_mut_ptr().cast();
        match from {
            IpAddr::V4(address) => {
                // SAFETY: plain old data.
                let mut info: libc::in_pktinfo = unsafe { zeroed() };
                info.ipi_spec_dst.s_addr = address.to_bits().to_be();
                attach(&mut message, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            IpAddr::V6(address) => {
                // SAFETY: plain old data.
                let mut info: libc::in6_pktinfo = unsafe { zeroed() };
                info.ipi6_addr.s6_addr = address.octets();
                attach(&mut message, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
        }
    }
    // SAFETY: every pointer of `message` is to a local above, or to `data`, which the kernel only reads; all outlive the call.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Lets a socket hear only what a classic BPF program lets through.
pub fn filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let all = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `all` describes `program`, which outlives the call; the kernel only reads both, and checks the program.
    let result = unsafe {
        let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const all).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes the one control message; `msg_control` is a whole [`Control`].
fn attach<T>(message: &mut libc::msghdr, level: libc::c_int, kind: libc::c_int, value: T) {
    const { assert!(size_of::<T>() <= 32) };
    // SAFETY: `Control` has 64 aligned bytes: a header of 16 and at most 32 of data, written unaligned.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(size_of::<T>() as u32) as usize;
        let header = message.msg_control.cast::<libc::cmsghdr>();
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<T>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
    }
}

fn address_of(raw: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(raw.ss_family) {
        libc::AF_INET => {
            // SAFETY: `sockaddr_storage` is at least as large and as aligned as `sockaddr_in`; all of it is initialised.
            let own = unsafe { (&raw const *raw).cast::<libc::sockaddr_in>().read() };
            let address = Ipv4Addr::from_bits(u32::from_be(own.sin_addr.s_addr));
            Some(SocketAddr::from((address, u16::from_be(own.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: the same, for `sockaddr_in6`.
            let own = unsafe { (&raw const *raw).cast::<libc::sockaddr_in6>().read() };
            let address = Ipv6Addr::from(own.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(address, u16::from_be(own.sin6_port), 0, own.sin6_scope_id).into())
        }
        _ => None,
    }
}

fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: `sockaddr_storage` is plain old data, for which all zeroes is a value.
    let mut raw: libc::sockaddr_storage = unsafe { zeroed() };
    let length = match address {
        SocketAddr::V4(address) => {
            // SAFETY: plain old data.
            let mut own: libc::sockaddr_in = unsafe { zeroed() };
            own.sin_family = libc::AF_INET as libc::sa_family_t;
            own.sin_port = address.port().to_be();
            own.sin_addr.s_addr = address.ip().to_bits().to_be();
            // SAFETY: `sockaddr_storage` is at least as large and as aligned as `sockaddr_in`.
            unsafe { (&raw mut raw).cast::<libc::sockaddr_in>().write(own) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            // SAFETY: plain old data.
            let mut own: libc::sockaddr_in6 = unsafe { zeroed() };
            own.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            own.sin6_port = address.port().to_be();
            own.sin6_addr.s6_addr = address.ip().octets();
            own.sin6_scope_id = address.scope_id();
            // SAFETY: `sockaddr_storage` is at least as large and as aligned as `sockaddr_in6`.
            unsafe { (&raw mut raw).cast::<libc::sockaddr_in6>().write(own) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (raw, length as libc::socklen_t)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn answers_come_from_where_questions_went() {
        for (any, second) in [("0.0.0.0:0", "127.0.0.9"), ("[::]:0", "::1")] {
            // A kernel without IPv6 has nothing to show of the second.
            let Ok(server) = UdpSocket::bind(any) else { continue };
            let to: SocketAddr = (second.parse::<IpAddr>().unwrap(), server.local_addr().unwrap().port()).into();
            tell_local_address(server.as_fd(), to.is_ipv6()).unwrap();
            let Ok(client) = UdpSocket::bind((if to.is_ipv6() { "::1" } else { "127.0.0.1" }, 0)) else { continue };
            client.send_to(b"question", to).unwrap();
            let mut buffer = [0; 64];
            let (length, from, local) = receive_from(server.as_fd(), &mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"question"[..], client.local_addr().unwrap()));
            assert_eq!(local, Some(to.ip()));
            send_from(server.as_fd(), b"answer", from, local).unwrap();
            let (length, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"answer"[..], to));
        }
    }
}
