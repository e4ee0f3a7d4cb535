//! The node agent: turns the pods bound to this node into sandboxes and reports back (the work of kubelet and
//! kube-proxy).
//!
//! Knows nothing of controllers or HTTP verbs; it sees the API through [`api::client::Client`] and workloads through
//! [`boundary::Boundary`].
//!
//! - [`agent`](Agent): who is here, one worker for each pod, what an earlier agent left.
//! - `pod`: the life of one pod, as a state machine; `pod::plan` has the restart rules, `pod::status` the reports.
//! - `volumes`, `env`, `security`, `etc_files`, `machine`: what a container or machine is given, mostly pure.
//! - `subnets`: Networks, and which of them a pod has its address from.
//! - `proxy`: Services and names for the network; [`policy`]: NetworkPolicies for it.
//! - `streams`, `logs`: how the API reaches into pods.
//! - `snapshots`: files of machines' snapshots, and machines that begin as one.
//! - `registration`: the Node and its Lease.
//! - [`ports`]: what is needed of images and network; `adaptors` over the crates that have them.
#![forbid(unsafe_code)]

mod adaptors;
mod agent;
pub mod boundary;
mod config;
mod down;
mod env;
mod etc_files;
mod events;
mod exposed;
mod kept;
mod kept_logs;
mod layers;
mod logs;
mod machine;
mod net_probe;
mod pod;
pub mod policy;
pub mod ports;
mod proxy;
mod quantity;
mod record;
mod registration;
mod resources;
mod security;
mod shared;
mod snapshots;
mod sources;
mod streams;
mod subnets;
mod views;
mod volumes;

pub use agent::{Agent, destroy_all};
pub use config::{Config, Exposing};
