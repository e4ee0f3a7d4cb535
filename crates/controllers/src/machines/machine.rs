//! VirtualMachines: whether there is to be an instance, by the run strategy.
//!
//! | strategy | no instance | instance ended |
//! |---|---|---|
//! | `Always` | start | start again, after a back-off if it failed |
//! | `RerunOnFailure` | start | start again if it failed |
//! | `Once` | start | leave |
//! | `Manual` | leave | leave |
//! | `Halted` | leave | delete it, as a running one |

use super::instance::owner;
use super::{GO_ON_FROM, NAME_LABEL, has_ended, restore};
use crate::context::{Condition, Context, INSTANCES, MACHINES, PODS, RESTORES, remove_condition, set_condition};
use crate::objects::{condition, condition_status, controller_name, flag, fnv32a, int, is_controlled_by, list};
use crate::runner::{Again, Reconcile, Source};
use api::client::{DeleteOptions, Patch, Propagation};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::status::{Reason, StatusResult};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const COMPONENT: &str = "virtualmachine-controller";
/// On instances: the template they were made from.
const TEMPLATE_HASH: &str = "atoll.dev/template-hash";
const MAX_DELAY: i64 = 300;
/// An instance that ran this long, in seconds, forgives earlier failures.
const LONG: i64 = 300;

pub(crate) struct Machines {
    context: Arc<Context>,
    machines: Informer,
    instances: Informer,
    pods: Informer,
    restores: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (machines, instances) = (informers.of(&MACHINES), informers.of(&INSTANCES));
    let pods = informers.of(&PODS);
    let of_instance = Source::new(instances.clone(), |instance| vec![Key::new(instance.namespace(), instance.name())]);
    // Why a container waits shows in the machine's printed status.
    let of_pod = Source::new(pods.clone(), |pod| {
        let name = pod.label(NAME_LABEL).and_then(|_| controller_name(pod, &INSTANCES, "VirtualMachineInstance"));
        name.map(|name| Key::new(pod.namespace(), name)).into_iter().collect()
    });
    // One that is over keeps no machine from starting.
    let restores = informers.of(&RESTORES);
    let of_restore = Source::new(restores.clone(), |restore| {
        vec![Key::new(restore.namespace(), restore.str_at("/spec/target/name"))]
    });
    let sources = vec![Source::own(machines.clone()), of_instance, of_pod, of_restore];
    (Arc::new(Machines { context: Arc::clone(context), machines, instances, pods, restores }), sources)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    Always,
    RerunOnFailure,
    Once,
    Manual,
    Halted,
}

impl Strategy {
    fn of(machine: &Object) -> Strategy {
        match machine.str_at("/spec/runStrategy") {
            "Always" => Strategy::Always,
            "RerunOnFailure" => Strategy::RerunOnFailure,
            "Once" => Strategy::Once,
            "Manual" => Strategy::Manual,
            "Halted" => Strategy::Halted,
            _ if flag(machine, "/spec/running") => Strategy::Always,
            _ => Strategy::Halted,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Strategy::Always => "Always",
            Strategy::RerunOnFailure => "RerunOnFailure",
            Strategy::Once => "Once",
            Strategy::Manual => "Manual",
            Strategy::Halted => "Halted",
        }
    }

    fn starts(self) -> bool {
        matches!(self, Strategy::Always | Strategy::RerunOnFailure | Strategy::Once)
    }

    /// Whether an instance is to go: because it ended and another shall run, or because none shall.
    fn ends(self, instance: &Object) -> bool {
        match self {
            Strategy::Halted => true,
            Strategy::Always => has_ended(instance),
            Strategy::RerunOnFailure => instance.str_at("/status/phase") == "Failed",
            Strategy::Once | Strategy::Manual => false,
        }
    }
}

#[async_trait]
impl Reconcile for Machines {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(machine) = self.machines.get_key(key) else { return Ok(None) };
        let found = self.instances.get_key(key);
        let foreign = found.as_ref().is_some_and(|instance| !is_controlled_by(instance, machine.uid()));
        let instance = found.filter(|_| !foreign);
        let strategy = Strategy::of(&machine);
        let mut status = machine.get("status").cloned().unwrap_or_else(|| json!({}));
        let mut again = None;
        if foreign {
            let message = format!("VirtualMachineInstance {} belongs to another", machine.name());
            self.context.events.warning(COMPONENT, &machine, "FailedCreate", message);
        } else if machine.is_deleting() {
            // The garbage collector takes the instance along.
        } else {
            forget_done(&mut status, instance.as_ref());
            let held = restore::holds(&self.restores, &machine);
            if !held {
                object_of(&mut status).remove("restoreInProgress");
            }
            match &instance {
                Some(instance) if self.went_on(&machine, instance).await? => return Ok(None),
                Some(instance) => self.judge(&machine, instance, strategy, &mut status).await?,
                None if held => {}
                None if strategy.starts() || asks(&status, "Start") => {
                    again = self.start(&machine, &mut status).await?
                }
                None => drop(object_of(&mut status).remove("startFailure")),
            }
        }
        // The cache shows a new instance with its next event, which comes back here.
        self.tell(&machine, instance.as_ref(), strategy, status).await?;
        Ok(again)
    }
}

impl Machines {
    /// Forgets the memory to go on from once an instance has: the next one boots. Whether there was one to forget; the write
    /// brings the machine back here.
    async fn went_on(&self, machine: &SharedObject, instance: &SharedObject) -> StatusResult<bool> {
        let from = machine.annotation(GO_ON_FROM).filter(|from| instance.annotation(GO_ON_FROM) == Some(from));
        let ran = instance.str_at("/status/phase") == "Running"
            || list(instance, "/status/phaseTransitionTimestamps").iter().any(|t| t.str_at("/phase") == "Running");
        if from.is_none() || !ran {
            return Ok(false);
        }
        let patch = json!({"metadata": {"uid": machine.uid(), "resourceVersion": machine.resource_version(),
                                        "annotations": {GO_ON_FROM: null}}});
        let (namespace, name) = (machine.namespace(), machine.name());
        self.context.client.patch(&MACHINES, namespace, name, "", Patch::Merge(patch)).await.map(|_| true)
    }

    async fn judge(
        &self,
        machine: &SharedObject,
        instance: &SharedObject,
        strategy: Strategy,
        status: &mut Value,
    ) -> StatusResult<()> {
        let phase = instance.str_at("/status/phase");
        if phase == "Running" && self.has_run_for(instance) >= LONG {
            object_of(status).remove("startFailure");
        }
        let asked = asks(status, "Stop");
        if instance.is_deleting() || !(asked || strategy.ends(instance)) {
            return Ok(());
        }
        if phase == "Failed" && strategy != Strategy::Halted {
            self.count_failure(instance, status);
        }
        // The count must be there before the instance that it counts is gone.
        self.context.write_status(&MACHINES, machine, status.clone()).await?;
        let options = DeleteOptions {
            uid: Some(instance.uid().to_owned()),
            propagation: Propagation::Background,
            ..Default::default()
        };
        match self.context.client.delete(&INSTANCES, instance.namespace(), instance.name(), &options).await {
            Ok(()) => {
                let message =
                    format!("Stopped the virtual machine by deleting the virtual machine instance {}", instance.uid());
                self.context.events.normal(COMPONENT, machine, "SuccessfulDelete", message);
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }?;
        // What was written has a new version; the rest is for the next look.
        Err(api::Status::conflict(
            "kubevirt.io",
            "virtualmachines",
            machine.name(),
            "its instance has just been stopped",
        ))
    }

    fn has_run_for(&self, instance: &Object) -> i64 {
        let running =
            list(instance, "/status/phaseTransitionTimestamps").iter().find(|t| t.str_at("/phase") == "Running");
        let since = running.and_then(|t| api::time::parse(t.str_at("/phaseTransitionTimestamp")));
        since.map_or(0, |since| self.context.now() - since)
    }

    /// Failures in a row wait longer and longer: 10 s, 40 s, 90 s, 160 s, 250 s, 5 min.
    fn count_failure(&self, instance: &Object, status: &mut Value) {
        let known = status.get("startFailure");
        if known.is_some_and(|known| known.str_at("/lastFailedVMIUID") == instance.uid()) {
            return;
        }
        let before = known.and_then(|known| int(known, "/consecutiveFailCount")).unwrap_or(0);
        let count = if self.has_run_for(instance) >= LONG { 1 } else { before.saturating_add(1) };
        let delay = count.saturating_mul(count).saturating_mul(10).min(MAX_DELAY);
        let failure = json!({"consecutiveFailCount": count, "lastFailedVMIUID": instance.uid(),
                             "retryAfterTimestamp": api::time::rfc3339(self.context.now() + delay)});
        object_of(status).insert("startFailure".into(), failure);
    }

    async fn start(&self, machine: &SharedObject, status: &mut Value) -> StatusResult<Again> {
        let retry = api::time::parse(status.str_at("/startFailure/retryAfterTimestamp"));
        if let Some(left) = retry.map(|retry| retry - self.context.now()).filter(|left| *left > 0) {
            return Ok(Some(Duration::from_secs(u64::try_from(left).unwrap_or(1))));
        }
        match self.context.client.create(&INSTANCES, machine.namespace(), new_instance(machine)).await {
            Ok(instance) => {
                let message = format!(
                    "Started the virtual machine by creating the new virtual machine instance {}",
                    instance.name()
                );
                self.context.events.normal(COMPONENT, machine, "SuccessfulCreate", message);
                remove_condition(status, "Failure");
                Ok(None)
            }
            Err(error) if error.reason == Reason::AlreadyExists => Ok(None),
            Err(error) => {
                let message = format!("Error creating virtual machine instance: {error}");
                self.context.events.warning(COMPONENT, machine, "FailedCreate", message.clone());
                let new = Condition { kind: "Failure", status: "True", reason: "FailedCreate", message: &message };
                set_condition(status, new, &self.context.timestamp(), &[]);
                self.context.write_status(&MACHINES, machine, status.clone()).await?;
                Err(error)
            }
        }
    }

    async fn tell(
        &self,
        machine: &SharedObject,
        instance: Option<&SharedObject>,
        strategy: Strategy,
        mut status: Value,
    ) -> StatusResult<()> {
        let ready = instance.is_some_and(|instance| condition_status(instance, "Ready") == "True");
        let printable = self.printable(machine, instance, strategy, &status);
        let fields = object_of(&mut status);
        fields.insert("printableStatus".into(), printable.into());
        fields.insert("runStrategy".into(), strategy.name().into());
        fields.insert("observedGeneration".into(), machine.generation().into());
        fields.insert("desiredGeneration".into(), machine.generation().into());
        for (name, on) in [("ready", ready), ("created", instance.is_some())] {
            match on {
                true => drop(fields.insert(name.into(), true.into())),
                false => drop(fields.remove(name)),
            }
        }
        let now = self.context.timestamp();
        let shown = instance.and_then(|instance| condition(instance.get("status")?, "Ready"));
        let text = |field: &str| shown.map_or("", |shown| shown.str_at(field)).to_owned();
        let (reason, message) = match instance {
            Some(_) => (text("/reason"), text("/message")),
            None => ("VMINotExists".to_owned(), "VMI does not exist".to_owned()),
        };
        let state = if ready { "True" } else { "False" };
        let new = Condition { kind: "Ready", status: state, reason: &reason, message: &message };
        set_condition(&mut status, new, &now, &[]);
        let outdated = instance.is_some_and(|instance| {
            !has_ended(instance)
                && instance.annotation(TEMPLATE_HASH).is_some_and(|hash| hash != template_hash(machine))
        });
        match outdated {
            true => {
                let message = "a non-live-updatable field was changed in the template spec";
                let new = Condition { kind: "RestartRequired", status: "True", reason: "RestartRequired", message };
                set_condition(&mut status, new, &now, &[]);
            }
            false => remove_condition(&mut status, "RestartRequired"),
        }
        self.context.write_status(&MACHINES, machine, status).await
    }

    fn printable(
        &self,
        machine: &Object,
        instance: Option<&SharedObject>,
        strategy: Strategy,
        status: &Value,
    ) -> &'static str {
        if machine.is_deleting() {
            return "Terminating";
        }
        let Some(instance) = instance else {
            let retry = api::time::parse(status.str_at("/startFailure/retryAfterTimestamp"));
            return match strategy.starts() {
                true if retry.is_some_and(|retry| retry > self.context.now()) => "CrashLoopBackOff",
                true => "Starting",
                false => "Stopped",
            };
        };
        if instance.is_deleting() {
            return if has_ended(instance) && strategy.starts() { "Starting" } else { "Stopping" };
        }
        match instance.str_at("/status/phase") {
            "Running" if condition_status(instance, "Paused") == "True" => "Paused",
            "Running" => "Running",
            "Succeeded" | "Failed" => "Stopped",
            _ if condition_status(instance, "PodScheduled") == "False" => "ErrorUnschedulable",
            _ => self.waiting(instance).unwrap_or("Starting"),
        }
    }

    /// What the pod's container waits for, if that is worth showing.
    fn waiting(&self, instance: &SharedObject) -> Option<&'static str> {
        let pods = self.pods.list_in(instance.namespace());
        let pod = pods.iter().find(|pod| is_controlled_by(pod, instance.uid()))?;
        let mut reasons =
            list(pod, "/status/containerStatuses").iter().map(|container| container.str_at("/state/waiting/reason"));
        reasons.find_map(|reason| match reason {
            "ErrImagePull" | "ErrImageNeverPull" | "InvalidImageName" => Some("ErrImagePull"),
            "ImagePullBackOff" => Some("ImagePullBackOff"),
            _ => None,
        })
    }
}

/// Whether someone asked for that through the machine's subresources.
fn asks(status: &Value, action: &str) -> bool {
    list(status, "/stateChangeRequests").iter().any(|request| request.str_at("/action") == action)
}

/// A stop is done when the instance it names is gone; a start when there is an instance and no stop before it.
fn forget_done(status: &mut Value, instance: Option<&SharedObject>) {
    let mut requests = list(status, "/stateChangeRequests").to_vec();
    if requests.is_empty() {
        return;
    }
    requests.retain(|r| r.str_at("/action") != "Stop" || instance.is_some_and(|i| i.uid() == r.str_at("/uid")));
    let stops = requests.iter().any(|r| r.str_at("/action") == "Stop");
    if instance.is_some() && !stops {
        requests.clear();
    }
    let fields = object_of(status);
    if requests.is_empty() {
        fields.remove("stateChangeRequests");
    } else {
        fields.insert("stateChangeRequests".into(), requests.into());
    }
}

fn template_hash(machine: &Object) -> String {
    let template = machine.pointer("/spec/template/spec").unwrap_or(&Value::Null).to_string();
    api::names::safe_encode(&fnv32a(template.bytes()).to_string())
}

fn new_instance(machine: &Object) -> Object {
    let template = machine.pointer("/spec/template").unwrap_or(&Value::Null);
    let mut metadata = json!({"name": machine.name(), "ownerReferences": [owner(machine)],
                              "finalizers": [super::FINALIZER]});
    for field in ["labels", "annotations"] {
        if let Some(values) = template.pointer(&format!("/metadata/{field}")).filter(|values| values.is_object()) {
            object_of(&mut metadata).insert(field.into(), values.clone());
        }
    }
    if let Some(from) = machine.annotation(GO_ON_FROM) {
        child(object_of(&mut metadata), "annotations").insert(GO_ON_FROM.into(), from.into());
    }
    child(object_of(&mut metadata), "annotations").insert(TEMPLATE_HASH.into(), template_hash(machine).into());
    let name = crate::objects::joined(machine.name(), "", 63);
    child(object_of(&mut metadata), "labels").insert("kubevirt.io/vm".into(), name.into());
    let spec = template.get("spec").cloned().unwrap_or_else(|| json!({}));
    json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": metadata, "spec": spec})
}
