//! What kind of KVM this computer has, measured. A `/dev/kvm` that only emulates kernel-mode code is worse than QEMU's
//! translator, so finding the device is not enough: a short kernel-mode loop is timed.

use crate::sys::GuestPage;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::time::{Duration, Instant};

/// Loop turns of the measuring guest. Native: tens of microseconds. Emulated: tens of milliseconds.
const TURNS: u32 = 20_000;
const TRIES: usize = 4;
/// An emulated loop takes longer than this, each time.
const SOON: Duration = Duration::from_millis(12);
/// Where entering a guest is what takes long (KVM inside a translated machine), a longer loop tells.
const MORE_TURNS: u32 = 1_000_000;
/// Instructions a second below which kernel-mode code is not running natively.
const NATIVE: f64 = 15e6;

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
    page.write(&loop_of(TURNS));
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
    let speed = |turns: u32, took: Duration| f64::from(turns) * 2.0 / took.as_secs_f64().max(1e-9);
    // the first entry takes long by itself, and a busy computer makes one measurement look slow, hardly all of them
    let mut best = Duration::MAX;
    for run in 0..TRIES {
        best = best.min(time(&mut vcpu)?);
        if speed(TURNS, best) >= NATIVE || (run > 0 && best > SOON) {
            return Ok(speed(TURNS, best));
        }
    }
    page.write(&loop_of(MORE_TURNS));
    Ok(speed(MORE_TURNS, time(&mut vcpu)?))
}

/// mov ecx, turns; again: dec ecx; jnz again; hlt   (32-bit flat protected mode, CPL 0)
fn loop_of(turns: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(turns.to_le_bytes());
    code.extend([0x49, 0x75, 0xfd, 0xf4]);
    code
}

fn time(vcpu: &mut VcpuFd) -> Result<Duration, String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let mut regs = vcpu.get_regs().map_err(say("read registers"))?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).map_err(say("set registers"))?;
    let begun = Instant::now();
    match vcpu.run().map_err(say("run"))? {
        VcpuExit::Hlt => Ok(begun.elapsed()),
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
