//! A place for machines with the test guest in them, in our own engine.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use vmm::client::{self, Exit};
use vmm::kvm::Support;
use vmm::{Choice, Client, Console, Disk, DiskFormat, Machine, Restore, SnapshotFiles};

pub const UID: u32 = 1_234_568;

pub fn role() -> PathBuf {
    let exe = std::env::current_exe().ok().and_then(|e| Some(e.parent()?.parent()?.join("examples/vmm")));
    let exe = std::env::var_os("ATOLL_VMM").map(PathBuf::from).or(exe).unwrap();
    assert!(exe.exists(), "{}: examples/vmm is built with the tests", exe.display());
    exe
}

/// The guest, built once; `Err` says what is missing.
pub fn guest() -> Result<&'static Path, &'static str> {
    static GUEST: OnceLock<Result<(PathBuf, tempfile::TempDir), String>> = OnceLock::new();
    let built = GUEST.get_or_init(|| {
        if let Support::Absent { why } = vmm::kvm::probe() {
            return Err(format!("no KVM: {why}"));
        }
        if !rustix::process::getuid().is_root() {
            return Err("needs root".into());
        }
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let (elf, source) = (dir.path().join("guest"), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest"));
        let mut command = Command::new("rustc");
        command.args(["--edition", "2024", "--crate-name", "guest", "-o"]).arg(&elf);
        // emulated kernel code knows no SSE
        let flags = "panic=abort opt-level=1 strip=symbols relocation-model=static no-redzone=yes \
             target-feature=-sse2,-sse,+soft-float linker=ld linker-flavor=ld link-arg=-static link-arg=--gc-sections \
             link-self-contained=no default-linker-libraries=no";
        for flag in flags.split_whitespace() {
            command.args(["-C", flag]);
        }
        command.arg("-C").arg(format!("link-arg=-T{}", source.join("link.ld").display())).arg(source.join("kernel.rs"));
        let output = command.output().map_err(|e| format!("rustc: {e}"))?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok((elf, dir))
    });
    built.as_ref().map(|(elf, _)| elf.as_path()).map_err(String::as_str)
}

pub fn disk(dir: &Path, name: &str, content: &[u8], read_only: bool) -> Disk {
    let path = dir.join(name);
    let mut bytes = content.to_vec();
    bytes.resize(64 << 10, 0);
    std::fs::write(&path, bytes).unwrap();
    let (serial, bus) = (name.to_owned(), "virtio".to_owned());
    Disk {
        name: name.into(),
        path,
        format: DiskFormat::Raw,
        read_only,
        bus,
        serial,
        boot_order: None,
        overlay: false,
        begins: None,
        rate: vmm::Rate::default(),
    }
}

pub fn machine(dir: &Path, kernel: &Path, args: &str) -> Machine {
    Machine {
        id: "test".into(),
        vcpus: 2,
        memory_bytes: 64 << 20,
        kernel: Some(kernel.into()),
        initrd: None,
        kernel_args: args.into(),
        efi: false,
        disks: vec![disk(dir, "data", b"atoll test disk", false), disk(dir, "fixed", b"read only", true)],
        seed: None,
        link: None,
        uid: UID,
        run_dir: dir.join("run"),
        state_dir: dir.join("state"),
        console: Console { log_path: dir.join("logs/compute/0.log"), log_max_bytes: 1 << 20 },
        engine: Choice::Kvm,
        restore: None,
        kvm_cache: None,
        display: false,
        channel: None,
    }
}

pub fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(Instant::now() < until, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn console(machine: &Machine) -> String {
    std::fs::read_to_string(&machine.console.log_path).unwrap_or_default()
}

pub fn end(machine: &Machine) -> Exit {
    let what = format!("the end; the console says\n{}", console(machine));
    wait_for(&what, || client::recorded(&machine.state_dir)?.exit)
}

pub fn snapshot(machine: &Machine, dir: &Path, base: Option<&Path>) -> Restore {
    std::fs::create_dir_all(dir).unwrap();
    let make = |name: &str| std::fs::File::create_new(dir.join(name)).unwrap();
    let files = SnapshotFiles {
        state: make("state"),
        memory: make("memory"),
        base: base.map(|path| std::fs::File::open(path).unwrap()),
    };
    Client::connect(&machine.run_dir).unwrap().snapshot(&files).unwrap();
    match base {
        None => Restore {
            state: dir.join("state"),
            memory: dir.join("memory"),
            difference: None,
            verify: true,
            engine: String::new(),
        },
        Some(base) => Restore {
            state: dir.join("state"),
            memory: base.into(),
            difference: Some(dir.join("memory")),
            verify: true,
            engine: String::new(),
        },
    }
}

/// Another machine of the same description, with disks of its own as they are now.
pub fn again(machine: &Machine, dir: &Path, restore: Restore) -> Machine {
    std::fs::create_dir_all(dir).unwrap();
    let mut other = machine.clone();
    for disk in &mut other.disks {
        let copy = dir.join(&disk.name);
        std::fs::copy(&disk.path, &copy).unwrap();
        disk.path = copy;
    }
    (other.run_dir, other.state_dir) = (dir.join("run"), dir.join("state"));
    other.console.log_path = dir.join("logs/compute/0.log");
    other.restore = Some(restore);
    other
}

pub fn says(machine: &Machine, what: &str) {
    let ended = || client::recorded(&machine.state_dir);
    wait_for(what, || {
        assert!(ended().is_none(), "{:?}\n{}", ended(), console(machine));
        console(machine).contains(what).then_some(())
    });
}
