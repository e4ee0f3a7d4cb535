//! A machine from its parts to its end, in the jailed engine process. One thread owns the VM and is told everything in
//! one queue: what the monitor asks, and how the guest ends.

use super::acpi::{self, Place};
use super::bus::Bus;
use super::memory::{self, MMIO_BASE, MMIO_STRIDE, Memory};
use super::power::{self, Button, Power};
use super::serial::{self, Com1};
use super::sys::{self, Signal};
use super::vcpu::{self, Gate};
use super::virtio::Device;
use super::virtio::balloon::Balloon;
use super::virtio::block::Block;
use super::virtio::console::Console;
use super::virtio::mmio::{self, Transport};
use super::virtio::net::{Filter, Net};
use super::virtio::rng::Rng;
use super::virtio::vsock::Vsock;
use super::{End, Ending, Event, arch, boot, seccomp};
use crate::disk::{self, Disk};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What the monitor may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    PowerButton,
    Reset,
    Pause,
    Resume,
    /// Pages of 4 KiB that the guest shall give up in all.
    Balloon(u32),
}

pub type Answer = Result<(), String>;
const LONGEST_COMMAND: u64 = 4096;

/// A disk, handed over open.
pub struct DiskPart {
    pub file: File,
    pub kind: disk::Kind,
    pub read_only: bool,
    pub serial: String,
}

pub struct LinkPart {
    pub tap: OwnedFd,
    pub filter: Filter,
    pub mtu: u16,
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
        all.extend(self.link.iter().map(|l| l.tap.as_raw_fd()));
        for disk in &self.disks {
            all.push(disk.file.as_raw_fd());
            all.extend(disk.kind.descriptors());
        }
        all
    }
}

/// Runs the machine in this process, which is in its jail. The exit code; the reason of a bad end is on stderr.
pub fn main(parts: Parts) -> i32 {
    match serve(&parts) {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("{why}");
            1
        }
    }
}

fn serve(parts: &Parts) -> Result<(), String> {
    let say = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    sys::bound_heap();
    sys::prepare_wake().map_err(say("wake-up signal"))?;
    sys::landlock_deny_all().map_err(say("landlock"))?;
    seccomp::begin()?;
    let (sender, events) = sync_channel(64);
    let mut vm = Vm::build(parts, &sender)?;
    let control = parts.control.try_clone().map_err(say("control channel"))?;
    listen(parts.control.try_clone().map_err(say("control channel"))?, sender.clone())
        .map_err(say("control thread"))?;
    answer(&control, &Ok(()))?;
    vm.start(parts)?;
    loop {
        match events.recv() {
            Ok(Event::Command(Command::Reset)) => {
                vm = restart(vm, parts, &sender)?;
                answer(&control, &Ok(()))?;
            }
            Ok(Event::Command(command)) => answer(&control, &vm.command(command))?,
            Ok(Event::Guest(End::Reset)) => vm = restart(vm, parts, &sender)?,
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
        let mut reader = BufReader::new(control);
        loop {
            let mut line = Vec::new();
            let read = (&mut reader).take(LONGEST_COMMAND).read_until(b'\n', &mut line);
            let command = read.ok().filter(|n| *n > 0).and_then(|_| serde_json::from_slice(&line).ok());
            let event = command.map_or(Event::Orphaned, Event::Command);
            if sender.send(event).is_err() || command.is_none() {
                return;
            }
        }
    };
    thread.spawn(work).map(drop)
}

/// Field order is drop order: the VM's file goes before its memory.
struct Vm {
    threads: Vec<JoinHandle<()>>,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    button: Button,
    emptied: Option<Signal>,
    stop_input: Signal,
    input: Option<JoinHandle<()>>,
    vm: VmFd,
    memory: Memory,
}

impl Vm {
    fn build(parts: &Parts, sender: &SyncSender<Event>) -> Result<Vm, String> {
        let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let memory = memory::allocate(parts.memory_bytes).map_err(|e| e.to_string())?;
        let vm = parts.kvm.create_vm().map_err(say("create a VM"))?;
        sys::give_memory(&vm, &memory).map_err(say("give memory to the VM"))?;
        arch::prepare(&vm).map_err(say("interrupt controllers"))?;
        let ending = Ending(sender.clone());

        let mut transports = Vec::new();
        for device in devices(parts).map_err(failed("devices"))? {
            transports.push(Transport::new(device, memory.clone(), ending.clone()).map_err(failed("devices"))?);
        }
        let places = places(transports.len());
        for (transport, place) in transports.iter().zip(&places) {
            wire(&vm, transport, place).map_err(say("wire a device"))?;
        }
        let line = Signal::new().map_err(failed("serial port"))?;
        vm.register_irqfd(line.event_fd(), serial::IRQ).map_err(say("serial port"))?;
        let (com1, emptied) = Com1::new(line, &parts.console).map_err(failed("serial port"))?;
        let button = Button(Signal::new().map_err(failed("power button"))?);
        vm.register_irqfd(button.0.event_fd(), power::BUTTON_IRQ).map_err(say("power button"))?;

        acpi::write(&memory, parts.vcpus, &places).map_err(|e| format!("ACPI tables: {e}"))?;
        let entry = load(parts, &memory)?;
        let cpuid = arch::supported_cpuid(&parts.kvm).map_err(say("CPUID"))?;
        let mut vcpus = Vec::new();
        for id in 0..parts.vcpus {
            let vcpu = vm.create_vcpu(u64::from(id)).map_err(say("create a vCPU"))?;
            arch::configure(&vcpu, &cpuid, id, parts.vcpus, &memory, entry).map_err(say("set a vCPU up"))?;
            vcpus.push(vcpu);
        }
        let devices = transports.into_iter().map(Mutex::new).collect();
        let bus = Bus { serial: com1, power: Power { ending: ending.clone() }, devices, ending };
        Ok(Vm {
            threads: Vec::new(),
            vcpus,
            gate: Arc::new(Gate::new()),
            bus: Arc::new(bus),
            button,
            emptied: Some(emptied),
            stop_input: Signal::new().map_err(failed("serial port"))?,
            input: None,
            vm,
            memory,
        })
    }

    fn start(&mut self, parts: &Parts) -> Result<(), String> {
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        if let Some(emptied) = self.emptied.take().filter(|_| !wants_hvc(&parts.command_line)) {
            let stop = self.stop_input.try_clone().map_err(failed("serial port"))?;
            let console = parts.console.try_clone().map_err(failed("serial port"))?;
            self.input = Some(self.bus.serial.feed(console, emptied, stop).map_err(failed("serial port"))?);
        }
        for (id, vcpu) in self.vcpus.drain(..).enumerate() {
            let thread = vcpu::start(vcpu, id as u8, self.bus.clone(), self.gate.clone());
            self.threads.push(thread.map_err(failed("vCPU thread"))?);
        }
        Ok(())
    }

    fn command(&self, command: Command) -> Answer {
        match command {
            Command::PowerButton => self.button.press().map_err(|e| e.to_string()),
            Command::Pause => {
                self.gate.pause(&self.threads);
                Ok(())
            }
            Command::Resume => {
                self.gate.resume();
                Ok(())
            }
            Command::Balloon(pages) => self.balloon(pages),
            Command::Reset => Err("a reset makes the machine anew".into()),
        }
    }

    fn balloon(&self, pages: u32) -> Answer {
        // it is the last device
        let device = self.bus.devices.last().ok_or("no balloon")?;
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(to) = device.config.lock().get_mut(..4) {
            to.copy_from_slice(&pages.to_le_bytes());
        }
        device.config.generation.fetch_add(1, Ordering::SeqCst);
        device.interrupt.config();
        Ok(())
    }

    /// Stops everything that touches the guest's memory, then lets go of it.
    fn end(mut self) {
        self.gate.stop(&self.threads);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for device in &self.bus.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).stop();
        }
        let _ = self.stop_input.raise();
        if let Some(input) = self.input.take() {
            let _ = input.join();
        }
        drop(self.vm);
        drop(self.memory);
    }
}

fn wants_hvc(command_line: &str) -> bool {
    command_line.split_ascii_whitespace().any(|word| word.starts_with("console=hvc"))
}

fn load(parts: &Parts, memory: &Memory) -> Result<boot::Entry, String> {
    let clone = |file: &File| file.try_clone().map_err(|e| format!("kernel: {e}"));
    let mut kernel = clone(&parts.kernel)?;
    let mut initrd = parts.initrd.as_ref().map(clone).transpose()?;
    boot::load(memory, &mut kernel, initrd.as_mut(), &parts.command_line).map_err(|e| e.to_string())
}

/// In the order the guest finds them: disks first, so that they are named as they are listed.
fn devices(parts: &Parts) -> io::Result<Vec<Box<dyn Device>>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for part in &parts.disks {
        let disk: Box<dyn Disk> = disk::attach(part.file.try_clone()?, &part.kind, part.read_only)?;
        devices.push(Box::new(Block { disk, read_only: part.read_only, serial: part.serial.clone() }));
    }
    if let Some(link) = &parts.link {
        devices.push(Box::new(Net::new(link.tap.try_clone()?, link.filter.clone(), link.mtu)?));
    }
    devices.push(Box::new(Rng));
    devices.push(Box::new(Vsock::new(parts.vsock.try_clone()?)?));
    let input = wants_hvc(&parts.command_line);
    devices.push(Box::new(Console { console: parts.console.try_clone()?, input, full: false }));
    devices.push(Box::new(Balloon));
    Ok(devices)
}

/// Lines are shared when there are more devices than lines.
fn places(count: usize) -> Vec<Place> {
    let bases = (0..count as u64).map(|n| MMIO_BASE + n * MMIO_STRIDE);
    bases.zip(arch::DEVICE_IRQS.iter().cycle()).map(|(base, irq)| Place { base, irq: *irq }).collect()
}

/// Interrupts and kicks that go through KVM alone.
fn wire(vm: &VmFd, transport: &Transport, place: &Place) -> Result<(), kvm_ioctls::Error> {
    vm.register_irqfd(transport.interrupt.line.event_fd(), place.irq)?;
    for (index, kick) in transport.kicks.iter().enumerate() {
        vm.register_ioevent(kick.event_fd(), &IoEventAddress::Mmio(place.base + mmio::NOTIFY), index as u32)?;
    }
    Ok(())
}
