//! The machine itself, in the hands of the thread that owns it.

mod saving;

use super::acpi::{self, Place};
use super::bus::Bus;
use super::generation::{self, Generation};
use super::memory::{self, MMIO_BASE, MMIO_STRIDE, Memory};
use super::power::{self, Button, Power};
use super::run::{Answer, Command, Parts};
use super::serial::{self, Com1};
use super::snapshot::{Outline, State};
use super::sys::{self, Signal};
use super::vcpu::{self, Gate};
use super::virtio::Device;
use super::virtio::balloon::Balloon;
use super::virtio::block::Block;
use super::virtio::console::Console;
use super::virtio::mmio::{self, Transport};
use super::virtio::net::Net;
use super::virtio::rate::Limiter;
use super::virtio::rng::Rng;
use super::virtio::vsock::Vsock;
use super::{Ending, Event, arch, boot};
use crate::disk::{self, Disk};
use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, VmFd};
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Field order is drop order: the VM's file goes before its memory.
pub struct Vm {
    threads: Vec<JoinHandle<()>>,
    vcpus: Vec<vcpu::Shared>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    button: Button,
    generation: Generation,
    /// What KVM offered, and what the machine is made of: for a snapshot.
    cpuid: CpuId,
    outline: Outline,
    /// Its devices wait for [`Vm::start`].
    restored: bool,
    emptied: Option<Signal>,
    stop_input: Signal,
    input: Option<JoinHandle<()>>,
    vm: VmFd,
    memory: Memory,
}

/// What a machine begins as.
enum Origin {
    /// Its firmware's state, its kernel loaded.
    Boot(boot::Entry),
    Saved(Box<State>),
}

impl Vm {
    /// A machine before its kernel's first instruction.
    pub fn build(parts: &Parts, sender: &SyncSender<Event>) -> Result<Vm, String> {
        let devices = devices(parts)?;
        let memory = memory::allocate(parts.memory_bytes).map_err(|e| e.to_string())?;
        let entry = load(parts, &memory)?;
        Self::assemble(parts, sender, devices, memory, Origin::Boot(entry))
    }

    fn assemble(
        parts: &Parts,
        sender: &SyncSender<Event>,
        devices: Vec<Box<dyn Device>>,
        memory: Memory,
        origin: Origin,
    ) -> Result<Vm, String> {
        let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let vm = parts.kvm.create_vm().map_err(say("create a VM"))?;
        sys::give_memory(&vm, &memory).map_err(say("give memory to the VM"))?;
        arch::prepare(&vm).map_err(say("interrupt controllers"))?;
        let ending = Ending(sender.clone());

        let outline = saving::outline(parts, &devices);
        let mut transports = Vec::new();
        for device in devices {
            transports.push(Transport::new(device, memory.clone(), ending.clone()).map_err(failed("devices"))?);
        }
        let places = places(transports.len());
        for (transport, place) in transports.iter().zip(&places) {
            wire(&vm, transport, place).map_err(say("wire a device"))?;
        }
        let line = |irq: u32, what: &'static str| -> Result<Signal, String> {
            let line = Signal::new().map_err(failed(what))?;
            vm.register_irqfd(line.event_fd(), irq).map_err(say(what))?;
            Ok(line)
        };
        let com1 = line(serial::IRQ, "serial port")?;
        let com1 = match &origin {
            Origin::Boot(_) => Com1::new(com1, &parts.console),
            Origin::Saved(state) => Com1::restored(&state.serial, com1, &parts.console),
        };
        let (com1, emptied) = com1.map_err(failed("serial port"))?;
        let button = Button(line(power::BUTTON_IRQ, "power button")?);
        let generation = Generation(line(generation::IRQ, "generation id")?);

        generation.renew(&memory).map_err(|e| format!("generation id: {e}"))?;
        let (vcpus, cpuid) = match &origin {
            Origin::Boot(entry) => {
                acpi::write(&memory, parts.vcpus, &places).map_err(|e| format!("ACPI tables: {e}"))?;
                first_vcpus(parts, &vm, &memory, *entry)?
            }
            Origin::Saved(state) => {
                saving::load_devices(&mut transports, state)?;
                saving::vcpus(parts, &vm, state)?
            }
        };
        let devices = transports.into_iter().map(Mutex::new).collect();
        let bus = Bus { serial: com1, power: Power { ending: ending.clone() }, devices, ending };
        Ok(Vm {
            threads: Vec::new(),
            vcpus: vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect(),
            gate: Arc::new(Gate::new()),
            bus: Arc::new(bus),
            button,
            generation,
            cpuid,
            outline,
            restored: matches!(origin, Origin::Saved(_)),
            emptied: Some(emptied),
            stop_input: Signal::new().map_err(failed("serial port"))?,
            input: None,
            vm,
            memory,
        })
    }

    fn devices(&self) -> impl Iterator<Item = MutexGuard<'_, Transport>> {
        self.bus.devices.iter().map(|device| device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn start(&mut self, parts: &Parts) -> Result<(), String> {
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        if let Some(emptied) = self.emptied.take().filter(|_| !wants_hvc(&parts.command_line)) {
            let stop = self.stop_input.try_clone().map_err(failed("serial port"))?;
            let console = parts.console.try_clone().map_err(failed("serial port"))?;
            self.input = Some(self.bus.serial.feed(console, emptied, stop).map_err(failed("serial port"))?);
        }
        if std::mem::take(&mut self.restored) {
            self.wake()?;
        }
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let thread = vcpu::start(vcpu.clone(), id as u8, self.bus.clone(), self.gate.clone());
            self.threads.push(thread.map_err(failed("vCPU thread"))?);
        }
        Ok(())
    }

    pub fn command(&self, command: Command) -> Answer {
        match command {
            Command::PowerButton => self.button.press().map_err(|e| e.to_string()),
            Command::Pause => {
                self.gate.pause(&self.threads);
                self.devices().for_each(|mut device| device.hold());
                Ok(())
            }
            Command::Resume => {
                self.go_on()?;
                self.gate.resume();
                Ok(())
            }
            Command::Balloon(pages) => self.balloon(pages),
            Command::Reset | Command::Snapshot | Command::SoftReboot => {
                Err("needs more than the machine as it is".into())
            }
        }
    }

    /// Lets the devices go on, all of them that can.
    fn go_on(&self) -> Answer {
        let failed = self.devices().filter_map(|mut device| device.go_on().err()).last();
        failed.map_or(Ok(()), |crate::kvm::Fault(why)| Err(format!("a device did not go on: {why}")))
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
    pub fn end(mut self) {
        self.gate.stop(&self.threads);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.devices().for_each(|mut device| device.stop());
        let _ = self.stop_input.raise();
        if let Some(input) = self.input.take() {
            let _ = input.join();
        }
        self.vcpus.clear();
        drop(self.vm);
        drop(self.memory);
    }
}

fn first_vcpus(
    parts: &Parts,
    vm: &VmFd,
    memory: &Memory,
    entry: boot::Entry,
) -> Result<(Vec<kvm_ioctls::VcpuFd>, CpuId), String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let cpuid = arch::supported_cpuid(&parts.kvm).map_err(say("CPUID"))?;
    let mut vcpus = Vec::new();
    for id in 0..parts.vcpus {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(say("create a vCPU"))?;
        arch::configure(&vcpu, &cpuid, id, parts.vcpus, memory, entry).map_err(say("set a vCPU up"))?;
        vcpus.push(vcpu);
    }
    Ok((vcpus, cpuid))
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
fn devices(parts: &Parts) -> Result<Vec<Box<dyn Device>>, String> {
    list(parts).map_err(|e| format!("devices: {e}"))
}

fn list(parts: &Parts) -> io::Result<Vec<Box<dyn Device>>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for part in &parts.disks {
        let disk: Box<dyn Disk> = disk::attach(part.file.try_clone()?, &part.kind, part.read_only)?;
        let (serial, limiter) = (part.serial.clone(), Limiter::new(part.rate));
        devices.push(Box::new(Block { disk, read_only: part.read_only, serial, limiter }));
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
