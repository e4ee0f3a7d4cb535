//! What the agent is told at start. Everything else it learns from the API or from disk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Settings of one node.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name: `metadata.name` of its Node object and `spec.nodeName` of its pods.
    pub name: String,
    /// `DATA`; the agent owns `DATA/pods`.
    pub data_dir: PathBuf,
    /// `/run/atoll/<instance>`.
    pub run_dir: PathBuf,
    /// 8 hex digits; part of cgroup paths.
    pub instance: String,
    /// The program itself, for re-executed roles.
    pub exe: PathBuf,
    pub cluster_dns: Ipv4Addr,
    /// `cluster.local`.
    pub cluster_domain: String,
    /// `10.43.0.0/16`.
    pub service_cidr: String,
    /// Pods' networks, of one family or both: `10.42.0.0/16`, `fd00:10:42::/64`.
    pub pod_cidrs: Vec<String>,
    /// `127.0.0.1:5000`.
    pub registry_addr: String,
    /// Mirrors, certificates and credentials that pulls have; `credentials` come from each pod's `imagePullSecrets`.
    pub pull: image::PullOptions,
    /// Address under which the node is known (`status.hostIP`). Unspecified: the router's towards pods.
    pub node_ip: Ipv4Addr,
    pub node_ip6: Option<Ipv6Addr>,
    /// The host's network namespace (`/proc/self/fd/<n>` or a pinned path), from which images are pulled; `None`: the
    /// one the agent runs in.
    pub host_netns: Option<PathBuf>,
    /// Which ports of the host are opened for Services.
    pub exposing: Exposing,
    /// What holds where no NetworkPolicy does.
    pub isolation: network::Isolation,
    pub max_pods: u32,
    /// Bound on processes of one pod; `None` leaves it to the kernel.
    pub pod_pids_limit: Option<u64>,
    pub log_max_bytes: u64,
    /// Bytes that machines' snapshots may take on disk, images aside.
    pub snapshot_space: u64,
    /// Logs of ended attempts kept for one container, the newest of them.
    pub log_keep_attempts: u32,
}

/// Addresses of the host at which Services may be reached from outside; none, unless said.
#[derive(Clone, Debug, Default)]
pub struct Exposing {
    /// Where node ports listen. The unspecified address stands for all of a family.
    pub node_ports: Vec<IpAddr>,
    /// Where Services of type LoadBalancer listen, if their status has one of these.
    pub load_balancers: Vec<IpAddr>,
    /// What `externalIPs` may name.
    pub external_ips: Vec<network::policy::Network>,
}

impl Config {
    /// Everything but the three that have no sensible default.
    pub fn new(name: impl Into<String>, data_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Self {
        let run_dir: PathBuf = run_dir.into();
        let instance = run_dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Config {
            name: name.into(),
            data_dir: data_dir.into(),
            run_dir,
            instance,
            exe: std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe")),
            cluster_dns: Ipv4Addr::new(10, 43, 0, 10),
            cluster_domain: "cluster.local".into(),
            service_cidr: "10.43.0.0/16".into(),
            pod_cidrs: vec!["10.42.0.0/16".into()],
            registry_addr: "127.0.0.1:5000".into(),
            pull: image::PullOptions::default(),
            node_ip: Ipv4Addr::UNSPECIFIED,
            node_ip6: None,
            host_netns: None,
            exposing: Exposing::default(),
            isolation: network::Isolation::default(),
            max_pods: 250,
            pod_pids_limit: Some(8192),
            snapshot_space: 32 << 30,
            log_max_bytes: 10 << 20,
            log_keep_attempts: 2,
        }
    }

    /// The node's addresses, IPv4 first.
    pub(crate) fn node_ips(&self) -> Vec<IpAddr> {
        std::iter::once(IpAddr::V4(self.node_ip)).chain(self.node_ip6.map(IpAddr::V6)).collect()
    }
    pub(crate) fn pods_dir(&self) -> PathBuf {
        self.data_dir.join("pods")
    }
    pub(crate) fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir().join(uid)
    }
    pub(crate) fn pod_run_dir(&self, uid: &str) -> PathBuf {
        self.run_dir.join("pods").join(uid)
    }
    pub(crate) fn pod_cgroup(&self, uid: &str) -> String {
        format!("atoll/{}/pod{uid}", self.instance)
    }
}

/// `DATA/pods/<uid>/logs/<container>/<attempt>.log`.
pub(crate) fn log_path(pod_dir: &Path, container: &str, attempt: u32) -> PathBuf {
    pod_dir.join("logs").join(container).join(format!("{attempt}.log"))
}

/// Whether a name that will become a path component is one: object names, container names and uids are checked by the
/// API, and once more here.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}
