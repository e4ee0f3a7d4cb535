//! How fast our monitor is, and what it takes, on whatever KVM there is: JSON lines for `bench/vmm.sh`. The guest is the
//! tests', which speaks with its first instructions. `ATOLL_VMM` is the role; without it the one beside this program.

#[path = "../tests/lab/mod.rs"]
mod lab;
#[path = "../tests/running/mod.rs"]
mod running;

use lab::{again, console, guest, machine, role, snapshot};
use running::{Running, start};
use std::path::Path;
use std::time::{Duration, Instant};
use vmm::client::Request;
use vmm::{Client, Machine};

const STARTS: usize = 50;
const CLONES: usize = 50;
const MEMORY: u64 = 256 << 20;

fn main() {
    let kernel = match guest() {
        Ok(kernel) => kernel,
        Err(why) => return println!("SKIPPED: {why}"),
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    starts(kernel, dir.path());
    clones(kernel, dir.path());
}

fn figure(name: &str, value: f64, unit: &str, goal: f64) {
    println!("{{\"name\":\"{name}\",\"atoll\":{value:.2},\"unit\":\"{unit}\",\"goal\":{goal}}}");
}

/// Milliseconds until the guest was heard, and the machine.
fn heard(machine: &Machine, what: &str) -> (f64, Running) {
    let begun = Instant::now();
    let running = start(&role(), machine);
    while !console(machine).contains(what) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what:?} was not heard");
        std::thread::yield_now();
    }
    (begun.elapsed().as_secs_f64() * 1e3, running)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn starts(kernel: &Path, dir: &Path) {
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for run in 0..STARTS {
        let dir = dir.join(format!("start{run}"));
        std::fs::create_dir(&dir).unwrap();
        let mut one = machine(&dir, kernel, "hold");
        (one.vcpus, one.memory_bytes) = (1, MEMORY);
        one.kvm_cache = Some(dir.parent().unwrap().join("kvm"));
        let (took, running) = heard(&one, "guest");
        // the first one measures KVM itself
        if run > 0 {
            times.push(took);
        }
        let pid = running.state.engine_pid;
        sizes.push(beside_guest(pid) + beside_guest(parent(pid)));
    }
    figure("start_to_first_instruction", median(&mut times), "ms", 5.0);
    figure("monitor_memory", median(&mut sizes), "MiB", 5.0);
}

fn clones(kernel: &Path, dir: &Path) {
    let at = dir.join("origin");
    std::fs::create_dir(&at).unwrap();
    let mut origin = machine(&at, kernel, "pulse");
    (origin.vcpus, origin.memory_bytes) = (1, MEMORY);
    let (_, running) = heard(&origin, "pulse");
    Client::connect(&origin.run_dir).unwrap().request(Request::Pause).unwrap();
    let mut restore = snapshot(&origin, &dir.join("snapshot"), None);
    restore.verify = false;
    let alone = pss(running.state.engine_pid) + pss(parent(running.state.engine_pid));
    drop(running);
    let (mut times, mut all) = (Vec::new(), Vec::new());
    for n in 0..CLONES {
        let clone = again(&origin, &dir.join(format!("clone{n}")), restore.clone());
        let (took, running) = heard(&clone, "pulse");
        Client::connect(&clone.run_dir).unwrap().request(Request::Pause).unwrap();
        times.push(took);
        all.push(running);
    }
    let sum: f64 = all.iter().map(|r| pss(r.state.engine_pid) + pss(parent(r.state.engine_pid))).sum();
    figure("restore_256_mib_to_first_instruction", median(&mut times), "ms", 10.0);
    figure("machine_alone", alone, "MiB", 0.0);
    figure("50_clones_of_it", sum, "MiB", 0.0);
}

fn parent(pid: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Proportional share of a process' memory, in MiB.
fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// The same without the guest's memory.
fn beside_guest(pid: u32) -> f64 {
    let (mut size, mut sum) = (0, 0);
    for line in std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let number = || line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match line.split_once(':') {
            Some(("Size", _)) => size = number(),
            Some(("Pss", _)) if size < MEMORY >> 10 => sum += number(),
            _ => {}
        }
    }
    sum as f64 / 1024.0
}
