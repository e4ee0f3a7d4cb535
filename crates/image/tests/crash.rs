//! An importer and a puller are killed at many points of their way; what they leave is whole images and garbage that a
//! collection takes, nothing between. Its own main: the same executable is what is killed, and has the roles.

mod common;

use common::{Image, Server, tar_of};
use image::{GcOptions, ImportOptions, Kind, PullOptions, Store, jailed, silent};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ROUNDS: u64 = 40;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(jailed::UNPACK) => std::process::exit(jailed::unpack(&args[2..])),
        Some(jailed::DECOMPRESS) => std::process::exit(jailed::decompress(&args[2..])),
        Some("import") => return import(Path::new(&args[2]), Path::new(&args[3]), &args[4]),
        Some("pull") => return pull(Path::new(&args[2]), &args[3]),
        Some("--list") => return,
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners and whiteouts need root");
        return;
    }
    killed_importers();
    println!("test killed_importers ... ok");
    killed_pullers();
    println!("test killed_pullers ... ok");
}

fn open(store: &Path) -> Store {
    Store::open(store).unwrap().with_roles(std::env::current_exe().unwrap())
}

fn import(store: &Path, file: &Path, tag: &str) {
    let options = ImportOptions { tag: Some(tag.into()), cmd: vec!["/a".into()], ..Default::default() };
    open(store).import(file, &options, &silent).unwrap();
}

fn pull(store: &Path, reference: &str) {
    open(store).pull(reference, &PullOptions::default(), &silent).unwrap();
}

fn begin(args: &[&std::ffi::OsStr]) -> Child {
    Command::new(std::env::current_exe().unwrap()).args(args).stderr(Stdio::null()).spawn().unwrap()
}

fn collect(store: &Store) {
    let at_once = Duration::ZERO;
    store.gc(&GcOptions { grace: at_once, untagged: at_once, unfinished: at_once, ..Default::default() }).unwrap();
}

/// Kills what `start` starts at points spread over a whole run's time: which ones they hit does not matter, that there are
/// many does. After each, what has a name has to be whole.
fn kill_at_many_points(images: &Path, start: impl Fn(u64) -> Child, whole: impl Fn(&Path) -> bool) {
    let begun = std::time::Instant::now();
    assert!(start(ROUNDS).wait().unwrap().success());
    let mut time = begun.elapsed();
    let mut killed = 0;
    for round in 0..ROUNDS {
        if round % 7 == 0 {
            forget_all(images);
        }
        let begun = std::time::Instant::now();
        let mut child = start(round);
        let point = time.mul_f64(round as f64 / ROUNDS as f64);
        while begun.elapsed() < point && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        // Machines get faster and slower: one that is done before its turn says how long they take now.
        match child.try_wait().unwrap() {
            Some(_) => time = time.min(begun.elapsed()),
            None => child.kill().unwrap(),
        }
        killed += u32::from(!child.wait().unwrap().success());
        let store = open(images);
        for image in store.list().unwrap() {
            let Kind::Container { layers, .. } = store.resolve(&image.name).unwrap().kind else {
                panic!("{}", image.name)
            };
            assert!(layers.iter().all(|layer| whole(layer)), "{}", image.name);
        }
    }
    assert!(killed > ROUNDS as u32 / 4, "only {killed} were killed in time");
    forget_all(images);
    for kind in ["blobs/sha256", "layers", "tmp", "refs", "uploads", "partial"] {
        assert_eq!(std::fs::read_dir(images.join(kind)).unwrap().count(), 0, "{kind}");
    }
    let locks = std::fs::read_dir(images.join("locks")).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(locks.filter(|name| name != "gc").count(), 0, "old locks");
}

fn forget_all(images: &Path) {
    roles_are_gone();
    let store = open(images);
    for image in store.list().unwrap() {
        store.remove(&image.name).unwrap();
    }
    collect(&store);
}

/// Roles end when whoever started them has ended.
fn roles_are_gone() {
    let exe = std::env::current_exe().unwrap();
    let is_role = |pid: &std::path::PathBuf| {
        let line = std::fs::read_to_string(pid.join("cmdline")).unwrap_or_default();
        let mut words = line.split('\0');
        words.next() == exe.to_str() && words.next().is_some_and(|w| w == jailed::UNPACK || w == jailed::DECOMPRESS)
    };
    while std::fs::read_dir("/proc").unwrap().flatten().any(|e| is_role(&e.path())) {
        std::thread::yield_now();
    }
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
    let start = |round: u64| {
        let tag = format!("round{round}");
        begin(&["import".as_ref(), images.as_ref(), file.as_ref(), tag.as_ref()])
    };
    kill_at_many_points(&images, start, |layer| std::fs::read_dir(layer.join("d")).unwrap().count() == 200);
}

fn killed_pullers() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::new(&[tar_of("a", 300_000, 1), tar_of("b", 500_000, 2), tar_of("c", 100, 3)]);
    let server = Server::start(move |asked| image.answer(asked));
    let images = dir.path().join("images");
    let start = |round: u64| {
        let name = format!("{}/a/b:{round}", server.address);
        begin(&["pull".as_ref(), images.as_ref(), name.as_ref()])
    };
    let sizes = [("a", 300_000), ("b", 500_000), ("c", 100)];
    kill_at_many_points(&images, start, |layer| {
        sizes.iter().any(|(name, size)| std::fs::metadata(layer.join(name)).is_ok_and(|m| m.len() == *size))
    });
}
