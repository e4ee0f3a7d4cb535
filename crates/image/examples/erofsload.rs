//! Making one EROFS file of directories, beside `mkfs.erofs` of the same: `erofsload ROUNDS DIRECTORY [DIRECTORY...]`, the
//! lowest layer first. The peer gets the first directory only. `TMPDIR` says where the files go.

use image::{Limits, fuzz};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn main() {
    let mut args = std::env::args().skip(1);
    let rounds: usize = args.next().and_then(|n| n.parse().ok()).unwrap_or(3);
    let layers: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let Some(first) = layers.first() else { return eprintln!("usage: erofsload ROUNDS DIRECTORY...") };
    let dir = std::env::temp_dir();
    let (ours, theirs) = (dir.join("ours.erofs"), dir.join("theirs.erofs"));
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        own.push(timed(&ours, || fuzz::erofs(&layers, &ours, &Limits::default()).is_ok()));
        peer.push(timed(&theirs, || {
            let mut mkfs = Command::new("mkfs.erofs");
            mkfs.arg(&theirs).arg(first).stdout(Stdio::null()).status().is_ok_and(|s| s.success())
        }));
    }
    for (name, times, file) in [("atoll", &mut own, &ours), ("mkfs.erofs", &mut peer, &theirs)] {
        times.sort();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        let bytes = std::fs::metadata(file).map_or(0, |m| m.len());
        println!("{name}: {} ms, {} bytes", median.as_millis(), bytes);
        let _ = std::fs::remove_file(file);
    }
}

fn timed(file: &Path, work: impl FnOnce() -> bool) -> Duration {
    let _ = std::fs::remove_file(file);
    let start = Instant::now();
    assert!(work(), "it failed");
    start.elapsed()
}
