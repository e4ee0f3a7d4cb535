//! `linux.resources`: limits, in the terms of version 1 control groups as the specification has them.

use super::unset;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    #[serde(skip_serializing_if = "unset")]
    pub devices: Vec<DeviceRule>,
    pub memory: Option<Memory>,
    pub cpu: Option<Cpu>,
    pub pids: Option<Pids>,
    #[serde(skip_serializing_if = "unset", rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    #[serde(skip_serializing_if = "unset")]
    pub hugepage_limits: Vec<HugepageLimit>,
    #[serde(skip_serializing_if = "unset")]
    pub network: Option<NetworkLimits>,
    #[serde(skip_serializing_if = "unset")]
    pub rdma: BTreeMap<String, Rdma>,
    /// Version 2 files by name.
    #[serde(skip_serializing_if = "unset")]
    pub unified: BTreeMap<String, String>,
}

/// Later rules win over earlier ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    pub allow: bool,
    /// `a`, `c` or `b`; none: all.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// None or -1: all.
    pub major: Option<i64>,
    pub minor: Option<i64>,
    /// Of `r`, `w` and `m`; empty: all.
    pub access: String,
}

/// Bytes; -1 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    pub limit: Option<i64>,
    #[serde(skip_serializing_if = "unset")]
    pub reservation: Option<i64>,
    /// Memory and swap together.
    #[serde(skip_serializing_if = "unset")]
    pub swap: Option<i64>,
    #[serde(skip_serializing_if = "unset")]
    pub kernel: Option<i64>,
    #[serde(skip_serializing_if = "unset", rename = "kernelTCP")]
    pub kernel_tcp: Option<i64>,
    #[serde(skip_serializing_if = "unset")]
    pub swappiness: Option<u64>,
    #[serde(skip_serializing_if = "unset", rename = "disableOOMKiller")]
    pub disable_oom_killer: Option<bool>,
    #[serde(skip_serializing_if = "unset")]
    pub check_before_update: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// cgroup v1's `cpu.shares`: 2 to 262,144, 1,024 for one core's worth.
    pub shares: Option<u64>,
    /// Microseconds of CPU time in each period.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    #[serde(skip_serializing_if = "unset")]
    pub burst: Option<u64>,
    #[serde(skip_serializing_if = "unset")]
    pub realtime_runtime: Option<i64>,
    #[serde(skip_serializing_if = "unset")]
    pub realtime_period: Option<u64>,
    #[serde(skip_serializing_if = "unset")]
    pub cpus: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub mems: Option<String>,
    #[serde(skip_serializing_if = "unset")]
    pub idle: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pids {
    /// Zero or less is no limit.
    pub limit: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
    pub weight_device: Vec<WeightDevice>,
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WeightDevice {
    pub major: i64,
    pub minor: i64,
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ThrottleDevice {
    pub major: i64,
    pub minor: i64,
    pub rate: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HugepageLimit {
    /// Such as `2MB`.
    pub page_size: String,
    pub limit: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkLimits {
    #[serde(rename = "classID")]
    pub class_id: Option<u32>,
    pub priorities: Vec<InterfacePriority>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InterfacePriority {
    pub name: String,
    pub priority: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rdma {
    pub hca_handles: Option<u32>,
    pub hca_objects: Option<u32>,
}
