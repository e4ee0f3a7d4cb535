//! The way out, if an administrator asked for one: a process that connects for workloads ([`user`]), or a veth pair
//! between the router and the host's network namespace, and on the host an nftables table of the instance's name in each
//! family that passes, routes over that link, and the kernel's switches for forwarding.
//!
//! ```text
//! router:  0.0.0.0/1, 128.0.0.0/1 via 169.254.1.2 dev uplink          (more specific than the default, which refuses)
//! host:    <pod CIDR>, <subnets>, 169.254.1.3 via 169.254.1.3 dev atoll-<instance>
//!          table ip atoll-<instance>: see `host.rs`
//! ```
//!
//! In IPv6 the same with `fe80::2` and `fe80::3`, where the host lets it pass ([`sysctls::Forwarding6`]). Next hops are
//! fixed neighbours that no device has as an address: nothing is asked by ARP. What was on the host before is written to
//! `<run_dir>/uplink` before anything is changed and put back from there, by whichever process.

mod host;
mod routes;
mod sysctls;
mod user;

use crate::attach::{NO_ADDRESS, mac_of};
use crate::config::{MTU, RouterConfig};
use crate::error::{Error, Result};
use crate::firewall;
use crate::netlink::nft::{self, Family, Transaction};
use crate::netlink::route::{self, Veth};
use crate::netlink::{Batch, Socket};
use crate::ns;
use crate::policy::Ranges;
use crate::router::{Router, guard};
use crate::services::Protocol;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use sysctls::Forwarding6;
pub(crate) use user::{RELAY, Relay, probe as probe_relay};

/// The router's end.
pub(crate) const LINK: &str = "uplink";
const HOST_HOP: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);
/// Where the router takes connections to ports of the node; as a next hop, the router seen from the host.
pub const NODE: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 3);

/// The same two in IPv6.
const HOST_HOP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const NODE6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 3);

/// How workloads get out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// Not at all; the host is not touched.
    #[default]
    None,
    /// With an address of the host as their source; in IPv6 as [`Egress::User`] where the host lets none pass.
    Nat,
    /// With their own addresses; the world outside has routes back to this host.
    Routed,
    /// Through a process that connects for them; the host is not touched.
    User,
}

/// What the host's table holds beside its fixed rules.
pub(crate) struct Uplink {
    socket: Socket,
    table: String,
    sources: Option<BTreeMap<IpAddr, IpAddr>>,
    exposed: Option<BTreeSet<(Protocol, u16)>>,
    /// The host's namespace, and the index of its end there.
    host: OwnedFd,
    index: u32,
    /// It carries IPv6.
    v6: bool,
}

impl Router {
    /// Makes the way out of the router to the namespace `host`, or takes it away. What an earlier process left is found
    /// and used again. A failure leaves nothing behind.
    pub fn set_egress(&self, host: BorrowedFd<'_>, egress: Egress) -> Result<()> {
        *guard(&self.uplink) = None;
        *guard(&self.relay) = None;
        match egress {
            Egress::None => self.remove_uplink(host).and(self.remove_relay()),
            Egress::Nat | Egress::Routed => {
                let made = self.make_uplink(host, egress);
                let uplink = made.inspect_err(|_| drop(self.remove_uplink(host).and(self.remove_relay())))?;
                let v6 = uplink.v6;
                *guard(&self.uplink) = Some(uplink);
                match egress {
                    Egress::Nat if self.ipv6 && !v6 => self.lead_ipv6(host),
                    _ => self.remove_relay()?,
                }
                if egress == Egress::Routed && self.ipv6 && !v6 {
                    tracing::warn!(
                        "IPv6 has no way out: this kernel forwards it for routers alone; make the host one \
                         (net.ipv6.conf.all.forwarding=1, and accept_ra=2 for links that need router advertisements), and \
                         start again"
                    );
                }
                Ok(())
            }
            Egress::User => {
                self.remove_uplink(host)?;
                let relay = self.make_relay(host, true).inspect_err(|_| drop(self.remove_relay()))?;
                *guard(&self.relay) = Some(relay);
                Ok(())
            }
        }
    }

    /// IPv6 gets out by the relay: to forward it this host would have to become an IPv6 router, which believes no router
    /// advertisements any more.
    fn lead_ipv6(&self, host: BorrowedFd<'_>) {
        match self.make_relay(host, false) {
            Ok(relay) => {
                tracing::info!("IPv6 gets out by a relay: this kernel forwards it for routers alone (docs/network.md)");
                *guard(&self.relay) = Some(relay);
            }
            Err(error) => {
                let _ = self.remove_relay();
                tracing::warn!("IPv6 has no way out, IPv4 has: {error}");
            }
        }
    }

    /// Whether a link leads to the host.
    pub fn has_uplink(&self) -> bool {
        guard(&self.uplink).is_some()
    }

    /// Whether there is any way out.
    pub fn leads_out(&self) -> bool {
        self.has_uplink() || guard(&self.relay).is_some()
    }

    /// Where the way out leads; without one, nowhere.
    pub fn outside(&self) -> Ranges {
        let inside = firewall::inside(&self.config);
        let mut outside = Ranges::default();
        if self.leads_out() {
            let bits = |(first, last): (Ipv4Addr, Ipv4Addr)| (first.to_bits().into(), last.to_bits().into());
            let v4 = |bits: u128| Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX));
            let gaps = gaps(inside.v4.into_iter().map(bits), u32::MAX.into());
            outside.v4 = gaps.into_iter().map(|(first, last)| (v4(first), v4(last))).collect();
        }
        let carries6 = guard(&self.uplink).as_ref().is_some_and(|uplink| uplink.v6);
        if carries6 || guard(&self.relay).is_some() {
            let bits = |(first, last): (Ipv6Addr, Ipv6Addr)| (first.to_bits(), last.to_bits());
            let gaps = gaps(inside.v6.into_iter().map(bits), u128::MAX);
            outside.v6 = gaps.into_iter().map(|(first, last)| (first.into(), last.into())).collect();
        }
        outside
    }

    /// Workloads whose connections leave with an address other than the one the host would choose; all others follow
    /// the host. Without a translating uplink, nothing.
    pub fn sync_egress_addresses(&self, sources: &BTreeMap<IpAddr, IpAddr>) -> Result<()> {
        if let Some(relay) = &*guard(&self.relay) {
            relay.sync_sources(sources)?;
        }
        match &mut *guard(&self.uplink) {
            Some(uplink) => uplink.sync_sources(sources),
            None => Ok(()),
        }
    }

    /// Ports of the host that packets from outside are led from to the router, with their source kept. Without an
    /// uplink, nothing.
    pub fn sync_exposed(&self, ports: &BTreeSet<(Protocol, u16)>) -> Result<()> {
        match &mut *guard(&self.uplink) {
            Some(uplink) => uplink.sync_exposed(ports),
            None => Ok(()),
        }
    }

    fn make_uplink(&self, host: BorrowedFd<'_>, egress: Egress) -> Result<Uplink> {
        let name = host_name(&self.config)?;
        let state = self.config.run_dir.join("uplink");
        let (host_there, forwarding6) = ns::in_ns(host, || {
            let mut socket = Socket::route()?;
            let link = route::find_link(&mut socket, &name)?;
            routes::check(&mut socket, &self.config, link.as_ref().map(|link| link.index))?;
            sysctls::save(&state)?;
            Ok::<_, Error>((link.is_some(), sysctls::forwarding6(self.config.force_forwarding)?))
        })??;
        let v6 = self.ipv6 && forwarding6 != Forwarding6::No;
        let index = self.uplink_pair(host, &name, host_there)?;
        self.lead_out(index, v6)?;
        let own_host = host.try_clone_to_owned().map_err(Error::system("keep the host's namespace"))?;
        let wanted = self.routes_on_host(v6);
        ns::in_ns(host, || {
            let index = host_end(&name, v6.then(|| self.config.host_address6()))?;
            routes::sync(&mut Socket::route()?, index, &wanted)?;
            let mut socket = Socket::netfilter()?;
            let fresh = host::ensure(&mut socket, &name, &self.config, (egress, v6))?;
            ns::sysctl("ipv4/ip_forward", "1")?;
            if v6 && forwarding6 == Forwarding6::Forced {
                sysctls::force_forwarding6(&state)?;
            }
            let (sources, exposed) = (fresh.then(Default::default), fresh.then(Default::default));
            Ok(Uplink { socket, sources, exposed, table: name.clone(), host: own_host, index, v6 })
        })?
    }

    /// The router's side of the link, and its routes.
    fn lead_out(&self, index: u32, v6: bool) -> Result<()> {
        let mut batch = Batch::new();
        batch.set_up(index);
        batch.add_neighbour(index, HOST_HOP, mac_of(HOST_HOP));
        let router = self.config.router_address().into();
        for half in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(128, 0, 0, 0)] {
            batch.add_route_via((half.into(), 1), index, HOST_HOP.into(), Some(router));
        }
        let router = self.config.router_address6().into();
        if v6 {
            batch.add_neighbour6(index, HOST_HOP6, mac_of(HOST_HOP));
        }
        let halves = [Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0x8000, 0, 0, 0, 0, 0, 0, 0)];
        for half in halves.into_iter().filter(|_| self.ipv6) {
            if v6 {
                batch.add_route_via((half.into(), 1), index, HOST_HOP6.into(), Some(router));
            } else {
                batch.delete_route((half.into(), 1), index);
            }
        }
        guard(&self.route).send(batch)
    }

    /// Brings the host's routes up to the subnets that there are. Without a link to the host, nothing.
    pub(crate) fn route_subnets(&self) -> Result<()> {
        let uplink = guard(&self.uplink);
        let Some(Uplink { host, index, v6, .. }) = &*uplink else { return Ok(()) };
        let wanted = self.routes_on_host(*v6);
        ns::in_ns(host.as_fd(), || routes::sync(&mut Socket::route()?, *index, &wanted))?
    }

    fn routes_on_host(&self, v6: bool) -> Vec<(IpAddr, u8)> {
        let subnets: Vec<_> = guard(&self.addresses).subnets().cloned().collect();
        routes::wanted(&self.config, &subnets, v6)
    }

    /// Makes the pair unless both ends are there. Answers the index of the router's end.
    fn uplink_pair(&self, host: BorrowedFd<'_>, name: &str, host_there: bool) -> Result<u32> {
        let mut route = guard(&self.route);
        if let (Some(link), true) = (route::find_link(&mut route, LINK)?, host_there) {
            return Ok(link.index);
        }
        let mut batch = Batch::new();
        batch.delete_link(LINK);
        route.send(batch)?;
        if host_there {
            // The other end of one that belonged to a router that is gone.
            ns::in_ns(host, || delete_link(name))??;
        }
        let mut batch = Batch::new();
        batch.add_veth(&Veth {
            name: LINK,
            mac: mac_of(NODE),
            peer_name: name,
            peer_mac: mac_of(HOST_HOP),
            peer_ns: Some(host),
            mtu: MTU,
        });
        route.send(batch)?;
        route::link_index(&mut route, LINK)
    }

    fn remove_uplink(&self, host: BorrowedFd<'_>) -> Result<()> {
        let state = self.config.run_dir.join("uplink");
        if !state.exists() {
            return Ok(());
        }
        let name = host_name(&self.config)?;
        let mut batch = Batch::new();
        batch.delete_link(LINK);
        guard(&self.route).send(batch)?;
        ns::in_ns(host, || {
            delete_link(&name)?;
            let mut socket = Socket::netfilter()?;
            let mut transaction = Transaction::new(&name);
            for family in Family::INET {
                if nft::table_comment(&mut socket, &name, family)?.is_some() {
                    transaction.family(family);
                    transaction.delete_table();
                }
            }
            transaction.commit(&mut socket)?;
            sysctls::restore(&state)
        })?
    }
}

/// The host's end, with an address in IPv6 if it carries that; answers its index. The thread is in the host's namespace.
fn host_end(name: &str, address6: Option<Ipv6Addr>) -> Result<u32> {
    let off = if address6.is_some() { "0" } else { "1" };
    ns::sysctl(&format!("ipv6/conf/{name}/addr_gen_mode"), NO_ADDRESS)?;
    ns::sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), off)?;
    for (switch, value) in [("accept_ra", "0"), ("accept_redirects", "0"), ("accept_source_route", "-1")] {
        ns::sysctl(&format!("ipv6/conf/{name}/{switch}"), value)?;
    }
    for (switch, value) in [("rp_filter", "1"), ("accept_source_route", "0"), ("accept_redirects", "0")] {
        ns::sysctl(&format!("ipv4/conf/{name}/{switch}"), value)?;
    }
    let mut route = Socket::route()?;
    let index = route::link_index(&mut route, name)?;
    let mut batch = Batch::new();
    batch.set_up(index);
    batch.add_neighbour(index, NODE, mac_of(NODE));
    if let Some(address) = address6 {
        batch.add_last_address6(index, address);
        batch.add_neighbour6(index, NODE6, mac_of(NODE));
    }
    route.send(batch)?;
    Ok(index)
}

/// Whether a link to the host, in whose namespace the thread is, carries IPv6.
pub(crate) fn carries6(may_force: bool) -> Result<bool> {
    Ok(sysctls::forwarding6(may_force)? != Forwarding6::No)
}

/// What sorted, disjoint ranges leave of the numbers up to `last`.
fn gaps(ranges: impl Iterator<Item = (u128, u128)>, last: u128) -> Vec<(u128, u128)> {
    let mut from = Some(0);
    let mut all = Vec::new();
    for (first, end) in ranges {
        if let Some(from) = from.filter(|from| *from < first) {
            all.push((from, first - 1));
        }
        from = end.checked_add(1);
    }
    all.extend(from.filter(|from| *from <= last).map(|from| (from, last)));
    all
}

/// Of the host's end, and of the table there: `atoll-` and the instance.
pub(crate) fn host_name(config: &RouterConfig) -> Result<String> {
    let instance = config.run_dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if instance.is_empty() || instance.len() > 9 || !instance.bytes().all(fine) {
        let why = "its last part names the uplink, and must be 1 to 9 letters and digits".to_owned();
        return Err(Error::Config { field: "run_dir", value: config.run_dir.display().to_string(), why });
    }
    Ok(format!("atoll-{instance}"))
}

/// In the thread's namespace.
fn delete_link(name: &str) -> Result<()> {
    let mut batch = Batch::new();
    batch.delete_link(name);
    Socket::route()?.send(batch)
}
