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
    if let Operation::Create | Operation::Update { .. } = operation {
        check_egress_address(target, object)?;
    }
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

/// The source that the namespace's workloads have outside must be an address that a host can have.
fn check_egress_address(target: &Target, object: &Object) -> StatusResult<()> {
    const NAME: &str = "atoll.dev/egress-address";
    let Some(text) = object.annotation(NAME) else { return Ok(()) };
    let usable = text.parse::<std::net::Ipv4Addr>().is_ok_and(|address| {
        let first = address.octets()[0];
        !address.is_loopback() && !address.is_link_local() && first != 0 && first < 224
    });
    if usable {
        return Ok(());
    }
    let why = format!("Invalid value: \"{text}\": must be one of the host's IPv4 addresses, like 192.0.2.7");
    Err(target.invalid(vec![crate::rest::cause("FieldValueInvalid", &format!("metadata.annotations[{NAME}]"), why)]))
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
