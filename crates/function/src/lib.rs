//! Functions: a WebAssembly component that exports `wasi:http/incoming-handler` in, an HTTP server out. Knows nothing of
//! the API.
//!
//! Two roles of the program run what a tenant wrote, each in a jail ([`jail`]): [`compile`] turns a component into machine
//! code and ends; [`host`] is one process per namespace that serves that namespace's functions and outlives the daemon.
//! The daemon talks to it through [`client`].
//!
//! Every request gets an instance of its own, made from a pool of prepared memory and thrown away afterwards: nothing
//! leaks from one request to the next.
//!
//! *Invariant:* the daemon never parses, compiles or maps a tenant's bytes.
//! *Invariant:* a function has no file, no socket and no clock but those WASI hands it. Its own requests go where its list
//! says, over connections that [`connect`] made in the pod's network namespace; without a list they are refused.
#![deny(unsafe_code)]

pub mod client;
pub mod compile;
pub mod connect;
mod engine;
mod error;
pub mod host;
mod jail;
pub mod lambda;
#[allow(unsafe_code)]
mod sys;
mod wire;

pub use client::{Client, launch};
pub use compile::Cache;
pub use connect::{AllowList, ConnectSpec, launch_connector};
pub use error::{Error, Result};
pub use host::BOUNDS;
pub use wire::{Exit, FunctionLimits, FunctionSpec, FunctionState, FunctionStats, Listing, Recorded};
