//! A machine to files and back.
//!
//! Saving: vCPUs stop at the gate -> each completes the instruction it was at -> devices' threads stop between requests ->
//! processors, chips, devices and memory are read -> devices and vCPUs go on.

use super::{Origin, Vm, devices};
use crate::kvm::generation::random;
use crate::kvm::run::{Answer, Parts, RestoreParts};
use crate::kvm::snapshot::memory::{self as pages, Pagemap};
use crate::kvm::snapshot::{Id, Outline, State};
use crate::kvm::virtio::Device;
use crate::kvm::virtio::mmio::Transport;
use crate::kvm::{Event, Fault, arch, vcpu};
use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::SyncSender;

pub fn outline(parts: &Parts, devices: &[Box<dyn Device>]) -> Outline {
    let devices = devices.iter().map(|device| (device.id(), device.size())).collect();
    Outline { vcpus: parts.vcpus, memory_bytes: parts.memory_bytes, devices }
}

impl Vm {
    /// Saves the machine to `files`: state, memory and, for a difference, the base's memory.
    pub fn snapshot(&self, parts: &Parts, files: Vec<OwnedFd>, pagemap: Option<&Pagemap>) -> Answer {
        let mut files = files.into_iter().map(File::from);
        let (Some(state), Some(memory)) = (files.next(), files.next()) else {
            return Err("a snapshot needs files for state and memory".into());
        };
        let paused = self.gate.is_paused();
        self.gate.pause(&self.threads);
        for vcpu in &self.vcpus {
            vcpu::settle(&mut vcpu::lock(vcpu), &self.bus);
        }
        self.devices().for_each(|mut device| device.hold());
        let done = self.save(parts, &state, &memory, files.next().as_ref(), pagemap);
        if paused {
            return done;
        }
        let gone = self.go_on();
        self.gate.resume();
        gone.and(done)
    }

    fn save(&self, parts: &Parts, to: &File, memory: &File, base: Option<&File>, pagemap: Option<&Pagemap>) -> Answer {
        let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let id = Id(random().map_err(|e| format!("snapshot's id: {e}"))?);
        let base_id = base.map(|file| pages::id(file, parts.memory_bytes)).transpose().map_err(|e| e.to_string())?;
        let indices = arch::state::msr_indices(&parts.kvm).map_err(say("list of registers"))?;
        let saved = self.vcpus.iter().map(|vcpu| arch::state::save(&vcpu::lock(vcpu), &indices));
        let vcpus = saved.collect::<Result<_, _>>().map_err(say("save a processor"))?;
        let chips = arch::state::save_chips(&self.vm).map_err(say("save the interrupt controllers"))?;
        let devices = self.devices().map(|device| device.save()).collect::<Result<_, _>>();
        let written = pages::write(&self.memory, pagemap, memory, id, base);
        let written = written.map_err(|e| e.to_string())?;
        let state = State {
            id,
            base: base_id.map(|base| (base, written.runs)),
            memory_sum: written.sum,
            outline: self.outline.clone(),
            cpuid: self.cpuid.as_slice().to_vec(),
            vcpus,
            chips,
            devices: devices.map_err(|Fault(why)| why)?,
            serial: self.bus.serial.save(),
        };
        let bytes = state.encode().map_err(|e| e.to_string())?;
        to.write_all_at(&bytes, 0).and_then(|()| to.sync_data()).map_err(|e| format!("write the snapshot: {e}"))
    }

    /// A machine as it was saved, before its next instruction.
    pub fn restore(parts: &Parts, sender: &SyncSender<Event>, from: &RestoreParts) -> Result<Vm, String> {
        let state = State::read(&from.state).map_err(|e| e.to_string())?;
        let supported = arch::supported_cpuid(&parts.kvm).map_err(|e| format!("CPUID: {e}"))?;
        let shown = |cpuid: &CpuId| arch::describe(cpuid, 0, parts.vcpus).as_slice().to_vec();
        let devices = devices(parts)?;
        let fits = state.fits(&outline(parts, &devices), &shown(&then(&state)?), &shown(&supported));
        fits.map_err(|e| e.to_string())?;
        let memory = memory(&state, parts.memory_bytes, from)?;
        Self::assemble(parts, sender, devices, memory, Origin::Saved(Box::new(state)))
    }

    /// Lets a restored machine's devices go on, and tells the guest what it slept through.
    pub(super) fn wake(&self) -> Result<(), String> {
        for mut device in self.devices() {
            device.go_on().map_err(|Fault(why)| why)?;
            device.remind();
        }
        for vcpu in &self.vcpus {
            // only a guest with KVM's clock has use for it
            let _ = vcpu::lock(vcpu).kvmclock_ctrl();
        }
        self.generation.tell();
        Ok(())
    }
}

/// What KVM offered when it was saved.
fn then(state: &State) -> Result<CpuId, String> {
    CpuId::from_entries(&state.cpuid).map_err(|_| "snapshot: too many CPUID leaves".to_owned())
}

fn memory(state: &State, bytes: u64, from: &RestoreParts) -> Result<crate::kvm::memory::Memory, String> {
    let say = |e: crate::kvm::snapshot::Error| e.to_string();
    match (&state.base, &from.difference) {
        (None, None) => {
            if from.verify {
                pages::verify(&from.memory, bytes, state.id, state.memory_sum).map_err(say)?;
            }
            pages::map(bytes, &from.memory, state.id).map_err(say)
        }
        (Some((base, runs)), Some(difference)) => {
            let memory = pages::map(bytes, &from.memory, *base).map_err(say)?;
            pages::apply(&memory, difference, state.id, runs, state.memory_sum).map_err(say)?;
            Ok(memory)
        }
        (Some(_), None) => Err("snapshot: is a difference; it needs its base's memory and its own".into()),
        (None, Some(_)) => Err("snapshot: is whole; it goes over no other".into()),
    }
}

/// The processors as they were, and the chips around them.
pub fn vcpus(parts: &Parts, vm: &VmFd, state: &State) -> Result<(Vec<VcpuFd>, CpuId), String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let cpuid = then(state)?;
    let mut vcpus = Vec::new();
    for id in 0..parts.vcpus {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(say("create a vCPU"))?;
        vcpu.set_cpuid2(&arch::describe(&cpuid, id, parts.vcpus)).map_err(say("set a vCPU up"))?;
        vcpus.push(vcpu);
    }
    arch::state::load_chips(vm, &state.chips).map_err(say("snapshot: interrupt controllers"))?;
    for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
        arch::state::load(vcpu, saved).map_err(|why| format!("snapshot: {why}"))?;
    }
    Ok((vcpus, cpuid))
}

pub fn load_devices(transports: &mut [Transport], state: &State) -> Result<(), String> {
    for (transport, saved) in transports.iter_mut().zip(&state.devices) {
        transport.load(saved).map_err(|Fault(why)| format!("snapshot: {why}"))?;
    }
    Ok(())
}
