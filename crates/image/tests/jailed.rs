//! Layers unpacked by the roles: the same files as without them, and what a role that is taken over or killed can do.
//! Its own main: the same executable has the roles, as the real binary does.

use image::{ImportOptions, Kind, Limits, Store, jailed, silent};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(jailed::UNPACK) => std::process::exit(jailed::unpack(&args[2..])),
        Some(jailed::DECOMPRESS) => std::process::exit(jailed::decompress(&args[2..])),
        Some("full") => return full(Path::new(&args[2]), Path::new(&args[3])),
        Some("--list") => return,
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners and whiteouts need root");
        return;
    }
    let tests: [(&str, fn()); 6] = [
        ("a_full_disk_is_an_error_and_leaves_nothing", a_full_disk_is_an_error_and_leaves_nothing),
        ("the_same_files_as_in_one_process", the_same_files_as_in_one_process),
        ("a_role_holds_nothing_but_its_work", a_role_holds_nothing_but_its_work),
        ("a_killed_role_is_an_error_and_leaves_nothing", a_killed_role_is_an_error_and_leaves_nothing),
        ("bad_layers_are_told_as_without_roles", bad_layers_are_told_as_without_roles),
        ("a_program_without_the_roles_is_an_error", a_program_without_the_roles_is_an_error),
    ];
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
}

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("images")).unwrap().with_roles(std::env::current_exe().unwrap());
        Bench { dir, store }
    }

    fn import(&self, file: &Path) -> image::Result<PathBuf> {
        let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["/a".into()], ..Default::default() };
        self.store.import(file, &options, &silent)?;
        let Kind::Container { layers, .. } = self.store.resolve("x:1")?.kind else { panic!("no container") };
        Ok(layers[0].clone())
    }

    fn left(&self, kinds: &[&str]) {
        for kind in kinds {
            let left = fs::read_dir(self.store.root().join(kind)).unwrap().count();
            assert_eq!(left, 0, "{kind}");
        }
    }
}

/// A tar of a directory made by a script.
fn tar(dir: &Path, script: &str) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(&root).unwrap();
    assert!(Command::new("sh").arg("-ec").arg(script).current_dir(&root).status().unwrap().success());
    let file = dir.join("root.tar");
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--format=posix", "--sort=name", "-C"])
        .arg(&root)
        .arg("-cf")
        .arg(&file)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
    file
}

/// What a directory holds: name to type, mode, owner, size, time, link, attributes.
fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let link = fs::read_link(&path).unwrap_or_default();
        let mut names = vec![0u8; 4096];
        let length = rustix::fs::llistxattr(&path, &mut names).unwrap_or(0);
        let mut attributes = Vec::new();
        for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
            let mut value = vec![0u8; 4096];
            let n = rustix::fs::lgetxattr(&path, name, &mut value).unwrap();
            attributes.push((String::from_utf8_lossy(name).into_owned(), value[..n].to_vec()));
        }
        attributes.sort();
        let size = if meta.is_file() { meta.len() } else { 0 };
        let text = format!(
            "{:o} {}:{} {size} {} links {} {link:?} rdev {} {attributes:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            // A whiteout is as old as its layer is here.
            if meta.file_type().is_char_device() { 0 } else { meta.mtime() },
            if meta.is_file() { meta.nlink() } else { 0 },
            meta.rdev()
        );
        all.insert(path.strip_prefix(root).unwrap().to_path_buf(), text);
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    all
}

const EVERYTHING: &str = r#"
    mkdir -p bin d/deep empty sealed lower; echo x > bin/sh; chmod 4755 bin/sh; ln bin/sh bin/ash; ln -s /bin/sh link
    echo user > d/user; chown 1000:65535 d/user; chmod 600 d/user; chown 33:33 d/deep; chmod 1777 d/deep
    truncate -s 1M d/sparse; echo end >> d/sparse; mkfifo fifo; echo big > d/big; chown 4000000000:70000 d/big
    touch .wh.gone; touch lower/.wh..wh..opq; echo y > sealed/file; chmod 000 sealed/file sealed
    cp /bin/true bin/cap; setcap cap_net_raw+ep bin/cap || true
    touch -h -d '2001-02-03 04:05:06 UTC' bin/sh link d
"#;

fn the_same_files_as_in_one_process() {
    let bench = Bench::new();
    let file = tar(bench.dir.path(), EVERYTHING);
    let plain = Store::open(bench.dir.path().join("plain")).unwrap();
    let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["/a".into()], ..Default::default() };
    plain.import(&file, &options, &silent).unwrap();
    let Kind::Container { layers, .. } = plain.resolve("x:1").unwrap().kind else { panic!("no container") };
    let (expected, found) = (listing(&layers[0]), listing(&bench.import(&file).unwrap()));
    assert!(expected.len() > 15 && expected[Path::new("d/big")].contains("65534:65534"), "{expected:?}");
    assert!(expected[Path::new("lower")].contains("trusted.overlay.opaque"), "{expected:?}");
    for (path, text) in &expected {
        assert_eq!(found.get(path), Some(text), "{}", path.display());
    }
    assert_eq!(expected.len(), found.len());
    // Compressed archives take the decompressor's way.
    for (tool, end) in [("gzip", "gz"), ("zstd", "zst")] {
        if !Command::new(tool).args(["-kqf"]).arg(&file).status().is_ok_and(|s| s.success()) {
            println!("SKIPPED: {tool} is not here");
            continue;
        }
        let bench = Bench::new();
        assert_eq!(listing(&bench.import(&file.with_extension(format!("tar.{end}"))).unwrap()), found, "{tool}");
    }
}

/// A tar of 6 MiB that does not shrink.
fn large(dir: &Path) -> PathBuf {
    tar(dir, "for n in $(seq 12); do head -c 524288 /dev/urandom > $n; done")
}

/// Waits for a child of this process that has a role and is in its filter.
fn role(name: &str) -> i32 {
    loop {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let ours = status.lines().any(|l| l == format!("PPid:\t{}", std::process::id()));
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if ours && line.split('\0').nth(1) == Some(name) && status.lines().any(|l| l == "Seccomp:\t2") {
                return pid;
            }
        }
        std::thread::yield_now();
    }
}

fn signal(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn a_role_holds_nothing_but_its_work() {
    use rustix::process::Signal;
    let bench = Bench::new();
    let file = large(bench.dir.path());
    let _inherited = fs::File::open("/etc/passwd").unwrap();
    std::thread::scope(|scope| {
        let importing = scope.spawn(|| bench.import(&file));
        let field = |pid: i32, name: &str| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default().to_owned();
            line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
        };
        for (name, most, user, capabilities) in [
            (jailed::UNPACK, 6, "4294770688", "000000008000001b"),
            (jailed::DECOMPRESS, 5, "4294770687", "0000000000000000"),
        ] {
            let pid = role(name);
            signal(pid, Signal::STOP);
            assert_eq!(field(pid, "Uid:"), [user; 4], "{name}");
            assert_eq!(field(pid, "CapEff:"), [capabilities], "{name}");
            assert_eq!(field(pid, "NoNewPrivs:"), ["1"], "{name}");
            assert_eq!(field(pid, "Groups:"), [""; 0], "{name}");
            let namespaces = if name == jailed::UNPACK {
                &["user", "mnt", "net", "ipc", "uts"][..]
            } else {
                &["mnt", "net", "ipc", "uts"]
            };
            for namespace in namespaces {
                let (theirs, ours) = (format!("/proc/{pid}/ns/{namespace}"), format!("/proc/self/ns/{namespace}"));
                assert_ne!(fs::read_link(theirs).unwrap(), fs::read_link(ours).unwrap(), "{name} {namespace}");
            }
            let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root/")).unwrap().collect();
            assert!(root.is_empty(), "{name}: {root:?}");
            let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .map(|e| fs::read_link(e.unwrap().path()).unwrap_or_default())
                .collect();
            let named = open.iter().filter(|p| p.starts_with("/etc") || p.starts_with("/proc")).count();
            assert_eq!(named, 0, "{name}: {open:?}");
            assert!(open.len() <= most + 3, "{name}: {open:?}");
            signal(pid, Signal::CONT);
        }
        importing.join().unwrap().unwrap();
    });
}

fn a_killed_role_is_an_error_and_leaves_nothing() {
    for name in [jailed::UNPACK, jailed::DECOMPRESS] {
        let bench = Bench::new();
        let file = large(bench.dir.path());
        let error = std::thread::scope(|scope| {
            let importing = scope.spawn(|| bench.import(&file));
            signal(role(name), rustix::process::Signal::KILL);
            importing.join().unwrap().unwrap_err()
        });
        assert!(error.chain().contains("ended"), "{name}: {}", error.chain());
        bench.left(&["tmp", "layers", "refs"]);
        bench.import(&file).unwrap();
    }
}

fn bad_layers_are_told_as_without_roles() {
    let dir = tempfile::tempdir().unwrap();
    let gzip = |bytes: &[u8]| {
        let mut child = Command::new("gzip")
            .stdin(std::process::Stdio::piped())
            .stdout(fs::File::create(dir.path().join("out.gz")).unwrap())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(child.wait().unwrap().success());
        fs::read(dir.path().join("out.gz")).unwrap()
    };
    let good = fs::read(tar(dir.path(), "echo x > a; mkdir b; ln -s / c")).unwrap();
    let cut = gzip(&good)[..60].to_vec();
    let bomb = gzip(&vec![0u8; 8 << 20]);
    let mut damaged = gzip(&good);
    damaged[30..40].fill(0xff);
    let through = {
        let script = "ln -s /tmp a; mkdir z; echo x > z/b";
        let own = tempfile::tempdir().unwrap();
        fs::read(tar(own.path(), script))
            .map(|t| String::from_utf8_lossy(&t).replace("./z/b", "./a/b").into_bytes())
            .unwrap()
    };
    let limits = Limits { ratio_floor: 1 << 20, layer_entries: 100, ..Limits::default() };
    for (what, bytes) in [("cut", cut), ("bomb", bomb), ("damaged", damaged), ("through", fix(through))] {
        let file = dir.path().join("bad.tar");
        fs::write(&file, bytes).unwrap();
        let mut said = Vec::new();
        for roles in [false, true] {
            let stores = tempfile::tempdir().unwrap();
            let mut store = Store::open(stores.path().join("images")).unwrap().with_limits(limits.clone());
            if roles {
                store = store.with_roles(std::env::current_exe().unwrap());
            }
            let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["/a".into()], ..Default::default() };
            said.push(store.import(&file, &options, &silent).unwrap_err().chain());
            let bench = Bench { dir: stores, store };
            bench.left(&["tmp", "layers", "refs"]);
        }
        let clean = |s: &str| s.split_once(": ").map_or(s.to_owned(), |(_, why)| why.to_owned());
        assert_eq!(clean(&said[0]), clean(&said[1]), "{what}");
    }
}

/// Makes the checksums of a tar's headers fit again.
fn fix(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar.chunks_exact_mut(512).filter(|b| b[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}

fn a_program_without_the_roles_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = tar(dir.path(), "echo x > a");
    for program in ["/bin/true", "/bin/false", "/nothing/there"] {
        let stores = tempfile::tempdir().unwrap();
        let store = Store::open(stores.path().join("images")).unwrap().with_roles(program.into());
        let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["/a".into()], ..Default::default() };
        let error = store.import(&file, &options, &silent).unwrap_err().chain();
        assert!(error.contains("unpacker") || error.contains("decompressor"), "{program}: {error}");
        Bench { dir: stores, store }.left(&["tmp", "layers", "refs"]);
    }
}

/// On file systems of their own, so small that the blob does not fit, or the layer.
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = large(dir.path());
    for size in ["3m", "9m"] {
        let script = format!(
            "mount -t tmpfs -o size={size} none {0} && exec \"$0\" full {0} \"$1\"",
            dir.path().join("root").display()
        );
        let status = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-ec", &script])
            .arg(std::env::current_exe().unwrap())
            .arg(&file)
            .status();
        assert!(status.unwrap().success(), "{size}");
    }
}

fn full(disk: &Path, file: &Path) {
    let store = Store::open(disk.join("images")).unwrap().with_roles(std::env::current_exe().unwrap());
    let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["/a".into()], ..Default::default() };
    let error = store.import(file, &options, &silent).unwrap_err().chain();
    assert!(error.contains("No space left on device"), "{error}");
    for kind in ["tmp", "layers", "refs"] {
        assert_eq!(fs::read_dir(store.root().join(kind)).unwrap().count(), 0, "{kind} after {error}");
    }
    let at_once = image::GcOptions { grace: std::time::Duration::ZERO, ..Default::default() };
    store.gc(&at_once).unwrap();
    let blobs = fs::read_dir(store.root().join("blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 0, "a collection needs no room");
}
