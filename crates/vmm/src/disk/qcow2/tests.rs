use super::*;
use crate::disk::raw::Raw;
use crate::kvm::memory;
use vm_memory::{Bytes, GuestAddress};

fn rw(path: &std::path::Path) -> File {
    std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// An overlay of `size` over a base whose byte at n is n / 512.
fn overlay(dir: &std::path::Path, size: u64, base: u64) -> (std::path::PathBuf, Vec<u8>) {
    let (path, below) = (dir.join("over.qcow2"), dir.join("base"));
    let content: Vec<u8> = (0..base).map(|n| (n / 512 + 1) as u8).collect();
    std::fs::write(&below, &content).unwrap();
    crate::qcow2::create_overlay(&path, size, rustix::process::getuid().as_raw()).unwrap();
    let mut model = content;
    model.resize(size as usize, 0);
    (path, model)
}

fn open(dir: &std::path::Path) -> Qcow2 {
    let base = Raw::open(File::open(dir.join("base")).unwrap()).unwrap();
    Qcow2::open(rw(&dir.join("over.qcow2")), Some(Box::new(base)), true).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Read(u64, u64),
    Reopen,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    let range = || (0u64..2040, 1u64..300).prop_map(|(at, n)| (at * 512, n.min(2048 - at) * 512));
    prop_oneof![
        (range(), any::<u8>()).prop_map(|((at, n), byte)| Step::Write(at, n, byte)),
        range().prop_map(|(at, n)| Step::Zero(at, n)),
        range().prop_map(|(at, n)| Step::Read(at, n)),
        Just(Step::Reopen),
    ]
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]
    #[test]
    fn it_is_what_was_written_over_the_base(steps in proptest::collection::vec(step(), 1..24)) {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut model) = overlay(dir.path(), 1 << 20, 700 << 10);
        let memory = memory::allocate(1 << 20).unwrap();
        let mut disk = open(dir.path());
        for step in steps {
            match step {
                Step::Write(at, n, byte) => {
                    memory.write_slice(&vec![byte; n as usize], GuestAddress(0)).unwrap();
                    // in two pieces that meet inside a sector
                    let segments = [
                        Segment { address: GuestAddress(0), len: 100 },
                        Segment { address: GuestAddress(100), len: n as u32 - 100 },
                    ];
                    disk.write(&memory, &segments, at).unwrap();
                    model[at as usize..(at + n) as usize].fill(byte);
                }
                Step::Zero(at, n) => {
                    disk.zero(at, n, true).unwrap();
                    model[at as usize..(at + n) as usize].fill(0);
                }
                Step::Read(at, n) => {
                    disk.read(&memory, &[Segment { address: GuestAddress(0), len: n as u32 }], at).unwrap();
                    let mut got = vec![0u8; n as usize];
                    memory.read_slice(&mut got, GuestAddress(0)).unwrap();
                    proptest::prop_assert!(got == model[at as usize..(at + n) as usize]);
                }
                Step::Reopen => {
                    drop(disk);
                    disk = open(dir.path());
                }
            }
        }
        let mut got = vec![0u8; model.len()];
        disk.read_bytes(&mut got, 0).unwrap();
        proptest::prop_assert!(got == model);
        drop(disk);
        check(&path);
    }

    #[test]
    fn no_image_makes_it_panic(at in 0usize..512, bytes in proptest::collection::vec(proptest::num::u8::ANY, 1..64), deep: bool) {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = overlay(dir.path(), 1 << 20, 1 << 10);
        {
            let memory = memory::allocate(1 << 16).unwrap();
            let mut disk = open(dir.path());
            disk.write(&memory, &[Segment { address: GuestAddress(0), len: 512 }], 0).unwrap();
        }
        let mut image = std::fs::read(&path).unwrap();
        // the header, or the tables
        let at = if deep { at + (3 << 16) * (at % 2) + (5 << 16) * (at % 3 % 2) } else { at };
        for (n, byte) in bytes.iter().enumerate() {
            if let Some(to) = image.get_mut(at + n) {
                *to = *byte;
            }
        }
        std::fs::write(&path, &image).unwrap();
        if let Ok(mut disk) = Qcow2::open(rw(&path), None, true) {
            let memory = memory::allocate(1 << 16).unwrap();
            let segments = [Segment { address: GuestAddress(0), len: 512 }];
            for at in [0, 512, 1 << 19] {
                let _ = disk.read(&memory, &segments, at);
                let _ = disk.write(&memory, &segments, at);
                let _ = disk.zero(at, 512, true);
            }
        }
    }
}

/// QEMU's own judgement, where it is installed.
fn check(path: &std::path::Path) {
    if let Ok(output) = std::process::Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path).output() {
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn compressed_images_of_qemu_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, packed) = (dir.path().join("raw"), dir.path().join("packed.qcow2"));
    let content: Vec<u8> = (0..300u32 << 10).map(|n| (n / 1000) as u8).collect();
    std::fs::write(&raw, &content).unwrap();
    let done =
        std::process::Command::new("qemu-img").args(["convert", "-c", "-O", "qcow2"]).args([&raw, &packed]).status();
    if !done.is_ok_and(|s| s.success()) {
        println!("SKIPPED: needs qemu-img");
        return;
    }
    let mut disk = Qcow2::open(File::open(&packed).unwrap(), None, false).unwrap();
    let mut got = vec![0u8; content.len()];
    disk.read_bytes(&mut got, 0).unwrap();
    assert!(got == content);
    assert!(disk.zero(0, 512, true).is_err(), "opened to be read");
}
