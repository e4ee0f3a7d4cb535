//! What kind of KVM this computer has, measured. A `/dev/kvm` that only emulates kernel-mode code is worse than QEMU's
//! translator, so finding the device is not enough: a short kernel-mode loop is timed.

use crate::sys::GuestPage;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use std::time::Instant;

/// Loop turns of the measuring guest. Native: tens of microseconds. Emulated: tens of milliseconds.
const TURNS: u32 = 40_000;
/// Instructions a second below which kernel-mode code is not running natively.
const NATIVE: f64 = 50e6;

#[derive(Clone, Debug, PartialEq)]
pub enum Support {
    Absent {
        why: String,
    },
    /// The device works, but guest kernel code is emulated at about this many instructions a second.
    Emulated {
        instructions_per_second: f64,
    },
    Hardware {
        instructions_per_second: f64,
    },
}

/// Takes a few milliseconds with hardware, up to about 100 ms emulated.
pub fn probe() -> Support {
    match measure() {
        Ok(speed) if speed >= NATIVE => Support::Hardware { instructions_per_second: speed },
        Ok(speed) => Support::Emulated { instructions_per_second: speed },
        Err(why) => Support::Absent { why },
    }
}

fn measure() -> Result<f64, String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let kvm = Kvm::new().map_err(say("/dev/kvm"))?;
    let vm = kvm.create_vm().map_err(say("create a VM"))?;
    let page = GuestPage::new().map_err(|e| format!("map guest memory: {e}"))?;
    // mov ecx, TURNS; again: dec ecx; jnz again; hlt   (32-bit flat protected mode, CPL 0)
    let mut code = vec![0xb9];
    code.extend(TURNS.to_le_bytes());
    code.extend([0x49, 0x75, 0xfd, 0xf4]);
    page.write(&code);
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0x1000,
        memory_size: page.len() as u64,
        userspace_addr: page.address(),
        flags: 0,
    };
    page.give_to(&vm, region).map_err(say("give memory to the VM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(say("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(say("read registers"))?;
    sregs.cr0 |= 1;
    for (segment, kind) in [(&mut sregs.cs, 11), (&mut sregs.ds, 3), (&mut sregs.es, 3), (&mut sregs.ss, 3)] {
        (segment.base, segment.limit, segment.type_) = (0, 0xffff_ffff, kind);
        (segment.selector, segment.present, segment.s, segment.db, segment.g) = (8, 1, 1, 1, 1);
        segment.dpl = 0;
    }
    vcpu.set_sregs(&sregs).map_err(say("set registers"))?;
    let mut regs = vcpu.get_regs().map_err(say("read registers"))?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).map_err(say("set registers"))?;
    let begun = Instant::now();
    match vcpu.run().map_err(say("run"))? {
        VcpuExit::Hlt => Ok(f64::from(TURNS) * 2.0 / begun.elapsed().as_secs_f64().max(1e-9)),
        other => Err(format!("the measuring guest stopped with {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn probing_never_fails_hard() {
        println!("{:?}", super::probe());
    }
}
