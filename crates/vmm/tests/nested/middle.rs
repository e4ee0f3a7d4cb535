//! In the middle machine, as its first process: machines on a real KVM, seen from outside.

use super::guest::{self, say};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmm::client::{self, Request};
use vmm::kvm::Support;
use vmm::{Choice, Client, Console, Disk, DiskFormat, Machine, Restore, SnapshotFiles};

pub const ALL_GOOD: &str = "nested: all good";
/// Debian's kernel as an ELF file with a PVH entry.
pub const ELF: &str = "guest.elf";
pub const STREAMED: usize = 1 << 20;
const DISK: usize = 8 << 20;
const STALLED: Duration = Duration::from_secs(240);

pub fn busybox(args: &str) -> bool {
    Command::new("/bin/busybox").args(args.split(' ')).status().is_ok_and(|s| s.success())
}

pub fn main() -> ! {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/run")]
    {
        busybox(&format!("mount -t {kind} {kind} {at}"));
    }
    for module in super::MIDDLE_MODULES {
        busybox(&format!("insmod /modules/{module}.ko"));
    }
    let result = std::panic::catch_unwind(|| {
        probe();
        if std::env::var_os("ATOLL_BENCH").is_some() {
            return super::bench::compare();
        }
        elf_kernel();
        whole_machine();
    });
    if result.is_ok() {
        println!("{ALL_GOOD}");
    }
    let _ = std::io::stdout().flush();
    busybox("poweroff -f");
    std::process::exit(0)
}

fn probe() {
    let support = vmm::kvm::probe();
    println!("{support:?}");
    assert!(matches!(support, Support::Hardware { .. }), "a native KVM is found");
}

pub fn machine(name: &str, args: &str) -> Machine {
    let dir = PathBuf::from("/tmp").join(name);
    std::fs::create_dir_all(&dir).unwrap();
    Machine {
        id: name.into(),
        vcpus: 2,
        memory_bytes: 256 << 20,
        kernel: Some("/guest.kernel".into()),
        initrd: Some("/guest.initrd".into()),
        kernel_args: format!("console=ttyS0 quiet panic=-1 {args}"),
        efi: false,
        disks: Vec::new(),
        seed: None,
        link: None,
        uid: 1_234_569,
        run_dir: dir.join("run"),
        state_dir: dir.join("state"),
        console: Console { log_path: dir.join("logs/0.log"), log_max_bytes: 1 << 20 },
        engine: Choice::Best,
        restore: None,
        kvm_cache: None,
        display: false,
        channel: None,
    }
}

pub fn wait_for<T>(machine: &Machine, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    // a machine that hangs says nothing
    let mut until = Instant::now() + STALLED;
    let mut shown = 0;
    loop {
        if let Some(value) = found() {
            return value;
        }
        let text = console(machine);
        if let Some((lines, _)) = text.get(shown..).and_then(|t| t.rsplit_once('\n')) {
            lines.lines().for_each(|line| println!("  {line}"));
            shown += lines.len() + 1;
            until = Instant::now() + STALLED;
        }
        let ended = client::recorded(&machine.state_dir);
        assert!(Instant::now() < until, "{what} did not happen: {ended:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn console(machine: &Machine) -> String {
    std::fs::read_to_string(&machine.console.log_path).unwrap_or_default()
}

fn printed(machine: &Machine, text: &str) {
    let found = || {
        if let Some(state) = client::recorded(&machine.state_dir) {
            panic!("ended before {text:?}: {state:?}");
        }
        console(machine).contains(text).then_some(())
    };
    wait_for(machine, text, found);
}

/// An ELF kernel is entered as PVH says.
fn elf_kernel() {
    let elf = Path::new("/").join(ELF);
    if !elf.exists() {
        return;
    }
    let mut machine = machine("elf", "first");
    machine.kernel = Some(elf);
    vmm::launch(Path::new("/vmm"), &machine, |_| Ok(())).unwrap();
    let exit = wait_for(&machine, "the end", || client::recorded(&machine.state_dir)?.exit);
    let text = console(&machine);
    say("PVH entry", text.contains("init at") && exit.code == 0);
    assert!(text.contains("init at") && exit.code == 0, "{exit:?}");
}

fn whole_machine() {
    let mut machine = machine("whole", "");
    let path = PathBuf::from("/tmp/disk.raw");
    let mut content = vec![0u8; DISK];
    content[..6].copy_from_slice(b"middle");
    content[4 << 20..6 << 20].fill(b'm');
    std::fs::write(&path, content).unwrap();
    let (name, bus) = ("root".to_owned(), "virtio".to_owned());
    machine.disks.push(Disk {
        serial: name.clone(),
        name,
        path: path.clone(),
        format: DiskFormat::Raw,
        read_only: false,
        bus,
        boot_order: None,
        overlay: false,
        begins: None,
        rate: vmm::Rate::default(),
    });
    tap("tap0");
    assert!(busybox("ip addr add 10.9.0.1/24 dev tap0") && busybox("ip link set tap0 up"));
    serve_big_file();
    machine.link = Some(vmm::machine::Link {
        tap: "tap0".into(),
        netns: None,
        mac: "52:54:00:00:00:01".into(),
        mtu: 1500,
        addresses: vec!["10.9.0.2".parse().unwrap()],
    });
    let state = vmm::launch(Path::new("/vmm"), &machine, |_| Ok(())).unwrap();
    say("our engine is chosen", state.engine == "kvm");
    printed(&machine, "vsock ready");
    stream(&machine);
    printed(&machine, "button ready");
    let mut monitor = Client::connect(&machine.run_dir).unwrap();
    balloon(&mut monitor, state.engine_pid);
    assert!(monitor.request(Request::Pause).unwrap().paused);
    let saved = save(&machine, &path, &mut monitor);
    assert!(!monitor.request(Request::Resume).unwrap().paused);
    monitor.request(Request::PowerButton).unwrap();
    drop(monitor);
    let exit = wait_for(&machine, "the end", || client::recorded(&machine.state_dir)?.exit);
    let text = console(&machine);
    assert!(text.contains("power button pressed") && !text.contains("FAILED"), "see above");
    assert_eq!((exit.code, exit.message.as_str()), (0, ""), "it turned itself off");
    let disk = std::fs::read(&path).unwrap();
    assert!(disk[1 << 20..2 << 20].iter().all(|b| *b == b'g'), "the guest's write is on the disk");
    assert!(disk[4 << 20..5 << 20].iter().all(|b| *b == 0) && disk[5 << 20] == b'm', "what it discarded is not");
    restored(&saved);
}

/// A paused machine's memory and disk at one moment, as a machine that goes on from there.
fn save(machine: &Machine, disk: &Path, monitor: &mut Client) -> Machine {
    let dir = PathBuf::from("/tmp/saved");
    std::fs::create_dir_all(&dir).unwrap();
    let make = |name: &str| std::fs::File::create_new(dir.join(name)).unwrap();
    let begun = Instant::now();
    let files = SnapshotFiles { state: make("state"), memory: make("memory"), base: None };
    assert!(monitor.snapshot(&files).unwrap().paused, "it stays paused");
    let held = std::os::unix::fs::MetadataExt::blocks(&files.memory.metadata().unwrap()) >> 11;
    say(&format!("snapshot of 256 MiB in {} ms, {held} MiB", begun.elapsed().as_millis()), held < 200);
    std::fs::copy(disk, dir.join("disk.raw")).unwrap();
    let mut saved = machine.clone();
    (saved.run_dir, saved.state_dir) = (dir.join("run"), dir.join("vm"));
    saved.console.log_path = dir.join("logs/0.log");
    saved.disks[0].path = dir.join("disk.raw");
    let (state, memory) = (dir.join("state"), dir.join("memory"));
    saved.restore = Some(Restore { state, memory, difference: None, verify: true, engine: String::new() });
    saved
}

/// Linux goes on where it was, with its devices, and makes itself new random numbers if it knows how to.
fn restored(machine: &Machine) {
    let begun = Instant::now();
    vmm::launch(Path::new("/vmm"), machine, |_| Ok(())).unwrap();
    println!("restored in {} ms", begun.elapsed().as_millis());
    // the guest is in the middle of waiting for its power button
    Client::connect(&machine.run_dir).unwrap().request(Request::PowerButton).unwrap();
    let exit = wait_for(machine, "the end", || client::recorded(&machine.state_dir)?.exit);
    let text = console(machine);
    for good in ["power button pressed", "random numbers anew: ", "ok ping again", "ok disk read again"] {
        assert!(text.contains(good), "{good}: see above");
    }
    assert!(!text.contains("FAILED") && !text.contains("anew: false"), "see above");
    assert_eq!((exit.code, exit.message.as_str()), (0, ""), "it turned itself off");
}

fn stream(machine: &Machine) {
    let mut stream = UnixStream::connect(machine.run_dir.join("vsock.sock")).unwrap();
    stream.write_all(format!("CONNECT {}\n", guest::PORT).as_bytes()).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line}");
    let sent: Vec<u8> = (0..STREAMED).map(|n| (n % 251) as u8).collect();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || stream.write_all(&sent).map(|()| stream)
    });
    let mut got = vec![0u8; STREAMED];
    reader.read_exact(&mut got).unwrap();
    assert!(got == sent, "what went over vsock came back as it was");
    writer.join().unwrap().unwrap().shutdown(std::net::Shutdown::Both).unwrap();
}

/// A line of `/proc/PID/status`, in bytes.
fn status(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// What the guest freed comes back to this machine.
fn balloon(monitor: &mut Client, pid: u32) {
    monitor.request(Request::Balloon(128 << 8)).unwrap();
    let most = status(pid, "VmHWM:");
    let until = Instant::now() + Duration::from_secs(60);
    let mut now = most;
    while Instant::now() < until && now + (32 << 20) > most {
        std::thread::sleep(Duration::from_millis(50));
        now = status(pid, "VmRSS:");
    }
    let good = now + (32 << 20) <= most;
    say(&format!("balloon: resident {} MiB at most, then {} MiB", most >> 20, now >> 20), good);
    assert!(good);
    monitor.request(Request::Balloon(0)).unwrap();
}

/// A tap that stays when its maker's descriptor is closed.
pub fn tap(name: &str) {
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all-zero is a valid ifreq; both calls read or write what outlives them.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        assert_eq!(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request), 0);
        assert_eq!(libc::ioctl(tun.as_raw_fd(), TUNSETPERSIST, 1), 0);
        libc::close(tun.into_raw_fd());
    }
}

fn serve_big_file() {
    let listener = std::net::TcpListener::bind("0.0.0.0:80").unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0u8; 1024]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 4194304\r\n\r\n");
            let _ = stream.write_all(&vec![b'x'; 4 << 20]);
        }
    });
}
