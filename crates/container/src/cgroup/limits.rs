//! Setting limits. A workload runs without a limit for which this host has no controller, and whoever asked is told; but
//! a memory limit that the host could set and does not is an error: it protects the others.

use super::Cgroup;
use crate::error::{Error, Result};
use crate::spec::Resources;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Processes that set a container up leave its group while the limit is written.
const MEMORY_TRIES: u32 = 50;

impl Cgroup {
    /// Sets what is asked for; one line for each limit that could not be set.
    pub fn set(&self, resources: &Resources) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        if let Some(cpu) = &resources.cpu {
            if let Some(shares) = cpu.shares {
                self.write("cpu", "cpu.shares", &shares.to_string(), "cpu.weight", &weight(shares), &mut warnings);
            }
            if let Some(quota) = cpu.quota.filter(|q| *q > 0) {
                let period = cpu.period.unwrap_or(100_000);
                if self.hierarchies.v1("cpu").is_some() {
                    self.write("cpu", "cpu.cfs_period_us", &period.to_string(), "", "", &mut warnings);
                }
                let max = format!("{quota} {period}");
                self.write("cpu", "cpu.cfs_quota_us", &quota.to_string(), "cpu.max", &max, &mut warnings);
            }
        }
        if let Some(limit) = resources.memory.as_ref().and_then(|m| m.limit) {
            self.set_memory(limit, &mut warnings)?;
        }
        if let Some(limit) = resources.pids.as_ref().and_then(|p| p.limit) {
            let limit = limit.to_string();
            self.write("pids", "pids.max", &limit, "pids.max", &limit, &mut warnings);
        }
        Ok(warnings)
    }

    fn set_memory(&self, limit: u64, warnings: &mut Vec<String>) -> Result<()> {
        let text = limit.to_string();
        let file = match (self.hierarchies.v1("memory"), self.hierarchies.v2("memory")) {
            (Some(mount), _) => mount.join(&self.path).join("memory.limit_in_bytes"),
            (None, Some(mount)) => mount.join(&self.path).join("memory.max"),
            (None, None) => {
                warnings.push(format!("memory: this host has no such cgroup controller, a limit of {text} is not set"));
                return Ok(());
            }
        };
        for attempt in 1.. {
            match fs::write(&file, &text) {
                Ok(()) => break,
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && attempt < MEMORY_TRIES => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(Error::Refused(format!("memory limit {text}: too little for even starting a process")));
                }
                Err(e) => return Err(Error::step(format!("memory limit {text} ({})", file.display()), e)),
            }
        }
        self.forbid_swap(&text);
        Ok(())
    }

    /// Swap would turn a memory limit into a slow host. Kernels without swap accounting have no such files.
    fn forbid_swap(&self, limit: &str) {
        if let Some(mount) = self.hierarchies.v1("memory") {
            let _ = fs::write(mount.join(&self.path).join("memory.memsw.limit_in_bytes"), limit);
        } else if let Some(mount) = self.hierarchies.v2("memory") {
            let _ = fs::write(mount.join(&self.path).join("memory.swap.max"), "0");
            let _ = fs::write(mount.join(&self.path).join("memory.oom.group"), "1");
        }
    }

    fn write(&self, controller: &str, v1: &str, v1_value: &str, v2: &str, v2_value: &str, warnings: &mut Vec<String>) {
        let outcome = if let Some(mount) = self.hierarchies.v1(controller) {
            put(mount, &self.path, v1, v1_value)
        } else if let Some(mount) = self.hierarchies.v2(controller) {
            put(mount, &self.path, v2, v2_value)
        } else {
            Err(format!("{controller}: this host has no such cgroup controller, {v1_value} is not set"))
        };
        warnings.extend(outcome.err());
    }
}

fn put(mount: &Path, path: &Path, file: &str, value: &str) -> std::result::Result<(), String> {
    let file = mount.join(path).join(file);
    fs::write(&file, value).map_err(|e| format!("{}: cannot set {value}: {e}", file.display()))
}

/// cgroup v2's `cpu.weight` (1 to 10,000) for version 1's shares (2 to 262,144), as the field's runtimes convert.
fn weight(shares: u64) -> String {
    (1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142).to_string()
}

#[cfg(test)]
mod tests {
    #[test]
    fn shares_become_weights() {
        assert_eq!(super::weight(2), "1");
        assert_eq!(super::weight(1024), "39");
        assert_eq!(super::weight(262_144), "10000");
    }
}
