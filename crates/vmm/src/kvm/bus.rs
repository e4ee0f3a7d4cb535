//! Where a guest's port and memory accesses go. Nothing is there: reads are all ones, writes are lost, as on a PC.

use super::memory::{MMIO_BASE, MMIO_STRIDE};
use super::power::{self, Power};
use super::serial::{self, Com1};
use super::virtio::mmio::Transport;
use super::{End, Ending, Fault};
use std::sync::{Mutex, PoisonError};

pub struct Bus {
    pub serial: Com1,
    pub power: Power,
    pub devices: Vec<Mutex<Transport>>,
    pub ending: Ending,
}

impl Bus {
    /// A string instruction's bytes come together.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match port.checked_sub(serial::PORT) {
                Some(offset) if offset < serial::PORTS => self.serial.read(offset as u8),
                _ if port == power::SLEEP_STATUS || port == power::SLEEP_CONTROL => 0,
                _ if port == power::KEYBOARD => 0,
                _ => 0xff,
            };
        }
    }

    pub fn port_out(&self, port: u16, data: &[u8]) {
        for byte in data {
            match port.checked_sub(serial::PORT) {
                Some(offset) if offset < serial::PORTS => self.serial.write(offset as u8, *byte),
                _ => self.power.write(port, *byte),
            }
        }
    }

    fn device(&self, address: u64) -> Option<(std::sync::MutexGuard<'_, Transport>, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let device = self.devices.get(usize::try_from(offset / MMIO_STRIDE).ok()?)?;
        Some((device.lock().unwrap_or_else(PoisonError::into_inner), offset % MMIO_STRIDE))
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((mut device, offset)) = self.device(address)
            && let Err(Fault(why)) = device.write(offset, data)
        {
            self.ending.end(End::Broken(why));
        }
    }
}
