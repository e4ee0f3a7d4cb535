//! End-to-end tests: the real binary in a network namespace that this program makes, driven by real clients. One
//! instance serves all tests; each has a Kubernetes namespace of its own. `cargo test --test e2e -- FILTER` runs those
//! whose name contains FILTER; `--list` lists them.

#[path = "../../../vmm/tests/nested/archive.rs"]
mod archive;
mod attacks;
mod bad_input;
mod bad_network;
mod build;
mod cluster;
mod crash;
mod dual;
mod egress;
mod engines;
mod events;
mod exposed;
mod functions;
mod gateway;
mod images;
mod invoke;
mod kubectl;
mod lambda;
mod leaks;
mod life;
mod limits;
mod metrics;
mod microvm;
mod names;
mod nested;
mod network;
mod oci;
#[path = "../../../vmm/tests/nested/outer.rs"]
mod outer;
mod pods;
mod policies;
mod registry;
mod sleep;
mod snapshots;
mod subnets;
mod traces;
mod vm;

use cluster::Cluster;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

pub enum Outcome {
    Passed,
    /// What this machine lacks.
    Skipped(String),
}

pub type Test = (&'static str, fn(&Cluster) -> Outcome);

/// In the order they run: the last ones stop and start the instance.
const ALL: &[&[Test]] = &[
    functions::TESTS,
    traces::TESTS,
    lambda::TESTS,
    invoke::TESTS,
    events::TESTS,
    gateway::TESTS,
    images::TESTS,
    build::TESTS,
    registry::TESTS,
    kubectl::TESTS,
    pods::TESTS,
    bad_input::TESTS,
    network::TESTS,
    policies::TESTS,
    metrics::TESTS,
    dual::TESTS,
    limits::TESTS,
    vm::TESTS,
    microvm::TESTS,
    sleep::TESTS,
    nested::TESTS,
    snapshots::TESTS,
    oci::TESTS,
    engines::TESTS,
    leaks::TESTS,
    crash::TESTS,
    subnets::TESTS,
    egress::TESTS,
    exposed::TESTS,
    attacks::TESTS,
    bad_network::TESTS,
    names::TESTS,
    life::TESTS,
];

/// What the first thread that panicked in the running test said: it is told again at the end, beside the test's name.
static SAID: Mutex<Option<String>> = Mutex::new(None);

fn remember_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload_as_str().unwrap_or_default();
        let place = panic.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect();
        SAID.lock().unwrap().get_or_insert(format!("{line}{place}"));
        print(panic);
    }));
}

fn main() {
    remember_panics();
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: Vec<Test> = ALL
        .concat()
        .into_iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str())))
        .collect();
    if std::env::args().any(|a| a == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    match Cluster::start() {
        Err(reason) => {
            println!("SKIPPED: {reason}");
            skipped = tests.len();
        }
        Ok(cluster) => {
            for (name, test) in &tests {
                let begun = Instant::now();
                SAID.lock().unwrap().take();
                let outcome = catch_unwind(AssertUnwindSafe(|| test(&cluster)));
                let took = begun.elapsed().as_secs_f64();
                match outcome {
                    Ok(Outcome::Passed) => {
                        passed += 1;
                        println!("test {name} ... ok ({took:.1} s)");
                    }
                    Ok(Outcome::Skipped(reason)) => {
                        skipped += 1;
                        println!("test {name} ... SKIPPED: {reason}");
                    }
                    Err(_) => {
                        failed.push(format!("{name}: {}", SAID.lock().unwrap().take().unwrap_or_default()));
                        println!("test {name} ... FAILED ({took:.1} s)");
                    }
                }
            }
            if !failed.is_empty() {
                cluster.tell_state();
            }
        }
    }
    failed.iter().for_each(|what| println!("failed: {what}"));
    println!("\n{passed} passed, {} failed, {skipped} skipped", failed.len());
    std::process::exit(i32::from(!failed.is_empty()));
}
