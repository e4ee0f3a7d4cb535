//! Virtual machines in KubeVirt's terms: a VirtualMachine wants to run or not; its VirtualMachineInstance is one run; the
//! pod of an instance is what the node agent turns into a machine.
//!
//! ```text
//! VirtualMachine ──(machine)──▶ VirtualMachineInstance ──(instance)──▶ Pod virt-launcher-<name>-<random>
//! ```
//! One machine never runs twice: an instance has a finalizer until its pod is gone, and makes no pod while another of its
//! name is there.

mod instance;
mod launcher;
mod machine;
#[cfg(test)]
mod tests;

pub(crate) use instance::new as instances;
pub(crate) use machine::new as machines;

use api::object::{Meta, Object};

/// Holds an instance until its pod is gone.
const FINALIZER: &str = "kubevirt.io/virtual-machine-instance";
/// On pods and instances: the machine's name.
const NAME_LABEL: &str = "vm.kubevirt.io/name";

fn has_ended(instance: &Object) -> bool {
    matches!(instance.str_at("/status/phase"), "Succeeded" | "Failed")
}
