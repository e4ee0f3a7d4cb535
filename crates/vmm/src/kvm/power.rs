//! The registers that turn the machine off or reset it, as the FADT names them, and the power button.

use super::sys::Signal;
use super::{End, Ending};
use std::io;

pub const SLEEP_CONTROL: u16 = 0x600;
pub const SLEEP_STATUS: u16 = 0x601;
pub const RESET: u16 = 0x602;
pub const RESET_VALUE: u8 = 1;
pub const BUTTON_IRQ: u32 = 9;
/// The keyboard controller's command port: what a PC's reset is where there are no tables.
pub const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// ACPI 6.5, 4.8.3.7: SLP_EN, and SLP_TYP in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;

pub struct Power {
    pub ending: Ending,
}

impl Power {
    pub fn write(&self, port: u16, value: u8) {
        match (port, value) {
            (SLEEP_CONTROL, v) if v & SLEEP_ENABLE != 0 => self.ending.end(End::PowerOff),
            (RESET, RESET_VALUE) | (KEYBOARD, KEYBOARD_RESET) => self.ending.end(End::Reset),
            _ => {}
        }
    }
}

/// Pressing it is an interrupt.
pub struct Button(pub Signal);

impl Button {
    pub fn press(&self) -> io::Result<()> {
        self.0.raise()
    }
}
