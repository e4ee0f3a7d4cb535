//! The balloon: pages the guest gives away go back to the host, on request and, with free page reporting, by themselves.

use super::Device;
use super::queue::{self, Segment};
use super::worker::Io;
use crate::kvm::Fault;
use crate::kvm::sys;
use vm_memory::GuestAddress;

const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
const INFLATE: usize = 0;
const REPORT: usize = 2;
/// Page frame numbers taken from one request.
const MOST_FRAMES: usize = 16 << 10;

pub struct Balloon;

impl Device for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }
    fn id(&self) -> u32 {
        5
    }
    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }
    fn queues(&self) -> &'static [u16] {
        &[128, 128, 64]
    }
    /// `num_pages`, set by the host; `actual`, set by the guest.
    fn config(&self) -> (Vec<u8>, usize) {
        (vec![0; 8], 4)
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        while let Some(chain) = io.take(index)? {
            match index {
                INFLATE => {
                    let mut bytes = vec![0u8; (queue::length(&chain.readable) as usize).min(4 * MOST_FRAMES)];
                    queue::gather(&io.memory, &chain.readable, &mut bytes)?;
                    for frame in bytes.as_chunks::<4>().0 {
                        let address = GuestAddress(u64::from(u32::from_le_bytes(*frame)) << 12);
                        give_back(io, Segment { address, len: 4096 })?;
                    }
                }
                REPORT => {
                    for segment in &chain.writable {
                        give_back(io, *segment)?;
                    }
                }
                _ => {}
            }
            io.finish(index, chain.head, 0)?;
        }
        io.notify(index)
    }
}

fn give_back(io: &Io, segment: Segment) -> Result<(), Fault> {
    let Segment { address, len } = segment;
    sys::discard(&io.memory, segment).map_err(|e| Fault(format!("page at {:#x}, {len} bytes: {e}", address.0)))
}
