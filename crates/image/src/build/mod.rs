//! `atoll image build`: from a Containerfile and a context to an image.
//!
//! [`parse`] reads the language; each stage the target needs runs on a thread of its own ([`stage`]) and waits for those
//! it builds on. A step is looked up in the cache by a digest of what it depends on; if it has to be done, `COPY`, `ADD`
//! and `WORKDIR` plan the entries of their layer ([`copy`]), and `RUN` runs in a sandbox that an [`Executor`] gives, whose
//! changes become entries ([`diff`]). Entries are written as a blob, and the blob is unpacked like any other layer.
//!
//! *Invariant:* nothing of the context or of an image is opened through a symbolic link but by [`view`]'s own rules.
//! *Invariant:* a secret's content is in no layer, no cache record and no history.

mod agent;
pub(crate) mod cache;
mod chmod;
mod copy;
mod diff;
mod entries;
pub(crate) mod fuzz;
mod health;
mod ignore;
pub(crate) mod layer;
mod lines;
mod mounts;
mod parse;
mod pattern;
mod remote;
mod run;
mod stage;
mod users;
mod view;
mod words;

use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::import::to_json;
use crate::manifest::now;
use crate::pull::PullOptions;
use crate::reference::Reference;
use crate::spec::{ImageConfig, Platform, media};
use crate::store::{Progress, ProgressFn, Store};
use ignore::Ignore;
use parse::{Containerfile, at};
use stage::Snapshot;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use view::View;

/// How to build.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    pub context: PathBuf,
    /// Default: `Containerfile`, else `Dockerfile`, in the context. `-`: standard input.
    pub file: Option<PathBuf>,
    /// Names to give it, at least one.
    pub names: Vec<String>,
    pub args: Vec<(String, String)>,
    /// A stage's name or number; default: the last.
    pub target: Option<String>,
    pub secrets: Vec<Secret>,
    pub no_cache: bool,
    pub platform: Option<Platform>,
    /// `RUN` may use the host's network; without it there is none.
    pub network: bool,
    /// Bytes that a `RUN` may use.
    pub memory: Option<u64>,
    /// Agents for `RUN --mount=type=ssh`: name and socket.
    pub ssh: Vec<(String, PathBuf)>,
    /// Unix seconds: the image's time, and the latest that its new files have (`SOURCE_DATE_EPOCH`).
    pub epoch: Option<u64>,
    pub pull: PullOptions,
}

#[derive(Clone, Debug)]
pub enum Secret {
    File { id: String, path: PathBuf },
    Variable { id: String, variable: String },
}

/// Runs a command in a sandbox. The image crate knows no runtime: whoever starts the build brings one.
pub trait Executor: Sync {
    /// Runs and waits. `output` hears each line. If the command succeeds, `finished` is called while what it wrote is
    /// still there, with the upper directory and the host's id of the sandbox's root.
    fn run(
        &self,
        run: &RunSpec,
        output: &mut dyn FnMut(&str),
        finished: &mut dyn FnMut(&Path, u32) -> Result<()>,
    ) -> Result<RunEnd>;

    /// The user wants no more.
    fn cancelled(&self) -> bool;
}

/// One `RUN`.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// For people.
    pub title: String,
    /// Unpacked layers, lowest first.
    pub layers: Vec<PathBuf>,
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub mounts: Vec<RunMount>,
    pub host_network: bool,
    /// Bytes.
    pub memory: Option<u64>,
    /// An empty directory for the sandbox's own files, on the layers' file system.
    pub work: PathBuf,
}

#[derive(Clone, Debug)]
pub struct RunMount {
    pub target: PathBuf,
    pub source: MountSource,
    pub read_only: bool,
}

#[derive(Clone, Debug)]
pub enum MountSource {
    /// Ids on disk are those of the sandbox.
    Path(PathBuf),
    /// Must not touch a disk.
    File {
        content: Vec<u8>,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    Tmpfs {
        size: Option<u64>,
    },
}

#[derive(Clone, Debug)]
pub enum RunEnd {
    Succeeded,
    /// With a shell's exit code, or the reason why it could not be run.
    Failed(String),
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Built {
    pub names: Vec<String>,
    pub digest: Digest,
}

enum State {
    Waiting,
    Done(Arc<Snapshot>),
}

/// A build under way.
struct Build<'a> {
    store: &'a Store,
    options: &'a BuildOptions,
    executor: &'a dyn Executor,
    progress: ProgressFn<'a>,
    /// The Containerfile's name, for errors.
    file: String,
    parsed: Containerfile,
    context: View,
    ignore: Ignore,
    /// `ARG`s before the first `FROM`.
    globals: BTreeMap<String, String>,
    platform: Platform,
    states: Mutex<Vec<State>>,
    changed: Condvar,
    stop: AtomicBool,
    /// Steps that may run now.
    slots: Mutex<usize>,
    slot_free: Condvar,
    /// Layers (diff id, blob) this build relies on.
    used: Mutex<BTreeSet<(Digest, Digest)>>,
    /// Build arguments that an `ARG` asked for.
    asked: Mutex<BTreeSet<String>>,
}

/// Between two claims of what a build relies on: well within the grace period of garbage collection.
const CLAIM_EVERY: Duration = Duration::from_secs(300);
/// Parsing and planning recurse as deep as directories are nested.
const STACK: usize = 16 << 20;

impl Store {
    /// Builds an image and names it.
    pub fn build(&self, options: &BuildOptions, executor: &dyn Executor, progress: ProgressFn) -> Result<Built> {
        let names = options
            .names
            .iter()
            .map(|name| Reference::parse(name, self.local_hosts()))
            .collect::<Result<Vec<Reference>>>()?;
        if names.is_empty() || names.iter().any(|n| n.digest.is_some()) {
            return Err(Error::invalid("-t", "give at least one name without a digest"));
        }
        let (file, text) = read_containerfile(options)?;
        let parsed = parse::parse(&file, &text)?;
        let build = Build {
            store: self,
            options,
            executor,
            progress,
            ignore: read_ignore(options)?,
            context: view::context(&options.context)?,
            globals: BTreeMap::new(),
            platform: options.platform.clone().unwrap_or_else(Platform::host),
            states: Mutex::new(parsed.stages.iter().map(|_| State::Waiting).collect()),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            slots: Mutex::new(std::thread::available_parallelism().map_or(2, usize::from).max(2)),
            slot_free: Condvar::new(),
            used: Mutex::default(),
            asked: Mutex::default(),
            file,
            parsed,
        };
        build.run(&names)
    }
}

impl Build<'_> {
    fn run(mut self, names: &[Reference]) -> Result<Built> {
        self.globals = self.global_args()?;
        let target = self.target()?;
        let needed = self.needed(target)?;
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let over = AtomicBool::new(false);
        let build = &self;
        std::thread::scope(|scope| {
            let keeper = scope.spawn(|| build.keep(&over));
            let stages: Vec<_> = needed
                .iter()
                .map(|index| {
                    let run = || {
                        if let Err(error) = build.stage(*index) {
                            lock(&failure).get_or_insert(error);
                            build.stop.store(true, Ordering::Relaxed);
                            build.changed.notify_all();
                        }
                    };
                    std::thread::Builder::new().name("build".into()).stack_size(STACK).spawn_scoped(scope, run)
                })
                .collect();
            for stage in stages {
                match stage {
                    Ok(stage) => {
                        let _ = stage.join();
                    }
                    Err(e) => {
                        lock(&failure).get_or_insert(io("start a thread for", &build.file)(e));
                        build.stop.store(true, Ordering::Relaxed);
                        build.changed.notify_all();
                    }
                }
            }
            over.store(true, Ordering::Relaxed);
            keeper.thread().unpark();
        });
        if let Some(error) = lock(&failure).take() {
            return Err(error);
        }
        self.warn_of_unused();
        let State::Done(result) = std::mem::replace(
            lock(&self.states).get_mut(target).ok_or_else(|| Error::invalid("--target", "no such stage"))?,
            State::Waiting,
        ) else {
            return Err(Error::invalid(self.file.clone(), "the build ended before it was done"));
        };
        self.store_result(names, &result)
    }

    fn store_result(&self, names: &[Reference], result: &Snapshot) -> Result<Built> {
        (self.progress)(Progress::Step("writing the image".into()));
        let mut image: ImageConfig = result.image.clone();
        image.created = Some(clock::rfc3339(self.options.epoch.unwrap_or(result.created).cast_signed()));
        image.rootfs.kind = "layers".into();
        image.rootfs.diff_ids = result.layers.iter().map(|(_, diff_id)| *diff_id).collect();
        let layers = result.layers.iter().map(|(layer, _)| layer.clone()).collect();
        let stored = self.store.store_manifest(names, media::OCI_CONFIG, None, &to_json(&image)?, layers)?;
        Ok(Built { names: stored.names, digest: stored.digest })
    }

    /// Keeps what is relied on from garbage collection, however long a step takes.
    fn keep(&self, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            std::thread::park_timeout(CLAIM_EVERY);
            let used = lock(&self.used).clone();
            for (diff_id, blob) in used {
                let _ = self.store.layer_claim(&diff_id);
                let _ = self.store.blob_claim(&blob);
            }
        }
    }

    fn target(&self) -> Result<usize> {
        let last = self.parsed.stages.len().saturating_sub(1);
        match &self.options.target {
            None => Ok(last),
            Some(name) => self.find_stage(name, self.parsed.stages.len()).ok_or_else(|| {
                let names: Vec<&str> = self.parsed.stages.iter().filter_map(|s| s.name.as_deref()).collect();
                Error::invalid(format!("--target {name:?}"), format!("no such stage; there are: {}", names.join(", ")))
            }),
        }
    }

    /// A stage before `before`, by name or number.
    fn find_stage(&self, name: &str, before: usize) -> Option<usize> {
        let stages = self.parsed.stages.get(..before)?;
        let by_name = stages.iter().position(|s| s.name.as_deref() == Some(name.to_ascii_lowercase().as_str()));
        by_name.or_else(|| name.parse::<usize>().ok().filter(|n| *n < before))
    }

    /// A stage and all that it builds on.
    fn needed(&self, target: usize) -> Result<BTreeSet<usize>> {
        let mut needed = BTreeSet::new();
        let mut todo = vec![target];
        while let Some(index) = todo.pop() {
            if needed.insert(index) {
                todo.extend(self.relies_on(index)?);
            }
        }
        Ok(needed)
    }

    fn relies_on(&self, index: usize) -> Result<Vec<usize>> {
        let Some(stage) = self.parsed.stages.get(index) else { return Ok(Vec::new()) };
        let base = self.expand_global(stage.line, &stage.base)?;
        let mut found: Vec<usize> = self.find_named(&base, index).into_iter().collect();
        for step in &stage.steps {
            for name in stage::sources_of(&step.instruction) {
                found.extend(self.find_stage(&name, index));
            }
        }
        Ok(found)
    }

    /// `FROM` takes a stage by its name alone: a number is an image's name there.
    fn find_named(&self, base: &str, before: usize) -> Option<usize> {
        self.find_stage(base, before).filter(|_| base.parse::<usize>().is_err())
    }

    /// Waits for a stage; an error if the build has failed elsewhere.
    fn wait_for(&self, index: usize) -> Result<Arc<Snapshot>> {
        let mut states = lock(&self.states);
        loop {
            if let Some(State::Done(snapshot)) = states.get(index) {
                return Ok(snapshot.clone());
            }
            self.check()?;
            states =
                self.changed.wait_timeout(states, Duration::from_millis(200)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether to go on.
    fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) || self.executor.cancelled() {
            return Err(Error::invalid(self.file.clone(), "the build was stopped"));
        }
        Ok(())
    }

    /// Holds one of the slots for steps that run at once.
    fn with_slot<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut free = lock(&self.slots);
        while *free == 0 {
            free = self.slot_free.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        drop(free);
        let result = work();
        *lock(&self.slots) += 1;
        self.slot_free.notify_one();
        result
    }

    fn stage(&self, index: usize) -> Result<()> {
        let snapshot = stage::run(self, index)?;
        if let Some(state) = lock(&self.states).get_mut(index) {
            *state = State::Done(Arc::new(snapshot));
        }
        self.changed.notify_all();
        Ok(())
    }

    fn uses(&self, layers: &[stage::Layer]) {
        lock(&self.used).extend(layers.iter().map(|(layer, diff_id)| (*diff_id, layer.digest)));
    }

    fn argument(&self, name: &str) -> Option<String> {
        lock(&self.asked).insert(name.to_owned());
        self.options.args.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    fn global_args(&self) -> Result<BTreeMap<String, String>> {
        let mut known = self.platform_args();
        for (line, list) in &self.parsed.args {
            for (name, value) in list {
                let lookup = |name: &str| known.get(name).cloned();
                let usual = match value {
                    Some(text) => Some(
                        words::expand(text, self.parsed.escape, &lookup).map_err(|why| at(&self.file, *line, why))?,
                    ),
                    None => known.get(name).cloned(),
                };
                if let Some(value) = self.argument(name).or(usual) {
                    known.insert(name.clone(), value);
                }
            }
        }
        Ok(known)
    }

    /// What every build has: this machine's platform, and the image's.
    fn platform_args(&self) -> BTreeMap<String, String> {
        let mut known = BTreeMap::new();
        for (prefix, platform) in [("BUILD", Platform::host()), ("TARGET", self.platform.clone())] {
            known.insert(format!("{prefix}PLATFORM"), platform.to_string());
            known.insert(format!("{prefix}OS"), platform.os);
            known.insert(format!("{prefix}ARCH"), platform.architecture);
            known.insert(format!("{prefix}VARIANT"), platform.variant.unwrap_or_default());
        }
        known
    }

    fn expand_global(&self, line: usize, text: &str) -> Result<String> {
        let lookup = |name: &str| self.globals.get(name).cloned();
        words::expand(text, self.parsed.escape, &lookup).map_err(|why| at(&self.file, line, why))
    }

    fn warn_of_unused(&self) {
        let asked = lock(&self.asked);
        for (name, _) in self.options.args.iter().filter(|(n, _)| !asked.contains(n) && !stage::is_proxy(n)) {
            (self.progress)(Progress::Step(format!("--build-arg {name}: no ARG asks for it")));
        }
    }

    fn now(&self) -> u64 {
        self.options.epoch.unwrap_or_else(now)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_containerfile(options: &BuildOptions) -> Result<(String, String)> {
    let limited = |reader: &mut dyn Read, what: &str| {
        let bytes = crate::blob::read_limited(reader, parse::TEXT_LIMIT, what)?;
        String::from_utf8(bytes).map_err(|_| Error::invalid(what, "it is not UTF-8 text"))
    };
    if options.file.as_deref() == Some(Path::new("-")) {
        return Ok(("-".into(), limited(&mut std::io::stdin(), "standard input")?));
    }
    let path = match &options.file {
        Some(path) => path.clone(),
        None => {
            let usual = options.context.join("Containerfile");
            if usual.exists() { usual } else { options.context.join("Dockerfile") }
        }
    };
    let shown = path.display().to_string();
    let mut file = std::fs::File::open(&path).map_err(|source| Error::Unrecognised {
        path: path.clone(),
        why: format!("{source}; name the Containerfile with -f"),
    })?;
    let text = limited(&mut file, &shown)?;
    Ok((shown, text))
}

/// The Containerfile's own ignore file, else the context's.
fn read_ignore(options: &BuildOptions) -> Result<Ignore> {
    let mut own = options.file.clone().unwrap_or_default().into_os_string();
    own.push(".dockerignore");
    let places = [PathBuf::from(own), options.context.join(".containerignore"), options.context.join(".dockerignore")];
    for path in places {
        match std::fs::File::open(&path) {
            Ok(file) => {
                let shown = path.display().to_string();
                let bytes = crate::blob::read_limited(file, parse::TEXT_LIMIT, &shown)?;
                return Ignore::parse(&String::from_utf8_lossy(&bytes)).map_err(|(line, why)| at(&shown, line, why));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("open", path)(e)),
        }
    }
    Ok(Ignore::default())
}

#[cfg(test)]
mod tests;
