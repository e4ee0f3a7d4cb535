//! The runtime as other engines use it: bundles, runc's commands, and the attacks that runtimes have fallen to. Against a
//! real kernel, with a static busybox as root file system. Needs root.
//!
//! The executable of this test has the role `oci`, as the real binary does; therefore its own `main`.

#[path = "oci/attacks.rs"]
mod attacks;
#[path = "oci/commands.rs"]
mod commands;
#[path = "oci/config.rs"]
mod config;
#[path = "oci/mounts.rs"]
mod mounts;
#[path = "oci/seccomp.rs"]
mod seccomp;
#[path = "oci/support.rs"]
mod support;
#[path = "oci/systemd.rs"]
mod systemd;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "oci") {
        std::process::exit(container::oci::main(args.get(2..).unwrap_or_default()));
    }
    let filters: Vec<&String> = args.iter().skip(1).filter(|a| !a.starts_with('-')).collect();
    if args.iter().any(|a| a == "--list") {
        return;
    }
    if let Some(reason) = support::missing() {
        println!("SKIPPED: {reason}");
        return;
    }
    let (mut failed, mut ran) = (Vec::new(), 0);
    for (name, test) in [commands::TESTS, config::TESTS, mounts::TESTS, seccomp::TESTS, attacks::TESTS, systemd::TESTS]
        .into_iter()
        .flatten()
    {
        if !filters.is_empty() && !filters.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        ran += 1;
        let outcome = std::panic::catch_unwind(test);
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    support::clean();
    println!("\ntest result: {} passed; {} failed\n", ran - failed.len(), failed.len());
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
        std::process::exit(101);
    }
}
