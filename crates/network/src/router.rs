//! The router: one network namespace per Atoll instance through which all workloads' packets pass.

use crate::activator::Activation;
use crate::address::{Addresses, Lease};
use crate::attach::{NO_ADDRESS, NameLocks, link_name, link_of, owner_of};
use crate::bandwidth::{self, Limited};
use crate::config::{GATEWAY, RouterConfig};
use crate::error::{Error, Result};
use crate::express::Express;
use crate::firewall;
use crate::limits;
use crate::names::Names;
use crate::netlink::route::{self, Veth};
use crate::netlink::{Batch, Socket};
use crate::ns;
use crate::policy::{Changed, Policies, Programmed};
use crate::pool::Pool;
use crate::services::{ServiceRule, Services};
use crate::uplink::{self, NODE, Relay, Uplink};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const ROUTER: &str = "router";
/// A link that leads nowhere, for IPv6 routes to what is redirected or refused: over loopback they would end a packet
/// before the firewall has seen it.
pub const VOID: &str = "void";
const VOID_PEER: &str = "void-peer";
/// Routing table by which answers get to the relay's sockets.
const RELAY_TABLE: u8 = 77;
/// Routes no longer than this lead to nobody here: the default, and an uplink's. Networks of workloads are longer.
pub(crate) const WIDE: u32 = 7;

/// Owns the router namespace while it lives. Dropping it leaves everything in the kernel as it is, so that workloads
/// outlive the process; [`Router::teardown`] removes it.
pub struct Router {
    pub(crate) config: RouterConfig,
    pub(crate) netns: OwnedFd,
    /// The kernel has IPv6.
    pub(crate) ipv6: bool,
    /// rtnetlink in the router's namespace.
    pub(crate) route: Mutex<Socket>,
    /// Another rtnetlink socket, for removals: each waits tens of milliseconds for the kernel.
    pub(crate) reaper: Mutex<Socket>,
    pub(crate) firewall: Mutex<Firewall>,
    /// `None`: this kernel cannot do it.
    pub(crate) express: Option<Arc<Express>>,
    pub(crate) addresses: Mutex<Addresses>,
    pub(crate) names: NameLocks,
    pub(crate) pool: Pool,
    pub(crate) bandwidths: Mutex<Limited>,
    pub(crate) uplink: Mutex<Option<Uplink>>,
    pub(crate) relay: Mutex<Option<Relay>>,
    pub(crate) by_name: Arc<Names>,
    /// Listeners of the activator, once they are open.
    pub(crate) activator: Mutex<Vec<SocketAddr>>,
    _lock: File,
}

pub(crate) struct Firewall {
    pub socket: Socket,
    services: Services,
    pub policies: Programmed,
}

/// A workload's address, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    pub uid: String,
    pub namespace: String,
    pub address: Ipv4Addr,
}

impl Router {
    /// Makes the router namespace, or finds it again as an earlier process left it, and brings it to the state that
    /// `config` asks for. What no allocation speaks for is removed.
    pub fn open(config: RouterConfig) -> Result<Router> {
        config.check()?;
        limits::warn_of_small_table(config.limits);
        make_dir(&config.data_dir)?;
        make_dir(&config.run_dir)?;
        let lock = lock(&config.data_dir.join("lock"))?;
        let addresses = Addresses::open(&config, &config.data_dir.join("addresses"))?;
        let pins = pins_dir(&config);
        make_dir(&pins)?;
        ns::share(&pins)?;
        let pin = pins.join(ROUTER);
        if !ns::is_pinned(&pin) {
            ns::pin(ns::fresh(|_| Ok(()))?.as_fd(), &pin)?;
        }
        let netns = ns::open(&pin)?;
        config.pairs.set(addresses.pairs());
        let (mut route, reaper, mut socket, of_names, ipv6) = ns::in_ns(netns.as_fd(), || {
            sysctls()?;
            limits::sysctls()?;
            let ipv6 = Path::new("/proc/sys/net/ipv6/conf").exists();
            let (of_all, of_names) = (Socket::netfilter()?, Socket::netfilter()?);
            Ok::<_, Error>((Socket::route()?, Socket::route()?, of_all, of_names, ipv6))
        })??;
        base_links(&mut route, &config)?;
        if ipv6 {
            base_links6(&mut route, &config)?;
        } else {
            tracing::warn!("this kernel has IPv6 off (ipv6.disable=1): workloads have IPv4 addresses only");
        }
        remove_strays(&mut route, &pins, &addresses)?;
        let limited = bandwidth::found(&route::links(&mut route)?);
        let express = express(&mut route, &config, &addresses)?;
        let links: Vec<_> = addresses.iter().map(|(_, lease)| link_of(&config, lease.kind, lease.address)).collect();
        let fresh = firewall::ensure(&mut socket, &config, &links)?;
        let (services, policies) = if fresh { (Services::none(), Programmed::none()) } else { Default::default() };
        Ok(Router {
            netns,
            ipv6,
            route: Mutex::new(route),
            reaper: Mutex::new(reaper),
            firewall: Mutex::new(Firewall { socket, services, policies }),
            express,
            addresses: Mutex::new(addresses),
            names: NameLocks::default(),
            pool: Pool::default(),
            bandwidths: Mutex::new(limited),
            uplink: Mutex::new(None),
            relay: Mutex::new(None),
            by_name: Arc::new(Names::new(of_names, &config)),
            activator: Mutex::default(),
            config,
            _lock: lock,
        })
    }

    pub fn config(&self) -> &RouterConfig {
        &self.config
    }
    /// Whether workloads have IPv6 addresses: the kernel has IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }
    /// Whether packets of known flows go from link to link past the firewall: this kernel takes programs for links.
    pub fn has_short_way(&self) -> bool {
        self.express.is_some()
    }
    /// Where the router's namespace is pinned.
    pub fn netns_path(&self) -> PathBuf {
        pins_dir(&self.config).join(ROUTER)
    }
    pub(crate) fn pin_of(&self, uid: &str) -> PathBuf {
        pins_dir(&self.config).join(uid)
    }
    /// Moves the calling thread into the router's namespace; threads started from it later are there too.
    pub fn enter_thread(&self) -> Result<()> {
        ns::enter(self.netns.as_fd())
    }
    /// Runs `work` in the router's namespace on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        ns::in_ns(self.netns.as_fd(), work)
    }

    /// Makes the kernel's ClusterIPs exactly these, in one transaction; nothing is sent when nothing changed. Answers
    /// how many service ports changed.
    pub fn sync_services(&self, rules: &[ServiceRule]) -> Result<usize> {
        let changed = self
            .with_services(rules, |services, socket, activation| services.sync(socket, rules, activation).map(Some));
        Ok(changed?.unwrap_or_default())
    }

    /// Replaces some rules by others, as [`Self::sync_services`] does with all. The cost is that of these rules and, in the
    /// kernel, of looking at all once. `None`, and nothing done, before all were handed over once.
    pub fn change_services(&self, before: &[ServiceRule], after: &[ServiceRule]) -> Result<Option<usize>> {
        self.with_services(after, |services, socket, activation| services.change(socket, before, after, activation))
    }

    fn with_services(
        &self,
        rules: &[ServiceRule],
        change: impl FnOnce(&mut Services, &mut Socket, &Activation<'_>) -> Result<Option<usize>>,
    ) -> Result<Option<usize>> {
        if let Some(rule) = rules.iter().find(|rule| !self.config.serves(rule.cluster_ip)) {
            let (v4, v6) = (self.config.service_cidr, self.config.service_cidr6);
            return Err(Error::Config {
                field: "cluster_ip",
                value: rule.cluster_ip.to_string(),
                why: format!("of service {}/{} is not in {v4} or {v6}", rule.namespace, rule.name),
            });
        }
        let listeners = guard(&self.activator).clone();
        let mut firewall = guard(&self.firewall);
        let Firewall { socket, services, policies } = &mut *firewall;
        let activation = Activation { listeners: &listeners, who: &|namespace| policies.who(namespace) };
        let changed = change(services, socket, &activation);
        if !matches!(changed, Ok(None | Some(0))) {
            self.forget_flows()?;
        }
        changed
    }

    /// What connections were allowed is asked again; after every change that may refuse some, or lead it elsewhere.
    fn forget_flows(&self) -> Result<()> {
        match &self.express {
            Some(express) => express.forget().map_err(Error::system("end the short ways")),
            None => Ok(()),
        }
    }

    /// Makes the kernel enforce exactly these policies, in one transaction, then ends connections that are no longer
    /// allowed. A workload that is not in them reaches nobody; those that are not attached are left out.
    pub fn sync_policies(&self, policies: Policies) -> Result<Changed> {
        let mut policies = policies;
        let mut firewall = guard(&self.firewall);
        let live: HashSet<Ipv4Addr> = guard(&self.addresses).iter().map(|(_, lease)| lease.address).collect();
        policies.workloads.retain(|address, _| live.contains(address));
        let Firewall { socket, policies: programmed, services } = &mut *firewall;
        let changed = programmed.sync(socket, &self.config, &self.by_name, policies);
        if !matches!(changed, Ok(Changed { objects: 0, ended: 0 })) {
            self.forget_flows()?;
            let listeners = guard(&self.activator).clone();
            let who = |namespace: &str| programmed.who(namespace);
            services.renumber(socket, &Activation { listeners: &listeners, who: &who })?;
        }
        changed
    }

    /// What is reached by name.
    pub fn by_name(&self) -> &Arc<Names> {
        &self.by_name
    }

    /// Workloads that have an address here, with it.
    pub fn leases(&self) -> Vec<Leased> {
        let addresses = guard(&self.addresses);
        let leased = |(uid, lease): (&String, &Lease)| Leased {
            uid: uid.clone(),
            namespace: lease.namespace.clone(),
            address: lease.address,
        };
        addresses.iter().map(leased).collect()
    }

    /// Workloads that have an address here, attached since the last reboot or not.
    pub fn list(&self) -> Vec<String> {
        guard(&self.addresses).iter().map(|(uid, _)| uid.clone()).collect()
    }

    /// Keys ([`crate::AttachRequest::address_key`]) whose address no workload has at present.
    pub fn idle_addresses(&self) -> Vec<String> {
        guard(&self.addresses).idle()
    }

    /// Ends the reservation of an idle key; when its owner is deleted for good. One that is not idle is left alone.
    pub fn release_address(&self, key: &str) -> Result<()> {
        guard(&self.addresses).forget(key)
    }

    /// Removes all links and namespaces. Address reservations stay on disk, so that workloads started again get the
    /// addresses they had.
    pub fn teardown(self) -> Result<()> {
        self.stop_preparing();
        let pins = pins_dir(&self.config);
        let mut batch = Batch::new();
        batch.delete_links(route::GROUP);
        batch.delete_links(route::DEAD);
        guard(&self.route).send(batch)?;
        for entry in fs::read_dir(&pins).map_err(Error::file("list", &pins))? {
            ns::unpin(&entry.map_err(Error::file("list", &pins))?.path())?;
        }
        ns::unshare_dir(&pins)?;
        fs::remove_dir(&pins).map_err(Error::file("remove", &pins))
    }
}

/// How long the kernel remembers an idle connection by default.
const ESTABLISHED_SECONDS: &str = "432000";

/// A poisoned lock's data is still whole: changes are made by the kernel or the journal first.
pub(crate) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pins_dir(config: &RouterConfig) -> PathBuf {
    config.run_dir.join("netns")
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::file("create", path))
}

/// A program that its last holder was about to execute has the lock too, for a moment: until it is executed.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(Error::file("open", path))?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            Err(Errno::WOULDBLOCK) => return Err(Error::InUse { path: path.to_owned() }),
            Err(errno) => return Err(Error::file("lock", path)(errno.into())),
        }
    }
}

/// The calling thread's namespace becomes a router that believes nobody. Links made later inherit `default`.
fn sysctls() -> Result<()> {
    for scope in ["all", "default"] {
        for (name, value) in [
            ("rp_filter", "1"),
            ("accept_redirects", "0"),
            ("secure_redirects", "0"),
            ("send_redirects", "0"),
            ("accept_source_route", "0"),
        ] {
            ns::sysctl(&format!("ipv4/conf/{scope}/{name}"), value)?;
        }
        for (name, value) in [
            ("disable_ipv6", "0"),
            ("accept_ra", "0"),
            ("accept_redirects", "0"),
            ("accept_source_route", "-1"),
            ("addr_gen_mode", NO_ADDRESS),
            ("forwarding", "1"),
        ] {
            ns::sysctl(&format!("ipv6/conf/{scope}/{name}"), value)?;
        }
    }
    // A workload whose image knows only a wide netmask finds its neighbours through the router.
    ns::sysctl("ipv4/conf/default/proxy_arp", "1")?;
    ns::sysctl("ipv4/neigh/default/proxy_delay", "0")?;
    // A connection that was ended stays ended: packets in its middle do not open it again.
    ns::sysctl("netfilter/nf_conntrack_tcp_loose", "0")?;
    // Of packets that take the short way the tracker sees one every two seconds: neither sequence numbers nor
    // acknowledgements that it has missed end a connection.
    ns::sysctl("netfilter/nf_conntrack_tcp_be_liberal", "1")?;
    ns::sysctl("netfilter/nf_conntrack_tcp_timeout_unacknowledged", ESTABLISHED_SECONDS)?;
    // Refusals are errors that clients see at once; one every 10 ms for each destination.
    ns::sysctl("ipv4/icmp_ratelimit", "10")?;
    ns::sysctl("ipv6/icmp/ratelimit", "10")?;
    // Refusals of what the relay sent find the way back that its mark gives them.
    ns::sysctl("ipv4/fwmark_reflect", "1")?;
    ns::sysctl("ipv6/fwmark_reflect", "1")?;
    // What is forwarded need not be looked for among sockets first; and the kernel drops a SYN that finds the rest of an
    // earlier connection of the relay's that way.
    ns::sysctl("ipv4/ip_early_demux", "0")?;
    ns::sysctl("ipv4/ip_forward", "1")
}

/// Loopback with the router's addresses. Service addresses, pod addresses that nobody has and the outside are routed to
/// loopback only so that they have a route: they are redirected, or refused as any other, before a packet gets there.
fn base_links(route: &mut Socket, config: &RouterConfig) -> Result<()> {
    let (lo, router) = (route::LOOPBACK, config.router_address());
    let mut batch = Batch::new();
    batch.set_up(lo);
    for address in [router, GATEWAY, config.dns_address] {
        batch.add_address(lo, address);
    }
    let networks = config.networks().v4.into_iter().map(|network| (network.base(), network.prefix()));
    for (base, prefix) in networks.chain([(NODE, 32), (Ipv4Addr::UNSPECIFIED, 0)]) {
        batch.add_link_route(base, prefix, lo, router);
    }
    batch.deliver_marked(false, firewall::RELAYED, RELAY_TABLE, Some(WIDE));
    batch.deliver_marked(false, firewall::TO_ACTIVATOR, RELAY_TABLE, None);
    route.send(batch)
}

/// The same for IPv6, with [`VOID`] in loopback's place.
fn base_links6(route: &mut Socket, config: &RouterConfig) -> Result<()> {
    if route::find_link(route, VOID)?.is_none() {
        let mut batch = Batch::new();
        let [mac, peer_mac] = [[0x0a, 0x58, 0, 0, 0, 1], [0x0a, 0x58, 0, 0, 0, 2]];
        let (name, peer_name, mtu) = (VOID, VOID_PEER, crate::config::MTU);
        batch.add_veth(&Veth { name, mac, peer_name, peer_mac, peer_ns: None, mtu });
        route.send(batch)?;
        let void = route::link_index(route, VOID)?;
        let mut batch = Batch::new();
        batch.regroup_link(VOID, route::BASE);
        batch.set_up_without_neighbours(void);
        route.send(batch)?;
    }
    let (void, router) = (route::link_index(route, VOID)?, config.router_address6());
    let mut batch = Batch::new();
    for address in [router, config.dns_address6()] {
        batch.add_address6(route::LOOPBACK, address);
    }
    let networks = config.networks().v6.into_iter().map(|network| (network.base(), network.prefix()));
    for (base, prefix) in networks.chain([(Ipv6Addr::UNSPECIFIED, 0)]) {
        batch.add_link_route6(base, prefix, void, router);
    }
    batch.deliver_marked(true, firewall::RELAYED, RELAY_TABLE, Some(WIDE));
    batch.deliver_marked(true, firewall::TO_ACTIVATOR, RELAY_TABLE, None);
    route.send(batch)
}

/// The short way for the links that are there. Where it cannot be made they are rid of an earlier process's, which would
/// not hear of changes.
fn express(route: &mut Socket, config: &RouterConfig, addresses: &Addresses) -> Result<Option<Arc<Express>>> {
    let express = match Express::load() {
        Ok(express) => Some(Arc::new(express)),
        Err(error) => {
            tracing::info!(%error, "this kernel takes no programs for links: packets between workloads take the long way");
            None
        }
    };
    let mut batch = Batch::new();
    for link in route::links(route)? {
        let owner = addresses.iter().find(|(_, lease)| link_name(lease.kind, lease.address) == link.name);
        match (&express, owner) {
            (Some(express), Some((_, lease))) => {
                express.attach(&mut batch, link.index);
                let mut owner = owner_of(config, lease.kind, lease.address, link.index);
                owner.shaped = link.shaped;
                express.admit(owner).map_err(Error::system("let the link take the short way"))?;
            }
            (None, Some(_)) => batch.remove_programs(link.index),
            (_, None) => {}
        }
    }
    route.send(batch)?;
    Ok(express)
}

/// Links and pinned namespaces that no allocation speaks for: what a lost journal or a half-done detach left.
fn remove_strays(route: &mut Socket, pins: &Path, addresses: &Addresses) -> Result<()> {
    let names = |lease: &Lease| [link_name(lease.kind, lease.address), bandwidth::detour_name(lease.address)];
    let known: HashSet<String> = addresses.iter().flat_map(|(_, lease)| names(lease)).collect();
    let mut batch = Batch::new();
    for link in route::links(route)? {
        let ours = link.group == route::GROUP || link.group == route::DEAD;
        if ours && link.name != uplink::LINK && !known.contains(&link.name) {
            batch.delete_link(&link.name);
        }
    }
    route.send(batch)?;
    for entry in fs::read_dir(pins).map_err(Error::file("list", pins))? {
        let path = entry.map_err(Error::file("list", pins))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name != ROUTER && addresses.get(name).is_none() {
            ns::unpin(&path)?;
        }
    }
    Ok(())
}
