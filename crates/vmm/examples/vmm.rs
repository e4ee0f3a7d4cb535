//! The role alone, for tests of this crate: `vmm vmm RUN_DIR`, as the `atoll` binary has it.
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((role, rest)) if role == "vmm" => std::process::exit(vmm::monitor::main(rest)),
        _ => println!("{:?}", vmm::kvm::probe()),
    }
}
