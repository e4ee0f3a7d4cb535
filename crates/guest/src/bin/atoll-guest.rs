//! Process 1 of a pod's machine, and its shim.

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let code = match args.split_first() {
        Some((role, rest)) if role == "shim" => container::shim::main(rest),
        _ => guest::agent::main(),
    };
    std::process::exit(code)
}
