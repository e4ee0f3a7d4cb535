//! A cpio archive in the "newc" format, as Linux takes for its first file system.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

pub struct Archive {
    bytes: Vec<u8>,
    seen: BTreeSet<String>,
}

impl Archive {
    pub fn new() -> Self {
        let mut archive = Archive { bytes: Vec::new(), seen: BTreeSet::new() };
        for dir in ["dev", "proc", "sys", "tmp", "run", "root"] {
            archive.directory(dir);
        }
        archive.entry("dev/console", 0o020_600, &[], (5, 1));
        archive
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn directory(&mut self, name: &str) {
        if self.seen.insert(name.into()) {
            self.entry(name, 0o040_755, &[], (0, 0));
        }
    }

    pub fn file(&mut self, name: &str, content: &[u8], executable: bool) {
        for (at, _) in name.match_indices('/') {
            self.directory(&name[..at]);
        }
        if self.seen.insert(name.into()) {
            self.entry(name, if executable { 0o100_755 } else { 0o100_644 }, content, (0, 0));
        }
    }

    /// A program and the libraries it is linked to.
    pub fn program(&mut self, path: &Path, name: &str) {
        self.file(name, &std::fs::read(path).unwrap(), true);
        let listed = Command::new("ldd").arg(path).output().unwrap();
        for word in String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
            let real = std::fs::canonicalize(word).unwrap();
            let executable = real.metadata().unwrap().permissions().mode() & 0o111 != 0;
            self.file(word.trim_start_matches('/'), &std::fs::read(real).unwrap(), executable);
        }
    }

    /// Those that the kernel does not have built in.
    pub fn modules(&mut self, from: &Path, names: &[&str]) {
        for name in names {
            if let Ok(content) = std::fs::read(from.join(format!("{name}.ko"))) {
                self.file(&format!("modules/{name}.ko"), &content, false);
            }
        }
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}
