//! File systems made of layers, as the kernel sees them: the same names, owners, attributes and contents as in the overlay
//! of the same layers. Its own main: the same executable compares, in a mount namespace of its own.

use image::{GcOptions, ImportOptions, Kind, Limits, Progress, Store, fuzz, jailed, silent};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(jailed::UNPACK) => std::process::exit(jailed::unpack(&args[2..])),
        Some(jailed::DECOMPRESS) => std::process::exit(jailed::decompress(&args[2..])),
        Some("compare") => return compare(Path::new(&args[2]), Path::new(&args[3])),
        Some("--list") => return,
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners, whiteouts and mounts need root");
        return;
    }
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("\terofs\n") {
        println!("SKIPPED: this kernel has no erofs");
        return;
    }
    let tests: [(&str, fn()); 6] = [
        ("everything_a_layer_may_hold", everything_a_layer_may_hold),
        ("any_layers_are_what_overlayfs_makes_of_them", any_layers_are_what_overlayfs_makes_of_them),
        ("directories_of_any_size", directories_of_any_size),
        ("an_image_has_one_until_it_goes", an_image_has_one_until_it_goes),
        ("limits_are_told", limits_are_told),
        ("the_same_layers_give_the_same_bytes", the_same_layers_give_the_same_bytes),
    ];
    let only = args.get(1).cloned().unwrap_or_default();
    for (name, test) in tests.iter().filter(|(name, _)| name.contains(&only)) {
        test();
        println!("test {name} ... ok");
    }
}

fn sh(dir: &Path, script: &str) {
    let status = Command::new("sh").arg("-ec").arg(script).current_dir(dir).status().unwrap();
    assert!(status.success(), "{script}");
}

/// A directory with layers `0` (the lowest), `1`, ...
struct Layers(tempfile::TempDir);

impl Layers {
    fn new(scripts: &[&str]) -> Layers {
        let layers = Layers(tempfile::tempdir().unwrap());
        for (n, script) in scripts.iter().enumerate() {
            let dir = layers.path().join(n.to_string());
            fs::create_dir(&dir).unwrap();
            sh(&dir, script);
        }
        layers
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn list(&self) -> Vec<PathBuf> {
        (0..).map(|n| self.path().join(n.to_string())).take_while(|p| p.exists()).collect()
    }

    fn build(&self) -> PathBuf {
        let file = self.path().join("file");
        fuzz::erofs(&self.list(), &file, &Limits::default()).unwrap();
        file
    }

    /// Builds, checks with `fsck.erofs` and compares with the overlay of the layers, both mounted.
    fn check(&self) {
        check(&self.build(), &self.list(), self.path());
    }
}

fn check(file: &Path, layers: &[PathBuf], scratch: &Path) {
    match Command::new("fsck.erofs").arg("--extract").arg(file).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => println!("SKIPPED fsck.erofs: it is not here"),
    }
    let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
    for dir in [&ours, &theirs] {
        fs::create_dir_all(dir).unwrap();
    }
    let mut lower: Vec<&str> = layers.iter().rev().map(|l| l.to_str().unwrap()).collect();
    // A lone lower layer is no overlay.
    let empty = scratch.join("empty");
    fs::create_dir_all(&empty).unwrap();
    lower.push(empty.to_str().unwrap());
    let script = format!(
        "mount -t erofs -o ro,loop {} {ours} && mount -t overlay -o ro,lowerdir={} none {theirs} && \"$0\" compare {ours} {theirs}",
        file.display(),
        lower.join(":"),
        ours = ours.display(),
        theirs = theirs.display(),
    );
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", &script])
        .arg(std::env::current_exe().unwrap())
        .status();
    assert!(status.unwrap().success(), "they differ: see above");
}

/// What a directory holds: name to type, mode, owner, size, time, link, attributes, content; and which names are one file.
fn listing(root: &Path, overlay: bool) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let link = fs::read_link(&path).unwrap_or_default();
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        let content = if meta.is_file() {
            assert_eq!(fs::File::open(&path).unwrap().read_at(&mut [0], meta.len()).unwrap(), 0);
            image::Digest::of(&fs::read(&path).unwrap()).to_string()
        } else {
            String::new()
        };
        let size = if meta.is_file() { meta.len() } else { 0 };
        let text = format!(
            "{:o} {}:{} {size} {}.{} {link:?} rdev {} {:?} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.rdev(),
            attributes(&path),
        );
        all.insert(name.clone(), text);
        if meta.is_dir() {
            let entries = fs::read_dir(&path).unwrap().map(|e| e.unwrap().path());
            // An overlay lists whiteouts of directories that only one layer has, but does not find them.
            let (entries, absent): (Vec<_>, Vec<_>) = entries.partition(|e| fs::symlink_metadata(e).is_ok());
            assert!(absent.is_empty() || overlay, "{absent:?}");
            assert!(!path.join("no such name").exists());
            todo.extend(entries);
        } else {
            let first = inodes.entry(meta.ino()).or_insert(name.clone());
            *first = (*first).clone().min(name);
        }
    }
    let links: Vec<(PathBuf, PathBuf)> = all
        .keys()
        .filter_map(|name| {
            let meta = fs::symlink_metadata(root.join(name)).unwrap();
            Some((name.clone(), inodes.get(&meta.ino())?.clone())).filter(|_| !meta.is_dir())
        })
        .collect();
    for (name, first) in links {
        all.get_mut(&name).unwrap().push_str(&format!(" one with {}", first.display()));
    }
    all
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let mut attributes = Vec::new();
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0u8; 65536];
        let n = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        attributes.push((String::from_utf8_lossy(name).into_owned(), value[..n].to_vec()));
    }
    attributes.sort();
    attributes
}

fn compare(ours: &Path, theirs: &Path) {
    let (found, expected) = (listing(ours, false), listing(theirs, true));
    for (path, text) in &expected {
        assert_eq!(found.get(path), Some(text), "{}", path.display());
    }
    let more: Vec<_> = found.keys().filter(|k| !expected.contains_key(*k)).collect();
    assert!(more.is_empty(), "{more:?}");
    // The overlay does not count links of directories.
    for path in found.keys().map(|p| ours.join(p)).filter(|p| p.is_dir() && !p.is_symlink()) {
        let directories = fs::read_dir(&path).unwrap().filter(|e| e.as_ref().unwrap().file_type().unwrap().is_dir());
        assert_eq!(fs::metadata(&path).unwrap().nlink(), 2 + directories.count() as u64, "{}", path.display());
    }
}

const LOWER: &str = r#"
    mkdir -p bin d/deep empty sealed replaced/x/y hidden/below opaque/below gone both/one
    echo x > bin/sh; chmod 4755 bin/sh; ln bin/sh bin/ash; ln bin/sh d/shell; ln -s /bin/sh link
    echo user > d/user; chown 1000:65535 d/user; chmod 600 d/user; chown 33:33 d/deep; chmod 1777 d/deep
    chown 4000000000:70000 d; truncate -s 3M d/sparse; echo end >> d/sparse; mkfifo fifo; mknod null c 1 3
    mknod far b 4000 1000000; echo y > sealed/file; chmod 000 sealed/file sealed
    cp /bin/true bin/cap; setcap cap_net_raw+ep bin/cap; : > bin/empty
    for n in 1 4031 4032 4033 4095 4096 4097 8191 8192 8193 262143 262144 262145 1000000; do
        head -c $n /dev/urandom > d/$n; done
    ln -s "$(head -c 4094 /dev/zero | tr '\0' x)" long; ln -s "$(head -c 4032 /dev/zero | tr '\0' x)" longer
    echo down > hidden/below/f; echo down > opaque/below/f; echo down > gone/f; echo down > both/one/a; echo 1 > file
    touch "$(head -c 255 /dev/zero | tr '\0' n)" "$(printf 'a\nb\\\303\050')" -- -minus '!' .hidden
    find . -exec touch -h -d '2001-02-03 04:05:06.789012345 UTC' {} +; touch -d "1960-01-01 UTC" fifo
"#;

const UPPER: &str = r#"
    mkdir opaque both both/one file; echo up > opaque/up; echo up > both/one/b; chmod 700 both; chown 5:6 both/one
    mknod gone c 0 0; mknod d-gone c 0 0; echo now a file > replaced; mkdir -p hidden; mknod hidden/below c 0 0
    mkdir d; mknod d/shell c 0 0; echo other > d/user; mkfifo d/4096
    touch -h -d '2002-02-03 04:05:06 UTC' both opaque
"#;

/// Attributes whose names no shell tool is sure to be here for.
fn set(path: PathBuf, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

fn everything_a_layer_may_hold() {
    let layers = Layers::new(&[LOWER, UPPER, "mkdir opaque; echo top > opaque/top; mkdir gone; echo new > gone/new"]);
    let at = |path: &str| layers.path().join(path);
    set(at("0/d"), "user.kind", b"directory");
    for n in 0..20 {
        set(at("0/d/user"), &format!("user.n{n}"), &vec![n; usize::from(n) * 7]);
        set(at("0/d/1000000"), &format!("user.n{n}"), &[n; 150]);
    }
    set(at("0/bin/sh"), "user.empty", b"");
    // user::rw-, user:1234:r--, group::r--, mask::r--, other::---
    let acl = |entries: &[(u16, u16, u32)]| {
        let bytes = entries.iter().flat_map(|(tag, bits, id)| {
            [&tag.to_le_bytes()[..], &bits.to_le_bytes()[..], &id.to_le_bytes()[..]].concat()
        });
        2u32.to_le_bytes().into_iter().chain(bytes).collect::<Vec<u8>>()
    };
    let value = acl(&[(1, 6, !0), (2, 4, 1234), (4, 4, !0), (16, 4, !0), (32, 0, !0)]);
    set(at("0/d/8192"), "system.posix_acl_access", &value);
    set(at("0/empty"), "system.posix_acl_default", &value);
    set(at("1/opaque"), "trusted.overlay.opaque", b"y");
    layers.check();
    Layers::new(&[""]).check();
    Layers::new(&[LOWER]).check();
}

#[derive(Clone, Debug)]
enum What {
    File(usize),
    Directory,
    Opaque,
    Link(String),
    Hard(String),
    Whiteout,
}

/// Makes what it can of a list: what is in the way of an entry is in its stead.
fn make(root: &Path, entries: &[(String, What, u32)]) {
    fs::create_dir_all(root).unwrap();
    for (path, what, owner) in entries {
        let path = root.join(path);
        if fs::create_dir_all(path.parent().unwrap()).is_err() {
            continue;
        }
        let made = match what {
            What::File(size) => fs::OpenOptions::new().write(true).create_new(true).open(&path).and_then(|f| {
                f.write_all_at(&path.to_str().unwrap().as_bytes().repeat(*size / 8), (*size % 5 * 4000) as u64)
            }),
            What::Directory | What::Opaque => fs::create_dir(&path),
            What::Link(to) => std::os::unix::fs::symlink(to, &path),
            What::Hard(to) => fs::hard_link(root.join(to), &path),
            What::Whiteout => {
                let kind = rustix::fs::FileType::CharacterDevice;
                rustix::fs::mknodat(rustix::fs::CWD, &path, kind, rustix::fs::Mode::empty(), 0).map_err(Into::into)
            }
        };
        if made.is_ok() && !matches!(what, What::Hard(_)) {
            std::os::unix::fs::lchown(&path, Some(*owner), Some(owner / 2)).unwrap();
            if matches!(what, What::Opaque) {
                set(path, "trusted.overlay.opaque", b"y");
            }
        }
    }
}

fn any_layers_are_what_overlayfs_makes_of_them() {
    let path = || proptest::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"));
    let what = prop_oneof![
        4 => (0usize..40_000).prop_map(What::File),
        2 => Just(What::Directory),
        1 => Just(What::Opaque),
        1 => path().prop_map(What::Link),
        2 => path().prop_map(What::Hard),
        2 => Just(What::Whiteout),
    ];
    let layer = proptest::collection::vec((path(), what, any::<u32>().prop_map(|id| id / 2)), 0..20);
    let mut runner = TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
    let layers = proptest::collection::vec(layer, 1..5);
    let result = runner.run(&layers, |all| {
        let layers = Layers::new(&[]);
        for (n, entries) in all.iter().enumerate() {
            make(&layers.path().join(n.to_string()), entries);
        }
        layers.check();
        Ok(())
    });
    result.unwrap();
}

fn directories_of_any_size() {
    let many = r#"mkdir many; cd many; seq -f 'n%040.0f' 3000 | xargs mkdir; cd ..; seq 5000 | xargs touch
        for n in $(seq 120 140); do mkdir d$n; (cd d$n; seq -f '%017.0f' $n | xargs touch); done
        mkdir a; cd a; for n in $(seq 300); do mkdir b; cd b; done; touch end"#;
    Layers::new(&[many, "cd /; exit 0"]).check();
}

fn limits_are_told() {
    let layers = Layers::new(&["for n in 1 2 3 4 5; do echo x > $n; done; truncate -s 1T large"]);
    let file = layers.path().join("file");
    let error = fuzz::erofs(&layers.list(), &file, &Limits { block_inodes: 6, ..Limits::default() }).unwrap_err();
    assert!(error.chain().contains("more than 6 files and directories"), "{}", error.chain());
    let error = fuzz::erofs(&layers.list(), &file, &Limits::default()).unwrap_err();
    assert!(error.chain().contains("larger than the limit of 274877906944 bytes"), "{}", error.chain());
    let limits = Limits { block_bytes: 2 << 40, ..Limits::default() };
    fuzz::erofs(&layers.list(), &file, &limits).unwrap();
    let meta = fs::metadata(&file).unwrap();
    assert!(meta.len() > 1 << 40 && meta.blocks() < 64, "{meta:?}");
    let missing = [layers.path().join("0"), layers.path().join("nothing")];
    assert!(fuzz::erofs(&missing, &file, &limits).unwrap_err().chain().contains("nothing"));
}

/// Pinned: a change of the format's reading or writing would otherwise pass by everything but an old kernel.
fn the_same_layers_give_the_same_bytes() {
    let script = r#"mkdir -p etc/d; echo hello > etc/hello; ln etc/hello etc/d/again; ln -s hello etc/link
        head -c 10000 /dev/zero | tr '\0' z > etc/d/z; mkfifo -m 600 pipe; chmod -R u=rwX,go= .; chown -R 7:8 .
        find . -exec touch -h -d '2001-02-03 04:05:06 UTC' {} +"#;
    let digest = || image::Digest::of(&fs::read(Layers::new(&[script]).build()).unwrap()).to_string();
    assert_eq!(digest(), digest());
    assert_eq!(digest(), "sha256:daf0bab4cc2017a232b3f5265adf5f45f6fb1e55eeadaca448b721865eb1a883");
}

fn an_image_has_one_until_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    sh(&root, "mkdir -p a/b; echo x > a/b/c; chown 12:34 a/b; head -c 5000000 /dev/urandom > large");
    sh(dir.path(), "tar -C root -cf x.tar ./a/b ./large");
    let store = Store::open(dir.path().join("images")).unwrap().with_roles(std::env::current_exe().unwrap());
    for tag in ["x:1", "y:1"] {
        let options = ImportOptions { tag: Some(tag.into()), cmd: vec![tag.into()], ..Default::default() };
        store.import(&dir.path().join("x.tar"), &options, &silent).unwrap();
    }
    let image = store.resolve("x:1").unwrap();
    assert_eq!(store.block_image_made(&image).unwrap(), None);
    let told = Mutex::new(Vec::new());
    let made: Vec<PathBuf> = std::thread::scope(|scope| {
        let ask = || scope.spawn(|| store.block_image(&image, &|p| told.lock().unwrap().push(p)).unwrap());
        [ask(), ask(), ask()].map(|t| t.join().unwrap()).into()
    });
    let told = told.into_inner().unwrap();
    assert_eq!(told.iter().filter(|p| matches!(p, Progress::Step(_))).count(), 1, "made once: {told:?}");
    assert!(told.iter().any(|p| matches!(p, Progress::Bytes { total: Some(5_000_000..), .. })), "{told:?}");
    assert!(made.iter().all(|path| *path == made[0]) && fs::read_dir(store.root().join("tmp")).unwrap().count() == 0);
    assert_eq!(store.block_image_made(&image).unwrap().as_ref(), made.first());
    // Shared with another image of the same layers.
    let other = store.resolve("y:1").unwrap();
    assert_eq!(store.block_image(&other, &|p| panic!("made again: {p:?}")).unwrap(), made[0]);
    assert_eq!(fs::metadata(&made[0]).unwrap().mode() & 0o777, 0o444);
    let Kind::Container { layers, .. } = &image.kind else { panic!("no container") };
    check(&made[0], layers, dir.path());
    // Another store makes the same bytes of it, also of directories that the archive has no entry of.
    let second = Store::open(dir.path().join("second")).unwrap();
    let options = ImportOptions { tag: Some("x:1".into()), cmd: vec!["x".into()], ..Default::default() };
    second.import(&dir.path().join("x.tar"), &options, &silent).unwrap();
    let again = second.block_image(&second.resolve("x:1").unwrap(), &silent).unwrap();
    assert!(fs::read(&again).unwrap() == fs::read(&made[0]).unwrap());

    let at_once = GcOptions { grace: Duration::ZERO, untagged: Duration::ZERO, ..Default::default() };
    store.remove("x:1").unwrap();
    store.gc(&at_once).unwrap();
    assert!(made[0].exists(), "the other image has it");
    store.remove("y:1").unwrap();
    store.gc(&at_once).unwrap();
    assert!(!made[0].exists());
}
