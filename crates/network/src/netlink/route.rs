//! rtnetlink: links, addresses, routes, neighbours (rtnetlink(7)).

use super::nft::octets;
use super::parse::{Attributes, text, u32_at};
use super::{Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Socket, Writer};
use crate::error::{Error, Result};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
pub(super) const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_NEWRULE: u16 = 32;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_QDISC: u16 = 6;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;
const IFA_F_NODAD: u8 = 2;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_MCAUTOJOIN: u32 = 0x400;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;
/// Of a request to remove: any scope.
const SCOPE_NOWHERE: u8 = 255;
pub(super) const ROUTE_UNICAST: u8 = 1;
const ROUTE_LOCAL: u8 = 2;
const ROUTE_UNREACHABLE: u8 = 7;
const NEXTHOP_ONLINK: u32 = 4;
const NEIGHBOUR_PERMANENT: u16 = 0x80;
/// Rules are looked at from the lowest priority up; the main table's is 32766.
const RULE_PRIORITY: u32 = 100;
const RULE_TO_TABLE: u8 = 1;

/// All of a router's links are of this group, so that one request removes them all.
pub const GROUP: u32 = 0x6174;
/// The router's own.
pub const BASE: u32 = 0x6173;
/// Links that are being detached.
pub const DEAD: u32 = 0x6175;
/// The loopback device's index in every namespace.
pub const LOOPBACK: u32 = 1;

pub type Mac = [u8; 6];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub group: u32,
    /// What leaves by it is limited.
    pub shaped: bool,
}

/// Both ends of a veth pair.
pub struct Veth<'a> {
    pub name: &'a str,
    pub mac: Mac,
    pub peer_name: &'a str,
    pub peer_mac: Mac,
    /// Where the peer goes; `None`: the same namespace.
    pub peer_ns: Option<BorrowedFd<'a>>,
    pub mtu: u32,
}

fn interface(w: &mut Writer, index: u32, flags: u32) {
    w.raw(&[0, 0, 0, 0]);
    w.raw(&index.to_ne_bytes());
    w.raw(&flags.to_ne_bytes());
    w.raw(&flags.to_ne_bytes());
}

impl Batch {
    /// Makes both ends, the near one up.
    pub fn add_veth(&mut self, veth: &Veth<'_>) {
        self.request("make the veth pair", RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &[], |w| {
            interface(w, 0, IFF_UP);
            w.string(IFLA_IFNAME, veth.name);
            w.attr(IFLA_ADDRESS, &veth.mac);
            w.u32(IFLA_MTU, veth.mtu);
            w.u32(IFLA_GROUP, GROUP);
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "veth");
                w.nest(IFLA_INFO_DATA, |w| {
                    w.nest(VETH_INFO_PEER, |w| {
                        // Not up: the peer cannot be opened before the pair is joined.
                        interface(w, 0, 0);
                        w.string(IFLA_IFNAME, veth.peer_name);
                        w.attr(IFLA_ADDRESS, &veth.peer_mac);
                        w.u32(IFLA_MTU, veth.mtu);
                        if let Some(ns) = veth.peer_ns {
                            w.u32(IFLA_NET_NS_FD, ns.as_raw_fd() as u32);
                        }
                    });
                });
            });
        });
    }
    /// A device that hands what leaves by it back to where it came in.
    pub fn add_ifb(&mut self, name: &str, mac: Mac, mtu: u32) {
        self.request("make the ifb device", RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &[], |w| {
            interface(w, 0, IFF_UP | IFF_NOARP);
            w.string(IFLA_IFNAME, name);
            w.attr(IFLA_ADDRESS, &mac);
            w.u32(IFLA_MTU, mtu);
            w.u32(IFLA_GROUP, GROUP);
            w.nest(IFLA_LINKINFO, |w| w.string(IFLA_INFO_KIND, "ifb"));
        });
    }
    pub fn set_up(&mut self, index: u32) {
        self.request("bring the link up", RTM_NEWLINK, NLM_F_ACK, &[], |w| interface(w, index, IFF_UP));
    }
    /// Up, and with no neighbours to ask for.
    pub fn set_up_without_neighbours(&mut self, index: u32) {
        self.request("bring the link up", RTM_NEWLINK, NLM_F_ACK, &[], |w| interface(w, index, IFF_UP | IFF_NOARP));
    }
    /// Address, MTU and group of an existing link.
    pub fn configure_link(&mut self, index: u32, mac: Mac, mtu: u32) {
        self.request("configure the link", RTM_NEWLINK, NLM_F_ACK, &[], |w| {
            interface(w, index, IFF_UP);
            w.attr(IFLA_ADDRESS, &mac);
            w.u32(IFLA_MTU, mtu);
            w.u32(IFLA_GROUP, GROUP);
        });
    }
    /// A link that is not there is as good as removed.
    pub fn delete_link(&mut self, name: &str) {
        self.request("remove the link", RTM_DELLINK, NLM_F_ACK, &[Errno::NODEV], |w| {
            interface(w, 0, 0);
            w.string(IFLA_IFNAME, name);
        });
    }
    /// Moves a link to another group; one that is not there is no error.
    pub fn regroup_link(&mut self, name: &str, group: u32) {
        self.request("mark the link for removal", RTM_NEWLINK, NLM_F_ACK, &[Errno::NODEV], |w| {
            interface(w, 0, 0);
            w.string(IFLA_IFNAME, name);
            w.u32(IFLA_GROUP, group);
        });
    }
    /// Removes all links of a group at about the cost of one: the kernel waits for readers once.
    pub fn delete_links(&mut self, group: u32) {
        self.request("remove the links", RTM_DELLINK, NLM_F_ACK, &[Errno::NODEV], |w| {
            interface(w, 0, 0);
            w.u32(IFLA_GROUP, group);
        });
    }
    /// `address/32` on a link.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr) {
        self.request("add the address", RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &[Errno::EXIST], |w| {
            let scope = if address.is_link_local() { SCOPE_LINK } else { 0 };
            w.raw(&[AF_INET, 32, 0, scope]);
            w.raw(&index.to_ne_bytes());
            w.attr(1, &address.octets());
            w.attr(2, &address.octets());
        });
    }
    /// `address/128` on a link, without asking whether another has it.
    pub fn add_address6(&mut self, index: u32, address: Ipv6Addr) {
        self.add_network6(index, address, 128);
    }
    /// The same with its network on the link.
    pub fn add_network6(&mut self, index: u32, address: Ipv6Addr, prefix: u8) {
        self.request("add the address", RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &[Errno::EXIST], |w| {
            let scope = if address.is_unicast_link_local() { SCOPE_LINK } else { 0 };
            w.raw(&[AF_INET6, prefix, IFA_F_NODAD, scope]);
            w.raw(&index.to_ne_bytes());
            w.attr(1, &address.octets());
            w.attr(2, &address.octets());
        });
    }
    /// The same, for what has no other address to say where it is from (deprecated, RFC 4862, 5.5.4).
    pub fn add_last_address6(&mut self, index: u32, address: Ipv6Addr) {
        self.request("add the address", RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &[Errno::EXIST], |w| {
            w.raw(&[AF_INET6, 128, IFA_F_NODAD, 0]);
            w.raw(&index.to_ne_bytes());
            w.attr(2, &address.octets());
            // Preferred for no time, valid for ever; two stamps that the kernel fills.
            w.attr(IFA_CACHEINFO, &[0, u32::MAX, 0, 0].map(u32::to_ne_bytes).concat());
        });
    }
    /// Takes what is sent to a multicast group on a link, for as long as the link is there.
    pub fn join_group(&mut self, index: u32, group: Ipv6Addr) {
        self.request("join the group", RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &[Errno::EXIST], |w| {
            w.raw(&[AF_INET6, 128, 0, SCOPE_LINK]);
            w.raw(&index.to_ne_bytes());
            w.attr(1, &group.octets());
            w.u32(IFA_FLAGS, u32::from(IFA_F_NODAD) | IFA_F_MCAUTOJOIN);
        });
    }
    /// Destination reached directly over a link, from `source`.
    pub fn add_link_route(&mut self, destination: Ipv4Addr, prefix: u8, index: u32, source: Ipv4Addr) {
        self.route(prefix, SCOPE_LINK, ROUTE_UNICAST, 0, |w| {
            w.attr(1, &destination.octets());
            w.u32(4, index);
            w.attr(7, &source.octets());
        });
    }
    /// The default route, by a next hop that is on-link whatever the link's addresses say.
    pub fn add_default_route(&mut self, index: u32, gateway: Ipv4Addr) {
        self.route(0, 0, ROUTE_UNICAST, NEXTHOP_ONLINK, |w| {
            w.u32(4, index);
            w.attr(5, &gateway.octets());
        });
    }
    /// Destination by a next hop that is on-link whatever the link's addresses say, and the source of what is sent there
    /// from here.
    pub fn add_route_via(&mut self, (base, prefix): (IpAddr, u8), index: u32, hop: IpAddr, source: Option<IpAddr>) {
        self.route_of(family_of(base), prefix, 0, ROUTE_UNICAST, NEXTHOP_ONLINK, |w| {
            w.attr(1, &octets(base));
            w.u32(4, index);
            w.attr(5, &octets(hop));
            if let Some(source) = source {
                w.attr(7, &octets(source));
            }
        });
    }
    /// The route to this network over this link; one that is not there is no error.
    pub fn delete_route(&mut self, (base, prefix): (IpAddr, u8), index: u32) {
        self.request("remove the route", RTM_DELROUTE, NLM_F_ACK, &[Errno::SRCH], |w| {
            w.raw(&[family_of(base), prefix, 0, 0, TABLE_MAIN, 0, SCOPE_NOWHERE, 0]);
            w.raw(&0_u32.to_ne_bytes());
            w.attr(1, &octets(base));
            w.u32(4, index);
        });
    }
    /// What no more specific route covers is answered with "host unreachable".
    pub fn add_unreachable(&mut self, destination: Ipv4Addr, prefix: u8) {
        self.route(prefix, 0, ROUTE_UNREACHABLE, 0, |w| w.attr(1, &destination.octets()));
    }
    /// As [`Batch::add_link_route`]. A route over loopback refuses in IPv6: take another link.
    pub fn add_link_route6(&mut self, destination: Ipv6Addr, prefix: u8, index: u32, source: Ipv6Addr) {
        self.route_of(AF_INET6, prefix, 0, ROUTE_UNICAST, 0, |w| {
            w.attr(1, &destination.octets());
            w.u32(4, index);
            w.attr(7, &source.octets());
        });
    }
    pub fn add_default_route6(&mut self, index: u32, gateway: Ipv6Addr) {
        self.route_of(AF_INET6, 0, 0, ROUTE_UNICAST, NEXTHOP_ONLINK, |w| {
            w.u32(4, index);
            w.attr(5, &gateway.octets());
        });
    }
    fn route(&mut self, prefix: u8, scope: u8, kind: u8, flags: u32, fill: impl FnOnce(&mut Writer)) {
        self.route_of(AF_INET, prefix, scope, kind, flags, fill);
    }
    fn route_of(&mut self, family: u8, prefix: u8, scope: u8, kind: u8, flags: u32, fill: impl FnOnce(&mut Writer)) {
        self.request("add the route", RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &[], |w| {
            w.raw(&[family, prefix, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, scope, kind]);
            w.raw(&flags.to_ne_bytes());
            fill(w);
        });
    }
    /// Packets with this mark are for sockets here, whatever their address: `table` holds that one route. With a `prefix`
    /// only those that no longer route of the main table leads elsewhere.
    pub fn deliver_marked(&mut self, v6: bool, mark: u32, table: u8, prefix: Option<u32>) {
        let family = if v6 { AF_INET6 } else { AF_INET };
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request("add the route to here", RTM_NEWROUTE, flags, &[], |w| {
            w.raw(&[family, 0, 0, 0, table, PROTOCOL_STATIC, SCOPE_HOST, ROUTE_LOCAL, 0, 0, 0, 0]);
            w.u32(4, LOOPBACK);
        });
        let main = prefix.map(|prefix| (0, TABLE_MAIN, Some(prefix)));
        for (order, table, suppressed) in main.into_iter().chain([(1, table, None)]) {
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
            self.request("add the routing rule", RTM_NEWRULE, flags, &[Errno::EXIST], |w| {
                w.raw(&[family, 0, 0, 0, table, 0, 0, RULE_TO_TABLE, 0, 0, 0, 0]);
                w.u32(6, RULE_PRIORITY + order);
                w.u32(10, mark);
                if let Some(prefix) = suppressed {
                    w.u32(14, prefix);
                }
            });
        }
    }
    /// A fixed neighbour: ARP neither asks for it nor changes it.
    pub fn add_neighbour(&mut self, index: u32, address: Ipv4Addr, mac: Mac) {
        self.neighbour(AF_INET, index, &address.octets(), mac);
    }
    /// The same for neighbour discovery.
    pub fn add_neighbour6(&mut self, index: u32, address: Ipv6Addr, mac: Mac) {
        self.neighbour(AF_INET6, index, &address.octets(), mac);
    }
    fn neighbour(&mut self, family: u8, index: u32, address: &[u8], mac: Mac) {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request("add the neighbour", RTM_NEWNEIGH, flags, &[], |w| {
            w.raw(&[family, 0, 0, 0]);
            w.raw(&index.to_ne_bytes());
            w.raw(&NEIGHBOUR_PERMANENT.to_ne_bytes());
            w.raw(&[0, ROUTE_UNICAST]);
            w.attr(1, address);
            w.attr(2, &mac);
        });
    }
}

/// The link of this name in the socket's namespace.
pub fn find_link(socket: &mut Socket, name: &str) -> Result<Option<Link>> {
    let mut batch = Batch::new();
    batch.request("look the link up", RTM_GETLINK, 0, &[Errno::NODEV], |w| {
        interface(w, 0, 0);
        w.string(IFLA_IFNAME, name);
    });
    let mut found = None;
    socket.query(batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            found = link(payload);
        }
    })?;
    Ok(found)
}

/// The name of the link with this index; `None` if there is none.
pub fn link_name(socket: &mut Socket, index: u32) -> Result<Option<String>> {
    let mut batch = Batch::new();
    batch.request("look the link up", RTM_GETLINK, 0, &[Errno::NODEV], |w| interface(w, index, 0));
    let mut found = None;
    socket.query(batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            found = link(payload);
        }
    })?;
    Ok(found.map(|link| link.name))
}

/// The index of the link of this name in the socket's namespace. Other than [`find_link`], this does not wait for the
/// kernel's one lock of all links.
pub fn index_of(socket: &Socket, name: &str) -> Result<Option<u32>> {
    match rustix::net::netdevice::name_to_index(socket, name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::NODEV) => Ok(None),
        Err(errno) => Err(Error::errno("look the link up")(errno)),
    }
}

/// As [`index_of`], absent being an error.
pub fn link_index(socket: &mut Socket, name: &str) -> Result<u32> {
    index_of(socket, name)?.ok_or_else(|| Error::NoLink(name.to_owned()))
}

pub fn links(socket: &mut Socket) -> Result<Vec<Link>> {
    let mut batch = Batch::new();
    batch.request("list the links", RTM_GETLINK, NLM_F_DUMP, &[], |w| interface(w, 0, 0));
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            all.extend(link(payload));
        }
    })?;
    Ok(all)
}

/// What a link has carried, as its end in the router counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub received_packets: u64,
    pub received_bytes: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
    pub received_dropped: u64,
    pub sent_dropped: u64,
}

/// All links' names and counters.
pub fn counters(socket: &mut Socket) -> Result<Vec<(String, Counters)>> {
    let mut batch = Batch::new();
    batch.request("list the links", RTM_GETLINK, NLM_F_DUMP, &[], |w| interface(w, 0, 0));
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            all.extend(link_counters(payload));
        }
    })?;
    Ok(all)
}

/// Reads the counters of one `RTM_NEWLINK` payload (`struct rtnl_link_stats64`).
pub fn link_counters(payload: &[u8]) -> Option<(String, Counters)> {
    let attributes = payload.get(16..)?;
    let counted = Attributes::get(attributes, IFLA_STATS64)?;
    let at = |n: usize| Some(u64::from_ne_bytes(counted.get(n * 8..n * 8 + 8)?.try_into().ok()?));
    let counters = Counters {
        received_packets: at(0)?,
        sent_packets: at(1)?,
        received_bytes: at(2)?,
        sent_bytes: at(3)?,
        received_dropped: at(6)?,
        sent_dropped: at(7)?,
    };
    Some((text(Attributes::get(attributes, IFLA_IFNAME)?).to_owned(), counters))
}

/// Reads one `RTM_NEWLINK` payload.
pub fn link(payload: &[u8]) -> Option<Link> {
    let attributes = payload.get(16..)?;
    Some(Link {
        index: u32_at(payload, 4)?,
        name: text(Attributes::get(attributes, IFLA_IFNAME)?).to_owned(),
        up: u32_at(payload, 8)? & IFF_UP != 0,
        group: Attributes::get(attributes, IFLA_GROUP).and_then(|bytes| u32_at(bytes, 0)).unwrap_or(0),
        shaped: Attributes::get(attributes, IFLA_QDISC).is_some_and(|name| text(name) == "tbf"),
    })
}

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv6() { AF_INET6 } else { AF_INET }
}

/// A unicast route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub base: IpAddr,
    pub prefix: u8,
    /// The link that it leads out by; 0 for one of several next hops.
    pub link: u32,
    /// It leads to a next hop, not to the link's own network.
    pub via: bool,
}

/// The main table's unicast routes of one family.
pub fn routes(socket: &mut Socket, v6: bool) -> Result<Vec<Route>> {
    let family = if v6 { AF_INET6 } else { AF_INET };
    let mut batch = Batch::new();
    batch.request("list the routes", RTM_GETROUTE, NLM_F_DUMP, &[], |w| {
        w.raw(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    });
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        if kind == RTM_NEWROUTE {
            all.extend(route(payload));
        }
    })?;
    Ok(all)
}

/// Reads one `RTM_NEWROUTE` payload; `None` for what is not a unicast route of the main table.
pub fn route(payload: &[u8]) -> Option<Route> {
    let attributes = payload.get(12..)?;
    let v6 = match *payload.first()? {
        AF_INET => false,
        AF_INET6 => true,
        _ => return None,
    };
    let is_ours = payload.get(4) == Some(&TABLE_MAIN) && payload.get(7) == Some(&ROUTE_UNICAST);
    let base: IpAddr = match (Attributes::get(attributes, 1), v6) {
        (Some(bytes), false) => <[u8; 4]>::try_from(bytes).ok()?.into(),
        (Some(bytes), true) => <[u8; 16]>::try_from(bytes).ok()?.into(),
        (None, false) => Ipv4Addr::UNSPECIFIED.into(),
        (None, true) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let link = Attributes::get(attributes, 4).and_then(|bytes| u32_at(bytes, 0)).unwrap_or(0);
    let via = link == 0 || Attributes::get(attributes, 5).is_some();
    is_ours.then_some(Route { base, prefix: *payload.get(1)?, link, via })
}
