//! `update`: other limits for a container that runs.

use super::Context;
use super::args::{Args, only_id};
use super::record::{Home, MAX_CONFIG, Status, read_limited};
use crate::error::{During, Error, Result};
use crate::spec::{BlockIo, Cpu, Memory, Pids, Resources};
use std::io::Read;
use std::path::Path;

const VALUES: &[&str] = &[
    "resources",
    "r",
    "blkio-weight",
    "cpu-period",
    "cpu-quota",
    "cpu-burst",
    "cpu-share",
    "cpu-rt-period",
    "cpu-rt-runtime",
    "cpuset-cpus",
    "cpuset-mems",
    "cpu-idle",
    "memory",
    "memory-reservation",
    "memory-swap",
    "pids-limit",
    "kernel-memory",
    "kernel-memory-tcp",
];

pub fn update(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, VALUES, &[])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let _lock = home.lock()?;
    let record = home.load()?;
    if home.status(&record) == Status::Stopped {
        return Err(Error::NotRunning(record.id));
    }
    let resources = match args.get("resources").or(args.get("r")) {
        Some(path) => from_file(path)?,
        None => from_flags(&args)?,
    };
    let cgroup =
        record.cgroup()?.ok_or_else(|| Error::Refused("this container has no control group, so no limits".into()))?;
    if let Some(unit) = &record.scope {
        crate::systemd::update(unit, &resources)?;
    }
    cgroup.set_devices(&resources.devices, None)?;
    // Nobody asked for what cannot be set in vain.
    match cgroup.set(&resources)?.as_slice() {
        [] => Ok(0),
        warnings => Err(Error::Refused(warnings.join("; "))),
    }
}

fn from_file(path: &str) -> Result<Resources> {
    let text = if path == "-" {
        let mut text = Vec::new();
        std::io::stdin().take(MAX_CONFIG).read_to_end(&mut text).during(|| "reading standard input".into())?;
        text
    } else {
        read_limited(Path::new(path), MAX_CONFIG)?
    };
    serde_json::from_slice(&text).map_err(|e| Error::Refused(format!("--resources {path}: {e}")))
}

fn from_flags(args: &Args) -> Result<Resources> {
    let text = |name: &str| args.get(name).filter(|t| !t.is_empty()).map(str::to_owned);
    let bytes = |name: &str| args.get(name).map(|t| size(name, t)).transpose();
    let mut resources = Resources {
        memory: Some(Memory {
            limit: bytes("memory")?,
            reservation: bytes("memory-reservation")?,
            swap: bytes("memory-swap")?,
            kernel: bytes("kernel-memory")?,
            kernel_tcp: bytes("kernel-memory-tcp")?,
            ..Default::default()
        }),
        cpu: Some(Cpu {
            shares: args.number("cpu-share")?,
            quota: args.number("cpu-quota")?,
            period: args.number("cpu-period")?,
            burst: args.number("cpu-burst")?,
            realtime_runtime: args.number("cpu-rt-runtime")?,
            realtime_period: args.number("cpu-rt-period")?,
            cpus: text("cpuset-cpus"),
            mems: text("cpuset-mems"),
            idle: args.number("cpu-idle")?,
        }),
        pids: args.number("pids-limit")?.map(|limit| Pids { limit: Some(limit) }),
        ..Default::default()
    };
    if let Some(weight) = args.number("blkio-weight")? {
        resources.block_io = Some(BlockIo { weight: Some(weight), ..Default::default() });
    }
    Ok(resources)
}

/// Bytes, with `k`, `m`, `g` or `t` behind for binary multiples; -1 for no limit.
fn size(name: &str, text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let plain = lower.trim_end_matches('b').trim_end_matches('i');
    let (digits, shift) = match plain.as_bytes().last() {
        Some(b'k') => (plain.trim_end_matches('k'), 10),
        Some(b'm') => (plain.trim_end_matches('m'), 20),
        Some(b'g') => (plain.trim_end_matches('g'), 30),
        Some(b't') => (plain.trim_end_matches('t'), 40),
        _ => (plain, 0),
    };
    let number: Option<i64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|n| *n >= -1)
        .ok_or_else(|| Error::Refused(format!("--{name}: {text:?}: bytes, as 1048576, 512m, 2g or -1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("-1", -1), ("1024", 1024), ("4k", 4096), ("2M", 2 << 20), ("1g", 1 << 30), ("1GiB", 1 << 30)]
        {
            assert_eq!(size("memory", text).ok(), Some(bytes), "{text}");
        }
        for bad in ["", "x", "1.5g", "-2", "9999999999t"] {
            assert!(size("memory", bad).is_err(), "{bad}");
        }
    }
}
