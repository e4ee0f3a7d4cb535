//! An importer is killed at many points of its way; what it leaves is whole images and garbage, nothing between.

use image::{GcOptions, ImportOptions, Kind, Store, silent};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const ROUNDS: u64 = 60;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("import") => return import(Path::new(&args[2]), Path::new(&args[3]), &args[4]),
        Some("--list") => return,
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners and whiteouts need root");
        return;
    }
    killed_importers();
    println!("test killed_importers ... ok");
}

fn import(store: &Path, file: &Path, tag: &str) {
    let store = Store::open(store).unwrap();
    let options = ImportOptions { tag: Some(tag.into()), cmd: vec!["/a".into()], ..Default::default() };
    store.import(file, &options, &silent).unwrap();
}

fn killed_importers() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("d")).unwrap();
    for n in 0..200u32 {
        let content: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(n + 1) >> 3) as u8).collect();
        std::fs::write(root.join(format!("d/{n}")), content).unwrap();
    }
    let file = dir.path().join("root.tar");
    assert!(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&file).arg(".").status().unwrap().success());

    let images = dir.path().join("images");
    let begin = |tag: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("import").arg(&images).arg(&file).arg(tag).stderr(Stdio::null()).spawn().unwrap()
    };
    let begun = std::time::Instant::now();
    assert!(begin("whole").wait().unwrap().success());
    let whole = begun.elapsed();

    let mut killed = 0;
    for round in 0..ROUNDS {
        let mut child = begin(&format!("round{round}"));
        // Points spread over a whole import's time; which ones they hit does not matter, that there are many does.
        std::thread::sleep(whole.mul_f64(round as f64 / ROUNDS as f64));
        let _ = child.kill();
        killed += u32::from(!child.wait().unwrap().success());
        let store = Store::open(&images).unwrap();
        for image in store.list().unwrap() {
            let resolved = store.resolve(&image.name).unwrap();
            let Kind::Container { layers, .. } = resolved.kind else { panic!("{}", image.name) };
            assert_eq!(std::fs::read_dir(layers[0].join("d")).unwrap().count(), 200, "{}", image.name);
        }
        if round % 7 == 0 {
            let at_once = Duration::ZERO;
            store
                .gc(&GcOptions { grace: at_once, untagged: at_once, unfinished: at_once, ..Default::default() })
                .unwrap();
        }
    }
    assert!(killed > ROUNDS as u32 / 4, "only {killed} importers were killed in time");
    let store = Store::open(&images).unwrap();
    let names: Vec<String> = store.list().unwrap().into_iter().map(|i| i.name).collect();
    for name in names {
        store.remove(&name).unwrap();
    }
    let at_once = Duration::ZERO;
    store.gc(&GcOptions { grace: at_once, untagged: at_once, unfinished: at_once, ..Default::default() }).unwrap();
    for kind in ["blobs/sha256", "layers", "tmp", "refs", "uploads", "partial"] {
        assert_eq!(std::fs::read_dir(images.join(kind)).unwrap().count(), 0, "{kind}");
    }
}
