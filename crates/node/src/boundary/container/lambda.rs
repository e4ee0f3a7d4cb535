//! Lambda functions among containers: a pod that is annotated as one has a `lambda-runtime` beside it
//! (`function::lambda`), which serves the runtime API on the pod's loopback and the pod's port. It outlives the agent, is
//! started again if it ends, and tells when the function has to be restarted.

use super::super::{BoundaryError, ContainerSpec, ContainerState, Phase, Result, SandboxSpec};
use container::client::Client;
use function::lambda::{ACCOUNT, Keys, LambdaClient, LambdaSpec, launch};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Pod annotation, its value, and the function's time limit in seconds.
const INTERFACE: &str = "functions.atoll.dev/interface";
const LAMBDA: &str = "lambda";
const TIMEOUT: &str = "functions.atoll.dev/timeout-seconds";
const SERVICE: &str = "serving.knative.dev/service";
const REVISION: &str = "serving.knative.dev/revision";
/// Where the runtime API listens on the pod's loopback.
const RUNTIME_API: u16 = 9001;
const REGION: &str = "us-east-1";
/// User ids of these processes: one for each range of a pod's ids, above those of function hosts.
const FIRST_UID: u32 = 2_200_000_000;
const RANGE: u32 = 65_536;
const DEFAULT_TIMEOUT: u64 = 300;
const MOST_TIMEOUT: u64 = 3600;
const PAUSE: Duration = Duration::from_millis(200);

pub(super) struct Lambdas {
    exe: PathBuf,
    data_dir: PathBuf,
    keys: OnceLock<Keys>,
    /// Pods whose runtime is watched, by uid: their containers' ends that were told.
    watched: Mutex<HashMap<String, HashSet<(String, u32)>>>,
}

pub(in crate::boundary) fn is_lambda(sandbox: &SandboxSpec) -> bool {
    sandbox.annotations.get(INTERFACE).is_some_and(|value| value == LAMBDA)
}

fn failed(operation: &'static str, error: impl std::error::Error) -> BoundaryError {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        message.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    BoundaryError::Failed { operation, message }
}

fn refused(message: String) -> BoundaryError {
    BoundaryError::Refused { reason: "CreateContainerError".into(), message }
}

fn run_dir(sandbox: &SandboxSpec) -> PathBuf {
    sandbox.run_dir.join(LAMBDA)
}

/// Which port is the pod's: known when its container starts, needed when the runtime is started again.
fn port_file(sandbox: &SandboxSpec) -> PathBuf {
    sandbox.dir.join("lambda-port")
}

fn name(sandbox: &SandboxSpec) -> &str {
    sandbox.labels.get(SERVICE).unwrap_or(&sandbox.name)
}

fn timeout(sandbox: &SandboxSpec) -> Result<u64> {
    let Some(text) = sandbox.annotations.get(TIMEOUT) else { return Ok(DEFAULT_TIMEOUT) };
    text.parse()
        .ok()
        .filter(|seconds| (1..=MOST_TIMEOUT).contains(seconds))
        .ok_or_else(|| refused(format!("annotation {TIMEOUT}: {text:?} is not a number from 1 to {MOST_TIMEOUT}")))
}

/// What a function's process finds in its environment, besides what it was given.
/// <https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html>
pub(super) fn environment(sandbox: &SandboxSpec, container: &mut ContainerSpec) {
    let memory = container.resources.memory_limit.or(sandbox.limits.memory_limit).map_or(128, |bytes| bytes >> 20);
    let version = sandbox.labels.get(REVISION).map_or("$LATEST", String::as_str);
    let handler = container.args.last().cloned().unwrap_or_default();
    let told = [
        ("AWS_LAMBDA_RUNTIME_API", format!("127.0.0.1:{RUNTIME_API}")),
        ("AWS_LAMBDA_FUNCTION_NAME", name(sandbox).to_owned()),
        ("AWS_LAMBDA_FUNCTION_VERSION", version.to_owned()),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory.to_string()),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand".into()),
        ("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{}", name(sandbox))),
        ("AWS_LAMBDA_LOG_STREAM_NAME", sandbox.name.clone()),
        ("AWS_REGION", REGION.into()),
        ("AWS_DEFAULT_REGION", REGION.into()),
        ("AWS_EXECUTION_ENV", "AWS_Lambda_Image".into()),
        ("LAMBDA_TASK_ROOT", "/var/task".into()),
        ("LAMBDA_RUNTIME_DIR", "/var/runtime".into()),
        ("TZ", ":UTC".into()),
        ("_HANDLER", handler),
    ];
    for (name, value) in told {
        // Where the API is nobody but us knows.
        let ours = name == "AWS_LAMBDA_RUNTIME_API";
        container.env.retain(|(known, _)| !(ours && known == name));
        if !container.env.iter().any(|(known, _)| known == name) {
            container.env.push((name.into(), value));
        }
    }
}

impl Lambdas {
    pub fn new(exe: PathBuf, data_dir: PathBuf) -> Arc<Lambdas> {
        Arc::new(Lambdas { exe, data_dir, keys: OnceLock::new(), watched: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, HashSet<(String, u32)>>> {
        self.watched.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Before a container starts: the pod's runtime, if this is the container that serves.
    pub fn starting(self: &Arc<Self>, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<()> {
        let Some((_, port)) = container.env.iter().rev().find(|(name, _)| name == "PORT") else { return Ok(()) };
        let number: u16 = port.parse().ok().filter(|port| *port > 0 && *port != RUNTIME_API).ok_or_else(|| {
            refused(format!("env PORT={port:?}: a Lambda function's port is from 1 to 65535, but not {RUNTIME_API}"))
        })?;
        timeout(sandbox)?;
        fs::write(port_file(sandbox), number.to_string()).map_err(|e| failed("record the function's port", e))?;
        self.watch(sandbox)
    }

    /// Finds the pod's runtime, or starts it, and follows it from now on.
    fn watch(self: &Arc<Self>, sandbox: &SandboxSpec) -> Result<()> {
        let client = self.ensure(sandbox)?;
        if self.lock().contains_key(&sandbox.uid) {
            return Ok(());
        }
        self.lock().insert(sandbox.uid.clone(), HashSet::new());
        let (lambdas, sandbox) = (Arc::downgrade(self), sandbox.clone());
        let follow = move || {
            let mut client = Some(client);
            loop {
                if let Some(client) = client.take() {
                    follow(&sandbox, &client);
                }
                // It ended, unless the pod did.
                std::thread::sleep(PAUSE);
                let Some(lambdas) = lambdas.upgrade() else { return };
                if !lambdas.lock().contains_key(&sandbox.uid) {
                    return;
                }
                match lambdas.ensure(&sandbox) {
                    Ok(again) => client = Some(again),
                    Err(error) => tracing::warn!(pod = sandbox.name, %error, "the Lambda runtime does not start"),
                }
            }
        };
        let started = std::thread::Builder::new().name("lambda-watch".into()).stack_size(256 << 10).spawn(follow);
        started.map(drop).map_err(|e| failed("start a thread", e))
    }

    fn ensure(&self, sandbox: &SandboxSpec) -> Result<LambdaClient> {
        let dir = run_dir(sandbox);
        let known = LambdaClient::connect(&dir);
        let client = match known {
            Err(function::Error::NotRunning) => {
                let uid = FIRST_UID + sandbox.id_base / RANGE;
                launch(&self.exe, &dir, uid).map_err(|e| failed("start the Lambda runtime", e))?
            }
            other => return other.map_err(|e| failed("Lambda runtime", e)),
        };
        let (runtime_api, port) = sockets(sandbox)?;
        let served = client.serve(self.spec(sandbox)?, runtime_api, port);
        served.map_err(|e| failed("Lambda runtime", e))?;
        Ok(client)
    }

    fn spec(&self, sandbox: &SandboxSpec) -> Result<LambdaSpec> {
        let keys = match self.keys.get() {
            Some(keys) => keys,
            None => {
                let made = Keys::open(&self.data_dir).map_err(|e| failed("read the functions' key", e))?;
                self.keys.get_or_init(|| made)
            }
        };
        let name = name(sandbox).to_owned();
        Ok(LambdaSpec {
            arn: format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"),
            timeout_ms: timeout(sandbox)? * 1000,
            invoke_key: keys.of(&sandbox.namespace, &name),
            pod: sandbox.name.clone(),
            name,
        })
    }

    /// What the containers were last seen doing: the runtime is told of their ends, and found again after a restart.
    pub fn observed(self: &Arc<Self>, sandbox: &SandboxSpec, states: &[ContainerState]) {
        let running = states.iter().any(|state| matches!(state.phase, Phase::Running { .. }));
        if running && port_file(sandbox).exists() {
            let known = self.lock().contains_key(&sandbox.uid);
            if let Err(error) = (!known).then(|| self.watch(sandbox)).transpose() {
                tracing::warn!(pod = sandbox.name, %error, "the Lambda runtime does not start");
            }
        }
        for state in states {
            let Phase::Exited { code, .. } = state.phase else { continue };
            let new =
                self.lock().get_mut(&sandbox.uid).is_some_and(|told| told.insert((state.name.clone(), state.attempt)));
            if new && let Ok(client) = LambdaClient::connect(&run_dir(sandbox)) {
                let how = format!("Runtime exited with error: exit status {code}");
                if let Err(error) = client.exited(&how) {
                    tracing::debug!(pod = sandbox.name, %error, "the Lambda runtime was not told of an end");
                }
            }
        }
    }

    /// Ends the pod's runtime.
    pub fn destroyed(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.lock().remove(&sandbox.uid);
        let dir = run_dir(sandbox);
        match LambdaClient::connect(&dir) {
            Ok(client) => client.stop().map_err(|e| failed("stop the Lambda runtime", e))?,
            Err(function::Error::NotRunning) => {}
            Err(error) => return Err(failed("Lambda runtime", error)),
        }
        let _ = fs::remove_file(port_file(sandbox));
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove the Lambda runtime's directory", e))
            }
            _ => Ok(()),
        }
    }
}

/// Restarts the pod's containers as often as the runtime asks for it, until it is gone.
fn follow(sandbox: &SandboxSpec, client: &LambdaClient) {
    let mut seen = None;
    while let Ok(count) = client.restarts(seen) {
        if seen.is_some() {
            kill(&sandbox.run_dir);
        }
        seen = Some(count);
    }
}

fn kill(run_dir: &Path) {
    let Ok(mut shim) = Client::connect(run_dir) else { return };
    for container in shim.list().map(|(_, containers)| containers).unwrap_or_default() {
        if container.pid.is_some()
            && let Err(error) = shim.signal(&container.name, 9)
        {
            tracing::debug!(container = container.name, %error, "it was not ended for its time limit");
        }
    }
}

/// The runtime API's listener and a socket bound to the pod's port, both in the pod's network namespace.
fn sockets(sandbox: &SandboxSpec) -> Result<(TcpListener, OwnedFd)> {
    let Some(netns) = &sandbox.network.netns else {
        return Err(refused("hostNetwork: Lambda functions run on the pod network only".into()));
    };
    let port = fs::read_to_string(port_file(sandbox)).map_err(|e| failed("read the function's port", e))?;
    let port: u16 = port.trim().parse().map_err(|e| failed("read the function's port", e))?;
    let work = move || -> std::io::Result<(TcpListener, OwnedFd)> {
        let runtime_api = TcpListener::bind((Ipv4Addr::LOCALHOST, RUNTIME_API))?;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
        Ok((runtime_api, socket))
    };
    let bound = network::in_netns(netns, work).map_err(|e| failed("enter the pod's network namespace", e))?;
    bound.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => refused(format!("port {RUNTIME_API} or {port} is taken in the pod")),
        _ => failed("bind in the pod's network namespace", e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_lambdas() {
        let mut container = super::super::spec::tests::container(|c| {
            c.args = vec!["/entry".into(), "app.handler".into()];
            c.env = vec![("AWS_LAMBDA_RUNTIME_API".into(), "evil:1".into()), ("TZ".into(), "Mars".into())];
        });
        let mut pod = super::super::spec::tests::pod();
        pod.labels.insert(SERVICE.into(), "greet".into());
        environment(&pod, &mut container);
        let of =
            |name: &str| container.env.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        assert_eq!(of("AWS_LAMBDA_RUNTIME_API"), ["127.0.0.1:9001"]);
        assert_eq!((of("TZ"), of("_HANDLER")), (vec!["Mars"], vec!["app.handler"]));
        assert_eq!(of("AWS_LAMBDA_FUNCTION_NAME"), ["greet"]);
    }

    #[test]
    fn time_limits_are_numbers() {
        let mut pod = super::super::spec::tests::pod();
        assert_eq!(timeout(&pod).unwrap(), 300);
        for (text, good) in [("1", true), ("3600", true), ("0", false), ("3601", false), ("x", false)] {
            pod.annotations.insert(TIMEOUT.into(), text.into());
            assert_eq!(timeout(&pod).is_ok(), good, "{text}");
        }
    }
}
