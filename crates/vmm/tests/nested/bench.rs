//! Our engine beside QEMU's microvm, in the middle machine: the same kernel, initrd, disk and tap; JSON lines for
//! `bench/vmm.sh`.

use super::guest;
use super::middle::{busybox, console, machine, tap, wait_for};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmm::{Disk, DiskFormat, Machine, Rate, client};

const RUNS: usize = 3;

/// The same kernel and initrd to `/init` and off, on our engine and on QEMU's microvm; as JSON lines for `bench/vmm.sh`.
pub fn compare() {
    let mut kernel = [Vec::new(), Vec::new()];
    let mut whole = [Vec::new(), Vec::new()];
    let mut memory = [Vec::new(), Vec::new()];
    for run in 0..RUNS {
        let (k, w, m) = ours(run);
        kernel[0].push(k);
        whole[0].push(w);
        memory[0].push(m);
        let (k, w, m) = qemus();
        println!("bench run {run} is done");
        kernel[1].push(k);
        whole[1].push(w);
        memory[1].push(m);
    }
    for (name, values) in [("kernel_to_init_s", kernel), ("start_to_off_s", whole), ("monitor_mib", memory)] {
        tell(name, values.map(median));
    }
    throughput();
}

fn tell(name: &str, [ours, peer]: [f64; 2]) {
    let ratio = ours / peer;
    println!("bench {{\"name\":\"{name}\",\"atoll\":{ours:.3},\"qemu-microvm\":{peer:.3},\"ratio\":{ratio:.3}}}");
}

/// What the guest measured of its disk and its network, on both.
fn throughput() {
    let path = PathBuf::from("/tmp/bench.raw");
    std::fs::write(&path, vec![b'b'; guest::BENCH_BYTES]).unwrap();
    tap("tap0");
    assert!(busybox("ip addr add 10.9.0.1/24 dev tap0") && busybox("ip link set tap0 up"));
    serve();
    let mut found: [Vec<Vec<f64>>; 2] = Default::default();
    for run in 0..RUNS {
        let texts = [our_throughput(run, &path), qemus_throughput(&path)];
        for (to, text) in found.iter_mut().zip(texts) {
            to.push(guest::FIGURES.iter().map(|name| figure(&text, name)).collect());
        }
        println!("throughput run {run} is done");
    }
    for (at, name) in guest::FIGURES.iter().enumerate() {
        tell(name, found.each_ref().map(|runs| median(runs.iter().map(|run| run[at]).collect())));
    }
}

fn figure(text: &str, name: &str) -> f64 {
    let found = text.lines().find_map(|line| line.trim().strip_prefix(&format!("figure {name} ")));
    found.unwrap_or_else(|| panic!("no {name}: {text}")).parse().unwrap()
}

/// Sends or takes as much as the guest asks for.
fn serve() {
    let listener = std::net::TcpListener::bind("0.0.0.0:81").unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut wanted = [0];
            if stream.read_exact(&mut wanted).is_err() {
                continue;
            }
            if wanted[0] == guest::DOWN {
                let _ = stream.write_all(&vec![b'x'; guest::BENCH_BYTES]);
            } else {
                let _ = std::io::copy(&mut (&mut stream).take(guest::BENCH_BYTES as u64), &mut std::io::sink());
                let _ = stream.write_all(b".");
            }
        }
    });
}

fn our_throughput(run: usize, path: &Path) -> String {
    let mut machine = machine(&format!("throughput{run}"), "bench");
    machine.vcpus = 1;
    machine.disks.push(Disk {
        name: "data".into(),
        path: path.into(),
        format: DiskFormat::Raw,
        read_only: false,
        bus: "virtio".into(),
        serial: "data".into(),
        boot_order: None,
        overlay: false,
        begins: None,
        rate: Rate::default(),
    });
    machine.link = Some(vmm::machine::Link {
        tap: "tap0".into(),
        netns: None,
        mac: "52:54:00:00:00:01".into(),
        mtu: 1500,
        addresses: vec!["10.9.0.2".parse().unwrap()],
    });
    ended(&machine)
}

fn ended(machine: &Machine) -> String {
    vmm::launch(Path::new("/vmm"), machine, |_| Ok(())).unwrap();
    wait_for(machine, "the end", || client::recorded(&machine.state_dir));
    console(machine)
}

fn qemus_throughput(path: &Path) -> String {
    let disk = format!("if=none,id=d0,format=raw,file={}", path.display());
    let output = qemu("bench")
        .args(["-drive", &disk, "-device", "virtio-blk-device,drive=d0,serial=data"])
        .args(["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"])
        .args(["-device", "virtio-net-device,netdev=n0,mac=52:54:00:00:00:01"])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn qemu(args: &str) -> Command {
    let mut command = Command::new("/usr/bin/qemu-system-x86_64");
    let machine = "-M microvm,accel=kvm -cpu host -m 256 -smp 1 -nodefaults -no-user-config -display none -no-reboot";
    command.args(machine.split(' '));
    command.args(["-serial", "stdio", "-kernel", "/guest.kernel", "-initrd", "/guest.initrd", "-append"]);
    command.arg(format!("console=ttyS0 quiet panic=-1 {args}"));
    command
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds of guest time at which `/init` ran.
fn init_at(text: &str) -> f64 {
    let at = text.find("init at ").map(|at| &text[at + 8..]).unwrap_or_else(|| panic!("no init: {text}"));
    at.split_whitespace().next().unwrap().parse().unwrap()
}

/// Resident memory that is not the guest's: all mappings but the largest.
fn beside_guest(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in text.lines() {
        let number = || line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match line.split_once(':') {
            Some(("Size", _)) => mappings.push((number(), 0)),
            Some(("Pss", _)) => {
                if let Some(last) = mappings.last_mut() {
                    last.1 = number();
                }
            }
            _ => {}
        }
    }
    let largest = mappings.iter().map(|m| m.0).max().unwrap_or(0);
    let sum: u64 = mappings.iter().filter(|m| m.0 != largest).map(|m| m.1).sum();
    sum as f64 / 1024.0
}

fn ours(run: usize) -> (f64, f64, f64) {
    let mut machine = machine(&format!("bench{run}"), "first");
    machine.vcpus = 1;
    let begun = Instant::now();
    let state = vmm::launch(Path::new("/vmm"), &machine, |_| Ok(())).unwrap();
    let mut memory: f64 = 0.0;
    wait_for(&machine, "the end", || {
        memory = memory.max(beside_guest(state.engine_pid));
        client::recorded(&machine.state_dir)
    });
    (init_at(&console(&machine)), begun.elapsed().as_secs_f64(), memory)
}

fn qemus() -> (f64, f64, f64) {
    let begun = Instant::now();
    let mut child = qemu("first").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = output.read_to_string(&mut text);
        text
    });
    let mut memory: f64 = 0.0;
    while child.try_wait().unwrap().is_none() {
        memory = memory.max(beside_guest(child.id()));
        std::thread::sleep(Duration::from_millis(10));
    }
    (init_at(&reader.join().unwrap()), begun.elapsed().as_secs_f64(), memory)
}
