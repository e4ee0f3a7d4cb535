//! From a process inside the container's namespaces to the container's program: limits, user, capabilities, seccomp,
//! and the search for the program. Shared by a container's first process and by those executed in it later.

use crate::error::{During, Error, Result};
use crate::seccomp::{self, Filter};
use crate::spec::{Capabilities, Personality, Process, Seccomp};
use crate::sys;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, set_capabilities, set_keep_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use serde::{Deserialize, Serialize};
use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

mod attributes;

pub use attributes::Labels;

/// What services, package managers and their scripts commonly need and no more, and nothing that reaches beyond a user
/// namespace; `NET_RAW`, `MKNOD` and `AUDIT_WRITE` of the usual default are left out.
pub const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `/etc/passwd` is the image's: look at so much of it at most.
const MAX_PASSWD: u64 = 1 << 20;

/// What confines a process besides its [`Process`].
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Confinement {
    /// Leave the default seccomp profile out.
    pub seccomp_unconfined: bool,
    /// Keep abstract Unix sockets of others out of reach: the network namespace is the host's.
    pub scope_abstract_sockets: bool,
}

/// What a process is put under besides what its [`Process`] says.
#[derive(Clone, Copy, Default)]
pub struct Constraints<'a> {
    pub confinement: Confinement,
    /// In place of the default profile.
    pub seccomp: Option<&'a Seccomp>,
    pub personality: Option<&'a Personality>,
    /// Descriptors from 3 on that the program inherits.
    pub preserved: u32,
    /// Where security labels are written: `/proc/self/attr/...` of the host, opened before the root is changed.
    pub labels: Option<&'a Labels>,
}

/// Everything the last steps need, looked up beforehand.
pub struct Ready {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    filter: Option<Filter>,
    preserved: u32,
    /// Who decides about system calls that the filter hands on.
    pub listener: Option<OwnedFd>,
}

/// Takes on the limits, the user and the capabilities of `process`, and finds its program. `warn` hears of limits that
/// could not be set.
pub fn assume(process: &Process, under: Constraints<'_>, warn: &mut dyn FnMut(String)) -> Result<Ready> {
    let Constraints { confinement, .. } = under;
    for limit in &process.rlimits {
        if let Err(why) = set_rlimit(&limit.kind, limit.soft, limit.hard) {
            warn(why);
        }
    }
    attributes::assume(process, under.personality, warn)?;
    let none = Capabilities::default();
    let capabilities = process.capabilities.as_ref().unwrap_or(&none);
    let mut filter = match under.seccomp {
        Some(profile) => Some(seccomp::compile(profile)?),
        None if confinement.seccomp_unconfined => None,
        None => Some(Filter::of(seccomp::default_filter(&capabilities.bounding))),
    };
    if confinement.scope_abstract_sockets && sys::scope_abstract_sockets().is_err() {
        warn("Landlock cannot keep the host's abstract sockets away here (Linux 6.12 can)".into());
    }
    // A listener has to be handed over while there is still somebody to take it.
    let listens = filter.as_ref().is_some_and(|f| f.notifies);
    let mut listener = None;
    if let Some(labels) = under.labels {
        labels.write()?;
    }
    if !process.no_new_privileges
        && let Some(filter) = filter.take()
    {
        // Without no_new_privs a filter may be loaded only as long as there is CAP_SYS_ADMIN.
        listener = filter.load()?;
    }
    become_user(process, capabilities)?;
    if let Some(mask) = process.user.umask {
        rustix::process::umask(Mode::from_raw_mode(mask & 0o777));
    }
    let cwd = if process.cwd.is_empty() { "/" } else { process.cwd.as_str() };
    rustix::process::chdir(cwd).map_err(|e| Error::Exec {
        code: 126,
        message: format!("working directory {cwd:?}: {}", io::Error::from(e)),
    })?;
    if rustix::process::getcwd(Vec::new()).is_ok_and(|path| !path.to_bytes().starts_with(b"/")) {
        return Err(Error::Refused(format!("working directory {cwd:?} lies outside of the container")));
    }
    if process.no_new_privileges {
        set_no_new_privs(true).during(|| "setting no_new_privs".into())?;
    }
    if listens && let Some(filter) = filter.take() {
        listener = filter.load()?;
    }
    let env = environment(process);
    let path = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let name = process.args.first().ok_or_else(|| Error::Refused("process.args is empty: nothing to run".into()))?;
    let program = find(name, path)?;
    let text = |s: &str| CString::new(s).map_err(|_| Error::Refused(format!("{s:?}: has a zero byte in it")));
    Ok(Ready {
        program,
        args: process.args.iter().map(|s| text(s)).collect::<Result<_>>()?,
        env: env.iter().map(|s| text(s)).collect::<Result<_>>()?,
        filter,
        preserved: under.preserved,
        listener,
    })
}

impl Ready {
    /// The last steps. Returns only with the reason why it failed.
    pub fn execute(mut self) -> Error {
        drop(self.listener.take());
        if let Err(e) = sys::close_on_exec_from(3 + self.preserved) {
            return Error::step("closing descriptors", e);
        }
        for fd in 3..3 + self.preserved {
            if let Err(e) = sys::inherit_fd(fd as i32) {
                return Error::step(format!("preserving descriptor {fd}"), e);
            }
        }
        sys::reset_signals();
        if let Some(filter) = self.filter.take()
            && let Err(e) = filter.load()
        {
            return e;
        }
        explain(&self.program, sys::execve(&self.program, &self.args, &self.env))
    }
}

fn explain(program: &CStr, error: io::Error) -> Error {
    let name = program.to_string_lossy();
    let (code, why) = match error.raw_os_error() {
        Some(libc::ENOENT) => (127, "no such file or directory (is the interpreter it names in the image?)".to_owned()),
        Some(libc::ENOEXEC) => (126, "exec format error (is the image for another architecture?)".to_owned()),
        Some(libc::EACCES) => (126, "permission denied".to_owned()),
        _ => (126, error.to_string()),
    };
    Error::Exec { code, message: format!("exec: {name:?}: {why}") }
}

/// The environment as given, with HOME from the image's `/etc/passwd` if it is not set.
fn environment(process: &Process) -> Vec<String> {
    let mut env = process.env.clone();
    let has = |env: &[String], name: &str| env.iter().any(|e| e.strip_prefix(name).is_some_and(|r| r.starts_with('=')));
    if !has(&env, "PATH") {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has(&env, "HOME") {
        env.push(format!("HOME={}", home(process.user.uid).unwrap_or_else(|| "/".into())));
    }
    env
}

fn home(uid: u32) -> Option<String> {
    let mut text = String::new();
    fs::File::open("/etc/passwd").ok()?.take(MAX_PASSWD).read_to_string(&mut text).ok()?;
    let wanted = uid.to_string();
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&wanted.as_str())).then(|| fields.get(5).map(|h| (*h).to_owned())).flatten()
    })
}

/// Finds a program as a shell does; says what is wrong in the words that users of other runtimes know.
fn find(name: &str, path: &str) -> Result<CString> {
    let refuse = |code, why: &str| Error::Exec { code, message: format!("exec: {name:?}: {why}") };
    let program = if name.contains('/') {
        match fs::metadata(name) {
            Ok(meta) if meta.is_dir() => return Err(refuse(126, "is a directory")),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(refuse(126, "permission denied")),
            Err(e) => {
                let why = if e.kind() == io::ErrorKind::NotFound {
                    "no such file or directory".into()
                } else {
                    e.to_string()
                };
                return Err(refuse(127, &format!("stat {name}: {why}")));
            }
        }
        PathBuf::from(name)
    } else {
        let executable = |p: &Path| fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if name.is_empty() {
            return Err(refuse(127, "executable file not found in $PATH"));
        }
        path.split(':')
            .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
            .find(|candidate| executable(candidate))
            .ok_or_else(|| refuse(127, "executable file not found in $PATH"))?
    };
    CString::new(program.into_os_string().into_encoded_bytes()).map_err(|_| refuse(127, "has a zero byte in it"))
}

fn become_user(process: &Process, capabilities: &Capabilities) -> Result<()> {
    let set = |names: &[String]| -> Result<CapabilitySet> {
        names.iter().try_fold(CapabilitySet::empty(), |set, name| {
            let bit = capability(name).ok_or_else(|| Error::Refused(format!("{name}: no such capability")))?;
            Ok(set | CapabilitySet::from_bits_retain(1 << bit))
        })
    };
    let here = rustix::thread::capabilities(None).during(|| "reading capabilities".into())?;
    let bounding = set(&capabilities.bounding)?;
    for bit in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if !bounding.contains(one) {
            // EINVAL marks the end of what this kernel knows.
            match rustix::thread::remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => break,
                Err(e) => return Err(Error::step(format!("dropping capability {bit}"), e)),
            }
        }
    }
    let user = &process.user;
    set_keep_capabilities(true).during(|| "keeping capabilities".into())?;
    let groups: Vec<Gid> = user.additional_gids.iter().map(|g| Gid::from_raw(*g)).collect();
    match set_thread_groups(&groups) {
        // Not to be had in a user namespace that a plain user made (user_namespaces(7)).
        Err(rustix::io::Errno::PERM) if groups.is_empty() => {}
        other => other.during(|| format!("setgroups {:?}", user.additional_gids))?,
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_res_gid(gid, gid, gid).during(|| format!("setgid {}", user.gid))?;
    set_thread_res_uid(uid, uid, uid).during(|| format!("setuid {}", user.uid))?;
    // What the host itself does not have cannot be given on.
    let permitted = set(&capabilities.permitted)? & here.permitted;
    let sets = CapabilitySets {
        effective: set(&capabilities.effective)? & permitted,
        permitted,
        inheritable: set(&capabilities.inheritable)? & (here.permitted | here.inheritable),
    };
    set_capabilities(None, sets).during(|| "setting capabilities".into())?;
    let _ = rustix::thread::clear_ambient_capability_set();
    for bit in (set(&capabilities.ambient)? & sets.permitted & sets.inheritable).iter() {
        rustix::thread::configure_capability_in_ambient_set(bit, true)
            .during(|| "raising ambient capabilities".into())?;
    }
    Ok(())
}

fn set_rlimit(kind: &str, soft: u64, hard: u64) -> std::result::Result<(), String> {
    let resource = match kind {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return Err(format!("{kind}: no such limit")),
    };
    let limit = |value: u64| (value != u64::MAX).then_some(value);
    if setrlimit(resource, Rlimit { current: limit(soft), maximum: limit(hard) }).is_ok() {
        return Ok(());
    }
    // Without CAP_SYS_RESOURCE the hard limit can only go down: take what there is.
    let ceiling = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
    let (soft, hard) = (soft.min(ceiling), hard.min(ceiling));
    let lowered = Rlimit { current: limit(soft), maximum: limit(hard) };
    setrlimit(resource, lowered).map_err(|e| format!("{kind}: cannot set {soft}: {e}"))?;
    Err(format!("{kind}: set to {soft}, the most this host allows"))
}

/// The number of a capability by its name.
pub fn capability(name: &str) -> Option<u32> {
    CAPABILITIES.iter().position(|known| name.strip_prefix("CAP_") == Some(known)).map(|n| n as u32)
}

/// `CAP_*` names of every capability.
pub fn all_capabilities() -> Vec<String> {
    CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect()
}

/// In the order of their numbers, from 0 (`linux/capability.h`).
const CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let missing = find("no-such-program", "/bin:/usr/bin").expect_err("missing");
        assert_eq!(missing.to_string(), r#"exec: "no-such-program": executable file not found in $PATH"#);
        assert!(matches!(missing, Error::Exec { code: 127, .. }));
        assert!(matches!(find("/", ""), Err(Error::Exec { code: 126, .. })));
        assert!(matches!(find("/no/such", ""), Err(Error::Exec { code: 127, .. })));
        assert!(find("sh", "/nowhere:/bin").is_ok_and(|p| p.as_bytes() == b"/bin/sh"));
        assert!(find("", "/bin").is_err());
    }

    #[test]
    fn capabilities_have_their_kernel_numbers() {
        assert_eq!(capability("CAP_CHOWN"), Some(0));
        assert_eq!(capability("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(capability("CAP_SYS_RESOURCE"), Some(24));
        assert_eq!(capability("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(capability("SYS_ADMIN"), None);
    }
}
