//! The built-in registry: OCI distribution spec 1.1 over the image store, for skopeo, podman, docker and whoever else
//! pushes and pulls. `docs/registry.md` goes through the spec clause by clause.
//!
//! Manifests, tags and which blobs may be had belong to a repository; the bytes of blobs are the store's, shared by all.
//! Nothing is kept in memory between requests but hash states: an upload goes on after a restart. Garbage collection
//! runs beside it.
//!
//! *Invariant:* the store's synchronous calls run on blocking threads only; a slow disk stalls no other request.
//! *Invariant:* what touches a repository is handed a `Permit`, which only the rule of access gives.
#![forbid(unsafe_code)]

mod access;
mod answer;
mod blobs;
mod listing;
mod manifests;
mod route;
mod rules;
mod sendfile;
mod server;
mod uploads;

pub use access::{Access, Administrator, Caller, Denied, Verb};
pub use rules::{InvalidRule, TagRules};
pub use server::{Config, Limits, Pushed, serve};

#[doc(hidden)]
pub use route::fuzz;
