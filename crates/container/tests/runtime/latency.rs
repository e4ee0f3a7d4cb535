//! Figures, printed and not judged.

use crate::support::*;
use std::fs;
use std::time::{Duration, Instant};

pub const TESTS: &[(&str, fn())] = &[("latency::figures", figures)];

fn median(mut times: Vec<Duration>) -> String {
    times.sort();
    format!("{:?} (best {:?})", times[times.len() / 2], times[0])
}

fn private_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let field = |name: &str| -> u64 {
        text.lines().find_map(|l| l.strip_prefix(name)?.trim().trim_end_matches(" kB").trim().parse().ok()).unwrap_or(0)
    };
    println!(
        "  shim: Rss {} KiB, Pss {} KiB, Private_Clean {} KiB, Private_Dirty {} KiB",
        field("Rss:"),
        field("Pss:"),
        field("Private_Clean:"),
        field("Private_Dirty:")
    );
    field("Private_Dirty:")
}

fn figures() {
    let (mut launches, mut firsts, mut laters) = (vec![], vec![], vec![]);
    for _ in 0..10 {
        let begun = Instant::now();
        let pod = Pod::new();
        launches.push(begun.elapsed());
        // An agent has a moment's work between the sandbox and its first container.
        std::thread::sleep(Duration::from_millis(50));
        let mut client = pod.client();
        let begun = Instant::now();
        client.start(pod.script("a", "exit 0")).expect("started");
        firsts.push(begun.elapsed());
        std::thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        client.start(pod.script("b", "exit 0")).expect("started");
        laters.push(begun.elapsed());
    }
    println!(
        "  shim ready: median {:?}; start to executed: first container {:?}, second {:?}",
        median(launches),
        median(firsts),
        median(laters)
    );
    let pod = Pod::new();
    pod.client().start(pod.script("a", "sleep 1000")).expect("started");
    let mut execs = vec![];
    for _ in 0..20 {
        let begun = Instant::now();
        let mut live = pod.exec("a", &["true"], Default::default());
        exit(&mut live);
        execs.push(begun.elapsed());
    }
    println!("  exec of true, request to exit: median {:?}", median(execs));
    private_kib(pod.client().shim_pid);
}
