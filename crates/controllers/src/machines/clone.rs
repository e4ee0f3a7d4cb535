//! VirtualMachineClones: a new machine, halted, with an identity of its own and the disks of another.
//!
//! ```text
//! source is a machine:  SnapshotInProgress ─▶ CreatingTargetVM ─▶ Succeeded
//! source is a snapshot:                       CreatingTargetVM ─▶ Succeeded        any ─▶ Failed
//! ```
//! A clone never goes on from memory: a guest that runs has its addresses and its name in memory. Cold, it gets its own MAC and
//! IP addresses, its own name and cloud-init instance id, and starts as if for the first time.

use super::{DISKS_FROM, GO_ON_FROM, MEMORY, Step};
use crate::context::{CLONES, Condition, Context, MACHINES, SNAPSHOT_CONTENTS, SNAPSHOTS, set_condition};
use crate::objects::{controller_reference, joined};
use crate::runner::{Again, Reconcile, Source};
use api::client::DeleteOptions;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::{Found, StatusResult};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

const COMPONENT: &str = "clone-controller";
/// On the new machine: the clone that made it.
const MADE_BY: &str = "clone.kubevirt.io/clone-uid";

struct Clones {
    context: Arc<Context>,
    clones: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let clones = informers.of(&CLONES);
    let known = clones.clone();
    let of_snapshot = Source::new(informers.of(&SNAPSHOTS), move |snapshot| {
        let of = |clone: &&SharedObject| {
            !is_over(clone)
                && (temporary(clone) == snapshot.name() || clone.str_at("/spec/source/name") == snapshot.name())
        };
        known.list_in(snapshot.namespace()).iter().filter(of).map(Key::of).collect()
    });
    let sources = vec![Source::own(clones.clone()), of_snapshot];
    (Arc::new(Clones { context: Arc::clone(context), clones }), sources)
}

fn is_over(clone: &Object) -> bool {
    clone.is_deleting() || matches!(clone.str_at("/status/phase"), "Succeeded" | "Failed")
}

/// The snapshot made for a clone of a machine.
fn temporary(clone: &Object) -> String {
    format!("tmp-snapshot-{}", clone.uid())
}

fn of_machine(clone: &Object) -> bool {
    clone.str_at("/spec/source/kind") == "VirtualMachine"
}

fn target(clone: &Object) -> String {
    match clone.str_at("/spec/target/name") {
        "" => {
            let suffix: String = clone.uid().chars().filter(char::is_ascii_alphanumeric).take(5).collect();
            joined(&format!("clone-{}", clone.str_at("/spec/source/name")), &format!("-{suffix}"), 63)
        }
        name => name.to_owned(),
    }
}

#[async_trait]
impl Reconcile for Clones {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(clone) = self.clones.get_key(key).filter(|clone| !is_over(clone)) else { return Ok(None) };
        let step = self.step(&clone).await?;
        let mut status = clone.get("status").cloned().unwrap_or_else(|| json!({}));
        let now = self.context.timestamp();
        let (phase, progressing, ready, reason, message) = match &step {
            Step::Done => ("Succeeded", "False", "True", "Succeeded", "The new machine is made".to_owned()),
            Step::Wait(phase, message) => (*phase, "True", "False", *phase, message.clone()),
            Step::Fail(message) => ("Failed", "False", "False", "Failed", message.clone()),
        };
        let fields = object_of(&mut status);
        fields.insert("phase".into(), phase.into());
        fields.insert("targetName".into(), target(&clone).into());
        match (&step, of_machine(&clone)) {
            (Step::Wait(..), true) => drop(fields.insert("snapshotName".into(), temporary(&clone).into())),
            _ => drop(fields.remove("snapshotName")),
        }
        if matches!(step, Step::Done) {
            fields.insert("creationTime".into(), now.clone().into());
        }
        for (kind, state) in [("Progressing", progressing), ("Ready", ready)] {
            let condition = Condition { kind, status: state, reason, message: &message };
            set_condition(&mut status, condition, &now, &[]);
        }
        if let Step::Fail(why) = &step {
            self.context.events.warning(COMPONENT, &clone, "CloneFailed", why.clone());
        }
        self.context.write_status(&CLONES, &clone, status).await?;
        if !matches!(step, Step::Wait(..)) && of_machine(&clone) {
            self.drop_temporary(&clone).await?;
        }
        Ok(None)
    }
}

impl Clones {
    /// Its files stay as long as the new machine's disks begin as they are.
    async fn drop_temporary(&self, clone: &Object) -> StatusResult<()> {
        let options = DeleteOptions::default();
        self.context.client.delete(&SNAPSHOTS, clone.namespace(), &temporary(clone), &options).await.found().map(drop)
    }

    async fn step(&self, clone: &SharedObject) -> StatusResult<Step> {
        let namespace = clone.namespace();
        if let Some(there) = self.context.client.get(&MACHINES, namespace, &target(clone)).await.found()? {
            return Ok(match there.annotation(MADE_BY) == Some(clone.uid()) {
                true => Step::Done,
                false => Step::Fail(format!("VirtualMachine {} exists already", target(clone))),
            });
        }
        let snapshot = match of_machine(clone) {
            true => self.snapshot(clone).await?,
            false => self.context.client.get(&SNAPSHOTS, namespace, clone.str_at("/spec/source/name")).await.found()?,
        };
        let Some(snapshot) = snapshot.filter(|snapshot| !snapshot.is_deleting()) else {
            return Ok(Step::Fail(format!("{} does not exist", clone.str_at("/spec/source/name"))));
        };
        match snapshot.str_at("/status/phase") {
            "Succeeded" => {}
            "Failed" => {
                let why = snapshot.str_at("/status/error/message");
                return Ok(Step::Fail(format!("VirtualMachineSnapshot {}: {why}", snapshot.name())));
            }
            _ => {
                return Ok(Step::Wait(
                    "SnapshotInProgress",
                    format!("Waiting for VirtualMachineSnapshot {}", snapshot.name()),
                ));
            }
        }
        let name = snapshot.str_at("/status/virtualMachineSnapshotContentName");
        let Some(content) =
            self.context.client.get(&SNAPSHOT_CONTENTS, namespace, name).await.found()?.filter(|c| !c.is_deleting())
        else {
            return Ok(Step::Fail(format!("the content of VirtualMachineSnapshot {} is gone", snapshot.name())));
        };
        match self.context.client.create(&MACHINES, namespace, machine(clone, &content)).await {
            Ok(_) => Ok(Step::Done),
            Err(error) if error.reason == api::status::Reason::Invalid => Ok(Step::Fail(error.message)),
            Err(error) => Err(error),
        }
    }

    /// The snapshot of the machine that is cloned, made if it is not there and the machine is.
    async fn snapshot(&self, clone: &SharedObject) -> StatusResult<Option<SharedObject>> {
        let (namespace, source) = (clone.namespace(), clone.str_at("/spec/source/name"));
        if let Some(found) = self.context.client.get(&SNAPSHOTS, namespace, &temporary(clone)).await.found()? {
            return Ok(Some(found));
        }
        if self.context.client.get(&MACHINES, namespace, source).await.found()?.is_none() {
            return Ok(None);
        }
        let snapshot = json!({
            "apiVersion": SNAPSHOTS.api_version(), "kind": "VirtualMachineSnapshot",
            "metadata": {"name": temporary(clone), "annotations": {MEMORY: "false"},
                         "ownerReferences": [controller_reference(&CLONES, "VirtualMachineClone", clone)]},
            "spec": {"source": clone.pointer("/spec/source")}});
        self.context.create_or_get(&SNAPSHOTS, namespace, snapshot).await.map(Some)
    }
}

/// Whether a key passes: by the last pattern that fits it; all do where there are no patterns.
fn passes(filters: &[Value], key: &str) -> bool {
    let fits = |pattern: &str| match pattern.strip_suffix('*') {
        Some(beginning) => key.starts_with(beginning),
        None => key == pattern,
    };
    let all = filters.is_empty() || filters.iter().all(|filter| filter.as_str().is_some_and(|f| f.starts_with('!')));
    filters.iter().filter_map(Value::as_str).fold(all, |passing, filter| match filter.strip_prefix('!') {
        Some(pattern) => passing && !fits(pattern),
        None => passing || fits(filter),
    })
}

/// The new machine.
fn machine(clone: &Object, content: &Object) -> Object {
    let source = content.pointer("/spec/source/virtualMachine").unwrap_or(&Value::Null);
    let mut metadata = json!({"name": target(clone)});
    for (field, filters) in [("labels", "labelFilters"), ("annotations", "annotationFilters")] {
        let filters = clone.pointer("/spec").and_then(|spec| spec.get(filters)).and_then(Value::as_array);
        let filters = filters.map(Vec::as_slice).unwrap_or_default();
        let mut values = source.pointer(&format!("/metadata/{field}")).cloned().unwrap_or_else(|| json!({}));
        let fields = object_of(&mut values);
        fields.retain(|key, _| passes(filters, key));
        let own = |key: &str| key.starts_with("kubectl.kubernetes.io/") || key.starts_with("restore.kubevirt.io/");
        fields.retain(|key, _| !own(key) && key != GO_ON_FROM);
        object_of(&mut metadata).insert(field.into(), values);
    }
    child(object_of(&mut metadata), "annotations").insert(MADE_BY.into(), clone.uid().into());
    let mut spec = source.get("spec").cloned().unwrap_or_else(|| json!({}));
    object_of(&mut spec).remove("running");
    object_of(&mut spec).insert("runStrategy".into(), "Halted".into());
    let template = child(object_of(&mut spec), "template");
    child(child(template, "metadata"), "annotations").insert(DISKS_FROM.into(), content.uid().into());
    let instance = child(template, "spec");
    instance.remove("hostname");
    let domain = child(instance, "domain");
    if let Some(interfaces) = child(domain, "devices").get_mut("interfaces").and_then(Value::as_array_mut) {
        for interface in interfaces {
            let mac =
                clone.pointer("/spec/newMacAddresses").and_then(|all| all.get(interface.str_at("/name"))).cloned();
            match mac {
                Some(mac) => drop(object_of(interface).insert("macAddress".into(), mac)),
                None => drop(object_of(interface).remove("macAddress")),
            }
        }
    }
    let serial = clone.str_at("/spec/newSMBiosSerial");
    if domain.contains_key("firmware") || !serial.is_empty() {
        let firmware = child(domain, "firmware");
        ["uuid", "serial"].iter().for_each(|field| drop(firmware.remove(*field)));
        if !serial.is_empty() {
            firmware.insert("serial".into(), serial.into());
        }
    }
    json!({"apiVersion": MACHINES.api_version(), "kind": "VirtualMachine", "metadata": metadata, "spec": spec})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_take_and_leave() {
        let of = |filters: Value, key: &str| passes(filters.as_array().unwrap(), key);
        assert!(of(json!([]), "a"));
        assert!(of(json!(["*"]), "a/b") && of(json!(["*", "!c/*"]), "a/b") && !of(json!(["*", "!a/*"]), "a/b"));
        assert!(of(json!(["a/*"]), "a/b") && !of(json!(["a/*"]), "c") && of(json!(["!a/*"]), "c"));
    }

    #[test]
    fn a_clone_is_nobody_else() {
        let clone = json!({"metadata": {"uid": "12345678", "namespace": "x"}, "spec": {
            "source": {"kind": "VirtualMachine", "name": "m"}, "labelFilters": ["app"],
            "newMacAddresses": {"b": "02:00:00:00:00:02"}, "newSMBiosSerial": "s"}});
        let content = json!({"metadata": {"uid": "c"}, "spec": {"source": {"virtualMachine": {
            "metadata": {"labels": {"app": "a", "tier": "t"}, "annotations": {GO_ON_FROM: "c", "note": "n"}},
            "spec": {"running": true, "template": {"spec": {"hostname": "m", "domain": {
                "firmware": {"uuid": "u", "bootloader": {}},
                "devices": {"interfaces": [{"name": "a", "macAddress": "x"}, {"name": "b", "macAddress": "y"}]}}}}}}}}});
        let new = machine(&clone, &content);
        assert_eq!(
            new["metadata"],
            json!({"name": "clone-m-12345", "labels": {"app": "a"},
                                           "annotations": {"note": "n", MADE_BY: "12345678"}})
        );
        assert_eq!(
            new["spec"],
            json!({"runStrategy": "Halted", "template": {
            "metadata": {"annotations": {DISKS_FROM: "c"}},
            "spec": {"domain": {"firmware": {"bootloader": {}, "serial": "s"}, "devices": {"interfaces": [
                {"name": "a"}, {"name": "b", "macAddress": "02:00:00:00:00:02"}]}}}}})
        );
    }
}
