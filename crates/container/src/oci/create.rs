//! `create` and `run`: from a bundle to a container.

use super::args::{Args, only_id};
use super::record::{Home, Record, Status, read_config, start_time};
use super::{Context, foreground, run, validate};
use crate::cgroup::{Cgroup, Hierarchies, always_allowed};
use crate::error::{During, Error, Result};
use crate::hooks;
use crate::process::Confinement;
use crate::runtime::{Bundle, Launch, Plan, Rootfs};
use crate::spec::{Resources, Spec};
use crate::sys::SingleThreaded;
use crate::systemd::{self, Holder};
use rustix::fs::{FileType, Mode};
use rustix::process::{Pid, Signal};
use serde_json::json;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

const VALUES: &[&str] = &["bundle", "b", "console-socket", "pid-file", "preserve-fds"];
const SWITCHES: &[&str] = &["no-pivot", "no-new-keyring", "detach", "d", "keep", "no-subreaper"];
const PATIENCE: Duration = Duration::from_secs(10);

pub fn create(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, VALUES, SWITCHES)?;
    make(context, &args, only_id(rest)?, false)
}

pub fn run(context: &Context, args: &[String]) -> Result<i32> {
    let (args, rest) = Args::parse(args, VALUES, SWITCHES)?;
    make(context, &args, only_id(rest)?, true)
}

/// A container on its way.
struct Making<'a> {
    context: &'a Context,
    home: &'a Home,
    spec: Spec,
    record: Record,
    cgroup: Option<Cgroup>,
    /// Keeps a new scope of systemd's until the container's process is in it.
    holder: Option<Holder>,
    resources: Resources,
    pid_file: Option<&'a str>,
    lenient: bool,
    starts: bool,
    bundle: Bundle,
}

fn make(context: &Context, args: &Args, id: &str, starts: bool) -> Result<i32> {
    let path = args.get("bundle").or(args.get("b")).unwrap_or(".");
    let path = std::fs::canonicalize(path).during(|| format!("bundle {path}"))?;
    let (mut spec, text) = read_config(&path.join("config.json"))?;
    let rootless = !rustix::process::geteuid().is_root();
    validate::config(&spec, rootless)?;
    let stays = starts && !args.has("detach") && !args.has("d");
    run::check_console(spec.process.terminal, stays, args.get("console-socket"))?;
    let preserved = run::preserved(args.number("preserve-fds")?, &mut spec.process.env)?;
    let alone = SingleThreaded::prove().during(|| "starting".into())?;

    let home = Home::make(&context.root, id)?;
    let outcome = (|| {
        std::fs::write(home.config(), &text).during(|| format!("writing {}", home.config().display()))?;
        if !starts {
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, home.fifo(), FileType::Fifo, mode, 0)
                .during(|| format!("making {}", home.fifo().display()))?;
        }
        let mut making = Making::new(context, alone, &home, spec, &path, args)?;
        (making.lenient, making.starts) = (making.lenient || rootless, starts);
        making.bundle.rootless = rootless;
        making.bundle.preserved = preserved;
        let outcome = making.launch(alone, args, stays);
        if outcome.is_err() {
            making.undo();
        }
        Ok((outcome?, making))
    })();
    match outcome {
        Ok((code, making)) => {
            if stays && !args.has("keep") {
                super::lifecycle::clear(context, &home, &making.record, making.spec.hooks.as_ref())?;
            }
            Ok(code)
        }
        Err(e) => {
            home.remove()?;
            Err(e)
        }
    }
}

impl<'a> Making<'a> {
    fn new(
        context: &'a Context,
        alone: SingleThreaded,
        home: &'a Home,
        mut spec: Spec,
        bundle: &Path,
        args: &'a Args,
    ) -> Result<Self> {
        let root = spec.root.clone().unwrap_or_default().path;
        let rootfs = bundle.join(&root);
        if !rootfs.is_dir() {
            return Err(Error::Refused(format!("root.path: {}: is no directory", rootfs.display())));
        }
        let mut resources = std::mem::take(&mut spec.linux.resources);
        if !resources.devices.is_empty() {
            resources.devices.extend(always_allowed());
        }
        let hierarchies = Hierarchies::discover_for(&resources)?;
        let lenient = !in_first_user_namespace();
        let (mut scope, mut holder) = (None, None);
        let cgroup = if context.systemd_cgroup {
            let (cgroup, unit, held) = in_scope(alone, hierarchies, &spec, &home.id, &resources)?;
            (scope, holder) = (Some(unit), Some(held));
            Some(cgroup)
        } else {
            group(hierarchies, &spec, &home.id, lenient, context)?
        };
        let mut record = Record::new(&home.id, bundle, &rootfs, &spec, cgroup.as_ref());
        record.scope = scope;
        let bundle = Bundle {
            id: home.id.clone(),
            path: bundle.to_owned(),
            new_keyring: !args.has("no-new-keyring"),
            no_pivot: args.has("no-pivot"),
            cgroup: cgroup.as_ref().map(|c| c.path().to_owned()),
            start_fifo: Some(home.fifo()).filter(|f| f.exists()),
            ..Default::default()
        };
        let pid_file = args.get("pid-file");
        Ok(Self { context, home, spec, record, cgroup, holder, resources, pid_file, lenient, starts: false, bundle })
    }

    fn launch(&mut self, alone: SingleThreaded, args: &Args, stays: bool) -> Result<i32> {
        let front = if stays { Some(foreground::Front::prepare()?) } else { None };
        let plan = Plan {
            spec: self.spec.clone(),
            rootfs: Rootfs::Bundle { path: self.record.rootfs.clone() },
            scratch: PathBuf::new(),
            confinement: Confinement { seccomp_unconfined: true, ..Default::default() },
            bundle: Some(self.bundle.clone()),
        };
        let hierarchies = match &self.cgroup {
            Some(cgroup) => cgroup.hierarchies().clone(),
            None => Hierarchies::default(),
        };
        let mut launch = Launch::create(alone, self.cgroup.as_ref(), hierarchies, plan, self.bundle.preserved)?;
        let pid = run::follow(&mut launch, self)?;
        self.holder = None;
        run::tell(self.context, &launch.warnings);
        if let Some(listener) = launch.listener.take() {
            self.send_listener(pid, &listener)?;
        }
        let terminal = launch.terminal.take();
        if let (Some(master), Some(path)) = (&terminal, args.get("console-socket")) {
            run::send_console(Path::new(path), master)?;
        }
        drop(launch);
        run::write_pid_file(self.pid_file, pid)?;
        if !self.starts {
            return Ok(0);
        }
        if let Some(hooks) = &self.spec.hooks {
            // Its failure is told and changes nothing (runtime-spec, runtime.md, "Lifecycle", 10).
            let state = self.record.state(Status::Running);
            if let Err(e) = hooks::run("poststart", &hooks.poststart, &state) {
                self.context.notices.warning(&e.to_string());
            }
        }
        match front {
            Some(front) => front.wait(pid, terminal.filter(|_| args.get("console-socket").is_none())),
            None => Ok(0),
        }
    }

    /// Seccomp's listener goes to who the configuration says, with the container's state.
    fn send_listener(&self, pid: u32, listener: &std::os::fd::OwnedFd) -> Result<()> {
        use std::os::fd::AsFd;
        let Some(seccomp) = &self.spec.linux.seccomp else { return Ok(()) };
        let Some(path) = &seccomp.listener_path else { return Ok(()) };
        let what = || format!("linux.seccomp.listenerPath: {}", path.display());
        let state = json!({
            "ociVersion": hooks::OCI_VERSION,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": seccomp.listener_metadata,
            "state": self.record.state(Status::Creating),
        });
        let socket = std::os::unix::net::UnixStream::connect(path).during(what)?;
        run::send_fd(socket.as_fd(), state.to_string().as_bytes(), listener.as_fd()).during(what)
    }

    /// It did not come to be: nothing of it stays.
    fn undo(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill(PATIENCE);
        }
        if let Some(pid) = Pid::from_raw(self.record.pid as i32) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
        if let Some(unit) = &self.record.scope {
            let _ = systemd::stop(unit);
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.remove(PATIENCE);
        }
        if self.record.pid != 0
            && let Some(hooks) = &self.spec.hooks
            && let Err(e) = hooks::run("poststop", &hooks.poststop, &self.record.state(Status::Stopped))
        {
            self.context.notices.warning(&e.to_string());
        }
    }
}

impl run::Owner for Making<'_> {
    fn created(&mut self, pid: u32, launch: &Launch) -> Result<()> {
        (self.record.pid, self.record.start_time) = (pid, start_time(pid));
        self.home.save(&self.record)?;
        if let Some(cgroup) = &self.cgroup {
            match cgroup.set_devices(&self.resources.devices, None) {
                // Whoever is not root of the host cannot make device nodes either.
                Err(e) if self.lenient => self.context.notices.warning(&e.to_string()),
                other => other?,
            }
            run::tell(self.context, &cgroup.set(&self.resources)?);
        }
        if self.spec.hooks.is_none() {
            launch.go();
        }
        Ok(())
    }

    fn mounted(&mut self, pid: u32) -> Result<()> {
        let Some(hooks) = &self.spec.hooks else { return Ok(()) };
        let state = hooks::State::of(&self.spec, &self.bundle, "creating", pid);
        hooks::run("prestart", &hooks.prestart, &state)?;
        hooks::run("createRuntime", &hooks.create_runtime, &state)
    }
}

/// The container's control group as a scope of systemd's.
fn in_scope(
    alone: SingleThreaded,
    hierarchies: Hierarchies,
    spec: &Spec,
    id: &str,
    resources: &Resources,
) -> Result<(Cgroup, String, Holder)> {
    let hierarchies = hierarchies.with_systemd()?;
    let path = spec.linux.cgroups_path.clone().unwrap_or_default();
    let scope = systemd::Scope::parse(&path.to_string_lossy(), id)?;
    let (path, holder) = scope.start(alone, id, resources, !hierarchies.v1.is_empty())?;
    let made = Cgroup::new(hierarchies, path).and_then(|cgroup| cgroup.create_in_version_1().map(|()| cgroup));
    match made {
        Ok(cgroup) => Ok((cgroup, scope.unit, holder)),
        Err(e) => {
            let _ = systemd::stop(&scope.unit);
            Err(e)
        }
    }
}

/// The container's control group, made. None where a plain user may make none.
fn group(hierarchies: Hierarchies, spec: &Spec, id: &str, lenient: bool, context: &Context) -> Result<Option<Cgroup>> {
    let path = match &spec.linux.cgroups_path {
        Some(path) if !path.as_os_str().is_empty() => path.components().filter(|c| *c != Component::RootDir).collect(),
        // One level: making a group is among the dearest steps.
        _ => PathBuf::from(format!("atoll-oci-{id}")),
    };
    let cgroup = Cgroup::new(hierarchies, path).map_err(|e| Error::Refused(format!("linux.cgroupsPath: {e}")))?;
    if cgroup.hierarchies().is_empty() {
        return Ok(None);
    }
    match cgroup.create() {
        Ok(()) => Ok(Some(cgroup)),
        Err(e) if lenient || !rustix::process::geteuid().is_root() => {
            context.notices.warning(&format!("no control group, so no limits: {e}"));
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Root of another namespace is no root of the host's.
fn in_first_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|text| text.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}
