//! The private network: one router namespace per Atoll instance, one point-to-point link per workload, Services by
//! nftables maps and cluster DNS. Every socket that changes something is opened inside the router's namespace or a
//! workload's; the host's links, routes, nftables and sysctls are touched by [`Router::set_egress`] alone, which an
//! administrator asks for.
//!
//! - [`Router`] makes or finds the pinned router namespace; [`Router::attach`] gives a workload its address and link.
//! - [`Router::add_subnet`] lets workloads have addresses of other networks than `pod_cidr`.
//! - [`Router::sync_services`] makes ClusterIPs: connections to them are spread over endpoints in the kernel.
//! - [`Router::open_activator`] hears the connections to those Services that sleep.
//! - [`Router::sync_policies`] makes who may talk to whom: [`policy`] decides, nftables maps and sets enforce.
//! - [`Router::set_egress`] makes the way out ([`relay`] is the process of the one that touches nothing of the host);
//!   [`Router::set_bandwidth`] limits what a workload sends and receives.
//! - [`refused::RefusedLog`] tells which packets were refused; [`watch`] shows connections, counters and frames.
//! - [`Names`] holds the addresses of names outside that policies let workloads reach.
//! - [`GuestServer`] tells machines that ask the addresses that they have.
//! - [`DnsServer`] answers for `cluster.local` from inside the router namespace.
//!
//! A workload reaches nobody until a policy, or the default of its namespace, says so; the router refuses everything else
//! (spoofed sources, its own ports but DNS, destinations outside).
//!
//! Synchronous throughout, std threads only; knows nothing of the API. `unsafe` lives in `sys` alone.
#![deny(unsafe_code)]

mod activator;
mod address;
mod attach;
mod bandwidth;
mod config;
mod error;
mod exposed;
mod express;
mod firewall;
mod guests;
mod journal;
mod limits;
mod names;
mod ns;
pub mod policy;
mod pool;
mod probe;
pub mod refused;
pub mod relay;
mod router;
mod services;
mod subnets;
mod sys;
mod uplink;
pub mod watch;

pub mod dns;
/// Parsers of what machines send, for fuzz targets.
pub mod fuzz {
    pub use crate::exposed::fuzz_sctp;
    pub use crate::guests::{dhcp4, dhcp6};
    pub use crate::relay::fuzz_packet;
}
/// Builders and parsers of the kernel's netlink messages; public so that fuzz targets reach the parsers.
pub mod netlink;

pub use attach::{AttachRequest, Attachment, LinkKind, Place, ROUTER_MAC};
pub use bandwidth::Bandwidth;
pub use config::{Cidr, Cidr6, GATEWAY, GATEWAY6, MTU, RouterConfig};
pub use dns::{DnsServer, Records};
pub use error::{Error, Result};
pub use exposed::{Exposer, Exposure, Leads, NotOpen};
pub use guests::GuestServer;
pub use limits::{Cause, Limits};
pub use names::{NameSet, Names, Pattern};
pub use ns::in_netns;
pub use policy::{Isolation, Policies};
pub use probe::{probe, probe_relay, probe_uplink6};
pub use router::{Leased, Router};
pub use services::{Protocol, ServiceRule};
pub use subnets::{Misfit, Pairs, Subnet, SubnetUse};
pub use uplink::{Egress, NODE};
