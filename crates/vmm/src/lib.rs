//! Machine description in, virtual machine out.
//!
//! A machine is a [`Machine`]; an [`engine`] turns it into a process; the role `atoll vmm` ([`monitor`]) jails that
//! process, pumps its console into a log and answers on one control socket ([`Client`]). What engines there are and which
//! one fits this computer is measured by [`kvm::probe`], not guessed.
//!
//! Leaves to others: where disks and kernels come from, what a pod is, addresses.

mod channel;
pub mod client;
pub mod disk;
pub mod engine;
pub mod kvm;
pub mod machine;
pub mod monitor;
pub mod qcow2;
mod qemu;
#[doc(hidden)]
pub mod qmp;
pub mod saved;
pub mod seed;
mod sys;

pub use client::{Client, launch};
pub use engine::SnapshotFiles;
pub use machine::{Choice, Console, Disk, DiskFormat, Error, Link, Machine, Rate, Restore, Result};
