//! Builds the agent of pods' machines, a static program, with a target directory of its own, and compresses it for
//! `boundary::microvm` to carry.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 5] = ["clock", "container", "guest", "jail", "network"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let own = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let crates = own.parent().expect("crates/").to_owned();
    for name in SOURCES {
        println!("cargo:rerun-if-changed={}", crates.join(name).join("src").display());
        println!("cargo:rerun-if-changed={}", crates.join(name).join("Cargo.toml").display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    let bytes = std::fs::read(build(&crates, &out)).expect("the agent was built");
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&bytes).expect("compressed");
    std::fs::write(out.join("atoll-guest.gz"), packed.finish().expect("compressed")).expect("written");
    println!("cargo:rustc-env=ATOLL_GUEST_ID={:016x}", fnv(&bytes));
}

fn build(crates: &Path, out: &Path) -> PathBuf {
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let directory = out.join("guest");
    let mut command = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    command
        .current_dir(crates)
        .args(["build", "--locked", "--quiet", "--release", "--package", "guest", "--bin", "atoll-guest"])
        .args(["--target", &target, "--target-dir"])
        .arg(&directory)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    // small where it is shipped, quick to build where it is tested
    if env::var("PROFILE").as_deref() == Ok("release") {
        command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s");
        command.env("CARGO_PROFILE_RELEASE_LTO", "true").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    } else {
        command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "64");
    }
    // what the build around this one has set for its own programs
    for name in
        ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "CLIPPY_ARGS"]
    {
        command.env_remove(name);
    }
    let status = command.status().expect("cargo runs");
    assert!(status.success(), "the agent of pods' machines cannot be built: {status}");
    directory.join(target).join("release").join("atoll-guest")
}

/// Fowler, Noll and Vo's hash: what tells one agent from another.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
