//! `linux`: namespaces, devices, seccomp and the rest that only Linux has.

use super::{Resources, unset};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
    #[serde(skip_serializing_if = "unset")]
    pub time_offsets: BTreeMap<String, TimeOffset>,
    pub sysctl: BTreeMap<String, String>,
    pub resources: Resources,
    /// Relative to each hierarchy's mount point.
    pub cgroups_path: Option<PathBuf>,
    pub namespaces: Vec<Namespace>,
    #[serde(skip_serializing_if = "unset")]
    pub devices: Vec<Device>,
    #[serde(skip_serializing_if = "unset")]
    pub seccomp: Option<Seccomp>,
    /// `shared`, `slave`, `private` or `unbindable`.
    #[serde(skip_serializing_if = "unset")]
    pub rootfs_propagation: Option<String>,
    pub masked_paths: Vec<PathBuf>,
    pub readonly_paths: Vec<PathBuf>,
    #[serde(skip_serializing_if = "unset")]
    pub mount_label: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub intel_rdt: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "unset")]
    pub personality: Option<Personality>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeOffset {
    pub secs: i64,
    pub nanosecs: u32,
}

/// Without a path: a new one. A kind that is not listed is the runtime's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

/// A device node for the container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    pub path: PathBuf,
    /// `c`, `b`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    pub major: i64,
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    pub flags: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// `SCMP_ACT_*`.
    pub default_action: String,
    pub default_errno_ret: Option<u32>,
    /// `SCMP_ARCH_*`.
    pub architectures: Vec<String>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: Vec<String>,
    pub listener_path: Option<PathBuf>,
    pub listener_metadata: String,
    pub syscalls: Vec<SeccompRule>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeccompRule {
    pub names: Vec<String>,
    pub action: String,
    pub errno_ret: Option<u32>,
    pub args: Vec<SeccompArg>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeccompArg {
    pub index: u32,
    pub value: u64,
    /// With `SCMP_CMP_MASKED_EQ`: what is left under the mask `value`.
    pub value_two: u64,
    /// `SCMP_CMP_*`.
    pub op: String,
}
