//! How much a workload may send and receive. Both are shaped where the workload cannot reach: what goes to it, as it leaves
//! the router's end of its link; what it sends, as it leaves by an `ifb` device, over which the router takes all that comes
//! in by the link. Shaping delays, so that TCP finds the limit; only what waits too long is dropped.
//!
//! The kernel holds the limits as long as the link, whether a daemon runs or not.

use crate::attach::{link_name, mac_of};
use crate::config::MTU;
use crate::error::{Error, Result};
use crate::netlink::qdisc::Shape;
use crate::netlink::route::{self, Link};
use crate::netlink::{Batch, Socket};
use crate::router::{Router, guard};
use std::collections::HashMap;
use std::net::Ipv4Addr;

pub(crate) const DETOUR_PREFIX: &str = "ifb";
/// The smallest burst holds two full frames; the largest, what the fastest link sends in 10 ms.
const BURST: (u64, u64) = (2 * (MTU as u64 + 14), 128 << 20);
/// At least 16 full frames may wait.
const QUEUE: (u64, u64) = (16 * (MTU as u64 + 14), 1 << 30);

/// Bits a second; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// To the workload.
    pub ingress: Option<u64>,
    /// From it.
    pub egress: Option<u64>,
}

/// Workloads whose links are limited; `None`: as an earlier process left them.
pub(crate) type Limited = HashMap<Ipv4Addr, Option<Bandwidth>>;

/// What of the links found speaks of a limit.
pub(crate) fn found(links: &[Link]) -> Limited {
    let digits = |link: &Link| link.name.get(link.name.len().checked_sub(8)?..).map(str::to_owned);
    let limited = links.iter().filter(|link| link.shaped || link.name.starts_with(DETOUR_PREFIX));
    let address = |link: &Link| u32::from_str_radix(&digits(link)?, 16).ok().map(Ipv4Addr::from_bits);
    limited.filter_map(address).map(|address| (address, None)).collect()
}

/// 10 ms at once, and 100 ms waiting.
fn shape(bits: u64) -> Shape {
    let rate = (bits / 8).max(1);
    let within = |(least, most): (u64, u64), value: u64| value.clamp(least, most) as u32;
    let burst = within(BURST, rate / 100);
    Shape { rate, burst, queue: within(QUEUE, rate / 10).saturating_add(burst) }
}

impl Router {
    /// Limits an attached workload's bandwidth, from now on and until it is detached.
    pub fn set_bandwidth(&self, uid: &str, wanted: Bandwidth) -> Result<()> {
        let _name = self.names.lock(uid);
        let Some(lease) = guard(&self.addresses).get(uid).cloned() else {
            return Err(Error::NoLink(uid.to_owned()));
        };
        let known = guard(&self.bandwidths).get(&lease.address).copied();
        if known.unwrap_or(Some(Bandwidth::default())) == Some(wanted) {
            return Ok(());
        }
        // Unknown until it is done.
        guard(&self.bandwidths).insert(lease.address, None);
        let link = link_name(lease.kind, lease.address);
        {
            let mut route = guard(&self.route);
            let index = route::link_index(&mut route, &link)?;
            if let Some(express) = &self.express {
                let shaped = wanted.ingress.is_some();
                express.shape(lease.address, shaped).map_err(Error::system("have packets pass by the link"))?;
            }
            limit_ingress(&mut route, index, wanted.ingress)?;
            limit_egress(&mut route, index, lease.address, wanted.egress)?;
        }
        let mut limited = guard(&self.bandwidths);
        if wanted == Bandwidth::default() {
            limited.remove(&lease.address);
        } else {
            limited.insert(lease.address, Some(wanted));
        }
        Ok(())
    }

    /// A workload's link is made anew, without the limits that one before it had.
    pub(crate) fn renew_bandwidth(&self, address: Ipv4Addr) {
        if let Some(known) = guard(&self.bandwidths).get_mut(&address) {
            *known = None;
        }
    }

    /// A workload's link is about to go; what belongs to its limit goes with it.
    pub(crate) fn forget_bandwidth(&self, address: Ipv4Addr) -> Result<()> {
        if guard(&self.bandwidths).remove(&address).is_none() {
            return Ok(());
        }
        let mut batch = Batch::new();
        batch.regroup_link(&detour_name(address), route::DEAD);
        guard(&self.route).send(batch)
    }
}

pub(crate) fn detour_name(address: Ipv4Addr) -> String {
    format!("{DETOUR_PREFIX}{:08x}", address.to_bits())
}

fn limit_ingress(route: &mut Socket, index: u32, bits: Option<u64>) -> Result<()> {
    let mut batch = Batch::new();
    match bits {
        Some(bits) => {
            batch.shape(index, shape(bits));
            batch.queue_fairly(index);
        }
        None => batch.unshape(index),
    }
    route.send(batch)
}

fn limit_egress(route: &mut Socket, index: u32, address: Ipv4Addr, bits: Option<u64>) -> Result<()> {
    let name = detour_name(address);
    let mut batch = Batch::new();
    let Some(bits) = bits else {
        batch.end_detour(index);
        batch.delete_link(&name);
        return route.send(batch);
    };
    if route::find_link(route, &name)?.is_none() {
        let mut make = Batch::new();
        make.add_ifb(&name, mac_of(address), MTU);
        route.send(make)?;
    }
    let by = route::link_index(route, &name)?;
    batch.shape(by, shape(bits));
    batch.queue_fairly(by);
    batch.detour(index, by);
    route.send(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_hold_full_frames_and_stay_within_what_the_kernel_counts_in() {
        let slow = shape(1000);
        assert_eq!((slow.rate, slow.burst), (125, 3028));
        assert!(slow.queue >= 24_000);
        let usual = shape(100_000_000);
        assert_eq!(usual, Shape { rate: 12_500_000, burst: 125_000, queue: 1_375_000 });
        let fast = shape(1_000_000_000_000_000);
        assert_eq!((fast.rate, fast.burst), (125_000_000_000_000, 128 << 20));
    }

    #[test]
    fn limits_are_found_again_by_name() {
        let link = |name: &str, shaped| Link { index: 1, name: name.into(), up: true, group: route::GROUP, shaped };
        let links = [link("veth0a2a0002", true), link("veth0a2a0003", false), link("ifb0a2a0004", true)];
        let mut found: Vec<Ipv4Addr> = found(&links).into_keys().collect();
        found.sort();
        assert_eq!(found, [Ipv4Addr::new(10, 42, 0, 2), Ipv4Addr::new(10, 42, 0, 4)]);
        let odd = [link("tap", true), link("ifbzzzzzzzz", true), link("ifbéééé", true)];
        assert!(super::found(&odd).is_empty());
    }
}
