//! A virtio-mmio driver of the smallest kind: one request at a time, by polling.

use crate::{read16, read32, write16, write32, write64};
use core::sync::atomic::{Ordering, fence};

pub const FIRST: u64 = 0xd000_0000;
const QUEUES: u64 = 0x40_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;
const DEVICE_STRIDE: u64 = 0x4_0000;
pub const SIZE: u64 = 8;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub struct Device {
    pub base: u64,
    index: u64,
    seen: [u16; 4],
}

impl Device {
    /// The `nth` device of this kind.
    pub fn find(id: u32, nth: u64) -> Option<Device> {
        let mut left = nth;
        for index in 0..32 {
            let base = FIRST + index * 0x1000;
            if read32(base) != 0x7472_6976 {
                return None;
            }
            if read32(base + 8) == id {
                if left == 0 {
                    return Some(Device { base, index, seen: [0; 4] });
                }
                left -= 1;
            }
        }
        None
    }

    pub fn register(&self, offset: u64, value: u32) {
        write32(self.base + offset, value);
    }
    pub fn status(&self) -> u32 {
        read32(self.base + 0x70)
    }

    /// Up to FEATURES_OK; whether the device agreed.
    pub fn agree(&self, low: u32, high: u32) -> bool {
        self.register(0x70, 0);
        self.register(0x70, 1);
        self.register(0x70, 3);
        self.register(0x24, 0);
        self.register(0x20, low);
        self.register(0x24, 1);
        self.register(0x20, high);
        self.register(0x70, 11);
        self.status() & 8 != 0
    }

    /// All queues of the device, then ready.
    pub fn begin(&mut self, features: u32) -> bool {
        let agreed = self.agree(features, 1);
        self.seen = [0; 4];
        for queue in 0..4 {
            self.register(0x30, queue);
            if read32(self.base + 0x34) != 0 {
                self.set_up(u64::from(queue));
            }
        }
        self.register(0x70, 15);
        agreed
    }

    fn set_up(&mut self, queue: u64) {
        crate::fill(self.table(queue), 0, 0x3000);
        self.register(0x38, SIZE as u32);
        self.register(0x80, self.table(queue) as u32);
        self.register(0x84, 0);
        self.register(0x90, self.available(queue) as u32);
        self.register(0x94, 0);
        self.register(0xa0, self.used(queue) as u32);
        self.register(0xa4, 0);
        self.register(0x44, 1);
    }

    pub fn table(&self, queue: u64) -> u64 {
        QUEUES + self.index * DEVICE_STRIDE + queue * QUEUE_STRIDE
    }
    pub fn available(&self, queue: u64) -> u64 {
        self.table(queue) + 0x1000
    }
    pub fn used(&self, queue: u64) -> u64 {
        self.table(queue) + 0x2000
    }
    /// Memory for requests: 48 KiB.
    pub fn buffer(&self, queue: u64) -> u64 {
        self.table(queue) + 0x4000
    }

    pub fn descriptor(&self, queue: u64, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.table(queue) + index * 16;
        write64(at, address);
        write32(at + 8, length);
        write16(at + 12, flags);
        write16(at + 14, next);
    }

    /// Makes the chain at `head` available and kicks.
    pub fn offer(&self, queue: u64, head: u16) {
        let ring = self.available(queue);
        let index = read16(ring + 2);
        write16(ring + 4 + u64::from(index) % SIZE * 2, head);
        fence(Ordering::SeqCst);
        write16(ring + 2, index.wrapping_add(1));
        fence(Ordering::SeqCst);
        self.register(0x50, queue as u32);
    }

    /// Waits for a request's end; (head, written). `None` when the device takes too long.
    pub fn wait(&mut self, queue: u64) -> Option<(u32, u32)> {
        for _ in 0..2_000_000u32 {
            if let Some(done) = self.poll(queue) {
                return Some(done);
            }
            core::hint::spin_loop();
        }
        None
    }

    pub fn poll(&mut self, queue: u64) -> Option<(u32, u32)> {
        let seen = self.seen.get_mut(queue as usize)?;
        let ring = self.index * DEVICE_STRIDE + QUEUES + queue * QUEUE_STRIDE + 0x2000;
        if read16(ring + 2) == *seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = ring + 4 + u64::from(*seen) % SIZE * 8;
        *seen = seen.wrapping_add(1);
        Some((read32(at), read32(at + 4)))
    }
}
