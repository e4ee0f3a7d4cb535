//! All that is x86-64: what a processor is like when it starts, what it says of itself, what it holds ([`state`]).

pub mod state;

use super::boot::Entry;
use super::memory::{self, Memory};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_fpu, kvm_mp_state,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

pub const IOAPIC: u32 = 0xfec0_0000;
pub const LAPIC: u32 = 0xfee0_0000;
/// Pages that Intel's real mode emulation in KVM needs; inside the gap.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Interrupt lines for devices: the I/O APIC's, but those of the serial port, the power button and the PC's own.
pub const DEVICE_IRQS: [u32; 16] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22];

type Kresult<T> = Result<T, kvm_ioctls::Error>;

/// What a VM has before its first vCPU: interrupt controllers and a timer.
pub fn prepare(vm: &VmFd) -> Kresult<()> {
    vm.set_identity_map_address(IDENTITY_MAP)?;
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
}

pub fn supported_cpuid(kvm: &Kvm) -> Kresult<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// One processor, stopped before its first instruction. Only the first is given an entry; the others wait for the guest
/// to start them.
pub fn configure(vcpu: &VcpuFd, cpuid: &CpuId, id: u8, count: u8, memory: &Memory, entry: Entry) -> Kresult<()> {
    vcpu.set_cpuid2(&describe(cpuid, id, count))?;
    set_msrs(vcpu)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu)?;
    set_local_interrupts(vcpu)?;
    if id == 0 {
        enter(vcpu, memory, entry)?;
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    }
    Ok(())
}

/// Bits of CPUID a guest must not see, as (leaf, subleaf or any, ebx, ecx, edx): virtualisation of its own, monitor/mwait,
/// performance counters, enclaves, transactional memory, AMX (which needs the host's permission for each process).
const HIDDEN: [(u32, Option<u32>, u32, u32, u32); 4] = [
    (1, None, 0, 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 15, 1 << 21 | 1 << 22),
    (7, Some(0), 1 << 2 | 1 << 4 | 1 << 11, 1 << 30, 1 << 22 | 1 << 24 | 1 << 25),
    (0xd, Some(0), 0, 0, 0),
    (0x8000_0001, None, 0, 1 << 2 | 1 << 10 | 1 << 12, 0),
];
/// Leaves shown empty: monitor, performance counters, enclaves, AMX tiles, SVM.
const EMPTY: [u32; 6] = [5, 0xa, 0x12, 0x1d, 0x1e, 0x8000_000a];
/// XSAVE components of AMX.
const TILES: u32 = 1 << 17 | 1 << 18;

pub fn describe(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let width = u32::from(count).next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        for (leaf, subleaf, ebx, ecx, edx) in HIDDEN {
            if entry.function == leaf && subleaf.is_none_or(|s| s == entry.index) {
                (entry.ebx, entry.ecx, entry.edx) = (entry.ebx & !ebx, entry.ecx & !ecx, entry.edx & !edx);
            }
        }
        if EMPTY.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xff00 | u32::from(id) << 24 | u32::from(count) << 16 | entry.ebx & 0xff;
                // a hypervisor is here; the timer's deadline mode
                entry.ecx |= 1 << 31 | 1 << 24;
                entry.edx = if count > 1 { entry.edx | 1 << 28 } else { entry.edx & !(1 << 28) };
            }
            // caches: levels 1 and 2 each processor's own, the rest all share; all cores are in one package
            (4, _) if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << width) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1u32 << width) - 1) << 26;
            }
            (0xb | 0x1f, 0) => topology(entry, 0, 1, 1, id),
            (0xb | 0x1f, 1) => topology(entry, width, u32::from(count), 2, id),
            (0xb | 0x1f, _) => topology(entry, 0, 0, 0, id),
            (0xd, 0) => entry.eax &= !TILES,
            (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | width << 12 | (u32::from(count) - 1),
            (0x8000_001e, _) => {
                entry.eax = u32::from(id);
                entry.ebx = u32::from(id);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

fn topology(entry: &mut kvm_bindings::kvm_cpuid_entry2, shift: u32, count: u32, kind: u32, id: u8) {
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index | kind << 8;
    entry.edx = u32::from(id);
}

/// (index, value) as firmware leaves them: fast string instructions on, memory write-back by default.
const MSRS: [(u32, u64); 10] = [
    (0x174, 0),
    (0x175, 0),
    (0x176, 0),
    (0xc000_0081, 0),
    (0xc000_0082, 0),
    (0xc000_0083, 0),
    (0xc000_0084, 0),
    (0xc000_0102, 0),
    (0x1a0, 1),
    (0x2ff, 1 << 11 | 6),
];

fn set_msrs(vcpu: &VcpuFd) -> Kresult<()> {
    for (index, data) in MSRS {
        let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
        let msrs = msrs.map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
        // one this KVM does not have keeps its reset value
        vcpu.set_msrs(&msrs)?;
    }
    Ok(())
}

/// LINT0 takes the PIC's interrupts, LINT1 is NMI (MP specification 1.4, 3.6.2.2).
fn set_local_interrupts(vcpu: &VcpuFd) -> Kresult<()> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    let mut lapic = vcpu.get_lapic()?;
    for (at, mode) in [(LINT0, 7u32), (LINT1, 4)] {
        for (byte, value) in lapic.regs.iter_mut().skip(at).zip((mode << 8).to_le_bytes()) {
            *byte = value as i8;
        }
    }
    vcpu.set_lapic(&lapic)
}

/// Flags of a descriptor: type, present, code or data, granularity.
fn segment(index: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: kind,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long || kind == 3),
        g: 1,
        ..Default::default()
    }
}

fn descriptor(segment: &kvm_segment) -> u64 {
    let flags =
        u64::from(segment.type_) | 1 << 4 | 1 << 7 | u64::from(segment.l) << 13 | u64::from(segment.db) << 14 | 1 << 15;
    0xffff | flags << 40 | 0xf << 48
}

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

fn enter(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Kresult<()> {
    let fault = |_| kvm_ioctls::Error::new(libc::EFAULT);
    let mut sregs = vcpu.get_sregs()?;
    let long = matches!(entry, Entry::Long { .. });
    let (code, data) = (segment(2, 11, long), segment(3, 3, long));
    for (index, value) in [0, 0, descriptor(&code), descriptor(&data)].into_iter().enumerate() {
        memory.write_obj(value, GuestAddress(memory::GDT + 8 * index as u64)).map_err(fault)?;
    }
    (sregs.gdt.base, sregs.gdt.limit) = (memory::GDT, 31);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    sregs.cr0 |= 1;
    sregs.cr4 = 0;
    let mut regs = kvm_regs { rflags: 2, rsp: memory::BOOT_STACK, rbp: memory::BOOT_STACK, ..Default::default() };
    match entry {
        Entry::Long { address } => {
            identity_map(memory).map_err(fault)?;
            sregs.cr3 = memory::PAGE_TABLES;
            // physical address extension; paging; long mode enabled and active
            sregs.cr4 |= 1 << 5;
            sregs.cr0 |= 1 << 31;
            sregs.efer |= 1 << 8 | 1 << 10;
            (regs.rip, regs.rsi) = (address, memory::ZERO_PAGE);
        }
        Entry::Pvh { address } => (regs.rip, regs.rbx) = (address, memory::START_INFO),
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// The first 4 GiB, in pages of 2 MiB.
fn identity_map(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    const PAGE: u64 = 4096;
    let (top, middle, low) = (memory::PAGE_TABLES, memory::PAGE_TABLES + PAGE, memory::PAGE_TABLES + 2 * PAGE);
    memory.write_obj(middle | PRESENT_WRITABLE, GuestAddress(top))?;
    for gib in 0..4u64 {
        memory.write_obj((low + gib * PAGE) | PRESENT_WRITABLE, GuestAddress(middle + gib * 8))?;
    }
    let entries: Vec<u8> = (0..2048u64).flat_map(|n| (n << 21 | PRESENT_WRITABLE | LARGE).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn a_guest_is_not_shown_what_it_must_not_use() {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let supported =
            CpuId::from_entries(&[all(1, 0), all(7, 0), all(0xa, 0), all(0xb, 1), all(0xd, 0), all(0x8000_0001, 0)]);
        let shown = describe(&supported.unwrap(), 3, 5);
        let entry = |function| *shown.as_slice().iter().find(|e| e.function == function).unwrap();
        assert_eq!(entry(1).ecx & (1 << 5 | 1 << 3), 0);
        assert_eq!((entry(1).ebx >> 24, entry(1).ebx >> 16 & 0xff), (3, 5));
        assert_eq!(entry(0x8000_0001).ecx & 4, 0);
        assert_eq!((entry(0xa).eax, entry(0xd).eax & TILES), (0, 0));
        assert_eq!((entry(0xb).eax, entry(0xb).ebx, entry(0xb).edx), (3, 5, 3));
    }
}
