//! A real machine from description to power-off: SeaBIOS boots a disk whose boot sector writes to the serial port.

mod running;

use running::start;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmm::client::{self, Request};
use vmm::{Client, Console, Disk, DiskFormat, Machine, Restore, SnapshotFiles};

/// Answers each byte on COM1 with how many there were, counted in memory.
fn counting_sector() -> Vec<u8> {
    let code = [
        0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
        0xec, 0xa8, 0x01, 0x74, 0xfb, // wait: in al, dx; test al, 1; jz wait
        0xb2, 0xf8, 0xec, // mov dl, 0xf8; in al, dx
        0xfe, 0x06, 0x00, 0x70, // inc byte [0x7000]
        0xa0, 0x00, 0x70, // mov al, [0x7000]
        0x04, 0x30, 0xee, // add al, '0'; out dx, al
        0xb0, 0x0a, 0xee, // mov al, newline; out dx, al
        0xeb, 0xe6, // jmp again
    ];
    let mut sector = vec![0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xa2, 0x00, 0x70]; // cli; xor ax, ax; mov ds, ax; mov [0x7000], al
    sector.extend(code);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

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

/// Prints `obeys`, waits for the power button and powers off, by q35's ACPI registers.
fn obedient_sector() -> Vec<u8> {
    let mut code = vec![0xfa]; // cli
    for byte in b"\nobeys\n" {
        code.extend([0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]); // mov dx, 0x3f8; mov al, byte; out dx, al
    }
    code.extend([0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef]); // mov dx, 0x602; mov ax, 0x100; out dx, ax
    code.extend([0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf7]); // again: mov dx, 0x600; in ax, dx; test ah, 1; jz again
    code.extend([0xb8, 0x00, 0x01, 0xef]); // mov ax, 0x100; out dx, ax
    code.extend([0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd]); // mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt
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
        efi: false,
        disks: vec![Disk {
            name: "root".into(),
            path: disk,
            format: DiskFormat::Raw,
            read_only: false,
            bus: "virtio".into(),
            serial: String::new(),
            boot_order: Some(1),
            overlay: true,
            begins: None,
            rate: vmm::Rate { bytes: 64 << 20, operations: 1000 },
        }],
        seed: None,
        link: None,
        uid: 1_234_567,
        run_dir: dir.join("run"),
        state_dir: dir.join("state"),
        console: Console { log_path: dir.join("logs/compute/0.log"), log_max_bytes: 1 << 20 },
        engine: vmm::Choice::Best,
        restore: None,
        kvm_cache: None,
        display: false,
        channel: None,
    }
}

/// OVMF finds nothing to boot and says so on the serial port.
#[test]
fn firmware_is_efi_where_that_is_asked_for() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    for path in ["/usr/bin/qemu-system-x86_64", "/usr/share/ovmf/OVMF.fd"] {
        if !Path::new(path).exists() || !rustix::process::getuid().is_root() {
            println!("SKIPPED: needs root and {path}; apt-get install qemu-system-x86 ovmf");
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    (machine.efi, machine.memory_bytes) = (true, 256 << 20);
    let _running = start(&exe, &machine);
    let log = machine.console.log_path.clone();
    let said = || String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
    wait_for("the firmware's line", || said().contains("BdsDxe"));
    assert!(!said().contains("hi from the guest"), "a boot sector is nothing to it");
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
    let running = start(&exe, &machine);
    let state = &running.state;
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

/// What the counting guest answered, once it counted so far. What is typed before it listens is lost; each answer is a digit.
fn counts(machine: &Machine, at_least: u8) -> Vec<u8> {
    use std::io::Write;
    let mut typed = Client::connect(&machine.run_dir).unwrap().console().unwrap();
    let mut answers = Vec::new();
    wait_for("an answer", || {
        let text = std::fs::read_to_string(&machine.console.log_path).unwrap_or_default();
        // the firmware prints lines, too, but longer ones
        let answer = |line: &str| {
            let said = line.rsplit_once(" F ")?.1.as_bytes();
            if let [digit] = said { digit.checked_sub(b'0') } else { None }
        };
        answers = text.lines().filter_map(answer).collect();
        let there = answers.last().is_some_and(|last| *last >= at_least);
        let _ = if there { Ok(()) } else { typed.write_all(b"+") };
        there
    });
    answers
}

#[test]
fn a_soft_reboot_starts_it_again_and_the_power_button_ends_it() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() || !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root and qemu-system-x86");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    machine.engine = vmm::Choice::Qemu;
    std::fs::write(&machine.disks[0].path, obedient_sector()).unwrap();
    let _running = start(&exe, &machine);
    let ups = || std::fs::read_to_string(&machine.console.log_path).unwrap_or_default().matches("F obeys").count();
    wait_for("it is up", || ups() == 1);
    for times in 2..4 {
        Client::connect(&machine.run_dir).unwrap().request(Request::SoftReboot).unwrap();
        wait_for("it is up again", || ups() == times);
    }
    // a power button after it means what it says
    let mut client = Client::connect(&machine.run_dir).unwrap();
    client.request(Request::SoftReboot).unwrap();
    wait_for("the end", || {
        let ended = client::recorded(&machine.state_dir).is_some_and(|s| s.exit.is_some());
        if !ended && let Ok(mut client) = Client::connect(&machine.run_dir) {
            let _ = client.request(Request::PowerButton);
        }
        ended
    });
    assert_eq!(client::recorded(&machine.state_dir).unwrap().exit.unwrap().code, 0);
}

#[test]
fn a_screen_is_seen_over_rfb_and_listens_nowhere() {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() || !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root and qemu-system-x86");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    (machine.engine, machine.display) = (vmm::Choice::Qemu, true);
    let running = start(&exe, &machine);
    for _ in 0..2 {
        let mut screen = Client::connect(&machine.run_dir).unwrap().display().unwrap();
        let read = |mut screen: &UnixStream, bytes: usize| {
            let mut buffer = vec![0; bytes];
            screen.read_exact(&mut buffer).unwrap();
            buffer
        };
        assert_eq!(read(&screen, 12), b"RFB 003.008\n");
        screen.write_all(b"RFB 003.008\n").unwrap();
        // one kind of security: none
        assert_eq!(read(&screen, 2), [1, 1]);
        screen.write_all(&[1]).unwrap();
        assert_eq!(read(&screen, 4), [0; 4]);
        screen.write_all(&[1]).unwrap();
        let size = read(&screen, 4);
        let (width, height) = (u16::from_be_bytes([size[0], size[1]]), u16::from_be_bytes([size[2], size[3]]));
        assert!(width >= 320 && height >= 200, "{width} x {height}");
    }
    let listening = std::fs::read_to_string(format!("/proc/{}/net/tcp", running.state.engine_pid)).unwrap();
    assert_eq!(listening.lines().count(), 1, "{listening}");
    drop(running);
    machine.display = false;
    (machine.run_dir, machine.state_dir) = (dir.path().join("b/run"), dir.path().join("b/state"));
    let _blind = start(&exe, &machine);
    let error = Client::connect(&machine.run_dir).unwrap().display().unwrap_err().to_string();
    assert!(error.contains("has no screen"), "{error}");
}

#[test]
fn a_machine_is_saved_whole_and_let_go_when_its_holder_is_gone() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() || !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root and qemu-system-x86");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    machine.engine = vmm::Choice::Qemu;
    std::fs::write(&machine.disks[0].path, counting_sector()).unwrap();
    let _running = start(&exe, &machine);
    counts(&machine, 3);

    // a holder that dies lets go
    let held = Client::connect(&machine.run_dir).unwrap().hold().unwrap();
    let mut other = Client::connect(&machine.run_dir).unwrap();
    for request in [Request::Resume, Request::Reset, Request::Hold] {
        let why = other.request(request).unwrap_err().to_string();
        assert!(why.contains("its snapshot is being taken"), "{request:?}: {why}");
    }
    assert!(other.request(Request::Release).unwrap_err().to_string().contains("does not hold"));
    drop(held);
    counts(&machine, 5);

    let (_, disks) = vmm::saved::running(&machine.run_dir).unwrap();
    let order = |memory| vmm::saved::Order {
        owner: "ns",
        run_dir: Some(&machine.run_dir),
        memory,
        disks: disks.clone(),
        room: u64::MAX,
    };
    let (all, only_disks) = (dir.path().join("saved/all"), dir.path().join("saved/disks"));
    let saved = vmm::saved::take(&order(true), &all).unwrap();
    assert!(saved.held > 0 && saved.running.as_ref().unwrap().engine.starts_with("qemu-"));
    assert!(vmm::saved::take(&order(false), &only_disks).unwrap().running.is_none());
    counts(&machine, 7);
    Client::connect(&machine.run_dir).unwrap().request(Request::Kill).unwrap();

    let saved = vmm::saved::open(&all, "ns").unwrap();
    saved.verify(&all, true).unwrap();
    let mut restored = machine.clone();
    (restored.run_dir, restored.state_dir) = (dir.path().join("o/run"), dir.path().join("o/state"));
    restored.console.log_path = dir.path().join("o/logs/0.log");
    restored.disks[0].path = all.join(&saved.disks[0].base.name);
    restored.disks[0].begins = saved.disks[0].overlay.as_ref().map(|file| all.join(&file.name));
    assert!(restored.disks[0].begins.is_some());
    restored.restore = saved.restore(&all);
    let _restored = start(&exe, &restored);
    let first = counts(&restored, 1)[0];
    assert!(first >= 6, "it counts on from 5 or more: {first}");
    Client::connect(&restored.run_dir).unwrap().request(Request::Kill).unwrap();
}

#[test]
fn a_machine_goes_on_from_its_snapshot() {
    let Some(exe) = role() else { panic!("examples/vmm is built with the tests") };
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() || !rustix::process::getuid().is_root() {
        println!("SKIPPED: needs root and qemu-system-x86");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path());
    machine.engine = vmm::Choice::Qemu;
    std::fs::write(&machine.disks[0].path, counting_sector()).unwrap();
    let _running = start(&exe, &machine);
    counts(&machine, 4);
    let make = |name: &str| std::fs::File::create_new(dir.path().join(name)).unwrap();
    let files = SnapshotFiles { state: make("snapshot"), memory: make("memory"), base: None };
    let mut client = Client::connect(&machine.run_dir).unwrap();
    client.request(Request::Pause).unwrap();
    assert!(client.snapshot(&files).unwrap().paused, "it stays as it was");
    client.request(Request::Resume).unwrap();
    counts(&machine, 8);
    client.request(Request::Kill).unwrap();

    let other = dir.path().join("other");
    let mut restored = machine.clone();
    (restored.run_dir, restored.state_dir) = (other.join("run"), other.join("state"));
    restored.console.log_path = other.join("logs/0.log");
    let (state, memory) = (dir.path().join("snapshot"), dir.path().join("memory"));
    restored.restore = Some(Restore { state, memory, difference: None, verify: false, engine: String::new() });
    let _restored = start(&exe, &restored);
    let first = counts(&restored, 1)[0];
    assert!(first >= 5, "it counts on from 4 or more: {first}");
    Client::connect(&restored.run_dir).unwrap().request(Request::Kill).unwrap();

    let mut wrong = restored.clone();
    wrong.memory_bytes *= 2;
    let error = vmm::launch(&exe, &wrong, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("bytes of memory: 67108864 when it was taken, 134217728 now"), "{error}");
    std::fs::File::options().write(true).open(dir.path().join("memory")).unwrap().set_len(100_000).unwrap();
    wait_for("the end", || client::recorded(&restored.state_dir).is_some_and(|s| s.exit.is_some()));
    let error = vmm::launch(&exe, &restored, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("ended at its start"), "{error}");
}
