//! The joint between the agent and what runs workloads. `container`, `microvm` and `wasm` each implement [`Boundary`];
//! nothing above names one of them.
//!
//! Lifecycle of a sandbox: `prepare` -> (`start` one container after another, `signal`, `exec`, ...) -> `destroy`.
//! Every call is idempotent: after a crash of the agent the same calls are made again against what still runs, and
//! `list` tells what that is. Sandboxes outlive the agent.

pub mod container;
pub mod microvm;
pub mod wasm;

use api::sleep::Sleep;
use api::streams::{Duplex, MachineStream, Session, Wanted};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// What a pod needs of its boundary, complete: nothing in here has to be looked up again. Written to the pod's
/// directory as `sandbox.json` before `prepare`, so that a restarted agent knows it without the API.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxSpec {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// `DATA/pods/<uid>`; the boundary may keep what it likes below `dir/boundary`.
    pub dir: PathBuf,
    /// `/run/atoll/<instance>/pods/<uid>`: short path for sockets; gone after a reboot.
    pub run_dir: PathBuf,
    pub hostname: String,
    pub network: SandboxNetwork,
    /// First host user and group id of the pod's range of 65,536; 0 only with `hostUsers: true`.
    pub id_base: u32,
    /// Parent cgroup path below each controller's mount, `atoll/<instance>/pod<uid>`.
    pub cgroup: String,
    pub limits: Resources,
    pub sysctls: BTreeMap<String, String>,
    /// Share one PID namespace among the pod's containers.
    pub share_pid: bool,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Only for virtual machines.
    pub machine: Option<MachineSpec>,
    /// The images of all containers, where the boundary [`Boundary::wants_block_images`].
    #[serde(default)]
    pub images: Vec<SandboxImage>,
    /// Of each container's log.
    #[serde(default)]
    pub log_max_bytes: u64,
}

/// An image as one read-only file system in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxImage {
    /// What it was made of, as in [`Rootfs::Layers`].
    pub layers: Vec<PathBuf>,
    pub path: PathBuf,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxNetwork {
    pub address: Option<Ipv4Addr>,
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// A pinned network namespace with the pod's link in it (containers, functions).
    pub netns: Option<PathBuf>,
    /// Name of the tap device in the router's namespace (machines), and that namespace's path.
    pub tap: Option<String>,
    pub router_netns: Option<PathBuf>,
    pub mac: String,
    /// Next hop, on-link: `169.254.1.1`.
    pub gateway: Option<Ipv4Addr>,
    pub mtu: u32,
    pub dns: Option<Ipv4Addr>,
    pub dns_search: Vec<String>,
    /// `hostNetwork: true`.
    pub host: bool,
}

impl SandboxNetwork {
    /// The pod's addresses, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.address.map(IpAddr::V4).into_iter().chain(self.address6.map(IpAddr::V6)).collect()
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a core. 0 = none asked.
    pub cpu_request_milli: u64,
    pub cpu_limit_milli: Option<u64>,
    pub memory_request: u64,
    /// Bytes.
    pub memory_limit: Option<u64>,
    pub pids_limit: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: String,
    /// Restart count; names the log file and the container's directory.
    pub attempt: u32,
    pub rootfs: Rootfs,
    /// Entry point and arguments, expanded; never empty for containers.
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: String,
    pub mounts: Vec<Mount>,
    pub resources: Resources,
    pub security: Security,
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    /// CRI log format (`<RFC3339Nano> stdout|stderr F|P <line>`), rotated at `log_max_bytes` into `.1`.
    pub log_path: PathBuf,
    pub log_max_bytes: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Rootfs {
    /// Unpacked layers, lowest first, owned as in the image (ids 0..65535, not shifted).
    Layers { image: String, layers: Vec<PathBuf> },
    /// A WebAssembly component.
    Component { image: String, path: PathBuf, digest: String },
    /// The machine's disks are in `SandboxSpec::machine`.
    Machine,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    pub source: MountSource,
    pub target: PathBuf,
    pub read_only: bool,
    /// `None`, `HostToContainer`, `Bidirectional`.
    pub propagation: String,
    /// The pod's volume that `source` is, or is in; files that Atoll adds are in none.
    #[serde(default)]
    pub volume: Option<PodVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodVolume {
    pub name: String,
    pub sub_path: String,
    /// Made of files that Atoll writes and replaces (configMap, secret, ...), not of what containers write.
    pub files: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum MountSource {
    /// A file or directory that Atoll wrote or the pod owns (configMap, secret, emptyDir, /etc/hosts, ...): shown with
    /// ids shifted into the pod's range (id-mapped, or already owned by it).
    Pod(PathBuf),
    /// hostPath: shown with the host's own ids.
    Host(PathBuf),
    Tmpfs {
        size: Option<u64>,
        mode: u32,
    },
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Security {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub privileged: bool,
    pub no_new_privileges: bool,
    pub read_only_root: bool,
    /// `CAP_*` names, final set.
    pub capabilities: Vec<String>,
    /// `Unconfined` turns the default seccomp profile off.
    pub seccomp_unconfined: bool,
}

/// A virtual machine, resolved: paths, sizes, texts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineSpec {
    pub vcpus: u32,
    pub memory_bytes: u64,
    /// Direct boot; without a kernel the disk boots through firmware.
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub kernel_args: String,
    #[serde(default)]
    pub efi: bool,
    pub disks: Vec<Disk>,
    pub cloud_init: Option<CloudInit>,
    #[serde(default)]
    pub go_on: Option<GoOn>,
    #[serde(default)]
    pub display: bool,
}

/// Where a machine goes on instead of booting.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GoOn {
    pub state: PathBuf,
    pub memory: PathBuf,
    /// What ran it; the same has to.
    pub engine: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Disk {
    pub name: String,
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    pub read_only: bool,
    pub bus: String,
    pub serial: String,
    pub boot_order: Option<u32>,
    /// What was written over `path` when the machine begins.
    #[serde(default)]
    pub begins: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CloudInit {
    pub meta_data: String,
    pub user_data: String,
    pub network_config: String,
}

/// One container as the boundary sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    pub name: String,
    pub attempt: u32,
    pub phase: Phase,
    /// Host pid of its first process while it runs, if it has one.
    pub pid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Times are unix nanoseconds.
    Running {
        started: i64,
    },
    Exited {
        started: i64,
        finished: i64,
        code: i32,
        signal: Option<i32>,
        oom_killed: bool,
        message: String,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub cpu_nanos: u64,
    pub memory_bytes: u64,
    pub memory_working_set: u64,
    pub pids: u64,
}

#[derive(Clone, Debug)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub env: Vec<(String, String)>,
    pub wanted: Wanted,
}

pub type Result<T> = std::result::Result<T, BoundaryError>;

#[derive(Debug, thiserror::Error)]
pub enum BoundaryError {
    /// The workload's own fault: bad image, command not found, ... `reason` becomes the container's waiting or
    /// terminated reason (`CreateContainerError`, `StartError`, `ErrImagePull`, ...).
    #[error("{message}")]
    Refused { reason: String, message: String },
    #[error("{what} is not possible with the {boundary} boundary: {why}")]
    Unsupported { boundary: &'static str, what: &'static str, why: String },
    #[error("sandbox {0} is not there")]
    NoSandbox(String),
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The machinery failed; tried again with back-off.
    #[error("{operation}: {message}")]
    Failed { operation: &'static str, message: String },
}

#[async_trait]
pub trait Boundary: Send + Sync + 'static {
    /// `container`, `microvm` or `wasm`: the handler of the pod's RuntimeClass.
    fn name(&self) -> &'static str;
    /// Whether the network attachment is a tap (machines) rather than a namespace.
    fn wants_tap(&self) -> bool {
        false
    }
    /// Whether a sandbox is prepared with the images of all its containers, as block devices.
    fn wants_block_images(&self) -> bool {
        false
    }
    /// Makes the sandbox, or finds it again. Nothing of the tenant runs yet.
    async fn prepare(&self, sandbox: &SandboxSpec) -> Result<()>;
    /// Starts one container (or the machine, or the function). Returns when its process is executed.
    async fn start(&self, sandbox: &SandboxSpec, container: &ContainerSpec) -> Result<ContainerState>;
    /// All containers that were started and not removed, ended ones too. `NoSandbox` if its supervisor is gone.
    async fn list(&self, sandbox: &SandboxSpec) -> Result<Vec<ContainerState>>;
    /// Returns when something changed since the last `list` of this sandbox (or its supervisor went away); used as a
    /// wake-up only.
    async fn changed(&self, sandbox: &SandboxSpec) -> Result<()>;
    /// Sends a signal to the container's first process (a machine: 15 = power button, 9 = cut the power).
    async fn signal(&self, sandbox: &SandboxSpec, container: &str, signal: i32) -> Result<()>;
    /// Removes one ended container's leftovers (rootfs mounts, directory), not its log.
    async fn remove(&self, sandbox: &SandboxSpec, container: &str) -> Result<()>;
    async fn exec(&self, sandbox: &SandboxSpec, container: &str, request: ExecRequest) -> Result<Session>;
    async fn attach(&self, sandbox: &SandboxSpec, container: &str, wanted: Wanted) -> Result<Session>;
    async fn port_forward(&self, sandbox: &SandboxSpec, port: u16) -> Result<Box<dyn Duplex>>;
    async fn stats(&self, sandbox: &SandboxSpec, container: &str) -> Result<Stats>;
    async fn pause(&self, sandbox: &SandboxSpec) -> Result<()>;
    async fn resume(&self, sandbox: &SandboxSpec) -> Result<()>;
    /// All that runs stands still, and takes less, until [`Boundary::wake`]; what it was is there then. Idempotent.
    async fn sleep(&self, sandbox: &SandboxSpec, how: Sleep) -> Result<()> {
        match how {
            Sleep::Frozen => self.pause(sandbox).await,
            Sleep::Snapshot => {
                let why = "only pods with runtimeClassName microvm can; frozen is".into();
                Err(BoundaryError::Unsupported { boundary: self.name(), what: "sleep as a snapshot", why })
            }
        }
    }
    async fn wake(&self, sandbox: &SandboxSpec) -> Result<()> {
        self.resume(sandbox).await
    }
    /// Volumes made of files have others now, in the pod's directory.
    async fn volumes_changed(&self, _: &SandboxSpec) -> Result<()> {
        Ok(())
    }
    /// Presses a machine's power button and starts it again when it has shut down.
    async fn soft_reboot(&self, _: &SandboxSpec) -> Result<()> {
        let why = "only machines can".into();
        Err(BoundaryError::Unsupported { boundary: self.name(), what: "soft reboot", why })
    }
    /// A machine's serial line or screen.
    async fn machine_stream(&self, _: &SandboxSpec, _: MachineStream) -> Result<Box<dyn Duplex>> {
        let why = "only machines have them".into();
        Err(BoundaryError::Unsupported { boundary: self.name(), what: "a console or screen", why })
    }
    /// What it counts beside the containers' own statistics.
    async fn metrics(&self) -> api::metrics::Text {
        api::metrics::Text::default()
    }
    /// Kills what is left and removes every trace but the pod's directory itself.
    async fn destroy(&self, sandbox: &SandboxSpec) -> Result<()>;
}
