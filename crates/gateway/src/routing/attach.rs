//! Which listeners there are, and which routes may be attached to them.

use super::build::{GROUP, Objects};
use super::host::{HostPattern, intersect};
use super::wire::{GatewaySpec, Listener, ParentRef, RouteKind, RouteSpec};
use api::object::{Meta, SharedObject};
use api::selector::Selector;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Arc;

pub struct Gateway {
    pub namespace: String,
    pub name: String,
    pub spec: GatewaySpec,
    pub listeners: Vec<Bound>,
}

pub struct Bound {
    pub listener: Listener,
    pub host: HostPattern,
    pub role: Role,
}

/// What is done at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Plain,
    /// TLS is terminated, HTTP is served.
    Secure,
    /// TLS is passed on as it comes.
    Passthrough,
}

impl Role {
    fn of(listener: &Listener) -> Option<Role> {
        match (listener.protocol.as_str(), listener.tls.mode.as_str()) {
            ("HTTP", _) => Some(Role::Plain),
            ("HTTPS", "Terminate" | "") => Some(Role::Secure),
            ("TLS", "Passthrough") => Some(Role::Passthrough),
            _ => None,
        }
    }
}

/// The names of classes whose Gateways are served here.
pub fn classes<'a>(objects: &'a Objects, class: &'a str) -> HashSet<&'a str> {
    let ours = |c: &&SharedObject| c.str_at("/spec/controllerName").starts_with("atoll.dev/");
    objects.classes.iter().filter(ours).map(|class| class.name()).chain([class]).collect()
}

/// The oldest first.
pub fn gateways(objects: &Objects, class: &str) -> Vec<Gateway> {
    let classes = classes(objects, class);
    let mut sorted: Vec<&SharedObject> = objects.gateways.iter().collect();
    sorted.sort_by_key(|g| (g.str_at("/metadata/creationTimestamp").to_owned(), g.namespace(), g.name()));
    let mut all = Vec::new();
    for object in sorted {
        let Ok(mut spec) = GatewaySpec::deserialize(object.get("spec").unwrap_or(&Value::Null)) else { continue };
        if !classes.contains(spec.gateway_class_name.as_str()) || object.is_deleting() {
            continue;
        }
        let bound = |listener: Listener| {
            let (host, role) = (HostPattern::parse(&listener.hostname), Role::of(&listener)?);
            Some(Bound { listener, host, role })
        };
        let listeners = std::mem::take(&mut spec.listeners).into_iter().filter_map(bound).collect();
        let (namespace, name) = (object.namespace().to_owned(), object.name().to_owned());
        all.push(Gateway { namespace, name, spec, listeners });
    }
    all
}

/// A hostname that a route is served under, and where.
#[derive(PartialEq)]
pub struct Served {
    pub host: HostPattern,
    pub role: Role,
    /// Hosts that other listeners of the Gateway take.
    pub hidden: Arc<[HostPattern]>,
    /// Namespace and name of the Gateway.
    pub gateway: (String, String),
}

/// Under which hostnames the route is served, each with the hosts that other listeners of that Gateway take.
pub fn hosts(
    objects: &Objects,
    kind: &str,
    route: &SharedObject,
    spec: &RouteSpec,
    gateways: &[Gateway],
) -> Vec<Served> {
    let wanted: Vec<HostPattern> = if spec.hostnames.is_empty() {
        vec![HostPattern::Any]
    } else {
        spec.hostnames.iter().map(|host| HostPattern::parse(host)).collect()
    };
    let mut hosts: Vec<Served> = Vec::new();
    for (gateway, bound) in spec.parent_refs.iter().flat_map(|parent| attached(route, parent, gateways)) {
        let takes = match kind {
            "TLSRoute" => bound.role == Role::Passthrough,
            _ => bound.role != Role::Passthrough,
        };
        if !takes || !allows(objects, kind, &bound.listener, &gateway.namespace, route.namespace()) {
            continue;
        }
        let own = &bound.host;
        let others = gateway.listeners.iter().filter(|other| other.role == bound.role).map(|other| &other.host);
        let hidden: Arc<[HostPattern]> = others
            .filter(|other| other.specificity() > own.specificity() && intersect(other, own).is_some())
            .cloned()
            .collect();
        for host in wanted.iter().filter_map(|host| intersect(host, own)) {
            let gateway = (gateway.namespace.clone(), gateway.name.clone());
            let served = Served { host, role: bound.role, hidden: hidden.clone(), gateway };
            if !hosts.contains(&served) {
                hosts.push(served);
            }
        }
    }
    hosts
}

fn allows(objects: &Objects, kind: &str, listener: &Listener, gateway: &str, route: &str) -> bool {
    let allowed = &listener.allowed_routes;
    let fits = |k: &RouteKind| k.kind == kind && k.group.as_deref().unwrap_or(GROUP) == GROUP;
    if !allowed.kinds.is_empty() && !allowed.kinds.iter().any(fits) {
        return false;
    }
    match allowed.namespaces.from.as_str() {
        "All" => true,
        "Selector" => {
            let Ok(selector) = Selector::from_object(&allowed.namespaces.selector) else { return false };
            let namespace = objects.namespaces.iter().find(|namespace| namespace.name() == route);
            namespace.is_some_and(|namespace| selector.matches_object(namespace))
        }
        "Same" | "" => gateway == route,
        _ => false,
    }
}

/// The listeners that a parent reference names.
fn attached<'a>(route: &SharedObject, parent: &ParentRef, gateways: &'a [Gateway]) -> Vec<(&'a Gateway, &'a Bound)> {
    let kind = parent.kind.as_deref().unwrap_or("Gateway");
    if parent.group.as_deref().unwrap_or(GROUP) != GROUP || kind != "Gateway" {
        return Vec::new();
    }
    let namespace = parent.namespace.as_deref().unwrap_or(route.namespace());
    let named = gateways.iter().filter(|gateway| gateway.namespace == namespace && gateway.name == parent.name);
    named
        .flat_map(|gateway| gateway.listeners.iter().map(move |bound| (gateway, bound)))
        .filter(|(_, bound)| parent.section_name.as_ref().is_none_or(|section| *section == bound.listener.name))
        .filter(|(_, bound)| parent.port.is_none_or(|port| port == bound.listener.port))
        .collect()
}
