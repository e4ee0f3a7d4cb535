//! Making a pod's sandbox: a list of steps, each of which can be undone; a failure at one undoes those before it.

use super::bandwidth::wanted;
use super::{Sandbox, Stage, Why, Worker, limited};
use crate::boundary::{Boundary, BoundaryError, SandboxImage, SandboxNetwork, SandboxSpec};
use crate::events::Level;
use crate::machine::{self, InstanceSpec, MachineError, MachineInput};
use crate::ports::{Attach, ImageError, NetworkError};
use crate::record::Record;
use crate::sources::{self, Sources};
use crate::volumes::{self, Tokens, VolumeError, chain, tree};
use crate::{etc_files, kept, resources, security};
use api::k8s::api::core::v1 as core;
use api::kind::Resource;
use api::networks::NETWORK;
use api::object::Meta;
use api::status::Found;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const MAX_RETRY: Duration = Duration::from_secs(10);

/// Why there is no sandbox yet. The display is what events and the pod's status say.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error("RuntimeClass \"{0}\" not found")]
    NoRuntimeClass(String),
    #[error("RuntimeClass \"{class}\": no handler \"{handler}\" on this node; there are {known}")]
    NoHandler { class: String, handler: String, known: String },
    #[error("{0}")]
    Unsupported(String),
    #[error("all ranges of user ids are taken")]
    NoIds,
    #[error("network: {0}")]
    Network(#[from] NetworkError),
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {}", chain(.error))]
    Volume { volume: String, error: VolumeError },
    #[error("{operation}: {message}")]
    Io { operation: &'static str, message: String },
    #[error("machine: {}", chain(.0))]
    Machine(#[from] MachineError),
    #[error("{0}")]
    Snapshot(String),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("Failed to create pod sandbox: {0}")]
    Boundary(#[from] BoundaryError),
    #[error("{0}")]
    Api(#[from] api::Status),
    /// Images of a machine are on their way; not a failure.
    #[error("waiting for images")]
    Waiting,
}

impl SetupError {
    fn event(&self) -> &'static str {
        match self {
            SetupError::Volume { .. } => "FailedMount",
            _ => "FailedCreatePodSandBox",
        }
    }
    /// A reason for the containers' state where the user has to do something.
    fn reason(&self) -> Option<&str> {
        match self {
            SetupError::NoRuntimeClass(_) | SetupError::NoHandler { .. } => Some("RuntimeClassNotFound"),
            SetupError::Unsupported(_) => Some("UnsupportedPod"),
            SetupError::Machine(_) => Some("InvalidMachine"),
            SetupError::Snapshot(_) => Some("UnusableSnapshot"),
            SetupError::Network(error) => error.reason,
            SetupError::Image(_) => Some("ImageInspectError"),
            SetupError::Boundary(BoundaryError::Refused { reason, .. }) => Some(reason),
            SetupError::Boundary(BoundaryError::Unsupported { .. }) => Some("UnsupportedPod"),
            _ => None,
        }
    }
}

fn io(operation: &'static str) -> impl FnOnce(std::io::Error) -> SetupError {
    move |error| SetupError::Io { operation, message: error.to_string() }
}

fn joined<T>(result: Result<Result<T, SetupError>, tokio::task::JoinError>) -> Result<T, SetupError> {
    result.unwrap_or_else(|e| Err(SetupError::Io { operation: "set-up", message: e.to_string() }))
}

/// How long after a refusal a token is asked for again.
const TOKEN_RETRY: Duration = Duration::from_secs(10);

impl Worker {
    pub(super) async fn step_absent(&mut self, tries: u32, retry: Option<Instant>) -> bool {
        if let Some((why, _)) = self.must_stop() {
            if why == Why::Deadline {
                self.end = Some(super::End {
                    succeeded: false,
                    reason: "DeadlineExceeded".into(),
                    message: "Pod was active on the node longer than the specified deadline".into(),
                });
            }
            let base = self.id_base.take().unwrap_or(0);
            self.undo_all(base).await;
            self.stage = Stage::Ended;
            return true;
        }
        if let Some(at) = retry.filter(|at| *at > Instant::now()) {
            self.wake_at(at);
            self.stage = Stage::Absent { tries, retry };
            return false;
        }
        if self.start_time.is_none() {
            self.start_time = Some(super::report::now());
        }
        match self.set_up().await {
            Ok(sandbox) => {
                self.trouble = None;
                self.dirty = true;
                for slot in &mut self.slots {
                    if slot.latest_end().is_none() && !slot.is_running() {
                        let waits =
                            if slot.role == super::Role::Main { "ContainerCreating" } else { "PodInitializing" };
                        slot.state = super::State::waiting(waits, "");
                    }
                }
                self.stage = Stage::Live(sandbox);
                true
            }
            Err(SetupError::Waiting) => {
                self.stage = Stage::Absent { tries, retry: None };
                false
            }
            Err(error) => {
                let message = error.to_string();
                self.event(Level::Warning, error.event(), message.clone());
                self.trouble = error.reason().map(|r| (r.to_owned(), message.clone()));
                for slot in self.slots.iter_mut().filter(|s| !s.is_running()) {
                    let reason = error.reason().unwrap_or("ContainerCreating");
                    let text = if error.reason().is_some() { message.as_str() } else { "" };
                    slot.wait(reason, text);
                }
                let delay = Duration::from_millis(500).saturating_mul(1 << tries.min(8)).min(MAX_RETRY);
                let at = Instant::now() + delay;
                self.wake_at(at);
                self.stage = Stage::Absent { tries: tries.saturating_add(1), retry: Some(at) };
                false
            }
        }
    }

    /// All steps, in order.
    async fn set_up(&mut self) -> Result<Sandbox, SetupError> {
        let spec = self.spec();
        self.refuse_unsupported(&spec)?;
        let boundary = self.choose_boundary(&spec).await?;
        let instance = self.machine_instance(boundary.as_ref())?;
        let images = match &instance {
            Some(instance) => instance.images(),
            None => self.images_first(&spec, boundary.as_ref()),
        };
        if !images.is_empty() && !self.machine_images_ready(super::image::machine_references(&images)) {
            return Err(SetupError::Waiting);
        }
        let images = if instance.is_some() { Vec::new() } else { self.block_images(&images).await? };
        let id_base = match self.id_base.take() {
            Some(base) => base,
            None if security::host_users(&spec) => 0,
            None => self.shared.ids.take().ok_or(SetupError::NoIds)?,
        };
        let made = self.set_up_with(&spec, boundary, (instance.as_ref(), images), id_base).await;
        if made.is_err() {
            self.undo_all(id_base).await;
        }
        made
    }

    async fn set_up_with(
        &mut self,
        spec: &core::PodSpec,
        boundary: Arc<dyn Boundary>,
        (instance, images): (Option<&InstanceSpec>, Vec<SandboxImage>),
        id_base: u32,
    ) -> Result<Sandbox, SetupError> {
        if instance.is_none() && images.is_empty() {
            self.look_for_images();
        }
        self.make_dirs().await?;
        self.done("directories");
        let network = self.attach(spec, boundary.wants_tap()).await?;
        self.done("network");
        self.write_etc(spec, &network).await?;
        let sources = self.set_up_volumes(&network).await?;
        self.done("volumes");
        let mut sandbox = SandboxSpec { images, ..self.sandbox_spec(spec, network, id_base) };
        if let Some(instance) = instance {
            sandbox.machine = Some(self.machine(instance, &sandbox).await?);
        }
        drop(sources);
        let grace = self.spec_grace().as_secs();
        let record = Record::new(boundary.name(), grace, sandbox.clone());
        let (dir, copy) = (self.dir.clone(), record.clone());
        let written = tokio::task::spawn_blocking(move || {
            copy.write(&dir).map_err(|e| SetupError::Io { operation: "sandbox.json", message: chain(&e) })
        });
        joined(written.await)?;
        self.done("record");
        limited(boundary.prepare(&sandbox)).await?;
        self.done("shim");
        Ok(Sandbox { spec: Arc::new(sandbox), record: Arc::new(Mutex::new(record)), boundary })
    }

    /// Undoes every step that may have been made. Logs and the last status stay.
    async fn undo_all(&mut self, id_base: u32) {
        let (dir, run_dir) = (self.dir.clone(), self.shared.config.pod_run_dir(&self.uid));
        if !dir.exists() {
            self.shared.ids.release(id_base);
            return;
        }
        let record = Record::read(&dir).ok().flatten();
        if let Some(record) = record
            && let Some(boundary) = self.shared.boundaries.get(record.boundary.as_str())
            && let Err(error) = limited(boundary.destroy(&record.sandbox)).await
            && !matches!(error, BoundaryError::NoSandbox(_))
        {
            tracing::warn!(pod = self.object.name(), "leftovers of a sandbox: {error}");
        }
        if let Err(error) = self.shared.networks.detach(&self.uid).await {
            tracing::warn!(pod = self.object.name(), "leftovers of the network: {error}");
        }
        let cleaned = tokio::task::spawn_blocking(move || {
            let _ = std::fs::remove_file(dir.join("sandbox.json"));
            for part in ["subpaths", "volumes", "termination", "etc", "disks", "boundary"] {
                tree::remove(&dir.join(part))?;
            }
            tree::remove(&run_dir)
        });
        if let Ok(Err(error)) = cleaned.await {
            tracing::warn!(pod = self.object.name(), "leftovers of a pod: {error}");
        }
        self.shared.ids.release(id_base);
    }

    fn refuse_unsupported(&self, spec: &core::PodSpec) -> Result<(), SetupError> {
        let refuse =
            |field: &str| Err(SetupError::Unsupported(format!("{field}: not supported by this node; leave it out")));
        if spec.host_pid == Some(true) {
            return refuse("spec.hostPID");
        }
        if spec.host_ipc == Some(true) {
            return refuse("spec.hostIPC");
        }
        if !crate::config::is_plain_name(&self.uid) || self.slots.iter().any(|s| !crate::config::is_plain_name(&s.name))
        {
            return Err(SetupError::Unsupported("metadata.uid and container names must be plain names".into()));
        }
        if super::plan::containers(spec).any(|(_, c)| c.volume_devices.as_ref().is_some_and(|d| !d.is_empty())) {
            return refuse("volumeDevices");
        }
        let sysctls = spec.security_context.iter().flat_map(|c| c.sysctls.iter().flatten());
        for sysctl in sysctls {
            if !own_sysctl(&sysctl.name, spec.host_network == Some(true)) {
                return refuse(&format!(
                    "spec.securityContext.sysctls \"{}\", which is not the pod's own",
                    sysctl.name
                ));
            }
        }
        let mut ports = plan_ports(spec);
        if let Some(port) = ports.next() {
            return refuse(&format!("hostPort {port}"));
        }
        Ok(())
    }

    async fn choose_boundary(&self, spec: &core::PodSpec) -> Result<Arc<dyn Boundary>, SetupError> {
        let Some(class) = spec.runtime_class_name.as_deref().filter(|c| !c.is_empty()) else {
            return self.boundary("", "container");
        };
        let resource = Resource::new("node.k8s.io", "v1", "runtimeclasses");
        match self.shared.client.get(&resource, "", class).await.found()? {
            Some(object) => self.boundary(class, object.str_at("/handler")),
            None => Err(SetupError::NoRuntimeClass(class.to_owned())),
        }
    }

    fn boundary(&self, class: &str, handler: &str) -> Result<Arc<dyn Boundary>, SetupError> {
        self.shared.boundaries.get(handler).cloned().ok_or_else(|| SetupError::NoHandler {
            class: class.to_owned(),
            handler: handler.to_owned(),
            known: self.shared.boundaries.keys().copied().collect::<Vec<_>>().join(", "),
        })
    }

    fn machine_instance(&self, boundary: &dyn Boundary) -> Result<Option<InstanceSpec>, SetupError> {
        match self.object.annotation(machine::ANNOTATION) {
            Some(text) if boundary.wants_tap() => Ok(Some(InstanceSpec::parse(text)?)),
            _ => Ok(None),
        }
    }

    /// Images that have to be here before there is a sandbox.
    fn images_first(&self, spec: &core::PodSpec, boundary: &dyn Boundary) -> Vec<(String, Option<String>)> {
        if !boundary.wants_block_images() {
            return Vec::new();
        }
        let of = |c: &core::Container| (c.image.clone().unwrap_or_default(), c.image_pull_policy.clone());
        super::plan::containers(spec).map(|(_, container)| of(container)).collect()
    }

    /// The containers' images as block devices, each once.
    async fn block_images(&self, wanted: &[(String, Option<String>)]) -> Result<Vec<SandboxImage>, SetupError> {
        let mut images: Vec<SandboxImage> = Vec::new();
        for (reference, _) in wanted {
            let image = self.shared.images.block(reference).await?;
            if !images.contains(&image) {
                images.push(image);
            }
        }
        Ok(images)
    }

    async fn make_dirs(&self) -> Result<(), SetupError> {
        let (dir, run_dir) = (self.dir.clone(), self.shared.config.pod_run_dir(&self.uid));
        let names: Vec<String> = self.slots.iter().map(|s| s.name.clone()).collect();
        joined(
            tokio::task::spawn_blocking(move || {
                let private = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
                private(dir.as_path()).map_err(io("make the pod's directory"))?;
                private(run_dir.as_path()).map_err(io("make the pod's run directory"))?;
                for name in names {
                    private(&dir.join("logs").join(name)).map_err(io("make the log directory"))?;
                }
                Ok(())
            })
            .await,
        )
    }

    async fn attach(&mut self, spec: &core::PodSpec, tap: bool) -> Result<SandboxNetwork, SetupError> {
        let config = &self.shared.config;
        let namespace = self.object.namespace();
        let mut network = if spec.host_network == Some(true) {
            SandboxNetwork {
                host: true,
                address: Some(config.node_ip),
                address6: config.node_ip6,
                ..SandboxNetwork::default()
            }
        } else {
            let key = kept::key(&self.object, tap).map_err(SetupError::Unsupported)?;
            let bandwidth = wanted(&self.object).map_err(SetupError::Unsupported)?;
            let asked = self.object.annotation(NETWORK);
            let request = Attach {
                uid: self.uid.clone(),
                namespace: namespace.to_owned(),
                address_key: key,
                tap,
                bandwidth,
                place: self.shared.networks.place(&self.uid, namespace, asked).await?,
            };
            let attached = self.shared.networks.attach(&request).await?;
            self.bandwidth = Some(bandwidth);
            attached
        };
        let resolver = self.resolver(spec);
        network.dns = resolver.servers.iter().find_map(|s| s.parse().ok());
        network.dns_search = resolver.search;
        Ok(network)
    }

    fn resolver(&self, spec: &core::PodSpec) -> etc_files::Resolver {
        let config = &self.shared.config;
        let node = &self.shared.node_resolver;
        etc_files::resolver(spec, self.object.namespace(), config.cluster_dns, &config.cluster_domain, node)
    }

    pub(super) fn host_name(&self, spec: &core::PodSpec) -> etc_files::HostName {
        let domain = &self.shared.config.cluster_domain;
        etc_files::host_name(self.object.name(), self.object.namespace(), spec, domain)
    }

    async fn write_etc(&self, spec: &core::PodSpec, network: &SandboxNetwork) -> Result<(), SetupError> {
        let name = self.host_name(spec);
        let files = [
            ("hosts", etc_files::hosts(spec, &network.addresses(), &name)),
            ("resolv.conf", self.resolver(spec).text()),
            ("hostname", format!("{}\n", name.shown)),
        ];
        let dir = self.dir.join("etc");
        joined(
            tokio::task::spawn_blocking(move || {
                std::fs::create_dir_all(&dir).map_err(io("make etc"))?;
                for (name, text) in files {
                    let path = dir.join(name);
                    std::fs::write(&path, text).map_err(io("write a file of /etc"))?;
                    tree::own(&path, None, 0o644)
                        .map_err(|e| SetupError::Io { operation: "own a file of /etc", message: chain(&e) })?;
                }
                Ok(())
            })
            .await,
        )
    }

    pub(super) fn fs_group(&self) -> Option<u32> {
        let group = self.pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
        u32::try_from(group).ok().filter(|g| *g <= 65_535)
    }

    async fn set_up_volumes(&mut self, network: &SandboxNetwork) -> Result<Sources, SetupError> {
        let mut names = sources::of_volumes(&self.pod);
        for (_, container) in super::plan::containers(&self.spec()) {
            names.extend(sources::of_container(container));
        }
        let client = self.shared.client.clone();
        let sources = Sources::fetch(client.as_ref(), self.object.namespace(), &names).await?;
        self.fetch_tokens().await?;
        self.write_volumes(network, &sources, false).await?;
        Ok(sources)
    }

    /// Makes all volumes; or, if `files_only`, brings those made of files up to date.
    async fn write_volumes(
        &self,
        network: &SandboxNetwork,
        sources: &Sources,
        files_only: bool,
    ) -> Result<(), SetupError> {
        let facts = self.shared.facts(network.addresses());
        let input = volumes::PlanInput { pod: &self.pod, sources, facts: &facts, tokens: &self.tokens };
        let mut plans = volumes::plan(&input).map_err(|(volume, error)| SetupError::Volume { volume, error })?;
        if files_only {
            plans.retain(|p| matches!(p.kind, volumes::VolumeKind::Files { .. }));
        }
        if plans.is_empty() {
            return Ok(());
        }
        let (dir, fs_group) = (self.dir.clone(), self.fs_group());
        let work = tokio::task::spawn_blocking(move || {
            for plan in plans {
                volumes::set_up(&dir, &plan, fs_group)
                    .map_err(|error| SetupError::Volume { volume: plan.name.clone(), error })?;
            }
            Ok(())
        });
        joined(work.await)
    }

    /// A ConfigMap, Secret, label or token changed: the new content is swapped in. Errors leave the old one.
    pub(super) async fn update_volumes(&mut self, sandbox: &Sandbox) {
        if let Err(error) = self.renew_volumes(sandbox).await {
            self.event(Level::Warning, error.event(), error.to_string());
        }
    }

    async fn renew_volumes(&mut self, sandbox: &Sandbox) -> Result<(), SetupError> {
        // None are known yet of a pod that an earlier process started.
        if self.tokens_until.is_none_or(|at| at <= Instant::now()) {
            self.fetch_tokens().await?;
        }
        let names = sources::of_volumes(&self.pod);
        let client = self.shared.client.clone();
        let sources = Sources::fetch(client.as_ref(), self.object.namespace(), &names).await?;
        self.write_volumes(&sandbox.spec.network, &sources, true).await?;
        Ok(limited(sandbox.boundary.volumes_changed(&sandbox.spec)).await?)
    }

    /// Asks the API for the tokens that projected volumes want; they are renewed at four fifths of their life.
    async fn fetch_tokens(&mut self) -> Result<(), SetupError> {
        let mut tokens = Tokens::new();
        let mut until = None;
        let account = self.spec().service_account_name.unwrap_or_else(|| "default".into());
        for (volume, projection) in volumes::token_projections(&self.pod) {
            let seconds = projection.expiration_seconds.unwrap_or(3600).max(600);
            let audiences: Vec<&str> = projection.audience.as_deref().filter(|a| !a.is_empty()).into_iter().collect();
            let request = serde_json::json!({
                "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                "spec": {"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": self.object.name(), "uid": self.uid}},
            });
            let answer = self.shared.client.request_token(self.object.namespace(), &account, request).await;
            let answer = answer.map_err(|status| {
                self.tokens_until = Some(Instant::now() + TOKEN_RETRY);
                SetupError::Volume { volume, error: VolumeError::Token { account: account.clone(), status } }
            })?;
            tokens.insert(volumes::token_key(&projection), answer.str_at("/status/token").to_owned());
            let at = Instant::now() + Duration::from_secs(u64::try_from(seconds).unwrap_or(3600) / 5 * 4);
            until = Some(until.map_or(at, |u: Instant| u.min(at)));
        }
        self.tokens = tokens;
        self.tokens_until = until;
        Ok(())
    }

    fn sandbox_spec(&self, spec: &core::PodSpec, network: SandboxNetwork, id_base: u32) -> SandboxSpec {
        let config = &self.shared.config;
        let context = spec.security_context.clone().unwrap_or_default();
        SandboxSpec {
            uid: self.uid.clone(),
            namespace: self.object.namespace().to_owned(),
            name: self.object.name().to_owned(),
            dir: self.dir.clone(),
            run_dir: config.pod_run_dir(&self.uid),
            hostname: self.host_name(spec).shown,
            network,
            id_base,
            cgroup: config.pod_cgroup(&self.uid),
            limits: resources::of_pod(spec, config.pod_pids_limit),
            sysctls: context.sysctls.into_iter().flatten().map(|s| (s.name, s.value)).collect(),
            share_pid: spec.share_process_namespace == Some(true),
            labels: self.pod.metadata.labels.clone().unwrap_or_default(),
            annotations: self
                .pod
                .metadata
                .annotations
                .clone()
                .unwrap_or_default()
                .into_iter()
                .filter(|(key, _)| key != machine::ANNOTATION)
                .collect(),
            machine: None,
            images: Vec::new(),
            log_max_bytes: config.log_max_bytes,
        }
    }

    async fn machine(
        &self,
        instance: &InstanceSpec,
        sandbox: &SandboxSpec,
    ) -> Result<crate::boundary::MachineSpec, SetupError> {
        let client = self.shared.client.clone();
        let sources = Sources::fetch(client.as_ref(), &sandbox.namespace, &instance.sources()).await?;
        let origin = crate::snapshots::origin(&self.shared, &sandbox.namespace, &self.object).await;
        let origin = origin.map_err(SetupError::Snapshot)?;
        let input = MachineInput {
            instance,
            name: &sandbox.name,
            namespace: &sandbox.namespace,
            hostname: &sandbox.hostname,
            pod_dir: &self.dir,
            network: &sandbox.network,
            sources: &sources,
            origin: origin.as_ref(),
        };
        Ok(machine::resolve(self.shared.images.as_ref(), &input).await?)
    }
}

/// Whether a kernel parameter belongs to the pod's namespaces, so that nobody else feels it (`namespaces(7)`).
fn own_sysctl(name: &str, host_network: bool) -> bool {
    let plain =
        name.split('.').all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)));
    let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|p| name.starts_with(p)) || name == "kernel.sem";
    plain && (ipc || (name.starts_with("net.") && !host_network))
}

/// Host ports asked for; pods are reached by Services, routes and port-forward.
fn plan_ports(spec: &core::PodSpec) -> impl Iterator<Item = i32> + '_ {
    let host = spec.host_network == Some(true);
    let ports = super::plan::containers(spec).flat_map(|(_, c)| c.ports.iter().flatten());
    ports.filter_map(|p| p.host_port).filter(move |p| *p > 0 && !host)
}
