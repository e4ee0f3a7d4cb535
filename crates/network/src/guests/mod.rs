//! Addresses for machines that ask: DHCP, DHCPv6 and router advertisements, answered by the router alone, from one thread
//! in its namespace. There are no leases to remember: a link has one address of each family for life, and its name says
//! which. A machine whose image brings its configuration never asks.
//!
//! nftables lets questions in from taps only, and only with the tap's own MAC; each is answered to the machine that has
//! the address, so a lie harms nobody else.

pub mod dhcp4;
pub mod dhcp6;

use crate::attach::{ROUTER_MAC, address_of_tap};
use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::netlink::{Socket, route};
use crate::router::Router;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, sockopt};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ROUTER_SOLICITATION: u8 = 133;
/// Seconds between advertisements that nobody asked for; the next hop that they name holds for 18 hours.
const ADVERTISE_EVERY: i64 = 1800;
const MAX_PACKET: usize = 1500;

/// Answers until it is dropped.
pub struct GuestServer {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

struct Sockets {
    dhcp4: UdpSocket,
    /// Where the kernel has IPv6.
    v6: Option<(UdpSocket, OwnedFd)>,
    route: Socket,
    config: RouterConfig,
}

impl GuestServer {
    pub fn start(router: &Router) -> Result<GuestServer> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(Error::errno("make an event descriptor"))?);
        let (config, ipv6, its) = (router.config().clone(), router.ipv6, stop.clone());
        let thread = router.run(move || {
            let sockets = Sockets::open(config, ipv6)?;
            let thread = std::thread::Builder::new().name("atoll-dhcp".into());
            thread.spawn(move || serve(sockets, &its)).map_err(Error::system("start the DHCP thread"))
        })??;
        Ok(GuestServer { stop, thread: Some(thread) })
    }
}

impl Drop for GuestServer {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn udp(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).map_err(Error::system("bind the DHCP server's socket"))?;
    socket.set_nonblocking(true).map_err(Error::system("prepare the DHCP server's socket"))?;
    Ok(socket)
}

impl Sockets {
    /// In the router's namespace.
    fn open(config: RouterConfig, ipv6: bool) -> Result<Sockets> {
        let raw = || -> rustix::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = rustix::net::socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6))?;
            // Neighbour discovery is believed with this hop limit only.
            sockopt::set_ipv6_multicast_hops(&fd, 255)?;
            sockopt::set_ipv6_unicast_hops(&fd, Some(255))?;
            Ok(fd)
        };
        let v6 = if ipv6 {
            let icmp = raw().map_err(Error::errno("open the router advertisements' socket"))?;
            Some((udp((Ipv6Addr::UNSPECIFIED, 547).into())?, icmp))
        } else {
            None
        };
        Ok(Sockets { dhcp4: udp((Ipv4Addr::UNSPECIFIED, 67).into())?, v6, route: Socket::route()?, config })
    }

    /// The IPv6 address of the machine at a tap.
    fn machine(&mut self, link: u32) -> Option<Ipv6Addr> {
        let name = route::link_name(&mut self.route, link).ok()??;
        address_of_tap(&name).map(|address| self.config.v6_of(address))
    }

    fn answer_dhcp4(&self) {
        let facts =
            dhcp4::Facts { pods: [self.config.pod_cidr, self.config.subnet_cidr], dns: self.config.dns_address };
        let mut buffer = [0; MAX_PACKET];
        while let Ok((length, _)) = self.dhcp4.recv_from(&mut buffer) {
            if let Some((reply, to)) = dhcp4::answer(buffer.get(..length).unwrap_or_default(), &facts) {
                let _ = self.dhcp4.send_to(&reply, (to, 68));
            }
        }
    }

    fn answer_dhcp6(&mut self) {
        let mut buffer = [0; MAX_PACKET];
        loop {
            let Some((Ok((length, SocketAddr::V6(from))), dns)) =
                self.v6.as_ref().map(|(udp, _)| (udp.recv_from(&mut buffer), self.config.dns_address6()))
            else {
                return;
            };
            let Some(address) = self.machine(from.scope_id()) else { continue };
            let reply = dhcp6::answer(buffer.get(..length).unwrap_or_default(), address, dns, ROUTER_MAC);
            if let (Some(reply), Some((udp, _))) = (reply, &self.v6) {
                let _ = udp.send_to(&reply, from);
            }
        }
    }

    fn answer_solicitations(&mut self) {
        let mut buffer = [0; MAX_PACKET];
        loop {
            let Some((_, icmp)) = &self.v6 else { return };
            let Ok((_, length, from)) = rustix::net::recvfrom(icmp, &mut buffer, RecvFlags::empty()) else { return };
            let Some(Ok(from)) = from.map(SocketAddrV6::try_from) else { continue };
            if length > 0 && buffer.first() == Some(&ROUTER_SOLICITATION) && self.machine(from.scope_id()).is_some() {
                self.advertise(from.scope_id());
            }
        }
    }

    fn advertise(&self, link: u32) {
        if let Some((_, icmp)) = &self.v6 {
            let packet = dhcp6::advertisement(self.config.dns_address6(), ROUTER_MAC);
            let to = SocketAddrV6::new(ALL_NODES, 0, 0, link);
            let _ = rustix::net::sendto(icmp, &packet, SendFlags::empty(), &to);
        }
    }

    fn advertise_everywhere(&mut self) {
        let links = route::links(&mut self.route).unwrap_or_default();
        for link in links.iter().filter(|link| link.up && address_of_tap(&link.name).is_some()) {
            self.advertise(link.index);
        }
    }
}

fn serve(mut sockets: Sockets, stop: &OwnedFd) {
    let period = Timespec { tv_sec: ADVERTISE_EVERY, tv_nsec: 0 };
    loop {
        let ready = {
            let mut fds = vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&sockets.dhcp4, PollFlags::IN)];
            if let Some((udp, icmp)) = &sockets.v6 {
                fds.extend([PollFd::from_borrowed_fd(udp.as_fd(), PollFlags::IN), PollFd::new(icmp, PollFlags::IN)]);
            }
            match poll(&mut fds, Some(&period)) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) => fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<bool>>(),
            }
        };
        if ready.first() == Some(&true) {
            return;
        }
        if !ready.contains(&true) {
            sockets.advertise_everywhere();
        }
        sockets.answer_dhcp4();
        sockets.answer_dhcp6();
        sockets.answer_solicitations();
    }
}
