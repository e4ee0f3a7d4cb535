//! The networks that Service addresses are taken from, one of each family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }
    pub fn parse(text: &str) -> Option<Family> {
        match text {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        }
    }
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
    pub fn other(self) -> Family {
        match self {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        }
    }
}

/// One network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceRange {
    family: Family,
    base: u128,
    prefix: u8,
}

impl ServiceRange {
    /// Addresses at the start that are never given out by chance: network, `kubernetes` (.1) and DNS (.10) among them.
    const RESERVED: u64 = 16;
    /// Of a larger network the first so many addresses are given out.
    const MOST: u64 = 1 << 32;

    /// `10.43.0.0/16` from a /8 to a /27, or `fd00:10:43::/112` from a /16 to a /123.
    pub fn parse(cidr: &str) -> Option<ServiceRange> {
        let (address, prefix) = cidr.split_once('/')?;
        let (address, prefix) = (address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?);
        let family = Family::of(address);
        let (bits, width, fitting) = match address {
            IpAddr::V4(address) => (u128::from(address.to_bits()), 32, 8..=27),
            IpAddr::V6(address) => (address.to_bits(), 128, 16..=123),
        };
        let host = (1u128 << (width - u32::from(prefix).min(width))) - 1;
        fitting.contains(&prefix).then_some(ServiceRange { family, base: bits & !host, prefix })
    }

    fn size(&self) -> u128 {
        let width = if self.family == Family::V4 { 32 } else { 128 };
        1 << (width - u32::from(self.prefix))
    }

    fn nth(&self, n: u128) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::from_bits(u32::try_from(self.base + n).unwrap_or(u32::MAX)).into(),
            Family::V6 => Ipv6Addr::from_bits(self.base + n).into(),
        }
    }

    /// Neither the network's own address nor, in IPv4, its broadcast address is a Service's.
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = match address {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        let at = bits.wrapping_sub(self.base);
        let last = self.size() - u128::from(self.family == Family::V4);
        Family::of(address) == self.family && at > 0 && at < last
    }

    /// Any address that may be given out without being asked for.
    pub fn any(&self, random: u64) -> IpAddr {
        let size = u64::try_from(self.size()).unwrap_or(u64::MAX).min(Self::MOST);
        self.nth(u128::from(Self::RESERVED + random % (size - Self::RESERVED - 1)))
    }
}

impl std::fmt::Display for ServiceRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.nth(0), self.prefix)
    }
}

/// The cluster's: IPv4, and IPv6 if it is of both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceRanges {
    v4: ServiceRange,
    v6: Option<ServiceRange>,
}

impl ServiceRanges {
    /// `10.43.0.0/16` or `10.43.0.0/16,fd00:10:43::/112`.
    pub fn parse(text: &str) -> Option<ServiceRanges> {
        let mut ranges = text.split(',').map(ServiceRange::parse);
        let v4 = ranges.next()??;
        let v6 = match ranges.next() {
            None => None,
            Some(range) => Some(range?),
        };
        let sound = v4.family == Family::V4 && v6.is_none_or(|v6| v6.family == Family::V6) && ranges.next().is_none();
        sound.then_some(ServiceRanges { v4, v6 })
    }

    /// `None`: the cluster is not of that family.
    pub fn of(&self, family: Family) -> Option<&ServiceRange> {
        match family {
            Family::V4 => Some(&self.v4),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Where the service `kubernetes` is.
    pub fn api_address(&self) -> IpAddr {
        self.v4.nth(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_addresses() {
        let range = ServiceRange::parse("10.43.7.0/16").unwrap();
        assert_eq!(range.to_string(), "10.43.0.0/16");
        for random in [0, 1, u64::MAX, 65_518, 65_519] {
            let address = range.any(random);
            assert!(range.contains(address) && address >= "10.43.0.16".parse::<IpAddr>().unwrap(), "{address}");
        }
        for outside in ["10.43.0.0", "10.43.255.255", "10.44.0.1", "fd00::1"] {
            assert!(!range.contains(outside.parse().unwrap()), "{outside}");
        }
        for bad in ["10.43.0.0", "10.43.0.0/31", "x/16", "10.43.0.0/4", "fd00::/8", "fd00::/127", "fd00::/200"] {
            assert!(ServiceRange::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn ranges_of_both_families() {
        let ranges = ServiceRanges::parse("10.43.0.0/16,fd00:10:43::/112").unwrap();
        assert_eq!(ranges.api_address().to_string(), "10.43.0.1");
        let v6 = ranges.of(Family::V6).unwrap();
        for random in [0, 1, u64::MAX, 65_519] {
            let address = v6.any(random);
            assert!(v6.contains(address) && address >= "fd00:10:43::10".parse::<IpAddr>().unwrap(), "{address}");
        }
        assert!(ServiceRange::parse("fd00::/64").unwrap().any(u64::MAX).to_string().starts_with("fd00::"));
        assert!(ServiceRanges::parse("10.43.0.0/16").unwrap().of(Family::V6).is_none());
        for bad in
            ["", "fd00::/112", "10.43.0.0/16,10.44.0.0/16", "10.43.0.0/16,", "10.43.0.0/16,fd00::/112,fd01::/112"]
        {
            assert!(ServiceRanges::parse(bad).is_none(), "{bad}");
        }
    }
}
