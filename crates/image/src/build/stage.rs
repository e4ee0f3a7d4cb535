//! One stage: from its base through its steps to a snapshot.

use super::cache::Cached;
use super::chmod::Chmod;
use super::copy::{Copy, Plan, absolute};
use super::entries::{self, Entry};
use super::ignore::Ignore;
use super::parse::{Command, Instruction, Stage as Parsed, Step, Transfer, at, trigger};
use super::remote::{self, Checkout, Fetched, Remote, Repository};
use super::users;
use super::view::View;
use super::{Build, mounts, words};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::spec::{Descriptor, History, ImageConfig, Platform, media};
use crate::store::Progress;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A layer's blob and its diff id.
pub(crate) type Layer = (Descriptor, Digest);

/// An image in the making.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    pub layers: Vec<Layer>,
    pub image: ImageConfig,
    /// Unix seconds.
    pub created: u64,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Build arguments that need no `ARG`.
pub(super) fn is_proxy(name: &str) -> bool {
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"].contains(&name.to_ascii_lowercase().as_str())
}

/// Stages or images that an instruction takes files from.
pub(super) fn sources_of(instruction: &Instruction) -> Vec<String> {
    match instruction {
        Instruction::Copy(copy) => copy.from.clone().into_iter().collect(),
        Instruction::Run(run) => run
            .mounts
            .iter()
            .filter_map(|text| match mounts::parse(text).ok()?.kind {
                mounts::Kind::Bind { from, .. } => from,
                _ => None,
            })
            .collect(),
        _ => Vec::new(),
    }
}

pub(super) struct Stage<'a> {
    pub build: &'a Build<'a>,
    pub index: usize,
    pub label: String,
    /// `ARG`s declared so far.
    pub args: BTreeMap<String, String>,
    pub now: Snapshot,
    /// Of the step at hand.
    pub line: usize,
    cmd_is_own: bool,
}

pub(super) fn run(build: &Build, index: usize) -> Result<Snapshot> {
    let parsed = build.parsed.stages.get(index).ok_or_else(|| Error::invalid("stage", index))?;
    let name = parsed.name.clone().unwrap_or_else(|| format!("stage {index}"));
    let mut stage = Stage {
        build,
        index,
        label: name.clone(),
        args: BTreeMap::new(),
        now: Snapshot::default(),
        line: parsed.line,
        cmd_is_own: false,
    };
    stage.now = stage.base(parsed).map_err(|e| stage.placed(e))?;
    build.uses(&stage.now.layers);
    let triggers = std::mem::take(&mut stage.now.image.config.on_build);
    let triggered = triggers.iter().map(|text| {
        let instruction =
            trigger(text).map_err(|why| at(&build.file, parsed.line, format!("ONBUILD {text}: {why}")))?;
        Ok(Step { line: parsed.line, text: text.clone(), instruction })
    });
    let steps: Vec<Step> = triggered.chain(parsed.steps.iter().cloned().map(Ok)).collect::<Result<_>>()?;
    for (number, step) in steps.iter().enumerate() {
        build.check()?;
        stage.label = format!("{name} {}/{}", number + 1, steps.len());
        stage.line = step.line;
        stage.step(step).map_err(|e| stage.placed(e))?;
    }
    Ok(stage.now)
}

impl Stage<'_> {
    /// An error with the line it came from.
    fn placed(&self, error: Error) -> Error {
        match error {
            Error::Build { .. } => error,
            other => at(&self.build.file, self.line, other.chain()),
        }
    }

    pub fn fail(&self, why: impl Into<String>) -> Error {
        at(&self.build.file, self.line, why)
    }

    pub fn say(&self, text: &str) {
        (self.build.progress)(Progress::Step(format!("[{}] {text}", self.label)));
    }

    fn base(&self, parsed: &Parsed) -> Result<Snapshot> {
        let name = self.build.expand_global(parsed.line, &parsed.base)?;
        let platform = match &parsed.platform {
            Some(text) => Platform::parse(&self.build.expand_global(parsed.line, text)?)?,
            None => self.build.platform.clone(),
        };
        if name.is_empty() {
            return Err(self.fail(format!("FROM {}: is empty once variables are replaced", parsed.base)));
        }
        if name == "scratch" {
            let image = ImageConfig {
                os: platform.os,
                architecture: platform.architecture,
                variant: platform.variant,
                ..ImageConfig::default()
            };
            return Ok(Snapshot { layers: Vec::new(), image, created: 0 });
        }
        match self.build.find_named(&name, self.index) {
            Some(index) => Ok((*self.build.wait_for(index)?).clone()),
            None => {
                self.say(&format!("FROM {name}"));
                self.image(&name, &platform)
            }
        }
    }

    /// An image of the store, fetched if it is not there.
    fn image(&self, name: &str, platform: &Platform) -> Result<Snapshot> {
        let store = self.build.store;
        let found = match store.find(name) {
            Err(Error::NotFound(_)) => {
                let options =
                    crate::pull::PullOptions { platform: Some(platform.clone()), ..self.build.options.pull.clone() };
                store.pull(name, &options, self.build.progress)?;
                store.find(name)?
            }
            other => other?,
        };
        store.resolve_for(name, platform)?;
        let (_, manifest) = store.manifest_for(&found, platform)?;
        let mut image = store.config_of(&manifest)?;
        // Tools expect one line of history for each layer; an imported root file system has none.
        let told = image.history.iter().filter(|h| !h.empty_layer).count();
        for _ in told..manifest.layers.len() {
            let history = History { created_by: Some(format!("FROM {name}")), ..History::default() };
            image.history.insert(0, history);
        }
        let layers = manifest.layers.into_iter().map(oci_layer).zip(image.rootfs.diff_ids.iter().copied()).collect();
        Ok(Snapshot { layers, image, created: found.record.created })
    }

    /// A former stage, else an image, to take files from.
    pub fn source(&self, name: &str) -> Result<Arc<Snapshot>> {
        match self.build.find_stage(name, self.index) {
            Some(index) => self.build.wait_for(index),
            None => {
                let snapshot = self.image(name, &self.build.platform)?;
                self.build.uses(&snapshot.layers);
                Ok(Arc::new(snapshot))
            }
        }
    }

    pub fn layer_dirs(&self, snapshot: &Snapshot) -> Vec<PathBuf> {
        snapshot.layers.iter().map(|(_, diff_id)| self.build.store.layer_dir(diff_id).join("fs")).collect()
    }

    pub fn view(&self) -> Result<View> {
        View::open(&self.layer_dirs(&self.now))
    }

    pub fn expand(&self, text: &str) -> Result<String> {
        words::expand(text, self.build.parsed.escape, &|name| self.variable(name)).map_err(|why| self.fail(why))
    }

    fn variable(&self, name: &str) -> Option<String> {
        let env = self.now.image.config.env.iter();
        let own = env.rev().find_map(|e| e.split_once('=').filter(|(n, _)| *n == name));
        own.map(|(_, value)| value.to_owned()).or_else(|| self.args.get(name).cloned())
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match &step.instruction {
            Instruction::Run(run) => return self.run_step(step, run),
            Instruction::Copy(copy) => return self.copy_step(step, copy, false),
            Instruction::Add(add) => return self.copy_step(step, add, true),
            Instruction::Workdir(path) => return self.workdir_step(step, path),
            other => self.configure(other)?,
        }
        self.remember(step, None, true);
        Ok(())
    }

    fn configure(&mut self, instruction: &Instruction) -> Result<()> {
        match instruction {
            Instruction::Arg(list) => self.declare(list)?,
            Instruction::Env(list) => {
                for (name, value) in list {
                    let (name, value) = (self.expand(name)?, self.expand(value)?);
                    self.set_env(&name, &value);
                }
            }
            Instruction::Label(list) => {
                for (name, value) in list {
                    let (name, value) = (self.expand(name)?, self.expand(value)?);
                    self.now.image.config.labels.insert(name, value);
                }
            }
            Instruction::User(user) => {
                let user = self.expand(user)?;
                users::find(&self.view()?, &user, false).map_err(|why| self.fail(why))?;
                self.now.image.config.user = user;
            }
            Instruction::Entrypoint(command) => {
                self.now.image.config.entrypoint = self.words(command);
                if !self.cmd_is_own {
                    self.now.image.config.cmd.clear();
                }
            }
            Instruction::Cmd(command) => {
                self.now.image.config.cmd = self.words(command);
                self.cmd_is_own = true;
            }
            Instruction::Expose(text) => {
                let text = self.expand(text)?;
                for word in text.split_whitespace() {
                    for port in ports(word).map_err(|why| self.fail(why))? {
                        self.now.image.config.exposed_ports.insert(port, serde_json::json!({}));
                    }
                }
            }
            Instruction::Volume(list) => {
                for path in list {
                    let path = self.expand(path)?;
                    if path.trim().is_empty() {
                        return Err(self.fail("VOLUME: an empty path"));
                    }
                    self.now.image.config.volumes.insert(path, serde_json::json!({}));
                }
            }
            Instruction::StopSignal(signal) => {
                let signal = self.expand(signal)?;
                if signal.is_empty() || !signal.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-".contains(&b)) {
                    return Err(self.fail(format!("STOPSIGNAL {signal:?}: a name such as SIGTERM, or a number")));
                }
                self.now.image.config.stop_signal = signal;
            }
            Instruction::Shell(list) => self.now.image.config.shell = list.clone(),
            Instruction::Healthcheck(health) => self.now.image.config.healthcheck = Some(health.0.clone()),
            Instruction::OnBuild(text) => self.now.image.config.on_build.push(text.clone()),
            Instruction::Maintainer(name) => self.now.image.author = Some(name.clone()),
            Instruction::Run(_) | Instruction::Copy(_) | Instruction::Add(_) | Instruction::Workdir(_) => {}
        }
        Ok(())
    }

    fn declare(&mut self, list: &[(String, Option<String>)]) -> Result<()> {
        for (name, value) in list {
            let usual = match value {
                Some(text) => Some(self.expand(text)?),
                None => self.build.globals.get(name).cloned(),
            };
            if let Some(value) = self.build.argument(name).or(usual) {
                self.args.insert(name.clone(), value);
            }
        }
        Ok(())
    }

    fn set_env(&mut self, name: &str, value: &str) {
        let pair = format!("{name}={value}");
        let env = &mut self.now.image.config.env;
        match env.iter_mut().find(|e| e.split_once('=').is_some_and(|(n, _)| n == name)) {
            Some(old) => *old = pair,
            None => env.push(pair),
        }
    }

    /// A command as a list; text is for the shell.
    pub fn words(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(list) => list.clone(),
            Command::Shell(text) => [self.shell(), vec![text.clone()]].concat(),
        }
    }

    pub fn shell(&self) -> Vec<String> {
        let own = &self.now.image.config.shell;
        if own.is_empty() { vec!["/bin/sh".into(), "-c".into()] } else { own.clone() }
    }

    /// The image's environment, and the build arguments that it does not name itself.
    pub fn environment(&self) -> Vec<String> {
        let mut env = self.now.image.config.env.clone();
        let has = |env: &[String], name: &str| env.iter().any(|e| e.split_once('=').is_some_and(|(n, _)| n == name));
        let proxies = self.build.options.args.iter().filter(|(n, _)| is_proxy(n));
        for (name, value) in self.args.iter().chain(proxies.map(|(n, v)| (n, v))) {
            if !has(&env, name) {
                env.push(format!("{name}={value}"));
            }
        }
        if !has(&env, "PATH") {
            env.push(PATH.into());
        }
        env
    }

    fn workdir_step(&mut self, step: &Step, path: &str) -> Result<()> {
        let path = self.expand(path)?;
        let joined = absolute(&self.now.image.config.working_dir, &path);
        let mut clean = PathBuf::from("/");
        for part in joined.components() {
            match part {
                std::path::Component::ParentDir => {
                    clean.pop();
                }
                std::path::Component::Normal(name) => clean.push(name),
                _ => {}
            }
        }
        let view = self.view()?;
        let owner = match self.now.image.config.user.as_str() {
            "" => users::Ids::default(),
            user => users::find(&view, user, false).map_err(|why| self.fail(why))?,
        };
        self.now.image.config.working_dir = clean.to_string_lossy().into_owned();
        let resolved = view.resolve(&clean).map_err(|why| self.fail(why))?;
        if resolved.as_os_str().is_empty() || view.node(&resolved).is_some_and(|n| n.is_dir()) {
            self.remember(step, None, true);
            return Ok(());
        }
        let mut plan = Plan::new(&view, (owner.uid, owner.gid));
        plan.directory(&clean).map_err(|why| self.fail(why))?;
        let cached = self.entries_step(&step.text, &plan.entries)?;
        self.commit(step, cached);
        Ok(())
    }

    fn copy_step(&mut self, step: &Step, transfer: &Transfer, add: bool) -> Result<()> {
        let from = transfer.from.as_deref().map(|name| self.source(name)).transpose()?;
        let source = from.as_ref().map(|s| View::open(&self.layer_dirs(s))).transpose()?;
        let target = self.view()?;
        let owner = match &transfer.chown {
            Some(text) => {
                let ids = users::find(&target, &self.expand(text)?, true).map_err(|why| self.fail(why))?;
                Some((ids.uid, ids.gid))
            }
            None if source.is_some() => None,
            None => Some((0, 0)),
        };
        let (nothing, mut exclude, mut exclude_git) = (Ignore::default(), Ignore::default(), Ignore::default());
        for pattern in &transfer.exclude {
            let pattern = self.expand(pattern)?;
            exclude.add(&pattern).map_err(|why| self.fail(why))?;
            exclude_git.add(&pattern).map_err(|why| self.fail(why))?;
        }
        let mut copy = Copy {
            from: source.as_ref().unwrap_or(&self.build.context),
            ignore: if source.is_some() { &nothing } else { &self.build.ignore },
            exclude: &exclude,
            sources: Vec::new(),
            inline: Vec::new(),
            destination: self.expand(&transfer.destination)?,
            workdir: &self.now.image.config.working_dir,
            owner,
            mode: self.mode(transfer)?,
            unpack: add && transfer.unpack.unwrap_or(true),
            fetched: Vec::new(),
            unpack_fetched: transfer.unpack.unwrap_or(false),
            parents: transfer.parents,
        };
        let mut checkout = None;
        for text in &transfer.sources {
            let text = self.expand(text)?;
            match add.then(|| remote::parse(&text)).flatten().transpose().map_err(|why| self.fail(why))? {
                None => copy.sources.push(text),
                Some(Remote::File(url)) => copy.fetched.push(self.fetch(&url, transfer)?),
                Some(Remote::Git(repository)) => checkout = Some((self.checkout(&repository, transfer)?, repository)),
            }
        }
        if transfer.checksum.is_some() && copy.fetched.len() + usize::from(checkout.is_some()) != 1 {
            return Err(self.fail("--checksum is for one file or repository from elsewhere"));
        }
        if let Some((checkout, repository)) = &checkout {
            if transfer.sources.len() + transfer.heredocs.len() > 1 {
                return Err(self.fail("ADD of a repository takes no other source"));
            }
            if !transfer.keep_git_dir {
                exclude_git.add("**/.git").map_err(|why| self.fail(why))?;
            }
            (copy.from, copy.ignore) = (&checkout.view, &nothing);
            (copy.exclude, copy.unpack) = (&exclude_git, false);
            copy.sources.push(format!("/{}", repository.subdirectory));
        }
        for heredoc in &transfer.heredocs {
            let content = match heredoc.expand {
                true => words::expand_text(&heredoc.content, self.build.parsed.escape, &|name| self.variable(name))
                    .map_err(|why| self.fail(why))?,
                false => heredoc.content.clone(),
            };
            copy.inline.push((heredoc.name.clone(), content));
        }
        let entries = copy.plan(&target, self.build.store).map_err(|why| self.fail(why))?;
        let cached = self.entries_step(&step.text, &entries)?;
        self.commit(step, cached);
        Ok(())
    }

    fn fetch(&self, url: &str, transfer: &Transfer) -> Result<Fetched> {
        let checksum = transfer.checksum.as_deref().map(|text| self.expand(text)).transpose()?;
        let checksum = checksum.map(|text| text.parse()).transpose()?;
        self.say(&format!("ADD {url}"));
        self.build.store.fetch(url, checksum, &self.build.options.pull, self.build.progress)
    }

    fn checkout(&self, repository: &Repository, transfer: &Transfer) -> Result<Checkout> {
        let checksum = transfer.checksum.as_deref().map(|text| self.expand(text)).transpose()?;
        self.say(&format!("ADD {}", repository.url));
        repository.checkout(checksum.as_deref(), &|| self.build.check())
    }

    fn mode(&self, transfer: &Transfer) -> Result<Option<Chmod>> {
        let Some(text) = &transfer.chmod else { return Ok(None) };
        Chmod::parse(&self.expand(text)?).map(Some).map_err(|why| self.fail(why))
    }

    /// A layer of known entries: the same entries are the same layer, whatever is below.
    pub fn entries_step(&self, text: &str, entries: &[Entry]) -> Result<Cached> {
        if entries.is_empty() {
            return Ok(Cached::new(None, self.build.now()));
        }
        let content = entries::digest(entries)?;
        let key = Digest::of(format!("entries 1 {content} {:?}", self.build.options.epoch).as_bytes());
        self.cached(text, &key, || self.write(entries))
    }

    pub fn write(&self, entries: &[Entry]) -> Result<Option<Layer>> {
        if entries.is_empty() {
            return Ok(None);
        }
        let store = self.build.store;
        let latest = self.build.options.epoch.and_then(|e| i64::try_from(e).ok());
        let (layer, diff_id) = store.write_layer(entries, latest)?;
        store.ensure_layer(&diff_id, &layer.digest)?;
        Ok(Some((layer, diff_id)))
    }

    /// What the cache has for a key, else what `make` makes.
    pub fn cached(&self, text: &str, key: &Digest, make: impl FnOnce() -> Result<Option<Layer>>) -> Result<Cached> {
        let store = self.build.store;
        if !self.build.options.no_cache
            && let Some(found) = store.cache_get(key)?
        {
            self.say(&format!("{text} (cached)"));
            return Ok(found);
        }
        self.build.with_slot(|| {
            self.build.check()?;
            self.say(text);
            let made = Cached::new(make()?, self.build.now());
            store.cache_put(key, &made)?;
            Ok(made)
        })
    }

    pub fn commit(&mut self, step: &Step, cached: Cached) {
        let empty = cached.layer.is_none();
        if let Some(layer) = cached.layer {
            self.build.uses(std::slice::from_ref(&layer));
            self.now.layers.push(layer);
            self.now.created = self.now.created.max(cached.created);
        }
        self.remember(step, Some(cached.created), empty);
    }

    fn remember(&mut self, step: &Step, created: Option<u64>, empty: bool) {
        if self.now.created == 0 {
            self.now.created = created.unwrap_or_else(|| self.build.now());
        }
        let created = self.build.options.epoch.or(created).unwrap_or(self.now.created);
        self.now.image.history.push(History {
            created: Some(clock::rfc3339(created.cast_signed())),
            created_by: Some(step.text.clone()),
            comment: Some("atoll".into()),
            empty_layer: empty,
            author: None,
        });
    }
}

/// Docker's layer types by their OCI names: the new manifest is OCI's.
fn oci_layer(mut layer: Descriptor) -> Descriptor {
    layer.media_type = match layer.media_type.as_str() {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => media::OCI_LAYER_GZIP.into(),
        "application/vnd.docker.image.rootfs.diff.tar" => media::OCI_LAYER.into(),
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => media::OCI_LAYER_ZSTD.into(),
        other => other.to_owned(),
    };
    layer
}

/// `8080`, `8080/udp`, `8000-8010/tcp`.
fn ports(text: &str) -> std::result::Result<Vec<String>, String> {
    let wrong = || format!("EXPOSE {text:?}: write it as 8080, 8080/udp or 8000-8010");
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(wrong());
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last) = (first.parse::<u16>().map_err(|_| wrong())?, last.parse::<u16>().map_err(|_| wrong())?);
    if first > last {
        return Err(wrong());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// Whether a path is what a command would look up from the root.
pub(super) fn clean_target(workdir: &str, target: &str) -> PathBuf {
    let joined = absolute(if workdir.is_empty() { "/" } else { workdir }, target);
    Path::new("/")
        .join(joined.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect::<PathBuf>())
}
