use super::*;
use std::process::Command;

const QEMU_IMG: &str = "/usr/bin/qemu-img";

fn qemu_img(args: &[&str]) {
    let output = Command::new(QEMU_IMG).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// 40 MiB with something at the beginning, in the middle, across blocks, and at the end.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0u8; 40 << 20];
    for (at, length, seed) in
        [(0, 5000, 1u32), (2 << 20, 70_000, 2), ((33 << 20) - 300, 999, 3), ((40 << 20) - 512, 512, 4)]
    {
        let mut state = seed;
        for byte in &mut bytes[at..at + length] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
    }
    bytes
}

const CASES: [(&str, &[&str], Format); 6] = [
    ("vmdk", &[], Format::Vmdk),
    ("vmdk", &["-o", "subformat=streamOptimized"], Format::Vmdk),
    ("vpc", &["-o", "force_size=on"], Format::Vhd),
    ("vpc", &["-o", "subformat=fixed,force_size=on"], Format::Vhd),
    ("vhdx", &[], Format::Vhdx),
    ("vhdx", &["-o", "block_size=1M"], Format::Vhdx),
];

fn made(dir: &Path, case: usize) -> std::path::PathBuf {
    let (format, options, _) = CASES[case];
    let (raw, path) = (dir.join("raw"), dir.join(format!("disk{case}")));
    std::fs::write(&raw, disk()).unwrap();
    let (from, to) = (raw.to_string_lossy().into_owned(), path.to_string_lossy().into_owned());
    qemu_img(&[&["convert", "-f", "raw", "-O", format], options, &[&from, &to]].concat());
    path
}

#[test]
fn what_qemu_wrote_is_read_and_what_is_written_qemu_reads() {
    if !Path::new(QEMU_IMG).exists() {
        println!("SKIPPED: {QEMU_IMG} is not here; apt-get install qemu-utils");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (case, (name, options, format)) in CASES.iter().enumerate() {
        let path = made(dir.path(), case);
        let file = File::open(&path).unwrap();
        let mut head = vec![0; 512];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(detect(&file, &head), Some(*format), "{name} {options:?}");
        let (to, back) = (dir.path().join("to.qcow2"), dir.path().join("back"));
        convert(&file, *format, &path, File::create(&to).unwrap(), &crate::store::silent).unwrap();
        let (to, back_name) = (to.to_string_lossy().into_owned(), back.to_string_lossy().into_owned());
        qemu_img(&["check", "-f", "qcow2", &to]);
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &to, &back_name]);
        assert!(std::fs::read(&back).unwrap() == disk(), "{name} {options:?}");
        let size = std::fs::metadata(&to).unwrap().len();
        assert!(size < 2 << 20, "{name} {options:?}: zeros take no room: {size}");
    }
}

#[test]
fn what_is_cut_off_or_needs_other_files_is_refused_with_the_reason() {
    if !Path::new(QEMU_IMG).exists() {
        println!("SKIPPED: {QEMU_IMG} is not here; apt-get install qemu-utils");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, format: Format| {
        let to = File::create(dir.path().join("to")).unwrap();
        let error = convert(&File::open(path).unwrap(), format, path, to, &crate::store::silent);
        error.err().map_or_else(|| "taken".to_owned(), |error| error.chain())
    };
    for (case, (name, options, format)) in CASES.iter().enumerate() {
        let path = made(dir.path(), case);
        let whole = std::fs::read(&path).unwrap();
        // What is only zeros at the end, and belongs to nothing, may be missing.
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        for length in [0, 511, 512, 4096, used / 2, used - 600] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let why = refused(&path, *format);
            assert!(
                why.contains("disk: ") || why.contains("beyond its end") || why.contains("cut off"),
                "{name} {options:?} cut at {length}: {why}"
            );
        }
    }
    let base = made(dir.path(), 0).to_string_lossy().into_owned();
    let child = dir.path().join("child");
    qemu_img(&["create", "-f", "vmdk", "-b", &base, "-F", "vmdk", &child.to_string_lossy()]);
    assert!(refused(&child, Format::Vmdk).contains("has a parent"));
    let flat = dir.path().join("flat.vmdk");
    qemu_img(&["create", "-f", "vmdk", "-o", "subformat=monolithicFlat", &flat.to_string_lossy(), "1M"]);
    let why = refused(&flat, Format::Vmdk);
    assert!(why.contains("description of other files"), "{why}");
}

/// One place for all blocks of a large disk: a small file would become a large one.
#[test]
fn blocks_that_share_a_place_are_refused() {
    let mut header = vec![0u8; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[16..24].copy_from_slice(&1536u64.to_be_bytes());
    header[28..32].copy_from_slice(&1024u32.to_be_bytes());
    header[32..36].copy_from_slice(&(2u32 << 20).to_be_bytes());
    let mut footer = vec![0u8; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[16..24].copy_from_slice(&512u64.to_be_bytes());
    footer[48..56].copy_from_slice(&(2u64 << 30).to_be_bytes());
    footer[60..64].copy_from_slice(&3u32.to_be_bytes());
    for (bytes, at) in [(&mut header, 36), (&mut footer, 64)] {
        let sum: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
    let table = [0u8, 0, 0, 11].repeat(1024);
    let mut data = vec![b'x'; (2 << 20) + 4096];
    data[..512].fill(0xff);
    let file = [footer.clone(), header, table, data, footer].concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb");
    std::fs::write(&path, file).unwrap();
    let to = File::create(dir.path().join("to")).unwrap();
    let error = convert(&File::open(&path).unwrap(), Format::Vhd, &path, to, &crate::store::silent).unwrap_err();
    assert!(error.chain().contains("in one place"), "{}", error.chain());
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(magic in 0..4usize, bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2000)) {
        let dir = tempfile::tempdir().unwrap();
        let magic = [&b"KDMV\x01\0\0\0"[..], b"vhdxfile", b"conectix", b""][magic];
        fuzz(&[magic, &bytes].concat(), dir.path());
        fuzz(&[bytes, magic.repeat(64)].concat(), dir.path());
    }
}
