//! The runtime and the shim against a real kernel, with a static busybox as image. Needs root.
//!
//! The executable of this test has the role `shim`, as the real binary does; therefore its own `main`.

#[path = "runtime/support.rs"]
mod support;

#[path = "runtime/attacks.rs"]
mod attacks;
#[path = "runtime/isolation.rs"]
mod isolation;
#[path = "runtime/latency.rs"]
mod latency;
#[path = "runtime/layouts.rs"]
mod layouts;
#[path = "runtime/leaks.rs"]
mod leaks;
#[path = "runtime/lifecycle.rs"]
mod lifecycle;
#[path = "runtime/streams.rs"]
mod streams;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "shim") {
        std::process::exit(container::shim::main(args.get(2..).unwrap_or_default()));
    }
    if args.get(1).is_some_and(|a| a == "daemon") {
        return lifecycle::daemon(args.get(2).map(String::as_str).unwrap_or_default());
    }
    let filters: Vec<&String> = args.iter().skip(1).filter(|a| !a.starts_with('-')).collect();
    if args.iter().any(|a| a == "--list") {
        return;
    }
    if let Some(reason) = support::missing() {
        println!("SKIPPED: {reason}");
        return;
    }
    let mut failed = Vec::new();
    let mut ran = 0;
    for (name, test) in [
        isolation::TESTS,
        attacks::TESTS,
        lifecycle::TESTS,
        streams::TESTS,
        layouts::TESTS,
        leaks::TESTS,
        latency::TESTS,
    ]
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
