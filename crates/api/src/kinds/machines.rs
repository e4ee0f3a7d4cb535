//! KubeVirt's kinds: machines, their runs, snapshots and clones.

use super::{Entry, Scope, Traits, columns, hooks};

const SNAPSHOT: &str = "snapshot.kubevirt.io";

pub(super) fn entries() -> Vec<Entry> {
    let mut all = machines();
    all.extend(snapshots());
    all
}

fn machines() -> Vec<Entry> {
    vec![
        entry!(
            ("kubevirt.io", "v1", "virtualmachines", "VirtualMachine"),
            &["vm", "vms"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.v1.VirtualMachine",
            virtual_machine
        ),
        entry!(
            ("kubevirt.io", "v1", "virtualmachineinstances", "VirtualMachineInstance"),
            &["vmi", "vmis"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.v1.VirtualMachineInstance",
            virtual_machine_instance
        ),
    ]
}

fn snapshots() -> Vec<Entry> {
    vec![
        entry!(
            (SNAPSHOT, "v1beta1", "virtualmachinesnapshots", "VirtualMachineSnapshot"),
            &["vmsnapshot", "vmsnapshots"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.snapshot.v1beta1.VirtualMachineSnapshot",
            virtual_machine_snapshot
        ),
        entry!(
            (SNAPSHOT, "v1beta1", "virtualmachinesnapshotcontents", "VirtualMachineSnapshotContent"),
            &["vmsnapshotcontent", "vmsnapshotcontents"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.snapshot.v1beta1.VirtualMachineSnapshotContent",
            virtual_machine_snapshot_content
        ),
        entry!(
            (SNAPSHOT, "v1beta1", "virtualmachinerestores", "VirtualMachineRestore"),
            &["vmrestore", "vmrestores"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.snapshot.v1beta1.VirtualMachineRestore",
            virtual_machine_restore
        ),
        entry!(
            ("clone.kubevirt.io", "v1beta1", "virtualmachineclones", "VirtualMachineClone"),
            &["vmclone", "vmclones"],
            &["all"],
            Namespaced,
            Full,
            "io.kubevirt.clone.v1beta1.VirtualMachineClone",
            virtual_machine_clone
        ),
    ]
}
