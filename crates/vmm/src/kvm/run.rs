//! A machine from its parts to its end, in the jailed engine process. One thread owns the VM and is told everything in
//! one queue: what the monitor asks, and how the guest ends.

use super::snapshot::memory::Pagemap;
use super::sys;
use super::virtio::net::Filter;
use super::vm::Vm;
use super::{End, Event, seccomp};
use crate::channel::Lines;
use crate::disk;
use crate::engine::REBOOT_GRACE;
use crate::machine::Rate;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

/// What the monitor may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    PowerButton,
    /// The power button; a power-off soon after it is a reset.
    SoftReboot,
    Reset,
    Pause,
    Resume,
    /// Pages of 4 KiB that the guest shall give up in all.
    Balloon(u32),
    /// Writes the machine's state and memory to the two descriptors that come with this; a third is the memory of the
    /// snapshot that this one shall be a difference to.
    Snapshot,
}

pub type Answer = Result<(), String>;
const LONGEST_COMMAND: usize = 4096;

/// A disk, handed over open.
pub struct DiskPart {
    pub file: File,
    pub kind: disk::Kind,
    pub read_only: bool,
    pub serial: String,
    pub rate: Rate,
}

pub struct LinkPart {
    pub tap: OwnedFd,
    pub filter: Filter,
    pub mtu: u16,
}

/// The snapshot that the machine goes on from.
pub struct RestoreParts {
    pub state: File,
    /// Of the snapshot itself, or of what it is a difference to.
    pub memory: File,
    pub difference: Option<File>,
    /// Every page is read and compared with its checksum first.
    pub verify: bool,
}

/// All that the machine is made of; nothing is opened later.
pub struct Parts {
    pub kvm: Kvm,
    pub kernel: File,
    pub initrd: Option<File>,
    pub command_line: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub disks: Vec<DiskPart>,
    pub link: Option<LinkPart>,
    pub vsock: UnixListener,
    pub console: UnixStream,
    pub control: UnixStream,
    pub restore: Option<RestoreParts>,
}

impl Parts {
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut all = vec![
            self.kvm.as_raw_fd(),
            self.kernel.as_raw_fd(),
            self.vsock.as_raw_fd(),
            self.console.as_raw_fd(),
            self.control.as_raw_fd(),
        ];
        all.extend(self.initrd.iter().map(AsRawFd::as_raw_fd));
        if let Some(restore) = &self.restore {
            all.extend([restore.state.as_raw_fd(), restore.memory.as_raw_fd()]);
            all.extend(restore.difference.iter().map(AsRawFd::as_raw_fd));
        }
        all.extend(self.link.iter().map(|l| l.tap.as_raw_fd()));
        for disk in &self.disks {
            all.push(disk.file.as_raw_fd());
            all.extend(disk.kind.descriptors());
        }
        all
    }
}

/// Runs the machine in this process, which is in its jail. The exit code; the reason of a bad end is on stderr.
pub fn main(parts: Parts, pagemap: Option<Pagemap>) -> i32 {
    match serve(parts, pagemap) {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("{why}");
            1
        }
    }
}

fn serve(mut parts: Parts, pagemap: Option<Pagemap>) -> Result<(), String> {
    let say = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    sys::bound_heap();
    sys::prepare_wake().map_err(say("wake-up signal"))?;
    sys::landlock_deny_all().map_err(say("landlock"))?;
    seccomp::begin()?;
    let (sender, events) = sync_channel(64);
    let restore = parts.restore.take();
    let mut vm = match &restore {
        Some(restore) => Vm::restore(&parts, &sender, restore)?,
        None => Vm::build(&parts, &sender)?,
    };
    drop(restore);
    let control = parts.control.try_clone().map_err(say("control channel"))?;
    listen(parts.control.try_clone().map_err(say("control channel"))?, sender.clone())
        .map_err(say("control thread"))?;
    answer(&control, &Ok(()))?;
    vm.start(&parts)?;
    let mut reboot_until: Option<Instant> = None;
    loop {
        let event = events.recv();
        let rebooting = reboot_until.is_some_and(|until| Instant::now() < until);
        match event {
            Ok(Event::Command(Command::SoftReboot, _)) => {
                reboot_until = Some(Instant::now() + REBOOT_GRACE);
                answer(&control, &vm.command(Command::PowerButton))?;
            }
            Ok(Event::Command(Command::PowerButton, _)) => {
                reboot_until = None;
                answer(&control, &vm.command(Command::PowerButton))?;
            }
            Ok(Event::Guest(End::PowerOff)) if rebooting => {
                reboot_until = None;
                vm = restart(vm, &parts, &sender)?;
            }
            Ok(Event::Command(Command::Reset, _)) => {
                vm = restart(vm, &parts, &sender)?;
                answer(&control, &Ok(()))?;
            }
            Ok(Event::Command(Command::Snapshot, files)) => {
                answer(&control, &vm.snapshot(&parts, files, pagemap.as_ref()))?;
            }
            Ok(Event::Command(command, _)) => answer(&control, &vm.command(command))?,
            Ok(Event::Guest(End::Reset)) => vm = restart(vm, &parts, &sender)?,
            Ok(Event::Guest(End::PowerOff)) | Ok(Event::Orphaned) | Err(_) => {
                vm.end();
                return Ok(());
            }
            Ok(Event::Guest(End::Broken(why))) => {
                vm.end();
                return Err(format!("the guest broke its machine: {why}"));
            }
        }
    }
}

/// Everything anew, as at the start; the disks are as they were left.
fn restart(old: Vm, parts: &Parts, sender: &SyncSender<Event>) -> Result<Vm, String> {
    old.end();
    let mut vm = Vm::build(parts, sender)?;
    vm.start(parts)?;
    Ok(vm)
}

fn answer(mut control: &UnixStream, answer: &Answer) -> Result<(), String> {
    let mut text = serde_json::to_vec(answer).map_err(|e| e.to_string())?;
    text.push(b'\n');
    control.write_all(&text).map_err(|e| format!("control channel: {e}"))
}

/// Reads commands until the monitor is gone.
fn listen(control: UnixStream, sender: SyncSender<Event>) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("control".into()).stack_size(128 << 10);
    let work = move || {
        let mut lines = Lines::new(control);
        loop {
            let next = lines.next(LONGEST_COMMAND).ok().flatten();
            let command = next.and_then(|(line, files)| Some((serde_json::from_slice(&line).ok()?, files)));
            let last = command.is_none();
            let event = command.map_or(Event::Orphaned, |(command, files)| Event::Command(command, files));
            if sender.send(event).is_err() || last {
                return;
            }
        }
    };
    thread.spawn(work).map(drop)
}
