//! `process`: the program, and what it is given and denied.

use super::unset;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    pub terminal: bool,
    pub console_size: Option<ConsoleSize>,
    pub user: User,
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: Option<Capabilities>,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    #[serde(skip_serializing_if = "unset")]
    pub apparmor_profile: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub selinux_label: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub scheduler: Option<Scheduler>,
    #[serde(skip_serializing_if = "unset", rename = "ioPriority")]
    pub io_priority: Option<IoPriority>,
    #[serde(skip_serializing_if = "unset", rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    pub additional_gids: Vec<u32>,
}

/// `CAP_*` names.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Capabilities {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub inheritable: Vec<String>,
    pub permitted: Vec<String>,
    pub ambient: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// sched_setattr(2).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: String,
    pub nice: i32,
    pub priority: u32,
    /// `SCHED_FLAG_*`.
    pub flags: Vec<String>,
    /// Nanoseconds.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// ioprio_set(2).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_*`.
    pub class: String,
    pub priority: u16,
}

/// Processors for processes that join: lists such as `0-3,7`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuAffinity {
    pub initial: Option<String>,
    #[serde(rename = "final")]
    pub last: Option<String>,
}
