//! The built-in registry: OCI distribution spec 1.1 over the image store, for skopeo, podman, docker and whoever else
//! pushes and pulls.
//!
//! Blobs are the store's, shared by all repositories; manifests and tags belong to a repository. Nothing is kept in
//! memory between requests but hash states: an upload goes on after a restart. Garbage collection runs beside it.
//!
//! *Invariant:* the store's synchronous calls run on blocking threads only; a slow disk stalls no other request.
#![forbid(unsafe_code)]

mod answer;
mod blobs;
mod manifests;
mod route;
mod server;

pub use server::serve;
