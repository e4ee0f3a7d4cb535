//! The OCI runtime specification's `config.json` for Linux in its own names and shapes
//! (<https://github.com/opencontainers/runtime-spec>, version 1.2). Unknown fields are ignored, as the specification
//! asks. What a bundle's configuration cannot say (layers that are not mounted yet) is in [`crate::runtime::Rootfs`].

mod linux;
mod process;
mod resources;

pub use linux::*;
pub use process::*;
pub use resources::*;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// For `skip_serializing_if`: what is not set is not written.
fn unset<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub oci_version: String,
    pub hostname: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub domainname: Option<String>,
    pub root: Option<Root>,
    pub process: Process,
    pub mounts: Vec<Mount>,
    #[serde(skip_serializing_if = "unset")]
    pub hooks: Option<Hooks>,
    pub annotations: BTreeMap<String, String>,
    pub linux: Linux,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Root {
    pub path: PathBuf,
    pub readonly: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    pub destination: PathBuf,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub source: Option<PathBuf>,
    pub options: Vec<String>,
    /// For an id-mapped mount; empty with `idmap`: those of the container's user namespace.
    #[serde(skip_serializing_if = "unset")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(skip_serializing_if = "unset")]
    pub gid_mappings: Vec<IdMapping>,
}

/// Each list in the order in which it is run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    pub create_container: Vec<Hook>,
    pub start_container: Vec<Hook>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hook {
    /// Absolute.
    pub path: PathBuf,
    /// The first is the name; empty: the path alone.
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// Seconds, above zero.
    pub timeout: Option<i64>,
}

impl Spec {
    pub fn namespace(&self, kind: NamespaceKind) -> Option<&Namespace> {
        self.linux.namespaces.iter().find(|n| n.kind == kind)
    }
}

impl Mount {
    pub fn new(destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        Self {
            destination: destination.into(),
            kind: Some(kind.into()),
            source: Some(source.into()),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Self::default()
        }
    }
}

/// What a container sees of `/proc`, `/sys` and `/dev`, as the field's runtimes give it; but each user sees only its own
/// processes.
pub fn default_mounts() -> Vec<Mount> {
    vec![
        Mount::new("/proc", "proc", "proc", &["nosuid", "noexec", "nodev", "hidepid=invisible"]),
        Mount::new("/dev", "tmpfs", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
        Mount::new("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "ptmxmode=0666", "mode=0620", "gid=5"]),
        Mount::new("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        Mount::new("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        Mount::new("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        Mount::new("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
    ]
}

/// Hidden: they tell of the host or reach into it.
pub const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

pub const READONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_other_tools_write() {
        let text = r#"{"ociVersion":"1.0.2","process":{"terminal":false,"user":{"uid":1,"gid":2,"additionalGids":[5]},
            "args":["sh"],"env":["PATH=/bin"],"cwd":"/","capabilities":{"bounding":["CAP_KILL"]},
            "rlimits":[{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}],"noNewPrivileges":true},
            "root":{"path":"rootfs","readonly":true},"hostname":"h","unknown":{"x":1},
            "mounts":[{"destination":"/proc","type":"proc","source":"proc"}],
            "linux":{"uidMappings":[{"containerID":0,"hostID":100000,"size":65536}],
            "resources":{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":1048576}},
            "namespaces":[{"type":"pid"},{"type":"network","path":"/run/x"}]}}"#;
        let spec: Spec = serde_json::from_str(text).expect("parses");
        assert_eq!(spec.process.user.additional_gids, [5]);
        assert_eq!(spec.linux.uid_mappings[0].host_id, 100_000);
        assert_eq!(spec.linux.resources.memory.as_ref().and_then(|m| m.limit), Some(1 << 20));
        assert!(spec.namespace(NamespaceKind::Network).is_some_and(|n| n.path.is_some()));
        assert!(spec.root.is_some_and(|r| r.readonly));
    }
}
