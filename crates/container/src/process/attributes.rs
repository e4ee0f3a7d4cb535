//! What a process is besides its user and capabilities: scheduling, personality, security labels.

use crate::error::{During, Error, Result};
use crate::spec::{IoPriority, Personality, Process, Scheduler};
use crate::sys;
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::OwnedFd;

pub fn assume(process: &Process, personality: Option<&Personality>, warn: &mut dyn FnMut(String)) -> Result<()> {
    if let Some(wanted) = &process.scheduler {
        sys::set_scheduler(scheduler(wanted)?).during(|| format!("process.scheduler: {}", wanted.policy))?;
    }
    if let Some(wanted) = &process.io_priority {
        let class = io_class(wanted)?;
        sys::set_io_priority(class, wanted.priority.into())
            .during(|| format!("process.ioPriority: {} {}", wanted.class, wanted.priority))?;
    }
    if let Some(wanted) = personality {
        sys::set_personality(persona(wanted)?).during(|| format!("linux.personality: {}", wanted.domain))?;
    }
    if let Some(list) = process.exec_cpu_affinity.as_ref().and_then(|a| a.last.as_deref().or(a.initial.as_deref())) {
        let processors = processors(list)
            .ok_or_else(|| Error::Refused(format!("process.execCPUAffinity: {list:?}: not a list such as 0-3,7")))?;
        if let Err(e) = sys::set_affinity(&processors) {
            warn(format!("process.execCPUAffinity {list:?}: {e}"));
        }
    }
    Ok(())
}

/// The values that the specification names.
pub fn scheduler(wanted: &Scheduler) -> Result<sys::SchedAttr> {
    let policy = match wanted.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(Error::Refused(format!("process.scheduler.policy: {other:?}: no such policy"))),
    };
    let mut flags = 0;
    for flag in &wanted.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(Error::Refused(format!("process.scheduler.flags: {other:?}: no such flag"))),
        };
    }
    Ok(sys::SchedAttr {
        size: 0,
        policy,
        flags,
        nice: wanted.nice,
        priority: wanted.priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
    })
}

pub fn io_class(wanted: &IoPriority) -> Result<u32> {
    if wanted.priority > 7 {
        let why = format!("process.ioPriority.priority: {}: 0 to 7 are possible", wanted.priority);
        return Err(Error::Refused(why));
    }
    match wanted.class.as_str() {
        "IOPRIO_CLASS_RT" => Ok(1),
        "IOPRIO_CLASS_BE" => Ok(2),
        "IOPRIO_CLASS_IDLE" => Ok(3),
        other => Err(Error::Refused(format!("process.ioPriority.class: {other:?}: no such class"))),
    }
}

pub fn persona(wanted: &Personality) -> Result<u32> {
    if let Some(flag) = wanted.flags.first() {
        return Err(Error::Refused(format!("linux.personality.flags: {flag:?}: no flag is known")));
    }
    match wanted.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        other => Err(Error::Refused(format!("linux.personality.domain: {other:?}: LINUX or LINUX32"))),
    }
}

/// `0-3,7` as numbers.
pub fn processors(list: &str) -> Option<Vec<usize>> {
    const MOST: usize = 8192;
    let mut all = Vec::new();
    for part in list.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        if to >= MOST || from > to {
            return None;
        }
        all.extend(from..=to);
    }
    Some(all)
}

/// Descriptors that AppArmor and SELinux take the label of the next program on. Opened in the host's `/proc`: the
/// container's may be anything by then.
#[derive(Default)]
pub struct Labels {
    writes: Vec<(String, OwnedFd)>,
}

impl Labels {
    /// An error where a label is asked for that this host cannot set.
    pub fn open(process: &Process) -> Result<Self> {
        let mut labels = Self::default();
        let mut want = |field: &str, text: String, files: &[&str]| -> Result<()> {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let fd = files.iter().find_map(|file| open(*file, flags, Mode::empty()).ok()).ok_or_else(|| {
                Error::Refused(format!("process.{field}: this host has no such security module; leave the field out"))
            })?;
            labels.writes.push((text, fd));
            Ok(())
        };
        if let Some(profile) = process.apparmor_profile.as_deref().filter(|p| !p.is_empty()) {
            let there = std::path::Path::new("/sys/kernel/security/apparmor").exists();
            let files: &[&str] = if there { &["/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"] } else { &[] };
            want("apparmorProfile", format!("exec {profile}"), files)?;
        }
        if let Some(label) = process.selinux_label.as_deref().filter(|l| !l.is_empty()) {
            let there = std::path::Path::new("/sys/fs/selinux/enforce").exists();
            want("selinuxLabel", label.to_owned(), if there { &["/proc/self/attr/exec"] } else { &[] })?;
        }
        Ok(labels)
    }

    pub fn write(&self) -> Result<()> {
        for (text, fd) in &self.writes {
            rustix::io::write(fd, text.as_bytes()).during(|| format!("setting the security label {text:?}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(processors("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(processors("5"), Some(vec![5]));
        for bad in ["", "a", "3-1", "0-99999999", "1,,2"] {
            assert_eq!(processors(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_that_are_not_known_are_refused_by_name() {
        let wanted = Scheduler { policy: "SCHED_NONE".into(), ..Default::default() };
        assert!(scheduler(&wanted).expect_err("refused").to_string().contains("SCHED_NONE"));
        let wanted = IoPriority { class: "IOPRIO_CLASS_BE".into(), priority: 8 };
        assert!(io_class(&wanted).expect_err("refused").to_string().contains("0 to 7"));
        let wanted = Personality { domain: "LINUX".into(), flags: vec!["X".into()] };
        assert!(persona(&wanted).expect_err("refused").to_string().contains("\"X\""));
        let wanted = Scheduler { policy: "SCHED_BATCH".into(), nice: 3, ..Default::default() };
        assert!(scheduler(&wanted).is_ok_and(|a| a.policy == 3 && a.nice == 3));
    }
}
