//! Pods: what they begin with, and what of them may change.

use super::annotations;
use super::field::{Problems, at, fill, items, object_mut, pointer, text};
use super::pod_spec;
use crate::object::{Object, child, object_of};
use crate::quantity::Quantity;
use crate::status::Cause;
use serde_json::{Map, Value, json};

pub fn default(pod: &mut Object) {
    pod_spec::default_at(pod, "/spec");
    if let Some(spec) = object_mut(pod, "/spec") {
        fill(spec, "enableServiceLinks", true);
    }
}

/// A new pod is pending, tolerates a short absence of its node, and has a class of service for life.
pub fn prepare_create(pod: &mut Object) {
    let class = qos_class(at(pod, "spec"));
    child(object_of(pod), "status").insert("phase".into(), "Pending".into());
    child(object_of(pod), "status").insert("qosClass".into(), class.into());
    let Some(spec) = object_mut(pod, "/spec") else { return };
    fill(spec, "priority", 0);
    fill(spec, "preemptionPolicy", "PreemptLowerPriority");
    tolerate_lost_nodes(spec);
}

/// Seconds a pod stays bound to a node that is not ready or cannot be reached.
const LOST_NODE_SECONDS: i64 = 300;

fn tolerate_lost_nodes(spec: &mut Map<String, Value>) {
    let tolerations = spec.entry("tolerations").or_insert_with(|| json!([]));
    let Value::Array(list) = tolerations else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = list.iter().any(|toleration| {
            let same = text(toleration, "key") == key || text(toleration, "key").is_empty();
            same && matches!(text(toleration, "effect"), "" | "NoExecute")
        });
        if !covered {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_SECONDS}));
        }
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`
/// (<https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/>).
fn qos_class(spec: &Value) -> &'static str {
    let amount = |resources: &Value, list: &str, name: &str| {
        Quantity::from_value(at(at(resources, list), name)).ok().filter(|quantity| !quantity.is_zero())
    };
    let (mut any, mut guaranteed) = (false, true);
    for container in items(spec, "containers").iter().chain(items(spec, "initContainers")) {
        for name in ["cpu", "memory"] {
            let resources = at(container, "resources");
            let limit = amount(resources, "limits", name);
            let request = amount(resources, "requests", name).or(limit);
            any |= request.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

pub fn validate(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    pod_spec::validate(&mut p, "spec", at(new, "spec"));
    let own = |pod| pointer(pod, "/metadata/annotations");
    annotations::validate(&mut p, "metadata.annotations", own(new), old.map_or(&Value::Null, own));
    if let Some(old) = old {
        annotations::validate_pod_update(&mut p, own(new), own(old));
        validate_update(&mut p, new, old);
    }
    p.into_causes()
}

const CHANGEABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,\
    `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
    `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

fn validate_update(p: &mut Problems, new: &Object, old: &Object) {
    let (new, old) = (at(new, "spec"), at(old, "spec"));
    for list in ["containers", "initContainers"] {
        if items(new, list).len() != items(old, list).len() {
            p.forbidden(&format!("spec.{list}"), "pod updates may not add or remove containers");
            return;
        }
    }
    let kept = items(old, "tolerations").iter().all(|toleration| items(new, "tolerations").contains(toleration));
    if !kept {
        p.forbidden("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds");
    }
    if unchangeable(new, old) != unchangeable(old, old) {
        p.forbidden("spec", CHANGEABLE);
    }
}

/// A specification without what may change; `old` says whether the pod has been bound (binding is a change, too).
fn unchangeable(spec: &Value, old: &Value) -> Value {
    let mut rest = spec.clone();
    let Value::Object(fields) = &mut rest else { return rest };
    for list in ["containers", "initContainers"] {
        for container in super::field::items_mut(fields, list) {
            container.remove("image");
        }
    }
    for field in [
        "activeDeadlineSeconds",
        "tolerations",
        "terminationGracePeriodSeconds",
        "ephemeralContainers",
        "schedulingGates",
    ] {
        fields.remove(field);
    }
    if text(old, "nodeName").is_empty() {
        fields.remove("nodeName");
    }
    rest
}

pub fn warnings(pod: &Object) -> Vec<String> {
    pod_spec::warnings("spec", pointer(pod, "/spec"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    /// A pod as the server stores it.
    fn complete(spec: Value) -> Value {
        let kind = kinds::find("", "pods").unwrap();
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
        prepare_create(&mut pod);
        strict::apply_defaults(&kind.schema, &kind.types, &mut pod);
        default(&mut pod);
        pod
    }

    fn told(spec: Value) -> Vec<String> {
        validate(&complete(spec), None).into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn a_plain_pod_gets_what_kubernetes_gives_it() {
        let pod = complete(json!({"containers": [{"name": "a", "image": "nginx", "ports": [{"containerPort": 80}]}],
            "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}}]}));
        let expected = json!({
            "containers": [{"name": "a", "image": "nginx", "imagePullPolicy": "Always", "resources": {},
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority", "priority": 0,
            "restartPolicy": "Always", "schedulerName": "default-scheduler", "securityContext": {},
            "terminationGracePeriodSeconds": 30,
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]});
        assert_eq!(pod["spec"], expected);
        assert_eq!(pod["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
        assert!(validate(&pod, None).is_empty());
        let kind = kinds::find("", "pods").unwrap();
        assert!(strict::check(&kind.schema, &kind.types, &pod).is_clean());
        assert!(strict::validate_values(&kind.schema, &kind.types, &pod).is_empty());
    }

    #[test]
    fn classes_of_service() {
        let class = |resources: Value| qos_class(&json!({"containers": [{"resources": resources}]}));
        assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Gi"}})), "Guaranteed");
        assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}})), "Burstable");
        assert_eq!(class(json!({"requests": {"cpu": 1}})), "Burstable");
        assert_eq!(class(json!({})), "BestEffort");
    }

    #[test]
    fn what_is_wrong_is_told_where_it_is() {
        let problems = told(json!({
            "containers": [
                {"name": "A", "image": "", "ports": [{"containerPort": 70000, "protocol": "ICMP"}],
                 "env": [{"name": "x", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                         {"name": "y", "valueFrom": {}}, {"name": "z", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}],
                 "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}},
                 "volumeMounts": [{"name": "gone", "mountPath": "/x"}]},
                {"name": "b", "image": "i", "livenessProbe": {"httpGet": {"port": 80}, "exec": {"command": ["x"]}}},
                {"name": "b", "image": "i", "readinessProbe": {}}],
            "volumes": [{"name": "v", "hostPath": {"path": "/a/../b"}}],
            "restartPolicy": "Sometimes", "runtimeClassName": "Foo"}));
        let expected = [
            "spec.volumes[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'",
            "spec.containers[0].name: Invalid value: \"A\": a lowercase RFC 1123 label must",
            "spec.containers[0].image: Required value",
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
            "spec.containers[0].ports[0].protocol: Unsupported value: \"ICMP\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
            "spec.containers[0].env[0].valueFrom: Invalid value: \"\": may not be specified when `value` is not empty",
            "spec.containers[0].env[1].valueFrom: Invalid value: \"\": must specify one of: `fieldRef`,",
            "spec.containers[0].env[2].valueFrom.fieldRef.fieldPath: Invalid value: \"spec.foo\": error converting fieldPath",
            "spec.containers[0].volumeMounts[0].name: Not found: \"gone\"",
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
            "spec.containers[1].livenessProbe.httpGet: Forbidden: may not specify more than 1 handler type",
            "spec.containers[2].name: Duplicate value: \"b\"",
            "spec.containers[2].readinessProbe: Required value: must specify a handler type",
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
            "spec.runtimeClassName: Invalid value: \"Foo\": a lowercase RFC 1123 subdomain",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, start) in problems.iter().zip(expected) {
            assert!(problem.starts_with(start), "{problem}\n{start}");
        }
    }

    #[test]
    fn only_a_few_fields_may_change() {
        let old = complete(json!({"containers": [{"name": "a", "image": "i"}]}));
        let changed = |change: fn(&mut Value)| {
            let mut new = old.clone();
            change(&mut new);
            validate(&new, Some(&old)).into_iter().map(|c| c.field).collect::<Vec<_>>()
        };
        assert!(changed(|pod| pod["spec"]["containers"][0]["image"] = "j".into()).is_empty());
        assert!(changed(|pod| pod["spec"]["nodeName"] = "n".into()).is_empty());
        assert!(changed(|pod| pod["status"]["phase"] = "Running".into()).is_empty());
        assert_eq!(changed(|pod| pod["spec"]["containers"][0]["command"] = json!(["x"])), ["spec"]);
        assert_eq!(changed(|pod| pod["spec"]["restartPolicy"] = "Never".into()), ["spec"]);
        assert_eq!(changed(|pod| pod["spec"]["tolerations"] = json!([])), ["spec.tolerations"]);
    }
}
