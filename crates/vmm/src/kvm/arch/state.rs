//! What a processor and the chips around it hold, out of KVM and back into it.

use super::Kresult;
use crate::kvm::sys;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

const TSC: u32 = 0x10;
/// Fires when it is written, so it comes after the counter it is compared with.
const TSC_DEADLINE: u32 = 0x6e0;
/// KVM takes at most 256 registers a call.
const MOST_MSRS: usize = 256;

#[derive(Serialize, Deserialize)]
pub struct Vcpu {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Registers that KVM offers for saving.
pub fn msr_indices(kvm: &Kvm) -> Kresult<Vec<u32>> {
    Ok(kvm.get_msr_index_list()?.as_slice().to_vec())
}

/// Of a processor that stands between two instructions.
pub fn save(vcpu: &VcpuFd, indices: &[u32]) -> Kresult<Vcpu> {
    Ok(Vcpu {
        // first: it makes pending INIT and SIPI take effect
        mp_state: vcpu.get_mp_state()?,
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        xsave: vcpu.get_xsave()?,
        xcrs: vcpu.get_xcrs()?,
        debug: vcpu.get_debug_regs()?,
        lapic: vcpu.get_lapic()?,
        // not every KVM tells
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        msrs: read_msrs(vcpu, indices)?,
        events: vcpu.get_vcpu_events()?,
    })
}

fn batch(entries: &[kvm_msr_entry]) -> Kresult<Msrs> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
}

/// Those that can be read; KVM lists some that this processor does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Kresult<Vec<kvm_msr_entry>> {
    let mut wanted: Vec<u32> = indices.iter().copied().filter(|i| *i != TSC_DEADLINE).collect();
    wanted.push(TSC_DEADLINE);
    let (mut found, mut rest) = (Vec::new(), wanted.as_slice());
    while !rest.is_empty() {
        let some: Vec<_> =
            rest.iter().take(MOST_MSRS).map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = batch(&some)?;
        let n = vcpu.get_msrs(&mut msrs)?.min(some.len());
        found.extend(msrs.as_slice().iter().take(n));
        rest = rest.get(if n < some.len() { n + 1 } else { n }..).unwrap_or_default();
    }
    Ok(found)
}

pub fn load(vcpu: &VcpuFd, state: &Vcpu) -> Result<(), String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    vcpu.set_mp_state(state.mp_state).map_err(say("processor's state"))?;
    vcpu.set_regs(&state.regs).map_err(say("registers"))?;
    vcpu.set_sregs(&state.sregs).map_err(say("system registers"))?;
    sys::set_xsave(vcpu, &state.xsave).map_err(say("extended registers"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(say("extended control registers"))?;
    vcpu.set_debug_regs(&state.debug).map_err(say("debug registers"))?;
    if state.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != state.tsc_khz) {
        vcpu.set_tsc_khz(state.tsc_khz).map_err(say("frequency of the time stamp counter"))?;
    }
    vcpu.set_lapic(&state.lapic).map_err(say("local interrupt controller"))?;
    write_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).map_err(say("pending events"))
}

/// Counters first. One that this KVM refuses and that holds nothing is as good as set.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), String> {
    let mut sorted = msrs.to_vec();
    sorted.sort_by_key(|msr| match msr.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut rest = sorted.as_slice();
    while !rest.is_empty() {
        let some = rest.get(..rest.len().min(MOST_MSRS)).unwrap_or_default();
        let msrs = batch(some).map_err(|e| e.to_string())?;
        let n = vcpu.set_msrs(&msrs).map_err(|e| format!("model-specific registers: {e}"))?;
        if let Some(refused) = some.get(n)
            && refused.data != 0
        {
            return Err(format!("model-specific register {:#x} cannot be {:#x} here", refused.index, refused.data));
        }
        rest = rest.get(if n < some.len() { n + 1 } else { n }..).unwrap_or_default();
    }
    Ok(())
}

/// Interrupt controllers, timer, clock.
#[derive(Serialize, Deserialize)]
pub struct Chips {
    controllers: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

pub fn save_chips(vm: &VmFd) -> Kresult<Chips> {
    let mut controllers = Vec::new();
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip)?;
        controllers.push(chip);
    }
    let mut clock = vm.get_clock()?;
    // what it was then; flags would make it follow the host's time
    clock.flags = 0;
    Ok(Chips { controllers, pit: vm.get_pit2()?, clock })
}

pub fn load_chips(vm: &VmFd, chips: &Chips) -> Kresult<()> {
    vm.set_clock(&kvm_clock_data { flags: 0, ..chips.clock })?;
    for chip in chips.controllers.iter().filter(|chip| chip.chip_id <= KVM_IRQCHIP_IOAPIC) {
        vm.set_irqchip(chip)?;
    }
    vm.set_pit2(&chips.pit)
}

/// What a guest that was shown `then` would miss here, if anything: it goes on using what it once found.
pub fn misses(then: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<String> {
    let find = |set: &[kvm_cpuid_entry2], function: u32, index: u32| {
        set.iter().copied().find(|e| e.function == function && e.index == index)
    };
    let registers = |e: kvm_cpuid_entry2| [("eax", e.eax), ("ebx", e.ebx), ("ecx", e.ecx), ("edx", e.edx)];
    let of = |set: &[kvm_cpuid_entry2]| find(set, 0, 0).map(|e| (e.ebx, e.ecx, e.edx));
    if of(then) != of(here) {
        return Some("it was taken on another maker's processor".into());
    }
    /// (leaf, subleaf, registers whose bits are features)
    const FEATURES: [(u32, u32, &[&str]); 6] = [
        (1, 0, &["ecx", "edx"]),
        (7, 0, &["ebx", "ecx", "edx"]),
        (7, 1, &["eax"]),
        (0xd, 0, &["eax"]),
        (0xd, 1, &["eax"]),
        (0x8000_0001, 0, &["ecx", "edx"]),
    ];
    for (function, index, which) in FEATURES {
        let Some(needed) = find(then, function, index) else { continue };
        let has = find(here, function, index).unwrap_or_default();
        for ((name, needed), (_, has)) in registers(needed).into_iter().zip(registers(has)) {
            if which.contains(&name) && needed & !has != 0 {
                let missing = needed & !has;
                return Some(format!(
                    "this processor lacks features that the guest uses: CPUID {function:#x}.{index} {name} {missing:#x}"
                ));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processor_is_refused_unless_it_has_all_that_the_guest_was_shown() {
        let leaf = |function, ebx, edx| kvm_cpuid_entry2 { function, ebx, edx, ..Default::default() };
        let then = [leaf(0, 7, 9), leaf(1, 1, 0b1011)];
        assert_eq!(misses(&then, &then), None);
        assert_eq!(misses(&then, &[leaf(0, 7, 9), leaf(1, 2, 0b1111)]), None, "more does no harm, nor another number");
        assert!(misses(&then, &[leaf(0, 8, 9), leaf(1, 1, 0b1011)]).unwrap().contains("another maker"));
        assert!(misses(&then, &[leaf(0, 7, 9), leaf(1, 1, 0b1010)]).unwrap().contains("edx 0x1"));
        assert!(misses(&then, &[leaf(0, 7, 9)]).unwrap().contains("CPUID 0x1.0"));
    }
}
