//! Our own engine, in its jail, with the test guest in it: it drives every device, and plays the hostile guest. Runs on
//! whatever KVM there is; an emulated one is enough.

mod lab;
mod running;

use lab::{UID, again, console, end, guest, machine, role, says, snapshot, wait_for};
use running::start;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vmm::client::{Exit, Request};
use vmm::{Client, Machine, Restore};

/// Says why this test cannot run here.
macro_rules! guest_or_skip {
    () => {
        match guest() {
            Ok(guest) => guest,
            Err(why) => {
                println!("SKIPPED: {why}");
                return;
            }
        }
    };
}

fn run(kernel: &Path, args: &str) -> (String, Exit) {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, args);
    let _running = start(&role(), &machine);
    let exit = end(&machine);
    (console(&machine), exit)
}

fn assert_good(text: &str, exit: &Exit) {
    assert_eq!((exit.code, exit.message.as_str()), (0, ""), "{text}");
    assert!(text.contains("done") && !text.contains("FAILED"), "{text}");
}

#[test]
fn every_device_works_from_inside() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, "");
    let _running = start(&role(), &machine);
    let (exit, text) = (end(&machine), console(&machine));
    assert_good(&text, &exit);
    assert!(text.matches(" ok ").count() > 20 && text.contains("through the virtio console"), "{text}");
    let written = std::fs::read(&machine.disks[0].path).unwrap();
    assert!(written[5 * 512..].starts_with(b"written by the guest"));
}

#[test]
fn an_image_stays_as_it_is_and_its_overlay_keeps_what_was_written() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path(), kernel, "reset");
    machine.disks[0].overlay = true;
    let image = std::fs::read(&machine.disks[0].path).unwrap();
    // the second start finds what the first one wrote
    for guests in [2, 1] {
        let _ = std::fs::remove_file(&machine.console.log_path);
        let _running = start(&role(), &machine);
        let (exit, text) = (end(&machine), console(&machine));
        assert_good(&text, &exit);
        assert_eq!(text.matches("guest").count(), guests, "{text}");
    }
    assert!(std::fs::read(&machine.disks[0].path).unwrap() == image);
}

#[test]
fn a_reset_starts_anew_and_keeps_the_disk() {
    let (text, exit) = run(guest_or_skip!(), "reset");
    assert_good(&text, &exit);
    assert_eq!(text.matches("guest").count(), 2, "{text}");
}

/// (what the guest does, what the machine's status says of it)
const ATTACKS: &[(&str, &str)] = &[
    ("loop", "block: chain 0: loops"),
    ("outside", "block: descriptor of chain 0: 4096 bytes at 0x7ffffffff000 are not memory"),
    ("gap", "block: descriptor of chain 0: 4096 bytes at 0xd0000000 are not memory"),
    ("wrap", "are not memory"),
    ("length", "are not memory"),
    ("next", "leaves its table"),
    ("order", "a readable descriptor after a writable one"),
    ("short", "without room for its status"),
    ("indirect", "block: chain 0"),
    ("nested", "block: chain 0"),
    ("head", "leaves its table"),
    ("index", "available ring"),
    ("used", "queue 0 does not lie in memory"),
    ("features", "driver ready without agreeing on features"),
    ("kick", "queue 77 kicked; there are 1"),
    ("status", "a bit taken back"),
    ("resize", "set up at status 0xf"),
    ("config", "read-only configuration"),
    ("balloon", "page at 0xfffff000"),
    ("vsock", "a packet says 4294967295 bytes"),
    ("probe", "triple fault"),
];

#[test]
fn a_guest_that_breaks_protocol_loses_its_machine_with_the_reason() {
    let kernel = guest_or_skip!();
    for (attack, expected) in ATTACKS {
        let (text, exit) = run(kernel, &format!("attack={attack}"));
        assert_eq!((exit.code, exit.signal), (1, None), "{attack}: {exit:?}\n{text}");
        assert!(exit.message.starts_with("the guest broke its machine: "), "{attack}: {exit:?}\n{text}");
        assert!(exit.message.contains(expected), "{attack}: {}", exit.message);
        assert!(!text.contains("FAILED"), "{attack}: {text}");
    }
}

#[test]
fn storms_of_accesses_harm_no_one() {
    let (text, exit) = run(guest_or_skip!(), "attack=storm");
    assert_good(&text, &exit);
}

#[test]
fn streams_reach_the_guest_over_vsock() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, "vsock");
    let _running = start(&role(), &machine);
    wait_for("the guest listens", || console(&machine).contains("vsock ready").then_some(()));
    let mut stream = UnixStream::connect(machine.run_dir.join("vsock.sock")).unwrap();
    stream.write_all(b"CONNECT 7\n").unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line}");
    stream.write_all(b"hello").unwrap();
    let mut echo = [0u8; 5];
    reader.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    let exit = end(&machine);
    assert_good(&console(&machine), &exit);
}

#[test]
fn the_network_takes_only_the_machines_own_frames() {
    let kernel = guest_or_skip!();
    struct Netns(String);
    impl Drop for Netns {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
        }
    }
    let name = format!("vmmtest{}", std::process::id());
    let ip = |args: &str| Command::new("ip").args(args.split(' ')).output().is_ok_and(|o| o.status.success());
    if !ip(&format!("netns add {name}")) {
        println!("SKIPPED: cannot make a network namespace with ip");
        return;
    }
    let netns = Netns(name);
    for args in ["tuntap add tap0 mode tap vnet_hdr", "addr add 10.9.0.1/24 dev tap0", "link set tap0 up"] {
        assert!(ip(&format!("-n {} {args}", netns.0)), "{args}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path(), kernel, "net");
    machine.link = Some(vmm::machine::Link {
        tap: "tap0".into(),
        netns: Some(format!("/run/netns/{}", netns.0).into()),
        mac: "52:54:00:00:00:01".into(),
        mtu: 1500,
        addresses: vec!["10.9.0.2".parse().unwrap()],
    });
    let _running = start(&role(), &machine);
    let exit = end(&machine);
    assert_good(&console(&machine), &exit);
}

#[test]
fn the_engine_holds_nothing_but_its_machine() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, "hold");
    let running = start(&role(), &machine);
    let state = &running.state;
    wait_for("the guest runs", || console(&machine).contains("guest").then_some(()));
    assert_eq!(state.engine, "kvm");
    let proc = PathBuf::from(format!("/proc/{}", state.engine_pid));
    let mut threads = 0;
    for task in std::fs::read_dir(proc.join("task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).unwrap_or_default().to_owned()
        };
        assert_eq!((field("Uid:"), field("Gid:")), (UID.to_string(), UID.to_string()));
        assert_eq!((field("CapEff:").as_str(), field("CapBnd:").is_empty()), ("0000000000000000", false));
        assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"), "{}", field("Name:"));
        threads += 1;
    }
    assert!(threads >= 4, "owner, control, two vCPUs: {threads}");
    for ns in ["net", "pid", "mnt", "ipc", "uts"] {
        let of = |pid: &Path| std::fs::read_link(pid.join("ns").join(ns)).unwrap();
        assert_ne!(of(&proc), of(Path::new("/proc/self")), "{ns}");
    }
    assert_eq!(std::fs::read_dir(proc.join("root")).unwrap().count(), 0, "an empty root");
    let held: Vec<String> = std::fs::read_dir(proc.join("fd"))
        .unwrap()
        .filter_map(|fd| Some(std::fs::read_link(fd.ok()?.path()).ok()?.display().to_string()))
        .collect();
    let known = |path: &String| {
        // which of its own pages it wrote; no addresses of the host's for who is not root
        if path.ends_with("/pagemap") {
            return true;
        }
        let kinds = ["socket:", "anon_inode:", "/dev/null", "/dev/kvm", "/memfd:engine-stderr"];
        let files = [&machine.disks[0].path, &machine.disks[1].path, kernel];
        kinds.iter().any(|kind| path.starts_with(kind)) || files.iter().any(|f| path == &f.display().to_string())
    };
    assert!(held.iter().all(known), "{held:?}");

    // the disk is locked while it runs
    let other = tempfile::tempdir().unwrap();
    let mut second = machine.clone();
    (second.run_dir, second.state_dir) = (other.path().join("run"), other.path().join("state"));
    second.console.log_path = other.path().join("log/0.log");
    let error = vmm::launch(&role(), &second, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("in use by another machine"), "{error}");

    let mut client = Client::connect(&machine.run_dir).unwrap();
    let ticks = || {
        let stat = std::fs::read_to_string(proc.join("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    assert!(client.request(Request::Pause).unwrap().paused);
    let at_pause = ticks();
    std::thread::sleep(Duration::from_millis(200));
    assert!(ticks() <= at_pause + 1, "a paused machine uses no processor");
    assert!(!client.request(Request::Resume).unwrap().paused);
    wait_for("it goes on", || (ticks() > at_pause + 2).then_some(()));
    client.request(Request::Kill).unwrap();
    drop(client);
    assert_eq!(end(&machine).signal, Some(9));
}

#[test]
fn what_cannot_be_booted_is_named() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let refused = |spoil: &dyn Fn(&mut Machine)| {
        let mut machine = machine(dir.path(), kernel, "");
        spoil(&mut machine);
        vmm::launch(&role(), &machine, |_| Ok(())).unwrap_err().to_string()
    };
    let junk = dir.path().join("junk");
    std::fs::write(&junk, vec![7u8; 100_000]).unwrap();
    let big = dir.path().join("big");
    std::fs::File::create(&big).unwrap().set_len(1 << 30).unwrap();
    type Spoil<'a> = &'a dyn Fn(&mut Machine);
    let cases: [(Spoil, &str); 4] = [
        (&|m| m.kernel = Some(junk.clone()), "neither a bzImage nor a 64-bit ELF file"),
        (&|m| m.initrd = Some(big.clone()), "initrd: 1073741824 bytes do not fit"),
        (&|m| m.memory_bytes = 1 << 60, "memory_bytes"),
        (&|m| m.disks[0].bus = "sata".into(), "not on virtio"),
    ];
    for (spoil, expected) in cases {
        let error = refused(spoil);
        assert!(error.contains(expected), "{error}");
    }
}

fn type_in(machine: &Machine, text: &str) {
    let mut typed = Client::connect(&machine.run_dir).unwrap().console().unwrap();
    typed.write_all(text.as_bytes()).unwrap();
}

/// The guest counts what is typed: its registers, memory, disk, serial port and vsock are what they were.
#[test]
fn a_machine_goes_on_from_its_snapshot_as_often_as_wanted() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, "count");
    let _running = start(&role(), &machine);
    says(&machine, "ready");
    type_in(&machine, "+");
    says(&machine, "count 1");
    let first = snapshot(&machine, &dir.path().join("first"), None);
    // it goes on after its snapshot
    type_in(&machine, "+");
    says(&machine, "count 2");
    let second = snapshot(&machine, &dir.path().join("second"), Some(&first.memory));
    type_in(&machine, "+");
    says(&machine, "count 3");
    let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512;
    let (whole, difference) = (blocks(&first.memory), blocks(second.difference.as_ref().unwrap()));
    assert!(whole < 8 << 20 && difference < whole, "{whole} and {difference} bytes of 64 MiB are held");

    let clones: Vec<Machine> =
        (0..3).map(|n| again(&machine, &dir.path().join(format!("clone{n}")), first.clone())).collect();
    let _clones: Vec<_> = clones.iter().map(|clone| start(&role(), clone)).collect();
    let later = again(&machine, &dir.path().join("later"), second);
    let _later = start(&role(), &later);
    type_in(&later, "+");
    says(&later, "count 3");
    // each has memory of its own
    for (typed, clone) in clones.iter().enumerate() {
        for count in 0..=typed {
            type_in(clone, "+");
            says(clone, &format!("count {}", count + 2));
        }
    }
    let mut generations = Vec::new();
    for each in clones.iter().chain([&machine, &later]) {
        type_in(each, "g");
        says(each, "generation ");
        let text = console(each);
        generations.push(text.split_once("generation ").unwrap().1.lines().next().unwrap().to_owned());
        type_in(each, "q");
        let exit = end(each);
        assert_good(&console(each), &exit);
    }
    generations.sort();
    generations.dedup();
    assert_eq!(generations.len(), 5, "each life has a generation of its own: {generations:?}");
}

/// Two operations for each byte typed: the sixth begins 2.5 s after the first, less the tenth of a second that rest earns.
#[test]
fn a_limited_disk_takes_its_time_and_loses_nothing() {
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path(), kernel, "count");
    machine.disks[0].rate = vmm::Rate { bytes: 0, operations: 2 };
    let _running = start(&role(), &machine);
    says(&machine, "ready");
    let begun = std::time::Instant::now();
    type_in(&machine, "+++");
    says(&machine, "count 3");
    assert!(begun.elapsed() >= Duration::from_millis(2300), "{:?}", begun.elapsed());
    type_in(&machine, "q");
    let exit = end(&machine);
    assert_good(&console(&machine), &exit);
}

#[test]
fn a_snapshot_that_does_not_fit_or_is_damaged_is_refused_with_the_reason() {
    use std::os::unix::fs::FileExt;
    let kernel = guest_or_skip!();
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel, "count");
    let _running = start(&role(), &machine);
    says(&machine, "ready");
    let good = snapshot(&machine, &dir.path().join("good"), None);
    Client::connect(&machine.run_dir).unwrap().request(Request::Kill).unwrap();
    let open = |path: &Path| std::fs::File::options().read(true).write(true).open(path).unwrap();
    let length = |path: &Path| std::fs::metadata(path).unwrap().len();
    type Spoil<'a> = &'a dyn Fn(&mut Machine, &Restore);
    let cases: [(Spoil, &str); 8] = [
        (&|m, _| m.vcpus = 1, "processors: 2 when it was taken, 1 now"),
        (&|m, _| m.memory_bytes = 32 << 20, "bytes of memory: 67108864 when it was taken, 33554432 now"),
        (&|m, _| drop(m.disks.pop()), "devices"),
        (&|m, _| std::fs::write(&m.disks[0].path, [0; 4096]).unwrap(), "devices"),
        (&|_, r| open(&r.state).write_all_at(&[9], 8).unwrap(), "version 9, this program reads version 1"),
        (&|_, r| open(&r.state).write_all_at(&[0], 1000).unwrap(), "changed since it was written"),
        (&|_, r| open(&r.memory).set_len(length(&r.memory) - 1).unwrap(), "cut short"),
        (&|_, r| open(&r.memory).write_all_at(&[1], 1 << 20).unwrap(), "changed since it was written"),
    ];
    for (index, (spoil, expected)) in cases.iter().enumerate() {
        let at = dir.path().join(format!("case{index}"));
        std::fs::create_dir(&at).unwrap();
        let mut restore = good.clone();
        for file in [&mut restore.state, &mut restore.memory] {
            let copy = at.join(file.file_name().unwrap()).with_extension("copy");
            std::fs::copy(&*file, &copy).unwrap();
            *file = copy;
        }
        let mut other = again(&machine, &at, restore.clone());
        spoil(&mut other, &restore);
        let error = vmm::launch(&role(), &other, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains(expected), "{index}: {error}");
    }
}
