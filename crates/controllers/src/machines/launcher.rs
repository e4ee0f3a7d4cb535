//! The pod of a VirtualMachineInstance. The node agent reads disks, secrets and cloud-init from the instance's spec in
//! the annotation `atoll.dev/machine`; what scheduler and kubelet rules need stands in the pod itself.

use super::NAME_LABEL;
use crate::context::INSTANCES;
use crate::objects::{controller_reference, int, joined, list, map};
use api::object::{Meta, Object, object_of};
use api::quantity::Quantity;
use serde_json::{Map, Value, json};

const MACHINE: &str = "atoll.dev/machine";
const ADDRESS_KEY: &str = "atoll.dev/address-key";
pub(super) const CONTAINER: &str = "compute";
/// The host's share of a CPU that is set aside for one of the guest's, in thousandths.
const CPU_SHARE: i64 = 100;

pub(super) fn pod(instance: &Object) -> Result<Object, String> {
    let spec = instance.get("spec").cloned().unwrap_or_else(|| json!({}));
    let name = instance.name();
    let mut labels =
        instance.pointer("/metadata/labels").cloned().filter(Value::is_object).unwrap_or_else(|| json!({}));
    let fields = object_of(&mut labels);
    // Labels hold 63 characters, names more.
    let short = joined(name, "", 63);
    fields.insert("kubevirt.io".into(), "virt-launcher".into());
    fields.insert("kubevirt.io/domain".into(), short.clone().into());
    fields.insert("kubevirt.io/created-by".into(), instance.uid().into());
    fields.insert(NAME_LABEL.into(), short.into());
    let mut annotations = Map::new();
    for (key, value) in map(instance, "/metadata/annotations") {
        if !key.starts_with("kubectl.kubernetes.io/") {
            annotations.insert(key.clone(), value.clone());
        }
    }
    annotations.insert(MACHINE.into(), spec.to_string().into());
    annotations.insert(ADDRESS_KEY.into(), format!("vm/{}/{name}", instance.namespace()).into());
    Ok(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": joined(&format!("virt-launcher-{name}"), &format!("-{}", api::names::suffix()), 63),
            "labels": labels, "annotations": annotations,
            "ownerReferences": [controller_reference(&INSTANCES, "VirtualMachineInstance", instance)],
        },
        "spec": pod_spec(instance, &spec)?,
    }))
}

fn pod_spec(instance: &Object, spec: &Value) -> Result<Value, String> {
    let (image, policy, secret) =
        image(spec).ok_or("no containerDisk volume and no kernelBoot: nothing to boot from")?;
    let mut container = json!({"name": CONTAINER, "image": image, "resources": resources(spec)?});
    let fields = object_of(&mut container);
    if !policy.is_empty() {
        fields.insert("imagePullPolicy".into(), policy.into());
    }
    for (field, probe) in [("readinessProbe", "/readinessProbe"), ("livenessProbe", "/livenessProbe")] {
        if let Some(probe) = spec.pointer(probe).and_then(probe_of) {
            fields.insert(field.into(), probe);
        }
    }
    let ports = ports(spec);
    if !ports.is_empty() {
        fields.insert("ports".into(), ports.into());
    }
    let hostname = match spec.str_at("/hostname") {
        "" => joined(&instance.name().replace('.', "-"), "", 63),
        hostname => hostname.to_owned(),
    };
    let mut pod = json!({
        "runtimeClassName": "microvm",
        "restartPolicy": "Never",
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "hostname": hostname,
        "terminationGracePeriodSeconds": int(spec, "/terminationGracePeriodSeconds").unwrap_or(30),
        "containers": [container],
    });
    let fields = object_of(&mut pod);
    for field in [
        "subdomain",
        "nodeSelector",
        "affinity",
        "tolerations",
        "schedulerName",
        "priorityClassName",
        "topologySpreadConstraints",
        "dnsPolicy",
        "dnsConfig",
    ] {
        if let Some(value) = spec.get(field).filter(|value| !value.is_null() && *value != "") {
            fields.insert(field.into(), value.clone());
        }
    }
    if !secret.is_empty() {
        fields.insert("imagePullSecrets".into(), json!([{"name": secret}]));
    }
    Ok(pod)
}

/// What the pod is of: the first bootable disk's image, or the kernel's. With its pull policy and secret.
fn image(spec: &Value) -> Option<(&str, &str, &str)> {
    let disk = list(spec, "/volumes").iter().find_map(|volume| volume.get("containerDisk"));
    let kernel = spec.pointer("/domain/firmware/kernelBoot/container");
    let source = kernel.or(disk)?;
    let image = Some(source.str_at("/image")).filter(|image| !image.is_empty())?;
    Some((image, source.str_at("/imagePullPolicy"), source.str_at("/imagePullSecret")))
}

/// A check that can be made from outside the guest; a ping of its agent cannot.
fn probe_of(probe: &Value) -> Option<Value> {
    let mut probe = probe.clone();
    let fields = probe.as_object_mut()?;
    fields.remove("guestAgentPing");
    let handled = ["httpGet", "tcpSocket", "exec"].iter().any(|handler| fields.contains_key(*handler));
    handled.then_some(probe)
}

fn ports(spec: &Value) -> Vec<Value> {
    list(spec, "/domain/devices/interfaces")
        .iter()
        .flat_map(|interface| list(interface, "/ports"))
        .filter_map(|port| {
            let mut value = json!({"containerPort": int(port, "/port")?});
            for field in ["name", "protocol"] {
                let text = port.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
                if let Some(text) = text {
                    object_of(&mut value).insert(field.into(), text.into());
                }
            }
            Some(value)
        })
        .collect()
}

pub(super) fn vcpus(spec: &Value) -> i64 {
    let part = |field: &str| int(spec, &format!("/domain/cpu/{field}"));
    let parts = [part("cores"), part("sockets"), part("threads")];
    if parts.iter().all(Option::is_none) {
        let asked = ["limits", "requests"].iter().find_map(|kind| amount(spec, kind, "cpu"));
        return asked.map_or(1, |quantity| quantity.value().max(1));
    }
    parts.iter().map(|part| part.unwrap_or(1).max(1)).fold(1, i64::saturating_mul)
}

fn amount(spec: &Value, kind: &str, name: &str) -> Option<Quantity> {
    Quantity::from_value(spec.pointer(&format!("/domain/resources/{kind}/{name}"))?).ok()
}

/// The guest's memory.
pub(super) fn memory(spec: &Value) -> Option<Quantity> {
    let guest = spec.pointer("/domain/memory/guest").and_then(|guest| Quantity::from_value(guest).ok());
    guest.or_else(|| amount(spec, "requests", "memory")).or_else(|| amount(spec, "limits", "memory"))
}

fn resources(spec: &Value) -> Result<Value, String> {
    let memory = memory(spec).ok_or("spec.domain.memory.guest or resources.requests.memory is required")?;
    let asked = amount(spec, "requests", "memory").filter(|asked| *asked > memory).unwrap_or(memory);
    let cpu =
        amount(spec, "requests", "cpu").unwrap_or_else(|| Quantity::millis(vcpus(spec).saturating_mul(CPU_SHARE)));
    let mut resources = json!({"requests": {"memory": asked.to_string(), "cpu": cpu.to_string()}});
    // A memory limit would count what the machine needs beside the guest's memory, too; the runtime class adds that.
    if let Some(limit) = amount(spec, "limits", "cpu") {
        object_of(&mut resources).insert("limits".into(), json!({"cpu": limit.to_string()}));
    }
    Ok(resources)
}
