//! One program for all targets: `ATOLL_FUZZ_TARGET=NAME fuzz [libFuzzer's options] [corpus]`. `../fuzz/run.sh` runs them
//! all. A target is a function of bytes that must return, whatever they are.
#![no_main]

mod images;
mod objects;
mod wire;

use std::sync::OnceLock;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("image_documents", images::documents),
    ("image_names", images::names),
    ("image_layer", images::layer),
    ("image_heads", images::heads),
    ("foreign_disks", images::foreign_disks),
    ("ova", images::ova),
    ("containerfile", images::containerfile),
    ("zip", images::zip),
    ("oci_config", images::oci_config),
    ("registry_request", wire::registry_request),
    ("invoke_request", wire::invoke_request),
    ("guest_frames", wire::guest_frames),
    ("dns", wire::dns),
    ("dhcp", wire::dhcp),
    ("egress_packet", wire::egress_packet),
    ("sctp_packet", wire::sctp_packet),
    ("spdy", wire::spdy),
    ("qmp", wire::qmp),
    ("vm_snapshot", wire::vm_snapshot),
    ("virtio_block", wire::virtio_block),
    ("virtio_net", wire::virtio_net),
    ("virtio_vsock", wire::virtio_vsock),
    ("virtio_rng", wire::virtio_rng),
    ("virtio_balloon", wire::virtio_balloon),
    ("virtio_console", wire::virtio_console),
    ("virtio_queue", wire::virtio_queue),
    ("qcow2", wire::qcow2),
    ("guest_kernel", wire::guest_kernel),
    ("object_decode", objects::decode),
    ("object_strict", objects::strict),
    ("object_patch", objects::patch),
    ("object_fields", objects::fields),
    ("selectors", objects::selectors),
    ("jsonpath", objects::jsonpath),
];

fn chosen() -> Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("ATOLL_FUZZ_TARGET").unwrap_or_default();
        match TARGETS.iter().find(|(known, _)| *known == name) {
            Some((_, target)) => *target,
            None => {
                let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
                eprintln!("ATOLL_FUZZ_TARGET={name:?}: it is one of {}", names.join(" "));
                std::process::exit(2);
            }
        }
    })
}

libfuzzer_sys::fuzz_target!(init: { chosen(); }, |data: &[u8]| chosen()(data));

/// Where a target may write: memory, and gone with the machine at the latest.
fn scratch() -> &'static std::path::Path {
    static SCRATCH: OnceLock<std::path::PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let base = std::env::var_os("ATOLL_FUZZ_SCRATCH").unwrap_or_else(|| "/dev/shm".into());
        let path = std::path::PathBuf::from(base).join(format!("atoll-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for scratch files");
        path
    })
}

/// Text up to the first zero byte, and what follows.
fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let end = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    (&data[..end], data.get(end + 1..).unwrap_or_default())
}
