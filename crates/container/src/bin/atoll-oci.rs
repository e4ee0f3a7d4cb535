//! The OCI runtime by itself, for engines that start many containers: what `atoll oci` is, in an executable of 2 MB that
//! the kernel loads in a third of the time.
#![forbid(unsafe_code)]

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    std::process::exit(container::oci::main(&args));
}
