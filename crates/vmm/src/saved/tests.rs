use super::*;

fn disks(dir: &Path) -> Vec<Source> {
    let base = dir.join("image");
    fs::write(&base, vec![7u8; 100_000]).unwrap();
    let overlay = dir.join("overlay");
    let file = File::create(&overlay).unwrap();
    file.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"written", 4 << 20).unwrap();
    vec![
        Source { name: "root".into(), format: DiskFormat::Raw, base: base.clone(), overlay: Some(overlay) },
        Source { name: "more".into(), format: DiskFormat::Raw, base, overlay: Some(dir.join("none")) },
    ]
}

fn order(disks: Vec<Source>) -> Order<'static> {
    Order { owner: "ns", run_dir: None, memory: false, disks, room: 1 << 30 }
}

#[test]
fn disks_come_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("snapshots/s");
    let taken = take(&order(disks(dir.path())), &to).unwrap();
    fs::write(dir.path().join("overlay"), b"changed").unwrap();
    let saved = open(&to, "ns").unwrap();
    assert_eq!(saved, taken);
    saved.verify(&to, true).unwrap();
    let overlay = fs::read(to.join(&saved.disks[0].overlay.as_ref().unwrap().name)).unwrap();
    assert_eq!((overlay.len(), &overlay[4 << 20..(4 << 20) + 7]), (8 << 20, &b"written"[..]));
    assert!(allocated(&to.join("disk0.qcow2")) < 1 << 20, "holes stay holes");
    assert!(saved.disks[1].overlay.is_none() && saved.restore(&to).is_none());
    assert_eq!(fs::metadata(to.join("disk0.base")).unwrap().nlink(), 3);
    assert!(usage(to.parent().unwrap()) < 1 << 20, "images are not counted as long as the store has them");
    assert!(open(&to, "other").unwrap_err().to_string().contains("belongs to ns"));
}

#[test]
fn what_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("snapshots");
    let none = Order { run_dir: Some(dir.path()), ..order(disks(dir.path())) };
    assert!(matches!(take(&none, &root.join("s")), Err(Error::NotRunning)));
    let small = Order { room: 1, ..order(disks(dir.path())) };
    let why = take(&small, &root.join("s")).unwrap_err().to_string();
    assert!(why.contains("--snapshot-space"), "{why}");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    fs::create_dir(root.join(".new-x")).unwrap();
    fs::write(root.join(".new-x/memory"), b"half").unwrap();
    sweep(&root).unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    sweep(&dir.path().join("nothing")).unwrap();
}

#[test]
fn what_changed_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("s");
    let saved = take(&order(disks(dir.path())), &to).unwrap();
    let overlay = to.join("disk0.qcow2");
    let mut bytes = fs::read(&overlay).unwrap();
    bytes[5 << 20] ^= 1;
    fs::write(&overlay, &bytes).unwrap();
    assert!(saved.verify(&to, false).unwrap_err().to_string().contains("checksum differs"));
    fs::write(&overlay, b"short").unwrap();
    assert!(open(&to, "ns").unwrap_err().to_string().contains("5 bytes long"));
    let good = encode(&saved).unwrap();
    for at in 0..good.len() {
        let mut flipped = good.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(decode(&flipped).is_err(), "byte {at}");
        assert!(decode(&good[..at]).is_err(), "cut at {at}");
    }
    let mut newer = good;
    newer[8] = 9;
    assert!(decode(&newer).unwrap_err().contains("version 9"));
    let mut outside = saved;
    outside.disks[0].base.name = "../image".into();
    assert!(decode(&encode(&outside).unwrap()).unwrap_err().contains("outside itself"));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = decode(&bytes);
    }
}
