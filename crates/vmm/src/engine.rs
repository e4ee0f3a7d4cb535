//! What runs a machine. An engine turns a [`Machine`] into a command line and the file descriptors and files its process
//! needs; the monitor jails and starts it, and speaks to it through [`Control`]. Ours on KVM where that is native;
//! QEMU for what ours does not have, and with translation elsewhere.

use crate::kvm::Support;
use crate::kvm::engine::KvmEngine;
use crate::kvm::snapshot::memory::Pagemap;
use crate::machine::{Choice, Error, Machine, Result};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

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
    Inside { keep: Vec<RawFd>, main: Box<dyn FnOnce(Option<Pagemap>) -> i32> },
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
    /// Presses the power button; should the guest power off within [`REBOOT_GRACE`], it is reset instead.
    fn soft_reboot(&mut self) -> Result<()>;
    /// Looks whether a soft reboot goes on; true until it is done or was given up.
    fn rebooting(&mut self) -> Result<bool>;
    /// One more client of the screen.
    fn display(&mut self, client: OwnedFd) -> Result<()>;
    /// Writes all that the machine is at one moment, its disks aside; it goes on then, or stays paused if it was.
    fn snapshot(&mut self, files: &SnapshotFiles) -> Result<()>;
}

/// Where a snapshot goes: open, empty, on the same file system as what it may be a difference to.
pub struct SnapshotFiles {
    pub state: File,
    pub memory: File,
    /// The memory of an earlier full snapshot: only what differs from it is written.
    pub base: Option<File>,
}

/// How long a guest may take to power off where it is to start again.
pub const REBOOT_GRACE: Duration = Duration::from_secs(180);

/// How long the memory may take to be written.
pub const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(600);

pub trait Engine: Send + Sync {
    fn name(&self) -> &'static str;
    fn plan(&self, machine: &Machine) -> Result<Plan>;
    /// Returns when the machine runs.
    fn control(&self, machine: &Machine, channel: UnixStream) -> Result<Box<dyn Control>>;
}

/// The best engine for this machine on this computer: ours where KVM is native and it has all that the machine asks for.
/// KVM is measured only where that decides.
pub fn choose(machine: &Machine, probe: impl FnOnce() -> Support) -> Result<Box<dyn Engine>> {
    let then = machine.restore.as_ref().map_or("", |restore| restore.engine.as_str());
    if then == "qemu-tcg" {
        return qemu(false);
    }
    if machine.engine == Choice::Kvm || then == "kvm" {
        KvmEngine::fits(machine).map_err(|why| Error::NoEngine(format!("not the KVM engine: {why}")))?;
        return Ok(Box::new(KvmEngine));
    }
    let native = matches!(probe(), Support::Hardware { .. });
    if then == "qemu-kvm" && !native {
        let why = "the snapshot was taken by qemu-kvm, and this computer's KVM is not native (atoll doctor)";
        return Err(Error::NoEngine(why.into()));
    }
    if native && then.is_empty() && machine.engine == Choice::Best && KvmEngine::fits(machine).is_ok() {
        return Ok(Box::new(KvmEngine));
    }
    qemu(native)
}

fn qemu(native: bool) -> Result<Box<dyn Engine>> {
    crate::qemu::Qemu::find(native)
        .map(|engine| Box::new(engine) as Box<dyn Engine>)
        .ok_or_else(|| Error::NoEngine("qemu-system-x86_64 is not installed; apt-get install qemu-system-x86".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::sample;

    #[test]
    fn ours_where_kvm_is_native_and_it_has_what_the_machine_asks_for() {
        let hardware = || Support::Hardware { instructions_per_second: 1e9 };
        let emulated = || Support::Emulated { instructions_per_second: 1e6 };
        let name = |machine: &Machine, kvm: fn() -> Support| choose(machine, kvm).map_or("none", |e| e.name());
        assert_eq!(name(&sample(), hardware), "kvm");
        // without QEMU there is none for the rest
        assert!(matches!(name(&sample(), emulated), "qemu-tcg" | "none"));
        let mut firmware = sample();
        (firmware.kernel, firmware.initrd) = (None, None);
        assert!(matches!(name(&firmware, hardware), "qemu-kvm" | "none"));
        let mut sata = sample();
        sata.disks[0].bus = "sata".into();
        assert!(matches!(name(&sata, hardware), "qemu-kvm" | "none"));
        sata.engine = Choice::Kvm;
        assert!(choose(&sata, hardware).err().unwrap().to_string().contains("not on virtio"));
    }
}
