//! The test guest: a kernel of a few KiB that drives every device by hand, or breaks its protocol in the way its command
//! line names. It says what it finds on the serial port and turns itself off. Built by `tests/kvm.rs` with `rustc` alone.
//!
//! It runs where kernel code is emulated instruction by instruction: so no interrupts, no SSE, no formatting.
#![no_std]
#![no_main]

mod attack;
mod drive;
mod virtio;

use core::arch::{asm, global_asm};

global_asm!(
    ".section .boot, \"ax\"",
    ".global _start",
    "_start:",
    "mov esp, 0x3f0000",
    "mov rdi, rsi",
    "call {main}",
    "2: hlt",
    "jmp 2b",
    main = sym main,
);

const SERIAL: u16 = 0x3f8;
const COMMAND_LINE_POINTER: u64 = 0x228;

pub fn out8(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) }
}
pub fn in8(port: u16) -> u8 {
    let value: u8;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) }
    value
}
pub fn read8(at: u64) -> u8 {
    unsafe { (at as *const u8).read_volatile() }
}
pub fn write8(at: u64, value: u8) {
    unsafe { (at as *mut u8).write_volatile(value) }
}
pub fn read16(at: u64) -> u16 {
    unsafe { (at as *const u16).read_volatile() }
}
pub fn write16(at: u64, value: u16) {
    unsafe { (at as *mut u16).write_volatile(value) }
}
pub fn read32(at: u64) -> u32 {
    unsafe { (at as *const u32).read_volatile() }
}
pub fn write32(at: u64, value: u32) {
    unsafe { (at as *mut u32).write_volatile(value) }
}
pub fn write64(at: u64, value: u64) {
    unsafe { (at as *mut u64).write_volatile(value) }
}
pub fn fill(at: u64, value: u8, length: u64) {
    for n in 0..length {
        write8(at + n, value);
    }
}
pub fn copy(at: u64, bytes: &[u8]) {
    for (n, byte) in bytes.iter().enumerate() {
        write8(at + n as u64, *byte);
    }
}
pub fn is(at: u64, bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(n, byte)| read8(at + n as u64) == *byte)
}
pub fn is_all(at: u64, value: u8, length: u64) -> bool {
    (0..length).all(|n| read8(at + n) == value)
}

pub fn say(text: &str) {
    for byte in text.bytes() {
        out8(SERIAL, byte);
    }
}
pub fn say_hex(value: u64) {
    for shift in (0..16).rev() {
        let digit = (value >> (shift * 4) & 15) as u8;
        out8(SERIAL, if digit < 10 { b'0' + digit } else { b'a' + digit - 10 });
    }
}
/// One line for each thing that was tried.
pub fn report(what: &str, good: bool) {
    say(if good { "ok " } else { "FAILED " });
    say(what);
    say("\n");
}

pub fn power_off() -> ! {
    out8(0x600, 5 << 2 | 1 << 5);
    loop {
        core::hint::spin_loop();
    }
}

/// `zero_page`: what the boot protocol leaves in RSI.
extern "C" fn main(zero_page: u64) -> ! {
    let line = u64::from(read32(zero_page + COMMAND_LINE_POINTER));
    let mut length = 0;
    while read8(line + length) != 0 {
        length += 1;
    }
    say("guest\n");
    let has = |word: &str| is(line, word.as_bytes());
    if has("attack=") {
        attack::run(line + 7);
    } else if has("count") {
        count();
    } else if has("reset") {
        reset_once();
    } else if has("pulse") {
        pulse();
    } else if has("hold") {
        loop {
            core::hint::spin_loop();
        }
    } else {
        drive::all(line);
    }
    say("done\n");
    power_off()
}

/// Counts what is typed, in memory and on the disk, and says what its generation is.
fn count() {
    const LINE_STATUS: u16 = SERIAL + 5;
    const COUNT: u64 = 0x200_0000;
    const GENERATION: u64 = 0xf_fff0;
    let mut disk = virtio::Device::find(2, 0).unwrap();
    disk.begin(0);
    write8(COUNT, b'0');
    say("ready\n");
    loop {
        if in8(LINE_STATUS) & 1 == 0 {
            core::hint::spin_loop();
            continue;
        }
        match in8(SERIAL) {
            b'+' => {
                let count = [read8(COUNT) + 1];
                write8(COUNT, count[0]);
                report("stored", drive::store(&mut disk, 9, &count));
                report("stored", drive::sector(&mut disk, 0, 9).is_some_and(|at| is(at, &count)));
                say("count ");
                out8(SERIAL, count[0]);
                say("\n");
            }
            b'g' => {
                say("generation ");
                say_hex(u64::from(read32(GENERATION)) << 32 | u64::from(read32(GENERATION + 4)));
                say("\n");
            }
            b'q' => return,
            _ => {}
        }
    }
}

/// Uses most of 256 MiB, then says so as often as it can: what is heard first tells when a restored machine went on.
fn pulse() -> ! {
    let mut at = 0x40_0000;
    while at < 0xf80_0000 {
        write64(at, at);
        at += 4096;
    }
    loop {
        say("pulse\n");
    }
}

/// Memory is fresh after a reset, the disk is not.
fn reset_once() {
    let mut disk = virtio::Device::find(2, 0).unwrap();
    disk.begin(0);
    let before = drive::sector(&mut disk, 0, 9).is_some_and(|at| is(at, b"again"));
    if before {
        report("reset", true);
        return;
    }
    drive::store(&mut disk, 9, b"again");
    out8(0x602, 1);
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    say("FAILED panic\n");
    power_off()
}

/// The compiler calls these where it sees fit.
mod memory {
    use core::arch::asm;
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        unsafe { asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _) };
        to
    }
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
        unsafe { asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8) };
        to
    }
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        for at in 0..n {
            let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }
}
