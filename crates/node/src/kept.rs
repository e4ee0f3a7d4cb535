//! Addresses that outlive workloads: a machine's is its own as long as the machine is there, started or not; a pod's, where it
//! asks for that or a StatefulSet made it, goes to the next pod of its name.

use crate::ports::Networks;
use api::Object;
use api::client::Client;
use api::kind::Resource;
use api::object::Meta;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Written by the machines' controller: `vm/NAMESPACE/NAME`.
pub(crate) const ADDRESS_KEY: &str = "atoll.dev/address-key";
const KEEP: &str = "atoll.dev/keep-address";
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long a pod's address waits for the next pod of its name.
const WAITS: Duration = Duration::from_secs(3600);

/// Whose address a pod asks for beyond its own life, or why it may not. Keys name the pod's own namespace: nobody takes over
/// another's address.
pub(crate) fn key(pod: &Object, machine: bool) -> Result<Option<String>, String> {
    let namespace = pod.namespace();
    if let Some(key) = pod.annotation(ADDRESS_KEY) {
        let own = machine
            && key.strip_prefix("vm/").and_then(|rest| rest.strip_prefix(namespace)).is_some_and(|rest| {
                let name = rest.strip_prefix('/').unwrap_or_default();
                !name.is_empty() && !name.contains('/')
            });
        return if own {
            Ok(Some(key.to_owned()))
        } else {
            Err(format!(
                "metadata.annotations[{ADDRESS_KEY}]: {key:?}: only machines of namespace {namespace} have such a key; pods \
                 keep their address with {KEEP}: \"true\""
            ))
        };
    }
    let owners = pod.pointer("/metadata/ownerReferences").and_then(Value::as_array).into_iter().flatten();
    let stateful = owners.into_iter().any(|owner| {
        owner.str_at("/kind") == "StatefulSet" && owner.pointer("/controller").and_then(Value::as_bool) == Some(true)
    });
    let keeps = match pod.annotation(KEEP) {
        Some("true") => true,
        Some("false") => false,
        None => stateful,
        Some(other) => return Err(format!("metadata.annotations[{KEEP}]: {other:?}: must be \"true\" or \"false\"")),
    };
    Ok(keeps.then(|| format!("pod/{namespace}/{}", pod.name())))
}

/// Gives back, from time to time, addresses whose owner is gone for good.
pub(crate) async fn run(client: Arc<dyn Client>, networks: Arc<dyn Networks>) {
    let mut idle_since: HashMap<String, Instant> = HashMap::new();
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let idle = networks.idle_addresses().await;
        idle_since.retain(|key, _| idle.contains(key));
        for key in idle {
            let since = *idle_since.entry(key.clone()).or_insert_with(Instant::now);
            if !is_gone(client.as_ref(), &key, since.elapsed()).await {
                continue;
            }
            match networks.release_address(&key).await {
                Ok(()) => tracing::debug!(key, "the address of what is gone is free again"),
                Err(error) => tracing::warn!(key, "cannot give an address back: {error}"),
            }
        }
    }
}

/// Whether nobody will ask for this key's address again, which has been idle for so long.
async fn is_gone(client: &dyn Client, key: &str, idle: Duration) -> bool {
    let mut parts = key.splitn(3, '/');
    let (Some(kind), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else { return true };
    let kinds: &[(&str, &str)] = match kind {
        "vm" => &[("virtualmachines", "v1"), ("virtualmachineinstances", "v1")],
        "pod" if idle < WAITS => {
            return is_missing(client, &Resource::new("", "v1", "namespaces"), "", namespace).await;
        }
        _ => &[],
    };
    for (plural, version) in kinds {
        if !is_missing(client, &Resource::new("kubevirt.io", version, plural), namespace, name).await {
            return false;
        }
    }
    true
}

async fn is_missing(client: &dyn Client, resource: &Resource, namespace: &str, name: &str) -> bool {
    client.get(resource, namespace, name).await.is_err_and(|status| status.is_not_found())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(annotations: Value, owner: &str) -> Object {
        let owners = json!([{"kind": owner, "name": "db", "controller": true}]);
        json!({"metadata": {"name": "db-0", "namespace": "a", "annotations": annotations, "ownerReferences": owners}})
    }

    #[test]
    fn keys_are_of_the_own_namespace() {
        let machine = |key: &str| super::key(&pod(json!({ADDRESS_KEY: key}), ""), true);
        assert_eq!(machine("vm/a/db"), Ok(Some("vm/a/db".into())));
        for foreign in ["vm/b/db", "vm/a", "vm/a/", "vm/ab/db", "vm/a/x/y", "pod/a/db-0", "a/db", "", "vm//db"] {
            assert!(machine(foreign).is_err(), "{foreign}");
        }
        let error = super::key(&pod(json!({ADDRESS_KEY: "vm/a/db"}), ""), false).unwrap_err();
        assert!(error.contains("atoll.dev/keep-address"), "{error}");
    }

    #[test]
    fn pods_keep_their_address_where_they_ask_or_have_a_name_for_life() {
        let of = |annotations, owner| super::key(&pod(annotations, owner), false);
        assert_eq!(of(json!({}), "ReplicaSet"), Ok(None));
        assert_eq!(of(json!({}), "StatefulSet"), Ok(Some("pod/a/db-0".into())));
        assert_eq!(of(json!({KEEP: "true"}), "ReplicaSet"), Ok(Some("pod/a/db-0".into())));
        assert_eq!(of(json!({KEEP: "false"}), "StatefulSet"), Ok(None));
        assert!(of(json!({KEEP: "yes"}), "").is_err());
    }
}
