//! Entropy from the host's pool.

use super::Device;
use super::queue;
use super::worker::Io;
use crate::kvm::Fault;

/// What one request is given at most; it comes back for more.
const MOST: usize = 4096;

pub struct Rng;

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }
    fn id(&self) -> u32 {
        4
    }
    fn queues(&self) -> &'static [u16] {
        &[64]
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        let mut buffer = [0u8; MOST];
        while let Some(chain) = io.take(index)? {
            let wanted = (queue::length(&chain.writable) as usize).min(MOST);
            let room = buffer.get_mut(..wanted).unwrap_or_default();
            let got = rustix::rand::getrandom(room, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
            let written = queue::scatter(&io.memory, &chain.writable, buffer.get(..got).unwrap_or_default())?;
            io.finish(index, chain.head, written as u32)?;
        }
        io.notify(index)
    }
}
