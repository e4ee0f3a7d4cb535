//! Setting limits. A workload runs without a limit for which this host has no controller, and whoever asked is told; but
//! a memory limit that the host could set and does not is an error: it protects the others.

use super::{Cgroup, DefaultDevices};
use crate::error::{Error, Result};
use crate::spec::{BlockIo, Cpu, Memory, NetworkLimits, Resources};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Processes that set a container up leave its group while the limit is written.
const MEMORY_TRIES: u32 = 50;

impl Cgroup {
    /// Sets what is asked for; one line for each limit that could not be set.
    pub fn set(&self, resources: &Resources) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        if let Some(memory) = &resources.memory {
            self.set_memory(memory, &mut warnings)?;
        }
        let mut values = Vec::new();
        if let Some(cpu) = &resources.cpu {
            cpu_values(cpu, &mut values);
        }
        if let Some(limit) = resources.pids.as_ref().and_then(|p| p.limit) {
            let limit = if limit > 0 { limit.to_string() } else { "max".into() };
            values.push(Value::new("pids", "pids.max", limit.clone(), "pids.max", limit));
        }
        if let Some(io) = &resources.block_io {
            io_values(io, &mut values);
        }
        for huge in &resources.hugepage_limits {
            let limit = huge.limit.to_string();
            let (v1, v2) =
                (format!("hugetlb.{}.limit_in_bytes", huge.page_size), format!("hugetlb.{}.max", huge.page_size));
            values.push(Value { controller: "hugetlb", v1: Some((v1, limit.clone())), v2: Some((v2, limit)) });
        }
        if let Some(network) = &resources.network {
            network_values(network, &mut values);
        }
        for (device, limit) in &resources.rdma {
            let part = |name: &str, n: Option<u32>| n.map(|n| format!(" {name}={n}")).unwrap_or_default();
            let text =
                format!("{device}{}{}", part("hca_handle", limit.hca_handles), part("hca_object", limit.hca_objects));
            values.push(Value::new("rdma", "rdma.max", text.clone(), "rdma.max", text));
        }
        for value in values {
            warnings.extend(self.put(&value).err());
        }
        self.set_unified(&resources.unified, &mut warnings)?;
        Ok(warnings)
    }

    /// For a pod's container: nobody's memory limit turns into a slow host, and a container dies whole.
    pub fn set_for_pod(&self, resources: &Resources, devices: Option<&DefaultDevices>) -> Result<Vec<String>> {
        let warnings = self.set(resources)?;
        self.set_devices(&resources.devices, devices)?;
        if let Some(limit) = resources
            .memory
            .as_ref()
            .and_then(|m| m.limit)
            .filter(|_| !warnings.iter().any(|w| w.starts_with("memory:")))
        {
            // Kernels without swap accounting have no such files.
            if let Some(mount) = self.hierarchies.v1("memory") {
                let _ = fs::write(mount.join(&self.path).join("memory.memsw.limit_in_bytes"), limit.to_string());
            } else if let Some(mount) = self.hierarchies.v2("memory") {
                let _ = fs::write(mount.join(&self.path).join("memory.swap.max"), "0");
                let _ = fs::write(mount.join(&self.path).join("memory.oom.group"), "1");
            }
        }
        Ok(warnings)
    }

    fn set_memory(&self, memory: &Memory, warnings: &mut Vec<String>) -> Result<()> {
        if let Some(limit) = memory.limit.filter(|l| *l != 0) {
            self.set_memory_limit(limit, memory.swap, warnings)?;
        } else if let Some(swap) = memory.swap.filter(|s| *s != 0) {
            warnings.extend(self.put(&swap_value(swap, None)).err());
        }
        let mut values = Vec::new();
        let text = |n: i64| if n < 0 { "-1".to_owned() } else { n.to_string() };
        if let Some(n) = memory.reservation {
            values.push(Value::new("memory", "memory.soft_limit_in_bytes", text(n), "memory.low", max(n)));
        }
        if let Some(n) = memory.kernel_tcp {
            values.push(Value::only_v1("memory", "memory.kmem.tcp.limit_in_bytes", text(n)));
        }
        if let Some(n) = memory.swappiness {
            values.push(Value::only_v1("memory", "memory.swappiness", n.to_string()));
        }
        if memory.disable_oom_killer == Some(true) {
            values.push(Value::only_v1("memory", "memory.oom_control", "1".into()));
        }
        if memory.kernel.is_some_and(|n| n > 0) {
            warnings.push("memory.kernel: Linux has had no such limit since 5.16; left out".into());
        }
        for value in values {
            warnings.extend(self.put(&value).err());
        }
        Ok(())
    }

    fn set_memory_limit(&self, limit: i64, swap: Option<i64>, warnings: &mut Vec<String>) -> Result<()> {
        let (file, text) = match (self.hierarchies.v1("memory"), self.hierarchies.v2("memory")) {
            (Some(mount), _) => (mount.join(&self.path).join("memory.limit_in_bytes"), limit.to_string()),
            (None, Some(mount)) => (mount.join(&self.path).join("memory.max"), max(limit)),
            (None, None) => {
                warnings
                    .push(format!("memory: this host has no such cgroup controller, a limit of {limit} is not set"));
                return Ok(());
            }
        };
        let set_swap = |warnings: &mut Vec<String>| {
            if let Some(swap) = swap.filter(|s| *s != 0) {
                warnings.extend(self.put(&swap_value(swap, Some(limit))).err());
            }
        };
        // The limit may not lie above that of memory and swap: whichever grows goes first.
        let grows = self.hierarchies.v1("memory").is_some()
            && fs::read_to_string(&file)
                .ok()
                .and_then(|t| t.trim().parse::<i64>().ok())
                .is_some_and(|now| limit < 0 || limit > now);
        if grows {
            set_swap(warnings);
        }
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
        if !grows {
            set_swap(warnings);
        }
        Ok(())
    }

    fn set_unified(&self, unified: &BTreeMap<String, String>, warnings: &mut Vec<String>) -> Result<()> {
        for (name, text) in unified {
            if name.contains('/') || name.is_empty() || name.starts_with("cgroup.") {
                return Err(Error::Refused(format!(
                    "linux.resources.unified: {name:?}: not the name of a controller's file"
                )));
            }
            let Some(mount) = self.hierarchies.v2.as_ref().map(|v| v.mount.as_path()) else {
                return Err(Error::Refused(
                    "linux.resources.unified: this host has no version 2 control groups".into(),
                ));
            };
            warnings.extend(write(mount, &self.path, name, text).err());
        }
        Ok(())
    }

    fn put(&self, value: &Value) -> std::result::Result<(), String> {
        let Value { controller, v1, v2 } = value;
        let missing = || format!("{controller}: this host has no such cgroup controller");
        if let Some(mount) = self.hierarchies.v1(controller) {
            let Some((file, text)) = v1 else { return Ok(()) };
            return write(mount, &self.path, file, text);
        }
        let (file, text) = match (v2, v1) {
            (Some(pair), _) => pair,
            (None, Some((file, text))) => {
                return Err(format!("{file}: version 2 control groups have no such limit, {text} is not set"));
            }
            (None, None) => return Ok(()),
        };
        match self.hierarchies.v2(controller) {
            Some(mount) => write(mount, &self.path, file, text),
            None => Err(format!("{}, {text} is not set", missing())),
        }
    }
}

/// One limit in either version's terms: file and text.
struct Value {
    controller: &'static str,
    v1: Option<(String, String)>,
    v2: Option<(String, String)>,
}

impl Value {
    fn new(controller: &'static str, v1: &str, v1_text: String, v2: &str, v2_text: String) -> Self {
        Self { controller, v1: Some((v1.into(), v1_text)), v2: Some((v2.into(), v2_text)) }
    }

    fn only_v1(controller: &'static str, file: &str, text: String) -> Self {
        Self { controller, v1: Some((file.into(), text)), v2: None }
    }
}

fn max(n: i64) -> String {
    if n < 0 { "max".into() } else { n.to_string() }
}

/// Version 1 counts memory and swap together, version 2 swap alone.
fn swap_value(both: i64, limit: Option<i64>) -> Value {
    let alone = match limit {
        _ if both < 0 => "max".into(),
        Some(limit) if limit > 0 => both.saturating_sub(limit).max(0).to_string(),
        _ => both.to_string(),
    };
    Value::new("memory", "memory.memsw.limit_in_bytes", both.to_string(), "memory.swap.max", alone)
}

fn cpu_values(cpu: &Cpu, values: &mut Vec<Value>) {
    if let Some(shares) = cpu.shares.filter(|s| *s != 0) {
        values.push(Value::new("cpu", "cpu.shares", shares.to_string(), "cpu.weight", weight(shares)));
    }
    if let Some(period) = cpu.period.filter(|p| *p != 0) {
        // Version 2 has both in one file, below.
        values.push(Value { controller: "cpu", v1: Some(("cpu.cfs_period_us".into(), period.to_string())), v2: None });
    }
    if cpu.quota.is_some() || cpu.period.is_some_and(|p| p != 0) {
        let quota = cpu.quota.filter(|q| *q != 0).unwrap_or(-1);
        let text = format!("{} {}", max(quota), cpu.period.filter(|p| *p != 0).unwrap_or(100_000));
        values.push(Value::new("cpu", "cpu.cfs_quota_us", quota.to_string(), "cpu.max", text));
    }
    if let Some(burst) = cpu.burst {
        values.push(Value::new("cpu", "cpu.cfs_burst_us", burst.to_string(), "cpu.max.burst", burst.to_string()));
    }
    if let Some(period) = cpu.realtime_period {
        values.push(Value::only_v1("cpu", "cpu.rt_period_us", period.to_string()));
    }
    if let Some(runtime) = cpu.realtime_runtime {
        values.push(Value::only_v1("cpu", "cpu.rt_runtime_us", runtime.to_string()));
    }
    if let Some(idle) = cpu.idle {
        values.push(Value::new("cpu", "cpu.idle", idle.to_string(), "cpu.idle", idle.to_string()));
    }
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if let Some(list) = list.as_ref().filter(|l| !l.is_empty()) {
            values.push(Value::new("cpuset", file, list.clone(), file, list.clone()));
        }
    }
}

fn io_values(io: &BlockIo, values: &mut Vec<Value>) {
    let scaled = |w: u16| (1 + (u32::from(w.clamp(10, 1000)) - 10) * 9_999 / 990).to_string();
    if let Some(weight) = io.weight.filter(|w| *w != 0) {
        values.push(Value::new(
            "blkio",
            "blkio.bfq.weight",
            weight.to_string(),
            "io.weight",
            format!("default {}", scaled(weight)),
        ));
    }
    for device in &io.weight_device {
        if let Some(weight) = device.weight {
            let of = format!("{}:{}", device.major, device.minor);
            values.push(Value::new(
                "blkio",
                "blkio.bfq.weight_device",
                format!("{of} {weight}"),
                "io.weight",
                format!("{of} {}", scaled(weight)),
            ));
        }
    }
    for (list, v1, v2) in [
        (&io.throttle_read_bps_device, "blkio.throttle.read_bps_device", "rbps"),
        (&io.throttle_write_bps_device, "blkio.throttle.write_bps_device", "wbps"),
        (&io.throttle_read_iops_device, "blkio.throttle.read_iops_device", "riops"),
        (&io.throttle_write_iops_device, "blkio.throttle.write_iops_device", "wiops"),
    ] {
        for device in list {
            let of = format!("{}:{}", device.major, device.minor);
            let rate = if device.rate == 0 { "max".to_owned() } else { device.rate.to_string() };
            values.push(Value::new(
                "blkio",
                v1,
                format!("{of} {}", device.rate),
                "io.max",
                format!("{of} {v2}={rate}"),
            ));
        }
    }
}

fn network_values(network: &NetworkLimits, values: &mut Vec<Value>) {
    if let Some(class) = network.class_id {
        values.push(Value::only_v1("net_cls", "net_cls.classid", class.to_string()));
    }
    for priority in &network.priorities {
        let text = format!("{} {}", priority.name, priority.priority);
        values.push(Value::only_v1("net_prio", "net_prio.ifpriomap", text));
    }
}

fn write(mount: &Path, path: &Path, file: &str, value: &str) -> std::result::Result<(), String> {
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
