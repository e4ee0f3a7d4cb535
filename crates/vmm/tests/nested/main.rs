//! Our engine on a real KVM, with Debian's kernel in it. Where the computer's own KVM cannot run Linux, a machine is made
//! that can: QEMU translates an AMD processor with SVM, in which Debian's kernel offers a working `/dev/kvm`.
//!
//! ```text
//! host    `cargo test -p vmm --test nested`: packs this program and its libraries, starts the middle machine
//! middle  `/init` under translation: starts machines on the engine, looks at them from outside
//! guest   in such a machine: looks from inside
//! ```
//!
//! QEMU 7.2's translation of SVM is not sound: guests with two processors hang, fault three times over, or take the middle
//! machine's kernel down, once in about fifteen starts, and QEMU's own `-M microvm,accel=kvm` in the middle fails the
//! same way. So what fails is tried again, [`ATTEMPTS`] times in all, and every failure is shown; a fault of ours that is
//! always there fails them all.

mod archive;
mod bench;
mod guest;
mod middle;
mod outer;

use archive::Archive;
use outer::{BUSYBOX, Outer, QEMU};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const ATTEMPTS: u32 = 3;
/// A middle machine that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(300);
const MIDDLE_MODULES: &[&str] = &["irqbypass", "ccp", "kvm", "kvm-amd", "tun"];

fn main() {
    match std::env::var("ATOLL_NESTED").as_deref() {
        Ok("middle") => middle::main(),
        Ok("guest") => guest::main(),
        _ => host(),
    }
}

fn host() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if std::env::args().any(|a| a == "--list") || filter.iter().any(|f| !"nested_kvm".contains(f.as_str())) {
        return;
    }
    match inputs() {
        Err(why) => println!("test nested_kvm ... SKIPPED: {why}"),
        Ok(inputs) => {
            let good = (1..=ATTEMPTS).any(|attempt| {
                let good = run(&inputs);
                if !good {
                    println!("test nested_kvm: attempt {attempt} of {ATTEMPTS} failed, see above");
                }
                good
            });
            println!("test nested_kvm ... {}", if good { "ok" } else { "FAILED" });
            std::process::exit(i32::from(!good));
        }
    }
}

struct Inputs {
    kernel: PathBuf,
    modules: PathBuf,
    role: PathBuf,
}

fn inputs() -> Result<Inputs, String> {
    let cache = outer::inputs(&[])?;
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let beside = exe.parent().and_then(Path::parent).map(|dir| dir.join("examples/vmm"));
    let role = std::env::var_os("ATOLL_VMM").map(PathBuf::from).or(beside).filter(|p| p.exists());
    let role = role.ok_or("examples/vmm is not built")?;
    Ok(Inputs { kernel: cache.join("vmlinuz"), modules: cache.join("modules"), role })
}

/// The kernel as an ELF file, out of the bzImage; `None` without the `lz4` program.
fn unpacked(kernel: &[u8]) -> Option<Vec<u8>> {
    const LZ4: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
    let at = kernel.windows(4).position(|w| w == LZ4)?;
    let mut child = Command::new("lz4")
        .args(["-d", "-c", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let (mut stdin, payload) = (child.stdin.take()?, kernel.get(at..)?.to_vec());
    // what follows the payload makes it stop with an error, after all of it
    let feed = std::thread::spawn(move || drop(stdin.write_all(&payload)));
    let mut elf = Vec::new();
    child.stdout.take()?.read_to_end(&mut elf).ok()?;
    let _ = (child.wait(), feed.join());
    elf.starts_with(b"\x7fELF").then_some(elf)
}

/// The guest's file system: busybox, the modules of its devices, and this program as its agent.
fn guest_archive(inputs: &Inputs) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.program(&std::env::current_exe().unwrap(), "nested");
    archive.program(Path::new(BUSYBOX), "bin/busybox");
    archive.modules(&inputs.modules, guest::MODULES);
    archive.file("init", guest::INIT.as_bytes(), true);
    archive.finish()
}

fn run(inputs: &Inputs) -> bool {
    let bench = std::env::var_os("ATOLL_BENCH").is_some();
    let dir = tempfile::tempdir().unwrap();
    let mut archive = Archive::new();
    archive.program(&std::env::current_exe().unwrap(), "nested");
    archive.program(&inputs.role, "vmm");
    archive.program(Path::new(BUSYBOX), "bin/busybox");
    archive.modules(&inputs.modules, MIDDLE_MODULES);
    let kernel = std::fs::read(&inputs.kernel).unwrap();
    match unpacked(&kernel) {
        Some(elf) => archive.file(middle::ELF, &elf, false),
        None => println!("test nested_kvm: PVH entry SKIPPED: needs lz4 to unpack the kernel"),
    }
    archive.file("guest.kernel", &kernel, false);
    archive.file("guest.initrd", &guest_archive(inputs), false);
    if bench {
        archive.program(Path::new(QEMU), "usr/bin/qemu-system-x86_64");
        for rom in ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"] {
            let found =
                ["/usr/share/qemu", "/usr/share/seabios"].iter().map(|d| Path::new(d).join(rom)).find(|p| p.exists());
            if let Some(path) = found {
                archive.file(&format!("usr/share/qemu/{rom}"), &std::fs::read(path).unwrap(), false);
            }
        }
    }
    // the first file system of all cannot be left by pivot_root, as the jail does; one mounted over it can
    let init = format!(
        "#!/bin/busybox sh\nexport ATOLL_NESTED=middle{}\n/bin/busybox mount -o bind / /root\nexec /bin/busybox chroot /root /nested\n",
        if bench { " ATOLL_BENCH=1" } else { "" }
    );
    archive.file("init", init.as_bytes(), true);
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, archive.finish()).unwrap();
    let (kernel, initrd) = (inputs.kernel.as_path(), initrd.as_path());
    Outer { kernel, initrd, memory_mib: 3072, more: &[], silence: SILENCE, all_good: middle::ALL_GOOD }.run()
}
