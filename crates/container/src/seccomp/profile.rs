//! `linux.seccomp` of a configuration as a filter: every action, every comparison.

use super::bpf::{self, Action};
use super::numbers;
use crate::error::{Error, Result};
use crate::spec::{Seccomp, SeccompArg, SeccompRule};
use crate::sys::{self, Instruction};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// The kernel takes no longer program.
const MAX_INSTRUCTIONS: usize = 4096;
/// Bounds what a hostile configuration can make of this process.
const MAX_RULES: usize = 65_536;

/// Actions and the names the specification gives them.
pub const ACTIONS: &[(&str, u32)] = &[
    ("SCMP_ACT_KILL", RET_KILL_THREAD),
    ("SCMP_ACT_KILL_PROCESS", RET_KILL_PROCESS),
    ("SCMP_ACT_KILL_THREAD", RET_KILL_THREAD),
    ("SCMP_ACT_TRAP", RET_TRAP),
    ("SCMP_ACT_ERRNO", RET_ERRNO),
    ("SCMP_ACT_TRACE", RET_TRACE),
    ("SCMP_ACT_ALLOW", RET_ALLOW),
    ("SCMP_ACT_LOG", RET_LOG),
    ("SCMP_ACT_NOTIFY", RET_USER_NOTIF),
];

pub const OPERATORS: &[&str] =
    &["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];

/// `SECCOMP_FILTER_FLAG_*`; the listener's is set where a rule needs it. TSYNC means nothing to one thread.
pub const FLAGS: &[(&str, u64)] = &[
    ("SECCOMP_FILTER_FLAG_TSYNC", 0),
    ("SECCOMP_FILTER_FLAG_LOG", 1 << 1),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", 1 << 2),
    ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", 1 << 5),
];

pub const ARCHITECTURES: &[&str] = if cfg!(target_arch = "x86_64") {
    &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
} else {
    &["SCMP_ARCH_AARCH64"]
};

/// Audit architecture number of 32-bit x86.
const I386: u32 = 0x4000_0003;

/// Ready to be loaded.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: u64,
    /// Some calls are handed on to a listener.
    pub notifies: bool,
}

impl Filter {
    pub fn of(program: Vec<Instruction>) -> Self {
        Self { program, flags: 0, notifies: false }
    }

    /// Returns the listener's descriptor where there is one.
    pub fn load(&self) -> Result<Option<OwnedFd>> {
        use crate::error::During;
        let what = || "loading the seccomp filter".to_owned();
        if self.notifies {
            return sys::load_filter_with_listener(&self.program, self.flags).during(what).map(Some);
        }
        sys::load_filter(&self.program, self.flags).during(what).map(|()| None)
    }
}

/// Rules for one system call: those with conditions in their order, then what holds without.
#[derive(Clone, Default)]
struct Call<'a> {
    conditional: Vec<(Vec<&'a SeccompArg>, u32)>,
    otherwise: Option<u32>,
}

pub fn compile(profile: &Seccomp) -> Result<Filter> {
    let default = action("defaultAction", &profile.default_action, profile.default_errno_ret)?;
    if default == RET_USER_NOTIF {
        return Err(Error::Refused(
            "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY can be an action of rules only".into(),
        ));
    }
    let mut flags = 0;
    for flag in &profile.flags {
        let known = FLAGS.iter().find(|(name, _)| name == flag);
        flags |= known.ok_or_else(|| Error::Refused(format!("linux.seccomp.flags: {flag:?}: no such flag")))?.1;
    }
    let calls = calls(profile)?;
    let notifies = calls
        .values()
        .any(|c| c.otherwise.iter().chain(c.conditional.iter().map(|(_, a)| a)).any(|a| *a == RET_USER_NOTIF));
    if notifies {
        check_notify(profile, &calls)?;
    }
    let of = |number: &dyn Fn(&str) -> Option<u32>| -> Vec<(u32, Action)> {
        let mut by_number = BTreeMap::new();
        for (name, call) in &calls {
            if let Some(number) = number(name) {
                by_number.insert(number, Action::Code(leaf(call, default)));
            }
        }
        by_number.into_iter().collect()
    };
    let past = if matches!(default, RET_ALLOW | RET_LOG) { default } else { RET_ERRNO | libc::ENOSYS as u32 };
    let plain = |ret| Action::Code(vec![bpf::ret(ret)]);
    let mut tables =
        vec![bpf::Table { arch: bpf::ARCH, rules: of(&numbers::number), last: numbers::LAST, past: plain(past) }];
    if cfg!(target_arch = "x86_64") && profile.architectures.iter().any(|a| a == "SCMP_ARCH_X86") {
        tables.push(bpf::Table { arch: I386, rules: of(&numbers::i386), last: numbers::LAST, past: plain(past) });
    }
    let program = bpf::assemble_all(&tables, &plain(default));
    if program.len() > MAX_INSTRUCTIONS {
        let why = format!(
            "linux.seccomp: makes a program of {} instructions; {MAX_INSTRUCTIONS} are possible",
            program.len()
        );
        return Err(Error::Refused(why));
    }
    Ok(Filter { program, flags, notifies })
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<u32> {
    let known = ACTIONS.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    let value = known.ok_or_else(|| Error::Refused(format!("linux.seccomp.{field}: {name:?}: no such action")))?;
    let takes_number = matches!(value, RET_ERRNO | RET_TRACE);
    match errno {
        Some(_) if !takes_number => Err(Error::Refused(format!(
            "linux.seccomp: errnoRet with {name}: only SCMP_ACT_ERRNO and SCMP_ACT_TRACE take one"
        ))),
        Some(errno) if errno > 0xffff => {
            Err(Error::Refused(format!("linux.seccomp: errnoRet {errno}: 65535 is the highest")))
        }
        Some(errno) => Ok(value | errno),
        None if takes_number => Ok(value | libc::EPERM as u32),
        None => Ok(value),
    }
}

fn calls(profile: &Seccomp) -> Result<BTreeMap<&str, Call<'_>>> {
    let mut calls: BTreeMap<&str, Call<'_>> = BTreeMap::new();
    if let Some(name) = profile.architectures.iter().find(|a| !a.starts_with("SCMP_ARCH_")) {
        return Err(Error::Refused(format!("linux.seccomp.architectures: {name:?}: no such architecture")));
    }
    let total: usize = profile.syscalls.iter().map(|r| r.names.len()).sum();
    if total > MAX_RULES {
        return Err(Error::Refused(format!("linux.seccomp.syscalls: {total} names; {MAX_RULES} are possible")));
    }
    for (n, rule) in profile.syscalls.iter().enumerate() {
        let action = action(&format!("syscalls[{n}].action"), &rule.action, rule.errno_ret)?;
        if rule.names.is_empty() {
            return Err(Error::Refused(format!("linux.seccomp.syscalls[{n}].names: is empty")));
        }
        for arg in &rule.args {
            check_arg(n, arg)?;
        }
        for name in &rule.names {
            let call = calls.entry(name.as_str()).or_default();
            if rule.args.is_empty() {
                call.otherwise = Some(action);
            } else {
                call.conditional.extend(alternatives(rule).into_iter().map(|conditions| (conditions, action)));
            }
        }
    }
    Ok(calls)
}

fn check_arg(n: usize, arg: &SeccompArg) -> Result<()> {
    if arg.index > 5 {
        return Err(Error::Refused(format!(
            "linux.seccomp.syscalls[{n}].args: index {}: 0 to 5 are possible",
            arg.index
        )));
    }
    if !OPERATORS.contains(&arg.op.as_str()) {
        return Err(Error::Refused(format!("linux.seccomp.syscalls[{n}].args: op {:?}: no such operator", arg.op)));
    }
    Ok(())
}

/// All conditions of a rule have to hold; but where several are about one argument, each is a rule of its own, as the
/// field's runtimes have it.
fn alternatives(rule: &SeccompRule) -> Vec<Vec<&SeccompArg>> {
    let mut seen = [0; 6];
    for arg in &rule.args {
        if let Some(count) = seen.get_mut(arg.index as usize) {
            *count += 1;
        }
    }
    if seen.iter().any(|count| *count > 1) {
        return rule.args.iter().map(|arg| vec![arg]).collect();
    }
    vec![rule.args.iter().collect()]
}

/// These are needed between the loading of the filter and the handing over of its listener.
fn check_notify(profile: &Seccomp, calls: &BTreeMap<&str, Call<'_>>) -> Result<()> {
    if profile.listener_path.is_none() {
        return Err(Error::Refused("linux.seccomp: SCMP_ACT_NOTIFY needs listenerPath".into()));
    }
    for name in ["sendmsg", "close"] {
        let asks = |c: &Call<'_>| {
            c.otherwise == Some(RET_USER_NOTIF) || c.conditional.iter().any(|(_, a)| *a == RET_USER_NOTIF)
        };
        if calls.get(name).is_some_and(asks) {
            return Err(Error::Refused(format!(
                "linux.seccomp: SCMP_ACT_NOTIFY cannot be used for {name}: the listener is handed over with it"
            )));
        }
    }
    Ok(())
}

fn leaf(call: &Call<'_>, default: u32) -> Vec<Instruction> {
    let mut code = Vec::new();
    for (conditions, action) in &call.conditional {
        code.extend(bpf::when(conditions.iter().map(|c| (c.index, c.op.as_str(), c.value, c.value_two)), *action));
    }
    code.push(bpf::ret(call.otherwise.unwrap_or(default)));
    code
}
