//! `RUN`: what its sandbox is given, its place in the cache, what becomes of what it wrote.

use super::agent::Agent;
use super::copy::Copy;
use super::diff::Diff;
use super::ignore::Ignore;
use super::mounts::{self, Kind, Sharing};
use super::parse::{Run, Step};
use super::stage::{Layer, Stage, clean_target};
use super::users::{self, Ids};
use super::view::{Tree, View};
use super::{MountSource, RunEnd, RunMount, RunSpec, Secret};
use crate::digest::Digest;
use crate::error::{Error, Result, io};
use rustix::fs::{FlockOperation, Gid, Mode, Uid, flock};
use serde_json::json;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A secret's bytes.
const SECRET_LIMIT: u64 = 500 << 10;
/// Lines of output shown again if the command fails.
const LAST_LINES: usize = 10;
/// Where a script written in the Containerfile is, if it names its interpreter.
const SCRIPT: &str = "/dev/shm/atoll-script";

/// Mounts of one `RUN`, and what has to be held while it runs.
#[derive(Default)]
struct Mounted {
    mounts: Vec<RunMount>,
    /// For the cache: what can change the result.
    keys: Vec<String>,
    env: Vec<String>,
    /// Cache directories in use.
    held: Vec<OwnedFd>,
    /// Ways to agents, for as long as the command runs.
    agents: Vec<Agent>,
}

impl Stage<'_> {
    pub fn run_step(&mut self, step: &Step, run: &Run) -> Result<()> {
        let config = &self.now.image.config;
        let host_network = match run.network.as_deref() {
            None | Some("default") => self.build.options.network,
            Some("none") => false,
            Some("host") if self.build.options.network => true,
            Some("host") => return Err(self.fail("--network=host: allow it with `atoll image build --network host`")),
            Some(other) => return Err(self.fail(format!("--network={other}: it is none, default or host"))),
        };
        let view = self.view()?;
        let ids = match config.user.as_str() {
            "" => Ids::default(),
            user => users::find(&view, user, false).map_err(|why| self.fail(why))?,
        };
        let cwd = if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir.clone() };
        let mut mounted = self.mounts(run, &cwd)?;
        let args = match &run.script {
            Some(script) if script.starts_with("#!") => {
                let content = script.clone().into_bytes();
                let source = MountSource::File { content, mode: 0o755, uid: 0, gid: 0 };
                mounted.mounts.push(RunMount { target: SCRIPT.into(), source, read_only: true });
                vec![SCRIPT.to_owned()]
            }
            Some(script) => [self.shell(), vec![script.clone()]].concat(),
            None => self.words(&run.command),
        };
        if args.is_empty() {
            return Err(self.fail("RUN []: names no command"));
        }
        let env = self.environment();
        let parents: Vec<Digest> = self.now.layers.iter().map(|(_, diff_id)| *diff_id).collect();
        let key = json!({
            "run": 1, "parents": parents, "args": args, "script": run.script, "env": env, "cwd": cwd,
            "ids": [ids.uid, ids.gid], "groups": ids.groups, "mounts": mounted.keys, "network": host_network,
            "epoch": self.build.options.epoch,
        });
        let key = Digest::of(&crate::import::to_json(&key)?);
        let spec = RunSpec {
            title: self.label.clone(),
            layers: self.layer_dirs(&self.now),
            args,
            env: [env, std::mem::take(&mut mounted.env)].concat(),
            cwd,
            uid: ids.uid,
            gid: ids.gid,
            groups: ids.groups,
            mounts: std::mem::take(&mut mounted.mounts),
            host_network,
            memory: self.build.options.memory,
            work: PathBuf::new(),
        };
        let cached = self.cached(&step.text, &key, || self.execute(spec, &view))?;
        drop(mounted);
        self.commit(step, cached);
        Ok(())
    }

    fn execute(&self, mut spec: RunSpec, lower: &View) -> Result<Option<Layer>> {
        let (work, _held) = self.build.store.temporary_dir()?;
        spec.work = work.clone();
        let mut targets: Vec<PathBuf> = spec.mounts.iter().map(|m| m.target.clone()).collect();
        // What every sandbox has.
        let usual = ["/proc", "/dev", "/sys", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];
        targets.extend(usual.map(PathBuf::from));
        // The runtime makes it if it is missing; `WORKDIR` is what puts it into the image.
        targets.push(spec.cwd.clone().into());
        let mut last: VecDeque<String> = VecDeque::new();
        let mut output = |line: &str| {
            self.say(line);
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(line.to_owned());
        };
        let mut layer = None;
        let mut finished = |upper: &std::path::Path, id_base: u32| {
            let upper = Tree::open(upper)?;
            let entries = Diff::new(&upper, lower, id_base, &targets).entries().map_err(|why| self.fail(why))?;
            layer = self.write(&entries)?;
            Ok(())
        };
        let ended = self.build.executor.run(&spec, &mut output, &mut finished);
        let removed = std::fs::remove_dir_all(&work);
        match ended? {
            RunEnd::Succeeded => {
                removed.map_err(io("remove", &work))?;
                Ok(layer)
            }
            RunEnd::Failed(why) => {
                let tail: Vec<String> = last.into_iter().collect();
                let said = if tail.is_empty() { String::new() } else { format!("\n  {}", tail.join("\n  ")) };
                Err(self.fail(format!("RUN {}: {why}{said}", spec.args.join(" "))))
            }
        }
    }

    fn mounts(&self, run: &Run, cwd: &str) -> Result<Mounted> {
        let mut mounted = Mounted::default();
        for text in &run.mounts {
            let text = self.expand(text)?;
            let mount = mounts::parse(&text).map_err(|why| self.fail(why))?;
            let target = clean_target(cwd, &mount.target);
            if target == std::path::Path::new("/") {
                return Err(self.fail(format!("--mount={text}: the target is the root")));
            }
            let (source, read_only) = match mount.kind {
                Kind::Bind { from, source } => {
                    let (path, key) = self.bind(from.as_deref(), &source)?;
                    mounted.keys.push(format!("bind {} {key}", target.display()));
                    (MountSource::Path(path), true)
                }
                Kind::Tmpfs { size } => {
                    mounted.keys.push(format!("tmpfs {}", target.display()));
                    (MountSource::Tmpfs { size }, false)
                }
                Kind::Cache { id, sharing, read_only, mode, uid, gid } => {
                    let (path, held) = self.cache_directory(&id, sharing, mode, (uid, gid))?;
                    mounted.held.push(held);
                    mounted.keys.push(format!("cache {} {id}", target.display()));
                    (MountSource::Path(path), read_only)
                }
                Kind::Ssh { id, required, mode, uid, gid } => {
                    let Some((_, socket)) = self.build.options.ssh.iter().find(|(name, _)| *name == id) else {
                        if required {
                            return Err(self.fail(format!("ssh agent {id:?} is required; give it with --ssh {id}")));
                        }
                        continue;
                    };
                    let agent = Agent::start(self.build.store, socket, mode, (uid, gid))?;
                    mounted.keys.push(format!("ssh {} {id}", target.display()));
                    if !mounted.env.iter().any(|e| e.starts_with("SSH_AUTH_SOCK=")) {
                        mounted.env.push(format!("SSH_AUTH_SOCK={}", target.display()));
                    }
                    let source = MountSource::Path(agent.socket());
                    mounted.agents.push(agent);
                    (source, false)
                }
                Kind::Secret { id, variable, file, required, mode, uid, gid } => {
                    let Some(content) = self.secret(&id)? else {
                        if required {
                            return Err(
                                self.fail(format!("secret {id:?} is required; give it with --secret id={id},src=PATH"))
                            );
                        }
                        continue;
                    };
                    if let Some(variable) = variable {
                        let value = String::from_utf8(content.clone())
                            .ok()
                            .filter(|v| !v.contains('\0'))
                            .ok_or_else(|| self.fail(format!("secret {id:?} is not text")))?;
                        mounted.env.push(format!("{variable}={value}"));
                    }
                    if !file {
                        continue;
                    }
                    (MountSource::File { content, mode, uid, gid }, true)
                }
            };
            mounted.mounts.push(RunMount { target, source, read_only });
        }
        Ok(mounted)
    }

    /// Files of the context, a stage or an image, as a layer of their own: a path to mount, and its digest.
    fn bind(&self, from: Option<&str>, source: &str) -> Result<(PathBuf, Digest)> {
        let nothing = Ignore::default();
        let snapshot = from.map(|name| self.source(name)).transpose()?;
        let view = snapshot.as_ref().map(|s| View::open(&self.layer_dirs(s))).transpose()?;
        let copy = Copy {
            from: view.as_ref().unwrap_or(&self.build.context),
            ignore: if view.is_some() { &nothing } else { &self.build.ignore },
            exclude: &nothing,
            sources: vec![source.to_owned()],
            inline: Vec::new(),
            destination: "/bind".into(),
            workdir: "/",
            owner: if view.is_some() { None } else { Some((0, 0)) },
            mode: None,
            unpack: false,
            fetched: Vec::new(),
            unpack_fetched: false,
            parents: false,
        };
        let empty = View::open(&[])?;
        let entries = copy.plan(&empty, self.build.store).map_err(|why| self.fail(why))?;
        let cached = self.entries_step(&format!("mount {source}"), &entries)?;
        let layer = cached.layer.ok_or_else(|| self.fail(format!("{source}: there is nothing to mount")))?;
        self.build.uses(std::slice::from_ref(&layer));
        Ok((self.build.store.layer_dir(&layer.1).join("fs/bind"), layer.1))
    }

    /// A directory that stays from build to build. Held, so that garbage collection leaves it alone.
    fn cache_directory(&self, id: &str, sharing: Sharing, mode: u32, owner: (u32, u32)) -> Result<(PathBuf, OwnedFd)> {
        let base = self.build.store.root().join("caches");
        for number in 0u32.. {
            let name = if number == 0 { id.to_owned() } else { format!("{id} {number}") };
            let path = base.join(Digest::of(name.as_bytes()).hex());
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) => {
                    let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
                    rustix::fs::chown(&path, Some(uid), Some(gid)).map_err(io("give away", &path))?;
                    rustix::fs::chmod(&path, Mode::from_raw_mode(mode)).map_err(io("chmod", &path))?;
                }
                Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(io("create directory", &path)(e)),
            }
            let Ok(held) = crate::store::open_dir(&path) else { continue };
            let operation = match sharing {
                Sharing::Shared => FlockOperation::LockShared,
                Sharing::Locked => FlockOperation::LockExclusive,
                Sharing::Private => FlockOperation::NonBlockingLockExclusive,
            };
            match flock(&held, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => continue,
                Err(e) => return Err(io("lock", &path)(e)),
            }
            // It may have been collected in between.
            if path.exists() {
                crate::blob::touch(&path)?;
                return Ok((path, held));
            }
        }
        Err(self.fail(format!("cache {id:?}: too many builds use it at once")))
    }

    fn secret(&self, wanted: &str) -> Result<Option<Vec<u8>>> {
        for secret in &self.build.options.secrets {
            match secret {
                Secret::File { id, path } if id == wanted => {
                    let file = File::open(path).map_err(io("open", path))?;
                    return crate::blob::read_limited(file, SECRET_LIMIT, &format!("secret {id}")).map(Some);
                }
                Secret::Variable { id, variable } if id == wanted => {
                    let value = std::env::var_os(variable).ok_or_else(|| {
                        Error::invalid(format!("--secret id={id}"), format!("the environment has no {variable}"))
                    })?;
                    return Ok(Some(value.into_encoded_bytes()));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}
