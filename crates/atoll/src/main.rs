//! `atoll`: the command line, and the roles the same binary plays when it executes itself.
#![forbid(unsafe_code)]

mod cli;
mod doctor;
mod down;
mod exposed;
mod function;
mod images;
mod instance;
mod kernel;
mod network;
mod networks;
mod output;
mod up;
mod vm;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let Some(code) = role(&args) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("atoll: {failure}");
            ExitCode::from(1)
        }
    }
}

/// The roles, before anything else is set up: they must stay small.
fn role(args: &[String]) -> Option<i32> {
    let (name, rest) = args.split_first()?;
    if name.rsplit('/').next() == Some(container::oci::NAME) {
        return Some(container::oci::main(rest));
    }
    let (role, rest) = rest.split_first()?;
    match role.as_str() {
        "oci" => Some(container::oci::main(rest)),
        "shim" => Some(container::shim::main(rest)),
        "vmm" => Some(vmm::monitor::main(rest)),
        "egress-relay" => Some(::network::relay::main(rest)),
        "function-host" => Some(::function::host::main(rest)),
        "function-connect" => Some(::function::connect::main(rest)),
        "lambda-runtime" => Some(::function::lambda::main(rest)),
        image::jailed::UNPACK => Some(image::jailed::unpack(rest)),
        image::jailed::DECOMPRESS => Some(image::jailed::decompress(rest)),
        "function-compile" => Some(::function::compile::main(rest)),
        _ => None,
    }
}
