//! What references mean: Services and their ports, and what a ReferenceGrant lets cross namespaces.

use super::build::{GROUP, Objects};
use super::rules::Owner;
use super::table::Target;
use super::wire::BackendRef;
use crate::upstream::Upstreams;
use api::object::{Meta, SharedObject};
use serde_json::Value;
use std::collections::HashMap;

pub struct References<'a> {
    services: HashMap<(&'a str, &'a str), &'a SharedObject>,
    grants: &'a [SharedObject],
    upstreams: &'a mut Upstreams,
}

/// Who refers: kind and namespace.
#[derive(Clone, Copy)]
pub struct From<'a> {
    pub kind: &'a str,
    pub namespace: &'a str,
}

/// Whether an object may refer to the one of (group, kind) named `name` in `namespace`.
pub fn granted(grants: &[SharedObject], from: From<'_>, to: (&str, &str), namespace: &str, name: &str) -> bool {
    if from.namespace == namespace {
        return true;
    }
    let list = |grant: &SharedObject, at: &str| -> Vec<Value> {
        grant.pointer(at).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    grants.iter().filter(|grant| grant.namespace() == namespace).any(|grant| {
        let source = list(grant, "/spec/from").iter().any(|f| {
            (f.str_at("/group"), f.str_at("/kind"), f.str_at("/namespace")) == (GROUP, from.kind, from.namespace)
        });
        source
            && list(grant, "/spec/to")
                .iter()
                .any(|t| (t.str_at("/group"), t.str_at("/kind")) == to && ["", name].contains(&t.str_at("/name")))
    })
}

impl<'a> References<'a> {
    pub fn new(objects: &'a Objects, upstreams: &'a mut Upstreams) -> References<'a> {
        let services = objects.services.iter().map(|s| ((s.namespace(), s.name()), s)).collect();
        References { services, grants: &objects.grants, upstreams }
    }

    /// The number of a Service's port of that name.
    pub fn port_named(&self, namespace: &str, service: &str, port: &str) -> Option<u16> {
        let ports = self.services.get(&(namespace, service))?.pointer("/spec/ports")?.as_array()?;
        let found = ports.iter().find(|known| known.str_at("/name") == port)?;
        found.get("port")?.as_u64()?.try_into().ok()
    }

    pub fn target(&mut self, owner: &Owner<'_>, reference: &BackendRef) -> Target {
        let invalid = |why: String| Target::Invalid(why.into());
        let (group, kind) = (reference.group.as_deref().unwrap_or(""), reference.kind.as_deref().unwrap_or("Service"));
        let (namespace, name) = (reference.namespace.as_deref().unwrap_or(owner.namespace), reference.name.as_str());
        if (group, kind) != ("", "Service") {
            return invalid(format!("backend {name:?} is a {kind} of group {group:?}; only Services are served"));
        }
        let Some(port) = reference.port else {
            return invalid(format!("backend {name:?} names no port"));
        };
        let from = From { kind: owner.kind, namespace: owner.namespace };
        if !granted(self.grants, from, ("", "Service"), namespace, name) {
            return invalid(format!("no ReferenceGrant in {namespace:?} lets {:?} refer to {name:?}", owner.namespace));
        }
        let Some(service) = self.services.get(&(namespace, name)) else {
            return invalid(format!("there is no service {namespace}/{name}"));
        };
        if service.str_at("/spec/type") == "ExternalName" {
            return invalid(format!("service {namespace}/{name} is of type ExternalName"));
        }
        let ports = service.pointer("/spec/ports").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let number = |p: &&Value| p.get("port").and_then(Value::as_u64) == Some(u64::from(port));
        let Some(found) = ports.iter().find(number) else {
            return invalid(format!("service {namespace}/{name} has no port {port}"));
        };
        let http2 = owner.http2 || matches!(found.str_at("/appProtocol"), "kubernetes.io/h2c" | "grpc");
        Target::Upstream(self.upstreams.want(namespace, name, port, found.str_at("/name"), http2))
    }
}
