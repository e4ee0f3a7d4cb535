//! The Node object and its Lease: what the machine has, and that it is alive. Ten seconds apart, one small write; the
//! Node itself only when something changed or every five minutes.

use crate::boundary::Boundary;
use crate::config::Config;
use api::client::{Client, Patch};
use api::kind::Resource;
use api::object::{Meta, Object};
use api::status::{Reason, StatusResult};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const LEASE_PERIOD: Duration = Duration::from_secs(10);
const LEASE_SECONDS: u64 = 40;
const STATUS_PERIOD: Duration = Duration::from_secs(300);
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// What this machine has.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub cores: u64,
    pub memory: u64,
    disk: u64,
    kernel: String,
    architecture: &'static str,
    os_image: String,
    machine_id: String,
    boot_id: String,
    hostname: String,
}

fn file(path: &str) -> String {
    std::fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default()
}

impl Machine {
    /// Reads a few small files; blocks shortly.
    pub fn look(config: &Config) -> Machine {
        let memory = file("/proc/meminfo")
            .lines()
            .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0);
        let disk = rustix::fs::statvfs(&config.data_dir).map(|s| s.f_blocks.saturating_mul(s.f_frsize)).unwrap_or(0);
        let uname = rustix::system::uname();
        let os_release = file("/etc/os-release");
        let pretty = os_release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
        Machine {
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            memory: memory.saturating_mul(1024),
            disk,
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            os_image: pretty.unwrap_or("Linux").trim_matches('"').to_owned(),
            machine_id: file("/etc/machine-id"),
            boot_id: file("/proc/sys/kernel/random/boot_id"),
            hostname: uname.nodename().to_string_lossy().into_owned(),
        }
    }

    fn has_memory(&self) -> bool {
        let available = file("/proc/meminfo")
            .lines()
            .find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        available.is_none_or(|kib| kib > 100 << 10)
    }
}

fn has_disk(config: &Config) -> bool {
    // As kubelet's default: less than 10 % free is pressure.
    rustix::fs::statvfs(&config.data_dir).map_or(true, |s| s.f_bavail.saturating_mul(20) > s.f_blocks)
}

fn condition(kind: &str, is: bool, reason: &str, message: &str, old: &Object) -> Value {
    let now = api::time::now_rfc3339();
    let status = if is { "True" } else { "False" };
    let before = old.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let before = before.clone().find(|c| c.str_at("/type") == kind && c.str_at("/status") == status);
    let since = before.map(|c| c.str_at("/lastTransitionTime").to_owned()).filter(|t| !t.is_empty());
    json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastHeartbeatTime": now, "lastTransitionTime": since.unwrap_or(now.clone())})
}

fn status(config: &Config, machine: &Machine, boundaries: &[Arc<dyn Boundary>], old: &Object) -> Value {
    let resources = json!({
        "cpu": machine.cores.to_string(),
        "memory": format!("{}Ki", machine.memory / 1024),
        "ephemeral-storage": format!("{}Ki", machine.disk / 1024),
        "pods": config.max_pods.to_string(),
    });
    let (memory, disk) = (machine.has_memory(), has_disk(config));
    let conditions = json!([
        if memory {
            condition(
                "MemoryPressure",
                false,
                "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available",
                old,
            )
        } else {
            condition(
                "MemoryPressure",
                true,
                "KubeletHasInsufficientMemory",
                "kubelet has insufficient memory available",
                old,
            )
        },
        if disk {
            condition("DiskPressure", false, "KubeletHasNoDiskPressure", "kubelet has no disk pressure", old)
        } else {
            condition("DiskPressure", true, "KubeletHasDiskPressure", "kubelet has disk pressure", old)
        },
        condition("PIDPressure", false, "KubeletHasSufficientPID", "kubelet has sufficient PID available", old),
        condition("Ready", true, "KubeletReady", "kubelet is posting ready status", old),
    ]);
    let mut handlers =
        vec![json!({"name": "", "features": {"recursiveReadOnlyMounts": false, "userNamespaces": true}})];
    handlers.extend(boundaries.iter().map(
        |b| json!({"name": b.name(), "features": {"recursiveReadOnlyMounts": false, "userNamespaces": !b.wants_tap()}}),
    ));
    let internal = config.node_ips().into_iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()}));
    let hostname = json!({"type": "Hostname", "address": machine.hostname});
    let addresses: Vec<Value> = internal.chain([hostname]).collect();
    json!({
        "capacity": resources, "allocatable": resources, "conditions": conditions,
        "addresses": addresses,
        "nodeInfo": {
            "architecture": machine.architecture, "bootID": machine.boot_id,
            "containerRuntimeVersion": concat!("atoll://", env!("CARGO_PKG_VERSION")),
            "kernelVersion": machine.kernel, "kubeProxyVersion": "",
            "kubeletVersion": concat!("v1.33.0-atoll.", env!("CARGO_PKG_VERSION")),
            "machineID": machine.machine_id, "operatingSystem": "linux", "osImage": machine.os_image,
            "systemUUID": machine.machine_id,
        },
        "runtimeHandlers": handlers,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
    })
}

/// The status without what changes with every look.
fn essence(status: &Value) -> Value {
    let mut copy = status.clone();
    let conditions = copy.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten();
    for condition in conditions.filter_map(Value::as_object_mut) {
        condition.remove("lastHeartbeatTime");
    }
    copy
}

pub(crate) struct Registration {
    pub config: Config,
    pub client: Arc<dyn Client>,
    pub boundaries: Vec<Arc<dyn Boundary>>,
    pub machine: Machine,
}

impl Registration {
    /// Registers, then keeps the Lease and the Node's status up to date until cancelled.
    pub async fn run(self) {
        let mut status_at = Instant::now();
        let mut said = false;
        loop {
            let mut failed = None;
            if status_at <= Instant::now() {
                match self.register().await {
                    Ok(()) => status_at = Instant::now() + STATUS_PERIOD,
                    Err(error) => failed = Some(("node", error)),
                }
            }
            if let Err(error) = self.renew().await {
                failed = Some(("lease", error));
            }
            match &failed {
                Some((what, error)) if !said => tracing::warn!("{what} cannot be written, trying again: {error}"),
                _ => {}
            }
            said = failed.is_some();
            tokio::time::sleep(if failed.is_some() { Duration::from_secs(1) } else { LEASE_PERIOD }).await;
        }
    }

    fn labels(&self) -> [(&'static str, String); 5] {
        [
            ("kubernetes.io/hostname", self.config.name.clone()),
            ("kubernetes.io/os", "linux".into()),
            ("kubernetes.io/arch", self.machine.architecture.into()),
            ("beta.kubernetes.io/os", "linux".into()),
            ("beta.kubernetes.io/arch", self.machine.architecture.into()),
        ]
    }

    async fn register(&self) -> StatusResult<()> {
        let nodes = Resource::new("", "v1", "nodes");
        let name = &self.config.name;
        let found = match self.client.get(&nodes, "", name).await {
            Ok(found) => found,
            Err(status) if status.is_not_found() => {
                let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
                    "spec": {"podCIDR": self.config.pod_cidrs.first(), "podCIDRs": self.config.pod_cidrs}});
                for (key, value) in self.labels() {
                    node.set_label(key, &value);
                }
                self.client.create(&nodes, "", node).await?
            }
            Err(status) => return Err(status),
        };
        let missing: serde_json::Map<String, Value> = self
            .labels()
            .into_iter()
            .filter(|(key, value)| found.label(key) != Some(value))
            .map(|(key, value)| (key.to_owned(), value.into()))
            .collect();
        let found = if missing.is_empty() {
            found
        } else {
            let patch = Patch::Merge(json!({"metadata": {"labels": missing}}));
            self.client.patch(&nodes, "", name, "", patch).await?
        };
        let status = status(&self.config, &self.machine, &self.boundaries, &found);
        if found.get("status").map(essence) == Some(essence(&status)) {
            // Only the heartbeat: the Lease carries that.
            return Ok(());
        }
        self.client.patch(&nodes, "", name, "status", Patch::Merge(json!({"status": status}))).await.map(drop)
    }

    async fn renew(&self) -> StatusResult<()> {
        let leases = Resource::new("coordination.k8s.io", "v1", "leases");
        let name = &self.config.name;
        let now = api::time::micro_time(api::time::now_micros());
        let patch = Patch::Merge(json!({"spec": {"renewTime": now, "holderIdentity": name}}));
        match self.client.patch(&leases, LEASE_NAMESPACE, name, "", patch).await {
            Ok(_) => return Ok(()),
            Err(status) if status.is_not_found() => {}
            Err(status) => return Err(status),
        }
        let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": name, "namespace": LEASE_NAMESPACE},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now}});
        match self.client.create(&leases, LEASE_NAMESPACE, lease.clone()).await {
            Err(status) if status.is_not_found() || status.reason == Reason::Forbidden => {
                let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": LEASE_NAMESPACE}});
                let _ = self.client.create(&Resource::new("", "v1", "namespaces"), "", namespace).await;
                self.client.create(&leases, LEASE_NAMESPACE, lease).await.map(drop)
            }
            other => other.map(drop),
        }
    }
}
