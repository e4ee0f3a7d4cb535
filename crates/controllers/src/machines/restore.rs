//! VirtualMachineRestores: a stopped machine gets its description and disks of a snapshot, and goes on from its memory at
//! its next start if there is one. The files are there already, so it is one write of the machine.
//!
//! ```text
//! snapshot ready ─▶ machine kept from starting (status.restoreInProgress) ─▶ stopped ─▶ machine written ─▶ complete
//! ```

use super::{DISKS_FROM, GO_ON_FROM, MEMORY, Step};
use crate::context::{Condition, Context, INSTANCES, MACHINES, RESTORES, SNAPSHOT_CONTENTS, SNAPSHOTS, set_condition};
use crate::objects::{created, flag};
use crate::runner::{Again, Reconcile, Source};
use api::client::{DeleteOptions, Patch};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::{Found, StatusResult};
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

const COMPONENT: &str = "restore-controller";
/// On a machine: the restore that wrote it last.
const LAST: &str = "restore.kubevirt.io/lastRestoreUID";
/// Seconds that `WaitGracePeriod` waits for the machine to be stopped.
const GRACE: i64 = 300;
const LOOK: Duration = Duration::from_secs(1);

struct Restores {
    context: Arc<Context>,
    restores: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let restores = informers.of(&RESTORES);
    let waiting = |field: &'static str| {
        let restores = restores.clone();
        move |object: &Object| {
            let of = |restore: &&SharedObject| !is_over(restore) && restore.str_at(field) == object.name();
            restores.list_in(object.namespace()).iter().filter(of).map(Key::of).collect()
        }
    };
    let sources = vec![
        Source::own(restores.clone()),
        Source::new(informers.of(&INSTANCES), waiting("/spec/target/name")),
        Source::new(informers.of(&MACHINES), waiting("/spec/target/name")),
        Source::new(informers.of(&SNAPSHOTS), waiting("/spec/virtualMachineSnapshotName")),
    ];
    (Arc::new(Restores { context: Arc::clone(context), restores }), sources)
}

/// Whether nothing will come of it any more.
pub(super) fn is_over(restore: &Object) -> bool {
    restore.is_deleting() || flag(restore, "/status/complete") || super::failed(restore)
}

#[async_trait]
impl Reconcile for Restores {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(restore) = self.restores.get_key(key).filter(|restore| !is_over(restore)) else { return Ok(None) };
        let step = self.step(&restore).await?;
        let mut status = restore.get("status").cloned().unwrap_or_else(|| json!({}));
        let now = self.context.timestamp();
        let mut set = |kind, state, reason: &str, message: &str| {
            set_condition(&mut status, Condition { kind, status: state, reason, message }, &now, &[]);
        };
        let mut again = None;
        match &step {
            Step::Done => {
                set("Progressing", "False", "Complete", "Operation complete");
                set("Ready", "True", "Complete", "The machine is as it was in the snapshot");
                object_of(&mut status).insert("complete".into(), true.into());
                object_of(&mut status).insert("restoreTime".into(), now.into());
                let message = "The machine is as it was in the snapshot".to_owned();
                self.context.events.normal(COMPONENT, &restore, "VirtualMachineRestoreComplete", message);
            }
            Step::Wait(reason, message) => {
                again = Some(LOOK);
                set("Progressing", "True", reason, message);
                set("Ready", "False", reason, message);
                object_of(&mut status).insert("complete".into(), false.into());
            }
            Step::Fail(message) => {
                set("Progressing", "False", "Failed", message);
                set("Ready", "False", "Failed", message);
                set("Failure", "True", "Failed", message);
                self.context.events.warning(COMPONENT, &restore, "VirtualMachineRestoreError", message.clone());
            }
        }
        self.context.write_status(&RESTORES, &restore, status).await?;
        Ok(again)
    }
}

impl Restores {
    async fn step(&self, restore: &SharedObject) -> StatusResult<Step> {
        let (namespace, name) = (restore.namespace(), restore.str_at("/spec/target/name"));
        let wanted = restore.str_at("/spec/virtualMachineSnapshotName");
        let content = match self.content(namespace, wanted, name).await? {
            Ok(content) => content,
            Err(step) => return Ok(step),
        };
        let Some(machine) = self.context.client.get(&MACHINES, namespace, name).await.found()? else {
            let why = "does not exist; make another machine of its snapshot with a VirtualMachineClone";
            return Ok(Step::Fail(format!("VirtualMachine {name} {why}")));
        };
        if machine.annotation(LAST) == Some(restore.uid()) {
            return self.free(&machine, restore).await.map(|()| Step::Done);
        }
        if let Some(step) = self.stopped(restore, &machine).await? {
            return Ok(step);
        }
        // What the machine says of a restore was written a moment ago.
        let machine = self.context.client.get(&MACHINES, namespace, name).await?;
        let memory = restore.annotation(MEMORY) != Some("false") && flag(&content, "/status/memory");
        let new = restored(&machine, &content, restore.uid(), memory);
        let written = self.context.client.update(&MACHINES, namespace, new).await?;
        self.free(&written, restore).await?;
        Ok(Step::Done)
    }

    async fn content(&self, namespace: &str, wanted: &str, target: &str) -> StatusResult<Result<SharedObject, Step>> {
        let wait = |reason, message: String| Ok(Err(Step::Wait(reason, message)));
        let Some(snapshot) = self.context.client.get(&SNAPSHOTS, namespace, wanted).await.found()? else {
            return wait("SnapshotNotFound", format!("VirtualMachineSnapshot {wanted} does not exist"));
        };
        if snapshot.str_at("/spec/source/name") != target {
            let of = snapshot.str_at("/spec/source/name");
            let why = format!("VirtualMachineSnapshot {wanted} is of {of}, not of {target}; clone it instead");
            return Ok(Err(Step::Fail(why)));
        }
        match snapshot.str_at("/status/phase") {
            "Succeeded" => {}
            "Failed" => return Ok(Err(Step::Fail(format!("VirtualMachineSnapshot {wanted} has failed")))),
            _ => return wait("SnapshotNotReady", format!("VirtualMachineSnapshot {wanted} is not ready")),
        }
        let name = snapshot.str_at("/status/virtualMachineSnapshotContentName");
        match self.context.client.get(&SNAPSHOT_CONTENTS, namespace, name).await.found()? {
            Some(content) if !content.is_deleting() => Ok(Ok(content)),
            _ => Ok(Err(Step::Fail(format!("the content of VirtualMachineSnapshot {wanted} is gone")))),
        }
    }

    /// Keeps the machine from starting, and sees to it that it does not run; `None` when that is so.
    async fn stopped(&self, restore: &SharedObject, machine: &SharedObject) -> StatusResult<Option<Step>> {
        let (namespace, name) = (machine.namespace(), machine.name());
        let holder = machine.str_at("/status/restoreInProgress");
        if !holder.is_empty() && holder != restore.name() {
            return Ok(Some(Step::Wait("OtherRestore", format!("VirtualMachineRestore {holder} is at it"))));
        }
        let policy = restore.str_at("/spec/targetReadinessPolicy");
        let instance = self.context.client.get(&INSTANCES, namespace, name).await.found()?;
        if instance.is_some() {
            let late = self.context.now() - created(restore) > GRACE;
            match policy {
                "FailImmediate" => return Ok(Some(Step::Fail(format!("VirtualMachine {name} must be stopped")))),
                "StopTarget" | "WaitEventually" => {}
                _ if late => {
                    let why = format!("VirtualMachine {name} was not stopped in {GRACE} seconds");
                    return Ok(Some(Step::Fail(why)));
                }
                _ => {}
            }
        }
        let waiting = || Some(Step::Wait("TargetNotReady", format!("Waiting for VirtualMachine {name} to be stopped")));
        // Only a machine that is stopped, or shall be, is kept from starting.
        if holder.is_empty() && (instance.is_none() || policy == "StopTarget") {
            let patch = json!({"metadata": {"resourceVersion": machine.resource_version()},
                               "status": {"restoreInProgress": restore.name()}});
            self.context.client.patch(&MACHINES, namespace, name, "status", Patch::Merge(patch)).await?;
            return Ok(waiting());
        }
        let Some(instance) = instance else { return Ok(None) };
        if policy == "StopTarget" && !instance.is_deleting() {
            let options = DeleteOptions { uid: Some(instance.uid().to_owned()), ..Default::default() };
            self.context.client.delete(&INSTANCES, namespace, name, &options).await.found()?;
        }
        Ok(waiting())
    }

    /// Lets the machine start again.
    async fn free(&self, machine: &SharedObject, restore: &SharedObject) -> StatusResult<()> {
        if machine.str_at("/status/restoreInProgress") != restore.name() {
            return Ok(());
        }
        let patch = json!({"status": {"restoreInProgress": null}});
        let (namespace, name) = (machine.namespace(), machine.name());
        self.context.client.patch(&MACHINES, namespace, name, "status", Patch::Merge(patch)).await.map(drop)
    }
}

/// The machine as the snapshot describes it; whether it shall run stays its own matter.
fn restored(machine: &Object, content: &Object, restore: &str, memory: bool) -> Object {
    let mut new = machine.clone();
    let mut spec = content.pointer("/spec/source/virtualMachine/spec").cloned().unwrap_or_else(|| json!({}));
    for field in ["running", "runStrategy"] {
        let fields = object_of(&mut spec);
        match machine.pointer("/spec").and_then(|spec| spec.get(field)) {
            Some(value) => drop(fields.insert(field.into(), value.clone())),
            None => drop(fields.remove(field)),
        }
    }
    child(object_of(&mut spec), "template");
    if let Some(template) = spec.get_mut("template") {
        template.set_annotation(DISKS_FROM, content.uid());
    }
    object_of(&mut new).insert("spec".into(), spec);
    new.set_annotation(LAST, restore);
    match memory {
        true => new.set_annotation(GO_ON_FROM, content.uid()),
        false => drop(child(new.metadata_mut(), "annotations").remove(GO_ON_FROM)),
    }
    new
}

/// Whether a restore that is there and not over keeps the machine from starting.
pub(super) fn holds(restores: &Informer, machine: &Object) -> bool {
    let name = machine.str_at("/status/restoreInProgress");
    let restore = Some(name).filter(|name| !name.is_empty()).and_then(|name| restores.get(machine.namespace(), name));
    restore.is_some_and(|restore| !is_over(&restore) && restore.str_at("/spec/target/name") == machine.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_machine_keeps_its_run_strategy() {
        let content = json!({"metadata": {"uid": "c"}, "spec": {"source": {"virtualMachine": {
            "spec": {"runStrategy": "Always", "template": {"spec": {"hostname": "then"}}}}}}});
        let machine = json!({"metadata": {"name": "m", "annotations": {"a": "b"}},
                             "spec": {"running": false, "template": {"spec": {"hostname": "now"}}}});
        let new = restored(&machine, &content, "r", true);
        assert_eq!(new.pointer("/spec/running"), Some(&json!(false)));
        assert_eq!(new.pointer("/spec/runStrategy"), None);
        assert_eq!(new.str_at("/spec/template/spec/hostname"), "then");
        assert_eq!(new["spec"]["template"].annotation(DISKS_FROM), Some("c"));
        assert_eq!((new.annotation(GO_ON_FROM), new.annotation("a")), (Some("c"), Some("b")));
        assert_eq!(restored(&new, &content, "s", false).annotation(GO_ON_FROM), None);
    }
}
