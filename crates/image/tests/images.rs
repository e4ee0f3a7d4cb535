//! The store from outside: real files in, what a pod needs out.

use image::{Digest, Error, GcOptions, ImportOptions, Kind, KindName, Platform, Store, silent};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
}

fn bench() -> Option<Bench> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: owners and whiteouts need root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("images")).unwrap();
    Some(Bench { dir, store })
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A root file system with the system's `tar`.
    fn rootfs(&self, name: &str, files: &[(&str, &str)], flags: &str) -> PathBuf {
        let root = self.path(&format!("{name}.d"));
        for (file, content) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match content.strip_prefix("-> ") {
                Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
                None => fs::write(path, content).unwrap(),
            }
        }
        let file = self.path(name);
        let done = Command::new("tar").arg("-C").arg(&root).args([flags, "-cf"]).arg(&file).arg(".").status().unwrap();
        assert!(done.success());
        file
    }

    fn import(&self, path: &Path, tag: &str) -> image::Imported {
        self.store.import(path, &ImportOptions { tag: Some(tag.into()), ..Default::default() }, &silent).unwrap()
    }
}

fn now() -> GcOptions {
    GcOptions { grace: Duration::ZERO, untagged: Duration::ZERO, unfinished: Duration::ZERO, ..GcOptions::default() }
}

#[test]
fn a_root_file_system_becomes_an_image() {
    let Some(bench) = bench() else { return };
    let tar = bench.rootfs("base.tar.gz", &[("bin/hello", "#!/bin/sh\n"), ("etc/os-release", "ID=x")], "-z");
    let options = ImportOptions {
        tag: Some("shop/base:1".into()),
        cmd: vec!["/bin/hello".into()],
        env: vec!["A=b".into()],
        user: Some("1000:1000".into()),
        workdir: Some("/srv".into()),
        ..Default::default()
    };
    let imported = bench.store.import(&tar, &options, &silent).unwrap();
    assert_eq!((imported.names, imported.kind), (vec!["shop/base:1".to_owned()], KindName::Container));
    for name in [
        "shop/base:1".to_owned(),
        "127.0.0.1:5000/shop/base:1".into(),
        imported.digest.to_string(),
        imported.digest.hex()[..12].into(),
        format!("shop/base@{}", imported.digest),
    ] {
        let resolved = bench.store.resolve(&name).unwrap();
        assert_eq!(resolved.digest, imported.digest, "{name}");
        let Kind::Container { config, layers } = resolved.kind else { panic!("not a container image") };
        assert_eq!(config.config.cmd, ["/bin/hello"]);
        assert!(config.config.env.contains(&"A=b".to_owned()));
        assert_eq!((config.config.user.as_str(), config.config.working_dir.as_str()), ("1000:1000", "/srv"));
        assert_eq!(fs::read(layers[0].join("etc/os-release")).unwrap(), b"ID=x");
    }
    let error = bench.store.resolve("ngnix").unwrap_err().to_string();
    assert_eq!(error, r#"image "ngnix": no such image here; atoll image ls shows what there is"#);
    let wrong = ImportOptions { env: vec!["A".into()], ..options };
    assert!(bench.store.import(&tar, &wrong, &silent).unwrap_err().to_string().contains("NAME=value"));
}

/// An OVA of one disk, or an empty one besides; `sums` makes its list of checksums of the description's and the disk's.
fn ova(bench: &Bench, name: &str, change: &dyn Fn(String) -> String, sums: &dyn Fn(&str, &str) -> String) -> PathBuf {
    use sha2::Digest as _;
    let dir = bench.path(name);
    fs::create_dir(&dir).unwrap();
    // A fixed VHD: a disk and its footer (Microsoft's "Virtual Hard Disk Image Format Specification").
    let disk = [&[0x5a; 4096][..], &vhd_footer(4096)].concat();
    let item = |inner: &str| format!("<Item>{inner}</Item>");
    let description = format!(
        r#"<Envelope xmlns:ovf="o"><References><File ovf:id="f" ovf:href="d.vhd" ovf:size="{}"/></References>
           <DiskSection><Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="4096"/><Disk ovf:diskId="e" ovf:capacity="1048576"/>
           </DiskSection><VirtualSystem ovf:id="m"><VirtualHardwareSection>{}{}{}</VirtualHardwareSection></VirtualSystem></Envelope>"#,
        disk.len(),
        item("<ResourceType>4</ResourceType><VirtualQuantity>64</VirtualQuantity>"),
        item("<ResourceType>17</ResourceType><HostResource>/disk/d</HostResource>"),
        item("<ResourceType>17</ResourceType><HostResource>/disk/e</HostResource>"),
    );
    let description = change(description);
    let hex = |bytes: &[u8]| sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    fs::write(dir.join("m.ovf"), &description).unwrap();
    fs::write(dir.join("m.mf"), sums(&hex(description.as_bytes()), &hex(&disk))).unwrap();
    fs::write(dir.join("d.vhd"), disk).unwrap();
    let file = bench.path(&format!("{name}.ova"));
    let made = Command::new("tar").arg("-C").arg(&dir).arg("-cf").arg(&file).args(["m.ovf", "m.mf", "d.vhd"]).status();
    assert!(made.unwrap().success());
    file
}

fn vhd_footer(size: u64) -> Vec<u8> {
    let mut footer = vec![0u8; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[11] = 2;
    footer[12..16].copy_from_slice(&[0, 1, 0, 0]);
    footer[16..24].fill(0xff);
    footer[40..48].copy_from_slice(&size.to_be_bytes());
    footer[48..56].copy_from_slice(&size.to_be_bytes());
    footer[63] = 2;
    let sum = !footer.iter().map(|b| u32::from(*b)).sum::<u32>();
    footer[64..68].copy_from_slice(&sum.to_be_bytes());
    footer
}

#[test]
fn an_ova_is_its_disks_and_a_description() {
    let Some(bench) = bench() else { return };
    let sums = |ovf: &str, disk: &str| format!("SHA256(m.ovf)= {ovf}\nSHA256 (d.vhd) = {}\n", disk.to_uppercase());
    let good = ova(&bench, "good", &|text| text, &sums);
    let options = ImportOptions { tag: Some("shop/db:1".into()), ..Default::default() };
    let imported = bench.store.import(&good, &options, &silent).unwrap();
    assert_eq!(imported.names, ["shop/db:1"]);
    let machine = imported.machine.unwrap();
    assert_eq!((machine.name.as_str(), machine.memory, machine.disks.len()), ("m", 64 << 20, 2));
    assert_eq!(machine.disks[0].image.as_deref(), Some("shop/db:1"));
    assert_eq!((machine.disks[1].image.as_deref(), machine.disks[1].capacity), (None, 1 << 20));
    let Kind::Disk(disk) = bench.store.resolve("shop/db:1").unwrap().kind else { panic!("no disk") };
    assert_eq!((disk.format.as_str(), disk.virtual_size), ("qcow2", 4096));

    let refused = |name: &str, change: &dyn Fn(String) -> String, sums: &dyn Fn(&str, &str) -> String| {
        let options = ImportOptions { tag: Some(format!("bad/{name}:1")), ..Default::default() };
        let error = bench.store.import(&ova(&bench, name, change, sums), &options, &silent).unwrap_err().chain();
        assert!(bench.store.resolve(&format!("bad/{name}:1")).is_err(), "{name} left an image");
        assert_eq!(fs::read_dir(bench.store.root().join("tmp")).unwrap().count(), 0, "{name}");
        error
    };
    let as_is = |text: String| text;
    let error =
        refused("damaged", &as_is, &|ovf, _| format!("SHA256(m.ovf)= {ovf}\nSHA256(d.vhd)= {}", "00".repeat(32)));
    assert!(error.contains(r#""d.vhd" is not what its checksum says"#), "{error}");
    let error = refused("unlisted", &as_is, &|ovf, _| format!("SHA256(m.ovf)= {ovf}"));
    assert!(error.contains(r#""d.vhd" is not in its list of checksums"#), "{error}");
    let error = refused("changed", &as_is, &|_, disk| format!("SHA256(m.ovf)= {disk}\nSHA256(d.vhd)= {disk}"));
    assert!(error.contains(r#""m.ovf" is not what its checksum says"#), "{error}");
    let error = refused("unclear", &as_is, &|_, _| "MD5(m.ovf)= 00".into());
    assert!(error.contains("no line of a list of checksums"), "{error}");
    let error = refused("missing", &|text| text.replace("d.vhd", "../d.vhd"), &sums);
    assert!(error.contains("described but is not in it"), "{error}");
    let error = refused("size", &|text| text.replace("4608", "4609"), &sums);
    assert!(error.contains("of 4608 bytes, not of 4609"), "{error}");
    let error = refused("strange", &|text| text.replace("d.vhd", "m.mf").replace("4608", "200000"), &sums);
    assert!(error.contains("m.mf"), "{error}");
    let error = refused("not", &|_| "<Envelope/>".into(), &sums);
    assert!(error.contains("m.ovf: it describes no machine"), "{error}");
}

#[test]
fn an_image_travels_as_a_layout() {
    let Some(bench) = bench() else { return };
    let tar = bench.rootfs("base.tar", &[("a", "1")], "--sort=name");
    let imported = bench.import(&tar, "base:1");
    let file = bench.path("base.oci.tar");
    assert_eq!(bench.store.export("base:1", &file, &silent).unwrap(), imported.digest);

    let other = Store::open(bench.path("other")).unwrap();
    let again = other.import(&file, &ImportOptions::default(), &silent).unwrap();
    assert_eq!((again.names, again.digest), (vec!["base:1".to_owned()], imported.digest));
    other.resolve("base:1").unwrap();

    let unpacked = bench.path("layout");
    fs::create_dir(&unpacked).unwrap();
    assert!(Command::new("tar").arg("-C").arg(&unpacked).arg("-xf").arg(&file).status().unwrap().success());
    let third = Store::open(bench.path("third")).unwrap();
    assert_eq!(third.import(&unpacked, &ImportOptions::default(), &silent).unwrap().digest, imported.digest);

    // One byte changed in any blob is found.
    for blob in fs::read_dir(unpacked.join("blobs/sha256")).unwrap().flatten() {
        let good = fs::read(blob.path()).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::set_permissions(blob.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        fs::write(blob.path(), bad).unwrap();
        let fourth = Store::open(bench.path(&format!("fourth-{middle}"))).unwrap();
        let error = fourth.import(&unpacked, &ImportOptions::default(), &silent).unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
        assert!(fourth.list().unwrap().is_empty());
        fs::write(blob.path(), good).unwrap();
    }
}

#[test]
fn an_image_of_another_machine_is_refused_by_name() {
    let Some(bench) = bench() else { return };
    let tar = bench.rootfs("base.tar", &[("a", "1")], "-p");
    let platform = Some(Platform::parse("linux/s390x").unwrap());
    let options = ImportOptions { tag: Some("alien".into()), platform, ..Default::default() };
    bench.store.import(&tar, &options, &silent).unwrap();
    let error = bench.store.resolve("alien").unwrap_err().to_string();
    assert!(
        error.contains("not for linux/amd64") && error.contains("linux/s390x") || !cfg!(target_arch = "x86_64"),
        "{error}"
    );
}

#[test]
fn components_and_disks() {
    let Some(bench) = bench() else { return };
    let component = bench.path("price.wasm");
    fs::write(&component, b"\0asm\x0d\0\x01\0").unwrap();
    let imported = bench.import(&component, "shop/price:1");
    assert_eq!(imported.kind, KindName::Component);
    let Kind::Component { path, digest } = bench.store.resolve("shop/price:1").unwrap().kind else { panic!() };
    assert_eq!(Digest::of(&fs::read(path).unwrap()), digest);
    fs::write(&component, b"\0asm\x01\0\0\0").unwrap();
    let error = bench.store.import(&component, &ImportOptions::default(), &silent).unwrap_err().to_string();
    assert!(error.contains("core WebAssembly module"), "{error}");

    let disk = bench.path("debian.img");
    let file = fs::File::create(&disk).unwrap();
    file.set_len(300 << 20).unwrap();
    assert_eq!(bench.store.import(&disk, &ImportOptions::default(), &silent).unwrap().names, ["debian:latest"]);
    let Kind::Disk(image) = bench.store.resolve("debian").unwrap().kind else { panic!() };
    assert_eq!((image.format.as_str(), image.virtual_size), ("raw", 300 << 20));
    assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image.path).unwrap()) < 1000, "holes were filled");

    let mut qcow2 = vec![0u8; 104];
    qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    qcow2[23] = 16;
    qcow2[28] = 1;
    let disk = bench.path("small.qcow2");
    fs::write(&disk, &qcow2).unwrap();
    bench.import(&disk, "small");
    let found = bench.store.disk_image("small", None).unwrap();
    assert_eq!((found.format.as_str(), found.virtual_size), ("qcow2", 1 << 24));
    qcow2[15] = 200;
    fs::write(&disk, &qcow2).unwrap();
    let error = bench.store.import(&disk, &ImportOptions::default(), &silent).unwrap_err().to_string();
    assert!(error.contains("backing file"), "{error}");
}

#[test]
fn files_are_found_as_a_container_would_see_them() {
    let Some(bench) = bench() else { return };
    let tar = bench.rootfs(
        "vm.tar",
        &[
            ("boot/vmlinuz-6.1", "kernel"),
            ("vmlinuz", "-> /boot/vmlinuz-6.1"),
            ("up", "-> ../../../../boot"),
            ("loop", "-> loop"),
            ("escape", "-> /etc/passwd"),
            ("disk/root.img", "0123456789"),
        ],
        "-p",
    );
    bench.import(&tar, "vm");
    let file = |path: &str| bench.store.file_in_image("vm", path).map(|p| fs::read_to_string(p).unwrap());
    assert_eq!(file("/boot/vmlinuz-6.1").unwrap(), "kernel");
    assert_eq!(file("vmlinuz").unwrap(), "kernel");
    assert_eq!(file("/up/vmlinuz-6.1").unwrap(), "kernel");
    assert_eq!(file("/../../boot/../vmlinuz").unwrap(), "kernel");
    for bad in ["/loop", "/escape", "/boot", "/nothing", "/etc/passwd", "/vmlinuz/x"] {
        assert!(matches!(file(bad), Err(Error::NoFile { .. })), "{bad}");
    }
    let disk = bench.store.disk_image("vm", None).unwrap();
    assert_eq!((disk.format.as_str(), disk.virtual_size), ("raw", 512));
}

#[test]
fn removed_images_become_garbage_unless_pinned() {
    let Some(bench) = bench() else { return };
    let store = &bench.store;
    let one = bench.import(&bench.rootfs("one.tar", &[("a", "1")], "-p"), "one");
    bench.import(&bench.rootfs("two.tar", &[("b", "2")], "-p"), "two");
    store.tag("one", "uno:x").unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    assert_eq!(store.gc(&now()).unwrap().blobs, 0);

    assert_eq!(store.remove("one").unwrap().deleted, None);
    store.resolve("uno:x").unwrap();
    store.pin("pod-1", &one.digest).unwrap();
    assert_eq!(store.remove(&one.digest.hex()[..10]).unwrap().untagged, ["uno:x"]);
    assert!(matches!(store.resolve("uno:x"), Err(Error::NotFound(_))));
    assert_eq!(store.gc(&now()).unwrap().layers, 0, "a pinned image was taken");
    store.unpin("pod-1").unwrap();
    let young = GcOptions { grace: Duration::from_secs(3600), ..now() };
    assert_eq!(store.gc(&young).unwrap().blobs, 0, "the grace was not kept");
    let report = store.gc(&now()).unwrap();
    assert_eq!((report.blobs, report.layers), (3, 1));
    store.resolve("two").unwrap();
    assert_eq!(fs::read_dir(store.root().join("layers")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn what_a_crash_left_is_collected() {
    let Some(bench) = bench() else { return };
    for name in ["tmp/dead", "uploads/0123", "partial/ff"] {
        fs::write(bench.store.root().join(name), "x").unwrap();
    }
    fs::create_dir_all(bench.store.root().join("tmp/dir/fs/deep")).unwrap();
    let upload = bench.store.upload_new().unwrap();
    assert_eq!(bench.store.gc(&now()).unwrap().unfinished, 4, "and the living upload stays");
    assert_eq!(bench.store.upload_length(upload.id()).unwrap(), 0);
}

#[test]
fn nonsense_is_told_apart() {
    let Some(bench) = bench() else { return };
    let refused = |name: &str, content: &[u8]| {
        let path = bench.path(name);
        fs::write(&path, content).unwrap();
        bench.store.import(&path, &ImportOptions::default(), &silent).unwrap_err().to_string()
    };
    assert!(refused("a.txt", b"hello").contains("it is not a tar archive"));
    assert!(refused("a.tar.xz", b"\xfd7zXZ\0\0\0").contains("xz -d"));
    assert!(refused("empty.img", b"").contains("empty"));
    let tar = fs::read(bench.rootfs("whole.tar", &[("a", "1")], "-p")).unwrap();
    let cut = refused("cut.tar", &tar[..1024]);
    assert!(cut.contains("truncated"), "{cut}");
    assert!(bench.store.import(&bench.path("absent"), &ImportOptions::default(), &silent).is_err());
    assert!(bench.store.list().unwrap().is_empty());
    assert!(fs::read_dir(bench.store.root().join("tmp")).unwrap().count() == 0);
}
