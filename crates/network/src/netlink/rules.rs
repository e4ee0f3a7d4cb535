//! What the kernel would do with a destination.

use super::parse::{Attributes, u32_at};
use super::route::{AF_INET, AF_INET6, LOOPBACK, ROUTE_UNICAST, RTM_GETROUTE, RTM_NEWROUTE};
use super::{Batch, Socket};
use crate::error::Result;
use std::net::IpAddr;

/// Whether the kernel would send to this address by one of its links: not to itself, to a group, to nowhere. An error says
/// why it has no route.
pub fn leads_out(socket: &mut Socket, to: IpAddr) -> Result<bool> {
    let mut batch = Batch::new();
    batch.request("look the route up", RTM_GETROUTE, 0, &[], |w| {
        let (family, bits) = if to.is_ipv4() { (AF_INET, 32) } else { (AF_INET6, 128) };
        w.raw(&[family, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        w.attr(1, &super::nft::octets(to));
    });
    let mut out = false;
    socket.query(batch, |kind, payload| {
        let link = payload.get(12..).and_then(|attributes| u32_at(Attributes::get(attributes, 4)?, 0));
        out =
            kind == RTM_NEWROUTE && payload.get(7) == Some(&ROUTE_UNICAST) && link.is_some_and(|link| link != LOOPBACK);
    })?;
    Ok(out)
}
