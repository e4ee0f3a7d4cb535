//! The sandbox of a build's `RUN`: a shim and one container in it, as a pod has, with ids, namespaces and control group of
//! its own, and no network unless the build was given the host's.

use container::client::{self, Client};
use container::process::Confinement;
use container::shim::protocol::{Network, Phase, Sandbox, Start};
use container::spec::{
    self as oci, Capabilities, IdMapping, Linux, Memory, Pids, Process, Resources, Root, Spec, User,
};
use image::{Error, Executor, MountSource, Result, RunEnd, RunSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Gid, Mode, OFlags, Uid, flock};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The last range of user ids but one: above those that pods are given.
const ID_BASE: u32 = 0xfffe_0000;
const RANGE: u32 = 65_536;
const PIDS: i64 = 16_384;
const NAME: &str = "build";
/// Between two looks at the output and at whether the user has enough.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
pub struct Sandboxes {
    exe: PathBuf,
    /// Of the instance: sandboxes are `build-*` in it.
    run_dir: PathBuf,
    cgroup: PathBuf,
    pub cancelled: AtomicBool,
}

impl Sandboxes {
    pub fn new(exe: PathBuf, run_dir: PathBuf) -> Self {
        let cgroup = Path::new("atoll").join(run_dir.file_name().unwrap_or_default());
        Sandboxes { exe, run_dir, cgroup, cancelled: AtomicBool::new(false) }
    }

    /// Ends what builds that were killed left.
    pub fn sweep(&self) {
        for entry in fs::read_dir(&self.run_dir).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with("build-") {
                continue;
            }
            let Ok(held) = open_dir(&entry.path()) else { continue };
            if flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            // Its own files are in the image store, which collects them.
            let nowhere = entry.path().join("none");
            match client::destroy(&self.cgroup.join(&name), &nowhere, &entry.path()) {
                Ok(()) => remove_private(&entry.path(), &name),
                Err(e) => tracing::warn!(sandbox = name, error = %e, "a build's sandbox is left"),
            }
        }
    }
}

/// One sandbox, ended when dropped.
struct Held {
    name: String,
    cgroup: PathBuf,
    dir: PathBuf,
    run_dir: PathBuf,
    _lock: OwnedFd,
}

impl Drop for Held {
    fn drop(&mut self) {
        match client::destroy(&self.cgroup, &self.dir, &self.run_dir) {
            Ok(()) => remove_private(&self.run_dir, &self.name),
            Err(e) => tracing::warn!(sandbox = self.name, error = %e, "a build's sandbox is left"),
        }
    }
}

fn remove_private(run_dir: &Path, name: &str) {
    let _ = fs::remove_dir_all(run_dir);
    let _ = fs::remove_dir_all(private_dir(name));
}

/// Where secrets are put: a file system in memory.
fn private_dir(name: &str) -> PathBuf {
    Path::new("/dev/shm").join(format!("atoll-{name}"))
}

fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn failed<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    let what = what.into();
    move |e| Error::Invalid { what, why: e.to_string() }
}

impl Executor for Sandboxes {
    fn run(
        &self,
        run: &RunSpec,
        output: &mut dyn FnMut(&str),
        finished: &mut dyn FnMut(&Path, u32) -> Result<()>,
    ) -> Result<RunEnd> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = format!("build-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let run_dir = self.run_dir.join(&name);
        let making = format!("directory {}", run_dir.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&run_dir).map_err(failed(&making))?;
        let lock = open_dir(&run_dir).map_err(failed(&making))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(failed(&making))?;
        let held = Held { cgroup: self.cgroup.join(&name), dir: run.work.join("sandbox"), run_dir, name, _lock: lock };
        let log = run.work.join("output");
        let start = self.start(run, &held, &log)?;
        client::launch(&self.exe, &sandbox(run, &held)).map_err(failed("sandbox"))?;
        let mut shim = Client::connect(&held.run_dir).map_err(failed("sandbox"))?;
        match shim.start(start) {
            Ok(_) => {}
            Err(e @ (container::Error::Exec { .. } | container::Error::Refused(_))) => {
                return Ok(RunEnd::Failed(e.to_string()));
            }
            Err(e) => return Err(failed("sandbox")(e)),
        }
        let ended = self.wait(&held, &log, output)?;
        if let Some(why) = ended {
            return Ok(RunEnd::Failed(why));
        }
        let upper = container::shim::container_directory(&held.dir, NAME, 0).join("upper");
        finished(&upper, ID_BASE)?;
        Ok(RunEnd::Succeeded)
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl Sandboxes {
    /// Until the command ends: `None` if it succeeded, else why not.
    fn wait(&self, held: &Held, log: &Path, output: &mut dyn FnMut(&str)) -> Result<Option<String>> {
        let mut tail = Tail::open(log).map_err(failed("output"))?;
        loop {
            let mut shim = Client::connect(&held.run_dir).map_err(failed("sandbox"))?;
            let (sequence, list) = shim.list().map_err(failed("sandbox"))?;
            let state = list.into_iter().find(|s| s.name == NAME);
            match state.map(|s| s.phase) {
                Some(Phase::Running { .. }) => {}
                Some(Phase::Exited { code, oom_killed, signal, .. }) => {
                    tail.rest(output).map_err(failed("output"))?;
                    return Ok(match (code, oom_killed, signal) {
                        (0, _, _) => None,
                        (_, true, _) => Some("it used more memory than there is".into()),
                        (_, _, Some(signal)) => Some(format!("ended by signal {signal}")),
                        (code, _, _) => Some(format!("exit code {code}")),
                    });
                }
                None => return Err(failed("sandbox")("the command is gone")),
            }
            let changed = shim.watch(sequence).map_err(failed("sandbox"))?;
            loop {
                let ready = poll(&mut [PollFd::new(&changed, PollFlags::IN)], Some(&TICK)).unwrap_or(1);
                tail.lines(output).map_err(failed("output"))?;
                if self.cancelled() {
                    return Ok(Some("the build was stopped".into()));
                }
                if ready > 0 {
                    break;
                }
            }
        }
    }

    fn start(&self, run: &RunSpec, held: &Held, log: &Path) -> Result<Start> {
        let mut mounts = oci::default_mounts();
        let bind = |target: &Path, source: PathBuf, read_only: bool| oci::Mount {
            destination: target.to_path_buf(),
            kind: Some("bind".into()),
            source: Some(source),
            options: ["bind", "idmap", "nodev", "nosuid", if read_only { "ro" } else { "rw" }]
                .map(str::to_owned)
                .to_vec(),
            ..Default::default()
        };
        mounts.push(bind(
            Path::new("/etc/hosts"),
            plain_file(run, "hosts", b"127.0.0.1 localhost\n::1 localhost\n")?,
            true,
        ));
        let resolver = if run.host_network { fs::read("/etc/resolv.conf").unwrap_or_default() } else { Vec::new() };
        mounts.push(bind(Path::new("/etc/resolv.conf"), plain_file(run, "resolv.conf", &resolver)?, true));
        for (number, mount) in run.mounts.iter().enumerate() {
            mounts.push(match &mount.source {
                MountSource::Path(path) => bind(&mount.target, path.clone(), mount.read_only),
                MountSource::File { content, mode, uid, gid } => {
                    let path = private_file(held, number, content, *mode, (*uid, *gid))
                        .map_err(failed(format!("mount {}", mount.target.display())))?;
                    bind(&mount.target, path, mount.read_only)
                }
                MountSource::Tmpfs { size } => {
                    let mut options = vec!["nosuid".to_owned(), "nodev".into(), "mode=1777".into()];
                    options.extend(size.map(|size| format!("size={size}")));
                    let (kind, source) = (Some("tmpfs".into()), Some("tmpfs".into()));
                    oci::Mount { destination: mount.target.clone(), kind, source, options, ..Default::default() }
                }
            });
        }
        let set: Vec<String> = container::process::DEFAULT_CAPABILITIES.iter().map(|c| (*c).to_owned()).collect();
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        let spec = Spec {
            root: Some(Root { path: PathBuf::new(), readonly: false }),
            process: Process {
                user: User { uid: run.uid, gid: run.gid, umask: None, additional_gids: run.groups.clone() },
                args: run.args.clone(),
                env: run.env.clone(),
                cwd: run.cwd.clone(),
                capabilities: Some(Capabilities {
                    bounding: set.clone(),
                    effective: set.clone(),
                    permitted: set,
                    ..Default::default()
                }),
                no_new_privileges: true,
                ..Default::default()
            },
            mounts,
            linux: Linux {
                masked_paths: paths(oci::MASKED_PATHS),
                readonly_paths: paths(oci::READONLY_PATHS),
                ..Default::default()
            },
            ..Default::default()
        };
        Ok(Start {
            name: NAME.into(),
            attempt: 0,
            spec,
            layers: run.layers.clone(),
            confinement: Confinement { seccomp_unconfined: false, scope_abstract_sockets: run.host_network },
            stdin: false,
            stdin_once: false,
            log_path: log.to_path_buf(),
            log_max_bytes: 0,
        })
    }
}

fn sandbox(run: &RunSpec, held: &Held) -> Sandbox {
    Sandbox {
        title: format!("build/{}", run.title),
        dir: held.dir.clone(),
        run_dir: held.run_dir.clone(),
        hostname: "build".into(),
        id_map: Some(IdMapping { container_id: 0, host_id: ID_BASE, size: RANGE }),
        network: if run.host_network { Network::Host } else { Network::New },
        host_network: run.host_network,
        cgroup: held.cgroup.clone(),
        resources: Resources {
            pids: Some(Pids { limit: Some(PIDS) }),
            memory: run
                .memory
                .map(|bytes| Memory { limit: Some(i64::try_from(bytes).unwrap_or(i64::MAX)), ..Default::default() }),
            ..Default::default()
        },
        sysctl: Default::default(),
        share_pid: false,
        scoped: true,
    }
}

fn plain_file(run: &RunSpec, name: &str, content: &[u8]) -> Result<PathBuf> {
    let path = run.work.join(name);
    fs::write(&path, content).map_err(failed(path.display().to_string()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed(path.display().to_string()))?;
    Ok(path)
}

/// A file that exists in memory alone.
fn private_file(held: &Held, number: usize, content: &[u8], mode: u32, owner: (u32, u32)) -> std::io::Result<PathBuf> {
    const TMPFS: u64 = 0x0102_1994;
    let dir = private_dir(&held.name);
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    if rustix::fs::statfs(&dir)?.f_type as u64 != TMPFS {
        return Err(std::io::Error::other("/dev/shm is not in memory (tmpfs); secrets are not written to a disk"));
    }
    let path = dir.join(number.to_string());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(content)?;
    rustix::fs::fchown(&file, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(path)
}

/// Reads a log in the container runtime interface's form as it grows.
struct Tail {
    file: File,
    at: u64,
    unread: Vec<u8>,
    /// The beginning of a line that is logged in pieces.
    piece: String,
}

impl Tail {
    fn open(path: &Path) -> std::io::Result<Tail> {
        Ok(Tail { file: File::open(path)?, at: 0, unread: Vec::new(), piece: String::new() })
    }

    fn lines(&mut self, output: &mut dyn FnMut(&str)) -> std::io::Result<()> {
        self.file.seek(SeekFrom::Start(self.at))?;
        self.at += self.file.read_to_end(&mut self.unread)? as u64;
        while let Some(end) = self.unread.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            // `TIME STREAM F|P TEXT`
            let mut fields = line.trim_end_matches('\n').splitn(4, ' ').skip(2);
            let whole = fields.next() == Some("F");
            self.piece.push_str(fields.next().unwrap_or_default());
            if whole {
                output(printable(&self.piece).trim_end());
                self.piece.clear();
            }
        }
        Ok(())
    }

    fn rest(&mut self, output: &mut dyn FnMut(&str)) -> std::io::Result<()> {
        self.lines(output)?;
        if !self.piece.is_empty() {
            output(printable(&self.piece).trim_end());
        }
        Ok(())
    }
}

/// A strange command's output must not steer the user's terminal. After a carriage return the line begins anew.
fn printable(text: &str) -> String {
    let text = text.trim_end_matches('\r');
    let text = text.rsplit('\r').next().unwrap_or(text);
    text.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_read_as_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = File::create(&path).unwrap();
        let mut tail = Tail::open(&path).unwrap();
        let mut seen = Vec::new();
        log.write_all(b"t stdout F one\nt stdout P tw").unwrap();
        tail.lines(&mut |l| seen.push(l.to_owned())).unwrap();
        log.write_all(b"o\nt stderr F half \x1b[31mred\nt stdout F 10%\r20%\nt stdout P last\n").unwrap();
        tail.rest(&mut |l| seen.push(l.to_owned())).unwrap();
        assert_eq!(seen, ["one", "twohalf [31mred", "20%", "last"]);
    }
}
