//! A node without a machine below it: fake boundary, images and network that outlive the agent, as the real ones do.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod real;

use api::client::{Client, DeleteOptions, ListOptions};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject};
use api::streams::{Duplex, Exit, Session, Wanted};
use api::testing::MemoryClient;
use async_trait::async_trait;
use node::boundary::{
    Boundary, BoundaryError, ContainerSpec, ContainerState, ExecRequest, Phase, Result as BoundaryResult, Rootfs,
    SandboxNetwork, SandboxSpec, Stats,
};
use node::ports::{
    Attach, Credentials, DiskImage, ImageConfig, ImageError, Images, NetworkError, Networks, Records, ResolvedImage,
    ServiceRule,
};
use node::{Agent, Config};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

pub fn pods() -> Resource {
    Resource::new("", "v1", "pods")
}
pub fn core(plural: &str) -> Resource {
    Resource::new("", "v1", plural)
}

fn now() -> i64 {
    api::time::now_micros() * 1000
}

#[derive(Default)]
struct FakeSandbox {
    containers: BTreeMap<String, (ContainerSpec, ContainerState)>,
    version: u64,
    listed: u64,
}

/// What a machine would have: sandboxes that run on whatever becomes of the agent.
///
/// A container's first argument tells how it behaves: `run` (ends with 143 on SIGTERM), `graceful` (with 0), `stubborn`
/// (only SIGKILL ends it), `exit N` (at once), `refuse REASON`.
pub struct FakeBoundary {
    name: &'static str,
    tap: bool,
    sandboxes: Mutex<BTreeMap<String, FakeSandbox>>,
    tick: watch::Sender<u64>,
    pub calls: Mutex<Vec<String>>,
    /// Whether exec of `health` succeeds.
    pub healthy: watch::Sender<bool>,
    pub refuse_prepare: Mutex<Option<String>>,
}

impl FakeBoundary {
    pub fn new(name: &'static str, tap: bool) -> Arc<Self> {
        Arc::new(FakeBoundary {
            name,
            tap,
            sandboxes: Mutex::default(),
            tick: watch::Sender::new(0),
            calls: Mutex::default(),
            healthy: watch::Sender::new(true),
            refuse_prepare: Mutex::default(),
        })
    }
    fn log(&self, text: String) {
        self.calls.lock().unwrap().push(text);
    }
    pub fn count(&self, prefix: &str) -> usize {
        self.calls.lock().unwrap().iter().filter(|c| c.starts_with(prefix)).count()
    }
    pub fn position(&self, call: &str) -> Option<usize> {
        self.calls.lock().unwrap().iter().position(|c| c == call)
    }
    pub fn sandbox_count(&self) -> usize {
        self.sandboxes.lock().unwrap().len()
    }
    pub fn spec(&self, container: &str) -> Option<ContainerSpec> {
        let sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.values().find_map(|s| s.containers.get(container)).map(|c| c.0.clone())
    }
    /// Ends a container from within.
    pub fn end(&self, container: &str, code: i32, ran: Duration) {
        self.change(container, |state| {
            let finished = now();
            let started = finished - i64::try_from(ran.as_nanos()).unwrap();
            exited(state, started, code, None);
        });
    }
    /// The supervisors die, as in a reboot.
    pub fn lose_all(&self) {
        self.sandboxes.lock().unwrap().clear();
        self.tick.send_modify(|t| *t += 1);
    }
    fn change(&self, container: &str, change: impl FnOnce(&mut ContainerState)) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        if let Some(sandbox) = sandboxes.values_mut().find(|s| s.containers.contains_key(container))
            && let Some((_, state)) = sandbox.containers.get_mut(container)
            && matches!(state.phase, Phase::Running { .. })
        {
            change(state);
            sandbox.version += 1;
        }
        drop(sandboxes);
        self.tick.send_modify(|t| *t += 1);
    }
}

fn exited(state: &mut ContainerState, started: i64, code: i32, signal: Option<i32>) {
    let message = String::new();
    state.phase = Phase::Exited { started, finished: now(), code, signal, oom_killed: false, message };
    state.pid = None;
}

#[async_trait]
impl Boundary for FakeBoundary {
    fn name(&self) -> &'static str {
        self.name
    }
    fn wants_tap(&self) -> bool {
        self.tap
    }
    fn wants_block_images(&self) -> bool {
        self.tap
    }
    async fn prepare(&self, sandbox: &SandboxSpec) -> BoundaryResult<()> {
        self.log(format!("prepare {}", sandbox.name));
        assert!(sandbox.dir.join("sandbox.json").exists(), "the record comes before the sandbox");
        if let Some(message) = self.refuse_prepare.lock().unwrap().clone() {
            return Err(BoundaryError::Failed { operation: "prepare", message });
        }
        self.sandboxes.lock().unwrap().entry(sandbox.uid.clone()).or_default();
        Ok(())
    }
    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> BoundaryResult<ContainerState> {
        self.log(format!("start {} {}", container.name, container.attempt));
        if container.args.first().map(String::as_str) == Some("refuse") {
            let reason = container.args.get(1).cloned().unwrap_or_default();
            return Err(BoundaryError::Refused { reason, message: "refused as asked".into() });
        }
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let Some(own) = sandboxes.get_mut(&sandbox.uid) else {
            return Err(BoundaryError::NoSandbox(sandbox.uid.clone()));
        };
        assert!(
            !own.containers.get(&container.name).is_some_and(|c| matches!(c.1.phase, Phase::Running { .. })),
            "started while it runs"
        );
        std::fs::write(&container.log_path, format!("2025-01-01T00:00:00Z stdout F run {}\n", container.attempt))
            .unwrap();
        let mut state = ContainerState {
            name: container.name.clone(),
            attempt: container.attempt,
            phase: Phase::Running { started: now() },
            pid: Some(1),
        };
        if container.args.first().map(String::as_str) == Some("exit") {
            let code = container.args.get(1).and_then(|c| c.parse().ok()).unwrap_or(0);
            exited(&mut state, now(), code, None);
        }
        own.containers.insert(container.name.clone(), (container.clone(), state.clone()));
        own.version += 1;
        drop(sandboxes);
        self.tick.send_modify(|t| *t += 1);
        Ok(state)
    }
    async fn list(&self, sandbox: &SandboxSpec) -> BoundaryResult<Vec<ContainerState>> {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let own = sandboxes.get_mut(&sandbox.uid).ok_or_else(|| BoundaryError::NoSandbox(sandbox.uid.clone()))?;
        own.listed = own.version;
        Ok(own.containers.values().map(|c| c.1.clone()).collect())
    }
    async fn changed(&self, sandbox: &SandboxSpec) -> BoundaryResult<()> {
        let mut ticks = self.tick.subscribe();
        loop {
            match self.sandboxes.lock().unwrap().get(&sandbox.uid) {
                Some(own) if own.version == own.listed => {}
                Some(_) => return Ok(()),
                None => return Err(BoundaryError::NoSandbox(sandbox.uid.clone())),
            }
            ticks.changed().await.unwrap();
        }
    }
    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> BoundaryResult<()> {
        self.log(format!("signal {container} {signal}"));
        let spec = self.sandboxes.lock().unwrap().get(&sandbox.uid).and_then(|s| s.containers.get(container).cloned());
        let Some((spec, _)) = spec else { return Err(BoundaryError::NotRunning(container.into())) };
        let code = match (spec.args.first().map(String::as_str), signal) {
            (_, 9) => 137,
            (Some("stubborn"), _) => return Ok(()),
            (Some("graceful"), _) => 0,
            (_, n) => 128 + n,
        };
        self.change(container, |state| {
            let Phase::Running { started } = state.phase else { return };
            exited(state, started, code, (code > 128).then_some(signal));
        });
        Ok(())
    }
    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> BoundaryResult<()> {
        self.log(format!("remove {container}"));
        if let Some(own) = self.sandboxes.lock().unwrap().get_mut(&sandbox.uid) {
            own.containers.remove(container);
        }
        Ok(())
    }
    async fn exec(&self, _: &SandboxSpec, container: &str, request: ExecRequest) -> BoundaryResult<Session> {
        self.log(format!("exec {container} {}", request.command.join(" ")));
        let (tell, exit) = oneshot::channel();
        let stdout: Vec<u8> = match request.command.first().map(String::as_str) {
            Some("health") if *self.healthy.borrow() => {
                let _ = tell.send(Exit::Code(0));
                Vec::new()
            }
            Some("health") => {
                let _ = tell.send(Exit::Code(1));
                b"unhealthy".to_vec()
            }
            Some("false") => {
                let _ = tell.send(Exit::Code(1));
                b"no".to_vec()
            }
            Some("sleep") => {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(3600)).await;
                    let _ = tell.send(Exit::Code(0));
                });
                Vec::new()
            }
            _ => {
                let _ = tell.send(Exit::Code(0));
                request.command.join(" ").into_bytes()
            }
        };
        let stdout: api::streams::Output = Box::pin(std::io::Cursor::new(stdout));
        Ok(Session { stdin: None, stdout: Some(stdout), stderr: None, resize: None, exit })
    }
    async fn attach(&self, sandbox: &SandboxSpec, container: &str, wanted: Wanted) -> BoundaryResult<Session> {
        self.exec(sandbox, container, ExecRequest { command: vec!["attach".into()], env: Vec::new(), wanted }).await
    }
    async fn port_forward(&self, _: &SandboxSpec, _: u16) -> BoundaryResult<Box<dyn Duplex>> {
        Ok(Box::new(tokio::io::duplex(16).0))
    }
    async fn stats(&self, _: &SandboxSpec, _: &str) -> BoundaryResult<Stats> {
        Ok(Stats::default())
    }
    async fn pause(&self, _: &SandboxSpec) -> BoundaryResult<()> {
        Ok(())
    }
    async fn resume(&self, _: &SandboxSpec) -> BoundaryResult<()> {
        Ok(())
    }
    async fn destroy(&self, sandbox: &SandboxSpec) -> BoundaryResult<()> {
        self.log(format!("destroy {}", sandbox.name));
        self.sandboxes.lock().unwrap().remove(&sandbox.uid);
        self.tick.send_modify(|t| *t += 1);
        Ok(())
    }
}

/// Images named `here...` are present; `remote...` can be pulled; all else cannot.
pub struct FakeImages {
    layer: PathBuf,
    pulled: Mutex<BTreeSet<String>>,
    pub pulls: Mutex<Vec<String>>,
    pub broken: Mutex<bool>,
}

impl FakeImages {
    fn image(&self, reference: &str) -> ResolvedImage {
        let config = ImageConfig {
            entrypoint: vec!["run".into()],
            env: vec!["FROM_IMAGE=1".into()],
            stop_signal: if reference.contains("quit") { "SIGQUIT".into() } else { String::new() },
            ..ImageConfig::default()
        };
        let rootfs = Rootfs::Layers { image: reference.into(), layers: vec![self.layer.clone()] };
        ResolvedImage { reference: reference.into(), id: format!("sha256:{reference}"), size: 7, config, rootfs }
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn find(&self, reference: &str) -> Result<Option<ResolvedImage>, ImageError> {
        if reference.contains("!") || reference.is_empty() {
            return Err(ImageError::InvalidName {
                reference: reference.into(),
                why: "invalid reference format".into(),
            });
        }
        let here = reference.starts_with("here") || self.pulled.lock().unwrap().contains(reference);
        Ok(here.then(|| self.image(reference)))
    }
    async fn pull(&self, reference: &str, credentials: &[Credentials]) -> Result<ResolvedImage, ImageError> {
        let users: Vec<&str> = credentials.iter().map(|c| c.username.as_str()).collect();
        self.pulls.lock().unwrap().push(format!("{reference} {}", users.join(",")));
        tokio::time::sleep(Duration::from_millis(100)).await;
        if reference.starts_with("remote") && !*self.broken.lock().unwrap() {
            self.pulled.lock().unwrap().insert(reference.into());
            return Ok(self.image(reference));
        }
        Err(ImageError::Pull { reference: reference.into(), message: format!("registry does not know {reference}") })
    }
    async fn disk(&self, reference: &str) -> Result<DiskImage, ImageError> {
        Ok(DiskImage { path: Path::new("/disks").join(reference), format: "qcow2".into() })
    }
    async fn collect(&self, _: &BTreeSet<String>) -> Result<u64, ImageError> {
        Ok(0)
    }
}

#[derive(Default)]
pub struct FakeNetworks {
    pub attached: Mutex<BTreeMap<String, Ipv4Addr>>,
    pub services: Mutex<Vec<ServiceRule>>,
    pub records: Mutex<Records>,
    next: Mutex<u8>,
}

#[async_trait]
impl Networks for FakeNetworks {
    async fn attach(&self, request: &Attach) -> Result<SandboxNetwork, NetworkError> {
        let mut next = self.next.lock().unwrap();
        let mut attached = self.attached.lock().unwrap();
        let address = *attached.entry(request.uid.clone()).or_insert_with(|| {
            *next += 1;
            Ipv4Addr::new(10, 42, 0, *next)
        });
        Ok(SandboxNetwork {
            address: Some(address),
            tap: request.tap.then(|| "tap0".into()),
            gateway: Some(Ipv4Addr::new(169, 254, 1, 1)),
            mac: "0a:58:0a:2a:00:01".into(),
            ..SandboxNetwork::default()
        })
    }
    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        self.attached.lock().unwrap().remove(uid);
        Ok(())
    }
    async fn sync_services(&self, rules: Vec<ServiceRule>) -> Result<(), NetworkError> {
        *self.services.lock().unwrap() = rules;
        Ok(())
    }
    async fn change_services(&self, before: Vec<ServiceRule>, after: Vec<ServiceRule>) -> Result<bool, NetworkError> {
        let key = |rule: &ServiceRule| (rule.cluster_ip, rule.protocol, rule.port);
        let mut services = self.services.lock().unwrap();
        services.retain(|rule| !before.contains(rule));
        services.extend(after);
        services.sort_by_key(key);
        Ok(true)
    }
    async fn sync_dns(&self, records: Records) -> Result<(), NetworkError> {
        *self.records.lock().unwrap() = records;
        Ok(())
    }
}

/// A node: everything but the agent, which is started and stopped.
pub struct Node {
    pub dir: tempfile::TempDir,
    pub client: Arc<MemoryClient>,
    pub boundary: Arc<FakeBoundary>,
    pub machines: Arc<FakeBoundary>,
    pub images: Arc<FakeImages>,
    pub networks: Arc<FakeNetworks>,
}

pub struct RunningAgent {
    pub agent: Arc<Agent>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl RunningAgent {
    /// As SIGTERM.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap();
    }
    /// As `kill -9`: at whatever point it is.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        drop(self.agent);
    }
}

impl Node {
    pub fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        std::fs::create_dir_all(layer.join("etc")).unwrap();
        Node {
            client: MemoryClient::new(),
            boundary: FakeBoundary::new("container", false),
            machines: FakeBoundary::new("microvm", true),
            images: Arc::new(FakeImages {
                layer,
                pulled: Mutex::default(),
                pulls: Mutex::default(),
                broken: Mutex::default(),
            }),
            networks: Arc::default(),
            dir,
        }
    }

    pub fn agent(&self) -> Arc<Agent> {
        let config = Config::new("n1", self.dir.path().join("data"), self.dir.path().join("run/abcd"));
        std::fs::create_dir_all(&config.data_dir).unwrap();
        let boundaries: Vec<Arc<dyn Boundary>> = vec![self.boundary.clone(), self.machines.clone()];
        let (images, networks) = (self.images.clone(), self.networks.clone());
        Arc::new(Agent::with_ports(config, self.client.clone(), images, networks, boundaries))
    }

    pub fn start(&self) -> RunningAgent {
        let agent = self.agent();
        let (stop, shutdown) = watch::channel(false);
        let own = agent.clone();
        RunningAgent { agent, stop, task: tokio::spawn(async move { own.run(shutdown).await }) }
    }

    pub async fn create(&self, name: &str, spec: Value) -> SharedObject {
        let mut spec = spec;
        spec["nodeName"] = "n1".into();
        if spec.get("terminationGracePeriodSeconds").is_none() {
            spec["terminationGracePeriodSeconds"] = 30.into();
        }
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns",
            "labels": {"app": name}}, "spec": spec, "status": {"phase": "Pending"}});
        self.client.create(&pods(), "ns", pod).await.unwrap()
    }

    pub async fn get(&self, name: &str) -> Option<SharedObject> {
        self.client.get(&pods(), "ns", name).await.ok()
    }

    pub async fn delete(&self, name: &str, grace: Option<i64>) {
        let options = DeleteOptions { grace_period_seconds: grace, ..DeleteOptions::default() };
        self.client.delete(&pods(), "ns", name, &options).await.unwrap();
    }

    /// Waits until the pod is as wanted; the error shows how it was.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&Object) -> bool) -> SharedObject {
        let real = std::time::Instant::now();
        loop {
            let pod = self.get(name).await;
            if let Some(pod) = &pod
                && wanted(pod)
            {
                return pod.clone();
            }
            if real.elapsed() > Duration::from_secs(30) {
                let status = pod.as_ref().and_then(|p| p.get("status").cloned()).unwrap_or_default();
                let calls = self.boundary.calls.lock().unwrap().clone();
                panic!("{what}: {name} is {status:#}\n{calls:?}\n{:?}", self.events().await);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_gone(&self, name: &str) {
        let real = std::time::Instant::now();
        while let Some(pod) = self.get(name).await {
            assert!(real.elapsed() < Duration::from_secs(30), "{name} stays: {pod:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_true(&self, what: &str, wanted: impl Fn() -> bool) {
        let real = std::time::Instant::now();
        while !wanted() {
            assert!(real.elapsed() < Duration::from_secs(30), "{what}: {:?}", self.boundary.calls.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// `reason: message` of all events.
    pub async fn events(&self) -> Vec<String> {
        let list = self.client.list(&core("events"), "", &ListOptions::default()).await.unwrap();
        list.items.iter().map(|e| format!("{}: {}", e.str_at("/reason"), e.str_at("/message"))).collect()
    }

    pub async fn until_event(&self, part: &str) {
        let real = std::time::Instant::now();
        while !self.events().await.iter().any(|e| e.contains(part)) {
            assert!(real.elapsed() < Duration::from_secs(30), "no event {part}: {:#?}", self.events().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// One container `c` that behaves like this.
pub fn one(args: &[&str]) -> Value {
    json!({"containers": [{"name": "c", "image": "here:1", "command": args}]})
}

pub fn phase(pod: &Object) -> &str {
    pod.str_at("/status/phase")
}

pub fn running(pod: &Object) -> bool {
    phase(pod) == "Running" && condition(pod, "Ready") == "True"
}

pub fn condition<'a>(pod: &'a Object, kind: &str) -> &'a str {
    let list = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let mut of_kind = list.filter(|c| c.str_at("/type") == kind);
    of_kind.next().map(|c| c.str_at("/status")).unwrap_or("")
}

pub fn container<'a>(pod: &'a Object, name: &str) -> &'a Value {
    let lists = ["/status/containerStatuses", "/status/initContainerStatuses"];
    let all = lists.iter().filter_map(|l| pod.pointer(l)).filter_map(Value::as_array).flatten();
    all.into_iter().find(|c| c.str_at("/name") == name).unwrap_or(&Value::Null)
}

pub fn restarts(pod: &Object, name: &str) -> i64 {
    container(pod, name).pointer("/restartCount").and_then(Value::as_i64).unwrap_or(0)
}

pub fn waiting<'a>(pod: &'a Object, name: &str) -> &'a str {
    container(pod, name).str_at("/state/waiting/reason")
}

pub fn exit_code(pod: &Object, name: &str) -> Option<i64> {
    container(pod, name).pointer("/state/terminated/exitCode").and_then(Value::as_i64)
}
