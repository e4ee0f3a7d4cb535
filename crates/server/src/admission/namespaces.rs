//! Namespaces: what they are born with, and how they end. Their contents are removed by a controller, which empties
//! `spec.finalizers` through `namespaces/finalize` when nothing is left.

use super::{Effects, Operation, also};
use crate::auth::{Permit, User};
use crate::core::{Core, Target};
use api::networks::NETWORK;
use api::object::{Meta, Object, child, object_of};
use api::status::StatusResult;
use serde_json::{Value, json};
use std::net::IpAddr;

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
        check_network(target, object)?;
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

/// The sources that the namespace's workloads have outside must be addresses that a host can have, one of a family.
fn check_egress_address(target: &Target, object: &Object) -> StatusResult<()> {
    const NAME: &str = "atoll.dev/egress-address";
    let Some(text) = object.annotation(NAME) else { return Ok(()) };
    if are_a_hosts(text) {
        return Ok(());
    }
    let why = format!(
        "Invalid value: \"{text}\": must be one of the host's IPv4 addresses, one of its IPv6 addresses, or both, like \
         192.0.2.7,2001:db8::7"
    );
    Err(target.invalid(vec![crate::rest::cause("FieldValueInvalid", &format!("metadata.annotations[{NAME}]"), why)]))
}

fn are_a_hosts(text: &str) -> bool {
    let parsed: Vec<Option<IpAddr>> = text.split(',').map(|one| one.trim().parse().ok()).collect();
    let of = |v6: bool| parsed.iter().flatten().filter(|address| address.is_ipv6() == v6).count();
    parsed.iter().all(|address| address.is_some_and(is_a_hosts)) && of(false) <= 1 && of(true) <= 1
}

fn is_a_hosts(address: IpAddr) -> bool {
    if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
        return false;
    }
    match address {
        IpAddr::V4(own) => !own.is_link_local() && (1..224).contains(&own.octets()[0]),
        IpAddr::V6(own) => !own.is_unicast_link_local() && own.to_ipv4_mapped().is_none(),
    }
}

/// The Network of pods that name none must have a name that a Network can have.
fn check_network(target: &Target, object: &Object) -> StatusResult<()> {
    let Some(name) = object.annotation(NETWORK).filter(|name| !name.is_empty()) else { return Ok(()) };
    let Some(problem) = api::names::dns_subdomain(name).into_iter().next() else { return Ok(()) };
    let why = format!("Invalid value: \"{name}\": {problem}");
    Err(target.invalid(vec![crate::rest::cause("FieldValueInvalid", &format!("metadata.annotations[{NETWORK}]"), why)]))
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

#[cfg(test)]
mod tests {
    use super::are_a_hosts;

    #[test]
    fn egress_addresses_are_a_hosts_one_of_a_family() {
        for good in ["192.0.2.7", "2001:db8::7", "192.0.2.7,2001:db8::7", "fd00::7, 192.0.2.7"] {
            assert!(are_a_hosts(good), "{good}");
        }
        for bad in [
            "",
            "nowhere",
            "192.0.2.7,",
            "192.0.2.7/32",
            "192.0.2.7,192.0.2.8",
            "2001:db8::7,2001:db8::8",
            "127.0.0.1",
            "0.0.0.0",
            "169.254.1.1",
            "240.0.0.1",
            "224.0.0.1",
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:192.0.2.7",
        ] {
            assert!(!are_a_hosts(bad), "{bad}");
        }
    }
}
