//! The generation id: 16 random bytes that change whenever the guest's time is not what it was, so that it makes itself new
//! random numbers.

use super::memory::{self, Memory};
use super::sys::Signal;
use std::io;
use vm_memory::{Bytes, GuestAddress};

/// The last line of the I/O APIC.
pub const IRQ: u32 = 23;

pub struct Generation(pub Signal);

impl Generation {
    /// Writes a new one; the guest learns of it by [`Generation::tell`].
    pub fn renew(&self, memory: &Memory) -> io::Result<()> {
        let id = random()?;
        memory.write_slice(&id, GuestAddress(memory::GENERATION)).map_err(|e| io::Error::other(e.to_string()))
    }

    pub fn tell(&self) {
        let _ = self.0.raise();
    }
}

pub fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if got == bytes.len() { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
