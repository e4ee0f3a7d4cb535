//! How lists and maps of Kubernetes' types are merged: `x-kubernetes-list-type`, `-list-map-keys`, `-map-type`,
//! `-patch-strategy` and `-patch-merge-key` as Kubernetes publishes them. A list that is not here is atomic.

use super::{ListKind, Strategic};

/// (type, field, list type, strategic merge). The list type is `set`, `atomic` or the keys of a map list, separated by
/// commas; the strategic part is empty (replace), `*` (a set of scalars) or the merge key.
pub const TABLE: &[(&str, &str, &str, &str)] = &[
    ("meta.v1.ObjectMeta", "finalizers", "set", "*"),
    ("meta.v1.ObjectMeta", "ownerReferences", "uid", "uid"),
    ("core.v1.PodSpec", "containers", "name", "name"),
    ("core.v1.PodSpec", "initContainers", "name", "name"),
    ("core.v1.PodSpec", "ephemeralContainers", "name", "name"),
    ("core.v1.PodSpec", "volumes", "name", "name"),
    ("core.v1.PodSpec", "imagePullSecrets", "name", "name"),
    ("core.v1.PodSpec", "hostAliases", "ip", "ip"),
    ("core.v1.PodSpec", "topologySpreadConstraints", "topologyKey,whenUnsatisfiable", "topologyKey"),
    ("core.v1.PodSpec", "schedulingGates", "name", "name"),
    ("core.v1.PodSpec", "resourceClaims", "name", "name"),
    ("core.v1.PodStatus", "conditions", "type", "type"),
    ("core.v1.PodStatus", "podIPs", "ip", "ip"),
    ("core.v1.PodStatus", "hostIPs", "atomic", "ip"),
    ("core.v1.PodStatus", "resourceClaimStatuses", "name", "name"),
    ("core.v1.Container", "ports", "containerPort,protocol", "containerPort"),
    ("core.v1.Container", "env", "name", "name"),
    ("core.v1.Container", "volumeMounts", "mountPath", "mountPath"),
    ("core.v1.Container", "volumeDevices", "devicePath", "devicePath"),
    ("core.v1.EphemeralContainer", "ports", "containerPort,protocol", "containerPort"),
    ("core.v1.EphemeralContainer", "env", "name", "name"),
    ("core.v1.EphemeralContainer", "volumeMounts", "mountPath", "mountPath"),
    ("core.v1.EphemeralContainer", "volumeDevices", "devicePath", "devicePath"),
    ("core.v1.ContainerStatus", "volumeMounts", "mountPath", "mountPath"),
    ("core.v1.ContainerStatus", "allocatedResourcesStatus", "name", "name"),
    ("core.v1.ResourceRequirements", "claims", "name", ""),
    ("core.v1.ResourceStatus", "resources", "resourceID", ""),
    ("core.v1.ServiceSpec", "ports", "port,protocol", "port"),
    ("core.v1.ServiceStatus", "conditions", "type", "type"),
    ("core.v1.ServiceAccount", "secrets", "name", "name"),
    ("core.v1.NamespaceStatus", "conditions", "type", "type"),
    ("core.v1.NodeSpec", "podCIDRs", "set", "*"),
    ("core.v1.NodeStatus", "conditions", "type", "type"),
    ("core.v1.NodeStatus", "addresses", "type", "type"),
    ("discovery.v1.Endpoint", "addresses", "set", ""),
    ("apps.v1.DeploymentStatus", "conditions", "type", "type"),
    ("apps.v1.ReplicaSetStatus", "conditions", "type", "type"),
    ("apiextensions.v1.CustomResourceDefinitionStatus", "conditions", "type", ""),
    ("apiextensions.v1.JSONSchemaProps", "x-kubernetes-validations", "rule", "rule"),
];

/// `x-kubernetes-map-type: atomic` on a type.
pub const ATOMIC_TYPES: &[&str] = &[
    "core.v1.ObjectReference",
    "core.v1.LocalObjectReference",
    "core.v1.TypedLocalObjectReference",
    "core.v1.ConfigMapKeySelector",
    "core.v1.SecretKeySelector",
    "core.v1.ConfigMapNodeConfigSource",
    "core.v1.ObjectFieldSelector",
    "core.v1.ResourceFieldSelector",
    "core.v1.NodeSelector",
    "core.v1.NodeSelectorTerm",
    "discovery.v1.EndpointPort",
    "meta.v1.LabelSelector",
    "meta.v1.OwnerReference",
];

/// `x-kubernetes-map-type: atomic` on a field that is a map.
pub const ATOMIC_MAPS: &[(&str, &str)] = &[("core.v1.PodSpec", "nodeSelector"), ("core.v1.ServiceSpec", "selector")];

/// Types merged with the strategy `retainKeys`: fields a patch does not name are dropped when it says so.
pub const RETAIN_KEYS_TYPES: &[&str] =
    &["core.v1.Volume", "core.v1.PodResourceClaim", "core.v1.PodResourceClaimStatus", "apps.v1.DeploymentStrategy"];

pub fn of(type_name: &str, field: &str) -> Option<(ListKind, Option<Strategic>)> {
    let (.., kind, strategic) = TABLE.iter().find(|(t, f, ..)| *t == type_name && *f == field)?;
    let kind = match *kind {
        "atomic" => ListKind::Atomic,
        "set" => ListKind::Set,
        keys => ListKind::Map(keys.split(',').map(str::to_owned).collect()),
    };
    let strategic = match *strategic {
        "" => None,
        "*" => Some(Strategic { key: None }),
        key => Some(Strategic { key: Some(key.to_owned()) }),
    };
    Some((kind, strategic))
}
