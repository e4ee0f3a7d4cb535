//! What runs a machine. An engine turns a [`Machine`] into a command line and the file descriptors and files its process
//! needs; the monitor jails and starts it, and speaks to it through [`Control`]. Ours on KVM where that is native;
//! QEMU for what ours does not have, and with translation elsewhere.

use crate::kvm::Support;
use crate::kvm::engine::KvmEngine;
use crate::machine::{Choice, Error, Machine, Result};
use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// What to run in the jail, and the monitor's ends of its channels.
pub struct Plan {
    pub work: Work,
    /// The monitor's end of the serial console.
    pub console: UnixStream,
    /// The monitor's end of the control channel.
    pub control: UnixStream,
}

pub enum Work {
    /// Another program; its directories are shown read-only.
    Execute(Program),
    /// This program, forked: it sees nothing but what it holds open.
    Inside { keep: Vec<RawFd>, main: Box<dyn FnOnce() -> i32> },
}

pub struct Program {
    pub path: PathBuf,
    pub args: Vec<OsString>,
    /// Handed over open, at exactly these numbers (10 and up).
    pub descriptors: Vec<(i32, OwnedFd)>,
    /// Read-only files shown inside the jail: (where inside, which file).
    pub files: Vec<(PathBuf, PathBuf)>,
    pub needs_kvm: bool,
}

/// Runs in the monitor, on the engine's control channel.
pub trait Control: Send {
    /// Presses the power button.
    fn power_button(&mut self) -> Result<()>;
    fn reset(&mut self) -> Result<()>;
    fn pause(&mut self) -> Result<()>;
    fn resume(&mut self) -> Result<()>;
    /// The guest shall give up this many pages of 4 KiB in all.
    fn balloon(&mut self, pages: u32) -> Result<()>;
}

pub trait Engine: Send + Sync {
    fn name(&self) -> &'static str;
    fn plan(&self, machine: &Machine) -> Result<Plan>;
    fn control(&self, channel: UnixStream) -> Result<Box<dyn Control>>;
}

/// The best engine for this machine on this computer: ours where KVM is native and it has all that the machine asks for.
pub fn choose(wanted: Choice, kvm: &Support, machine: &Machine) -> Result<Box<dyn Engine>> {
    let native = matches!(kvm, Support::Hardware { .. });
    let own = match wanted {
        Choice::Best => native && KvmEngine::fits(machine).is_ok(),
        Choice::Kvm => {
            KvmEngine::fits(machine).map_err(|why| Error::NoEngine(format!("not the KVM engine: {why}")))?;
            true
        }
        Choice::Qemu => false,
    };
    if own {
        return Ok(Box::new(KvmEngine));
    }
    crate::qemu::Qemu::find(native)
        .map(|engine| Box::new(engine) as Box<dyn Engine>)
        .ok_or_else(|| Error::NoEngine("qemu-system-x86_64 is not installed; apt-get install qemu-system-x86".into()))
}
