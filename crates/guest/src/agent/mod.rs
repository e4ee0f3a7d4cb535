//! Process 1 of a pod's machine.
//!
//! ```text
//! boot (mounts, modules, a root that can be pivoted from) -> serve the host's line -> SetUp: images, network, shim
//! ```
//!
//! The shim going away, or the agent itself, is the end of the machine.

mod boot;
mod channel;
mod live;
mod logs;
mod pod;
mod serve;

pub use pod::Agent;
pub use serve::serve;

use crate::protocol::VSOCK_PORT;
use crate::sys;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

/// How often a line that nobody holds at the other end is looked at.
const IDLE: Duration = Duration::from_millis(100);

/// Entry of the program: boots if it is process 1, and serves.
pub fn main() -> i32 {
    let second = std::env::args().nth(1).is_some_and(|a| a == boot::SECOND);
    let outcome = if second { boot::second().and_then(|()| run()) } else { boot::first() };
    if let Err(error) = outcome {
        eprintln!("atoll-guest: {error}");
    }
    boot::power_off();
    1
}

fn run() -> io::Result<()> {
    let agent = Arc::new(Agent::default());
    if let Ok(socket) = sys::listen_vsock(VSOCK_PORT) {
        let agent = agent.clone();
        std::thread::Builder::new().name("vsock".into()).spawn(move || {
            while let Ok(connection) = sys::accept(&socket) {
                let input = File::from(connection);
                let Ok(output) = input.try_clone() else { continue };
                let _ = serve(&agent, input, Box::new(output));
            }
        })?;
    }
    match boot::serial_port() {
        Some(path) => {
            let port = File::options().read(true).write(true).open(path)?;
            let output = port.try_clone()?;
            serve(&agent, Patient(port), Box::new(output))
        }
        None => loop {
            std::thread::park();
        },
    }
}

/// A virtio-serial port: it reads as ended while nobody is at its other end.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => std::thread::sleep(IDLE),
                other => return other,
            }
        }
    }
}
