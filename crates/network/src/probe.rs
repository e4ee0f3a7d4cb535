//! Whether this machine's kernel can carry the network: a namespace is made and thrown away with the ruleset in it.

use crate::config::{Cidr, RouterConfig};
use crate::error::Result;
use crate::netlink::Socket;
use crate::{firewall, ns};
use std::net::Ipv4Addr;

/// Loads the router's ruleset in a fresh network namespace that ends with the call.
pub fn probe() -> Result<()> {
    let config = RouterConfig {
        data_dir: Default::default(),
        run_dir: Default::default(),
        pod_cidr: Cidr::new(Ipv4Addr::new(10, 42, 0, 0), 16)?,
        service_cidr: Cidr::new(Ipv4Addr::new(10, 43, 0, 0), 16)?,
        dns_address: Ipv4Addr::new(10, 43, 0, 10),
    };
    ns::in_scratch(|| firewall::ensure(&mut Socket::netfilter()?, &config, &[]).map(drop))
}
