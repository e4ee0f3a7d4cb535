//! Pods: the account they run as, their runtime class, requests that follow limits, binding and eviction.

use super::{Effects, Operation, lookup};
use crate::core::{Core, Target};
use api::object::{Meta, Object, child, object_of};
use api::status::StatusResult;
use serde_json::{Value, json};

/// When neither the pod nor the request says.
const GRACE_SECONDS: i64 = 30;

pub async fn admit(
    core: &Core,
    target: &Target,
    operation: Operation<'_>,
    object: &mut Object,
) -> StatusResult<Effects> {
    let Operation::Create = operation else { return Ok(Effects::default()) };
    let spec = child(object_of(object), "spec");
    let account = match spec.get("serviceAccountName").and_then(Value::as_str) {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => match spec.get("serviceAccount").and_then(Value::as_str) {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => "default".to_owned(),
        },
    };
    spec.insert("serviceAccountName".into(), account.as_str().into());
    spec.insert("serviceAccount".into(), account.as_str().into());
    for list in ["containers", "initContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            requests_from_limits(container);
        }
    }
    let class = spec.get("runtimeClassName").and_then(Value::as_str).unwrap_or("").to_owned();
    if account != "default" && lookup(core, "", "serviceaccounts", &target.namespace, &account).await?.is_none() {
        let namespace = &target.namespace;
        return Err(target.forbidden(&format!(
            "error looking up service account {namespace}/{account}: serviceaccount \"{account}\" not found"
        )));
    }
    if !class.is_empty() {
        let Some(class_object) = lookup(core, "node.k8s.io", "runtimeclasses", "", &class).await? else {
            return Err(target.forbidden(&format!("pod rejected: RuntimeClass \"{class}\" not found")));
        };
        if let Some(overhead) = class_object.pointer("/overhead/podFixed") {
            child(object_of(object), "spec").insert("overhead".into(), overhead.clone());
        }
    }
    Ok(Effects::default())
}

/// A limit without a request asks for as much as it allows.
fn requests_from_limits(container: &mut Value) {
    let Some(limits) = container.pointer("/resources/limits").and_then(Value::as_object).cloned() else { return };
    let resources = child(object_of(container), "resources");
    let requests = child(resources, "requests");
    for (name, limit) in limits {
        requests.entry(name).or_insert(limit);
    }
    if requests.is_empty() {
        resources.remove("requests");
    }
}

/// A pod that runs nowhere needs no time to end.
pub fn grace_period(live: &Object, asked: Option<i64>) -> i64 {
    let own = live.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(GRACE_SECONDS);
    let bound = !live.str_at("/spec/nodeName").is_empty();
    let ended = matches!(live.str_at("/status/phase"), "Succeeded" | "Failed");
    if !bound || ended { 0 } else { asked.unwrap_or(own).max(0) }
}

/// The pod with `binding` carried out.
pub fn bound(target: &Target, live: &Object, binding: &Object) -> StatusResult<Object> {
    let node = binding.str_at("/target/name");
    if node.is_empty() {
        let problem = crate::rest::cause("FieldValueRequired", "target.name", "Required value");
        return Err(api::Status::invalid("", "Binding", &target.name, vec![problem]));
    }
    let kind = binding.str_at("/target/kind");
    if !kind.is_empty() && kind != "Node" {
        let problem = crate::rest::cause(
            "FieldValueNotSupported",
            "target.kind",
            format!("Unsupported value: \"{kind}\": supported values: \"Node\", \"<empty>\""),
        );
        return Err(api::Status::invalid("", "Binding", &target.name, vec![problem]));
    }
    let uid = binding.uid();
    if !uid.is_empty() && uid != live.uid() {
        return Err(target.conflict(&format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            live.uid()
        )));
    }
    if live.is_deleting() {
        return Err(target.conflict(&format!("pod {} is being deleted, cannot be assigned to a host", target.name)));
    }
    let now = live.str_at("/spec/nodeName");
    if !now.is_empty() {
        return Err(target.conflict(&format!("pod {} is already assigned to node \"{now}\"", target.name)));
    }
    let mut new = live.clone();
    child(object_of(&mut new), "spec").insert("nodeName".into(), node.into());
    for (key, value) in binding.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten() {
        new.set_annotation(key, value.as_str().unwrap_or(""));
    }
    let status = child(object_of(&mut new), "status");
    let conditions = status.entry("conditions").or_insert_with(|| json!([]));
    if let Some(list) = conditions.as_array_mut() {
        list.retain(|c| c.get("type").and_then(Value::as_str) != Some("PodScheduled"));
        list.push(json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
                         "lastTransitionTime": api::time::now_rfc3339()}));
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_periods() {
        let pod = |node: &str, phase: &str| json!({"spec": {"nodeName": node, "terminationGracePeriodSeconds": 7}, "status": {"phase": phase}});
        assert_eq!(grace_period(&pod("", "Pending"), Some(5)), 0);
        assert_eq!(grace_period(&pod("n", "Running"), None), 7);
        assert_eq!(grace_period(&pod("n", "Running"), Some(0)), 0);
        assert_eq!(grace_period(&pod("n", "Failed"), Some(9)), 0);
    }

    #[test]
    fn requests_follow_limits() {
        let mut container =
            json!({"resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "100m"}}});
        requests_from_limits(&mut container);
        assert_eq!(container["resources"]["requests"], json!({"cpu": "100m", "memory": "1Gi"}));
    }
}
