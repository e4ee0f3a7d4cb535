//! VirtualMachineInstances: one pod each, and a status that follows it.
//!
//! ```text
//! Pending ─pod made─▶ Scheduling ─bound─▶ Scheduled ─started─▶ Running ─▶ Succeeded | Failed
//! ```
//! A pod that disappears makes the instance `Failed`; whether the machine runs again is its VirtualMachine's matter.

use super::{FINALIZER, NAME_LABEL, has_ended, launcher};
use crate::context::{Condition, Context, INSTANCES, PODS, set_condition};
use crate::objects::{self, condition_status, controller_name, controller_reference, is_controlled_by, joined, list};
use crate::recent::Recent;
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::{DeleteOptions, Patch};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::{Found, Reason, StatusResult};
use async_trait::async_trait;
use serde_json::{Map, Value, json};
use std::sync::Arc;

const COMPONENT: &str = "virtualmachine-controller";

pub(crate) struct Instances {
    context: Arc<Context>,
    instances: Informer,
    pods: Informer,
    recent: Recent,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (instances, pods) = (context.informers.of(&INSTANCES), context.informers.of(&PODS));
    let known = instances.clone();
    let of_pod = Source::new(pods.clone(), move |pod| {
        let Some(label) = pod.label(NAME_LABEL) else { return Vec::new() };
        let mut keys: Vec<Key> = controller_name(pod, &INSTANCES, "VirtualMachineInstance")
            .map(|n| Key::new(pod.namespace(), n))
            .into_iter()
            .collect();
        // Another instance of that name may be waiting for this pod to be gone.
        let same = |instance: &&SharedObject| joined(instance.name(), "", 63) == label;
        keys.extend(known.list_in(pod.namespace()).iter().filter(same).map(Key::of));
        keys
    });
    let sources = vec![Source::own(instances.clone()), of_pod];
    (Arc::new(Instances { context: Arc::clone(context), instances, pods, recent: Recent::default() }), sources)
}

#[async_trait]
impl Reconcile for Instances {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(instance) = self.instances.get_key(key) else {
            self.recent.forget(key);
            return Ok(None);
        };
        let mut pods = self.recent.pods(&self.context, &self.pods, key).await?;
        pods.retain(|pod| pod.label(NAME_LABEL).is_some_and(|label| label == joined(instance.name(), "", 63)));
        let (own, others): (Vec<_>, Vec<_>) = pods.into_iter().partition(|pod| is_controlled_by(pod, instance.uid()));
        if instance.is_deleting() {
            return self.end(key, &instance, &own).await.map(|()| None);
        }
        if !instance.finalizers().contains(&FINALIZER) {
            self.hold(&instance).await?;
            return Ok(None);
        }
        match own.first() {
            Some(pod) => self.follow(&instance, pod).await?,
            None if has_ended(&instance) => {}
            None => self.begin(key, &instance, &others).await?,
        }
        Ok(None)
    }
}

impl Instances {
    async fn hold(&self, instance: &SharedObject) -> StatusResult<()> {
        let mut finalizers = instance.finalizers();
        finalizers.push(FINALIZER);
        let patch = json!({"metadata": {"uid": instance.uid(), "resourceVersion": instance.resource_version(),
                                        "finalizers": finalizers}});
        let (namespace, name) = (instance.namespace(), instance.name());
        self.context.client.patch(&INSTANCES, namespace, name, "", Patch::Merge(patch)).await.map(drop)
    }

    /// Being deleted: its pod goes first, with the time the guest is given to shut down.
    async fn end(&self, key: &Key, instance: &SharedObject, own: &[SharedObject]) -> StatusResult<()> {
        let mut left = false;
        for pod in own {
            left = true;
            if pod.is_deleting() {
                continue;
            }
            let options = DeleteOptions { uid: Some(pod.uid().to_owned()), ..Default::default() };
            match self.context.client.delete(&PODS, pod.namespace(), pod.name(), &options).await {
                Ok(()) => {
                    let message = format!("Signaled deletion of virtual machine pod {}", pod.name());
                    self.context.events.normal(COMPONENT, instance, "SuccessfulDelete", message);
                }
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if left || !instance.finalizers().contains(&FINALIZER) {
            return Ok(());
        }
        self.recent.forget(key);
        let kept: Vec<&str> = instance.finalizers().into_iter().filter(|other| *other != FINALIZER).collect();
        let patch = json!({"metadata": {"uid": instance.uid(), "resourceVersion": instance.resource_version(),
                                        "finalizers": kept}});
        let (namespace, name) = (instance.namespace(), instance.name());
        self.context.client.patch(&INSTANCES, namespace, name, "", Patch::Merge(patch)).await.found().map(drop)
    }

    async fn begin(&self, key: &Key, instance: &SharedObject, others: &[SharedObject]) -> StatusResult<()> {
        let phase = instance.str_at("/status/phase");
        if !matches!(phase, "" | "Pending") {
            // There was a pod.
            let gone = "The machine's pod is gone.";
            return self.tell(instance, None, "Failed", Some(("PodTerminated", gone))).await;
        }
        if others.iter().any(|pod| !objects::has_ended(pod)) {
            // An earlier run of this machine is still on its way out.
            return self.tell(instance, None, "Pending", None).await;
        }
        let pod = match launcher::pod(instance) {
            Ok(pod) => pod,
            Err(why) => {
                self.context.events.warning(COMPONENT, instance, "FailedCreate", why.clone());
                return self.tell(instance, None, "Failed", Some(("InvalidSpec", &why))).await;
            }
        };
        match self.context.client.create(&PODS, instance.namespace(), pod).await {
            Ok(pod) => {
                self.recent.created(key, &pod);
                let message = format!("Created virtual machine pod {}", pod.name());
                self.context.events.normal(COMPONENT, instance, "SuccessfulCreate", message);
                self.tell(instance, Some(&pod), "Scheduling", None).await
            }
            Err(error) => {
                let message = format!("Error creating pod: {error}");
                self.context.events.warning(COMPONENT, instance, "FailedCreate", message.clone());
                if matches!(error.reason, Reason::Invalid | Reason::Forbidden) {
                    self.tell(instance, None, "Pending", Some(("FailedCreate", &message))).await?;
                }
                Err(error)
            }
        }
    }

    /// Limits of a machine's bandwidth may change while it runs.
    async fn hand_down_bandwidth(&self, instance: &SharedObject, pod: &SharedObject) -> StatusResult<()> {
        let mut changed = Map::new();
        for key in [api::bandwidth::INGRESS, api::bandwidth::EGRESS] {
            let wanted = instance.annotation(key);
            if wanted != pod.annotation(key) {
                changed.insert(key.to_owned(), wanted.into());
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let patch = json!({"metadata": {"uid": pod.uid(), "annotations": changed}});
        match self.context.client.patch(&PODS, pod.namespace(), pod.name(), "", Patch::Merge(patch)).await {
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }

    async fn follow(&self, instance: &SharedObject, pod: &SharedObject) -> StatusResult<()> {
        self.hand_down_bandwidth(instance, pod).await?;
        let phase = match pod.str_at("/status/phase") {
            "Succeeded" => "Succeeded",
            "Failed" => "Failed",
            "Running" => "Running",
            _ if pod.str_at("/spec/nodeName").is_empty() => "Scheduling",
            _ => "Scheduled",
        };
        let now = instance.str_at("/status/phase");
        if phase != now {
            let (reason, message) = match phase {
                "Running" => ("Started", "VirtualMachineInstance started."),
                "Succeeded" => ("Stopped", "The VirtualMachineInstance was shut down."),
                "Failed" => ("Stopped", "The VirtualMachineInstance crashed."),
                _ => ("", ""),
            };
            match phase {
                "Failed" => self.context.events.warning(COMPONENT, instance, reason, message.into()),
                _ if !reason.is_empty() => self.context.events.normal(COMPONENT, instance, reason, message.into()),
                _ => {}
            }
        }
        self.tell(instance, Some(pod), phase, None).await
    }

    async fn tell(
        &self,
        instance: &SharedObject,
        pod: Option<&SharedObject>,
        phase: &str,
        failure: Option<(&str, &str)>,
    ) -> StatusResult<()> {
        let mut status = instance.get("status").cloned().unwrap_or_else(|| json!({}));
        let changed = status.str_at("/phase") != phase;
        let now = self.context.timestamp();
        let fields = object_of(&mut status);
        fields.insert("phase".into(), phase.into());
        if let Some((reason, _)) = failure {
            fields.insert("reason".into(), reason.into());
        }
        if changed {
            let transitions = fields.entry("phaseTransitionTimestamps").or_insert_with(|| json!([]));
            if let Value::Array(list) = transitions {
                list.retain(|old| old.str_at("/phase") != phase);
                list.push(json!({"phase": phase, "phaseTransitionTimestamp": now}));
            }
        }
        if let Some(pod) = pod {
            describe(&mut status, instance, pod);
        }
        for condition in conditions(pod, phase, failure) {
            set_condition(&mut status, condition, &now, &[]);
        }
        if pod.is_some_and(|pod| condition_status(pod, "PodScheduled") == "True") {
            crate::context::remove_condition(&mut status, "PodScheduled");
        }
        self.context.write_status(&INSTANCES, instance, status).await
    }
}

/// Where it runs and what it has.
fn describe(status: &mut Value, instance: &Object, pod: &Object) {
    let spec = instance.get("spec").unwrap_or(&Value::Null);
    let fields = object_of(status);
    let node = pod.str_at("/spec/nodeName");
    if !node.is_empty() {
        fields.insert("nodeName".into(), node.into());
    }
    fields.insert("activePods".into(), json!({pod.uid(): node}));
    if !pod.str_at("/status/qosClass").is_empty() {
        fields.insert("qosClass".into(), pod.str_at("/status/qosClass").into());
    }
    let address = pod.str_at("/status/podIP");
    if !address.is_empty() {
        let networks = list(spec, "/networks").iter().find(|network| network.get("pod").is_some());
        let name = networks.map_or("default", |network| network.str_at("/name"));
        let interface = list(spec, "/domain/devices/interfaces").iter().find(|i| i.str_at("/name") == name);
        let ips = list(pod, "/status/podIPs").iter().map(|ip| ip.str_at("/ip")).filter(|ip| !ip.is_empty());
        let mut addresses: Vec<&str> = ips.collect();
        if addresses.is_empty() {
            addresses.push(address);
        }
        let mut shown = json!({"name": name, "ipAddress": address, "ipAddresses": addresses, "infoSource": "domain",
                               "linkState": "up"});
        if let Some(mac) = interface.map(|i| i.str_at("/macAddress")).filter(|mac| !mac.is_empty()) {
            object_of(&mut shown).insert("mac".into(), mac.into());
        }
        fields.insert("interfaces".into(), json!([shown]));
    }
    let part = |field: &str| objects::int(spec, &format!("/domain/cpu/{field}")).unwrap_or(1);
    let topology = match spec.pointer("/domain/cpu/cores").or_else(|| spec.pointer("/domain/cpu/sockets")) {
        Some(_) => json!({"cores": part("cores"), "sockets": part("sockets"), "threads": part("threads")}),
        None => json!({"cores": launcher::vcpus(spec), "sockets": 1, "threads": 1}),
    };
    fields.insert("currentCPUTopology".into(), topology);
    if let Some(memory) = launcher::memory(spec) {
        let memory = memory.to_string();
        let same = json!({"guestAtBoot": memory, "guestCurrent": memory, "guestRequested": memory});
        fields.insert("memory".into(), same);
    }
}

fn conditions<'a>(
    pod: Option<&'a SharedObject>,
    phase: &str,
    failure: Option<(&'a str, &'a str)>,
) -> Vec<Condition<'a>> {
    let no = |reason, message| Condition { kind: "Ready", status: "False", reason, message };
    let ready = pod.and_then(|pod| list(pod, "/status/conditions").iter().find(|c| c.str_at("/type") == "Ready"));
    let mut all = vec![match (phase, ready) {
        _ if failure.is_some() => failure.map_or(no("", ""), |(reason, message)| no(reason, message)),
        ("Succeeded" | "Failed", _) => no("PodTerminated", "The machine has ended."),
        ("Running", Some(ready)) if ready.str_at("/status") == "True" => {
            Condition { kind: "Ready", status: "True", reason: "", message: "" }
        }
        ("Running", Some(ready)) if !ready.str_at("/reason").is_empty() => {
            no(ready.str_at("/reason"), ready.str_at("/message"))
        }
        _ => no("GuestNotRunning", "Guest VM is not reported as running"),
    }];
    all.push(Condition {
        kind: "LiveMigratable",
        status: "False",
        reason: "NotMigratable",
        message: "Machines are not migrated between nodes.",
    });
    let scheduled =
        pod.and_then(|pod| list(pod, "/status/conditions").iter().find(|c| c.str_at("/type") == "PodScheduled"));
    if let Some(refused) = scheduled.filter(|scheduled| scheduled.str_at("/status") == "False") {
        all.push(Condition {
            kind: "PodScheduled",
            status: "False",
            reason: refused.str_at("/reason"),
            message: refused.str_at("/message"),
        });
    }
    all
}

/// The reference with which a machine owns an instance.
pub(super) fn owner(machine: &Object) -> Value {
    controller_reference(&crate::context::MACHINES, "VirtualMachine", machine)
}
