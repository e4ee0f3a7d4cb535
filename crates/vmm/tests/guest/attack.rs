//! The hostile guest: each name breaks one rule of one device.

use crate::virtio::{Device, INDIRECT, NEXT, WRITE};
use crate::{in8, is, out8, read32, report, say, say_hex, write16, write32, write64};
use core::arch::asm;

pub fn run(name: u64) {
    let named = |word: &str| is(name, word.as_bytes()) && matches!(crate::read8(name + word.len() as u64), 0 | b' ');
    let attacks: [(&str, fn()); 22] = [
        ("loop", || block(|d| d.descriptor(0, 0, d.buffer(0), 16, NEXT, 0))),
        ("outside", || block(|d| d.descriptor(0, 0, 0x7fff_ffff_f000, 4096, WRITE, 0))),
        ("gap", || block(|d| d.descriptor(0, 0, 0xd000_0000, 4096, WRITE, 0))),
        ("wrap", || block(|d| d.descriptor(0, 0, u64::MAX - 8, 4096, WRITE, 0))),
        ("length", || block(|d| d.descriptor(0, 0, d.buffer(0), u32::MAX, WRITE, 0))),
        ("next", || block(|d| d.descriptor(0, 0, d.buffer(0), 16, NEXT, 500))),
        ("order", order),
        ("short", || block(|d| d.descriptor(0, 0, d.buffer(0), 8, 0, 0))),
        ("indirect", || block(|d| d.descriptor(0, 0, d.table(0), 16, INDIRECT | NEXT, 0))),
        ("nested", nested),
        ("head", || ready_block().offer(0, 999)),
        ("index", index),
        ("used", used),
        ("features", features),
        ("kick", || ready_block().register(0x50, 77)),
        ("status", || ready_block().register(0x70, 1)),
        ("resize", || ready_block().register(0x38, 4)),
        ("config", || ready_block().register(0x100, 1)),
        ("balloon", balloon),
        ("vsock", vsock),
        ("storm", storm),
        ("probe", probe),
    ];
    for (attack, work) in attacks {
        if named(attack) {
            work();
            // a monitor that lets it pass says so by not ending here
            for _ in 0..400_000u32 {
                core::hint::spin_loop();
            }
            return report(attack, attack == "storm");
        }
    }
    report("a known attack", false);
}

fn ready_block() -> Device {
    let mut device = Device::find(2, 0).unwrap();
    device.begin(1 << 28);
    device
}

fn block(describe: fn(&Device)) {
    let device = ready_block();
    describe(&device);
    device.offer(0, 0);
}

fn order() {
    let d = ready_block();
    d.descriptor(0, 0, d.buffer(0), 16, NEXT | WRITE, 1);
    d.descriptor(0, 1, d.buffer(0), 16, 0, 0);
    d.offer(0, 0);
}

/// An indirect table inside an indirect table.
fn nested() {
    let d = ready_block();
    let table = d.buffer(0);
    write64(table, table);
    write32(table + 8, 16);
    write16(table + 12, INDIRECT);
    d.descriptor(0, 0, table, 16, INDIRECT, 0);
    d.offer(0, 0);
}

fn index() {
    let d = ready_block();
    write16(d.available(0) + 2, 3000);
    d.register(0x50, 0);
}

/// The ring's tables may not lie where no memory is.
fn used() {
    let d = Device::find(2, 0).unwrap();
    d.agree(0, 1);
    d.register(0x30, 0);
    d.register(0x38, 8);
    d.register(0x80, d.table(0) as u32);
    d.register(0x90, d.available(0) as u32);
    d.register(0xa0, 0xffff_f000);
    d.register(0x44, 1);
    d.register(0x70, 15);
}

fn features() {
    let d = Device::find(2, 0).unwrap();
    let refused = !d.agree(!0, !0) && !d.agree(0, 0);
    report("what was not offered is refused", refused);
    // and goes on as if it had been
    d.register(0x70, 15);
}

fn balloon() {
    let mut d = Device::find(5, 0).unwrap();
    d.begin(0);
    write32(d.buffer(0), 0x000f_ffff);
    d.descriptor(0, 0, d.buffer(0), 4, 0, 0);
    d.offer(0, 0);
}

fn vsock() {
    let mut d = Device::find(19, 0).unwrap();
    d.begin(0);
    let at = d.buffer(1);
    crate::fill(at, 0, 44);
    write32(at + 24, u32::MAX);
    d.descriptor(1, 0, at, 44, 0, 0);
    d.offer(1, 0);
}

/// Every port, every register, other widths: none of it may matter to anyone else.
fn storm() {
    for port in 0..=0xffffu32 {
        let port = port as u16;
        if matches!(port, 0x600..=0x602 | 0x64 | 0x3f8..=0x3ff | 0xcf9 | 0x92) {
            continue;
        }
        if port % 16 == 3 {
            out8(port, 0xff);
        }
        if port % 16 == 5 {
            let _ = in8(port);
        }
    }
    for page in 0..40u64 {
        for offset in (0..0x1000u64).step_by(0x94) {
            let _ = read32(0xd000_0000 + page * 0x1000 + offset);
        }
    }
    write32(0xdead_0000, 1);
    let _ = read32(0xfdff_fff0);
}

/// What CPUID must not show; then an MSR that is not there, whose fault ends a machine without handlers.
fn probe() {
    let (ecx, svm): (u32, u32);
    unsafe {
        asm!("push rbx", "cpuid", "pop rbx", inout("eax") 1 => _, out("ecx") ecx, out("edx") _);
        asm!("push rbx", "cpuid", "pop rbx", inout("eax") 0x8000_0001u32 => _, out("ecx") svm, out("edx") _);
    }
    say("cpuid ");
    say_hex(u64::from(ecx));
    say("\n");
    report("no virtualisation to nest", ecx & 1 << 5 == 0 && svm & 1 << 2 == 0);
    report("a hypervisor", ecx & 1 << 31 != 0);
    unsafe { asm!("rdmsr", in("ecx") 0xdead_beefu32, out("eax") _, out("edx") _) };
}
