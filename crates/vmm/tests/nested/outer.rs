//! A machine with a real KVM under translation, seen from outside: what it is made of, and its run to the end.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
pub const BUSYBOX: &str = "/usr/bin/busybox";

/// The directory of Debian's kernel and its modules, or what is missing; `more` are programs and their packages.
pub fn inputs(more: &[(&str, &str)]) -> Result<PathBuf, String> {
    for (program, package) in [(QEMU, "qemu-system-x86"), (BUSYBOX, "busybox-static")].iter().chain(more) {
        if !Path::new(program).exists() {
            return Err(format!("{program} is not here; apt-get install {package}"));
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cache = root.join(".cache/nested");
    let made = Command::new(root.join("scripts/nested.sh")).arg(&cache).output().map_err(|e| e.to_string())?;
    if made.status.success() { Ok(cache) } else { Err(String::from_utf8_lossy(&made.stderr).trim().to_owned()) }
}

pub struct Outer<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub memory_mib: u32,
    /// Further arguments of QEMU's.
    pub more: &'a [String],
    /// One that says nothing for so long hangs.
    pub silence: Duration,
    /// The line that says that all went well.
    pub all_good: &'a str,
}

impl Outer<'_> {
    /// Shows what it says until it ends; whether all went well.
    pub fn run(&self) -> bool {
        let memory = self.memory_mib.to_string();
        let mut child = Command::new(QEMU)
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", "2", "-m", &memory])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-append"])
            .arg("console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr")
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = std::sync::mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        let all = move || output.split(b'\n').map_while(Result::ok).all(|line| sender.send(line).is_ok());
        let reader = std::thread::spawn(all);
        let mut good = false;
        loop {
            match lines.recv_timeout(self.silence) {
                Ok(line) => {
                    let line = String::from_utf8_lossy(&line);
                    println!("  {}", line.trim_end());
                    good |= line.trim_end() == self.all_good;
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    println!("nested: the machine says nothing any more");
                    let _ = child.kill();
                    break;
                }
            }
        }
        let _ = (child.wait(), reader.join());
        good
    }
}
