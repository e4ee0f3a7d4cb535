use super::*;

fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; 0x300];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes
}

fn module(depends: &str) -> Vec<u8> {
    [b"\x7fELF....\0license=GPL\0depends=".as_slice(), depends.as_bytes(), b"\0name=x\0"].concat()
}

/// deb(5), as `dpkg-deb` writes it.
fn package(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = crate::tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        tar.file(name, bytes.len() as u64, bytes.as_slice()).expect("added");
    }
    let tar = tar.finish().expect("finished");
    let mut out = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".to_vec()), ("control.tar", vec![0; 3]), ("data.tar", tar)] {
        out.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, content.len()).bytes());
        out.extend(&content);
        if content.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

#[test]
fn a_package_gives_a_kernel_with_its_modules_in_order() {
    let data = tempfile::tempdir().expect("directory");
    let kernels = Kernels::new(data.path(), None);
    let deb = data.path().join("linux.deb");
    let files = [
        ("./boot/vmlinuz-6.1.0-x", bzimage()),
        ("./lib/modules/6.1.0-x/kernel/fs/erofs/erofs.ko", module("libcrc32c")),
        ("./lib/modules/6.1.0-x/kernel/lib/libcrc32c.ko", module("")),
        ("./lib/modules/6.1.0-x/kernel/drivers/virtio/virtio_pci.ko", module("virtio,virtio_ring")),
        ("./lib/modules/6.1.0-x/kernel/drivers/virtio/virtio.ko", module("")),
        ("./lib/modules/6.1.0-x/kernel/drivers/virtio/virtio_ring.ko", module("virtio")),
        ("./lib/modules/6.1.0-x/kernel/sound/noise.ko", module("")),
    ];
    std::fs::write(&deb, package(&files)).expect("written");
    let kernel = kernels.add_deb(None, &deb).expect("added");
    assert_eq!(kernel.name, "6.1.0-x");
    assert!(kernel.default);
    assert_eq!(kernel.modules, ["virtio", "virtio_ring", "virtio_pci", "libcrc32c", "erofs"]);
    assert_eq!(kernel.module_files().expect("read")[0], ("virtio.ko".to_owned(), module("")));
    let again = kernels.add_deb(None, &deb).expect_err("refused").to_string();
    assert!(again.contains("atoll kernel rm 6.1.0-x"), "{again}");
    kernels.add_deb(Some("other"), &deb).expect("added");
    kernels.set_default("other").expect("set");
    kernels.remove("other").expect("removed");
    assert_eq!(kernels.default_one().expect("read"), None);
    kernels.remove("6.1.0-x").expect("removed");
    assert!(kernels.list().expect("read").is_empty());
}

#[test]
fn what_is_no_package_or_kernel_is_refused_and_leaves_nothing() {
    let data = tempfile::tempdir().expect("directory");
    let kernels = Kernels::new(data.path(), None);
    let deb = data.path().join("bad.deb");
    let cases: [(Vec<u8>, &str); 6] = [
        (Vec::new(), "is no Debian package"),
        (b"!<arch>\n".to_vec(), "no data.tar"),
        (package(&[("./usr/share/doc/x", vec![1])]), "boot/vmlinuz"),
        (package(&[("./boot/vmlinuz-1", vec![0; 0x300])]), "no Linux kernel"),
        (package(&[("./boot/vmlinuz-..", bzimage())]), "name"),
        (package(&[("./boot/vmlinuz-1", bzimage()), ("./lib/modules/erofs.ko", vec![1; 9])]), "no kernel module"),
    ];
    for (bytes, why) in cases {
        std::fs::write(&deb, bytes).expect("written");
        let said = kernels.add_deb(None, &deb).expect_err("refused").to_string();
        assert!(said.contains(why), "{said}");
        let left: Vec<_> = std::fs::read_dir(data.path().join("kernels")).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    for name in ["", "..", "a/b", "default", ".x"] {
        assert!(kernels.remove(name).is_err(), "{name}");
    }
}

#[test]
fn files_are_taken_by_their_names() {
    let data = tempfile::tempdir().expect("directory");
    let kernels = Kernels::new(data.path(), None);
    let (kernel, erofs) = (data.path().join("vmlinuz-1.2"), data.path().join("erofs.ko"));
    std::fs::write(&kernel, bzimage()).expect("written");
    std::fs::write(&erofs, module("")).expect("written");
    let added = kernels.add_files(None, &[erofs.clone(), kernel.clone()]).expect("added");
    assert_eq!((added.name.as_str(), added.modules), ("1.2", vec!["erofs".to_owned()]));
    assert!(kernels.add_files(None, &[erofs]).is_err());
    assert!(kernels.add_files(Some("x"), &[kernel.clone(), kernel]).is_err());
}
