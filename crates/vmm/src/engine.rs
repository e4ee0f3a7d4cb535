//! What runs a machine. An engine turns a [`Machine`] into a command line and the file descriptors and files its process
//! needs; the monitor jails and starts it, and speaks to it through [`Control`]. Today: QEMU, with KVM where that is
//! native and translation elsewhere.

use crate::kvm::Support;
use crate::machine::{Error, Machine, Result};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// A process to start in the jail.
pub struct Plan {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Handed over open, at exactly these numbers (10 and up).
    pub descriptors: Vec<(i32, OwnedFd)>,
    /// Read-only files shown inside the jail: (where inside, which file).
    pub files: Vec<(PathBuf, PathBuf)>,
    pub needs_kvm: bool,
    /// The monitor's end of the serial console.
    pub console: UnixStream,
    /// The monitor's end of the control channel.
    pub control: UnixStream,
}

/// Runs in the monitor, on the engine's control channel.
pub trait Control: Send {
    /// Presses the power button.
    fn power_button(&mut self) -> Result<()>;
    fn reset(&mut self) -> Result<()>;
    fn pause(&mut self) -> Result<()>;
    fn resume(&mut self) -> Result<()>;
}

pub trait Engine: Send + Sync {
    fn name(&self) -> &'static str;
    fn plan(&self, machine: &Machine) -> Result<Plan>;
    fn control(&self, channel: UnixStream) -> Result<Box<dyn Control>>;
}

/// The best engine for this computer.
pub fn choose(kvm: &Support) -> Result<Box<dyn Engine>> {
    let native = matches!(kvm, Support::Hardware { .. });
    crate::qemu::Qemu::find(native)
        .map(|engine| Box::new(engine) as Box<dyn Engine>)
        .ok_or_else(|| Error::NoEngine("qemu-system-x86_64 is not installed; apt-get install qemu-system-x86".into()))
}
