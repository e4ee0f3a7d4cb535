//! The API server: a Kubernetes API over the store, for real clients over HTTPS and for the rest of this process through
//! [`api::client::Client`].
//!
//! [`http`] brings requests in, [`auth`] says who asks and hands out permits, [`rest`] has the verbs over any kind,
//! [`admission`] what is special about single kinds, [`watch`] the events, [`discovery`] what is served, [`patch`] the
//! forms of PATCH and field ownership, [`stream`] exec, attach and port-forward, [`pki`] keys and certificates.
//!
//! Knows nothing of how pods are run.
#![forbid(unsafe_code)]

mod admission;
pub mod auth;
mod bootstrap;
mod core;
mod custom;
mod discovery;
#[doc(hidden)]
pub mod fuzz;
mod history;
mod http;
mod kinds;
mod local;
pub mod patch;
pub mod pki;
mod ranges;
mod rest;
mod server;
pub mod stream;
mod watch;

#[cfg(test)]
mod testing;

pub use server::{Config, Server, ServerError};
