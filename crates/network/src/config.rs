//! What a router is made from, checked once.

use crate::error::{Error, Result};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Every workload's next hop, on-link on its one interface.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
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

#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// `DATA/network`: address allocations.
    pub data_dir: PathBuf,
    /// `/run/atoll/<instance>`: pinned namespaces below `netns/`; gone after a reboot.
    pub run_dir: PathBuf,
    /// Workloads' addresses. The first is the router's own.
    pub pod_cidr: Cidr,
    /// ClusterIPs.
    pub service_cidr: Cidr,
    /// The DNS server's address, inside `service_cidr`.
    pub dns_address: Ipv4Addr,
}

impl RouterConfig {
    /// The router's address towards workloads: the source of its own connections, probes and hairpins.
    pub fn router_address(&self) -> Ipv4Addr {
        self.pod_cidr.nth(1)
    }
    pub(crate) fn check(&self) -> Result<()> {
        let error = |field, value: String, why: &str| Err(Error::Config { field, value, why: why.to_owned() });
        let (pods, services) = (self.pod_cidr, self.service_cidr);
        if pods.overlaps(services) {
            return error("service_cidr", services.to_string(), "overlaps pod_cidr; choose networks that do not");
        }
        for (field, cidr) in [("pod_cidr", pods), ("service_cidr", services)] {
            let base = cidr.base();
            let taken = [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED, GATEWAY, Ipv4Addr::new(224, 0, 0, 0)];
            if taken.into_iter().any(|a| cidr.contains(a)) || base.octets()[0] == 127 || base.octets()[0] >= 224 {
                return error(field, cidr.to_string(), "not a unicast network of your own; take one like 10.42.0.0/16");
            }
        }
        if !services.contains(self.dns_address) {
            return error("dns_address", self.dns_address.to_string(), "must be inside service_cidr");
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
            data_dir: "/x".into(),
            run_dir: "/y".into(),
            pod_cidr: pods.parse().unwrap(),
            service_cidr: services.parse().unwrap(),
            dns_address: dns.parse().unwrap(),
        };
        assert!(config("10.42.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_ok());
        assert!(config("10.42.0.0/15", "10.43.0.0/16", "10.43.0.10").check().is_err());
        assert!(config("10.42.0.0/16", "10.43.0.0/16", "10.44.0.10").check().is_err());
        assert!(config("127.0.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_err());
        assert!(config("169.254.0.0/16", "10.43.0.0/16", "10.43.0.10").check().is_err());
    }
}
