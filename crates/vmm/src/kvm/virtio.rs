//! Virtio 1.2 devices on the MMIO transport (<https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html>).
//!
//! A [`Device`] lives in its [`mmio::Transport`] until its driver is ready, then in its [`worker`], and comes back at a reset.

pub mod balloon;
pub mod block;
pub mod console;
#[doc(hidden)]
pub mod fuzz;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod vsock;
pub mod worker;

use super::Fault;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use worker::Io;

/// The feature every driver has to take: no legacy.
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub trait Device: Send {
    /// For thread names and messages.
    fn name(&self) -> &'static str;
    /// Virtio 1.2, section 5.
    fn id(&self) -> u32;
    /// Beside those that the transport adds.
    fn features(&self) -> u64 {
        0
    }
    /// Largest size of each queue.
    fn queues(&self) -> &'static [u16];
    /// The configuration space at reset, and how many of its last bytes the driver may write.
    fn config(&self) -> (Vec<u8>, usize) {
        (Vec::new(), 0)
    }
    /// The driver is ready with these features.
    fn begin(&mut self, _features: u64) -> std::io::Result<()> {
        Ok(())
    }
    /// The driver was ready when the machine was saved: what it waits for from the host's side is gone.
    fn restored(&mut self) {}
    /// Bytes, of a disk: a machine is restored with disks of the size they had.
    fn size(&self) -> u64 {
        0
    }
    /// Whether all of this queue is taken at each kick; else it waits for the source.
    fn drains(&self, _queue: usize) -> bool {
        true
    }
    /// The driver has put something into a queue.
    fn kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault>;
    /// What wakes the device from the host's side.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn wants_source(&self) -> bool {
        true
    }
    fn ready(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }
    /// How long it takes no request, because it has done as much as it may.
    fn held(&self) -> Option<Duration> {
        None
    }
}
