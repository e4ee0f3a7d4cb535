//! The control group as a unit of systemd's: who started the machine owns the tree, and a container is a transient scope
//! in it. What systemd has no words for is written into the group as ever; the unit is delegated.

mod bus;
mod message;

use crate::error::{During, Error, Result};
use crate::spec::{DeviceRule, Resources};
use crate::sys::{self, Cloned, SingleThreaded};
use bus::Bus;
use message::Value;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A unit's name has at most 255 bytes (systemd.unit(5)).
const LONGEST: usize = 255;

/// `linux.cgroupsPath` in the form that engines use with `--systemd-cgroup`: `slice:prefix:name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    slice: String,
    pub unit: String,
}

impl Scope {
    /// Without a path it is `system.slice:atoll:ID`, for a plain user in `user.slice`.
    pub fn parse(path: &str, id: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::Refused(format!(
                "linux.cgroupsPath: {path:?}: {why}; with --systemd-cgroup it is slice:prefix:name"
            )))
        };
        let is_root = rustix::process::geteuid().is_root();
        let default = if is_root { "system.slice" } else { "user.slice" };
        let (slice, prefix, name) = match path.split(':').collect::<Vec<_>>().as_slice() {
            [""] => (default, "atoll", id),
            [slice, prefix, name] => (if slice.is_empty() { default } else { *slice }, *prefix, *name),
            _ => return refuse("not of three parts"),
        };
        // systemd.unit(5): letters, digits and `:-_.\`; a template's `@` names another unit.
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.\\@".contains(&b));
        if !plain(slice) || !plain(prefix) || !plain(name) || name.is_empty() {
            return refuse("letters, digits and `-_.\\@` make the name of a unit");
        }
        if !slice.ends_with(".slice") || slice == ".slice" {
            return refuse("the first part is no slice");
        }
        if name.ends_with(".slice") {
            return refuse("a container is a scope, not a slice");
        }
        let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        if unit.len() > LONGEST || slice.len() > LONGEST {
            return refuse("a unit's name has at most 255 bytes");
        }
        Ok(Self { slice: slice.to_owned(), unit })
    }

    /// Makes the unit, held open by a process of its own until the container's is there. Answers its control group,
    /// relative to the root of each hierarchy.
    pub fn start(
        &self,
        alone: SingleThreaded,
        id: &str,
        resources: &Resources,
        devices: bool,
    ) -> Result<(PathBuf, Holder)> {
        let mut bus = Bus::connect()?;
        let holder = Holder::start(alone)?;
        let mut properties = vec![
            ("Description", Value::Text(format!("atoll-oci container {id}"))),
            ("Slice", Value::Text(self.slice.clone())),
            ("DefaultDependencies", Value::Bool(false)),
            ("Delegate", Value::Bool(true)),
            // Nobody asks after its result: it goes when it has failed too.
            ("CollectMode", Value::Text("inactive-or-failed".into())),
            ("PIDs", Value::U32s(vec![holder.pid])),
            ("CPUAccounting", Value::Bool(true)),
            ("MemoryAccounting", Value::Bool(true)),
            ("TasksAccounting", Value::Bool(true)),
            ("IOAccounting", Value::Bool(true)),
        ];
        properties.extend(limits(resources));
        if devices {
            properties.extend(device_properties(&resources.devices));
        }
        let mut started = bus.start_transient(&self.unit, &properties)?;
        if started.as_ref().is_err_and(|refusal| refusal.name.ends_with(".UnitExists")) {
            // What failed under this name earlier may still be kept.
            bus.reset_failed(&self.unit)?;
            started = bus.start_transient(&self.unit, &properties)?;
        }
        started.map_err(|refusal| bus::refused("StartTransientUnit", &self.unit, &refusal))?;
        let group = bus.control_group(&self.unit)?;
        let path = group.strip_prefix('/').filter(|path| !path.is_empty());
        let path = path.ok_or_else(|| Error::Refused(format!("systemd: {}: has no control group", self.unit)))?;
        Ok((path.into(), holder))
    }
}

/// Stops a container's unit, and all that is left in it.
pub fn stop(unit: &str) -> Result<()> {
    Bus::connect()?.stop(unit)
}

/// Other limits for a unit that runs; systemd would put the old ones back some day.
pub fn update(unit: &str, resources: &Resources) -> Result<()> {
    match limits(resources) {
        limits if limits.is_empty() => Ok(()),
        limits => Bus::connect()?.set_properties(unit, &limits),
    }
}

/// A process that is in the scope before the container's is: a scope without one cannot be made. It ends when this is
/// dropped, or its maker dies.
pub struct Holder {
    pid: u32,
    pipe: Option<OwnedFd>,
}

impl Holder {
    fn start(alone: SingleThreaded) -> Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(|| "making a pipe".into())?;
        match alone.clone(0, None).during(|| "making a process to hold the scope".into())? {
            Cloned::Parent { pid, .. } => Ok(Self { pid, pipe: Some(write) }),
            Cloned::Child => {
                drop(write);
                while matches!(rustix::io::read(&read, &mut [0; 1]), Err(rustix::io::Errno::INTR)) {}
                sys::exit_now(0)
            }
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.pipe = None;
        // The container's process may hold the pipe's other end open for as long as it is being set up.
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// systemd.resource-control(5); all in the terms of version 2, which systemd knows how to say in those of version 1.
fn limits(resources: &Resources) -> Vec<(&'static str, Value)> {
    let mut found = Vec::new();
    let bytes = |n: i64| Value::U64(u64::try_from(n).unwrap_or(u64::MAX));
    if let Some(memory) = &resources.memory {
        let limit = memory.limit.filter(|n| *n != 0);
        found.extend(limit.map(|n| ("MemoryMax", bytes(n))));
        found.extend(memory.reservation.filter(|n| *n != 0).map(|n| ("MemoryLow", bytes(n))));
        // The specification counts memory and swap together, systemd swap alone.
        found.extend(memory.swap.filter(|n| *n != 0).and_then(|both| match limit {
            _ if both < 0 => Some(("MemorySwapMax", bytes(-1))),
            Some(limit) if limit > 0 => Some(("MemorySwapMax", bytes(both.saturating_sub(limit).max(0)))),
            _ => None,
        }));
    }
    if let Some(cpu) = &resources.cpu {
        let weight = |shares: u64| 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142;
        found.extend(cpu.shares.filter(|n| *n != 0).map(|n| ("CPUWeight", Value::U64(weight(n)))));
        let period = cpu.period.filter(|n| *n != 0);
        found.extend(period.map(|n| ("CPUQuotaPeriodUSec", Value::U64(n))));
        found
            .extend(cpu.quota.filter(|n| *n != 0).map(|n| ("CPUQuotaPerSecUSec", quota(n, period.unwrap_or(100_000)))));
        for (name, list) in [("AllowedCPUs", &cpu.cpus), ("AllowedMemoryNodes", &cpu.mems)] {
            found.extend(list.as_deref().and_then(bits).map(|bits| (name, Value::Bytes(bits))));
        }
    }
    if let Some(limit) = resources.pids.as_ref().and_then(|p| p.limit) {
        found.push(("TasksMax", bytes(if limit > 0 { limit } else { -1 })));
    }
    found
}

/// Microseconds in each second; systemd keeps hundredths of a second.
fn quota(quota: i64, period: u64) -> Value {
    let Ok(quota) = u64::try_from(quota) else { return Value::U64(u64::MAX) };
    let each = quota.saturating_mul(1_000_000) / period;
    Value::U64(each.next_multiple_of(10_000))
}

/// `0-2,5` as systemd has it: a bit for each.
fn bits(list: &str) -> Option<Vec<u8>> {
    const MOST: usize = 8192;
    let mut bits = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last >= MOST {
            return None;
        }
        for n in first..=last {
            if bits.len() <= n / 8 {
                bits.resize(n / 8 + 1, 0);
            }
            *bits.get_mut(n / 8)? |= 1 << (n % 8);
        }
    }
    (!bits.is_empty()).then_some(bits)
}

/// On version 1 systemd writes the rules of its own again whenever it is reloaded, so it has to know these. It has no
/// word for taking one device out of many: there it knows the wider rule, and the group itself holds the narrower.
fn device_properties(rules: &[DeviceRule]) -> Vec<(&'static str, Value)> {
    // Rules before the last one for all devices do not count.
    let last = rules.iter().rposition(|r| r.kind.as_deref().is_none_or(|k| k == "a") && r.major.is_none_or(|n| n < 0));
    if rules.is_empty() || last.and_then(|at| rules.get(at)).is_none_or(|r| r.allow) {
        return vec![("DevicePolicy", Value::Text("auto".into())), ("DeviceAllow", Value::Pairs(Vec::new()))];
    }
    let numbers = std::fs::read_to_string("/proc/devices").unwrap_or_default();
    let allowed = rules.iter().skip(last.map_or(0, |at| at + 1)).filter(|r| r.allow);
    let pairs = allowed.filter_map(|r| Some((device(r, &numbers)?, access(&r.access))));
    vec![("DevicePolicy", Value::Text("strict".into())), ("DeviceAllow", Value::Pairs(pairs.collect()))]
}

fn access(text: &str) -> String {
    if text.is_empty() { "rwm".into() } else { text.to_owned() }
}

fn device(rule: &DeviceRule, numbers: &str) -> Option<String> {
    let kind = match rule.kind.as_deref() {
        Some("b") => "block",
        _ => "char",
    };
    let known = |n: Option<i64>| n.filter(|n| *n >= 0);
    match (known(rule.major), known(rule.minor)) {
        (None, _) => Some(format!("{kind}-*")),
        (Some(major), Some(minor)) => Some(format!("/dev/{kind}/{major}:{minor}")),
        // proc_devices(5): systemd knows groups of devices by the driver's name.
        (Some(major), None) => {
            let heading = if kind == "block" { "Block devices:" } else { "Character devices:" };
            let section = numbers.split_once(heading)?.1;
            let lines = section.lines().skip(1).take_while(|line| !line.trim().is_empty());
            let found = lines.filter_map(|line| line.trim().split_once(' ')).find(|(n, _)| *n == major.to_string())?;
            Some(format!("{kind}-{}", found.1.trim()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_three_parts() {
        for (path, slice, unit) in [
            ("machine.slice:libpod:3f", "machine.slice", "libpod-3f.scope"),
            ("system.slice:docker:3f", "system.slice", "docker-3f.scope"),
            (":cri:a_b", "system.slice", "cri-a_b.scope"),
            ("a-b.slice::x", "a-b.slice", "x.scope"),
            ("-.slice:p:n", "-.slice", "p-n.scope"),
        ] {
            let found = Scope::parse(path, "id").expect(path);
            assert_eq!((found.slice.as_str(), found.unit.as_str()), (slice, unit));
        }
        assert_eq!(Scope::parse("", "c1").expect("default").unit, "atoll-c1.scope");
        let long = format!("a.slice:p:{}", "x".repeat(300));
        for bad in [
            "/x",
            "a:b",
            "a:b:c:d",
            "machine:p:n",
            "a/b.slice:p:n",
            "a.slice:p:",
            "a.slice:p:n\n",
            "a.slice:p:n.slice",
            &long,
        ] {
            assert!(Scope::parse(bad, "id").is_err_and(|e| e.to_string().contains("linux.cgroupsPath")), "{bad}");
        }
    }

    #[test]
    fn limits_in_systemds_terms() {
        let of = |text: serde_json::Value| limits(&serde_json::from_value(text).expect("parses"));
        let found = of(json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 10}, "pids": {"limit": 7},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1,9"}}));
        let expected = [
            ("MemoryMax", Value::U64(1000)),
            ("MemoryLow", Value::U64(10)),
            ("MemorySwapMax", Value::U64(500)),
            ("CPUWeight", Value::U64(39)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            ("CPUQuotaPerSecUSec", Value::U64(500_000)),
            ("AllowedCPUs", Value::Bytes(vec![3, 2])),
            ("TasksMax", Value::U64(7)),
        ];
        assert_eq!(found, expected);
        let none = of(json!({"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": 0}}));
        assert!(none.iter().all(|(_, value)| *value == Value::U64(u64::MAX)) && none.len() == 4, "{none:?}");
        assert_eq!(of(json!({})), []);
        for bad in ["", "x", "1-", "99999999", "0-99999999999999999999"] {
            assert_eq!(bits(bad), None, "{bad}");
        }
    }

    #[test]
    fn devices_in_systemds_terms() {
        let numbers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n";
        let rule = |kind: &str, major, minor| DeviceRule {
            allow: true,
            kind: Some(kind.into()),
            major,
            minor,
            access: "rw".into(),
        };
        assert_eq!(device(&rule("c", Some(1), Some(3)), numbers).as_deref(), Some("/dev/char/1:3"));
        assert_eq!(device(&rule("c", Some(136), None), numbers).as_deref(), Some("char-pts"));
        assert_eq!(device(&rule("b", Some(8), Some(-1)), numbers).as_deref(), Some("block-sd"));
        assert_eq!(device(&rule("b", None, None), numbers).as_deref(), Some("block-*"));
        assert_eq!(device(&rule("b", Some(136), None), numbers), None);
        let deny = DeviceRule { access: "rwm".into(), ..Default::default() };
        let found = device_properties(&[deny, rule("c", Some(1), Some(3))]);
        assert_eq!(
            found,
            [
                ("DevicePolicy", Value::Text("strict".into())),
                ("DeviceAllow", Value::Pairs(vec![("/dev/char/1:3".into(), "rw".into())])),
            ]
        );
    }
}
