//! Container runtime code: a configuration in the OCI runtime specification's shape and a root file system in, an
//! isolated process out. No other program is executed for it. Knows nothing of the API.
//!
//! - [`spec`]: the shape of `config.json`.
//! - [`runtime`]: from a configuration to a process; the sequence is described there.
//! - [`rootfs`], [`namespaces`], [`cgroup`], [`process`], [`seccomp`]: its parts.
//! - [`shim`]: the small process that is the parent of a pod's containers and outlives the daemon.
//! - [`client`]: how the daemon talks to it.
//! - [`oci`]: the same runtime under other people's engines, without a shim.
//!
//! `unsafe` is in `sys` alone.
#![deny(unsafe_code)]

pub mod cgroup;
pub mod client;
mod console;
mod error;
pub mod hooks;
pub mod namespaces;
pub mod oci;
pub mod process;
pub mod rootfs;
pub mod runtime;
pub mod seccomp;
pub mod shim;
pub mod spec;
#[allow(unsafe_code)]
mod sys;
mod systemd;
mod wire;

pub use error::{Error, Result};
pub use sys::{LANDLOCK_SCOPES, landlock_abi};
