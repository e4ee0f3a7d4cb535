//! Columns of KubeVirt's kinds, as its custom resource definitions print them.

use super::{CREATED, READY, paths};
use crate::kind::Column;

pub fn virtual_machine() -> Vec<Column> {
    paths(&[
        ("Age", "date", 0, CREATED),
        ("Status", "string", 0, ".status.printableStatus"),
        ("Ready", "string", 0, READY),
    ])
}

pub fn virtual_machine_instance() -> Vec<Column> {
    paths(&[
        ("Age", "date", 0, CREATED),
        ("Phase", "string", 0, ".status.phase"),
        ("IP", "string", 0, ".status.interfaces[0].ipAddress"),
        ("NodeName", "string", 0, ".status.nodeName"),
        ("Ready", "string", 0, READY),
        ("Live-Migratable", "string", 1, ".status.conditions[?(@.type=='LiveMigratable')].status"),
        ("Paused", "string", 1, ".status.conditions[?(@.type=='Paused')].status"),
    ])
}

const ERROR: &str = ".status.error.message";

pub fn virtual_machine_snapshot() -> Vec<Column> {
    paths(&[
        ("SourceKind", "string", 0, ".spec.source.kind"),
        ("SourceName", "string", 0, ".spec.source.name"),
        ("Phase", "string", 0, ".status.phase"),
        ("ReadyToUse", "boolean", 0, ".status.readyToUse"),
        ("CreationTime", "date", 0, ".status.creationTime"),
        ("Error", "string", 0, ERROR),
    ])
}

pub fn virtual_machine_snapshot_content() -> Vec<Column> {
    paths(&[
        ("ReadyToUse", "boolean", 0, ".status.readyToUse"),
        ("CreationTime", "date", 0, ".status.creationTime"),
        ("Error", "string", 0, ERROR),
    ])
}

pub fn virtual_machine_restore() -> Vec<Column> {
    paths(&[
        ("TargetKind", "string", 0, ".spec.target.kind"),
        ("TargetName", "string", 0, ".spec.target.name"),
        ("Complete", "boolean", 0, ".status.complete"),
        ("RestoreTime", "date", 0, ".status.restoreTime"),
        ("Error", "string", 0, ".status.conditions[?(@.type=='Failure')].message"),
    ])
}

pub fn virtual_machine_clone() -> Vec<Column> {
    paths(&[
        ("Phase", "string", 0, ".status.phase"),
        ("SourceVirtualMachine", "string", 0, ".spec.source.name"),
        ("TargetVirtualMachine", "string", 0, ".status.targetName"),
    ])
}
