//! One container's [`ContainerSpec`]: command, environment, mounts, user.

use super::{Sandbox, Worker};
use crate::boundary::{ContainerSpec, Mount, MountSource, Rootfs};
use crate::config::log_path;
use crate::env::{self, Env, EnvInput};
use crate::events::Level;
use crate::ports::{ImageConfig, ResolvedImage};
use crate::resources;
use crate::security::{self, Resolved};
use crate::sources::{self, Sources};
use crate::volumes::{self, chain, tree};
use api::k8s::api::core::v1 as core;
use api::object::Meta;
use std::path::{Path, PathBuf};

/// Why a container cannot be described: the reason for its waiting state and the text.
#[derive(Debug)]
pub(super) struct SpecError {
    pub reason: &'static str,
    pub message: String,
}

fn config_error(message: impl std::fmt::Display) -> SpecError {
    SpecError { reason: "CreateContainerConfigError", message: message.to_string() }
}

impl Worker {
    pub(super) async fn container_spec(
        &mut self,
        sandbox: &Sandbox,
        index: usize,
        image: &ResolvedImage,
    ) -> Result<ContainerSpec, SpecError> {
        let container = self.container(index).ok_or_else(|| config_error("no such container"))?;
        let attempt = self.slots.get(index).map_or(0, |s| s.next_attempt());
        let spec = self.spec();
        let names = sources::of_container(&container);
        let sources = Sources::fetch(self.shared.client.as_ref(), self.object.namespace(), &names);
        let sources = sources.await.map_err(config_error)?;
        let links = spec.enable_service_links.unwrap_or(true);
        let services = self.shared.service_env(self.object.namespace(), links).await;
        let facts = self.shared.facts(sandbox.spec.network.addresses());
        let input = EnvInput {
            pod: &self.pod,
            container: &container,
            image_env: &image.config.env,
            services: &services,
            sources: &sources,
            facts: &facts,
            hostname: &sandbox.spec.hostname,
        };
        let mut environment = env::build(&input).map_err(config_error)?;
        if !environment.skipped.is_empty() {
            let list = environment.skipped.join(", ");
            let text =
                format!("Keys [{list}] were skipped since they are considered invalid environment variable names.");
            self.container_event(index, Level::Warning, "InvalidEnvironmentVariableNames", text);
        }
        let args = command(&container, &image.config, &environment);
        if args.is_empty() && matches!(image.rootfs, Rootfs::Layers { .. }) {
            let message = "no command specified: neither the image nor spec.containers[].command says what to run";
            return Err(SpecError { reason: "CreateContainerError", message: message.into() });
        }
        let job = Files {
            dir: self.dir.clone(),
            pod: self.pod.clone(),
            container: container.clone(),
            attempt,
            image_user: image.config.user.clone(),
            rootfs: image.rootfs.clone(),
            fs_group: self.fs_group(),
        };
        let (resolved, mut mounts, environment_after) = tokio::task::spawn_blocking(move || {
            let resolved = security::resolve(
                &job.pod.spec.clone().unwrap_or_default(),
                &job.container,
                &job.image_user,
                &job.rootfs,
            )
            .map_err(config_error)?;
            let mounts = job.mounts(&environment)?;
            Ok::<_, SpecError>((resolved, mounts, environment))
        })
        .await
        .map_err(config_error)??;
        environment = environment_after;
        mounts.sort_by_key(|m| m.target.components().count());
        Ok(ContainerSpec {
            name: container.name.clone(),
            attempt,
            rootfs: image.rootfs.clone(),
            args,
            env: variables(environment, &container, &image.rootfs, &resolved),
            cwd: cwd(&container, &image.config),
            mounts,
            resources: resources::of_container(&container),
            security: resolved.security,
            tty: container.tty == Some(true),
            stdin: container.stdin == Some(true),
            stdin_once: container.stdin_once == Some(true),
            log_path: log_path(&self.dir, &container.name, attempt),
            log_max_bytes: self.shared.config.log_max_bytes,
        })
    }

    /// The signal that asks this container to stop: the pod's, else the image's, else 15.
    pub(super) fn stop_signal(container: &core::Container, image: &ImageConfig) -> i32 {
        let own = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref());
        own.and_then(resources::signal).or_else(|| resources::signal(&image.stop_signal)).unwrap_or(15)
    }
}

/// `command` replaces entry point and arguments of the image, `args` only the arguments.
fn command(container: &core::Container, image: &ImageConfig, environment: &Env) -> Vec<String> {
    let expand = |list: &[String]| -> Vec<String> { list.iter().map(|t| environment.expand(t)).collect() };
    let own_command = container.command.as_deref().unwrap_or_default();
    let own_args = container.args.as_deref().unwrap_or_default();
    let mut out = if own_command.is_empty() { image.entrypoint.clone() } else { expand(own_command) };
    if !own_args.is_empty() {
        out.extend(expand(own_args));
    } else if own_command.is_empty() {
        out.extend(image.cmd.iter().cloned());
    }
    out
}

fn cwd(container: &core::Container, image: &ImageConfig) -> String {
    let own = container.working_dir.as_deref().filter(|d| !d.is_empty());
    let dir = own.unwrap_or(if image.workdir.is_empty() { "/" } else { &image.workdir });
    if dir.starts_with('/') { dir.to_owned() } else { format!("/{dir}") }
}

fn variables(environment: Env, container: &core::Container, rootfs: &Rootfs, who: &Resolved) -> Vec<(String, String)> {
    let mut vars = environment.vars;
    let has = |vars: &[(String, String)], name: &str| vars.iter().any(|(n, _)| n == name);
    if !has(&vars, "HOME") {
        let home = who.home.clone().filter(|h| h.starts_with('/')).unwrap_or_else(|| "/".into());
        vars.push(("HOME".into(), home));
    }
    if container.tty == Some(true) && !has(&vars, "TERM") {
        vars.push(("TERM".into(), "xterm".into()));
    }
    if let Rootfs::Component { .. } = rootfs
        && !has(&vars, "PORT")
    {
        // Where a function listens: its first container port.
        let port = container.ports.iter().flatten().next().map_or(8080, |p| p.container_port);
        vars.push(("PORT".into(), port.to_string()));
    }
    vars
}

pub(super) fn termination_file(dir: &Path, container: &str, attempt: u32) -> PathBuf {
    dir.join("termination").join(container).join(attempt.to_string())
}

/// What has to be looked up or made on disk.
struct Files {
    dir: PathBuf,
    pod: core::Pod,
    container: core::Container,
    attempt: u32,
    image_user: String,
    rootfs: Rootfs,
    fs_group: Option<u32>,
}

impl Files {
    fn mounts(&self, environment: &Env) -> Result<Vec<Mount>, SpecError> {
        if !matches!(self.rootfs, Rootfs::Layers { .. }) && self.container.volume_mounts.is_none() {
            return Ok(Vec::new());
        }
        let expand = |text: &str| environment.expand(text);
        let mut mounts = volumes::container_mounts(&self.dir, &self.pod, &self.container, &expand, self.fs_group)
            .map_err(|e| config_error(format!("failed to prepare volume mounts: {}", chain(&e))))?;
        let mut add = |source: PathBuf, target: &str| {
            // What the pod mounts there itself wins.
            if !mounts.iter().any(|m: &Mount| m.target == Path::new(target)) {
                mounts.push(Mount {
                    source: MountSource::Pod(source),
                    target: PathBuf::from(target),
                    read_only: false,
                    propagation: "None".into(),
                    volume: None,
                });
            }
        };
        for name in ["hosts", "resolv.conf", "hostname"] {
            add(self.dir.join("etc").join(name), &format!("/etc/{name}"));
        }
        let path = self.container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
        if path.starts_with('/') && !path.split('/').any(|p| p == "..") && path.len() > 1 {
            let file = termination_file(&self.dir, &self.container.name, self.attempt);
            let made = std::fs::create_dir_all(file.parent().unwrap_or(&self.dir))
                .and_then(|()| std::fs::File::create(&file).map(drop));
            made.map_err(|e| config_error(format!("{}: {e}", file.display())))?;
            tree::own(&file, self.fs_group, 0o666).map_err(|e| config_error(chain(&e)))?;
            add(file, path);
        }
        Ok(mounts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn commands() {
        let go = |own: serde_json::Value, entrypoint: &[&str], cmd: &[&str]| {
            let container: core::Container = serde_json::from_value(own).unwrap();
            let list = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect();
            let image = ImageConfig { entrypoint: list(entrypoint), cmd: list(cmd), ..ImageConfig::default() };
            command(&container, &image, &Env::default()).join(" ")
        };
        assert_eq!(go(json!({"name": "c"}), &["e"], &["c"]), "e c");
        assert_eq!(go(json!({"name": "c", "args": ["a"]}), &["e"], &["c"]), "e a");
        assert_eq!(go(json!({"name": "c", "command": ["x"]}), &["e"], &["c"]), "x");
        assert_eq!(go(json!({"name": "c", "command": ["x"], "args": ["a"]}), &["e"], &["c"]), "x a");
        assert_eq!(go(json!({"name": "c"}), &[], &[]), "");
    }
}
