//! `events`: what a container uses, as lines of JSON.

use super::Context;
use super::args::{Args, only_id};
use super::record::{Home, Record, Status};
use crate::cgroup::Cgroup;
use crate::error::{During, Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

pub fn events(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, &["interval"], &["stats"])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let record = home.load()?;
    let cgroup = record
        .cgroup()?
        .ok_or_else(|| Error::Refused("this container has no control group, so nothing is counted".into()))?;
    let interval = interval(args.get("interval").unwrap_or("5s"))?;
    if home.status(&record) == Status::Stopped {
        return Err(Error::NotRunning(record.id));
    }
    if args.has("stats") {
        return write(&stats(&record, &cgroup)).map(|()| 0);
    }
    let raw = Pid::from_raw(record.pid as i32).ok_or_else(|| Error::NotRunning(record.id.clone()))?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty()).during(|| format!("container {}", record.id))?;
    let mut kills = cgroup.oom_kills();
    let limit = Timespec { tv_sec: interval.as_secs() as i64, tv_nsec: i64::from(interval.subsec_nanos()) };
    loop {
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Ok(0) => write(&stats(&record, &cgroup))?,
            Ok(_) => return Ok(0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::step("waiting", e)),
        }
        if cgroup.oom_kills() > kills {
            kills = cgroup.oom_kills();
            write(&json!({"type": "oom", "id": record.id}))?;
        }
    }
}

fn write(value: &Value) -> Result<()> {
    writeln!(std::io::stdout(), "{value}").during(|| "standard output".into())
}

fn stats(record: &Record, cgroup: &Cgroup) -> Value {
    let now = cgroup.stats();
    json!({
        "type": "stats",
        "id": record.id,
        "data": {
            "cpu": {"usage": {"total": now.cpu_nanos}},
            "memory": {"usage": {"usage": now.memory_bytes, "limit": cgroup.memory_limit()}, "cache": now.memory_bytes.saturating_sub(now.memory_working_set)},
            "pids": {"current": now.pids},
        },
    })
}

/// As Go writes durations: `500ms`, `5s`, `1m`.
fn interval(text: &str) -> Result<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(millis?))
        .filter(|n| *n > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| Error::Refused(format!("--interval: {text:?}: as 500ms, 5s or 1m, above zero")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(interval("500ms").ok(), Some(Duration::from_millis(500)));
        assert_eq!(interval("2m").ok(), Some(Duration::from_secs(120)));
        for bad in ["", "5", "0s", "s", "1d", "99999999999999999999s"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
