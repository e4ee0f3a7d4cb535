use crate::digest::Digest;
use crate::error::Error;
use crate::store::{Limits, Store};
use crate::tar::header;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

/// Builds an archive from (name, type, link or content) triples.
fn archive(entries: &[(&str, u8, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, kind, text) in entries {
        let is_file = *kind == b'0';
        let size = if is_file { text.len() as u64 } else { 0 };
        let link = if is_file { "" } else { text };
        bytes.extend(header(name.as_bytes(), *kind, size, 0o4755, link.as_bytes()).unwrap());
        if is_file {
            bytes.extend(text.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
    }
    bytes.extend([0u8; 1024]);
    bytes
}

struct Bench {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("images")).unwrap();
        Bench { _dir: dir, store }
    }

    fn unpack(&self, bytes: &[u8]) -> Result<PathBuf, Error> {
        let blob = self.store.blob_put(bytes)?;
        let diff_id = self.store.unpack_blob(&blob, None)?;
        Ok(self.store.layer_dir(&diff_id).join("fs"))
    }

    fn refusal(&self, entries: &[(&str, u8, &str)]) -> String {
        let error = self.unpack(&archive(entries)).unwrap_err().to_string();
        assert_eq!(fs::read_dir(self.store.root().join("tmp")).unwrap().count(), 0, "something was left: {error}");
        assert_eq!(fs::read_dir(self.store.root().join("layers")).unwrap().count(), 0, "a bad layer was kept: {error}");
        error
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: owners and whiteouts need root");
    }
    root
}

#[test]
fn a_layer_becomes_files() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let fs = bench
        .unpack(&archive(&[
            ("./", b'5', ""),
            ("bin/", b'5', ""),
            ("bin/sh", b'0', "#!"),
            ("bin/ash", b'1', "bin/sh"),
            ("bin/bash", b'1', "/bin/sh"),
            ("lib", b'2', "/usr/lib"),
            ("dev/null", b'3', ""),
            ("run/fifo", b'6', ""),
            ("/absolute", b'0', "x"),
        ]))
        .unwrap();
    let sh = fs::metadata(fs.join("bin/sh")).unwrap();
    assert_eq!((sh.mode() & 0o7777, sh.uid(), sh.nlink()), (0o4755, 0, 3));
    assert_eq!(fs::read_link(fs.join("lib")).unwrap(), PathBuf::from("/usr/lib"));
    assert!(!fs.join("dev/null").exists(), "a device node was made");
    assert!(fs::metadata(fs.join("run/fifo")).unwrap().file_type().is_fifo());
    assert_eq!(fs::read(fs.join("absolute")).unwrap(), b"x");
    assert_eq!(fs::metadata(fs.join("run")).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn whiteouts_take_overlayfs_form() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let fs = bench
        .unpack(&archive(&[
            ("etc/.wh.gone", b'0', ""),
            ("var/.wh..wh..opq", b'0', ""),
            ("var/new", b'0', "1"),
            ("kept", b'0', "1"),
            (".wh.kept", b'0', ""),
            (".wh.dir", b'0', ""),
            ("dir/file", b'0', "1"),
            (".wh..wh.plnk", b'0', ""),
        ]))
        .unwrap();
    let gone = fs::symlink_metadata(fs.join("etc/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let opaque = |name: &str| rustix::fs::getxattr(fs.join(name), "trusted.overlay.opaque", &mut [0u8; 4]).is_ok();
    assert!(opaque("var") && opaque("dir") && !opaque("etc"));
    assert_eq!(fs::read(fs.join("kept")).unwrap(), b"1");
    assert_eq!(fs::read(fs.join("dir/file")).unwrap(), b"1");
    assert!(!fs.join(".wh..wh.plnk").exists());
}

#[test]
fn nothing_climbs_out() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let outside = bench.store.root().parent().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    let target = outside.to_str().unwrap();
    assert!(bench.refusal(&[("../x", b'0', "1")]).contains("`..`"));
    assert!(bench.refusal(&[("a/../../x", b'0', "1")]).contains("`..`"));
    assert!(bench.refusal(&[("d", b'2', target), ("d/x", b'0', "1")]).contains("symbolic link"));
    assert!(bench.refusal(&[("d", b'2', "."), ("d/x", b'0', "1")]).contains("symbolic link"));
    assert!(bench.refusal(&[("d", b'2', target), ("d/e/", b'5', "")]).contains("symbolic link"));
    assert!(bench.refusal(&[("d", b'2', target), ("d/.wh..wh..opq", b'0', "")]).contains("symbolic link"));
    assert!(bench.refusal(&[("h", b'1', "/etc/passwd")]).contains("not in the layer"));
    assert!(bench.refusal(&[("h", b'1', "../../etc/passwd")]).contains("`..`"));
    assert!(bench.refusal(&[("e", b'2', "/etc"), ("h", b'1', "e/passwd")]).contains("symbolic link"));
    assert!(bench.refusal(&[("d/", b'5', ""), ("h", b'1', "d")]).contains("not a file"));
    assert!(bench.refusal(&[(".wh...", b'0', "")]).contains("whiteout"));
    assert!(bench.refusal(&[("f", b'0', "1"), ("f/x", b'0', "1")]).contains("file"));
    assert!(bench.refusal(&[("s", b'S', "")]).contains("sparse"));
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

/// A file written over a symbolic link replaces the link and does not follow it.
#[test]
fn the_last_of_duplicates_counts() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let outside = bench.store.root().parent().unwrap().join("victim");
    fs::write(&outside, "safe").unwrap();
    let fs = bench
        .unpack(&archive(&[
            ("x", b'2', outside.to_str().unwrap()),
            ("x", b'0', "mine"),
            ("d/deep/file", b'0', "1"),
            ("d", b'0', "now a file"),
            ("f", b'0', "1"),
            ("f/", b'5', ""),
            ("f/x", b'0', "2"),
            ("h", b'0', "same"),
            ("h", b'1', "h"),
        ]))
        .unwrap();
    assert_eq!(fs::read(&outside).unwrap(), b"safe");
    assert_eq!(fs::read(fs.join("x")).unwrap(), b"mine");
    assert_eq!(fs::read(fs.join("d")).unwrap(), b"now a file");
    assert_eq!(fs::read(fs.join("f/x")).unwrap(), b"2");
    assert_eq!(fs::read(fs.join("h")).unwrap(), b"same");
}

#[test]
fn truncated_archives_leave_nothing() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let whole = archive(&[("a", b'0', &"x".repeat(5000))]);
    for cut in [100, 512, 700, 5000] {
        let error = bench.unpack(&whole[..cut]).unwrap_err();
        assert!(error.to_string().contains("truncated"), "{error}");
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&whole).unwrap();
    let gzip = gzip.finish().unwrap();
    assert!(bench.unpack(&gzip[..gzip.len() / 2]).is_err());
    bench.unpack(&gzip).unwrap();
    assert_eq!(fs::read_dir(bench.store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn bombs_do_not_go_off() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { ratio_floor: 1 << 20, layer_bytes: 64 << 20, ..Limits::default() };
    let store = Store::open(dir.path()).unwrap().with_limits(limits);
    let bench = Bench { _dir: dir, store };
    let size = 32u64 << 20;
    let mut tar = header(b"zeros", b'0', size, 0o644, b"").unwrap().to_vec();
    tar.resize(tar.len() + size as usize + 1024, 0);
    let bomb = zstd::encode_all(&tar[..], 19).unwrap();
    let error = bench.unpack(&bomb).unwrap_err().to_string();
    assert!(error.contains("decompression bomb"), "{error}");

    let mut huge = header(b"huge", b'0', 1 << 40, 0o644, b"").unwrap().to_vec();
    huge.resize(65 << 20, 7);
    assert!(bench.unpack(&huge).unwrap_err().to_string().contains("more than"));
}

#[test]
fn a_layer_must_have_its_diff_id() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let blob = bench.store.blob_put(&archive(&[("a", b'0', "1")])).unwrap();
    let wrong = Digest::of(b"something else");
    assert!(matches!(bench.store.ensure_layer(&wrong, &blob), Err(Error::DigestMismatch { .. })));
    assert_eq!(fs::read_dir(bench.store.root().join("layers")).unwrap().count(), 0);
}

/// Whatever is done to an archive, it is unpacked or refused; nothing outside the layer changes.
#[test]
fn damaged_archives_are_harmless() {
    use proptest::prelude::*;
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let whole = archive(&[
        ("d/", b'5', ""),
        ("d/l", b'2', "/tmp"),
        ("d/f", b'0', "text"),
        ("h", b'1', "d/f"),
        (".wh.x", b'0', ""),
    ]);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig { cases: 64, ..ProptestConfig::default() });
    let strategy = proptest::collection::vec((0..whole.len(), any::<u8>()), 1..6);
    runner
        .run(&strategy, |changes| {
            let mut bytes = whole.clone();
            for (position, value) in changes {
                bytes[position] = value;
                let start = position / 512 * 512;
                let block: [u8; 512] = bytes[start..start + 512].try_into().unwrap();
                let sum: u32 = block
                    .iter()
                    .enumerate()
                    .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) })
                    .sum();
                if position % 512 < 148 || position % 512 >= 156 {
                    bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
            let _ = bench.unpack(&bytes);
            Ok(())
        })
        .unwrap();
    assert_eq!(fs::read_dir(bench.store.root().join("tmp")).unwrap().count(), 0);
}

/// What layers of other builders carry besides names and contents.
#[test]
fn attributes_holes_and_large_ids() {
    use crate::build::layer::Item;
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let mut writer = bench.store.layer_writer(None).unwrap();
    // CAP_NET_BIND_SERVICE, permitted and effective (version 2).
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    let file =
        |path: &str| Item { path: path.into(), kind: b'0', mode: 0o4755, mtime: 1_000_000_007, ..Item::default() };
    let attributes = vec![
        (b"security.capability".to_vec(), capability.clone()),
        (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec()),
        (b"user.mime".to_vec(), b"text/plain".to_vec()),
    ];
    writer.add(&Item { xattrs: attributes, ..file("program") }, &[][..]).unwrap();
    writer.add(&Item { uid: 65_535, gid: 65_536, ..file("edge") }, &[][..]).unwrap();
    writer.add(&Item { uid: 3_000_000_000, gid: 12, ..file("huge") }, &[][..]).unwrap();
    let mut content = vec![0u8; 16 << 20];
    content[9 << 20] = 7;
    writer.add(&Item { size: content.len() as u64, ..file("holes") }, &content[..]).unwrap();
    let link = Item { kind: b'1', link: b"holes".to_vec(), ..file("linked") };
    writer.add(&link, &[][..]).unwrap();
    let (layer, diff_id) = writer.finish().unwrap();
    bench.store.ensure_layer(&diff_id, &layer.digest).unwrap();
    let fs = bench.store.layer_dir(&diff_id).join("fs");
    let attribute = |name: &str| {
        let mut value = vec![0u8; 64];
        let length = rustix::fs::getxattr(fs.join("program"), name, &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    };
    assert_eq!(attribute("security.capability"), Some(capability));
    assert_eq!(attribute("user.mime").as_deref(), Some(&b"text/plain"[..]));
    assert_eq!(attribute("trusted.overlay.redirect"), None);
    let of = |name: &str| fs::metadata(fs.join(name)).unwrap();
    assert_eq!((of("program").mode() & 0o7777, of("program").mtime()), (0o4755, 1_000_000_007));
    assert_eq!((of("edge").uid(), of("edge").gid()), (65_535, 65_534), "what a pod's range cannot hold is nobody's");
    assert_eq!((of("huge").uid(), of("huge").gid()), (65_534, 12));
    assert_eq!(fs::read(fs.join("holes")).unwrap(), content);
    assert!(of("holes").blocks() * 512 < 1 << 20, "the holes were filled");
    assert_eq!(of("linked").ino(), of("holes").ino());
}
