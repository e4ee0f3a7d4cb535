//! Cluster DNS: the names of the Kubernetes DNS specification (version 1.1.0), answered from records in memory by a few
//! threads inside the router's namespace.
//!
//! [`codec`] reads questions and writes answers, [`Records`] is what there is, `zone` finds the answer, [`DnsServer`]
//! holds the sockets, [`Views`] is who sees what. Other names are forwarded if upstreams were configured, and do not exist otherwise.

pub mod answers;
pub mod codec;
mod forward;
mod look_up;
mod records;
mod server;
mod views;
pub mod zone;

pub use look_up::look_up;
pub use records::{EndpointRecord, PortRecord, Records, ServiceKind, ServiceRecord};
pub use server::DnsServer;
pub use views::{Outside, View, Views};
