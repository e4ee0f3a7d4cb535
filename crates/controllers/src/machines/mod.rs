//! Virtual machines in KubeVirt's terms: a VirtualMachine wants to run or not; its VirtualMachineInstance is one run; the
//! pod of an instance is what the node agent turns into a machine.
//!
//! ```text
//! VirtualMachine ──(machine)──▶ VirtualMachineInstance ──(instance)──▶ Pod virt-launcher-<name>-<random>
//! ```
//! A snapshot has a content, whose files are the node agent's; restores and clones change and make machines whose disks begin
//! as such a content, and whose memory may go on from it once.
//!
//! ```text
//! VirtualMachineSnapshot ──▶ VirtualMachineSnapshotContent (files) ◀── disks-from ── VirtualMachine
//! ```
//! One machine never runs twice: an instance has a finalizer until its pod is gone, and makes no pod while another of its
//! name is there.

mod clone;
mod content;
mod instance;
mod launcher;
mod machine;
mod restore;
mod snapshot;
#[cfg(test)]
mod snapshot_tests;
#[cfg(test)]
mod tests;

pub(crate) use clone::new as clones;
pub(crate) use content::new as contents;
pub(crate) use instance::new as instances;
pub(crate) use machine::new as machines;
pub(crate) use restore::new as restores;
pub(crate) use snapshot::new as snapshots;

use api::object::{Meta, Object};

/// Holds an instance until its pod is gone.
const FINALIZER: &str = "kubevirt.io/virtual-machine-instance";
/// On pods and instances: the machine's name.
const NAME_LABEL: &str = "vm.kubevirt.io/name";

/// On a machine's template, its instances and pods: uid of the VirtualMachineSnapshotContent that its disks begin as.
const DISKS_FROM: &str = "atoll.dev/disks-from";
/// On a machine: the same content's uid, until an instance has gone on from its memory; on that instance and its pod.
const GO_ON_FROM: &str = "atoll.dev/go-on-from";
/// On a snapshot, its content or a restore: `false` for the disks alone.
const MEMORY: &str = "atoll.dev/memory";

/// How far a request is.
enum Step {
    Done,
    /// Reason and message.
    Wait(&'static str, String),
    Fail(String),
}

/// Whether a request has its `Failure` condition.
fn failed(request: &Object) -> bool {
    crate::objects::condition_status(request, "Failure") == "True"
}

fn has_ended(instance: &Object) -> bool {
    matches!(instance.str_at("/status/phase"), "Succeeded" | "Failed")
}
