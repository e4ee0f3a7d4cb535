//! For fuzzing: a device, and a driver and a host that do to it what bytes say.

use super::Device;
use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::net::{Filter, Net};
use super::rate::Limiter;
use super::rng::Rng;
use super::vsock::Vsock;
use super::worker::{Config, Interrupt, Io};
use crate::disk::raw::Raw;
use crate::kvm::sys::Signal;
use crate::kvm::{Fault, memory};
use crate::machine::Rate;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 1 << 16;
/// Entries of each queue.
const SIZE: u16 = 16;
/// Of a queue's table; its rings are within.
const STRIDE: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
const MOST_STEPS: usize = 256;

/// What is at the other end of a device.
enum Host {
    Nothing,
    Frames(UnixDatagram),
    Stream(UnixStream),
    Clients(SocketAddr, Vec<UnixStream>),
}

impl Host {
    fn says(&mut self, bytes: &[u8]) {
        match self {
            Host::Nothing => {}
            Host::Frames(socket) => drop(socket.send(bytes)),
            Host::Stream(stream) => drop(stream.write_all(bytes)),
            Host::Clients(address, clients) => {
                // a client begins with its request, all else is the last one's
                if bytes.starts_with(b"CONNECT") && clients.len() < 4 {
                    let made = UnixStream::connect_addr(address).and_then(|s| s.set_nonblocking(true).map(|()| s));
                    clients.extend(made);
                }
                if bytes.is_empty() {
                    clients.pop();
                }
                if let Some(client) = clients.last_mut() {
                    let _ = client.write_all(bytes);
                }
            }
        }
    }

    fn hears(&mut self) -> usize {
        let mut buffer = [0u8; 4096];
        match self {
            Host::Nothing => 0,
            Host::Frames(socket) => socket.recv(&mut buffer).unwrap_or(0),
            Host::Stream(stream) => stream.read(&mut buffer).unwrap_or(0),
            Host::Clients(_, clients) => clients.iter_mut().map(|c| c.read(&mut buffer).unwrap_or(0)).sum(),
        }
    }
}

fn make(name: &str) -> io::Result<(Box<dyn Device>, Host)> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    Ok(match name {
        "block" => {
            let file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC)?);
            file.set_len(32 << 10)?;
            let disk = Box::new(Raw::open(file)?);
            let limiter = Limiter::new(Rate::default());
            (Box::new(Block { disk, read_only: false, serial: "serial".into(), limiter }), Host::Nothing)
        }
        "net" => {
            let (ours, theirs) = UnixDatagram::pair()?;
            ours.set_nonblocking(true)?;
            theirs.set_nonblocking(true)?;
            let filter = Filter { mac: [2, 0, 0, 0, 0, 1], addresses: vec![[10, 42, 0, 7].into()] };
            (Box::new(Net::on(File::from(std::os::fd::OwnedFd::from(theirs)), filter, 1500)), Host::Frames(ours))
        }
        "rng" => (Box::new(Rng), Host::Nothing),
        "balloon" => (Box::new(Balloon), Host::Nothing),
        "console" => {
            let (ours, console) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            console.set_nonblocking(true)?;
            (Box::new(Console { console, input: true, full: false }), Host::Stream(ours))
        }
        _ => {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let address = SocketAddr::from_abstract_name(format!("atoll-fuzz-{}-{number}", std::process::id()))?;
            let vsock = Vsock::new(UnixListener::bind_addr(&address)?)?;
            (Box::new(vsock), Host::Clients(address, Vec::new()))
        }
    })
}

struct Steps<'a>(&'a [u8]);

impl<'a> Steps<'a> {
    fn take(&mut self, most: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        now
    }
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }
    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
}

struct Driver {
    device: Box<dyn Device>,
    host: Host,
    io: Io,
    /// Descriptors that were written to each queue's table, and heads that were offered.
    written: Vec<u16>,
    offered: Vec<u16>,
    heard: usize,
}

impl Driver {
    fn new(name: &str, event_idx: bool) -> Option<Driver> {
        let (device, host) = make(name).ok()?;
        let memory = memory::allocate(MEMORY).ok()?;
        let mut queues = Vec::new();
        for index in 0..device.queues().len() as u64 {
            let mut queue = Queue::new(SIZE).ok()?;
            let at = index * STRIDE;
            queue.set_desc_table_address(Some(at as u32), None);
            queue.set_avail_ring_address(Some((at + AVAILABLE) as u32), None);
            queue.set_used_ring_address(Some((at + USED) as u32), None);
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            queues.push(queue);
        }
        let (config, _) = device.config();
        let io = Io {
            memory,
            interrupt: Arc::new(Interrupt { status: AtomicU32::new(0), line: Signal::new().ok()? }),
            config: Arc::new(Config { bytes: config.into(), generation: AtomicU32::new(0) }),
            queues,
        };
        let count = io.queues.len();
        Some(Driver { device, host, io, written: vec![0; count], offered: vec![0; count], heard: 0 })
    }

    /// Writes a chain into a queue's table and makes it available.
    fn offer(&mut self, steps: &mut Steps<'_>) {
        let (index, count) = (usize::from(steps.byte()) % self.io.queues.len(), 1 + u16::from(steps.byte() % 4));
        let (Some(written), Some(offered)) = (self.written.get_mut(index), self.offered.get_mut(index)) else { return };
        let base = index as u64 * STRIDE;
        let head = *written % SIZE;
        for n in 0..count {
            let slot = written.wrapping_add(n) % SIZE;
            let (at, len, flags) = (u64::from(steps.word()), u32::from(steps.word()), steps.byte());
            let mut bits = if n + 1 < count { NEXT } else { 0 };
            bits |= if flags & 1 != 0 { WRITE } else { 0 } | if flags & 2 != 0 { INDIRECT } else { 0 };
            let to = GuestAddress(base + u64::from(slot) * 16);
            let memory = &self.io.memory;
            let _ = memory.write_obj(at, to);
            let _ = memory.write_obj(len, GuestAddress(to.0 + 8));
            let _ = memory.write_obj(bits, GuestAddress(to.0 + 12));
            let _ = memory.write_obj((slot + 1) % SIZE, GuestAddress(to.0 + 14));
        }
        *written = written.wrapping_add(count);
        let entry = base + AVAILABLE + 4 + u64::from(*offered % SIZE) * 2;
        *offered = offered.wrapping_add(1);
        let _ = self.io.memory.write_obj(head, GuestAddress(entry));
        let _ = self.io.memory.write_obj(*offered, GuestAddress(base + AVAILABLE + 2));
    }

    fn step(&mut self, steps: &mut Steps<'_>) -> Result<(), Fault> {
        match steps.byte() % 4 {
            0 => {
                let (at, length) = (u64::from(steps.word()), usize::from(steps.byte()));
                let bytes = steps.take(length);
                // what leaves memory is no step
                let _ = self.io.memory.write_slice(bytes, GuestAddress(at));
            }
            1 => self.offer(steps),
            2 => {
                let index = usize::from(steps.byte()) % self.io.queues.len();
                self.device.kicked(index, &mut self.io)?;
            }
            _ => {
                let length = usize::from(steps.byte());
                self.host.says(steps.take(length));
                if self.device.source().is_some() && self.device.wants_source() {
                    self.device.ready(&mut self.io)?;
                }
            }
        }
        self.heard += self.host.hears();
        Ok(())
    }

    /// Requests that were answered.
    fn answered(&self) -> usize {
        let index = |n: usize| self.io.memory.read_obj::<u16>(GuestAddress(n as u64 * STRIDE + USED + 2));
        (0..self.io.queues.len()).map(|n| usize::from(index(n).unwrap_or(0))).sum()
    }
}

/// Requests answered, and bytes that reached the host.
fn drive(name: &str, data: &[u8]) -> (usize, usize) {
    let mut steps = Steps(data);
    let Some(mut driver) = Driver::new(name, steps.byte() & 1 != 0) else { return (0, 0) };
    for _ in 0..MOST_STEPS {
        if steps.0.is_empty() || driver.step(&mut steps).is_err() {
            break;
        }
    }
    (driver.answered(), driver.heard)
}

/// The device's name, and what its driver and its host do.
pub fn device(name: &str, data: &[u8]) {
    drive(name, data);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The corpus reaches what it is for: each of its inputs is answered, those that begin with `host-` are heard.
    #[test]
    fn the_corpus_drives_every_device() {
        for name in ["block", "net", "vsock", "rng", "balloon", "console"] {
            let dir = format!("{}/../../fuzz/corpus/virtio_{name}", env!("CARGO_MANIFEST_DIR"));
            let files: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().collect();
            assert!(!files.is_empty());
            for file in files {
                let (answered, heard) = drive(name, &std::fs::read(file.path()).unwrap());
                assert!(answered > 0, "{}", file.path().display());
                let wants = file.file_name().to_string_lossy().starts_with("host-");
                assert_eq!(heard > 0, wants, "{}", file.path().display());
            }
        }
    }
}
