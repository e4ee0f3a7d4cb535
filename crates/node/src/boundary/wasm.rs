//! The `wasm` boundary: a pod's containers are functions, WebAssembly components that answer HTTP. They run in the host
//! process of their namespace (`function::host`), which outlives the agent; this adaptor compiles them, binds their
//! listeners in the pod's network namespace and keeps, in the pod's directory, what was started and how it ended.
//!
//! What functions used is booked in the [`ledger`].
//!
//! A function listens on the port its environment variable `PORT` names, 8080 without one.

mod hosts;
mod ledger;
mod metrics;
mod outbound;
mod record;
mod traces;

pub use ledger::{Usage, usage};

use super::*;
use function::{Cache, FunctionLimits, FunctionSpec, FunctionStats};
use hosts::Hosts;
use ledger::Ledger;
use record::Record;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

const PORT: u16 = 8080;
/// User ids of function hosts and of the compiler: above every pod's range.
const FIRST_UID: u32 = 2_100_000_000;
/// How often logs are held against their limit.
const ROTATE: Duration = Duration::from_secs(5);
/// Requests under way get this long after SIGTERM; the agent sends SIGKILL when the pod's own grace has passed.
const DRAIN: Duration = Duration::from_secs(3600);
/// Label of the Knative Service a pod belongs to.
const SERVICE: &str = "serving.knative.dev/service";
const REVISION: &str = "serving.knative.dev/revision";
/// Pod annotations: seconds until a request's answer must begin, requests served at once, milliseconds of processor time of
/// one request, bytes of one answer; requests that the function may send while it serves one, bytes of their bodies.
const TIMEOUT: &str = "functions.atoll.dev/timeout-seconds";
const CONCURRENCY: &str = "functions.atoll.dev/concurrency";
const CPU: &str = "functions.atoll.dev/cpu-milliseconds";
const RESPONSE: &str = "functions.atoll.dev/max-response-bytes";
const OUTBOUND_REQUESTS: &str = "functions.atoll.dev/max-outbound-requests";
const OUTBOUND_BYTES: &str = "functions.atoll.dev/max-outbound-bytes";

pub struct WasmBoundary {
    inner: Arc<Inner>,
    rotating: AtomicBool,
    fetching: AtomicBool,
}

struct Inner {
    exe: PathBuf,
    code_dir: PathBuf,
    cache: OnceLock<Cache>,
    hosts: Hosts,
    ledger: Ledger,
    /// Functions that run, by id.
    known: Mutex<HashMap<String, Known>>,
    /// Where spans go, if anywhere.
    spans: OnceLock<spans::Exporter>,
}

#[derive(Clone)]
struct Known {
    namespace: String,
    /// Who is charged.
    account: String,
    origin: Arc<spans::Origin>,
    path: PathBuf,
    max_bytes: u64,
}

impl WasmBoundary {
    /// `exe` is this program, whose roles `function-host` and `function-compile` do the work.
    pub fn new(exe: PathBuf, data_dir: PathBuf, run_dir: PathBuf) -> Self {
        let hosts = Hosts::new(exe.clone(), run_dir.join("functions"));
        let inner = Inner {
            exe,
            code_dir: data_dir.join("functions"),
            cache: OnceLock::new(),
            hosts,
            ledger: Ledger::new(&data_dir),
            known: Mutex::default(),
            spans: OnceLock::new(),
        };
        WasmBoundary { inner: Arc::new(inner), rotating: AtomicBool::new(false), fetching: AtomicBool::new(false) }
    }

    /// Every invocation's span goes there.
    #[must_use]
    pub fn with_spans(self, exporter: spans::Exporter) -> Self {
        let _ = self.inner.spans.set(exporter);
        self
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(failed("function", error)),
        }
    }

    /// Logs are rotated from here, since the host can open nothing; spans fetched, since it reaches nobody. Begins with the
    /// first function known.
    fn tend(&self) {
        if self.inner.spans.get().is_some() && !self.fetching.swap(true, Ordering::Relaxed) {
            tokio::spawn(traces::fetch(Arc::downgrade(&self.inner)));
        }
        if self.rotating.swap(true, Ordering::Relaxed) {
            return;
        }
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(ROTATE).await;
                let Some(inner) = inner.upgrade() else { return };
                let _ = tokio::task::spawn_blocking(move || {
                    inner.book_all();
                    inner.rotate();
                })
                .await;
            }
        });
    }
}

impl Inner {
    fn cache(&self) -> Result<&Cache> {
        if let Some(cache) = self.cache.get() {
            return Ok(cache);
        }
        let made = Cache::open(self.exe.clone(), self.code_dir.clone(), FIRST_UID - 1).map_err(translate)?;
        Ok(self.cache.get_or_init(|| made))
    }

    fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        if let Some(before) = Record::read(&sandbox.dir, &container.name) {
            if before.attempt == container.attempt
                && let Some(state) = self.observe(sandbox, vec![before.clone()])?.pop()
            {
                return Ok(state);
            }
            // An earlier attempt that the agent did not remove.
            self.remove(sandbox, &before)?;
        }
        let Rootfs::Component { path, digest, .. } = &container.rootfs else {
            return Err(refused(
                "CreateContainerError",
                "this image is not a WebAssembly component: runtimeClassName wasm runs components only",
            ));
        };
        let id = function_id(sandbox, container);
        let port = port(container)?;
        let limits = limits(sandbox, container)?;
        let code = self.cache()?.get(path, digest).map_err(translate)?;
        let listener = listen(sandbox, port)?;
        let log = open_log(&container.log_path)?;
        let mut env = container.env.clone();
        if !env.iter().any(|(name, _)| name == "PORT") {
            env.push(("PORT".into(), port.to_string()));
        }
        let spec = FunctionSpec {
            id: id.clone(),
            code: code.name,
            env,
            args: container.args.clone(),
            limits,
            log_max_bytes: container.log_max_bytes,
        };
        let host = self.hosts.ensure(&sandbox.namespace).map_err(translate)?;
        // Left over from an agent that was killed between `add` and the record: its listener is as good as this one.
        let started = match outbound::list(sandbox)? {
            None => host.add(spec, &code.file, &listener, &log),
            Some(list) => {
                let connector = outbound::connector(&self.exe, sandbox, &list)?;
                let descriptors = [code.file.as_fd(), listener.as_fd(), log.as_fd()];
                host.add_outbound(spec, descriptors, connector, outbound::roots()?)
            }
        };
        let started = started.map_err(translate)?;
        let record = Record {
            name: container.name.clone(),
            attempt: container.attempt,
            id: id.clone(),
            port,
            log_path: container.log_path.clone(),
            log_max_bytes: container.log_max_bytes,
            phase: Phase::Running { started },
        };
        record.write(&sandbox.dir).map_err(|e| failed("record the function", e))?;
        self.watch_log(sandbox, &record);
        Ok(record.state())
    }

    fn watch_log(&self, sandbox: &SandboxSpec, record: &Record) {
        let account = account(sandbox);
        let known = Known {
            namespace: sandbox.namespace.clone(),
            origin: traces::origin(sandbox, &account),
            account,
            path: record.log_path.clone(),
            max_bytes: record.log_max_bytes,
        };
        self.lock().insert(record.id.clone(), known);
    }

    fn forget_log(&self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn known(&self) -> HashMap<String, Known> {
        self.lock().clone()
    }

    /// Brings records up to what the host says, and writes down endings.
    fn observe(&self, sandbox: &SandboxSpec, records: Vec<Record>) -> Result<Vec<ContainerState>> {
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let listing = match self.hosts.list(&sandbox.namespace, &sandbox.uid) {
            Ok(listing) => Some(listing),
            Err(function::Error::NotRunning) => None,
            Err(error) => return Err(translate(error)),
        };
        let mut states = Vec::new();
        for mut record in records {
            if let Phase::Running { started } = record.phase {
                let known = listing.as_ref().and_then(|l| l.functions.iter().find(|f| f.id == record.id));
                match known {
                    Some(state) => match &state.exit {
                        None => self.watch_log(sandbox, &record),
                        Some(exit) => record.phase = ended(started, exit.clone()),
                    },
                    None => {
                        let exit = function::Exit {
                            code: 255,
                            signal: None,
                            finished: record::now(),
                            message: "the namespace's function host ended unexpectedly".into(),
                        };
                        record.phase = ended(started, exit);
                    }
                }
                if matches!(record.phase, Phase::Exited { .. }) {
                    record.write(&sandbox.dir).map_err(|e| failed("record the function", e))?;
                    self.forget_log(&record.id);
                }
            }
            states.push(record.state());
        }
        Ok(states)
    }

    fn remove(&self, sandbox: &SandboxSpec, record: &Record) -> Result<()> {
        self.fetch_spans(&sandbox.namespace);
        self.book(&sandbox.namespace, vec![(account(sandbox), record.id.clone())]);
        if let Err(error) = self.ledger.close(&sandbox.namespace, &record.id) {
            tracing::warn!(function = record.id, %error, "the ledger could not be written");
        }
        match self.hosts.connect(&sandbox.namespace).and_then(|host| host.forget(&record.id)) {
            Ok(()) | Err(function::Error::NotRunning | function::Error::UnknownFunction(_)) => {}
            Err(error) => return Err(translate(error)),
        }
        self.forget_log(&record.id);
        Record::delete(&sandbox.dir, &record.name).map_err(|e| failed("remove the function", e))
    }

    /// Books what all functions used.
    fn book_all(&self) {
        for (namespace, functions) in self.by_namespace() {
            self.book(&namespace, functions);
        }
    }

    /// Account and id of each function.
    fn by_namespace(&self) -> BTreeMap<String, Vec<(String, String)>> {
        let mut namespaces: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for (id, function) in self.lock().iter() {
            let entry = namespaces.entry(function.namespace.clone()).or_default();
            entry.push((function.account.clone(), id.clone()));
        }
        namespaces
    }

    /// Functions by account and id; what their host counted. Those that have ended are known to it until they are forgotten.
    fn book(&self, namespace: &str, functions: Vec<(String, String)>) -> Vec<(String, String, FunctionStats)> {
        let Ok(host) = self.hosts.connect(namespace) else { return Vec::new() };
        let counted = |(account, id): (String, String)| host.stats(&id).ok().map(|stats| (account, id, stats));
        let counted: Vec<_> = functions.into_iter().filter_map(counted).collect();
        if let Err(error) = self.ledger.book(namespace, &counted) {
            tracing::warn!(namespace, %error, "the ledger could not be written");
        }
        counted
    }

    fn rotate(&self) {
        for (id, log) in self.known() {
            let long = std::fs::metadata(&log.path).is_ok_and(|m| log.max_bytes > 0 && m.len() > log.max_bytes);
            if !long {
                continue;
            }
            let mut old = log.path.clone().into_os_string();
            old.push(".1");
            let rotated = std::fs::rename(&log.path, &old).map_err(|e| e.to_string()).and_then(|()| {
                let file = open_log(&log.path).map_err(|e| e.to_string())?;
                let host = self.hosts.connect(&log.namespace).map_err(|e| e.to_string())?;
                host.set_log(&id, &file).map_err(|e| e.to_string())
            });
            if let Err(error) = rotated {
                tracing::warn!(function = id, error, "log rotation");
            }
        }
    }
}

/// Who is charged: the pod's Knative Service, else the pod.
fn account(sandbox: &SandboxSpec) -> String {
    sandbox.labels.get(SERVICE).unwrap_or(&sandbox.name).clone()
}

fn function_id(sandbox: &SandboxSpec, container: &ContainerSpec) -> String {
    format!("{}/{}/{}", sandbox.uid, container.name, container.attempt)
}

fn ended(started: i64, exit: function::Exit) -> Phase {
    Phase::Exited {
        started,
        finished: exit.finished,
        code: exit.code,
        signal: exit.signal,
        oom_killed: false,
        message: exit.message,
    }
}

fn port(container: &ContainerSpec) -> Result<u16> {
    match container.env.iter().rev().find(|(name, _)| name == "PORT") {
        None => Ok(PORT),
        Some((_, text)) => text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
            refused("CreateContainerError", format!("env PORT={text:?}: a function listens on a port from 1 to 65535"))
        }),
    }
}

fn limits(sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<FunctionLimits> {
    let number = |name: &str, most: u64| match sandbox.annotations.get(name) {
        None => Ok(None),
        Some(text) => match text.parse::<u64>() {
            Ok(value) if (1..=most).contains(&value) => Ok(Some(value)),
            _ => Err(refused(
                "CreateContainerError",
                format!("annotation {name}: {text:?} is not a number from 1 to {most}"),
            )),
        },
    };
    let default = FunctionLimits::default();
    let memory = container.resources.memory_limit.or(sandbox.limits.memory_limit);
    Ok(FunctionLimits {
        memory_bytes: memory.unwrap_or(default.memory_bytes).min(1 << 30),
        concurrency: number(CONCURRENCY, 256)?.map_or(default.concurrency, |n| n as u32),
        timeout_ms: number(TIMEOUT, 3600)?.map_or(default.timeout_ms, |seconds| seconds * 1000),
        cpu_ms: number(CPU, 36_000_000)?.unwrap_or(default.cpu_ms),
        response_bytes: number(RESPONSE, 1 << 40)?.unwrap_or(default.response_bytes),
        outbound_requests: number(OUTBOUND_REQUESTS, 10_000)?.map_or(default.outbound_requests, |n| n as u32),
        outbound_bytes: number(OUTBOUND_BYTES, 1 << 40)?.unwrap_or(default.outbound_bytes),
    })
}

/// The listener is made in the pod's network namespace and stays there, wherever it is served from.
fn listen(sandbox: &SandboxSpec, port: u16) -> Result<TcpListener> {
    let Some(netns) = &sandbox.network.netns else {
        return Err(refused("CreateContainerError", "hostNetwork: functions run on the pod network only"));
    };
    let any: IpAddr =
        if sandbox.network.address6.is_some() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let bound = network::in_netns(netns, move || TcpListener::bind((any, port)));
    let listener = bound.map_err(|e| failed("enter the pod's network namespace", e))?;
    listener.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            refused("StartError", format!("port {port} is taken by another function of the pod; set env PORT"))
        }
        _ => failed("listen in the pod's network namespace", e),
    })
}

fn open_log(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| failed("make the log's directory", e))?;
    }
    File::options().create(true).append(true).mode(0o640).open(path).map_err(|e| failed("open the log", e))
}

fn refused(reason: &str, message: impl Into<String>) -> BoundaryError {
    BoundaryError::Refused { reason: reason.into(), message: message.into() }
}

fn failed(operation: &'static str, error: impl std::fmt::Display) -> BoundaryError {
    BoundaryError::Failed { operation, message: error.to_string() }
}

fn translate(error: function::Error) -> BoundaryError {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        message.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    match error {
        function::Error::Component(_) => refused("StartError", message),
        function::Error::UnknownFunction(id) => BoundaryError::NotRunning(id),
        function::Error::NotRunning
        | function::Error::Io { .. }
        | function::Error::Start(_)
        | function::Error::Protocol(_) => BoundaryError::Failed { operation: "function host", message },
    }
}

fn unsupported(what: &'static str, why: &str) -> BoundaryError {
    BoundaryError::Unsupported { boundary: "wasm", what, why: why.into() }
}

#[async_trait]
impl Boundary for WasmBoundary {
    fn name(&self) -> &'static str {
        "wasm"
    }

    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()> {
        let sandbox = sandbox.clone();
        self.blocking(move |inner| {
            Record::prepare(&sandbox.dir).map_err(|e| failed("prepare the function's directory", e))?;
            inner.hosts.ensure(&sandbox.namespace).map(drop).map_err(translate)
        })
        .await
    }

    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        self.tend();
        let (sandbox, container) = (sandbox.clone(), container.clone());
        self.blocking(move |inner| inner.start(&sandbox, &container)).await
    }

    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>> {
        self.tend();
        let sandbox = sandbox.clone();
        self.blocking(move |inner| {
            let records = Record::all(&sandbox.dir).map_err(|e| failed("read the functions' records", e))?;
            let Some(records) = records else { return Err(BoundaryError::NoSandbox(sandbox.uid.clone())) };
            inner.observe(&sandbox, records)
        })
        .await
    }

    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        let (namespace, uid) = (sandbox.namespace.clone(), sandbox.uid.clone());
        let watched = self.blocking(move |inner| Ok(inner.hosts.watch(&namespace, &uid))).await?;
        match watched {
            Some((mut sequence, seen)) => {
                let _ = sequence.wait_for(|now| *now > seen).await;
            }
            // No host: nothing will change by itself, but the agent may look again.
            None => tokio::time::sleep(Duration::from_secs(1)).await,
        }
        Ok(())
    }

    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> Result<()> {
        let (drain, as_signal) = match signal {
            9 => (Duration::ZERO, Some(9)),
            2 | 3 | 15 => (DRAIN, None),
            // What else a process would get to hear means nothing to a function.
            _ => return Ok(()),
        };
        let (sandbox, container) = (sandbox.clone(), container.to_owned());
        self.blocking(move |inner| {
            let gone = || BoundaryError::NotRunning(container.clone());
            let record = Record::read(&sandbox.dir, &container).ok_or_else(gone)?;
            let host = inner.hosts.connect(&sandbox.namespace).map_err(|_| gone())?;
            host.stop(&record.id, drain, as_signal).map_err(translate)
        })
        .await
    }

    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> Result<()> {
        let (sandbox, container) = (sandbox.clone(), container.to_owned());
        self.blocking(move |inner| match Record::read(&sandbox.dir, &container) {
            Some(record) => inner.remove(&sandbox, &record),
            None => Ok(()),
        })
        .await
    }

    async fn exec(&self, _: &SandboxSpec, _: &str, _: ExecRequest) -> Result<Session> {
        Err(unsupported("exec", "a function has no processes and no files; its log is what it prints"))
    }

    async fn attach(&self, _: &SandboxSpec, _: &str, _: Wanted) -> Result<Session> {
        Err(unsupported("attach", "every request has an instance of its own; kubectl logs -f shows what they print"))
    }

    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>> {
        let network = sandbox.network.clone();
        let stream = self
            .blocking(move |_| {
                let Some(netns) = &network.netns else { return Err(BoundaryError::NotRunning("function".into())) };
                // The pod's own address needs no loopback device that is up.
                let address = network.address.unwrap_or(Ipv4Addr::LOCALHOST);
                let connect =
                    move || std::net::TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(10));
                let connected =
                    network::in_netns(netns, connect).map_err(|e| failed("enter the pod's network namespace", e))?;
                connected.map_err(|e| failed("connect to the function", e))
            })
            .await?;
        stream.set_nonblocking(true).map_err(|e| failed("connect to the function", e))?;
        let stream = tokio::net::TcpStream::from_std(stream).map_err(|e| failed("connect to the function", e))?;
        Ok(Box::new(stream))
    }

    async fn stats(&self, sandbox: &SandboxSpec, container: &str) -> Result<Stats> {
        let (sandbox, container) = (sandbox.clone(), container.to_owned());
        self.blocking(move |inner| {
            let gone = || BoundaryError::NotRunning(container.clone());
            let record = Record::read(&sandbox.dir, &container).ok_or_else(gone)?;
            let host = inner.hosts.connect(&sandbox.namespace).map_err(|_| gone())?;
            let stats = host.stats(&record.id).map_err(translate)?;
            Ok(Stats {
                cpu_nanos: stats.cpu_nanos,
                memory_bytes: stats.memory_bytes,
                memory_working_set: stats.memory_bytes,
                pids: stats.in_flight,
            })
        })
        .await
    }

    async fn pause(&self, _: &SandboxSpec) -> Result<()> {
        Err(unsupported("pause", "between requests nothing of a function runs; there is nothing to pause"))
    }

    async fn resume(&self, _: &SandboxSpec) -> Result<()> {
        Err(unsupported("resume", "functions cannot be paused"))
    }

    async fn metrics(&self) -> api::metrics::Text {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || inner.metrics()).await.unwrap_or_default()
    }

    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()> {
        let sandbox = sandbox.clone();
        self.blocking(move |inner| {
            let records = Record::all(&sandbox.dir).map_err(|e| failed("read the functions' records", e))?;
            for record in records.unwrap_or_default() {
                inner.remove(&sandbox, &record)?;
            }
            inner.hosts.forget_all(&sandbox.namespace, &sandbox.uid).map_err(translate)?;
            inner.hosts.leave(&sandbox.namespace, &sandbox.uid).map_err(translate)?;
            outbound::destroyed(&sandbox)?;
            Record::destroy(&sandbox.dir).map_err(|e| failed("remove the function's directory", e))
        })
        .await
    }
}
