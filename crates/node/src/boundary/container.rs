//! The `container` boundary: a pod's containers share the host's kernel behind namespaces, a range of user ids of their
//! own, seccomp and few capabilities. A shim for each pod does the work; here its requests are put together and its
//! descriptors become streams.

pub(super) mod lambda;
mod shims;
pub(super) mod spec;
mod stream;

use super::*;
use ::container::client::{self, Client, Ending, Live};
use ::container::shim::protocol;
use api::streams::Exit;
use lambda::Lambdas;
use shims::Shims;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

const NAME: &str = "container";

pub struct ContainerBoundary {
    shims: Arc<Shims>,
    /// Where `hostNetwork` pods go; absent: the network namespace that the shims start in.
    host_netns: Option<PathBuf>,
    /// The sequence number of each sandbox's last list: what [`Boundary::changed`] waits to see pass.
    seen: Mutex<HashMap<String, u64>>,
    lambdas: Arc<Lambdas>,
}

impl ContainerBoundary {
    /// `exe` is this program, whose role `shim` supervises a pod. `host_netns` is the host's network namespace, if this
    /// process is in another one.
    pub fn new(exe: PathBuf, data_dir: PathBuf, host_netns: Option<PathBuf>) -> Self {
        // A shim opens it while this process is there, under its own /proc/self.
        let host_netns = host_netns.map(|path| match path.strip_prefix("/proc/self") {
            Ok(rest) => PathBuf::from(format!("/proc/{}", std::process::id())).join(rest),
            Err(_) => path,
        });
        let lambdas = Lambdas::new(exe.clone(), data_dir);
        Self { shims: Arc::new(Shims::new(exe)), host_netns, seen: Mutex::default(), lambdas }
    }

    fn note(&self, sandbox: &SandboxSpec, sequence: Option<u64>) {
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match sequence {
            Some(sequence) => seen.insert(sandbox.uid.clone(), sequence),
            None => seen.remove(&sandbox.uid),
        };
    }

    fn last_seen(&self, sandbox: &SandboxSpec) -> u64 {
        let seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.get(&sandbox.uid).copied().unwrap_or_default()
    }

    async fn with_shim<T: Send + 'static>(
        &self,
        sandbox: &SandboxSpec,
        operation: &'static str,
        work: impl FnOnce(Client) -> ::container::Result<T> + Send + 'static,
    ) -> Result<T> {
        let run_dir = sandbox.run_dir.clone();
        let uid = sandbox.uid.clone();
        blocking(uid, operation, move || work(Client::connect(&run_dir)?)).await
    }
}

async fn blocking<T: Send + 'static>(
    uid: String,
    operation: &'static str,
    work: impl FnOnce() -> ::container::Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(|e| translate(uid, operation, e)),
        Err(e) => Err(BoundaryError::Failed { operation, message: e.to_string() }),
    }
}

fn joined(outcome: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    outcome.unwrap_or_else(|e| Err(BoundaryError::Failed { operation: "Lambda runtime", message: e.to_string() }))
}

fn translate(uid: String, operation: &'static str, error: ::container::Error) -> BoundaryError {
    use ::container::Error;
    let message = error.to_string();
    match error {
        Error::Exec { .. } => BoundaryError::Refused { reason: "StartError".into(), message },
        Error::Refused(_) => BoundaryError::Refused { reason: "CreateContainerError".into(), message },
        Error::NoShim { .. } => BoundaryError::NoSandbox(uid),
        Error::NotRunning(name) | Error::NoContainer(name) => BoundaryError::NotRunning(name),
        Error::Step { .. } | Error::Shim(_) => BoundaryError::Failed { operation, message },
    }
}

fn state_dir(sandbox: &SandboxSpec) -> PathBuf {
    sandbox.dir.join("boundary")
}

fn state(state: protocol::State) -> ContainerState {
    let phase = match state.phase {
        protocol::Phase::Running { started } => Phase::Running { started },
        protocol::Phase::Exited { started, finished, code, signal, oom_killed, message } => {
            Phase::Exited { started, finished, code, signal, oom_killed, message }
        }
    };
    ContainerState { name: state.name, attempt: state.attempt, phase, pid: state.pid }
}

fn failed(operation: &'static str) -> impl Fn(std::io::Error) -> BoundaryError {
    move |e| BoundaryError::Failed { operation, message: e.to_string() }
}

/// Only what was wanted and what there is.
fn session(live: Live, wanted: Wanted) -> Result<Session> {
    let fail = failed("streams");
    let receiver = |fd| pipe::Receiver::from_owned_fd(fd).map(|r| Box::pin(r) as api::streams::Output);
    let mut stdin = None;
    let mut stdout = live.stdout.map(receiver).transpose().map_err(&fail)?;
    let stderr = live.stderr.map(receiver).transpose().map_err(&fail)?;
    let mut resize = None;
    if let Some(terminal) = live.terminal {
        let another = || terminal.try_clone();
        if wanted.stdin {
            stdin = Some(stream::terminal_input(another().map_err(&fail)?).map_err(&fail)?);
        }
        if stdout.is_none() && wanted.stdout {
            stdout = Some(stream::terminal_output(another().map_err(&fail)?).map_err(&fail)?);
        }
        let (sender, mut sizes) = mpsc::channel(4);
        resize = Some(sender);
        tokio::spawn(async move {
            while let Some(size) = sizes.recv().await {
                stream::resize(&terminal, size);
            }
        });
    } else if let Some(fd) = live.stdin {
        stdin = Some(Box::pin(pipe::Sender::from_owned_fd(fd).map_err(&fail)?));
    }
    let exit = exit_of(live.connection, live.ending)?;
    Ok(Session { stdin, stdout, stderr, resize, exit })
}

/// Waits on the connection for the end. Closing it detaches, so this ends when nobody waits any more.
fn exit_of(connection: std::os::unix::net::UnixStream, mut ending: Ending) -> Result<oneshot::Receiver<Exit>> {
    let (mut tell, exit) = oneshot::channel();
    let connection = UnixStream::from_std(connection).map_err(failed("streams"))?;
    tokio::spawn(async move {
        let gone = |e: std::io::Error| Exit::Failed(format!("the container's supervisor went away: {e}"));
        let would_block = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
        // It may have come along with the answer; then the socket does not become readable any more.
        let outcome = match ending.exit_code(&connection) {
            Ok(code) => Exit::Code(code),
            Err(e) if !would_block(&e) => gone(e),
            Err(_) => loop {
                tokio::select! {
                    ready = connection.readable() => if let Err(e) = ready { break gone(e) },
                    () = tell.closed() => return,
                }
                match connection.try_io(Interest::READABLE, || ending.exit_code(&connection)) {
                    Ok(code) => break Exit::Code(code),
                    Err(e) if would_block(&e) => {}
                    Err(e) => break gone(e),
                }
            },
        };
        let _ = tell.send(outcome);
    });
    Ok(exit)
}

/// A process that could not be executed: no streams, and the reason as its end.
fn not_executed(why: String) -> Session {
    let (tell, exit) = oneshot::channel();
    let _ = tell.send(Exit::Failed(why));
    Session { stdin: None, stdout: None, stderr: None, resize: None, exit }
}

fn streams(wanted: Wanted) -> protocol::Streams {
    protocol::Streams { stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr && !wanted.tty }
}

#[async_trait]
impl Boundary for ContainerBoundary {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()> {
        let wanted = spec::sandbox(sandbox, state_dir(sandbox), self.host_netns.clone());
        let shims = self.shims.clone();
        let launched = blocking(sandbox.uid.clone(), "prepare", move || match Client::connect(&wanted.run_dir) {
            Err(::container::Error::NoShim { .. }) => shims.launch(&wanted).map(Some),
            other => other.map(|_| None),
        })
        .await?;
        self.shims.refill(launched);
        Ok(())
    }

    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        let mut container = container.clone();
        if lambda::is_lambda(sandbox) {
            lambda::environment(sandbox, &mut container);
            let (lambdas, pod, starting) = (self.lambdas.clone(), sandbox.clone(), container.clone());
            joined(tokio::task::spawn_blocking(move || lambdas.starting(&pod, &starting)).await)?;
        }
        let start = spec::start(sandbox, &container)?;
        self.with_shim(sandbox, "start", move |mut shim| shim.start(start)).await.map(state)
    }

    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>> {
        let (sequence, states) = self.with_shim(sandbox, "list", |mut shim| shim.list()).await?;
        self.note(sandbox, Some(sequence));
        let states: Vec<ContainerState> = states.into_iter().map(state).collect();
        if lambda::is_lambda(sandbox) {
            let (lambdas, pod, seen) = (self.lambdas.clone(), sandbox.clone(), states.clone());
            let told = tokio::task::spawn_blocking(move || lambdas.observed(&pod, &seen)).await;
            told.map_err(|e| BoundaryError::Failed { operation: "list", message: e.to_string() })?;
        }
        Ok(states)
    }

    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        let seen = self.last_seen(sandbox);
        let socket = self.with_shim(sandbox, "watch", move |shim| shim.watch(seen)).await?;
        let socket = UnixStream::from_std(socket).map_err(failed("watch"))?;
        socket.readable().await.map_err(failed("watch"))
    }

    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> Result<()> {
        let name = container.to_owned();
        self.with_shim(sandbox, "signal", move |mut shim| shim.signal(&name, signal)).await
    }

    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> Result<()> {
        let (name, dir) = (container.to_owned(), state_dir(sandbox));
        self.with_shim(sandbox, "remove", move |mut shim| shim.remove(&dir, &name)).await
    }

    async fn exec(&self, sandbox: &SandboxSpec, container: &str, request: ExecRequest) -> Result<Session> {
        let wanted = request.wanted;
        let command = protocol::Command {
            args: request.command,
            env: request.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            terminal: wanted.tty,
            console_size: wanted
                .size
                .map(|size| ::container::spec::ConsoleSize { height: size.rows, width: size.columns }),
        };
        let name = container.to_owned();
        let run_dir = sandbox.run_dir.clone();
        let work = move || {
            let live = Client::connect(&run_dir)?.exec(&name, command, streams(wanted));
            match live {
                Err(e @ (::container::Error::Exec { .. } | ::container::Error::Refused(_))) => Ok(Err(e.to_string())),
                other => other.map(Ok),
            }
        };
        match blocking(sandbox.uid.clone(), "exec", work).await? {
            Ok(live) => session(live, wanted),
            Err(why) => Ok(not_executed(why)),
        }
    }

    async fn attach(&self, sandbox: &SandboxSpec, container: &str, wanted: Wanted) -> Result<Session> {
        let name = container.to_owned();
        let live = self.with_shim(sandbox, "attach", move |shim| shim.attach(&name, streams(wanted))).await?;
        session(live, wanted)
    }

    /// On a thread of its own, which enters the pod's network namespace and ends there.
    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>> {
        let fail = failed("port-forward");
        let path = if sandbox.network.host { self.host_netns.clone() } else { sandbox.network.netns.clone() };
        let (tell, connected) = oneshot::channel();
        std::thread::Builder::new()
            .name("port-forward".into())
            .spawn(move || {
                let _ = tell.send(client::connect_in(path.as_deref(), port));
            })
            .map_err(&fail)?;
        let stream =
            connected.await.map_err(|e| fail(std::io::Error::other(e)))?.map_err(|e| BoundaryError::Failed {
                operation: "port-forward",
                message: format!("connecting to port {port} in the pod: {e}"),
            })?;
        stream.set_nonblocking(true).map_err(&fail)?;
        Ok(Box::new(tokio::net::TcpStream::from_std(stream).map_err(&fail)?))
    }

    async fn stats(&self, sandbox: &SandboxSpec, container: &str) -> Result<Stats> {
        let name = container.to_owned();
        let stats = self
            .with_shim(sandbox, "stats", move |mut shim| {
                let found = shim.list()?.1.into_iter().find(|s| s.name == name && s.pid.is_some());
                client::stats(&found.ok_or(::container::Error::NotRunning(name))?.cgroup)
            })
            .await?;
        Ok(Stats {
            cpu_nanos: stats.cpu_nanos,
            memory_bytes: stats.memory_bytes,
            memory_working_set: stats.memory_working_set,
            pids: stats.pids,
        })
    }

    async fn pause(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.with_shim(sandbox, "pause", |mut shim| shim.pause()).await
    }

    async fn resume(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.with_shim(sandbox, "resume", |mut shim| shim.resume()).await
    }

    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()> {
        let (cgroup, dir, run_dir) = (PathBuf::from(&sandbox.cgroup), state_dir(sandbox), sandbox.run_dir.clone());
        if lambda::is_lambda(sandbox) {
            let (lambdas, pod) = (self.lambdas.clone(), sandbox.clone());
            joined(tokio::task::spawn_blocking(move || lambdas.destroyed(&pod)).await)?;
        }
        let done = blocking(sandbox.uid.clone(), "destroy", move || client::destroy(&cgroup, &dir, &run_dir)).await;
        self.note(sandbox, None);
        done
    }
}
