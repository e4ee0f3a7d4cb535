//! Subnets: networks beside `pod_cidr` that workloads have their addresses of. They are cut from
//! [`RouterConfig::subnet_cidr`], which routes, firewall and DNS know as workloads' from the beginning, so that a subnet that
//! comes or goes changes nothing but who may get an address of it; and, with a link to the host, a route there.

use crate::config::{Cidr, Cidr6, GATEWAY, RouterConfig};
use crate::error::{Error, Result};
use crate::netlink::{Socket, route};
use crate::ns;
use crate::router::{Router, guard};
use crate::uplink;
use rustix::fd::BorrowedFd;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};

/// A network that workloads may have their addresses of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// `<namespace>/<name>`.
    pub name: String,
    pub cidr: Cidr,
    /// `None`: the part of [`RouterConfig::subnet_cidr6`] that goes with `cidr`.
    pub cidr6: Option<Cidr6>,
}

/// Why a subnet cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    Invalid(String),
    Overlaps(String),
    /// The namespace would have more than its share.
    Share(String),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Misfit::Invalid(why) | Misfit::Overlaps(why) | Misfit::Share(why) => f.write_str(why),
        }
    }
}

/// A subnet and who has addresses of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetUse {
    pub subnet: Subnet,
    /// Addresses that workloads have, and those kept for workloads to come.
    pub used: usize,
    pub free: usize,
    /// Uids.
    pub workloads: Vec<String>,
    /// Keys ([`crate::AttachRequest::address_key`]) whose address no workload has at present.
    pub kept: Vec<String>,
}

/// Subnets with IPv6 networks of their own.
#[derive(Clone, Debug, Default)]
pub struct Pairs(Arc<RwLock<Vec<(Cidr, Cidr6)>>>);

impl Pairs {
    pub(crate) fn set(&self, pairs: Vec<(Cidr, Cidr6)>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pairs;
    }
    pub(crate) fn v6_of(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let pairs = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let pair = pairs.iter().find(|(cidr, _)| cidr.contains(address));
        pair.map(|(cidr, cidr6)| cidr6.paired(*cidr, address))
    }
    pub(crate) fn v4_of(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let pairs = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pairs.iter().find_map(|(cidr, cidr6)| cidr6.pair_of(*cidr, address))
    }
}

impl RouterConfig {
    /// Whether a subnet can be here, whatever others there are.
    pub fn check_subnet(&self, cidr: Cidr, cidr6: Option<Cidr6>) -> std::result::Result<(), Misfit> {
        let overlaps =
            |what: &str, other: &dyn fmt::Display| Err(Misfit::Overlaps(format!("overlaps {what}, {other}")));
        for (what, other) in [("workloads' network", self.pod_cidr), ("Services' network", self.service_cidr)] {
            if cidr.overlaps(other) {
                return overlaps(what, &other);
            }
        }
        if let Some(what) = reserved(cidr) {
            return Err(Misfit::Overlaps(format!("overlaps {what}")));
        }
        if !self.subnet_cidr.covers(cidr) {
            let own = self.subnet_cidr;
            return Err(Misfit::Invalid(format!("{cidr} is not inside {own}, where Networks may be here ({FLAG})")));
        }
        let Some(cidr6) = cidr6 else { return Ok(()) };
        for (what, other) in [("workloads' network", self.pod_cidr6), ("Services' network", self.service_cidr6)] {
            if cidr6.overlaps(other) {
                return overlaps(what, &other);
            }
        }
        if !self.subnet_cidr6.covers(cidr6) {
            let own = self.subnet_cidr6;
            return Err(Misfit::Invalid(format!("{cidr6} is not inside {own}, where Networks may be here ({FLAG})")));
        }
        if !cidr6.reaches(cidr.size() - 1) {
            return Err(Misfit::Invalid(format!(
                "{cidr6} is smaller than {cidr}: every workload has an address in both"
            )));
        }
        let (first, last) = self.common6();
        if cidr6.contains(first) || cidr6.contains(last) || (first..=last).contains(&cidr6.base()) {
            return overlaps("the IPv6 addresses of Networks that name none", &format!("{first} to {last}"));
        }
        Ok(())
    }
}

impl RouterConfig {
    /// Whether the namespace of a subnet that comes still has no more than its share.
    fn check_share<'a>(
        &self,
        subnet: &'a Subnet,
        others: impl Iterator<Item = &'a Subnet>,
    ) -> std::result::Result<(), Misfit> {
        let namespace = subnet.namespace();
        let own: Vec<&Subnet> = others.filter(|other| other.namespace() == namespace).chain([subnet]).collect();
        let too_much = |sum: u128, most: u128, of: &dyn fmt::Display| {
            Err(Misfit::Share(format!(
                "with it the Networks of namespace {namespace} would have {sum} addresses; its share of {of} is {most} \
                 (atoll up --subnet-share)"
            )))
        };
        let share = self.subnet_share.max(1);
        let (sum, most) = (own.iter().map(|own| own.cidr.size()).sum::<u32>(), self.subnet_cidr.size() / share);
        if sum > most.max(SMALLEST) {
            return too_much(sum.into(), most.max(SMALLEST).into(), &self.subnet_cidr);
        }
        let sum = own.iter().filter_map(|own| own.cidr6).map(Cidr6::size).sum::<u128>();
        let most = (self.subnet_cidr6.size() / u128::from(share)).max(SMALLEST.into());
        if sum > most { too_much(sum, most, &self.subnet_cidr6) } else { Ok(()) }
    }
}

/// Addresses of the smallest subnet: that much a namespace always has.
const SMALLEST: u32 = 16;
/// How an administrator says where Networks may be.
const FLAG: &str = "atoll up --subnet-cidr";

/// What no workload can have an address of.
fn reserved(cidr: Cidr) -> Option<&'static str> {
    match cidr.base().octets()[0] {
        0 => Some("0.0.0.0/8, which is nobody's"),
        127 => Some("loopback, 127.0.0.0/8"),
        224.. => Some("multicast and reserved addresses, 224.0.0.0/3"),
        _ if cidr.contains(GATEWAY) => Some("link-local addresses, 169.254.0.0/16"),
        _ => None,
    }
}

impl Router {
    /// Lets workloads have addresses of a subnet; one that is there is left as it is. `host` is asked for routes of its own.
    pub fn add_subnet(&self, host: Option<BorrowedFd<'_>>, subnet: &Subnet) -> Result<()> {
        let misfit = |why| Error::Subnet { name: subnet.name.clone(), why };
        if guard(&self.addresses).subnets().any(|known| known == subnet) {
            return Ok(());
        }
        self.config.check_subnet(subnet.cidr, subnet.cidr6).map_err(misfit)?;
        if let Some(host) = host {
            self.check_host(host, subnet)?.map_or(Ok(()), |why| Err(misfit(why)))?;
        }
        {
            let mut addresses = guard(&self.addresses);
            if !addresses.remove_subnet(&subnet.name)? {
                let why = "an earlier Network of this name still has addresses in use".to_owned();
                return Err(misfit(Misfit::Overlaps(why)));
            }
            if let Some(other) = addresses.subnets().find(|known| known.overlaps(subnet)) {
                let why = format!("overlaps Network {}, {}", other.name, other.networks());
                return Err(misfit(Misfit::Overlaps(why)));
            }
            self.config.check_share(subnet, addresses.subnets()).map_err(misfit)?;
            addresses.add_subnet(subnet)?;
            self.config.pairs.set(addresses.pairs());
        }
        self.route_subnets()
    }

    /// Ends a subnet that nobody has an address of. Answers whether it has ended.
    pub fn remove_subnet(&self, name: &str) -> Result<bool> {
        {
            let mut addresses = guard(&self.addresses);
            if !addresses.remove_subnet(name)? {
                return Ok(false);
            }
            self.config.pairs.set(addresses.pairs());
        }
        self.route_subnets()?;
        Ok(true)
    }

    pub fn subnets(&self) -> Vec<SubnetUse> {
        guard(&self.addresses).uses()
    }

    /// A route of the host's own into the subnet, or a link of its own around it.
    fn check_host(&self, host: BorrowedFd<'_>, subnet: &Subnet) -> Result<Option<Misfit>> {
        let uplink = uplink::host_name(&self.config).unwrap_or_default();
        let found = ns::in_ns(host, || {
            let mut socket = Socket::route()?;
            let mut all = route::routes(&mut socket, false)?;
            all.extend(route::routes(&mut socket, true)?);
            Ok::<_, Error>((all, route::links(&mut socket)?))
        })?;
        let (routes, links) = found?;
        for found in routes.iter().filter(|found| subnet.is_hidden_by(found)) {
            let by = links.iter().find(|link| link.index == found.link).map_or("", |link| link.name.as_str());
            if by != uplink {
                let why = format!("overlaps the host's {}/{} by {by}", found.base, found.prefix);
                return Ok(Some(Misfit::Overlaps(why)));
            }
        }
        Ok(None)
    }
}

impl Subnet {
    fn namespace(&self) -> &str {
        self.name.split_once('/').map_or(&*self.name, |(namespace, _)| namespace)
    }

    fn overlaps(&self, other: &Subnet) -> bool {
        let six = self.cidr6.zip(other.cidr6).is_some_and(|(own, other)| own.overlaps(other));
        self.cidr.overlaps(other.cidr) || six
    }

    fn networks(&self) -> String {
        self.cidr6.map_or_else(|| self.cidr.to_string(), |cidr6| format!("{} and {cidr6}", self.cidr))
    }

    /// A more specific route, or a link's own network: the one would lead elsewhere, the other is hidden.
    fn is_hidden_by(&self, route: &route::Route) -> bool {
        let around = |own: u8, inside: bool, holds: bool| {
            (route.prefix >= own && inside) || (!route.via && route.prefix > 0 && holds)
        };
        match route.base {
            IpAddr::V4(base) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(route.prefix.min(32))).unwrap_or(0);
                around(
                    self.cidr.prefix(),
                    self.cidr.contains(base),
                    (self.cidr.base().to_bits() ^ base.to_bits()) & mask == 0,
                )
            }
            IpAddr::V6(base) => self.cidr6.is_some_and(|own| {
                let mask = u128::MAX.checked_shl(128 - u32::from(route.prefix.min(128))).unwrap_or(0);
                around(own.prefix(), own.contains(base), (own.base().to_bits() ^ base.to_bits()) & mask == 0)
            }),
        }
    }
}
