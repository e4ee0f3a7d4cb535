//! The MMIO transport (Virtio 1.2, 4.2): one page of registers for each device.

mod saved;

pub use saved::Saved;

use super::worker::{self, Config, Interrupt, Io, Worker};
use super::{Device, EVENT_IDX, INDIRECT, VERSION_1};
use crate::kvm::memory::Memory;
use crate::kvm::sys::Signal;
use crate::kvm::{Ending, Fault};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c4c_5441;
pub const NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 128;

enum Stage {
    /// The device waits for its driver.
    Setup(Box<dyn Device>),
    Running(Worker),
    /// The machine is held: neither its thread nor a vCPU runs.
    Held(Box<dyn Device>, Vec<Queue>),
    /// Its thread died; the machine is ending.
    Lost,
}

pub struct Transport {
    name: &'static str,
    id: u32,
    features: u64,
    config_at_reset: Vec<u8>,
    writable_from: usize,
    stage: Stage,
    status: u32,
    feature_page: u32,
    driver_page: u32,
    driver_features: u64,
    selected: u32,
    sizes: &'static [u16],
    queues: Vec<Queue>,
    pub kicks: Vec<Signal>,
    pub interrupt: Arc<Interrupt>,
    pub config: Arc<Config>,
    memory: Memory,
    ending: Ending,
}

fn fresh(sizes: &[u16]) -> io::Result<Vec<Queue>> {
    sizes.iter().map(|size| Queue::new(*size).map_err(|e| io::Error::other(e.to_string()))).collect()
}

impl Transport {
    pub fn new(device: Box<dyn Device>, memory: Memory, ending: Ending) -> io::Result<Self> {
        let (config, writable) = device.config();
        let interrupt = Interrupt { status: AtomicU32::new(0), line: Signal::new()? };
        Ok(Transport {
            name: device.name(),
            id: device.id(),
            features: device.features() | VERSION_1 | EVENT_IDX | INDIRECT,
            writable_from: config.len() - writable.min(config.len()),
            config: Arc::new(Config { bytes: config.clone().into(), generation: AtomicU32::new(0) }),
            config_at_reset: config,
            status: 0,
            feature_page: 0,
            driver_page: 0,
            driver_features: 0,
            selected: 0,
            sizes: device.queues(),
            queues: fresh(device.queues())?,
            kicks: device.queues().iter().map(|_| Signal::new()).collect::<io::Result<_>>()?,
            interrupt: Arc::new(interrupt),
            stage: Stage::Setup(device),
            memory,
            ending,
        })
    }

    fn fault<T>(&self, what: impl std::fmt::Display) -> Result<T, Fault> {
        Err(Fault(format!("{}: {what}", self.name)))
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            let config = self.config.lock();
            let from = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            for (to, byte) in data.iter_mut().zip(config.iter().skip(from)) {
                *to = *byte;
            }
            return;
        }
        let queue = self.queues.get(self.selected as usize);
        let value = match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.id,
            0x00c => VENDOR,
            0x010 => page(self.features, self.feature_page),
            0x034 => queue.map_or(0, |q| u32::from(q.max_size())),
            0x044 => queue.map_or(0, |q| u32::from(q.ready())),
            0x060 => self.interrupt.status.load(Ordering::SeqCst),
            0x070 => self.status,
            // no shared memory regions
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.config.generation.load(Ordering::SeqCst),
            _ => 0,
        };
        if let Some(to) = data.get_mut(..4) {
            to.copy_from_slice(&value.to_le_bytes());
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        if offset >= CONFIG {
            return self.write_config(usize::try_from(offset - CONFIG).unwrap_or(usize::MAX), data);
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return self.fault(format_args!("a write of {} bytes to register {offset:#x}; they take 4", data.len()));
        };
        match offset {
            0x014 => self.feature_page = value,
            0x020 => self.accept(value)?,
            0x024 => self.driver_page = value,
            0x030 => self.selected = value,
            0x038 | 0x044 | 0x080..=0x0a4 => self.write_queue(offset, value)?,
            NOTIFY => self.kick(value)?,
            0x064 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            0x070 => self.set_status(value)?,
            _ => {}
        }
        Ok(())
    }

    fn accept(&mut self, value: u32) -> Result<(), Fault> {
        if self.status & FEATURES_OK != 0 {
            return self.fault("features changed after they were agreed on");
        }
        match self.driver_page {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ if value == 0 => {}
            other => return self.fault(format_args!("feature bits of page {other}, which has none")),
        }
        Ok(())
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> Result<(), Fault> {
        let index = self.selected;
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return self.fault(format_args!("queue {index} set up at status {:#x}", self.status));
        }
        let Some(queue) = self.queues.get_mut(index as usize) else {
            return self.fault(format_args!("queue {index} set up; there are {}", self.sizes.len()));
        };
        if offset == 0x044 {
            queue.set_ready(value == 1);
            return Ok(());
        }
        let pair = |high: bool, now: u64| {
            let value = u64::from(value);
            GuestAddress(if high { now & 0xffff_ffff | value << 32 } else { now & !0xffff_ffff | value })
        };
        let done = match offset {
            0x038 => queue.try_set_size(u16::try_from(value).unwrap_or(0)),
            0x080 | 0x084 => queue.try_set_desc_table_address(pair(offset == 0x084, queue.desc_table())),
            0x090 | 0x094 => queue.try_set_avail_ring_address(pair(offset == 0x094, queue.avail_ring())),
            0x0a0 | 0x0a4 => queue.try_set_used_ring_address(pair(offset == 0x0a4, queue.used_ring())),
            _ => Ok(()),
        };
        done.or_else(|e| self.fault(format_args!("queue {index}, register {offset:#x} set to {value:#x}: {e}")))
    }

    /// Kicks come here only where KVM does not deliver them itself.
    fn kick(&mut self, index: u32) -> Result<(), Fault> {
        match self.kicks.get(index as usize) {
            Some(kick) if self.status & DRIVER_OK != 0 => kick.raise().or_else(|e| self.fault(e)),
            Some(_) => Ok(()),
            None => self.fault(format_args!("queue {index} kicked; there are {}", self.sizes.len())),
        }
    }

    fn write_config(&mut self, at: usize, data: &[u8]) -> Result<(), Fault> {
        let mut config = self.config.lock();
        let end = at.saturating_add(data.len());
        match config.get_mut(at..end) {
            Some(to) if at >= self.writable_from => {
                to.copy_from_slice(data);
                Ok(())
            }
            // Linux writes no other
            _ => {
                drop(config);
                self.fault(format_args!("write of {} bytes at {at:#x} of its read-only configuration", data.len()))
            }
        }
    }

    fn set_status(&mut self, value: u32) -> Result<(), Fault> {
        if value == 0 {
            return self.reset();
        }
        if value & self.status != self.status & !FAILED {
            return self.fault(format_args!("status {:#x} written over {:#x}: a bit taken back", value, self.status));
        }
        let new = value & !self.status;
        self.status = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if new & FEATURES_OK != 0 {
            let refused = self.driver_features & !self.features != 0 || self.driver_features & VERSION_1 == 0;
            if refused || self.status & DRIVER == 0 {
                self.status &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 {
            if self.status & FEATURES_OK == 0 {
                return self.fault("driver ready without agreeing on features");
            }
            self.activate()?;
        }
        Ok(())
    }

    fn activate(&mut self) -> Result<(), Fault> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.set_event_idx(self.driver_features & EVENT_IDX != 0);
            if queue.ready() && !queue.is_valid(&self.memory) {
                return self.fault(format_args!("queue {index} does not lie in memory"));
            }
        }
        let Stage::Setup(mut device) = std::mem::replace(&mut self.stage, Stage::Lost) else { return Ok(()) };
        device.begin(self.driver_features).or_else(|e| self.fault(e))?;
        let queues = std::mem::take(&mut self.queues);
        self.queues = fresh(self.sizes).or_else(|e| self.fault(e))?;
        self.work(device, queues)
    }

    fn work(&mut self, device: Box<dyn Device>, queues: Vec<Queue>) -> Result<(), Fault> {
        let (memory, interrupt, config) = (self.memory.clone(), self.interrupt.clone(), self.config.clone());
        let io = Io { memory, queues, interrupt, config };
        let worker = worker::start(device, io, &self.kicks, self.ending.clone()).or_else(|e| self.fault(e))?;
        self.stage = Stage::Running(worker);
        Ok(())
    }

    /// Stops the device's thread, if it runs.
    pub fn stop(&mut self) {
        self.hold();
        self.stage = match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Held(device, _) => Stage::Setup(device),
            other => other,
        };
    }

    /// Stops the device's thread between two requests, if it runs, until [`Transport::go_on`].
    pub fn hold(&mut self) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Running(worker) => worker.stop().map_or(Stage::Lost, |(device, queues)| Stage::Held(device, queues)),
            other => other,
        };
    }

    pub fn go_on(&mut self) -> Result<(), Fault> {
        match std::mem::replace(&mut self.stage, Stage::Lost) {
            Stage::Held(device, queues) => self.work(device, queues),
            other => {
                self.stage = other;
                Ok(())
            }
        }
    }

    fn reset(&mut self) -> Result<(), Fault> {
        self.stop();
        self.queues = fresh(self.sizes).or_else(|e| self.fault(e))?;
        self.kicks.iter().for_each(Signal::clear);
        self.interrupt.status.store(0, Ordering::SeqCst);
        self.config.lock().clone_from(&self.config_at_reset);
        (self.status, self.driver_features) = (0, 0);
        (self.feature_page, self.driver_page, self.selected) = (0, 0, 0);
        Ok(())
    }
}

fn page(bits: u64, page: u32) -> u32 {
    match page {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

/// For fuzzing: bytes are writes of a register, six each, to a balloon.
pub fn fuzz(data: &[u8]) {
    let Ok(memory) = crate::kvm::memory::allocate(1 << 20) else { return };
    let (sender, _events) = std::sync::mpsc::sync_channel(16);
    let balloon = Box::new(super::balloon::Balloon);
    let Ok(mut transport) = Transport::new(balloon, memory, Ending(sender)) else { return };
    for [low, high, a, b, c, d] in data.as_chunks::<6>().0.iter().take(256) {
        let offset = u64::from(u16::from_le_bytes([*low, *high])) % 0x140;
        if transport.write(offset, &[*a, *b, *c, *d]).is_err() {
            break;
        }
        transport.read(offset, &mut [0; 4]);
    }
    transport.stop();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory;
    use crate::kvm::virtio::rng::Rng;

    fn transport() -> Transport {
        let (sender, _receiver) = std::sync::mpsc::sync_channel(16);
        Transport::new(Box::new(Rng), memory::allocate(1 << 20).unwrap(), Ending(sender)).unwrap()
    }

    fn run(writes: &[(u64, u32)]) -> Result<Transport, String> {
        let mut t = transport();
        for (offset, value) in writes {
            t.write(*offset, &value.to_le_bytes()).map_err(|f| f.0)?;
        }
        t.stop();
        Ok(t)
    }

    const FEATURES: [(u64, u32); 4] = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1)];

    #[test]
    fn features_not_offered_and_legacy_drivers_are_refused() {
        let status = |writes: &[(u64, u32)]| run(writes).unwrap().status;
        assert_eq!(status(&[&FEATURES[..], &[(0x70, 11)]].concat()), 11);
        assert_eq!(status(&[(0x70, 1), (0x70, 3), (0x70, 11)]), 3, "no VERSION_1");
        assert_eq!(status(&[&FEATURES[..], &[(0x24, 0), (0x20, 1 << 7), (0x70, 11)]].concat()), 3);
    }

    #[test]
    fn drivers_that_break_the_order_are_faults() {
        let agreed = [&FEATURES[..], &[(0x70, 11)]].concat();
        let cases: [(&[(u64, u32)], &str); 9] = [
            (&[(0x70, 15)], "without agreeing"),
            (&[(0x38, 8)], "set up at status"),
            (&[(0x24, 9), (0x20, 1)], "page 9"),
            (&[(0x50, 7)], "queue 7 kicked"),
            (&[(0x100, 1)], "read-only configuration"),
            (&[(0x70, 3), (0x70, 1)], "taken back"),
            (&[(0x38, 3)], "register 0x38"),
            (&[(0x80, 3)], "register 0x80"),
            (&[(0x90, 0xffff_f000), (0x44, 1), (0x70, 15)], "does not lie in memory"),
        ];
        for (index, (writes, expected)) in cases.iter().enumerate() {
            let all = if index < 6 { writes.to_vec() } else { [&agreed[..], writes].concat() };
            let error = run(&all).err().unwrap_or_default();
            assert!(error.contains(expected), "{index}: {error}");
        }
        assert!(transport().write(0x70, &[1]).is_err(), "a byte");
    }

    proptest::proptest! {
        #[test]
        fn no_registers_make_it_panic(writes in proptest::collection::vec((0u64..0x120, proptest::num::u32::ANY), 0..64)) {
            let mut t = transport();
            for (offset, value) in writes {
                // small values reach further
                let _ = t.write(offset, &value.to_le_bytes());
                let _ = t.write(offset & !3, &(value % 16).to_le_bytes());
                t.read(offset, &mut [0; 8]);
            }
            t.stop();
        }
    }
}
