//! Containers in a machine of their own: one machine for each pod, its containers made by the pod's shim in there. The
//! machine's root file systems are block devices shared with all machines of the same images, what containers write is in
//! the guest's memory.
//!
//! ```text
//! prepare: kernel, initramfs, disks -> monitor -> greeting -> SetUp    start, exec, ...: a channel each
//! ```

use super::link::{Channel, Link, LinkError};
use super::machines::{self, blocking};
use super::{asleep, log, streams, volumes};
use crate::boundary::container::{lambda, spec};
use crate::boundary::*;
use ::container::shim::protocol as shim;
use guest::protocol::{Answer, CGROUP, Failure, IMAGES, PORT_NAME, RUN, Request as Ask, STATE, SetUp, VSOCK_PORT};
use image::kernels::{Kernel, Kernels};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use vmm::client::Request;
use vmm::machine;

/// The agent, compressed with gzip, and what tells it from others.
static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/atoll-guest.gz"));
const AGENT_ID: &str = env!("ATOLL_GUEST_ID");

/// Memory that kernel, agent and what is mounted take, beside the pod's own.
const OVERHEAD: u64 = 96 << 20;
/// Of a pod that asks for none.
const MEMORY: u64 = 512 << 20;
const MOST_UNASKED_VCPUS: u64 = 2;
/// How long a guest may take from its first instruction to its agent, translated on a busy computer.
const BOOT: Duration = Duration::from_secs(100);
/// How long a running agent may take to greet again.
const GREETING: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(90);
/// What an ended container still had to say.
const LAST_WORDS: Duration = Duration::from_secs(10);
const CONSOLE_BYTES: u64 = 1 << 20;
const MESSAGE_BYTES: u32 = 4096;
const MOST_TOLD: u64 = 1 << 48;

pub struct Pods {
    exe: PathBuf,
    kvm_cache: PathBuf,
    data_dir: PathBuf,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
}

/// What this process knows of one pod's machine.
#[derive(Default)]
struct Pod {
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
    logs: Mutex<HashMap<(String, u32), JoinHandle<()>>>,
    /// Runs whose ends were seen to.
    ended: Mutex<HashSet<(String, u32)>>,
    sequence: Mutex<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unsupported(what: &'static str, why: &str) -> BoundaryError {
    BoundaryError::Unsupported { boundary: super::NAME, what, why: why.into() }
}

fn failed(operation: &'static str, message: impl std::fmt::Display) -> BoundaryError {
    BoundaryError::Failed { operation, message: message.to_string() }
}

fn translate(kind: Failure, message: String) -> BoundaryError {
    match kind {
        Failure::NoContainer | Failure::NotRunning => BoundaryError::NotRunning(message),
        Failure::Exec(_) => BoundaryError::Refused { reason: "StartError".into(), message },
        Failure::Refused => BoundaryError::Refused { reason: "CreateContainerError".into(), message },
        Failure::Failed => BoundaryError::Failed { operation: "guest", message },
    }
}

/// Unix nanoseconds.
fn now() -> i64 {
    api::time::now_micros().saturating_mul(1000)
}

/// What a guest that goes on stirs into its random numbers.
fn seed() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut seed));
    read.map(|()| seed).map_err(|e| failed("seed", e))
}

fn unexpected() -> BoundaryError {
    failed("guest", "it answered something else than was asked")
}

impl Pods {
    pub fn new(exe: PathBuf, kvm_cache: PathBuf, data_dir: PathBuf) -> Self {
        Pods { exe, kvm_cache, data_dir, pods: Mutex::default() }
    }

    fn pod(&self, sandbox: &SandboxSpec) -> Arc<Pod> {
        lock(&self.pods).entry(sandbox.uid.clone()).or_default().clone()
    }

    /// The line to the pod's agent, opened again if need be. A machine that lost what it was told, or broke the protocol,
    /// is a sandbox that is gone.
    async fn link(&self, sandbox: &SandboxSpec) -> Result<Arc<Link>> {
        let pod = self.pod(sandbox);
        let mut held = pod.link.lock().await;
        if let Some(link) = &*held {
            match link.end() {
                None => return Ok(link.clone()),
                Some(LinkError::Broken(why)) => return Err(self.give_up(sandbox, why).await),
                Some(_) => {}
            }
        }
        *held = None;
        if !machines::runs(sandbox).await {
            return Err(BoundaryError::NoSandbox(sandbox.uid.clone()));
        }
        let (link, set_up) = match connect(sandbox, GREETING).await {
            Ok(connected) => connected,
            Err(LinkError::Broken(why)) => return Err(self.give_up(sandbox, &why).await),
            Err(error) => return Err(failed("guest", error)),
        };
        if !set_up {
            return Err(self.give_up(sandbox, "it started again").await);
        }
        *held = Some(link.clone());
        Ok(link)
    }

    /// Nothing is said to the agent any more, and no log followed.
    async fn let_go(&self, sandbox: &SandboxSpec) {
        let Some(pod) = lock(&self.pods).get(&sandbox.uid).cloned() else { return };
        lock(&pod.logs).drain().for_each(|(_, task)| task.abort());
        *pod.link.lock().await = None;
    }

    async fn give_up(&self, sandbox: &SandboxSpec, why: &str) -> BoundaryError {
        tracing::warn!(pod = %sandbox.uid, "the machine of {}/{} is stopped: {why}", sandbox.namespace, sandbox.name);
        let _ = machines::request(sandbox, Request::Kill).await;
        BoundaryError::NoSandbox(sandbox.uid.clone())
    }

    async fn ask(&self, sandbox: &SandboxSpec, request: Ask) -> Result<Answer> {
        let link = self.link(sandbox).await?;
        single(&link, request).await
    }

    async fn done(&self, sandbox: &SandboxSpec, request: Ask) -> Result<()> {
        match self.ask(sandbox, request).await? {
            Answer::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    async fn streams(&self, sandbox: &SandboxSpec, request: Ask) -> Result<Arc<Channel>> {
        let link = self.link(sandbox).await?;
        let channel = link.ask(&request).map_err(|e| failed("guest", e))?;
        match tokio::time::timeout(ANSWER, channel.answer()).await {
            Ok(Ok(Answer::Streams(_))) => Ok(channel),
            Ok(Ok(Answer::Error { kind, message })) => Err(translate(kind, message)),
            Ok(Ok(_)) => Err(unexpected()),
            Ok(Err(error)) => Err(failed("guest", error)),
            Err(_) => Err(failed("guest", LinkError::Silent(ANSWER))),
        }
    }

    /// Boots the machine and tells its agent what it is.
    async fn boot(&self, sandbox: &SandboxSpec) -> Result<Arc<Link>> {
        let kernels = Kernels::new(&self.data_dir, None);
        let kernel = kernels.default_one().map_err(|e| failed("kernel", e.chain()))?.ok_or_else(no_kernel)?;
        let initrd = tokio::task::spawn_blocking({
            let kernel = kernel.clone();
            move || initrd(&kernel)
        });
        let initrd = initrd.await.map_err(|e| failed("initramfs", e))??;
        let mut machine = describe(sandbox, &kernel, initrd);
        machine.kvm_cache = Some(self.kvm_cache.clone());
        let (exe, confined) = (self.exe.clone(), sandbox.clone());
        blocking(move || {
            let group = machines::confine(&confined, machine.memory_bytes).map_err(vmm::Error::Monitor)?;
            vmm::launch(&exe, &machine, |pid| group.admit(pid).map_err(|e| e.to_string()))
        })
        .await?;
        let (link, _) = connect(sandbox, BOOT).await.map_err(|e| {
            let console = std::fs::read(console(sandbox)).unwrap_or_default();
            let from = console.len().saturating_sub(512);
            let said = String::from_utf8_lossy(console.get(from..).unwrap_or_default()).into_owned();
            failed("boot", format!("{e}; its console ends with: {}", said.trim()))
        })?;
        match single(&link, Ask::SetUp(Box::new(set_up(sandbox)))).await? {
            Answer::Done => Ok(link),
            _ => Err(unexpected()),
        }
    }

    /// Follows the logs of what runs, and sees to what has ended: its log is whole, its message is here.
    async fn attend(&self, sandbox: &SandboxSpec, link: &Arc<Link>, states: &[shim::State]) {
        let pod = self.pod(sandbox);
        for state in states {
            let key = (state.name.clone(), state.attempt);
            if lock(&pod.ended).contains(&key) {
                continue;
            }
            follow(&pod, sandbox, link, &key);
            if matches!(state.phase, shim::Phase::Running { .. }) {
                continue;
            }
            let log = lock(&pod.logs).remove(&key);
            if let Some(log) = log {
                let _ = tokio::time::timeout(LAST_WORDS, log).await;
            }
            let file = sandbox.dir.join("termination").join(&key.0).join(key.1.to_string());
            let path = volumes::place(&sandbox.dir, &file).to_string_lossy().into_owned();
            if let Ok(Answer::Text(text)) = single(link, Ask::Read { path, most: MESSAGE_BYTES }).await {
                let _ = tokio::task::spawn_blocking(move || file.exists().then(|| std::fs::write(&file, text))).await;
            }
            if link.end().is_none() {
                lock(&pod.ended).insert(key);
            }
        }
    }
}

fn no_kernel() -> BoundaryError {
    BoundaryError::Refused {
        reason: "NoGuestKernel".into(),
        message:
            "no kernel for pods with runtimeClassName: microvm is here; get a Debian package linux-image-*-cloud-amd64 \
                  and give it to atoll kernel add --from-deb FILE"
                .into(),
    }
}

fn console(sandbox: &SandboxSpec) -> PathBuf {
    machines::state_dir(sandbox).join("console").join("console.log")
}

async fn connect(sandbox: &SandboxSpec, patience: Duration) -> std::result::Result<(Arc<Link>, bool), LinkError> {
    let run_dir = sandbox.run_dir.clone();
    let until = tokio::time::Instant::now() + patience;
    // on our own engine nothing listens before the agent does
    let stream = loop {
        let run_dir = run_dir.clone();
        let opened = tokio::task::spawn_blocking(move || vmm::client::channel(&run_dir, VSOCK_PORT)).await;
        match opened {
            Ok(Ok(stream)) => break stream,
            _ if tokio::time::Instant::now() >= until || !machines::runs(sandbox).await => {
                return Err(LinkError::Ended);
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    stream.set_nonblocking(true).map_err(|_| LinkError::Ended)?;
    let stream = tokio::net::UnixStream::from_std(stream).map_err(|_| LinkError::Ended)?;
    let greeting = Link::open(stream, until.saturating_duration_since(tokio::time::Instant::now()));
    let gone = async {
        while machines::runs(sandbox).await {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        greeted = greeting => greeted.map(|(link, hello)| (link, hello.set_up)),
        () = gone => Err(LinkError::Ended),
    }
}

async fn single(link: &Arc<Link>, request: Ask) -> Result<Answer> {
    let channel = link.ask(&request).map_err(|e| failed("guest", e))?;
    match tokio::time::timeout(ANSWER, channel.answer()).await {
        Ok(Ok(Answer::Error { kind, message })) => Err(translate(kind, message)),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(failed("guest", error)),
        Err(_) => Err(failed("guest", LinkError::Silent(ANSWER))),
    }
}

fn follow(pod: &Pod, sandbox: &SandboxSpec, link: &Arc<Link>, key: &(String, u32)) {
    let mut logs = lock(&pod.logs);
    if logs.get(key).is_some_and(|task| !task.is_finished()) {
        return;
    }
    let path = crate::config::log_path(&sandbox.dir, &key.0, key.1);
    let task = tokio::spawn(log::follow(link.clone(), key.0.clone(), key.1, path, sandbox.log_max_bytes));
    logs.insert(key.clone(), task);
}

/// Its log was begun here: the guest's word for it is not enough.
fn was_started(sandbox: &SandboxSpec, state: &shim::State) -> bool {
    crate::config::is_plain_name(&state.name)
        && crate::config::log_path(&sandbox.dir, &state.name, state.attempt).exists()
}

/// Made once for each kernel and agent, beside the kernel.
fn initrd(kernel: &Kernel) -> Result<PathBuf> {
    let path = kernel.dir.join(format!("initrd-{AGENT_ID}"));
    if path.exists() {
        return Ok(path);
    }
    let mut agent = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(AGENT), &mut agent)
        .map_err(|e| failed("initramfs", e))?;
    let modules = kernel.module_files().map_err(|e| failed("initramfs", e.chain()))?;
    let new = kernel.dir.join(format!(".initrd-{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::write(&new, guest::initramfs::build(&agent, &modules))
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(|e| failed("initramfs", format!("{}: {e}", path.display())))?;
    Ok(path)
}

fn serial(index: usize) -> String {
    format!("image{index}")
}

fn memory(limits: &Resources) -> u64 {
    limits.memory_limit.unwrap_or(limits.memory_request.max(MEMORY)).saturating_add(OVERHEAD).next_multiple_of(1 << 20)
}

fn vcpus(limits: &Resources) -> u32 {
    let here = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let wanted = limits.cpu_limit_milli.map_or(MOST_UNASKED_VCPUS, |milli| milli.div_ceil(1000));
    wanted.clamp(1, here.min(u64::from(machine::MAX_VCPUS))) as u32
}

fn describe(sandbox: &SandboxSpec, kernel: &Kernel, initrd: PathBuf) -> vmm::Machine {
    let disk = |(index, image): (usize, &SandboxImage)| vmm::Disk {
        name: serial(index),
        path: image.path.clone(),
        format: machine::DiskFormat::Raw,
        read_only: true,
        bus: "virtio".into(),
        serial: serial(index),
        boot_order: None,
        overlay: false,
        begins: None,
        rate: machines::rate(sandbox, &serial(index)),
    };
    vmm::Machine {
        id: format!("{}_{}", sandbox.namespace, sandbox.name),
        vcpus: vcpus(&sandbox.limits),
        memory_bytes: memory(&sandbox.limits),
        kernel: Some(kernel.vmlinuz()),
        initrd: Some(initrd),
        kernel_args: "console=ttyS0 quiet panic=-1 init=/init".into(),
        efi: false,
        disks: sandbox.images.iter().enumerate().map(disk).collect(),
        seed: None,
        link: machines::link(&sandbox.network),
        uid: sandbox.id_base,
        run_dir: sandbox.run_dir.clone(),
        state_dir: machines::state_dir(sandbox),
        console: vmm::Console { log_path: console(sandbox), log_max_bytes: CONSOLE_BYTES },
        engine: vmm::Choice::Best,
        restore: None,
        kvm_cache: None,
        display: false,
        channel: Some(PORT_NAME.into()),
    }
}

fn set_up(sandbox: &SandboxSpec) -> SetUp {
    let network = &sandbox.network;
    let mut inside = sandbox.clone();
    // it has no ids of its own to be shifted by, and no namespace but the machine's
    inside.id_base = 0;
    inside.network.netns = None;
    inside.cgroup = CGROUP.into();
    inside.run_dir = RUN.into();
    SetUp {
        network: guest::protocol::Network {
            address: network.address,
            address6: network.address6,
            gateway: network.gateway,
            gateway6: network.address6.map(|_| network::GATEWAY6),
            mtu: network.mtu,
            neighbour: Some(network::ROUTER_MAC),
        },
        images: (0..sandbox.images.len()).map(serial).collect(),
        sandbox: shim::Sandbox {
            network: shim::Network::Host,
            scoped: false,
            ..spec::sandbox(&inside, STATE.into(), None)
        },
        clock: now(),
    }
}

/// The container as the guest's shim is asked for it.
fn start(sandbox: &SandboxSpec, container: &ContainerSpec, mounts: Vec<Mount>) -> Result<shim::Start> {
    let mut container = container.clone();
    container.mounts = mounts;
    if let Rootfs::Layers { layers, .. } = &mut container.rootfs {
        let disk = sandbox.images.iter().position(|image| image.layers == *layers).ok_or_else(|| {
            BoundaryError::Refused {
                reason: "ImageChanged".into(),
                message: format!(
                    "container {}: its image is another one than when the pod's machine started; delete the pod, so that \
                     it starts with the new one",
                    container.name
                ),
            }
        })?;
        *layers = vec![Path::new(IMAGES).join(serial(disk))];
    }
    // any but the host's: there are no device nodes of the host's to be given
    let elsewhere = SandboxSpec { id_base: 1, ..sandbox.clone() };
    spec::start(&elsewhere, &container)
}

fn state(state: shim::State) -> ContainerState {
    let phase = match state.phase {
        shim::Phase::Running { started } => Phase::Running { started },
        shim::Phase::Exited { started, finished, code, signal, oom_killed, message } => {
            Phase::Exited { started, finished, code, signal, oom_killed, message: message.chars().take(4096).collect() }
        }
    };
    // its pid means nothing here
    ContainerState { name: state.name, attempt: state.attempt, phase, pid: None }
}

fn shim_streams(wanted: Wanted) -> shim::Streams {
    shim::Streams { stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr && !wanted.tty }
}

#[async_trait]
impl Boundary for Pods {
    fn name(&self) -> &'static str {
        super::NAME
    }

    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()> {
        if sandbox.network.host {
            return Err(unsupported("hostNetwork", "a machine has a network of its own"));
        }
        if sandbox.id_base == 0 {
            return Err(unsupported("hostUsers: true", "a machine is no user of the host's but one of its own"));
        }
        if lambda::is_lambda(sandbox) {
            return Err(unsupported("Lambda's runtime API", "use runtimeClassName container, or none"));
        }
        if machines::runs(sandbox).await {
            match self.link(sandbox).await {
                Ok(_) => return Ok(()),
                Err(BoundaryError::NoSandbox(_)) => {}
                Err(other) => return Err(other),
            }
        }
        self.destroy(sandbox).await?;
        for dir in [machines::state_dir(sandbox), sandbox.run_dir.clone()] {
            std::fs::create_dir_all(dir).map_err(|e| failed("prepare machine", e))?;
        }
        let link = self.boot(sandbox).await?;
        *self.pod(sandbox).link.lock().await = Some(link);
        Ok(())
    }

    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        let (pod, wanted) = (sandbox.clone(), container.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            log::begin(&wanted.log_path).map_err(|e| failed("log", e))?;
            volumes::of_container(&pod, &wanted)
        });
        let (requests, mounts) = mapped.await.map_err(|e| failed("volumes", e))??;
        let start = start(sandbox, container, mounts)?;
        for request in requests {
            self.done(sandbox, request).await?;
        }
        let link = self.link(sandbox).await?;
        match single(&link, Ask::Start(Box::new(start))).await? {
            Answer::Started(started) if started.name == container.name => {
                follow(&self.pod(sandbox), sandbox, &link, &(started.name.clone(), started.attempt));
                Ok(state(started))
            }
            _ => Err(unexpected()),
        }
    }

    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>> {
        let link = self.link(sandbox).await?;
        let Answer::List { sequence, mut containers } = single(&link, Ask::List).await? else {
            return Err(unexpected());
        };
        containers.retain(|state| was_started(sandbox, state));
        *lock(&self.pod(sandbox).sequence) = sequence;
        self.attend(sandbox, &link, &containers).await;
        Ok(containers.into_iter().map(state).collect())
    }

    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        let seen = *lock(&self.pod(sandbox).sequence);
        let link = self.link(sandbox).await?;
        let channel = link.ask(&Ask::Watch { seen }).map_err(|e| failed("guest", e))?;
        match channel.answer().await {
            Ok(Answer::Changed) => Ok(()),
            Ok(Answer::Error { kind, message }) => Err(translate(kind, message)),
            Ok(_) => Err(unexpected()),
            Err(error) => Err(failed("guest", error)),
        }
    }

    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> Result<()> {
        self.done(sandbox, Ask::Signal { name: container.into(), signal }).await
    }

    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> Result<()> {
        self.done(sandbox, Ask::Remove { name: container.into() }).await
    }

    async fn exec(&self, sandbox: &SandboxSpec, container: &str, request: ExecRequest) -> Result<Session> {
        let wanted = request.wanted;
        let command = shim::Command {
            args: request.command,
            env: request.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            terminal: wanted.tty,
            console_size: wanted
                .size
                .map(|size| ::container::spec::ConsoleSize { height: size.rows, width: size.columns }),
        };
        let ask = Ask::Exec { name: container.into(), command: Box::new(command), streams: shim_streams(wanted) };
        match self.streams(sandbox, ask).await {
            Ok(channel) => Ok(streams::session(channel, wanted)),
            Err(BoundaryError::Refused { message, .. }) => Ok(streams::not_executed(message)),
            Err(other) => Err(other),
        }
    }

    async fn attach(&self, sandbox: &SandboxSpec, container: &str, wanted: Wanted) -> Result<Session> {
        let ask = Ask::Attach { name: container.into(), streams: shim_streams(wanted) };
        self.streams(sandbox, ask).await.map(|channel| streams::session(channel, wanted))
    }

    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>> {
        self.streams(sandbox, Ask::Connect { port }).await.map(streams::connection)
    }

    async fn stats(&self, sandbox: &SandboxSpec, container: &str) -> Result<Stats> {
        match self.ask(sandbox, Ask::Stats { name: container.into() }).await? {
            // sums of what a guest says must not overflow
            Answer::Stats { cpu_nanos, memory_bytes, memory_working_set, pids } => Ok(Stats {
                cpu_nanos: cpu_nanos.min(MOST_TOLD),
                memory_bytes: memory_bytes.min(MOST_TOLD),
                memory_working_set: memory_working_set.min(MOST_TOLD),
                pids: pids.min(MOST_TOLD),
            }),
            _ => Err(unexpected()),
        }
    }

    async fn pause(&self, sandbox: &SandboxSpec) -> Result<()> {
        machines::request(sandbox, Request::Pause).await.map(drop)
    }

    async fn resume(&self, sandbox: &SandboxSpec) -> Result<()> {
        machines::request(sandbox, Request::Resume).await.map(drop)
    }

    async fn sleep(&self, sandbox: &SandboxSpec, how: Sleep) -> Result<()> {
        match how {
            Sleep::Frozen if machines::runs(sandbox).await => self.pause(sandbox).await,
            Sleep::Frozen => Err(BoundaryError::NoSandbox(sandbox.uid.clone())),
            Sleep::Snapshot => {
                self.let_go(sandbox).await;
                asleep::save(sandbox).await
            }
        }
    }

    async fn wake(&self, sandbox: &SandboxSpec) -> Result<()> {
        asleep::wake(&self.exe, sandbox).await?;
        let woke = Ask::Woke { clock: now(), seed: seed()? };
        match self.done(sandbox, woke).await {
            Err(BoundaryError::NoSandbox(uid)) => Err(BoundaryError::NoSandbox(uid)),
            Err(error) => {
                tracing::warn!(pod = %sandbox.uid, "the guest's clock is late: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    async fn volumes_changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        let pod = sandbox.clone();
        let changed = tokio::task::spawn_blocking(move || volumes::changed(&pod));
        for request in changed.await.map_err(|e| failed("volumes", e))?? {
            self.done(sandbox, request).await?;
        }
        Ok(())
    }

    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.let_go(sandbox).await;
        lock(&self.pods).remove(&sandbox.uid);
        asleep::forget(sandbox).await?;
        machines::destroy(sandbox).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_as_large_as_its_pod_and_what_holds_it() {
        let none = Resources::default();
        assert_eq!(memory(&none), MEMORY + OVERHEAD);
        let some = Resources { memory_limit: Some(64 << 20), cpu_limit_milli: Some(100), ..none.clone() };
        assert_eq!((memory(&some), vcpus(&some)), ((64 << 20) + OVERHEAD, 1));
        let asks = Resources { memory_request: 2 << 30, ..none };
        assert_eq!(memory(&asks), (2 << 30) + OVERHEAD);
    }

    #[test]
    fn the_agent_is_here_and_is_a_static_program() {
        let mut agent = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(AGENT), &mut agent).expect("decompressed");
        assert!(agent.starts_with(b"\x7fELF"));
        // no program header of type PT_INTERP (3)
        let headers = u64::from_le_bytes(agent[32..40].try_into().expect("e_phoff")) as usize;
        let count = usize::from(u16::from_le_bytes(agent[56..58].try_into().expect("e_phnum")));
        assert!((0..count).all(|n| agent[headers + n * 56..][..4] != 3u32.to_le_bytes()));
    }
}
