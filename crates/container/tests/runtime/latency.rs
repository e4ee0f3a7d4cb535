//! Figures, printed and not judged.

use crate::support::*;
use container::client::{self, Waiting};
use std::fs;
use std::time::{Duration, Instant};

pub const TESTS: &[(&str, fn())] = &[("latency::figures", figures)];

fn median(mut times: Vec<Duration>) -> String {
    times.sort();
    format!("{:?} (best {:?})", times[times.len() / 2], times[0])
}

/// Pages that no file backs are the shim's own; those of the binary are the daemon's too.
fn memory(pid: u32) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let field = |name: &str| -> u64 {
        text.lines().find_map(|l| l.strip_prefix(name)?.trim().trim_end_matches(" kB").trim().parse().ok()).unwrap_or(0)
    };
    println!("  shim: Rss {} KiB, of it anonymous (private) {} KiB", field("Rss:"), field("Anonymous:"));
}

fn figures() {
    let (mut launches, mut told, mut firsts, mut laters) = (vec![], vec![], vec![], vec![]);
    for n in 0..20 {
        let pod = Pod::unlaunched(|_| {});
        if n % 2 == 0 {
            let begun = Instant::now();
            client::launch(&shim_executable(), &pod.sandbox).expect("shim");
            launches.push(begun.elapsed());
        } else {
            let mut waiting = Waiting::execute(&shim_executable()).expect("executed");
            std::thread::sleep(Duration::from_millis(50));
            let begun = Instant::now();
            waiting.launch(&pod.sandbox).expect("shim");
            told.push(begun.elapsed());
        }
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
        "  shim ready: median {}, one that waited: {}; start to executed: first container {}, second {}",
        median(launches),
        median(told),
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
    println!("  exec of true, request to exit: median {}", median(execs));
    // Without the set-up process that waits for the next container: it shares pages that are the shim's alone later.
    pod.client().pause().expect("paused");
    pod.client().resume().expect("resumed");
    memory(pod.client().shim_pid);
}
