//! What images bring: manifests, layers, disks, components, and the files they are made from.

use crate::scratch;
use image::fuzz;

pub fn documents(data: &[u8]) {
    fuzz::documents(data);
}

pub fn names(data: &[u8]) {
    fuzz::names(&String::from_utf8_lossy(data));
}

/// The first byte says how many bytes of a tar's blocks are to be made good, so that checksums do not stop everything.
pub fn layer(data: &[u8]) {
    let mut archive = data.to_vec();
    for block in archive.chunks_exact_mut(512) {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    fuzz::layer(&archive, scratch());
}

pub fn heads(data: &[u8]) {
    fuzz::heads(data, scratch());
}

pub fn foreign_disks(data: &[u8]) {
    fuzz::foreign(data, scratch());
}

pub fn ova(data: &[u8]) {
    fuzz::ova(data);
}

pub fn containerfile(data: &[u8]) {
    fuzz::containerfile(&String::from_utf8_lossy(data));
}

pub fn zip(data: &[u8]) {
    fuzz::zip(data);
}

pub fn oci_config(data: &[u8]) {
    if let Ok(spec) = serde_json::from_slice::<container::spec::Spec>(data) {
        let _ = serde_json::to_vec(&spec);
    }
}
