//! Commands about a container that is there.

use super::args::{Args, only_id};
use super::record::{Home, Record, Status};
use super::{Context, print};
use crate::error::{During, Error, Result};
use crate::hooks;
use crate::spec::Hooks;
use crate::sys;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use std::fmt::Write;
use std::os::fd::AsFd;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

pub fn start(context: &Context, args: &[String]) -> Result<i32> {
    let (_, rest) = Args::parse(args, &[], &[])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let lock = home.lock()?;
    let record = home.load()?;
    match home.status(&record) {
        Status::Created => {}
        status @ (Status::Creating | Status::Running | Status::Paused | Status::Stopped) => {
            return Err(Error::Refused(format!("cannot start a container that is {}", status.name())));
        }
    }
    let fifo = home.fifo();
    let what = || format!("starting {}", record.id);
    // Fails where nobody waits any more.
    let writer = open(&fifo, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).during(what)?;
    rustix::io::write(&writer, &[1]).during(what)?;
    std::fs::remove_file(&fifo).during(what)?;
    drop(lock);
    // The other end closes when the program is executed, or when that has failed.
    while matches!(poll(&mut [PollFd::new(&writer, PollFlags::empty())], None), Err(rustix::io::Errno::INTR)) {}
    if let Some(hooks) = home.spec()?.hooks
        && let Err(e) = hooks::run("poststart", &hooks.poststart, &record.state(Status::Running))
    {
        context.notices.warning(&e.to_string());
    }
    Ok(0)
}

pub fn state(context: &Context, args: &[String]) -> Result<i32> {
    let (_, rest) = Args::parse(args, &[], &[])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let record = home.load()?;
    let mut state = serde_json::to_value(record.state(home.status(&record))).unwrap_or_default();
    if let Some(fields) = state.as_object_mut() {
        fields.insert("rootfs".into(), json!(record.rootfs));
        fields.insert("created".into(), json!(record.created));
        fields.insert("owner".into(), json!(record.owner));
    }
    Ok(print(&format!("{state:#}\n")))
}

pub fn kill(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, &[], &["all", "a"])?;
    let (id, rest) = rest.split_first().ok_or_else(|| Error::Refused("a container's id is missing".into()))?;
    let signal = signal(rest.first().map_or("TERM", String::as_str))?;
    let home = Home::at(&context.root, id)?;
    let record = home.load()?;
    let cgroup = record.cgroup()?;
    let stopped = home.status(&record) == Status::Stopped;
    if args.has("all") || args.has("a") {
        if let Some(cgroup) = &cgroup {
            for pid in cgroup.pids() {
                send(pid as u32, signal);
            }
        }
        return Ok(0);
    }
    if stopped {
        return Err(Error::Refused("container not running".into()));
    }
    let raw = Pid::from_raw(record.pid as i32).ok_or_else(|| Error::NotRunning(id.clone()))?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty()).during(|| format!("container {id}"))?;
    // Looked at again: the number may have been given to another process in between.
    if home.status(&record) == Status::Stopped {
        return Err(Error::Refused("container not running".into()));
    }
    sys::send_signal(pidfd.as_fd(), signal).during(|| format!("signal {signal} to {id}"))?;
    if signal == libc::SIGKILL
        && let Some(cgroup) = &cgroup
        && cgroup.is_frozen()
    {
        // A version 1 freezer keeps even this signal waiting.
        cgroup.thaw();
    }
    Ok(0)
}

fn send(pid: u32, signal: i32) {
    if let Some(pidfd) = Pid::from_raw(pid as i32).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok()) {
        let _ = sys::send_signal(pidfd.as_fd(), signal);
    }
}

/// A number, or a name with or without `SIG`.
fn signal(text: &str) -> Result<i32> {
    const NAMES: &[&str] = &[
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    if let Ok(number) = text.parse::<i32>()
        && (0..=64).contains(&number)
    {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |base: i32, rest: &str, sign: i32| match rest {
        "" => Some(base),
        rest => rest.get(1..)?.parse::<i32>().ok().map(|n| base + sign * n).filter(|n| (34..=64).contains(n)),
    };
    let found = NAMES.iter().position(|n| *n == name).map(|n| n as i32 + 1);
    found
        .or_else(|| name.strip_prefix("RTMIN").and_then(|rest| real_time(34, rest, 1)))
        .or_else(|| name.strip_prefix("RTMAX").and_then(|rest| real_time(64, rest, -1)))
        .ok_or_else(|| Error::Refused(format!("signal {text:?}: no such signal")))
}

pub fn delete(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, &[], &["force", "f"])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let force = args.has("force") || args.has("f");
    let _lock = match home.lock() {
        Err(_) if force => return Ok(0),
        other => other?,
    };
    let record = match home.load() {
        Ok(record) => record,
        // Its making was interrupted: there is only the directory.
        Err(_) => return home.remove().map(|()| 0),
    };
    match home.status(&record) {
        Status::Stopped | Status::Creating | Status::Created => {}
        status @ (Status::Running | Status::Paused) if !force => {
            return Err(Error::Refused(format!(
                "cannot delete container {} that is not stopped: {}",
                record.id,
                status.name()
            )));
        }
        Status::Running | Status::Paused => {}
    }
    remove(context, &home)?;
    Ok(0)
}

/// Ends what is left of it, and removes every trace.
pub fn remove(context: &Context, home: &Home) -> Result<()> {
    let record = home.load()?;
    let spec = home.spec();
    end(home, &record)?;
    clear(context, home, &record, spec?.hooks.as_ref())
}

/// The same for one whose first process has ended.
pub fn clear(context: &Context, home: &Home, record: &Record, hooks: Option<&Hooks>) -> Result<()> {
    // A scope that loses its group to others is one whose end systemd does not hear of.
    let left = record.cgroup()?.filter(|c| record.scope.is_some() || !c.remove_empty());
    if left.as_ref().is_some_and(|cgroup| !cgroup.kill(PATIENCE)) {
        return Err(Error::Refused(format!("container {}: processes that cannot be killed are left", record.id)));
    }
    if let Some(unit) = &record.scope {
        crate::systemd::stop(unit)?;
    }
    if let Some(cgroup) = left {
        cgroup.remove(PATIENCE)?;
    }
    home.remove()?;
    if let Some(hooks) = hooks
        && let Err(e) = hooks::run("poststop", &hooks.poststop, &record.state(Status::Stopped))
    {
        context.notices.warning(&e.to_string());
    }
    Ok(())
}

/// Kills the first process, if it lives, and waits for its end.
fn end(home: &Home, record: &Record) -> Result<()> {
    let Some(raw) = Pid::from_raw(record.pid as i32) else { return Ok(()) };
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return Ok(()) };
    if home.status(record) == Status::Stopped {
        return Ok(());
    }
    let _ = sys::send_signal(pidfd.as_fd(), libc::SIGKILL);
    if let Some(cgroup) = record.cgroup()? {
        cgroup.thaw();
    }
    let limit = rustix::event::Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).during(|| "waiting".into())?;
    if ended == 0 {
        return Err(Error::Refused(format!("container {}: does not die within {PATIENCE:?}", record.id)));
    }
    Ok(())
}

pub fn list(context: &Context, args: &[String]) -> Result<i32> {
    let (args, _) = Args::parse(args, &["format", "f"], &["quiet", "q"])?;
    let mut records = Vec::new();
    for entry in std::fs::read_dir(&context.root).into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().map(str::to_owned) else { continue };
        // Others come and go meanwhile.
        if let Ok(home) = Home::at(&context.root, &id)
            && let Ok(record) = home.load()
        {
            let status = home.status(&record);
            records.push((record, status));
        }
    }
    records.sort_by(|a, b| a.0.id.cmp(&b.0.id));
    let pid = |record: &Record, status| if status == Status::Stopped { 0 } else { record.pid };
    if args.has("quiet") || args.has("q") {
        return Ok(print(&records.iter().map(|(r, _)| format!("{}\n", r.id)).collect::<String>()));
    }
    match args.get("format").or(args.get("f")) {
        Some("json") => {
            let list: Vec<_> = records
                .iter()
                .map(|(r, status)| {
                    json!({"ociVersion": hooks::OCI_VERSION, "id": r.id, "pid": pid(r, *status), "status": status.name(),
                        "bundle": r.bundle, "rootfs": r.rootfs, "created": r.created, "owner": r.owner, "annotations": r.annotations})
                })
                .collect();
            Ok(print(&format!("{}\n", json!(list))))
        }
        None | Some("table") => {
            let mut text =
                format!("{:<24} {:<8} {:<9} {:<30} {:<8} BUNDLE\n", "ID", "PID", "STATUS", "CREATED", "OWNER");
            for (r, status) in &records {
                let (pid, status) = (pid(r, *status), status.name());
                let bundle = r.bundle.display();
                let _ = writeln!(text, "{:<24} {pid:<8} {status:<9} {:<30} {:<8} {bundle}", r.id, r.created, r.owner);
            }
            Ok(print(&text))
        }
        Some(other) => Err(Error::Refused(format!("--format: {other:?}: table or json"))),
    }
}

pub fn ps(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, &["format", "f"], &[])?;
    let (id, options) = rest.split_first().ok_or_else(|| Error::Refused("a container's id is missing".into()))?;
    let record = Home::at(&context.root, id)?.load()?;
    let pids = match record.cgroup()? {
        Some(cgroup) => cgroup.pids(),
        None => vec![record.pid as i32],
    };
    match args.get("format").or(args.get("f")) {
        Some("json") => return Ok(print(&format!("{}\n", json!(pids)))),
        None | Some("table") => {}
        Some(other) => return Err(Error::Refused(format!("--format: {other:?}: table or json"))),
    }
    let mut command = std::process::Command::new("ps");
    let output = if options.is_empty() { command.arg("-ef") } else { command.args(options) }
        .output()
        .during(|| "executing ps (package procps)".into())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let header = text.lines().next().unwrap_or_default();
    let Some(column) = header.split_ascii_whitespace().position(|word| word == "PID") else {
        return Err(Error::Refused("ps: these options leave the column PID out".into()));
    };
    let of_container = |line: &&str| {
        let pid = line.split_ascii_whitespace().nth(column).and_then(|word| word.parse::<i32>().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    };
    let lines: String = text.lines().filter(of_container).map(|line| format!("{line}\n")).collect();
    Ok(print(&format!("{header}\n{lines}")))
}

pub fn pause(context: &Context, args: &[String]) -> Result<i32> {
    let (_, rest) = Args::parse(args, &[], &[])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let _lock = home.lock()?;
    let record = home.load()?;
    match home.status(&record) {
        Status::Created | Status::Running => {}
        status @ (Status::Creating | Status::Paused | Status::Stopped) => {
            return Err(Error::Refused(format!("cannot pause a container that is {}", status.name())));
        }
    }
    let cgroup = record.cgroup()?;
    cgroup.ok_or_else(|| Error::Refused("without a control group there is no pause".into()))?.freeze_whole(PATIENCE)?;
    Ok(0)
}

pub fn resume(context: &Context, args: &[String]) -> Result<i32> {
    let (_, rest) = Args::parse(args, &[], &[])?;
    let home = Home::at(&context.root, only_id(rest)?)?;
    let _lock = home.lock()?;
    let record = home.load()?;
    if home.status(&record) != Status::Paused {
        return Err(Error::Refused("container not paused".into()));
    }
    if let Some(cgroup) = record.cgroup()? {
        cgroup.thaw();
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_number_and_name() {
        for (text, number) in
            [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("sigwinch", 28), ("RTMIN+3", 37), ("SIGRTMAX", 64), ("0", 0)]
        {
            assert_eq!(signal(text).ok(), Some(number), "{text}");
        }
        for bad in ["", "SIG", "65", "-1", "RTMIN+99", "NOPE"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }
}
