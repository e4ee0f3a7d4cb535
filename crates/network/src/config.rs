//! What a router is made from, checked once.

use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::subnets::Pairs;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

/// Every workload's next hop, on-link on its one interface.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Bytes, on every link.
pub const MTU: u32 = 1500;

/// An IPv4 network; host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    base: u32,
    prefix: u8,
}

impl Cidr {
    pub fn new(base: Ipv4Addr, prefix: u8) -> Result<Cidr> {
        let error = |why: &str| Error::Config { field: "cidr", value: format!("{base}/{prefix}"), why: why.to_owned() };
        if !(8..=28).contains(&prefix) {
            return Err(error("the prefix length must be 8 to 28"));
        }
        let cidr = Cidr { base: base.to_bits(), prefix };
        if cidr.base & !cidr.mask() != 0 {
            return Err(error("the address has bits below the prefix; zero them"));
        }
        Ok(cidr)
    }
    pub fn base(self) -> Ipv4Addr {
        self.base.into()
    }
    pub fn prefix(self) -> u8 {
        self.prefix
    }
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.base
    }
    pub fn overlaps(self, other: Cidr) -> bool {
        self.contains(other.base()) || other.contains(self.base())
    }
    pub fn covers(self, other: Cidr) -> bool {
        other.prefix >= self.prefix && self.contains(other.base())
    }
    /// Number of addresses.
    pub fn size(self) -> u32 {
        1 << (32 - u32::from(self.prefix))
    }
    /// The `n`th address, wrapping inside the network.
    pub(crate) fn nth(self, n: u32) -> Ipv4Addr {
        (self.base + n % self.size()).into()
    }
    pub(crate) fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = Error;
    fn from_str(text: &str) -> Result<Cidr> {
        let error = || Error::Config {
            field: "cidr",
            value: text.to_owned(),
            why: "not an IPv4 network; write it like 10.42.0.0/16".to_owned(),
        };
        let (base, prefix) = text.split_once('/').ok_or_else(error)?;
        Cidr::new(base.parse().map_err(|_| error())?, prefix.parse().map_err(|_| error())?)
    }
}

impl serde::Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Cidr {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Cidr, D::Error> {
        <std::borrow::Cow<'de, str>>::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An IPv6 network; host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr6 {
    base: u128,
    prefix: u8,
}

impl Cidr6 {
    pub fn new(base: Ipv6Addr, prefix: u8) -> Result<Cidr6> {
        let error = |why: &str| Error::Config { field: "cidr", value: format!("{base}/{prefix}"), why: why.to_owned() };
        if !(16..=124).contains(&prefix) {
            return Err(error("the prefix length must be 16 to 124"));
        }
        let cidr = Cidr6 { base: base.to_bits(), prefix };
        if cidr.base & !cidr.mask() != 0 {
            return Err(error("the address has bits below the prefix; zero them"));
        }
        Ok(cidr)
    }
    pub fn base(self) -> Ipv6Addr {
        self.base.into()
    }
    pub fn prefix(self) -> u8 {
        self.prefix
    }
    pub fn contains(self, address: Ipv6Addr) -> bool {
        address.to_bits() & self.mask() == self.base
    }
    pub fn overlaps(self, other: Cidr6) -> bool {
        self.contains(other.base()) || other.contains(self.base())
    }
    pub fn covers(self, other: Cidr6) -> bool {
        other.prefix >= self.prefix && self.contains(other.base())
    }
    /// Number of addresses.
    pub(crate) fn size(self) -> u128 {
        1 << (128 - u32::from(self.prefix))
    }
    /// The `n`th address.
    fn nth(self, n: u32) -> Ipv6Addr {
        (self.base | (u128::from(n) & !self.mask())).into()
    }
    /// What is as far from the beginning as `address` is in `other`.
    pub(crate) fn paired(self, other: Cidr, address: Ipv4Addr) -> Ipv6Addr {
        self.nth(address.to_bits() & !other.mask())
    }
    /// Undoes [`Cidr6::paired`].
    pub(crate) fn pair_of(self, other: Cidr, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let offset = self.contains(address).then(|| address.to_bits() & !self.mask())?;
        u32::try_from(offset).ok().filter(|n| *n < other.size()).map(|n| other.nth(n))
    }
    fn mask(self) -> u128 {
        u128::MAX << (128 - u32::from(self.prefix))
    }
    /// Whether what is `n` addresses from the beginning is in it.
    pub(crate) fn reaches(self, n: u32) -> bool {
        u128::from(n) & self.mask() == 0
    }
}

impl fmt::Display for Cidr6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix)
    }
}

impl FromStr for Cidr6 {
    type Err = Error;
    fn from_str(text: &str) -> Result<Cidr6> {
        let error = || Error::Config {
            field: "cidr",
            value: text.to_owned(),
            why: "not an IPv6 network; write it like fd00:10:42::/64".to_owned(),
        };
        let (base, prefix) = text.split_once('/').ok_or_else(error)?;
        Cidr6::new(base.parse().map_err(|_| error())?, prefix.parse().map_err(|_| error())?)
    }
}

impl serde::Serialize for Cidr6 {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Cidr6 {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Cidr6, D::Error> {
        <std::borrow::Cow<'de, str>>::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Networks of both families.
#[derive(Clone, Debug, Default)]
pub struct Networks {
    pub v4: Vec<Cidr>,
    pub v6: Vec<Cidr6>,
}

impl Networks {
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.iter().any(|network| network.contains(address)),
            IpAddr::V6(address) => self.v6.iter().any(|network| network.contains(address)),
        }
    }
}

#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// `DATA/network`: address allocations.
    pub data_dir: PathBuf,
    /// `/run/atoll/<instance>`: pinned namespaces below `netns/`; gone after a reboot.
    pub run_dir: PathBuf,
    /// Workloads' addresses. The first is the router's own.
    pub pod_cidr: Cidr,
    /// Workloads' IPv6 addresses, each as far from the beginning as the workload's IPv4 address is in `pod_cidr`.
    pub pod_cidr6: Cidr6,
    /// One part in so many of `subnet_cidr`, and of `subnet_cidr6`, is what a namespace's subnets may have together.
    pub subnet_share: u32,
    /// Where subnets ([`crate::Subnet`]) may be.
    pub subnet_cidr: Cidr,
    pub subnet_cidr6: Cidr6,
    /// IPv6 networks of subnets that have one of their own; clones share them.
    pub pairs: Pairs,
    /// ClusterIPs.
    pub service_cidr: Cidr,
    pub service_cidr6: Cidr6,
    /// The DNS server's address, inside `service_cidr`; its IPv6 address is as far into `service_cidr6`.
    pub dns_address: Ipv4Addr,
    pub limits: Limits,
    /// The command that plays [`crate::relay::main`], without its last argument.
    pub relay: Vec<String>,
    /// Whether an uplink may lead IPv6 out by `force_forwarding`, where the kernel has it.
    pub force_forwarding: bool,
}

impl RouterConfig {
    /// The networks that `atoll up` takes unless it is told others.
    pub fn new(data_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> RouterConfig {
        RouterConfig {
            data_dir: data_dir.into(),
            run_dir: run_dir.into(),
            pod_cidr: Cidr { base: Ipv4Addr::new(10, 42, 0, 0).to_bits(), prefix: 16 },
            pod_cidr6: Cidr6 { base: Ipv6Addr::new(0xfd00, 0x10, 0x42, 0, 0, 0, 0, 0).to_bits(), prefix: 64 },
            subnet_cidr: Cidr { base: Ipv4Addr::new(10, 44, 0, 0).to_bits(), prefix: 16 },
            subnet_cidr6: Cidr6 { base: Ipv6Addr::new(0xfd00, 0x10, 0x44, 0, 0, 0, 0, 0).to_bits(), prefix: 48 },
            subnet_share: 8,
            pairs: Pairs::default(),
            service_cidr: Cidr { base: Ipv4Addr::new(10, 43, 0, 0).to_bits(), prefix: 16 },
            service_cidr6: Cidr6 { base: Ipv6Addr::new(0xfd00, 0x10, 0x43, 0, 0, 0, 0, 0).to_bits(), prefix: 112 },
            dns_address: Ipv4Addr::new(10, 43, 0, 10),
            limits: Limits::default(),
            relay: vec!["/proc/self/exe".to_owned(), "egress-relay".to_owned()],
            force_forwarding: true,
        }
    }
    /// Whether Services may have this address.
    pub fn serves(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.service_cidr.contains(address) || address == crate::NODE,
            IpAddr::V6(address) => self.service_cidr6.contains(address),
        }
    }
    /// Whether someone outside can have this address: it is no workload's, no Service's, not for one machine, link or group
    /// alone.
    pub fn is_foreign(&self, address: IpAddr) -> bool {
        if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
            return false;
        }
        match address {
            IpAddr::V4(own) => {
                let nobodys = own.octets()[0] == 0 || own.octets()[0] >= 240 || own.is_link_local();
                !nobodys && !self.is_workloads(own) && !self.service_cidr.contains(own)
            }
            IpAddr::V6(own) => {
                let mapped = own.to_ipv4_mapped().is_some() || own.is_unicast_link_local();
                let ours = [self.pod_cidr6, self.subnet_cidr6, self.service_cidr6];
                !mapped && !ours.into_iter().any(|network| network.contains(own))
            }
        }
    }
    /// The router's address towards workloads: the source of its own connections, probes and hairpins.
    pub fn router_address(&self) -> Ipv4Addr {
        self.pod_cidr.nth(1)
    }
    pub fn router_address6(&self) -> Ipv6Addr {
        self.v6_of(self.router_address())
    }
    /// The host's IPv6 address on the link to it, where its refusals come from: the last of `pod_cidr`'s, which no workload has.
    pub(crate) fn host_address6(&self) -> Ipv6Addr {
        self.v6_of(self.pod_cidr.nth(self.pod_cidr.size() - 1))
    }
    /// Whether workloads can have this address.
    pub fn is_workloads(&self, address: Ipv4Addr) -> bool {
        self.pod_cidr.contains(address) || self.subnet_cidr.contains(address)
    }
    /// The IPv6 address that goes with a workload's address: as far from the beginning of its subnet's own IPv6 network, or
    /// else of the one that goes with `pod_cidr` or `subnet_cidr`.
    pub fn v6_of(&self, address: Ipv4Addr) -> Ipv6Addr {
        if !self.subnet_cidr.contains(address) {
            return self.pod_cidr6.paired(self.pod_cidr, address);
        }
        self.pairs.v6_of(address).unwrap_or_else(|| self.subnet_cidr6.paired(self.subnet_cidr, address))
    }
    /// The IPv4 address that goes with an IPv6 address, if that is one that a workload can have.
    pub fn v4_of(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        if let Some(found) = self.pod_cidr6.pair_of(self.pod_cidr, address) {
            return Some(found);
        }
        self.subnet_cidr6.contains(address).then_some(())?;
        let common = || self.subnet_cidr6.pair_of(self.subnet_cidr, address);
        self.pairs.v4_of(address).or_else(common).filter(|found| self.v6_of(*found) == address)
    }
    /// The part of `subnet_cidr6` that goes with `subnet_cidr`, first and last.
    pub(crate) fn common6(&self) -> (Ipv6Addr, Ipv6Addr) {
        (self.subnet_cidr6.base(), self.subnet_cidr6.nth(self.subnet_cidr.size() - 1))
    }
    pub fn dns_address6(&self) -> Ipv6Addr {
        self.service_cidr6.nth(self.dns_address.to_bits() & !self.service_cidr.mask())
    }
    /// All workloads' and Services' addresses, and what subnets may be cut from.
    pub fn networks(&self) -> Networks {
        Networks {
            v4: vec![self.pod_cidr, self.service_cidr, self.subnet_cidr],
            v6: vec![self.pod_cidr6, self.service_cidr6, self.subnet_cidr6],
        }
    }
    /// Whether such a router can be: what [`crate::Router::open`] checks first.
    pub fn check(&self) -> Result<()> {
        let error = |field, value: String, why: &str| Err(Error::Config { field, value, why: why.to_owned() });
        let (pods, services) = (self.pod_cidr, self.service_cidr);
        if pods.overlaps(services) {
            return error("service_cidr", services.to_string(), "overlaps pod_cidr; choose networks that do not");
        }
        let subnets = self.subnet_cidr;
        for (other, cidr) in [("pod_cidr", pods), ("service_cidr", services)] {
            if subnets.overlaps(cidr) {
                return error("subnet_cidr", subnets.to_string(), &format!("overlaps {other} {cidr}"));
            }
        }
        for (field, cidr) in [("pod_cidr", pods), ("service_cidr", services), ("subnet_cidr", subnets)] {
            let base = cidr.base();
            let taken = [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED, GATEWAY, Ipv4Addr::new(224, 0, 0, 0)];
            if taken.into_iter().any(|a| cidr.contains(a)) || base.octets()[0] == 127 || base.octets()[0] >= 224 {
                return error(field, cidr.to_string(), "not a unicast network of your own; take one like 10.42.0.0/16");
            }
        }
        if !services.contains(self.dns_address) {
            return error("dns_address", self.dns_address.to_string(), "must be inside service_cidr");
        }
        self.limits.check()?;
        self.check6()
    }

    fn check6(&self) -> Result<()> {
        let error = |field, value: Cidr6, why: String| Err(Error::Config { field, value: value.to_string(), why });
        let (pods, services) = (self.pod_cidr6, self.service_cidr6);
        let subnets = self.subnet_cidr6;
        for (field, cidr) in [("pod_cidr", pods), ("service_cidr", services), ("subnet_cidr", subnets)] {
            // Global (2000::/3) or unique local (fc00::/7) unicast; a short prefix of anything else would cover more.
            let first = cidr.base().segments()[0];
            if first & 0xe000 != 0x2000 && first & 0xfe00 != 0xfc00 {
                let why = "not a global or unique local unicast network; take one like fd00:10:42::/64";
                return error(field, cidr, why.to_owned());
            }
        }
        if pods.overlaps(services) {
            return error("service_cidr", services, "overlaps pod_cidr; choose networks that do not".to_owned());
        }
        if !pods.reaches(self.pod_cidr.size() - 1) {
            let why = format!("is smaller than {}; every workload has an address in both", self.pod_cidr);
            return error("pod_cidr", pods, why);
        }
        for (other, cidr) in [("pod_cidr", pods), ("service_cidr", services)] {
            if subnets.overlaps(cidr) {
                return error("subnet_cidr", subnets, format!("overlaps {other} {cidr}"));
            }
        }
        if !subnets.reaches(self.subnet_cidr.size() - 1) {
            let why = format!("is smaller than {}; every workload has an address in both", self.subnet_cidr);
            return error("subnet_cidr", subnets, why);
        }
        if !services.reaches(self.dns_address.to_bits() & !self.service_cidr.mask()) {
            let why =
                format!("has no room for the DNS server's address, which is as far into it as {}", self.dns_address);
            return error("service_cidr", services, why);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_parse_and_refuse() {
        let cidr: Cidr = "10.42.0.0/16".parse().unwrap();
        assert!(cidr.contains(Ipv4Addr::new(10, 42, 255, 1)) && !cidr.contains(Ipv4Addr::new(10, 43, 0, 1)));
        assert_eq!(cidr.size(), 65536);
        for bad in ["", "10.42.0.0", "10.42.0.1/16", "10.0.0.0/7", "10.0.0.0/29", "10.0.0/16", "a/b", "10.0.0.0/-1"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn overlapping_networks_are_refused() {
        let config = |pods: &str, services: &str, dns: &str| RouterConfig {
            pod_cidr: pods.parse().unwrap(),
            service_cidr: services.parse().unwrap(),
            dns_address: dns.parse().unwrap(),
            ..RouterConfig::new("/x", "/y")
        };
        assert!(config("10.42.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_ok());
        assert!(config("10.42.0.0/15", "10.43.0.0/16", "10.43.0.10").check().is_err());
        assert!(config("10.42.0.0/16", "10.43.0.0/16", "10.44.0.10").check().is_err());
        assert!(config("127.0.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_err());
        assert!(config("169.254.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_err());
    }

    #[test]
    fn ipv6_networks_are_checked_too() {
        let config = |pods: &str, services: &str| RouterConfig {
            pod_cidr6: pods.parse().unwrap(),
            service_cidr6: services.parse().unwrap(),
            ..RouterConfig::new("/x", "/y")
        };
        assert!(config("fd00:1::/64", "fd00:2::/112").check().is_ok());
        assert!(config("2001:db8:1::/112", "2001:db8:2::/124").check().is_ok());
        for (pods, services) in [
            ("fd00:1::/64", "fd00:1::/112"),
            ("fd00:1::/120", "fd00:2::/112"),
            ("fe80::/64", "fd00:2::/112"),
            ("fd00:1::/64", "ff02::/112"),
            ("fd00:1::/64", "::/16"),
        ] {
            assert!(config(pods, services).check().is_err(), "{pods} {services}");
        }
        for bad in ["", "fd00::", "fd00::1/64", "fd00::/8", "fd00::/127", "10.0.0.0/16", "fd00::/x"] {
            assert!(bad.parse::<Cidr6>().is_err(), "{bad}");
        }
    }

    #[test]
    fn where_subnets_may_be_is_apart() {
        let config = |v4: &str, v6: &str| {
            let (subnet_cidr, subnet_cidr6) = (v4.parse().unwrap(), v6.parse().unwrap());
            RouterConfig { subnet_cidr, subnet_cidr6, ..RouterConfig::new("/x", "/y") }
        };
        assert!(config("192.168.0.0/16", "fd00:1::/112").check().is_ok());
        for (v4, v6) in [
            ("10.42.128.0/20", "fd00:1::/64"),
            ("10.43.0.0/16", "fd00:1::/64"),
            ("10.0.0.0/8", "fd00:1::/64"),
            ("169.254.0.0/16", "fd00:1::/64"),
            ("10.44.0.0/16", "fd00:10:42::/64"),
            ("10.44.0.0/16", "fd00:10:40::/42"),
            ("10.44.0.0/16", "fd00:1::/113"),
            ("10.44.0.0/16", "fe80::/64"),
        ] {
            let told = config(v4, v6).check().unwrap_err().to_string();
            assert!(told.starts_with("subnet_cidr: "), "{v4} {v6}: {told}");
        }
    }

    #[test]
    fn each_address_has_its_pair() {
        let config = RouterConfig::new("/x", "/y");
        let (v4, v6) = (Ipv4Addr::new(10, 42, 3, 9), "fd00:10:42::309".parse().unwrap());
        assert_eq!((config.v6_of(v4), config.v4_of(v6)), (v6, Some(v4)));
        assert_eq!(config.dns_address6().to_string(), "fd00:10:43::a");
        assert_eq!(config.router_address6().to_string(), "fd00:10:42::1");
        for nobody in ["fd00:10:42::1:0", "fd00:10:42:0:1::", "fd00:10:43::309", "::1"] {
            assert_eq!(config.v4_of(nobody.parse().unwrap()), None);
        }
    }
}
