//! What must be there before anyone asks: namespaces, the service `kubernetes`, the runtime classes.

use crate::admission::namespaces::INITIAL;
use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::rest::WriteOptions;
use api::object::Object;
use api::status::{Reason, StatusResult};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};

/// Names of the boundaries a pod can ask for; the handler of each is called the same.
const RUNTIME_CLASSES: [&str; 3] = ["container", "microvm", "wasm"];

/// Makes what is missing; what is there stays as it is.
pub async fn run(core: &Core, api: SocketAddr) -> StatusResult<()> {
    for name in INITIAL {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        make(core, "", "v1", "namespaces", "", object).await?;
    }
    for name in RUNTIME_CLASSES {
        let object = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name},
                            "handler": name});
        make(core, "node.k8s.io", "v1", "runtimeclasses", "", object).await?;
    }
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {"type": "ClusterIP", "clusterIP": core.services.api_address().to_string(),
                 "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": api.port()}]}});
    make(core, "", "v1", "services", "default", service).await?;
    // An address that only this host can reach is no endpoint for pods.
    if let IpAddr::V4(address) = api.ip()
        && !address.is_loopback()
        && !address.is_unspecified()
    {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": "IPv4", "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": api.port(), "protocol": "TCP"}]});
        make(core, "discovery.k8s.io", "v1", "endpointslices", "default", slice).await?;
    }
    Ok(())
}

async fn make(
    core: &Core,
    group: &str,
    version: &str,
    plural: &str,
    namespace: &str,
    object: Object,
) -> StatusResult<()> {
    let kinds = core.kinds.current();
    let Some(kind) = kinds.get(group, version, plural) else { return Ok(()) };
    let name = object.pointer("/metadata/name").and_then(|n| n.as_str()).unwrap_or("").to_owned();
    if core.fetch(kind, namespace, &name).await?.is_some() {
        return Ok(());
    }
    let options = WriteOptions { manager: "atoll".into(), ..WriteOptions::default() };
    match core.create(&Permit::internal(), &Target::new(kind, namespace, ""), object, &options).await {
        Err(status) if status.reason != Reason::AlreadyExists => Err(status),
        _ => Ok(()),
    }
}
