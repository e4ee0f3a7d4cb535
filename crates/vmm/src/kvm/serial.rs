//! COM1: a 16550 whose other end is the monitor's console.

use super::sys::Signal;
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use vm_superio::serial::{Serial, SerialEvents, SerialState};

pub const PORT: u16 = 0x3f8;
pub const PORTS: u16 = 8;
pub const IRQ: u32 = 4;

pub struct Line(Signal);

impl vm_superio::Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

/// Tells the input thread that the guest has read all there was.
pub struct Emptied(Signal);

impl SerialEvents for Emptied {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.raise();
    }
}

/// The registers, and what was typed and not yet read.
#[derive(Serialize, Deserialize)]
pub struct Saved {
    registers: [u8; 9],
    input: Vec<u8>,
}

impl Saved {
    fn state(&self) -> SerialState {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = self.registers;
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: self.input.clone(),
        }
    }
}

type Uart = Serial<Line, Emptied, UnixStream>;

#[derive(Clone)]
pub struct Com1(Arc<Mutex<Uart>>);

impl Com1 {
    pub fn new(interrupt: Signal, console: &UnixStream) -> io::Result<(Self, Signal)> {
        Self::with(&SerialState::default(), interrupt, console)
    }

    /// As it was when it was saved.
    pub fn restored(saved: &Saved, interrupt: Signal, console: &UnixStream) -> io::Result<(Self, Signal)> {
        Self::with(&saved.state(), interrupt, console)
    }

    fn with(state: &SerialState, interrupt: Signal, console: &UnixStream) -> io::Result<(Self, Signal)> {
        let emptied = Signal::new()?;
        let (line, events) = (Line(interrupt), Emptied(emptied.try_clone()?));
        let uart = Serial::from_state(state, line, events, console.try_clone()?);
        let uart = uart.map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok((Com1(Arc::new(Mutex::new(uart))), emptied))
    }

    pub fn save(&self) -> Saved {
        let s = self.lock().state();
        let registers = [
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        Saved { registers, input: s.in_buffer }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Output that nobody takes is lost, as on a cable.
    pub fn write(&self, offset: u8, value: u8) {
        let _ = self.lock().write(offset, value);
    }

    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    /// Feeds what the console's clients type, at the pace the guest reads, until `stop` is written.
    pub fn feed(&self, mut console: UnixStream, emptied: Signal, stop: Signal) -> io::Result<JoinHandle<()>> {
        let uart = self.clone();
        std::thread::Builder::new().name("serial-in".into()).stack_size(64 << 10).spawn(move || {
            super::seccomp::enter(super::seccomp::Role::Device);
            let mut buffer = [0u8; 64];
            loop {
                let room = uart.lock().fifo_capacity().min(buffer.len());
                let source = if room == 0 { emptied.as_fd() } else { console.as_fd() };
                match wait(source, &stop) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return,
                }
                if room == 0 {
                    emptied.clear();
                    continue;
                }
                match console.read(buffer.get_mut(..room).unwrap_or_default()) {
                    Ok(n) if n > 0 => {
                        let _ = uart.lock().enqueue_raw_bytes(buffer.get(..n).unwrap_or_default());
                    }
                    _ => return,
                }
            }
        })
    }
}

/// True when `source` is readable, false when `stop` is.
fn wait(source: std::os::fd::BorrowedFd<'_>, stop: &Signal) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        let mut fds =
            [PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN), PollFd::from_borrowed_fd(source, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
