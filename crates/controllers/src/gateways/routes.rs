//! The status of HTTPRoutes, GRPCRoutes and TLSRoutes: for each Gateway of ours that a route names, whether it is attached
//! there, whether its backends exist, and whether an older route takes its requests.

use super::attach::{self, Parent};
use super::references::References;
use super::{CONTROLLER, GRANTS, GRPC_ROUTES, TLS_ROUTES, conflicts, is_ours};
use crate::context::{Condition, Context, GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, NAMESPACES, SERVICES};
use crate::context::{remove_condition, set_condition};
use crate::objects::{int, list};
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

/// Says that an older route gets requests which this one names too.
const CONFLICTED: &str = "atoll.dev/Conflicted";

pub(crate) struct Routes {
    context: Arc<Context>,
    kind: &'static str,
    resource: &'static Resource,
    references: References,
    classes: Informer,
    gateways: Informer,
    routes: Informer,
    services: Informer,
    namespaces: Informer,
}

pub(crate) fn http(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    new(context, "HTTPRoute", &HTTP_ROUTES)
}

pub(crate) fn grpc(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    new(context, "GRPCRoute", &GRPC_ROUTES)
}

pub(crate) fn tls(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    new(context, "TLSRoute", &TLS_ROUTES)
}

fn new(context: &Arc<Context>, kind: &'static str, resource: &'static Resource) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (classes, gateways) = (informers.of(&GATEWAY_CLASSES), informers.of(&GATEWAYS));
    let (routes, services) = (informers.of(resource), informers.of(&SERVICES));
    let namespaces = informers.of(&NAMESPACES);
    let all = |routes: &Informer, test: &dyn Fn(&SharedObject) -> bool| -> Vec<Key> {
        routes.list().iter().filter(|route| test(route)).map(Key::of).collect()
    };
    let known = routes.clone();
    let of_gateway = Source::new(gateways.clone(), move |gateway| {
        all(&known, &|route| attach::parents(route).any(|parent| parent.means(gateway)))
    });
    let known = routes.clone();
    let of_service = Source::new(services.clone(), move |service| {
        all(&known, &|route| backends(route).any(|backend| backend.str_at("/name") == service.name()))
    });
    let known = routes.clone();
    let of_namespace =
        Source::new(namespaces.clone(), move |namespace| known.list_in(namespace.name()).iter().map(Key::of).collect());
    let known = routes.clone();
    let of_class = Source::new(classes.clone(), move |_| known.keys());
    let known = routes.clone();
    let of_grant = Source::new(informers.of(&GRANTS), move |_| known.keys());
    let known = routes.clone();
    let own = Source::new(routes.clone(), move |route| {
        let mut keys = conflicts::neighbours(route, &known.list());
        keys.push(Key::new(route.namespace(), route.name()));
        keys
    });
    let sources = vec![own.filtered(changed), of_gateway, of_service, of_namespace, of_class, of_grant];
    let (context, references) = (Arc::clone(context), References::new(context));
    let reconciler = Routes { context, kind, resource, references, classes, gateways, routes, services, namespaces };
    (Arc::new(reconciler), sources)
}

/// A new status alone concerns nobody: it is this reconciler that writes it.
fn changed(old: Option<&Object>, new: Option<&Object>) -> bool {
    match (old, new) {
        (Some(old), Some(new)) => old.get("spec") != new.get("spec") || old.is_deleting() != new.is_deleting(),
        _ => true,
    }
}

fn backends(route: &Object) -> impl Iterator<Item = &Value> {
    list(route, "/spec/rules").iter().flat_map(|rule| list(rule, "/backendRefs"))
}

#[async_trait]
impl Reconcile for Routes {
    fn name(&self) -> &'static str {
        match self.kind {
            "GRPCRoute" => "grpcroute-controller",
            "TLSRoute" => "tlsroute-controller",
            _ => "httproute-controller",
        }
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(route) = self.routes.get_key(key) else { return Ok(None) };
        let known = list(&route, "/status/parents");
        // What other controllers say stays.
        let mut parents: Vec<Value> =
            known.iter().filter(|parent| parent.str_at("/controllerName") != CONTROLLER).cloned().collect();
        for parent in attach::parents(&route) {
            let gateway = self.gateways.get(&parent.namespace, &parent.name);
            if gateway.as_ref().is_some_and(|gateway| !is_ours(&self.classes, gateway)) {
                continue;
            }
            let same = |old: &&Value| {
                old.str_at("/controllerName") == CONTROLLER && old.get("parentRef") == Some(parent.reference)
            };
            let old = known.iter().find(same).and_then(|old| old.get("conditions"));
            parents.push(self.parent(&route, &parent, gateway.as_ref(), old));
        }
        if parents.is_empty() && route.get("status").is_none() {
            return Ok(None);
        }
        let mut status = route.get("status").cloned().unwrap_or_else(|| json!({}));
        object_of(&mut status).insert("parents".into(), parents.into());
        self.context.write_status(self.resource, &route, status).await?;
        Ok(None)
    }
}

impl Routes {
    fn parent(
        &self,
        route: &SharedObject,
        parent: &Parent<'_>,
        gateway: Option<&SharedObject>,
        known: Option<&Value>,
    ) -> Value {
        let mut status = json!({"parentRef": parent.reference, "controllerName": CONTROLLER,
                                "conditions": known.cloned().unwrap_or_else(|| json!([]))});
        let attached = match gateway {
            Some(gateway) => attach::listeners(gateway, self.kind, route, parent, &self.namespaces).map(drop),
            None => {
                let message = format!("Gateway {}/{} not found", parent.namespace, parent.name);
                Err(("NoMatchingParent", message))
            }
        };
        let resolved = self.resolve(route);
        let mut set = |kind, outcome: &Result<(), attach::Refusal>, good, message| {
            let new = match outcome {
                Ok(()) => Condition { kind, status: "True", reason: good, message },
                Err((reason, message)) => Condition { kind, status: "False", reason, message },
            };
            let extra = [("observedGeneration", json!(route.generation()))];
            set_condition(&mut status, new, &self.context.timestamp(), &extra);
        };
        set("Accepted", &attached, "Accepted", "Route is accepted");
        set("ResolvedRefs", &resolved, "ResolvedRefs", "All references are resolved");
        let same_parent = |other: &Object| {
            gateway.is_some_and(|gateway| {
                attach::parents(other)
                    .filter(|parent| parent.means(gateway))
                    .any(|parent| attach::listeners(gateway, self.kind, other, &parent, &self.namespaces).is_ok())
            })
        };
        match conflicts::winner(route, &self.routes.list(), same_parent) {
            None => remove_condition(&mut status, CONFLICTED),
            Some(winner) => {
                let message = format!(
                    "{} {}/{} is older and gets requests that this route names too",
                    self.kind,
                    winner.namespace(),
                    winner.name()
                );
                let new = Condition { kind: CONFLICTED, status: "True", reason: "OlderRouteWins", message: &message };
                let extra = [("observedGeneration", json!(route.generation()))];
                set_condition(&mut status, new, &self.context.timestamp(), &extra);
            }
        }
        status
    }

    fn resolve(&self, route: &SharedObject) -> Result<(), attach::Refusal> {
        for backend in backends(route) {
            let (group, kind) = (backend.str_at("/group"), backend.str_at("/kind"));
            if !group.is_empty() || !matches!(kind, "" | "Service") {
                return Err(("InvalidKind", format!("backendRef {kind} {group:?}: only Services can be backends")));
            }
            let name = backend.str_at("/name");
            let namespace = match backend.str_at("/namespace") {
                "" => route.namespace(),
                namespace => namespace,
            };
            if !self.references.granted(self.kind, route.namespace(), "Service", namespace, name) {
                let message = format!(
                    "backendRef {namespace}/{name} is in another namespace, and no ReferenceGrant there lets {}s of {:?} refer to it",
                    self.kind,
                    route.namespace()
                );
                return Err(("RefNotPermitted", message));
            }
            let Some(service) = self.services.get(namespace, name) else {
                return Err(("BackendNotFound", format!("Service {namespace}/{name} not found")));
            };
            let port = int(backend, "/port");
            if !list(&service, "/spec/ports").iter().any(|known| int(known, "/port") == port) {
                let port = port.map_or_else(|| "none".to_owned(), |port| port.to_string());
                return Err(("BackendNotFound", format!("Service {namespace}/{name} has no port {port}")));
            }
        }
        Ok(())
    }
}
