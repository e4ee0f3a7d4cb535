//! Our own engine: a machine on KVM, built from the rust-vmm crates.
//!
//! ```text
//!            engine: opens what the machine needs, then the jail, then
//!              run: serves the control channel, ends       vm: builds the VM, or restores it, and saves it (snapshot)
//!   memory, boot, acpi: what the guest finds       arch: registers, CPUID, MSRs of x86-64
//!   vcpu: one thread each  ->  bus: ports and MMIO  ->  serial, power, virtio::mmio
//!                                                       virtio::worker: one thread for each device
//! ```
//!
//! *Invariant:* what a guest can shape is checked where it enters (`virtio::queue`, `virtio::mmio`, `bus`); a guest that breaks
//! its protocol is a [`Fault`], which ends its machine and says why.

mod acpi;
mod arch;
pub mod boot;
mod bus;
pub(crate) mod engine;
mod generation;
pub mod memory;
mod power;
mod probe;
mod run;
mod seccomp;
mod serial;
pub mod snapshot;
pub(crate) mod sys;
mod vcpu;
pub mod virtio;
mod vm;

pub use probe::{Support, probe, probe_once};

use std::sync::mpsc::SyncSender;

/// What the guest did that a device's protocol forbids.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Fault(pub String);

/// How a machine ends by its guest's doing.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    PowerOff,
    Reset,
    Broken(String),
}

/// What the thread that owns the machine is told.
pub(crate) enum Event {
    Guest(End),
    /// With the open files that came with it.
    Command(run::Command, Vec<std::os::fd::OwnedFd>),
    /// The monitor closed the control channel.
    Orphaned,
}

/// The way to that thread.
#[derive(Clone)]
pub struct Ending(pub(crate) SyncSender<Event>);

impl Ending {
    /// Only the first matters; when the queue is full there is one already.
    pub fn end(&self, how: End) {
        let _ = self.0.try_send(Event::Guest(how));
    }
}
