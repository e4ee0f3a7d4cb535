//! The layer-7 way in: HTTP/1.1 and HTTP/2 from outside to the pods behind Services, by the rules of HTTPRoutes,
//! GRPCRoutes and TLSRoutes (`gateway.networking.k8s.io/v1`) and Ingresses.
//!
//! - [`routing`] turns API objects into an immutable table and finds the rule of a request.
//! - [`upstream`] knows the endpoints of a Service port, keeps connections to them and speaks HTTP with them.
//! - `proxy` carries one request from the one to the other; `serve` holds the client's connections, `tls` knows whose
//!   certificate each is for. `direct` reads and answers the plain requests of HTTP/1.1, hyper all others.
//! - `activator` hands on connections of workloads to Services that may sleep.
//! - `policy` is what is asked of a request before its rule sees it.
//! - `follow` watches the API and swaps the table when something changed.
//!
//! No tenant code runs in here. What clients and upstreams send is parsed with limits, framed anew, and never trusted to
//! describe its own length twice.
#![forbid(unsafe_code)]

mod access;
mod activator;
mod cache;
mod compress;
mod config;
mod counters;
mod direct;
mod follow;
mod gateway;
mod metrics;
mod peer;
mod proxy;
mod proxy_protocol;
mod reply;
mod request;
mod serve;
mod tls;
mod trace;
mod tunnel;
mod wire;

pub mod policy;
pub mod routing;
pub mod upstream;

pub use access::Format as AccessFormat;
pub use activator::{Connect, Inside};
pub use config::{AccessSink, Config};
pub use counters::Counters;
pub use gateway::{Gateway, GatewayError};
