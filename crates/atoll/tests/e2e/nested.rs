//! What takes hardware KVM, on a computer that has none: this program, Atoll and its clients in a machine whose processor
//! QEMU translates, with SVM, so that Debian's kernel offers a working `/dev/kvm` in there. The tests of the boundary
//! `microvm` then run on Atoll's own monitor; there is no QEMU inside that could take its place.
//!
//! As in `crates/vmm/tests/nested`, what fails is tried again: QEMU 7.2's translation of SVM is not sound.

use crate::archive::Archive;
use crate::cluster::Cluster;
use crate::outer::{self, BUSYBOX, Outer};
use crate::{Outcome, Test};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

pub const TESTS: &[Test] = &[("nested_kvm_runs_pods", pods)];

/// What runs in there.
const FILTERS: &str = "microvm_";
/// Set in there: the boundary's tests do not ask for QEMU.
pub const INSIDE: &str = "ATOLL_NESTED_PODS";
const ATTEMPTS: u32 = 3;
const SCRATCH: u64 = 4 << 30;
/// A machine that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(420);
const ALL_GOOD: &str = "nested pods: all good";
const PROGRAMS: [&str; 10] = ["kubectl", "ip", "nsenter", "curl", "script", "sh", "tar", "stty", "unshare", "mount"];
/// To reach the disk that all else is on.
const FIRST_MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "libcrc32c",
    "erofs",
    "overlay",
];

const FIRST_INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
for module in MODULES; do [ -e /modules/$module.ko ] && $b insmod /modules/$module.ko; done
$b mount -t tmpfs tmpfs /run
$b mkdir /run/lower /run/upper /run/work
$b mount -t erofs -o ro /dev/vda /run/lower
$b mount -t overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work overlay /root
exec $b switch_root /root /nested-init
"#;

const SECOND_INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TMPDIR=/scratch INSIDE=1
/bin/busybox --install -s /sbin 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for at in /dev/shm /run; do mount -t tmpfs tmpfs $at; done
# tmpfs of this kernel's age has no id-mapped mounts
mount -t ext4 /dev/vdb /scratch
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in kvm-amd tun veth; do modprobe $module; done
ip link set lo up
/e2e FILTERS && echo ALL_GOOD
poweroff -f
"#;

fn pods(_: &Cluster) -> Outcome {
    if std::env::var_os(INSIDE).is_some() {
        return Outcome::Skipped("this is the machine".into());
    }
    let cache = match outer::inputs(&[("/usr/bin/mkfs.erofs", "erofs-utils"), ("/usr/sbin/mkfs.ext4", "e2fsprogs")]) {
        Ok(cache) => cache,
        Err(why) => return Outcome::Skipped(why),
    };
    let dir = tempfile::tempdir().unwrap();
    let (disk, initrd) = (dir.path().join("disk"), dir.path().join("initrd"));
    let stage = dir.path().join("stage");
    lay_out(&stage, &cache);
    let made = Command::new("mkfs.erofs").arg("--quiet").arg(&disk).arg(&stage).stdout(Stdio::null()).status();
    assert!(made.unwrap().success(), "mkfs.erofs");
    std::fs::remove_dir_all(&stage).unwrap();
    let mut archive = Archive::new();
    archive.program(Path::new(BUSYBOX), "bin/busybox");
    archive.modules(&cache.join("modules"), &FIRST_MODULES);
    archive.file("init", FIRST_INIT.replace("MODULES", &FIRST_MODULES.join(" ")).as_bytes(), true);
    std::fs::write(&initrd, archive.finish()).unwrap();
    let scratch = dir.path().join("scratch");
    let drive =
        |more: &str, file: &Path| ["-drive".to_owned(), format!("if=virtio,format=raw,{more},file={}", file.display())];
    let more = [drive("readonly=on", &disk), drive("cache=unsafe", &scratch)].concat();
    let (kernel, initrd, more) = (&cache.join("vmlinuz"), initrd.as_path(), more.as_slice());
    let machine = Outer { kernel, initrd, memory_mib: 6144, more, silence: SILENCE, all_good: ALL_GOOD };
    let good = (1..=ATTEMPTS).any(|attempt| {
        blank(&scratch);
        let good = machine.run();
        if !good {
            println!("nested: attempt {attempt} of {ATTEMPTS} failed, see above");
        }
        good
    });
    assert!(good, "in the machine a test failed, see above");
    Outcome::Passed
}

/// A root file system with this program and all that it uses, at the places where it looks for them.
fn lay_out(stage: &Path, cache: &Path) {
    let under = |path: &Path| stage.join(path.strip_prefix("/").unwrap());
    for at in ["bin", "sbin", "proc", "sys", "dev", "run", "scratch", "root", "tmp", "etc", "usr/bin", "var"] {
        std::fs::create_dir_all(stage.join(at)).unwrap();
    }
    std::os::unix::fs::symlink("/proc/mounts", stage.join("etc/mtab")).unwrap();
    std::fs::write(stage.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    std::fs::write(stage.join("etc/group"), "root:x:0:\n").unwrap();
    program(stage, Path::new(BUSYBOX), Path::new("/bin/busybox"));
    for name in PROGRAMS {
        let found = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().map(|dir| Path::new(dir).join(name));
        let path = found.into_iter().find(|p| p.exists()).unwrap_or_else(|| panic!("{name} is not installed"));
        program(stage, &path, &Path::new("/bin").join(name));
    }
    program(stage, &std::env::current_exe().unwrap(), Path::new("/e2e"));
    program(stage, Path::new(env!("CARGO_BIN_EXE_atoll")), Path::new(env!("CARGO_BIN_EXE_atoll")));
    for name in ["e2e".as_ref(), Path::new(env!("CARGO_BIN_EXE_atoll"))] {
        let _ = Command::new("strip").arg(stage.join(name.strip_prefix("/").unwrap_or(name))).status();
    }
    // the kernel is added from here
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("../../scripts/nested.sh").canonicalize().unwrap();
    let release = Path::new("/lib/modules").join(release(&cache.join("vmlinuz")));
    let home = cache.canonicalize().unwrap();
    for dir in [root, script.parent().unwrap(), &home, &release] {
        std::fs::create_dir_all(under(dir)).unwrap();
    }
    std::fs::copy(&script, under(&script)).unwrap();
    std::fs::copy(cache.join("vmlinuz"), under(&home).join("vmlinuz")).unwrap();
    for module in std::fs::read_dir(cache.join("modules")).unwrap().flatten() {
        std::fs::copy(module.path(), under(&release).join(module.file_name())).unwrap();
    }
    std::os::unix::fs::symlink(&release, under(&home).join("modules")).unwrap();
    let name = release.file_name().unwrap();
    let listed = Command::new(BUSYBOX).args(["depmod", "-b"]).arg(stage).arg(name).status().unwrap();
    assert!(listed.success(), "depmod");
    let second =
        SECOND_INIT.replace("INSIDE", INSIDE).replace("FILTERS", FILTERS).replace("ALL_GOOD", &format!("'{ALL_GOOD}'"));
    executable(&stage.join("nested-init"), second.as_bytes());
}

fn executable(path: &Path, content: &[u8]) {
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// A program and the libraries it is linked to.
fn program(stage: &Path, from: &Path, to: &Path) {
    let copy = |from: &Path, to: &Path| {
        let to = stage.join(to.strip_prefix("/").unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        if !to.exists() {
            std::fs::copy(from, to).unwrap();
        }
    };
    copy(from, to);
    let listed = Command::new("ldd").arg(from).output().unwrap();
    for word in String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
        copy(&std::fs::canonicalize(word).unwrap(), Path::new(word));
    }
}

/// The version that a kernel calls itself: the string that offset 0x20e of a bzImage leads to (Documentation/x86/boot).
fn release(kernel: &Path) -> String {
    let kernel = std::fs::read(kernel).unwrap();
    let at = usize::from(u16::from_le_bytes([kernel[0x20e], kernel[0x20f]])) + 0x200;
    let text = kernel[at..].split(|b| *b == b' ' || *b == 0).next().unwrap();
    String::from_utf8(text.to_vec()).unwrap()
}

/// A file system for what the machine writes.
fn blank(path: &Path) {
    let _ = std::fs::remove_file(path);
    std::fs::File::create(path).and_then(|file| file.set_len(SCRATCH)).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal"]).arg(path).status().unwrap();
    assert!(made.success(), "mkfs.ext4");
}
