//! `hvc0`: a console on virtio, beside the serial port; both speak to the monitor's console.

use super::Device;
use super::queue;
use super::worker::Io;
use crate::kvm::Fault;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

const RECEIVE: usize = 0;

pub struct Console {
    pub console: UnixStream,
    /// Typed bytes come here; else to the serial port.
    pub input: bool,
    /// The guest has no buffer left.
    pub full: bool,
}

impl Device for Console {
    fn name(&self) -> &'static str {
        "console"
    }
    fn id(&self) -> u32 {
        3
    }
    fn queues(&self) -> &'static [u16] {
        &[64, 64]
    }
    fn config(&self) -> (Vec<u8>, usize) {
        (vec![0; 12], 0)
    }
    fn drains(&self, index: usize) -> bool {
        index != RECEIVE
    }
    fn kicked(&mut self, index: usize, io: &mut Io) -> Result<(), Fault> {
        if index == RECEIVE {
            self.full = false;
            return Ok(());
        }
        let mut buffer = vec![0u8; 4096];
        while let Some(chain) = io.take(index)? {
            let total = queue::length(&chain.readable);
            let mut at = 0;
            while at < total {
                let part = queue::part(&chain.readable, at, 4096);
                let n = queue::gather(&io.memory, &part, &mut buffer)?;
                let _ = self.console.write_all(buffer.get(..n).unwrap_or_default());
                at += 4096;
            }
            io.finish(index, chain.head, 0)?;
        }
        io.notify(index)
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.input.then(|| self.console.as_fd())
    }
    fn wants_source(&self) -> bool {
        self.input && !self.full
    }
    fn ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        let Some(chain) = io.take(RECEIVE)? else {
            self.full = true;
            return Ok(());
        };
        let mut buffer = [0u8; 256];
        let room = (queue::length(&chain.writable) as usize).min(buffer.len());
        let n = self.console.read(buffer.get_mut(..room).unwrap_or_default()).unwrap_or(0);
        if n == 0 {
            self.full = true;
        }
        let written = queue::scatter(&io.memory, &chain.writable, buffer.get(..n).unwrap_or_default())?;
        io.finish(RECEIVE, chain.head, written as u32)?;
        io.notify(RECEIVE)
    }
}
