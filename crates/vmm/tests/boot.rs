//! A real machine from description to power-off: SeaBIOS boots a disk whose boot sector writes to the serial port.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmm::client::{self, Request};
use vmm::{Client, Console, Disk, DiskFormat, Machine};

/// Prints `hi` on COM1 and halts with interrupts on; the power button then does nothing, so it is killed.
fn boot_sector() -> Vec<u8> {
    let mut code = vec![0xfb]; // sti
    for byte in b"hi from the guest\r\n" {
        code.extend([0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]); // mov dx, 0x3f8; mov al, byte; out dx, al
    }
    code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp back
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code.resize(1 << 20, 0);
    code
}

fn role() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?.parent()?.parent()?.join("examples/vmm");
    exe.exists().then_some(exe)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn machine(dir: &Path) -> Machine {
    let disk = dir.join("disk.raw");
    std::fs::write(&disk, boot_sector()).unwrap();
    Machine {
        id: "test".into(),
        vcpus: 1,
        memory_bytes: 64 << 20,
        kernel: None,
        initrd: None,
        kernel_args: String::new(),
        disks: vec![Disk {
            name: "root".into(),
            path: disk,
            format: DiskFormat::Raw,
            read_only: false,
            bus: "virtio".into(),
            serial: String::new(),
            boot_order: Some(1),
            overlay: true,
        }],
        seed: None,
        link: None,
        uid: 1_234_567,
        run_dir: dir.join("run"),
        state_dir: dir.join("state"),
        console: Console { log_path: dir.join("logs/compute/0.log"), log_max_bytes: 1 << 20 },
        engine: vmm::Choice::Best,
    }
}

#[test]
fn boots_logs_pauses_and_dies_in_its_jail() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() || !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root and qemu-system-x86");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path());
    let state = vmm::launch(&exe, &machine, |_| Ok(())).unwrap();
    let log = machine.console.log_path.clone();
    wait_for("the guest's line", || std::fs::read_to_string(&log).unwrap_or_default().contains("hi from the guest"));

    let status = std::fs::read_to_string(format!("/proc/{}/status", state.engine_pid)).unwrap();
    let field = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap_or_default().to_owned();
    assert_eq!(field("Uid:").split_whitespace().nth(1), Some("1234567"));
    assert_eq!(field("CapEff:").split_whitespace().nth(1), Some("0000000000000000"));
    assert_eq!(field("NoNewPrivs:").split_whitespace().nth(1), Some("1"));
    assert_eq!(field("Seccomp:").split_whitespace().nth(1), Some("2"));
    for ns in ["net", "pid", "mnt", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert_ne!(of(&state.engine_pid.to_string()), of("self"), "{ns}");
    }

    let mut client = Client::connect(&machine.run_dir).unwrap();
    assert!(client.request(Request::Pause).unwrap().paused);
    assert!(!client.request(Request::Resume).unwrap().paused);
    client.request(Request::Kill).unwrap();
    drop(client);
    wait_for("the end", || client::recorded(&machine.state_dir).is_some_and(|s| s.exit.is_some()));
    let exit = client::recorded(&machine.state_dir).unwrap().exit.unwrap();
    assert_eq!((exit.code, exit.signal), (137, Some(9)));
    // the image itself is untouched: writes went to the overlay
    assert_eq!(std::fs::read(&machine.disks[0].path).unwrap(), boot_sector());
}

#[test]
fn a_machine_that_cannot_start_says_why_and_leaves_nothing() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    machine.disks[0].path = dir.path().join("absent.raw");
    let error = vmm::launch(&exe, &machine, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("absent.raw"), "{error}");
    assert!(Client::connect(&machine.run_dir).is_err());
}
