//! From API objects to the routing table: which routes attach to which listeners, and what their references mean.
//!
//! What is wrong with one route, rule or backend concerns only that: a rule that cannot be understood answers 500, a
//! route that does not attach is not there.

use super::attach::{self, Gateway, Role, Served};
use super::convert;
use super::host::HostPattern;
use super::references::References;
use super::rules::{self, Owner};
use super::table::{Entry, Hosts, Table};
use super::wire::{GrpcRouteSpec, IngressSpec, RouteSpec, RuleSpec};
use crate::policy::{Attached, Policy};
use crate::upstream::{Upstreams, fingerprint};
use api::object::{Meta, SharedObject};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::Arc;

pub const GROUP: &str = "gateway.networking.k8s.io";
/// Of an IngressClass: Ingresses without a class are of this one.
const IS_DEFAULT: &str = "/metadata/annotations/ingressclass.kubernetes.io~1is-default-class";
/// How an Ingress named its class before there were classes.
const OLD_CLASS: &str = "/metadata/annotations/kubernetes.io~1ingress.class";

/// Everything the table is made from.
#[derive(Default)]
pub struct Objects {
    pub classes: Vec<SharedObject>,
    pub gateways: Vec<SharedObject>,
    pub routes: Vec<SharedObject>,
    pub grpc_routes: Vec<SharedObject>,
    pub tls_routes: Vec<SharedObject>,
    pub ingresses: Vec<SharedObject>,
    pub ingress_classes: Vec<SharedObject>,
    pub services: Vec<SharedObject>,
    pub namespaces: Vec<SharedObject>,
    pub grants: Vec<SharedObject>,
    pub secrets: Vec<SharedObject>,
    pub config_maps: Vec<SharedObject>,
    /// TrafficPolicies.
    pub policies: Vec<SharedObject>,
    pub backend_policies: Vec<SharedObject>,
}

#[derive(Clone, Copy)]
enum Kind {
    Http,
    Grpc,
    Ingress,
}

struct Builder<'a> {
    objects: &'a Objects,
    references: References<'a>,
    policies: &'a Attached,
    plain: Vec<(HostPattern, Entry)>,
    secure: Vec<(HostPattern, Entry)>,
}

/// Builds the table for Gateways of `class` (or of a class that names Atoll as its controller). `upstreams` is told
/// which Service ports are in use.
pub fn build(objects: &Objects, class: &str, upstreams: &mut Upstreams, policies: &Attached) -> Table {
    let gateways = attach::gateways(objects, class);
    let ingresses = ingresses(objects, class);
    let of = |kind: Kind| move |route| (kind, route);
    let mut routes: Vec<(Kind, &SharedObject)> = objects.routes.iter().map(of(Kind::Http)).collect();
    routes.extend(objects.grpc_routes.iter().map(of(Kind::Grpc)));
    routes.extend(ingresses.into_iter().map(of(Kind::Ingress)));
    routes.retain(|(_, route)| !route.is_deleting());
    // Ties between equal matches: the oldest route, then the first by name.
    routes.sort_by_key(|(_, r)| (r.str_at("/metadata/creationTimestamp").to_owned(), r.namespace(), r.name()));
    let references = References::new(objects, upstreams);
    let mut builder = Builder { objects, references, policies, plain: Vec::new(), secure: Vec::new() };
    for (kind, route) in routes {
        match kind {
            Kind::Http => builder.attach("HTTPRoute", false, route, spec::<RouteSpec>(route), &gateways),
            Kind::Grpc => {
                let spec = spec::<GrpcRouteSpec>(route).map(convert::grpc);
                builder.attach("GRPCRoute", true, route, spec, &gateways);
            }
            Kind::Ingress => builder.ingress(route),
        }
    }
    Table { plain: Hosts::new(builder.plain), secure: Hosts::new(builder.secure) }
}

/// An object's `spec`; one that cannot be read is told of and passed over.
pub fn spec<T: DeserializeOwned>(object: &SharedObject) -> Option<T> {
    let spec = T::deserialize(object.get("spec").unwrap_or(&Value::Null));
    if let Err(error) = &spec {
        tracing::warn!(object = %format_args!("{}/{}", object.namespace(), object.name()), "not served: {error}");
    }
    spec.ok()
}

/// The Ingresses of our classes.
pub fn ingresses<'a>(objects: &'a Objects, class: &str) -> Vec<&'a SharedObject> {
    let ours = |c: &&SharedObject| c.str_at("/spec/controller").starts_with("atoll.dev/");
    let classes: Vec<&SharedObject> = objects.ingress_classes.iter().filter(ours).collect();
    let default = classes.iter().any(|class| class.str_at(IS_DEFAULT) == "true");
    let is_ours = |ingress: &&SharedObject| match (ingress.str_at("/spec/ingressClassName"), ingress.str_at(OLD_CLASS))
    {
        ("", "") => default,
        ("", name) | (name, _) => name == class || classes.iter().any(|class| class.name() == name),
    };
    objects.ingresses.iter().filter(is_ours).collect()
}

impl Builder<'_> {
    fn attach(
        &mut self,
        kind: &'static str,
        http2: bool,
        route: &SharedObject,
        spec: Option<RouteSpec>,
        gateways: &[Gateway],
    ) {
        let Some(spec) = spec else { return };
        let hosts = attach::hosts(self.objects, kind, route, &spec, gateways);
        let name = format!("{}/{}", route.namespace(), route.name()).into();
        let owner = Owner { name, namespace: route.namespace(), kind, http2 };
        self.rules(&owner, &spec, &hosts);
    }

    /// An Ingress is served at every listener there is.
    fn ingress(&mut self, ingress: &SharedObject) {
        let Some(spec) = spec::<IngressSpec>(ingress) else { return };
        let namespace = ingress.namespace();
        let name: Arc<str> = format!("{namespace}/{}", ingress.name()).into();
        for spec in convert::ingress(spec, namespace, &self.references) {
            let host = spec.hostnames.first().map_or(HostPattern::Any, |host| HostPattern::parse(host));
            let hosts = [Role::Plain, Role::Secure].map(|role| Served {
                host: host.clone(),
                role,
                hidden: Arc::from([]),
                gateway: (String::new(), String::new()),
            });
            let owner = Owner { name: name.clone(), namespace, kind: "Ingress", http2: false };
            self.rules(&owner, &spec, &hosts);
        }
    }

    fn rules(&mut self, owner: &Owner<'_>, spec: &RouteSpec, hosts: &[Served]) {
        if hosts.is_empty() {
            return;
        }
        let name = owner.name.split_once('/').map_or("", |(_, name)| name);
        let policies: Vec<Arc<[Arc<Policy>]>> = hosts
            .iter()
            .map(|served| {
                let (namespace, gateway) = &served.gateway;
                let of_gateway = self.policies.of("Gateway", namespace, gateway);
                of_gateway.iter().chain(self.policies.of(owner.kind, owner.namespace, name)).cloned().collect()
            })
            .collect();
        let everything = [RuleSpec::default()];
        for spec in spec.rules.as_deref().unwrap_or(&everything) {
            let (conditions, bad) = rules::conditions(spec);
            let mut rule = rules::rule(owner, spec, bad, &mut self.references);
            if policies.iter().any(|policies| policies.iter().any(|policy| policy.cache.is_some())) {
                rule.id = fingerprint(&[owner.kind, &owner.name, &format!("{spec:?}")]);
            }
            let rule = Arc::new(rule);
            for condition in conditions {
                for (served, policies) in hosts.iter().zip(&policies) {
                    let entry = Entry {
                        condition: condition.clone(),
                        rule: rule.clone(),
                        hidden: served.hidden.clone(),
                        policies: policies.clone(),
                    };
                    let list = if served.role == Role::Plain { &mut self.plain } else { &mut self.secure };
                    list.push((served.host.clone(), entry));
                }
            }
        }
    }
}
