//! Reading what a group uses, and whether the kernel killed in it for want of memory.

use super::Cgroup;
use std::fs;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu_nanos: u64,
    pub memory_bytes: u64,
    /// Without the file cache that the kernel would drop first.
    pub memory_working_set: u64,
    pub pids: u64,
}

impl Cgroup {
    pub fn exists(&self) -> bool {
        self.hierarchies.mounts().any(|m| m.join(&self.path).is_dir())
    }

    /// Zero for what no controller here counts.
    pub fn stats(&self) -> Stats {
        let v2 = self.hierarchies.v2.as_ref().map(|v| v.mount.join(&self.path));
        let cpu_nanos = self.v1_number("cpuacct", "cpuacct.usage").or_else(|| {
            let text = fs::read_to_string(v2.as_ref()?.join("cpu.stat")).ok()?;
            field(&text, "usage_usec").map(|usec| usec.saturating_mul(1000))
        });
        let memory =
            self.v1_number("memory", "memory.usage_in_bytes").or_else(|| self.v2_number("memory", "memory.current"));
        let inactive = self
            .v1_text("memory", "memory.stat")
            .and_then(|t| field(&t, "total_inactive_file"))
            .or_else(|| self.v2_text("memory", "memory.stat").and_then(|t| field(&t, "inactive_file")));
        let pids = self.v1_number("pids", "pids.current").or_else(|| self.v2_number("pids", "pids.current"));
        let memory_bytes = memory.unwrap_or_default();
        Stats {
            cpu_nanos: cpu_nanos.unwrap_or_default(),
            memory_bytes,
            memory_working_set: memory_bytes.saturating_sub(inactive.unwrap_or_default()),
            pids: pids.unwrap_or_else(|| self.pids().len() as u64),
        }
    }

    /// How many processes the kernel has killed in this group because its memory was at the limit.
    pub fn oom_kills(&self) -> u64 {
        self.v1_text("memory", "memory.oom_control")
            .or_else(|| self.v2_text("memory", "memory.events"))
            .and_then(|text| field(&text, "oom_kill"))
            .unwrap_or_default()
    }

    /// Bytes; none where there is no limit, or nobody to hold to it.
    pub fn memory_limit(&self) -> Option<u64> {
        const NO_LIMIT: u64 = 1 << 62;
        self.v1_number("memory", "memory.limit_in_bytes")
            .or_else(|| self.v2_number("memory", "memory.max"))
            .filter(|limit| *limit < NO_LIMIT)
    }

    fn v1_text(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.hierarchies.v1(controller)?.join(&self.path).join(file)).ok()
    }

    fn v2_text(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.hierarchies.v2(controller)?.join(&self.path).join(file)).ok()
    }

    fn v1_number(&self, controller: &str, file: &str) -> Option<u64> {
        self.v1_text(controller, file)?.trim().parse().ok()
    }

    fn v2_number(&self, controller: &str, file: &str) -> Option<u64> {
        self.v2_text(controller, file)?.trim().parse().ok()
    }
}

/// `name value` in a flat keyed file.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}
