//! `exec`: another process in a container.

use super::args::Args;
use super::record::{Home, MAX_CONFIG, Record, Status, read_limited};
use super::{Context, foreground, run, validate};
use crate::error::{During, Error, Result};
use crate::process::Confinement;
use crate::runtime::{Join, Launch};
use crate::spec::{Capabilities, Process, Spec};
use crate::sys::SingleThreaded;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::AsFd;
use std::path::Path;

const VALUES: &[&str] = &[
    "process",
    "p",
    "user",
    "u",
    "additional-gids",
    "g",
    "cwd",
    "env",
    "e",
    "cap",
    "c",
    "pid-file",
    "console-socket",
    "preserve-fds",
    "process-label",
    "apparmor",
    "cgroup",
];
const SWITCHES: &[&str] = &["tty", "t", "detach", "d", "no-new-privs", "ignore-paused", "no-subreaper"];

struct Streams;

impl run::Owner for Streams {
    fn created(&mut self, _pid: u32, _launch: &Launch) -> Result<()> {
        Ok(())
    }

    fn mounted(&mut self, _pid: u32) -> Result<()> {
        Ok(())
    }
}

pub fn exec(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, VALUES, SWITCHES)?;
    let (id, command) = rest.split_first().ok_or_else(|| Error::Refused("a container's id is missing".into()))?;
    let home = Home::at(&context.root, id)?;
    let record = home.load()?;
    match home.status(&record) {
        Status::Stopped => return Err(Error::Refused("cannot exec in a stopped container".into())),
        Status::Paused if !args.has("ignore-paused") => {
            return Err(Error::Refused("cannot exec in a paused container (use --ignore-paused to override)".into()));
        }
        Status::Creating | Status::Created | Status::Running | Status::Paused => {}
    }
    let spec = home.spec()?;
    let mut process = process(&args, &spec, command)?;
    validate::process(&process.cwd, &process.args)?;
    let stays = !args.has("detach") && !args.has("d");
    run::check_console(process.terminal, stays, args.get("console-socket"))?;
    let preserved = run::preserved(args.number("preserve-fds")?, &mut process.env)?;
    let alone = SingleThreaded::prove().during(|| "starting".into())?;
    let front = if stays { Some(foreground::Front::prepare()?) } else { None };

    let raw = Pid::from_raw(record.pid as i32).ok_or_else(|| Error::NotRunning(id.clone()))?;
    let target = pidfd_open(raw, PidfdFlags::empty()).during(|| format!("container {id}"))?;
    let (namespaces, user_namespace) = differing(record.pid)?;
    let join = Join {
        process,
        confinement: Confinement { seccomp_unconfined: true, ..Default::default() },
        user_namespace,
        namespaces: Some(namespaces),
        seccomp: spec.linux.seccomp.clone(),
        preserved,
    };
    let cgroup = group(&record, &args)?;
    let mut launch = Launch::join(alone, cgroup.as_ref(), join, target.as_fd())?;
    let pid = run::follow(&mut launch, &mut Streams)?;
    run::tell(context, &launch.warnings);
    let terminal = launch.terminal.take();
    if let (Some(master), Some(path)) = (&terminal, args.get("console-socket")) {
        run::send_console(Path::new(path), master)?;
    }
    drop(launch);
    run::write_pid_file(args.get("pid-file"), pid)?;
    match front {
        Some(front) => front.wait(pid, terminal.filter(|_| args.get("console-socket").is_none())),
        None => Ok(0),
    }
}

fn group(record: &Record, args: &Args) -> Result<Option<crate::cgroup::Cgroup>> {
    let Some(cgroup) = record.cgroup()? else { return Ok(None) };
    match args.get("cgroup") {
        None => Ok(Some(cgroup)),
        Some(below) => cgroup.child(below.trim_matches('/')).map(Some),
    }
}

/// From `--process`, or the container's own with what the flags change.
fn process(args: &Args, spec: &Spec, command: &[String]) -> Result<Process> {
    if let Some(path) = args.get("process").or(args.get("p")) {
        let text = read_limited(Path::new(path), MAX_CONFIG)?;
        let mut process: Process =
            serde_json::from_slice(&text).map_err(|e| Error::Refused(format!("--process {path}: {e}")))?;
        process.terminal |= args.has("tty") || args.has("t");
        return Ok(process);
    }
    if command.is_empty() {
        return Err(Error::Refused("a command is missing: name one, or give --process".into()));
    }
    let mut process = spec.process.clone();
    process.args = command.to_vec();
    process.terminal = args.has("tty") || args.has("t");
    process.no_new_privileges |= args.has("no-new-privs");
    process.console_size = None;
    if let Some(cwd) = args.get("cwd") {
        process.cwd = cwd.into();
    }
    process.env.extend(args.all(&["env", "e"]).map(str::to_owned));
    if let Some(user) = args.get("user").or(args.get("u")) {
        let number = |text: &str| {
            text.parse::<u32>().map_err(|_| Error::Refused(format!("--user: {user:?}: numbers, UID or UID:GID")))
        };
        let (uid, gid) = user.split_once(':').map_or((user, None), |(uid, gid)| (uid, Some(gid)));
        process.user.uid = number(uid)?;
        process.user.gid = gid.map(number).transpose()?.unwrap_or(process.user.gid);
    }
    for text in args.all(&["additional-gids", "g"]) {
        let gid = text.parse().map_err(|_| Error::Refused(format!("--additional-gids: {text:?}: a number")))?;
        process.user.additional_gids.push(gid);
    }
    let more: Vec<&str> = args.all(&["cap", "c"]).collect();
    if !more.is_empty() {
        let sets = process.capabilities.get_or_insert_with(Capabilities::default);
        for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
            set.extend(more.iter().map(|c| (*c).to_owned()));
        }
    }
    if let Some(label) = args.get("process-label") {
        process.selinux_label = Some(label.into());
    }
    if let Some(profile) = args.get("apparmor") {
        process.apparmor_profile = Some(profile.into());
    }
    Ok(process)
}

/// `CLONE_NEW*` of the namespaces that are not this process's own, and whether the user namespace is among them.
fn differing(pid: u32) -> Result<(u32, bool)> {
    use std::os::unix::fs::MetadataExt;
    let mut bits = 0;
    let kinds = [
        ("mnt", libc::CLONE_NEWNS),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("uts", libc::CLONE_NEWUTS),
        ("ipc", libc::CLONE_NEWIPC),
        ("pid", libc::CLONE_NEWPID),
        ("net", libc::CLONE_NEWNET),
        ("time", libc::CLONE_NEWTIME),
        ("user", libc::CLONE_NEWUSER),
    ];
    for (name, flag) in kinds {
        let of = |path: String| std::fs::metadata(&path).map(|m| (m.dev(), m.ino())).during(|| path);
        if of(format!("/proc/{pid}/ns/{name}"))? != of(format!("/proc/self/ns/{name}"))? {
            bits |= flag as u32;
        }
    }
    Ok((bits, bits & libc::CLONE_NEWUSER as u32 != 0))
}
