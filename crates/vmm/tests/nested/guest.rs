//! Inside the innermost machine.

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

pub const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "virtio_console",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];

/// `first` on the command line: tell that `/init` runs and be off.
pub const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "init at $(/bin/busybox cut -d' ' -f1 /proc/uptime)"
/bin/busybox grep -qw first /proc/cmdline && /bin/busybox poweroff -f
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev

export ATOLL_NESTED=guest
exec /nested
"#;

pub const PORT: u32 = 7;

pub fn say(what: &str, good: bool) {
    println!("{} {what}", if good { "ok" } else { "FAILED" });
}

fn busybox(args: &str) -> bool {
    std::process::Command::new("/bin/busybox").args(args.split(' ')).status().is_ok_and(|s| s.success())
}

pub fn main() {
    for module in MODULES {
        let path = format!("/modules/{module}.ko");
        if std::path::Path::new(&path).exists() {
            say(&format!("module {module}"), busybox(&format!("insmod {path}")));
        }
    }
    if std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("bench")) {
        measure();
        busybox("poweroff -f");
    }
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    say(&format!("{processors} processors"), processors == 2);
    disk();
    network();
    let random = std::fs::read_to_string("/sys/class/misc/hw_random/rng_current").unwrap_or_default();
    say("entropy from the host", random.starts_with("virtio_rng"));
    say("console on virtio", std::path::Path::new("/dev/hvc0").exists());
    let clock = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    say("clock of KVM", clock.unwrap_or_default().trim() == "kvm-clock");
    vsock();
    // memory that was used and is free again: the host shall have it back
    let used = busybox("dd if=/dev/zero of=/used bs=1M count=64") && std::fs::remove_file("/used").is_ok();
    say("memory used and freed", used);
    button();
}

pub const BENCH_BYTES: usize = 64 << 20;
pub const DOWN: u8 = b'd';
pub const FIGURES: [&str; 5] =
    ["disk_read_mib_s", "disk_write_mib_s", "disk_read_4k_iops", "net_receive_mib_s", "net_send_mib_s"];
const PIECE: usize = 1 << 20;
const SMALL: usize = 4096;
const SMALL_READS: usize = 2000;

/// Around the guest's page cache, so that each read and write is one of the device's.
fn measure() {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let disk = std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open("/dev/vda").unwrap();
    let mut room = vec![b'w'; 2 * PIECE];
    let from = room.as_ptr().align_offset(SMALL);
    let buffer = &mut room[from..from + PIECE];
    let timed = |name: usize, amount: f64, work: &mut dyn FnMut()| {
        let begun = std::time::Instant::now();
        work();
        println!("figure {} {:.2}", FIGURES[name], amount / begun.elapsed().as_secs_f64());
    };
    let (pieces, mib) = ((BENCH_BYTES / PIECE) as u64, (BENCH_BYTES >> 20) as f64);
    timed(0, mib, &mut || (0..pieces).for_each(|n| disk.read_exact_at(buffer, n * PIECE as u64).unwrap()));
    timed(1, mib, &mut || (0..pieces).for_each(|n| disk.write_all_at(buffer, n * PIECE as u64).unwrap()));
    let small = &mut buffer[..SMALL];
    let place = |n: usize| (n * 7919 % (BENCH_BYTES / SMALL) * SMALL) as u64;
    let mut reads = || (0..SMALL_READS).for_each(|n| disk.read_exact_at(small, place(n)).unwrap());
    timed(2, SMALL_READS as f64, &mut reads);
    assert!(busybox("ip link set eth0 up") && busybox("ip addr add 10.9.0.2/24 dev eth0"));
    let connect = || {
        (0..100).find_map(|_| {
            let stream = std::net::TcpStream::connect("10.9.0.1:81");
            stream.map_err(|_| std::thread::sleep(std::time::Duration::from_millis(50))).ok()
        })
    };
    let mut down = connect().unwrap();
    timed(3, mib, &mut || {
        down.write_all(&[DOWN]).unwrap();
        assert_eq!(std::io::copy(&mut down, &mut std::io::sink()).unwrap(), BENCH_BYTES as u64);
    });
    let mut up = connect().unwrap();
    timed(4, mib, &mut || {
        up.write_all(b"u").unwrap();
        (0..pieces).for_each(|_| up.write_all(&room[..PIECE]).unwrap());
        up.read_exact(&mut [0]).unwrap();
    });
    let _ = std::io::stdout().flush();
}

fn disk() {
    let mut start = [0u8; 6];
    let read = std::fs::File::open("/dev/vda").and_then(|mut disk| disk.read_exact(&mut start));
    say("disk read", read.is_ok() && &start == b"middle");
    let write = || -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let disk = std::fs::OpenOptions::new().write(true).open("/dev/vda")?;
        disk.write_all_at(&[b'g'; 1 << 20], 1 << 20)?;
        disk.sync_all()
    };
    say("disk write", write().is_ok());
    say("disk discard", busybox("blkdiscard -o 4194304 -l 1048576 /dev/vda"));
}

fn network() {
    let up = busybox("ip link set eth0 up") && busybox("ip addr add 10.9.0.2/24 dev eth0");
    say("network up", up);
    say("ping", busybox("ping -q -c 3 -W 5 10.9.0.1"));
    let fetched =
        std::process::Command::new("/bin/busybox").args(["wget", "-q", "-O", "-", "http://10.9.0.1/big"]).output();
    let length = fetched.map_or(0, |o| o.stdout.len());
    say(&format!("4 MiB over TCP: {length}"), length == 4 << 20);
}

/// Answers one stream: what comes goes back.
fn vsock() {
    // SAFETY: all-zero is a valid address; the descriptors are made here and owned at once.
    let stream = unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as u16;
        (address.svm_port, address.svm_cid) = (PORT, libc::VMADDR_CID_ANY);
        let length = size_of::<libc::sockaddr_vm>() as u32;
        if socket < 0 || libc::bind(socket, (&raw const address).cast(), length) < 0 || libc::listen(socket, 1) < 0 {
            return say("vsock listens", false);
        }
        println!("vsock ready");
        let stream = libc::accept(socket, std::ptr::null_mut(), std::ptr::null_mut());
        if stream < 0 {
            return say("vsock accepts", false);
        }
        std::fs::File::from(OwnedFd::from_raw_fd(stream))
    };
    let (mut stream, mut buffer, mut total) = (stream, vec![0u8; 64 << 10], 0);
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 || stream.write_all(&buffer[..n]).is_err() {
            break;
        }
        total += n;
    }
    say(&format!("vsock echoed {total}"), total == super::middle::STREAMED);
}

/// After a snapshot's restore the devices are what they were, and random numbers are not.
fn again() {
    if std::path::Path::new("/sys/bus/acpi/drivers/vmgenid").exists() {
        let log =
            std::process::Command::new("/bin/busybox").arg("dmesg").output().map(|o| o.stdout).unwrap_or_default();
        let anew = String::from_utf8_lossy(&log).contains("due to virtual machine fork");
        println!("random numbers anew: {anew}");
    } else {
        println!("random numbers anew: SKIPPED: this kernel is built without VMGENID");
    }
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    let mut start = [0u8; 6];
    let read = std::fs::File::open("/dev/vda").and_then(|mut disk| disk.read_exact(&mut start));
    say("disk read again", read.is_ok() && &start == b"middle");
    say("ping again", busybox("ping -q -c 1 -W 5 10.9.0.1"));
}

/// Waits for the power button, then turns the machine off.
fn button() {
    let Ok(mut events) = std::fs::File::open("/dev/input/event0") else { return say("power button found", false) };
    println!("button ready");
    // struct input_event: 16 bytes of time, type, code, value; EV_KEY KEY_POWER 1
    let mut event = [0u8; 24];
    while events.read_exact(&mut event).is_ok() {
        if event[16..] == [1, 0, 116, 0, 1, 0, 0, 0] {
            say("power button pressed", true);
            again();
            let _ = std::io::stdout().flush();
            busybox("poweroff -f");
        }
    }
}
