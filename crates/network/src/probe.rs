//! Whether this machine's kernel can carry the network: a namespace is made and thrown away with the ruleset in it.

use crate::activator::Activation;
use crate::config::RouterConfig;
use crate::error::Result;
use crate::netlink::Socket;
use crate::services::{Protocol, ServiceRule, Services};
use crate::{firewall, ns, uplink};

/// Loads the router's ruleset in a fresh network namespace that ends with the call.
pub fn probe() -> Result<()> {
    let config = RouterConfig::new("", "");
    let service = |port, affinity_seconds| ServiceRule {
        namespace: String::new(),
        name: "probe".to_owned(),
        cluster_ip: config.service_cidr.nth(1).into(),
        protocol: Protocol::Tcp,
        port,
        endpoints: vec![(config.pod_cidr.nth(2).into(), 80), (config.pod_cidr.nth(3).into(), 80)],
        affinity_seconds,
        sources: Vec::new(),
        activated: false,
    };
    ns::in_scratch(|| {
        let mut socket = Socket::netfilter()?;
        firewall::ensure(&mut socket, &config, &[])?;
        // Both ways to choose an endpoint: they are modules of their own in the kernel.
        let activation = Activation { listeners: &[], who: &|_| None };
        let rules = [service(80, None), service(81, Some(10800))];
        Services::none().sync(&mut socket, &rules, &activation).map(drop)
    })
}

/// Whether an uplink would carry IPv6 in the thread's namespace; elsewhere `nat` has a relay for it, and `routed` nothing.
pub fn probe_uplink6() -> bool {
    uplink::carries6(true).unwrap_or(false)
}

/// Makes the relay's link and rules in a fresh network namespace that ends with the call.
pub fn probe_relay() -> Result<()> {
    ns::in_scratch(|| uplink::probe_relay(&RouterConfig::new("", "")))
}
