//! The status of HTTPRoutes: for each Gateway of ours that a route names, whether it is attached there and whether its
//! backends exist.

use super::attach::{self, Parent};
use super::{CONTROLLER, is_ours};
use crate::context::{Condition, Context, GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, NAMESPACES, SERVICES, set_condition};
use crate::objects::{int, list};
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) struct Routes {
    context: Arc<Context>,
    classes: Informer,
    gateways: Informer,
    routes: Informer,
    services: Informer,
    namespaces: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (classes, gateways) = (informers.of(&GATEWAY_CLASSES), informers.of(&GATEWAYS));
    let (routes, services) = (informers.of(&HTTP_ROUTES), informers.of(&SERVICES));
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
    let sources = vec![Source::own(routes.clone()), of_gateway, of_service, of_namespace, of_class];
    let context = Arc::clone(context);
    (Arc::new(Routes { context, classes, gateways, routes, services, namespaces }), sources)
}

fn backends(route: &Object) -> impl Iterator<Item = &Value> {
    list(route, "/spec/rules").iter().flat_map(|rule| list(rule, "/backendRefs"))
}

#[async_trait]
impl Reconcile for Routes {
    fn name(&self) -> &'static str {
        "httproute-controller"
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
        self.context.write_status(&HTTP_ROUTES, &route, status).await?;
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
            Some(gateway) => attach::listeners(gateway, route, parent, &self.namespaces).map(drop),
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
            if namespace != route.namespace() {
                let message = format!("backendRef {namespace}/{name} is in another namespace");
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
