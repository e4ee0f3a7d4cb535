//! VirtualMachineSnapshots: each has a content made for it, and a status that follows that.
//!
//! ```text
//! InProgress ─content ready─▶ Succeeded
//!            └─error, or failureDeadline over─▶ Failed
//! any ─deleted─▶ Deleting: its content is deleted or retained
//! ```

use super::content::{FILES, IN_USE};
use super::{MEMORY, has_ended};
use crate::context::{Condition, Context, INSTANCES, MACHINES, SNAPSHOT_CONTENTS, SNAPSHOTS, set_condition};
use crate::objects::{condition_status, created, list, map};
use crate::runner::{Again, Reconcile, Source};
use api::client::{DeleteOptions, Patch};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::{Found, StatusResult};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const COMPONENT: &str = "snapshot-controller";
const FINALIZER: &str = "snapshot.kubevirt.io/vmsnapshot-protection";
/// Seconds, where the snapshot says nothing.
const DEADLINE: i64 = 300;
const POD: &str = "atoll.dev/pod";
const POD_UID: &str = "atoll.dev/pod-uid";
const LAUNCHER: &str = "virt-launcher-";

struct Snapshots {
    context: Arc<Context>,
    snapshots: Informer,
    contents: Informer,
    machines: Informer,
    instances: Informer,
    pods: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (snapshots, contents) = (informers.of(&SNAPSHOTS), informers.of(&SNAPSHOT_CONTENTS));
    let (machines, instances) = (informers.of(&MACHINES), informers.of(&INSTANCES));
    let of_content = Source::new(contents.clone(), |content| {
        vec![Key::new(content.namespace(), content.str_at("/spec/virtualMachineSnapshotName"))]
    });
    // A machine that is on its way up or down is waited for.
    let waiting = |snapshots: Informer| {
        move |machine: &Object| {
            let of =
                |snapshot: &&SharedObject| !is_over(snapshot) && snapshot.str_at("/spec/source/name") == machine.name();
            snapshots.list_in(machine.namespace()).iter().filter(of).map(Key::of).collect()
        }
    };
    let sources = vec![
        Source::own(snapshots.clone()),
        of_content,
        Source::new(machines.clone(), waiting(snapshots.clone())),
        Source::new(instances.clone(), waiting(snapshots.clone())),
    ];
    let pods = informers.of(&crate::context::PODS);
    let all = Snapshots { context: Arc::clone(context), snapshots, contents, machines, instances, pods };
    (Arc::new(all), sources)
}

fn is_over(snapshot: &Object) -> bool {
    matches!(snapshot.str_at("/status/phase"), "Succeeded" | "Failed")
}

pub(super) fn content_name(snapshot: &Object) -> String {
    format!("vmsnapshot-content-{}", snapshot.uid())
}

/// What a snapshot is of, or why that cannot be saved now.
enum Look {
    Stopped(SharedObject),
    Running { machine: SharedObject, instance: SharedObject, pod: (String, String) },
    Wait { reason: &'static str, message: String },
}

#[async_trait]
impl Reconcile for Snapshots {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(snapshot) = self.snapshots.get_key(key) else { return Ok(None) };
        if snapshot.is_deleting() {
            return self.end(&snapshot).await.map(|()| None);
        }
        if !snapshot.finalizers().contains(&FINALIZER) {
            let mut finalizers = snapshot.finalizers();
            finalizers.push(FINALIZER);
            self.set_finalizers(&snapshot, &finalizers).await?;
            return Ok(None);
        }
        if is_over(&snapshot) {
            return Ok(None);
        }
        let left = self.left(&snapshot);
        if let Some(content) = self.contents.get(&key.namespace, &content_name(&snapshot)) {
            self.follow(&snapshot, &content, left).await?;
        } else if left == Some(0) {
            self.fail(&snapshot, "the machine could not be saved before the failure deadline").await?;
        } else {
            self.begin(&snapshot).await?;
        }
        Ok(left.and_then(|left| u64::try_from(left).ok()).map(|left| Duration::from_secs(left.max(1))))
    }
}

impl Snapshots {
    /// Seconds until it is given up; `None`: never.
    fn left(&self, snapshot: &Object) -> Option<i64> {
        let seconds = match snapshot.str_at("/spec/failureDeadline") {
            "" => DEADLINE,
            text => api::time::duration(text).unwrap_or(DEADLINE),
        };
        (seconds > 0).then(|| (created(snapshot) + seconds - self.context.now()).max(0))
    }

    async fn set_finalizers(&self, snapshot: &SharedObject, finalizers: &[&str]) -> StatusResult<()> {
        let patch = json!({"metadata": {"uid": snapshot.uid(), "resourceVersion": snapshot.resource_version(),
                                        "finalizers": finalizers}});
        let (namespace, name) = (snapshot.namespace(), snapshot.name());
        self.context.client.patch(&SNAPSHOTS, namespace, name, "", Patch::Merge(patch)).await.found().map(drop)
    }

    async fn end(&self, snapshot: &SharedObject) -> StatusResult<()> {
        if !snapshot.finalizers().contains(&FINALIZER) {
            return Ok(());
        }
        let content = self.contents.get(snapshot.namespace(), &content_name(snapshot));
        let retained = snapshot.str_at("/spec/deletionPolicy") == "Retain" && is_over(snapshot);
        if let Some(content) = content.filter(|content| !retained && !content.is_deleting()) {
            let options = DeleteOptions { uid: Some(content.uid().to_owned()), ..Default::default() };
            let client = &self.context.client;
            client.delete(&SNAPSHOT_CONTENTS, content.namespace(), content.name(), &options).await.found()?;
        }
        let kept: Vec<&str> = snapshot.finalizers().into_iter().filter(|other| *other != FINALIZER).collect();
        self.set_finalizers(snapshot, &kept).await
    }

    fn source(&self, snapshot: &Object) -> Look {
        let (namespace, name) = (snapshot.namespace(), snapshot.str_at("/spec/source/name"));
        let wait = |reason, message| Look::Wait { reason, message };
        let Some(machine) = self.machines.get(namespace, name) else {
            return wait("SourceNotFound", format!("VirtualMachine {name} does not exist"));
        };
        if machine.is_deleting() {
            return wait("SourceDeleted", format!("VirtualMachine {name} is being deleted"));
        }
        let Some(instance) = self.instances.get(namespace, name).filter(|instance| !has_ended(instance)) else {
            return Look::Stopped(machine);
        };
        if instance.is_deleting() || instance.str_at("/status/phase") != "Running" {
            return wait("SourceNotReady", format!("VirtualMachine {name} is starting or stopping"));
        }
        let pods = self.pods.list_in(namespace);
        let pod = pods.iter().find(|pod| map(&instance, "/status/activePods").any(|(uid, _)| uid == pod.uid()));
        match pod.filter(|pod| pod.name().starts_with(LAUNCHER)) {
            Some(pod) => Look::Running { machine, pod: (pod.name().to_owned(), pod.uid().to_owned()), instance },
            None => wait("SourceNotReady", format!("VirtualMachine {name} has no pod yet")),
        }
    }

    async fn begin(&self, snapshot: &SharedObject) -> StatusResult<()> {
        let mut indications = Vec::new();
        let (machine, pod) = match self.source(snapshot) {
            Look::Wait { reason, message } => return self.progress(snapshot, None, reason, &message).await,
            Look::Stopped(machine) => (machine, None),
            Look::Running { machine, instance, pod } => {
                indications.extend(["NoGuestAgent", "Online"]);
                if condition_status(&instance, "Paused") == "True" {
                    indications.push("Paused");
                }
                (machine, Some(pod))
            }
        };
        let mut annotations = serde_json::Map::new();
        if let Some((name, uid)) = pod {
            annotations.insert(POD.into(), name.into());
            annotations.insert(POD_UID.into(), uid.into());
        }
        if let Some(memory) = snapshot.annotation(MEMORY) {
            annotations.insert(MEMORY.into(), memory.into());
        }
        let mut copy = json!({"metadata": {"name": machine.name(), "namespace": machine.namespace(), "uid": machine.uid()},
                              "spec": machine.get("spec")});
        for field in ["labels", "annotations"] {
            if let Some(values) = machine.pointer(&format!("/metadata/{field}")) {
                copy.metadata_mut().insert(field.into(), values.clone());
            }
        }
        let content = json!({
            "apiVersion": SNAPSHOT_CONTENTS.api_version(), "kind": "VirtualMachineSnapshotContent",
            "metadata": {"name": content_name(snapshot), "annotations": annotations, "finalizers": [IN_USE, FILES]},
            "spec": {"virtualMachineSnapshotName": snapshot.name(), "source": {"virtualMachine": copy}}});
        self.context.create_or_get(&SNAPSHOT_CONTENTS, snapshot.namespace(), content).await?;
        let mut extra =
            json!({"sourceUID": machine.uid(), "virtualMachineSnapshotContentName": content_name(snapshot)});
        if !indications.is_empty() {
            object_of(&mut extra).insert("indications".into(), indications.into());
        }
        self.progress(snapshot, Some(extra), "Saving", "The machine is being saved").await
    }

    async fn follow(&self, snapshot: &SharedObject, content: &Object, left: Option<i64>) -> StatusResult<()> {
        match content.pointer("/status/readyToUse").and_then(Value::as_bool) {
            Some(true) => self.succeed(snapshot, content).await,
            Some(false) => self.fail(snapshot, content.str_at("/status/error/message")).await,
            None if left == Some(0) => {
                self.fail(snapshot, "the machine was not saved before the failure deadline").await
            }
            None => Ok(()),
        }
    }

    async fn progress(
        &self,
        snapshot: &SharedObject,
        extra: Option<Value>,
        reason: &str,
        message: &str,
    ) -> StatusResult<()> {
        let mut fields = extra.unwrap_or_else(|| json!({}));
        object_of(&mut fields).insert("phase".into(), "InProgress".into());
        object_of(&mut fields).insert("readyToUse".into(), false.into());
        let progressing = Condition { kind: "Progressing", status: "True", reason, message };
        let ready = Condition { kind: "Ready", status: "False", reason: "NotReady", message: "Not yet" };
        self.tell(snapshot, fields, &[progressing, ready]).await
    }

    async fn succeed(&self, snapshot: &SharedObject, content: &Object) -> StatusResult<()> {
        let all: Vec<&str> = list(content, "/spec/source/virtualMachine/spec/template/spec/volumes")
            .iter()
            .map(|volume| volume.str_at("/name"))
            .collect();
        let saved: Vec<&str> = list(content, "/status/volumes").iter().filter_map(Value::as_str).collect();
        let excluded: Vec<&&str> = all.iter().filter(|name| !saved.contains(name)).collect();
        // Said again: what made the content may not have got as far as writing it down.
        let mut fields = json!({"phase": "Succeeded", "readyToUse": true,
            "sourceUID": content.str_at("/spec/source/virtualMachine/metadata/uid"),
            "virtualMachineSnapshotContentName": content.name(),
            "creationTime": content.str_at("/status/creationTime"),
            "snapshotVolumes": {"includedVolumes": saved, "excludedVolumes": excluded}});
        if content.annotation(POD_UID).is_some() && snapshot.pointer("/status/indications").is_none() {
            object_of(&mut fields).insert("indications".into(), json!(["NoGuestAgent", "Online"]));
        }
        let held = content.pointer("/status/heldMilliseconds").and_then(Value::as_i64).unwrap_or(0);
        let message = match content.pointer("/status/memory") == Some(&Value::Bool(true)) {
            true => format!("Disks, memory and devices are saved; the machine was held for {held} ms"),
            false => format!("Disks are saved; the machine was held for {held} ms"),
        };
        self.context.events.normal(COMPONENT, snapshot, "SnapshotSucceeded", message.clone());
        let done =
            Condition { kind: "Progressing", status: "False", reason: "Complete", message: "Operation complete" };
        let ready = Condition { kind: "Ready", status: "True", reason: "Complete", message: &message };
        self.tell(snapshot, fields, &[done, ready]).await
    }

    async fn fail(&self, snapshot: &SharedObject, why: &str) -> StatusResult<()> {
        self.context.events.warning(COMPONENT, snapshot, "SnapshotFailed", why.to_owned());
        let error = json!({"time": self.context.timestamp(), "message": why});
        let fields = json!({"phase": "Failed", "readyToUse": false, "error": error});
        let done = Condition { kind: "Progressing", status: "False", reason: "Failed", message: why };
        let ready = Condition { kind: "Ready", status: "False", reason: "Failed", message: why };
        let failure = Condition { kind: "Failure", status: "True", reason: "Failed", message: why };
        self.tell(snapshot, fields, &[done, ready, failure]).await
    }

    async fn tell(&self, snapshot: &SharedObject, fields: Value, conditions: &[Condition<'_>]) -> StatusResult<()> {
        let mut status = snapshot.get("status").cloned().unwrap_or_else(|| json!({}));
        if let Value::Object(fields) = fields {
            object_of(&mut status).extend(fields);
        }
        let now = self.context.timestamp();
        for one in conditions {
            set_condition(&mut status, *one, &now, &[]);
        }
        self.context.write_status(&SNAPSHOTS, snapshot, status).await
    }
}
