//! A workload's link to the router.
//!
//! ```text
//! absent -> leased (journal) -> linked (veth or tap) -> configured -> pinned (namespace) -> admitted (firewall)
//! ```
//!
//! `attach` walks from wherever it finds things to the end; every step is either idempotent or looks first, so a crash
//! between two of them costs nothing but the next `attach`. `detach` walks back.

use crate::address::Lease;
use crate::config::{GATEWAY, GATEWAY6, MTU, RouterConfig};
use crate::error::{Error, Result};
use crate::express::Owner;
use crate::firewall;
use crate::journal::Kind;
use crate::netlink::nft::Transaction;
use crate::netlink::route::{self, Mac, Veth};
use crate::netlink::{Batch, Socket};
use crate::pool::Prepared;
use crate::router::{Router, guard};
use crate::{ns, sys};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

/// The router's side of every link: locally administered, from 169.254.1.1.
pub const ROUTER_MAC: Mac = mac_of(GATEWAY);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A namespace of its own with `eth0` (containers, functions).
    Namespace,
    /// A tap device in the router's namespace (machines).
    Tap,
}

/// Where a workload's address is from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// [`crate::Subnet::name`]; `None`: [`RouterConfig::pod_cidr`].
    pub subnet: Option<String>,
    /// An address that its key has elsewhere is given up for one from there.
    pub moves: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// Letters, digits, `-`, `_` and `.`; names the pinned namespace.
    pub uid: String,
    /// The Kubernetes namespace.
    pub namespace: String,
    /// Who the address belongs to beyond this workload's life (`<namespace>/<machine>`); it is kept for the next
    /// workload with the same key until [`Router::release_address`].
    pub address_key: Option<String>,
    pub kind: LinkKind,
    /// Of an address that it does not have yet.
    pub place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// A /32.
    pub address: Ipv4Addr,
    /// A /128, made from `address` ([`RouterConfig::v6_of`]); `None` where the kernel has no IPv6.
    pub address6: Option<Ipv6Addr>,
    /// The pinned namespace with `eth0` in it.
    pub netns: Option<PathBuf>,
    /// The tap device in the router's namespace.
    pub tap: Option<String>,
    /// The workload's side, `0a:58:...`.
    pub mac: String,
    /// On-link next hop, always 169.254.1.1.
    pub gateway: Ipv4Addr,
    pub mtu: u32,
}

impl Router {
    /// Gives a workload its address and link, or finds them again. The same uid, or the same address key, gets the same
    /// address. After a reboot the links are made anew.
    pub fn attach(&self, request: &AttachRequest) -> Result<Attachment> {
        check_uid(&request.uid)?;
        let _name = self.names.lock(&request.uid);
        let kind = match request.kind {
            LinkKind::Namespace => Kind::Namespace,
            LinkKind::Tap => Kind::Tap,
        };
        if guard(&self.addresses).get(&request.uid).is_some_and(|lease| {
            lease.kind != kind || (lease.key != request.address_key && request.address_key.is_some())
        }) {
            self.detach_locked(&request.uid)?;
        }
        let prepared = self.prepared_for(request);
        let set_aside = prepared.as_ref().map(|prepared| prepared.address);
        let lease = match self.lease(request, kind, set_aside) {
            Ok(lease) => lease,
            Err(error) => {
                prepared.into_iter().for_each(|prepared| self.discard(prepared));
                return Err(error);
            }
        };
        let name = link_name(kind, lease.address);
        let mut attachment = Attachment {
            address: lease.address,
            address6: self.ipv6.then(|| self.config.v6_of(lease.address)),
            netns: None,
            tap: None,
            mac: mac_text(mac_of(lease.address)),
            gateway: GATEWAY,
            mtu: MTU,
        };
        match kind {
            Kind::Namespace => {
                let pin = self.pin_of(&request.uid);
                match prepared {
                    Some(prepared) => ns::pin(prepared.netns.as_fd(), &pin)?,
                    None => self.link_namespace(&pin, &name, lease.address)?,
                }
                attachment.netns = Some(pin);
            }
            Kind::Tap => {
                self.link_tap(&name, lease.address)?;
                attachment.tap = Some(name.clone());
            }
        }
        let mut transaction = Transaction::new(firewall::TABLE);
        firewall::admit(&mut transaction, &link_of(&self.config, kind, lease.address));
        transaction.commit(&mut guard(&self.firewall).socket)?;
        Ok(attachment)
    }

    /// A prepared link for a workload that has none yet and no address of its own.
    fn prepared_for(&self, request: &AttachRequest) -> Option<Prepared> {
        let is_new = request.kind == LinkKind::Namespace
            && request.address_key.is_none()
            && request.place.subnet.is_none()
            && guard(&self.addresses).get(&request.uid).is_none()
            && !ns::is_pinned(&self.pin_of(&request.uid));
        if is_new { self.pool.take() } else { None }
    }

    /// The workload's address: the one that was set aside for it, or its own, or a free one.
    fn lease(&self, request: &AttachRequest, kind: Kind, set_aside: Option<Ipv4Addr>) -> Result<Lease> {
        let (uid, namespace, key) = (&request.uid, &request.namespace, request.address_key.as_deref());
        let lease = |set_aside| guard(&self.addresses).lease(uid, namespace, key, kind, &request.place, set_aside);
        match lease(set_aside) {
            // The last addresses may be those that were set aside.
            Err(Error::Exhausted { .. }) if request.place.subnet.is_none() && self.prepared() > 0 => {
                self.pool.take().into_iter().for_each(|prepared| self.discard(prepared));
                lease(None)
            }
            other => other,
        }
    }

    /// Removes the workload's link, namespace and, unless a key holds it, address. Not attached is no error.
    pub fn detach(&self, uid: &str) -> Result<()> {
        check_uid(uid)?;
        let _name = self.names.lock(uid);
        self.detach_locked(uid)
    }

    fn detach_locked(&self, uid: &str) -> Result<()> {
        let lease: Option<Lease> = guard(&self.addresses).get(uid).cloned();
        if let Some(lease) = &lease {
            let name = link_name(lease.kind, lease.address);
            if let Some(express) = &self.express {
                express.expel(lease.address).map_err(Error::system("end the link's short ways"))?;
            }
            let mut transaction = Transaction::new(firewall::TABLE);
            firewall::expel(&mut transaction, &link_of(&self.config, lease.kind, lease.address));
            {
                let mut firewall = guard(&self.firewall);
                firewall.policies.forget(&mut transaction, &self.config, lease.address);
                transaction.commit(&mut firewall.socket)?;
                firewall.policies.forgotten(lease.address);
            }
            self.forget_bandwidth(lease.address)?;
            self.reap(&name)?;
        }
        ns::unpin(&self.pin_of(uid))?;
        guard(&self.addresses).release(uid)?;
        self.pool.wake();
        Ok(())
    }

    /// Removes a link together with all that others are detaching at this moment: while one removal waits for the kernel,
    /// further ones gather, and the next takes them all.
    fn reap(&self, name: &str) -> Result<()> {
        let mut mark = Batch::new();
        mark.regroup_link(name, route::DEAD);
        guard(&self.route).send(mark)?;
        let mut reaper = guard(&self.reaper);
        if route::index_of(&reaper, name)?.is_some() {
            let mut batch = Batch::new();
            batch.delete_links(route::DEAD);
            reaper.send(batch)?;
        }
        Ok(())
    }

    /// Opens a machine's tap device: frames with a virtio-net header, one queue, non-blocking. The descriptor works in
    /// any namespace and under any user.
    pub fn open_tap(&self, name: &str) -> Result<OwnedFd> {
        if !name.starts_with(TAP_PREFIX) || route::index_of(&guard(&self.route), name)?.is_none() {
            return Err(Error::NoLink(name.to_owned()));
        }
        self.run(|| bound_tap(name))?
    }

    fn link_namespace(&self, pin: &Path, name: &str, address: Ipv4Addr) -> Result<()> {
        if !ns::is_pinned(pin) {
            return ns::pin(self.make_namespace(name, address)?.as_fd(), pin);
        }
        let pod = ns::open(pin)?;
        ns::in_ns(pod.as_fd(), || {
            let mut inside = Socket::route()?;
            let ends = (route::index_of(&guard(&self.route), name)?, route::index_of(&inside, WORKLOAD_LINK)?);
            match ends {
                (Some(index), Some(_)) => {
                    // Links of before there was IPv6 here had it off.
                    ns::sysctl("ipv6/conf/eth0/disable_ipv6", "0")?;
                    self.configure_workload(address)?;
                    self.configure_router_side(Kind::Namespace, index, address)
                }
                _ => {
                    self.remove_link(name)?;
                    let mut batch = Batch::new();
                    batch.delete_link(WORKLOAD_LINK);
                    inside.send(batch)?;
                    self.workload_sysctls()?;
                    self.join(name, address, pod.as_fd())
                }
            }
        })?
    }

    /// Joins the workload's namespace, which the thread is in, to the router. The router's end is configured last: giving
    /// it programs opens its queue, which before both ends are up stays shut until the kernel gets around to it, and drops
    /// what is sent meanwhile.
    pub(crate) fn join(&self, name: &str, address: Ipv4Addr, pod: BorrowedFd<'_>) -> Result<()> {
        let index = self.add_veth(name, address, pod)?;
        self.configure_workload(address)?;
        self.configure_router_side(Kind::Namespace, index, address)
    }

    /// Answers the index of the router's end.
    fn add_veth(&self, name: &str, address: Ipv4Addr, pod: BorrowedFd<'_>) -> Result<u32> {
        self.renew_bandwidth(address);
        let mut batch = Batch::new();
        batch.add_veth(&Veth {
            name,
            mac: ROUTER_MAC,
            peer_name: WORKLOAD_LINK,
            peer_mac: mac_of(address),
            peer_ns: Some(pod),
            mtu: MTU,
        });
        let mut route = guard(&self.route);
        route.send(batch)?;
        route::link_index(&mut route, name)
    }

    fn configure_router_side(&self, kind: Kind, index: u32, address: Ipv4Addr) -> Result<()> {
        let mut batch = Batch::new();
        batch.set_up(index);
        batch.add_neighbour(index, address, mac_of(address));
        batch.add_link_route(address, 32, index, self.config.router_address());
        if self.ipv6 {
            let address6 = self.config.v6_of(address);
            batch.add_neighbour6(index, address6, mac_of(address));
            batch.add_link_route6(address6, 128, index, self.config.router_address6());
        }
        match &self.express {
            Some(express) => express.attach(&mut batch, index),
            None => batch.add_hooks(index),
        }
        if let Some(express) = &self.express {
            let owner = owner_of(&self.config, kind, address, index);
            express.admit(owner).map_err(Error::system("let the link take the short way"))?;
        }
        guard(&self.route).send(batch)
    }

    fn link_tap(&self, name: &str, address: Ipv4Addr) -> Result<()> {
        let found = route::index_of(&guard(&self.route), name)?;
        if found.is_none() {
            self.renew_bandwidth(address);
            self.run(|| {
                let tap = bound_tap(name)?;
                sys::tap_persist(tap.as_fd()).map_err(Error::system("keep the tap device"))
            })??;
        }
        let index = {
            let mut route = guard(&self.route);
            let index = route::link_index(&mut route, name)?;
            let mut batch = Batch::new();
            batch.configure_link(index, ROUTER_MAC, MTU);
            if self.ipv6 {
                // Machines ask who it is, and for their addresses; workloads in namespaces know.
                batch.add_network6(index, GATEWAY6, 64);
                batch.join_group(index, ALL_DHCP_SERVERS);
            }
            route.send(batch)?;
            index
        };
        self.configure_router_side(Kind::Tap, index, address)
    }

    /// The thread is in the workload's namespace: unprivileged servers may take any port, and anyone may ping. Links to
    /// come have the IPv6 address that they are given, and make none of their own.
    pub(crate) fn workload_sysctls(&self) -> Result<()> {
        ns::sysctl("ipv4/ip_unprivileged_port_start", "0")?;
        ns::sysctl("ipv4/ping_group_range", "0 2147483647")?;
        ns::sysctl("ipv6/conf/default/accept_ra", "0")?;
        ns::sysctl("ipv6/conf/default/addr_gen_mode", NO_ADDRESS)
    }

    /// The thread is in the workload's namespace.
    fn configure_workload(&self, address: Ipv4Addr) -> Result<()> {
        let mut inside = Socket::route()?;
        let index = route::link_index(&mut inside, WORKLOAD_LINK)?;
        let mut batch = Batch::new();
        batch.set_up(route::LOOPBACK);
        batch.set_up(index);
        batch.add_address(index, address);
        batch.add_neighbour(index, GATEWAY, ROUTER_MAC);
        batch.add_default_route(index, GATEWAY);
        if self.ipv6 {
            batch.add_address6(index, self.config.v6_of(address));
            batch.add_neighbour6(index, GATEWAY6, ROUTER_MAC);
            batch.add_default_route6(index, GATEWAY6);
        }
        inside.send(batch)
    }

    pub(crate) fn remove_link(&self, name: &str) -> Result<()> {
        let mut route = guard(&self.route);
        if route::index_of(&route, name)?.is_some() {
            let mut batch = Batch::new();
            batch.delete_link(name);
            route.send(batch)?;
        }
        Ok(())
    }
}

const WORKLOAD_LINK: &str = "eth0";
/// `addr_gen_mode`: no link-local address.
pub(crate) const NO_ADDRESS: &str = "1";
pub(crate) const VETH_PREFIX: &str = "veth";
/// RFC 8415, 7.1: where DHCPv6's questions go.
pub(crate) const ALL_DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
pub(crate) const TAP_PREFIX: &str = "tap";

/// Made from the address, so that name and address cannot disagree.
pub(crate) fn link_name(kind: Kind, address: Ipv4Addr) -> String {
    let prefix = match kind {
        Kind::Namespace => VETH_PREFIX,
        Kind::Tap => TAP_PREFIX,
    };
    format!("{prefix}{:08x}", address.to_bits())
}

/// Whose tap has this name.
pub(crate) fn address_of_tap(name: &str) -> Option<Ipv4Addr> {
    let digits = name.strip_prefix(TAP_PREFIX).filter(|digits| digits.len() == 8)?;
    u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)
}

pub(crate) fn link_of(config: &RouterConfig, kind: Kind, address: Ipv4Addr) -> firewall::Link {
    let link_local = match kind {
        Kind::Namespace => None,
        Kind::Tap => Some(link_local(mac_of(address))),
    };
    let address6 = config.v6_of(address);
    firewall::Link { name: link_name(kind, address), mac: mac_of(address), address, address6, link_local }
}

pub(crate) fn owner_of(config: &RouterConfig, kind: Kind, address: Ipv4Addr, index: u32) -> Owner {
    let (mac, address6) = (mac_of(address), config.v6_of(address));
    Owner { index, mac, address, address6, tap: kind == Kind::Tap, shaped: false, captures: 0 }
}

/// The address that a machine gives itself on its link (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    let pair = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f))
}

/// `0a:58` (the customary prefix of pod interfaces, locally administered) and the address.
pub(crate) const fn mac_of(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn check_uid(uid: &str) -> Result<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if uid.is_empty() || uid.len() > 128 || uid.starts_with('.') || uid == "router" || !uid.bytes().all(fine) {
        let why = "must be 1 to 128 letters, digits, '-', '_' or '.', not start with '.' and not be \"router\"";
        return Err(Error::Config { field: "uid", value: uid.chars().take(140).collect(), why: why.to_owned() });
    }
    Ok(())
}

/// The thread is in the router's namespace.
fn bound_tap(name: &str) -> Result<OwnedFd> {
    let tap = sys::tap_open().map_err(Error::file("open", "/dev/net/tun"))?;
    sys::tap_bind(tap.as_fd(), name).map_err(Error::system("bind the tap device"))?;
    Ok(tap)
}

/// One attach or detach of a workload at a time; different workloads go on side by side.
#[derive(Default)]
pub(crate) struct NameLocks {
    held: Mutex<HashSet<String>>,
    freed: Condvar,
}

pub(crate) struct NameGuard<'a> {
    locks: &'a NameLocks,
    name: String,
}

impl NameLocks {
    pub(crate) fn lock(&self, name: &str) -> NameGuard<'_> {
        let mut held = guard(&self.held);
        while !held.insert(name.to_owned()) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        NameGuard { locks: self, name: name.to_owned() }
    }
}

impl Drop for NameGuard<'_> {
    fn drop(&mut self) {
        guard(&self.locks.held).remove(&self.name);
        self.locks.freed.notify_all();
    }
}
