//! Namespaces: what they are born with, and how they end. Their contents are removed by a controller, which empties
//! `spec.finalizers` through `namespaces/finalize` when nothing is left.

use super::{Effects, Operation, also};
use crate::auth::{Permit, User};
use crate::core::{Core, Target};
use api::object::{Meta, Object, child, object_of};
use api::status::StatusResult;
use serde_json::{Value, json};

/// Namespaces without which nothing works.
pub const INITIAL: [&str; 4] = ["default", "kube-system", "kube-node-lease", "kube-public"];
const PROTECTED: [&str; 3] = ["default", "kube-system", "kube-public"];

pub fn admit(
    core: &Core,
    permit: &Permit,
    target: &Target,
    operation: Operation<'_>,
    object: &mut Object,
) -> StatusResult<Effects> {
    let mut effects = Effects::default();
    match operation {
        Operation::Create => {
            let name = object.name().to_owned();
            object.set_label("kubernetes.io/metadata.name", &name);
            let spec = child(object_of(object), "spec");
            spec.insert("finalizers".into(), json!(["kubernetes"]));
            child(object_of(object), "status").insert("phase".into(), "Active".into());
            also(core, "", "serviceaccounts", default_account(&name), &mut effects)?;
        }
        Operation::Update { live, subresource } => {
            let name = object.name().to_owned();
            object.set_label("kubernetes.io/metadata.name", &name);
            // Only `finalize` changes them, or the control plane when the namespace goes.
            let ours = live.is_deleting() && permit.user().name == User::internal().name;
            if subresource != "finalize"
                && !ours
                && let Some(list) = live.pointer("/spec/finalizers")
            {
                child(object_of(object), "spec").insert("finalizers".into(), list.clone());
            }
        }
        Operation::Delete => {
            if PROTECTED.contains(&target.name.as_str()) {
                return Err(target.forbidden("this namespace may not be deleted"));
            }
            child(object_of(object), "status").insert("phase".into(), "Terminating".into());
        }
    }
    Ok(effects)
}

pub fn has_finalizers(object: &Object) -> bool {
    object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty())
}

/// The account that pods of the namespace run as unless they say otherwise.
fn default_account(namespace: &str) -> Object {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {
        "name": "default", "namespace": namespace, "uid": api::names::uid(),
        "creationTimestamp": api::time::now_rfc3339()}})
}
