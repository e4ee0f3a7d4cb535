//! How fast layers are unpacked, with the roles and without, turn by turn: `unpackload ROUNDS ARCHIVE.tar...`
//! Prints a line of JSON for each archive: medians in milliseconds and their ratio.

use image::{ImportOptions, Store, jailed, silent};
use std::path::Path;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(jailed::UNPACK) => std::process::exit(jailed::unpack(&args[2..])),
        Some(jailed::DECOMPRESS) => std::process::exit(jailed::decompress(&args[2..])),
        _ => {}
    }
    let rounds: usize = args.get(1).and_then(|n| n.parse().ok()).expect("usage: unpackload ROUNDS ARCHIVE.tar...");
    for archive in &args[2..] {
        let mut took = [Vec::new(), Vec::new()];
        for round in 0..rounds * 2 {
            let roles = (round + round / 2) % 2 == 1;
            took[usize::from(roles)].push(once(Path::new(archive), roles));
        }
        let [own, roles] = took.map(|mut all| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        });
        println!(
            r#"{{"archive": {archive:?}, "one_process_ms": {own:.1}, "roles_ms": {roles:.1}, "ratio": {:.2}}}"#,
            roles / own
        );
    }
}

/// An OCI archive's layers, put into a store that is new.
fn once(archive: &Path, roles: bool) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = Store::open(dir.path().join("images")).expect("a store");
    if roles {
        store = store.with_roles("/proc/self/exe".into());
    }
    let begun = Instant::now();
    let options = ImportOptions { tag: Some("x:1".into()), ..Default::default() };
    store.import(archive, &options, &silent).expect("imported");
    begun.elapsed().as_secs_f64() * 1e3
}
