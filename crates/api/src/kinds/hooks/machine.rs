//! Virtual machines: disks and volumes, interfaces and networks must belong together.

use super::annotations;
use super::field::{Problems, at, has, items, pointer, present, text};
use crate::names;
use crate::object::Object;
use crate::quantity::Quantity;
use crate::status::Cause;
use serde_json::Value;
use std::collections::HashSet;

pub fn validate_machine(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    match (has(spec, "running"), has(spec, "runStrategy")) {
        (true, true) => p.invalid("spec.running", at(spec, "running"),
            "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use RunStrategy instead"),
        (false, false) => p.required("spec.runStrategy", "one of running or runStrategy must be specified"),
        _ => {}
    }
    p.labels("spec.template.metadata.labels", pointer(spec, "/template/metadata/labels"));
    let annotations = |object| pointer(object, "/spec/template/metadata/annotations");
    let known = old.map_or(&Value::Null, annotations);
    annotations::validate(&mut p, "spec.template.metadata.annotations", annotations(new), known);
    instance(&mut p, "spec.template.spec", pointer(spec, "/template/spec"));
    p.into_causes()
}

pub fn warnings(new: &Object) -> Vec<String> {
    if has(at(new, "spec"), "running") {
        vec!["spec.running is deprecated, please use spec.runStrategy instead.".to_owned()]
    } else {
        Vec::new()
    }
}

pub fn validate_instance(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let annotations = |object| pointer(object, "/metadata/annotations");
    annotations::validate(&mut p, "metadata.annotations", annotations(new), old.map_or(&Value::Null, annotations));
    match old {
        Some(old) if at(new, "spec") != at(old, "spec") => {
            p.forbidden("spec", "update of VMI object is restricted; change its VirtualMachine instead");
        }
        _ => instance(&mut p, "spec", at(new, "spec")),
    }
    p.into_causes()
}

fn instance(p: &mut Problems, path: &str, spec: &Value) {
    let domain = at(spec, "domain");
    let devices = at(domain, "devices");
    pair(
        p,
        path,
        (&format!("{path}.domain.devices.disks"), items(devices, "disks")),
        ("volumes", items(spec, "volumes")),
    );
    let interfaces = items(devices, "interfaces");
    pair(p, path, (&format!("{path}.domain.devices.interfaces"), interfaces), ("networks", items(spec, "networks")));
    disks(p, &format!("{path}.domain.devices.disks"), items(devices, "disks"));
    for (index, interface) in interfaces.iter().enumerate() {
        let path = format!("{path}.domain.devices.interfaces[{index}]");
        if present(interface, &["masquerade", "bridge"]).len() > 1 {
            p.forbidden(&path, "must have only one binding: masquerade or bridge");
        }
        for (number, port) in items(interface, "ports").iter().enumerate() {
            p.optional_rule(&format!("{path}.ports[{number}].name"), text(port, "name"), names::port_name);
        }
    }
    let on_pod_network = items(spec, "networks").iter().filter(|network| has(network, "pod")).count();
    if on_pod_network > 1 {
        p.invalid(&format!("{path}.networks"), &on_pod_network.into(), "only one network can be the pod network");
    }
    for (index, network) in items(spec, "networks").iter().enumerate() {
        if !has(network, "pod") {
            p.required(&format!("{path}.networks[{index}].pod"), "must have a network type; only pod is served here");
        }
    }
    for (index, volume) in items(spec, "volumes").iter().enumerate() {
        validate_volume(p, &format!("{path}.volumes[{index}]"), volume);
    }
    hardware(p, &format!("{path}.domain"), domain);
    p.optional_rule(&format!("{path}.hostname"), text(spec, "hostname"), names::dns_label);
    p.optional_rule(&format!("{path}.subdomain"), text(spec, "subdomain"), names::dns_subdomain);
    p.labels(&format!("{path}.nodeSelector"), at(spec, "nodeSelector"));
    for field in ["livenessProbe", "readinessProbe"] {
        let probe = at(spec, field);
        let handlers = present(probe, &["httpGet", "tcpSocket", "exec", "guestAgentPing"]);
        if !probe.is_null() && handlers.len() != 1 {
            let detail = "must have exactly one of httpGet, tcpSocket, exec and guestAgentPing";
            p.invalid(&format!("{path}.{field}"), &handlers.len().into(), detail);
        }
    }
}

/// Devices and what they show name each other.
fn pair(p: &mut Problems, path: &str, (devices_path, devices): (&str, &[Value]), (list, sources): (&str, &[Value])) {
    let name = |value: &Value| text(value, "name").to_owned();
    let (known, used): (HashSet<String>, HashSet<String>) =
        (sources.iter().map(name).collect(), devices.iter().map(name).collect());
    for (index, device) in devices.iter().enumerate().filter(|(_, device)| !known.contains(text(device, "name"))) {
        let name = text(device, "name");
        let detail = format!("{devices_path}[{index}].name '{name}' not found in {path}.{list}");
        p.invalid_text(&format!("{devices_path}[{index}].name"), name, &detail);
    }
    for (index, source) in sources.iter().enumerate().filter(|(_, source)| !used.contains(text(source, "name"))) {
        let name = text(source, "name");
        let detail = format!("{path}.{list}[{index}].name '{name}' not found in {devices_path}");
        p.invalid_text(&format!("{path}.{list}[{index}].name"), name, &detail);
    }
}

fn disks(p: &mut Problems, path: &str, disks: &[Value]) {
    let mut orders = HashSet::new();
    for (index, disk) in disks.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let kinds = present(disk, &["disk", "cdrom", "lun"]);
        if kinds.len() > 1 {
            p.invalid(&path, &kinds.len().into(), "can only have a single target type defined");
        }
        if let Some(order) = at(disk, "bootOrder").as_i64()
            && !orders.insert(order)
        {
            p.invalid(&format!("{path}.bootOrder"), &order.into(), "is already used by another disk");
        }
        let serial = text(disk, "serial");
        if !serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b)) {
            let detail = "must be made up of the following characters [A-Za-z0-9_.+-], if specified";
            p.invalid_text(&format!("{path}.serial"), serial, detail);
        }
    }
}

const SOURCES: [&str; 7] =
    ["containerDisk", "emptyDisk", "cloudInitNoCloud", "cloudInitConfigDrive", "configMap", "secret", "serviceAccount"];

fn validate_volume(p: &mut Problems, path: &str, volume: &Value) {
    let given = present(volume, &SOURCES);
    if given.len() != 1 {
        p.invalid(path, &given.len().into(), "must have exactly one source type set");
    }
    for kind in given {
        let (path, source) = (format!("{path}.{kind}"), at(volume, kind));
        match kind {
            "emptyDisk" => positive(p, &format!("{path}.capacity"), at(source, "capacity")),
            "cloudInitNoCloud" | "cloudInitConfigDrive" => {
                for fields in [
                    ["userData", "userDataBase64", "secretRef"],
                    ["networkData", "networkDataBase64", "networkDataSecretRef"],
                ] {
                    if present(source, &fields).len() > 1 {
                        p.invalid(
                            &path,
                            &present(source, &fields).len().into(),
                            &format!("must have at most one of {}", fields.join(", ")),
                        );
                    }
                }
                for field in ["userDataBase64", "networkDataBase64"] {
                    use base64::Engine;
                    if base64::engine::general_purpose::STANDARD.decode(text(source, field)).is_err() {
                        p.invalid_text(&format!("{path}.{field}"), text(source, field), "is not a valid base64 value");
                    }
                }
            }
            "configMap" if text(source, "name").is_empty() => p.required(&format!("{path}.name"), ""),
            "secret" if text(source, "secretName").is_empty() => p.required(&format!("{path}.secretName"), ""),
            _ => {}
        }
    }
}

fn positive(p: &mut Problems, path: &str, value: &Value) {
    if Quantity::from_value(value).is_ok_and(|quantity| quantity <= Quantity::ZERO) {
        p.invalid(path, value, "must be greater than 0");
    }
}

fn hardware(p: &mut Problems, path: &str, domain: &Value) {
    let memory = at(domain, "memory");
    for field in ["guest", "maxGuest"] {
        if has(memory, field) {
            positive(p, &format!("{path}.memory.{field}"), at(memory, field));
        }
    }
    super::pod_spec::resources(p, &format!("{path}.resources"), at(domain, "resources"));
    let limit = Quantity::from_value(pointer(domain, "/resources/limits/memory"));
    if let (Ok(limit), Ok(guest)) = (limit, Quantity::from_value(at(memory, "guest")))
        && guest > limit
    {
        let detail = format!("must be equal to or less than the memory limit of {limit}");
        p.invalid(&format!("{path}.memory.guest"), at(memory, "guest"), &detail);
    }
    let firmware = at(domain, "firmware");
    let boot = at(firmware, "kernelBoot");
    let container = at(boot, "container");
    if has(boot, "kernelArgs") && container.is_null() {
        let detail = "kernel arguments cannot be provided without an external kernel";
        p.invalid(&format!("{path}.firmware.kernelBoot.kernelArgs"), at(boot, "kernelArgs"), detail);
    }
    if !container.is_null() && present(container, &["kernelPath", "initrdPath"]).is_empty() {
        let detail = "at least one of kernelPath and initrdPath must be set";
        p.required(&format!("{path}.firmware.kernelBoot.container"), detail);
    }
    if present(at(firmware, "bootloader"), &["bios", "efi"]).len() > 1 {
        p.forbidden(
            &format!("{path}.firmware.bootloader"),
            "has both EFI and BIOS configured, but they are mutually exclusive",
        );
    }
    let uuid = text(firmware, "uuid");
    let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
    let is_uuid = parts == [8, 4, 4, 4, 12] && uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if !uuid.is_empty() && !is_uuid {
        p.invalid_text(
            &format!("{path}.firmware.uuid"),
            uuid,
            "must be a UUID such as 5d307ca9-b3ef-428c-8861-06e72d69f223",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn told(spec: Value) -> Vec<String> {
        validate_machine(&json!({"spec": spec}), None)
            .into_iter()
            .map(|c| format!("{}: {}", c.field, c.message))
            .collect()
    }

    #[test]
    fn a_whole_machine_is_fine() {
        let machine = json!({"runStrategy": "Always", "template": {"spec": {
            "domain": {"cpu": {"cores": 2}, "memory": {"guest": "1Gi"}, "devices": {
                "disks": [{"name": "root", "disk": {"bus": "virtio"}}, {"name": "seed", "disk": {"bus": "virtio"}}],
                "interfaces": [{"name": "default", "masquerade": {}}]}},
            "networks": [{"name": "default", "pod": {}}],
            "volumes": [{"name": "root", "containerDisk": {"image": "debian:12"}},
                        {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\n"}}]}}});
        assert!(told(machine).is_empty());
    }

    #[test]
    fn what_does_not_belong_together_is_named() {
        let problems = told(json!({"running": true, "runStrategy": "Always", "template": {"spec": {
            "domain": {"memory": {"guest": "0"}, "devices": {"disks": [{"name": "a"}], "interfaces": [{"name": "n"}]},
                       "firmware": {"uuid": "x", "kernelBoot": {"kernelArgs": "quiet"}}},
            "volumes": [{"name": "b", "emptyDisk": {"capacity": "1Gi"}, "containerDisk": {"image": "i"}}]}}}));
        let fields: Vec<&str> = problems.iter().filter_map(|problem| problem.split(": ").next()).collect();
        assert_eq!(
            fields,
            [
                "spec.running",
                "spec.template.spec.domain.devices.disks[0].name",
                "spec.template.spec.volumes[0].name",
                "spec.template.spec.domain.devices.interfaces[0].name",
                "spec.template.spec.volumes[0]",
                "spec.template.spec.domain.memory.guest",
                "spec.template.spec.domain.firmware.kernelBoot.kernelArgs",
                "spec.template.spec.domain.firmware.uuid",
            ]
        );
    }
}
