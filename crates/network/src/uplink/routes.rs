//! The host's routes to workloads, over its end of the link to the router.

use super::{NODE, NODE6};
use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::netlink::route::{self, Route};
use crate::netlink::{Batch, Socket};
use crate::subnets::Subnet;
use std::net::{IpAddr, Ipv6Addr};

type Destination = (IpAddr, u8);

/// The kernel's own, of every link with IPv6.
const LINK_LOCAL: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0));

/// Where the host's end leads to, in IPv6 too if `v6`.
pub fn wanted(config: &RouterConfig, subnets: &[Subnet], v6: bool) -> Vec<Destination> {
    let pods = (config.pod_cidr.base().into(), config.pod_cidr.prefix());
    let mut all: Vec<Destination> = vec![pods, (NODE.into(), 32)];
    all.extend(subnets.iter().map(|subnet| (subnet.cidr.base().into(), subnet.cidr.prefix())));
    if v6 {
        all.push((config.pod_cidr6.base().into(), config.pod_cidr6.prefix()));
        // What has no network of its own is as far into `subnet_cidr6` as it is into `subnet_cidr`.
        all.extend(subnets.iter().map(|subnet| match subnet.cidr6 {
            Some(own) => (own.base().into(), own.prefix()),
            None => (config.v6_of(subnet.cidr.base()).into(), 96 + subnet.cidr.prefix()),
        }));
    }
    all
}

/// Makes the routes over the link exactly these. The thread is in the host's namespace.
pub fn sync(socket: &mut Socket, index: u32, wanted: &[Destination]) -> Result<()> {
    let mut batch = Batch::new();
    let families = [false, true].into_iter().filter(|v6| !v6 || wanted.iter().any(|(base, _)| base.is_ipv6()));
    for v6 in families {
        let found = route::routes(socket, v6)?;
        for Route { base, prefix, .. } in found.into_iter().filter(|found| found.link == index) {
            let links_own = base == LINK_LOCAL || (v6 && prefix == 128);
            if !wanted.contains(&(base, prefix)) && !links_own {
                batch.delete_route((base, prefix), index);
            }
        }
    }
    for destination in wanted {
        let hop = if destination.0.is_ipv6() { NODE6.into() } else { NODE.into() };
        batch.add_route_via(*destination, index, hop, None);
    }
    socket.send(batch)
}

/// Routes of the host's own must not be hidden, nor hide workloads. The thread is in the host's namespace.
pub fn check(socket: &mut Socket, config: &RouterConfig, own: Option<u32>) -> Result<()> {
    for found in route::routes(socket, false)?.into_iter().chain(route::routes(socket, true)?) {
        // Wider routes than the pods' are less specific and stay what they are.
        let inside = match found.base {
            IpAddr::V4(base) => found.prefix >= config.pod_cidr.prefix() && config.pod_cidr.contains(base),
            IpAddr::V6(base) => found.prefix >= config.pod_cidr6.prefix() && config.pod_cidr6.contains(base),
        };
        if !inside || Some(found.link) == own {
            continue;
        }
        let links = route::links(socket)?;
        let link = links.into_iter().find(|link| link.index == found.link);
        let by = link.map_or_else(String::new, |link| format!(" by {}", link.name));
        return Err(Error::Config {
            field: "egress",
            value: if found.base.is_ipv6() { config.pod_cidr6.to_string() } else { config.pod_cidr.to_string() },
            why: format!(
                "the host has a route to {}/{}{by} inside the workloads' network; remove it, or the other Atoll that has \
                 an uplink",
                found.base, found.prefix
            ),
        });
    }
    Ok(())
}
