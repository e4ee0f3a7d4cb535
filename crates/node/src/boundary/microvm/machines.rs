//! Virtual machines: a pod's only container is the machine; logs are the serial console, attach is the console itself.

use crate::boundary::*;
use ::container::cgroup::{Cgroup, Hierarchies};
use api::streams::Exit as StreamExit;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmm::client::{Request, State};
use vmm::{Client, machine};

/// How long a killed machine may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// What monitor and engine may need beside the guest's memory: QEMU's translation cache alone is given 256 MiB.
const OVERHEAD: u64 = 512 << 20;
/// Threads and processes of one machine: vCPUs, disks' workers, the monitor.
const MOST_PROCESSES: u64 = 512;

pub struct Machines {
    exe: PathBuf,
    kvm_cache: PathBuf,
}

/// What was started, kept beside the machine's state: a restarted agent reads the attempt from here.
#[derive(Serialize, Deserialize)]
struct Started {
    name: String,
    attempt: u32,
    started: i64,
}

impl Machines {
    /// `exe` is this program, whose role `vmm` is the monitor; `kvm_cache` a file that lasts until the next boot, in a
    /// directory of root's.
    pub fn new(exe: PathBuf, kvm_cache: PathBuf) -> Self {
        Machines { exe, kvm_cache }
    }

    async fn request(&self, sandbox: &SandboxSpec, request: Request) -> Result<State> {
        self::request(sandbox, request).await
    }
}

pub async fn request(sandbox: &SandboxSpec, request: Request) -> Result<State> {
    let run_dir = sandbox.run_dir.clone();
    blocking(move || Client::connect(&run_dir)?.request(request)).await
}

/// Whether the sandbox's machine is there.
pub async fn runs(sandbox: &SandboxSpec) -> bool {
    request(sandbox, Request::State).await.is_ok_and(|state| state.exit.is_none())
}

/// The tap that is the machine's only way out.
pub fn link(network: &SandboxNetwork) -> Option<machine::Link> {
    network.tap.clone().map(|tap| machine::Link {
        tap,
        netns: network.router_netns.clone(),
        mac: network.mac.clone(),
        mtu: if network.mtu == 0 { 1500 } else { network.mtu },
        addresses: network.addresses(),
    })
}

/// What the pod's annotations let a disk do.
pub fn rate(sandbox: &SandboxSpec, disk: &str) -> machine::Rate {
    use api::bandwidth::{DISK_BANDWIDTH, DISK_OPERATIONS, parse_disks};
    let limit = |key: &str| {
        // the API refuses what is no limit
        let limits = parse_disks(key, sandbox.annotations.get(key)?).ok()?;
        limits.of(disk)
    };
    machine::Rate { bytes: limit(DISK_BANDWIDTH).unwrap_or(0), operations: limit(DISK_OPERATIONS).unwrap_or(0) }
}

pub fn state_dir(sandbox: &SandboxSpec) -> PathBuf {
    sandbox.dir.join("boundary")
}

pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> vmm::Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(translate(error)),
        Err(error) => Err(BoundaryError::Failed { operation: "machine", message: error.to_string() }),
    }
}

fn translate(error: vmm::Error) -> BoundaryError {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        message.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    match error {
        vmm::Error::NotRunning => BoundaryError::NotRunning("compute".into()),
        vmm::Error::Invalid { .. } | vmm::Error::DiskImage { .. } => {
            BoundaryError::Refused { reason: "CreateContainerError".into(), message }
        }
        vmm::Error::NoEngine(_) => BoundaryError::Refused { reason: "NoMachineEngine".into(), message },
        vmm::Error::Io { .. } | vmm::Error::Monitor(_) => BoundaryError::Failed { operation: "machine", message },
    }
}

/// The machine's control group: the pod's limits, and none above what guest and monitor can need.
fn cgroup(sandbox: &SandboxSpec) -> std::result::Result<Cgroup, String> {
    let hierarchies = Hierarchies::discover().map_err(|e| e.to_string())?;
    Cgroup::new(hierarchies, &sandbox.cgroup).map_err(|e| e.to_string())
}

fn limits(pod: &Resources, guest: u64) -> Resources {
    let memory = pod.memory_limit.unwrap_or(guest).max(guest).saturating_add(OVERHEAD);
    let pids = pod.pids_limit.unwrap_or(MOST_PROCESSES).min(MOST_PROCESSES);
    Resources { memory_limit: Some(memory), pids_limit: Some(pids), ..pod.clone() }
}

pub fn confine(sandbox: &SandboxSpec, guest: u64) -> std::result::Result<Cgroup, String> {
    let group = cgroup(sandbox)?;
    group.create().map_err(|e| e.to_string())?;
    let wanted = crate::boundary::container::spec::resources(&limits(&sandbox.limits, guest));
    for warning in group.set(&wanted).map_err(|e| e.to_string())? {
        tracing::warn!(pod = %sandbox.uid, "{warning}");
    }
    Ok(group)
}

fn describe(sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<vmm::Machine> {
    let Some(spec) = &sandbox.machine else {
        return Err(BoundaryError::Refused {
            reason: "CreateContainerError".into(),
            message: "this pod describes no machine".into(),
        });
    };
    let state_dir = state_dir(sandbox);
    let seed = spec.cloud_init.as_ref().map(|_| state_dir.join("seed.iso"));
    let disks = spec.disks.iter().map(|one| disk(sandbox, one)).collect::<Result<Vec<_>>>()?;
    Ok(vmm::Machine {
        id: format!("{}_{}", sandbox.namespace, sandbox.name),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        kernel_args: spec.kernel_args.clone(),
        efi: spec.efi,
        disks,
        seed,
        link: link(&sandbox.network),
        uid: sandbox.id_base,
        run_dir: sandbox.run_dir.clone(),
        state_dir,
        console: vmm::Console { log_path: container.log_path.clone(), log_max_bytes: container.log_max_bytes },
        engine: vmm::Choice::Best,
        restore: spec.go_on.as_ref().map(|from| machine::Restore {
            state: from.state.clone(),
            memory: from.memory.clone(),
            difference: None,
            verify: false,
            engine: from.engine.clone(),
        }),
        kvm_cache: None,
        display: spec.display,
        channel: None,
    })
}

fn disk(sandbox: &SandboxSpec, disk: &Disk) -> Result<vmm::Disk> {
    let format = match disk.format.as_str() {
        "raw" => machine::DiskFormat::Raw,
        "qcow2" => machine::DiskFormat::Qcow2,
        other => {
            return Err(BoundaryError::Refused {
                reason: "CreateContainerError".into(),
                message: format!("disk {}: format {other:?}: must be raw or qcow2", disk.name),
            });
        }
    };
    Ok(vmm::Disk {
        name: disk.name.clone(),
        path: disk.path.clone(),
        format,
        read_only: disk.read_only,
        bus: disk.bus.clone(),
        serial: disk.serial.clone(),
        boot_order: disk.boot_order,
        begins: disk.begins.clone(),
        rate: rate(sandbox, &disk.name),
        overlay: true,
    })
}

fn write_seed(path: &Path, cloud: &CloudInit) -> std::io::Result<()> {
    let mut files = vec![("meta-data", cloud.meta_data.as_bytes()), ("user-data", cloud.user_data.as_bytes())];
    if !cloud.network_config.is_empty() {
        files.push(("network-config", cloud.network_config.as_bytes()));
    }
    if let Some((name, bytes)) = files.iter().find(|(_, bytes)| bytes.len() > vmm::seed::MAX_FILE) {
        let message = format!("cloud-init {name}: {} bytes, over 16 MiB", bytes.len());
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
    }
    let _ = std::fs::remove_file(path);
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
    std::io::Write::write_all(&mut options.open(path)?, &vmm::seed::iso9660("cidata", &files))
}

fn state_of(started: &Started, state: &State) -> ContainerState {
    let phase = match &state.exit {
        None => Phase::Running { started: state.started },
        Some(exit) => Phase::Exited {
            started: state.started,
            finished: exit.finished,
            code: exit.code,
            signal: exit.signal,
            oom_killed: false,
            message: exit.message.clone(),
        },
    };
    let pid = state.exit.is_none().then_some(state.engine_pid);
    ContainerState { name: started.name.clone(), attempt: started.attempt, phase, pid }
}

fn started(sandbox: &SandboxSpec) -> Option<Started> {
    serde_json::from_slice(&std::fs::read(state_dir(sandbox).join("started.json")).ok()?).ok()
}

#[async_trait]
impl Boundary for Machines {
    fn name(&self) -> &'static str {
        "microvm"
    }

    fn wants_tap(&self) -> bool {
        true
    }

    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()> {
        let fail = |e: std::io::Error| BoundaryError::Failed { operation: "prepare machine", message: e.to_string() };
        for dir in [state_dir(sandbox), sandbox.run_dir.clone()] {
            std::fs::create_dir_all(dir).map_err(fail)?;
        }
        Ok(())
    }

    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState> {
        if let (Ok(state), Some(before)) = (self.request(sandbox, Request::State).await, started(sandbox))
            && before.attempt == container.attempt
        {
            return Ok(state_of(&before, &state));
        }
        let mut machine = describe(sandbox, container)?;
        machine.kvm_cache = Some(self.kvm_cache.clone());
        let cloud = sandbox.machine.as_ref().and_then(|m| m.cloud_init.clone());
        let (exe, sandbox) = (self.exe.clone(), sandbox.clone());
        let note = state_dir(&sandbox).join("started.json");
        let mut begun = Started { name: container.name.clone(), attempt: container.attempt, started: 0 };
        blocking(move || {
            if let (Some(seed), Some(cloud)) = (&machine.seed, &cloud) {
                write_seed(seed, cloud).map_err(vmm::Error::io("write cloud-init seed", seed))?;
            }
            let group = confine(&sandbox, machine.memory_bytes).map_err(vmm::Error::Monitor)?;
            let state = vmm::launch(&exe, &machine, |pid| group.admit(pid).map_err(|e| e.to_string()))?;
            begun.started = state.started;
            std::fs::write(&note, serde_json::to_vec(&begun).unwrap_or_default())
                .map_err(vmm::Error::io("write", &note))?;
            Ok(state_of(&begun, &state))
        })
        .await
    }

    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>> {
        let Some(before) = started(sandbox) else {
            return if sandbox.run_dir.exists() {
                Ok(vec![])
            } else {
                Err(BoundaryError::NoSandbox(sandbox.uid.clone()))
            };
        };
        if let Ok(state) = self.request(sandbox, Request::State).await {
            return Ok(vec![state_of(&before, &state)]);
        }
        if let Some(state) = vmm::client::recorded(&state_dir(sandbox)) {
            return Ok(vec![state_of(&before, &state)]);
        }
        let phase = Phase::Exited {
            started: before.started,
            finished: before.started,
            code: 137,
            signal: Some(9),
            oom_killed: false,
            message: "the machine's monitor is gone and left no word".into(),
        };
        Ok(vec![ContainerState { name: before.name, attempt: before.attempt, phase, pid: None }])
    }

    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()> {
        let socket = sandbox.run_dir.join("vmm.sock");
        let Ok(mut stream) = tokio::net::UnixStream::connect(&socket).await else {
            tokio::time::sleep(Duration::from_secs(1)).await;
            return Ok(());
        };
        let fail = |e: std::io::Error| BoundaryError::Failed { operation: "watch machine", message: e.to_string() };
        stream.write_all(b"\"watch\"\n").await.map_err(fail)?;
        let mut bytes = [0u8; 512];
        while matches!(stream.read(&mut bytes).await, Ok(n) if n > 0) {}
        Ok(())
    }

    async fn signal(&self, sandbox: &SandboxSpec, _container: &str, signal: i32) -> Result<()> {
        let request = if signal == 9 { Request::Kill } else { Request::PowerButton };
        self.request(sandbox, request).await.map(drop)
    }

    async fn remove(&self, sandbox: &SandboxSpec, _container: &str) -> Result<()> {
        let _ = std::fs::remove_file(state_dir(sandbox).join("started.json"));
        Ok(())
    }

    async fn exec(&self, _: &SandboxSpec, _: &str, _: ExecRequest) -> Result<Session> {
        Err(BoundaryError::Unsupported {
            boundary: "microvm",
            what: "exec",
            why: "no agent runs in the guest; kubectl attach -it gives its serial console, and ssh works over the pod network"
                .into(),
        })
    }

    async fn attach(&self, sandbox: &SandboxSpec, _container: &str, wanted: Wanted) -> Result<Session> {
        let run_dir = sandbox.run_dir.clone();
        let console = blocking(move || Client::connect(&run_dir)?.console()).await?;
        let fail = |e: std::io::Error| BoundaryError::Failed { operation: "attach console", message: e.to_string() };
        console.set_nonblocking(true).map_err(fail)?;
        let (mut from, to) = tokio::net::UnixStream::from_std(console).map_err(fail)?.into_split();
        let (mut feed, output) = tokio::io::duplex(64 << 10);
        let (tell, exit) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from, &mut feed).await;
            let _ = tell.send(StreamExit::Code(0));
        });
        Ok(Session {
            stdin: wanted.stdin.then(|| Box::pin(to) as api::streams::Input),
            stdout: Some(Box::pin(output)),
            stderr: None,
            resize: None,
            exit,
        })
    }

    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>> {
        let Some(address) = sandbox.network.address else { return Err(BoundaryError::NotRunning("compute".into())) };
        match tokio::time::timeout(Duration::from_secs(10), tokio::net::TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(e)) => Err(BoundaryError::Failed { operation: "connect to guest", message: e.to_string() }),
            Err(_) => Err(BoundaryError::Failed { operation: "connect to guest", message: "timed out".into() }),
        }
    }

    async fn stats(&self, sandbox: &SandboxSpec, _container: &str) -> Result<Stats> {
        let pid = self.request(sandbox, Request::State).await?.engine_pid;
        process_stats(pid).ok_or_else(|| BoundaryError::NotRunning("compute".into()))
    }

    async fn pause(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.request(sandbox, Request::Pause).await.map(drop)
    }

    async fn resume(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.request(sandbox, Request::Resume).await.map(drop)
    }

    async fn soft_reboot(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.request(sandbox, Request::SoftReboot).await.map(drop)
    }

    async fn machine_stream(&self, sandbox: &SandboxSpec, stream: MachineStream) -> Result<Box<dyn Duplex>> {
        let run_dir = sandbox.run_dir.clone();
        let connected = blocking(move || {
            let client = Client::connect(&run_dir)?;
            match stream {
                MachineStream::Console => client.console(),
                MachineStream::Display => client.display(),
            }
        });
        let connected = connected.await?;
        let fail = |e: std::io::Error| BoundaryError::Failed { operation: "machine's stream", message: e.to_string() };
        connected.set_nonblocking(true).map_err(fail)?;
        Ok(Box::new(tokio::net::UnixStream::from_std(connected).map_err(fail)?))
    }

    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()> {
        self::destroy(sandbox).await
    }
}

/// Kills it if it runs and removes every trace.
pub async fn destroy(sandbox: &SandboxSpec) -> Result<()> {
    if request(sandbox, Request::Kill).await.is_ok() {
        let run_dir = sandbox.run_dir.clone();
        let gone = blocking(move || match Client::connect(&run_dir) {
            Ok(client) => client.wait(),
            Err(_) => Ok(()),
        });
        if tokio::time::timeout(KILL_DEADLINE, gone).await.is_err() {
            let message = "the monitor did not end in 10 s".to_owned();
            return Err(BoundaryError::Failed { operation: "destroy machine", message });
        }
    }
    let group = cgroup(sandbox).map_err(|message| BoundaryError::Failed { operation: "destroy machine", message })?;
    blocking(move || {
        group.kill(KILL_DEADLINE);
        group.remove(KILL_DEADLINE).map_err(|e| vmm::Error::Monitor(e.to_string()))
    })
    .await?;
    for dir in [state_dir(sandbox), sandbox.run_dir.clone()] {
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                let message = format!("{}: {e}", dir.display());
                return Err(BoundaryError::Failed { operation: "destroy machine", message });
            }
            _ => {}
        }
    }
    Ok(())
}

/// CPU time and resident memory of one process, from `/proc`.
fn process_stats(pid: u32) -> Option<Stats> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    // fields 14, 15 and 24 of proc(5), counted from after the command's name; 100 ticks a second, 4 KiB pages
    let memory = number(21)? * 4096;
    Some(Stats {
        cpu_nanos: (number(11)? + number(12)?) * 10_000_000,
        memory_bytes: memory,
        memory_working_set: memory,
        pids: number(17)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_limited_even_where_its_pod_is_not() {
        let none = limits(&Resources::default(), 1 << 30);
        assert_eq!(
            (none.memory_limit, none.pids_limit, none.cpu_limit_milli),
            (Some((1 << 30) + OVERHEAD), Some(512), None)
        );
        let pod = Resources { memory_limit: Some(2 << 30), cpu_limit_milli: Some(500), ..Default::default() };
        let some = limits(&pod, 1 << 30);
        assert_eq!((some.memory_limit, some.cpu_limit_milli), (Some((2 << 30) + OVERHEAD), Some(500)));
        let less = Resources { memory_limit: Some(1), ..Default::default() };
        assert_eq!(limits(&less, 1 << 30).memory_limit, Some((1 << 30) + OVERHEAD));
    }
}
