//! The Gateway API: the class `atoll`, the default Gateway `default/atoll`, and the statuses of Gateways and HTTPRoutes.
//! The gateway itself reads the same objects; what is refused here it does not serve.
//!
//! The default Gateway takes HTTPRoutes of all namespaces. It is made at start unless a Gateway of the class is there.

mod attach;
mod routes;
#[cfg(test)]
mod tests;

pub(crate) use routes::new as routes;

use crate::context::{Condition, Context, GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, NAMESPACES, set_condition};
use crate::objects::{int, list};
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::{Reason, StatusResult};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) const CONTROLLER: &str = "atoll.dev/gateway";
pub(crate) const CLASS: &str = "atoll";
pub(crate) const DEFAULT_NAMESPACE: &str = "default";
pub(crate) const DEFAULT_NAME: &str = "atoll";
const GROUP: &str = "gateway.networking.k8s.io";

/// Which Gateways are ours.
pub(crate) fn is_ours(classes: &Informer, gateway: &Object) -> bool {
    let class = classes.get("", gateway.str_at("/spec/gatewayClassName"));
    class.is_some_and(|class| class.str_at("/spec/controllerName") == CONTROLLER)
}

/// Makes the class and the default Gateway where they are missing.
pub(crate) async fn make_defaults(context: Arc<Context>) {
    let mut delay = std::time::Duration::from_millis(20);
    while let Err(error) = try_defaults(&context).await {
        tracing::debug!(%error, "the default gateway could not be made yet");
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(std::time::Duration::from_secs(10));
    }
}

async fn try_defaults(context: &Context) -> StatusResult<()> {
    let made = |result: StatusResult<SharedObject>| match result {
        Err(error) if error.reason != Reason::AlreadyExists => Err(error),
        _ => Ok(()),
    };
    let class = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
                       "metadata": {"name": CLASS},
                       "spec": {"controllerName": CONTROLLER, "description": "Atoll's own gateway"}});
    made(context.client.create(&GATEWAY_CLASSES, "", class).await)?;
    let all = context.client.list(&GATEWAYS, "", &Default::default()).await?;
    if all.items.iter().any(|gateway| gateway.str_at("/spec/gatewayClassName") == CLASS) {
        return Ok(());
    }
    let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": DEFAULT_NAME, "namespace": DEFAULT_NAMESPACE},
        "spec": {"gatewayClassName": CLASS, "listeners": [
            {"name": "http", "protocol": "HTTP", "port": context.config.gateway_port,
             "allowedRoutes": {"namespaces": {"from": "All"}}}]}});
    made(context.client.create(&GATEWAYS, DEFAULT_NAMESPACE, gateway).await)
}

/// Accepts our class.
pub(crate) struct Classes {
    context: Arc<Context>,
    classes: Informer,
}

pub(crate) fn classes(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let classes = context.informers.of(&GATEWAY_CLASSES);
    let sources = vec![Source::own(classes.clone())];
    (Arc::new(Classes { context: Arc::clone(context), classes }), sources)
}

#[async_trait]
impl Reconcile for Classes {
    fn name(&self) -> &'static str {
        "gatewayclass-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let ours = |class: &SharedObject| class.str_at("/spec/controllerName") == CONTROLLER;
        let Some(class) = self.classes.get_key(key).filter(ours) else { return Ok(None) };
        let mut status = class.get("status").cloned().unwrap_or_else(|| json!({}));
        let message = "GatewayClass is accepted";
        let new = Condition { kind: "Accepted", status: "True", reason: "Accepted", message };
        observe(&mut status, new, &class, &self.context);
        self.context.write_status(&GATEWAY_CLASSES, &class, status).await?;
        Ok(None)
    }
}

/// A condition of the Gateway API: with the generation it is about.
fn observe(status: &mut Value, new: Condition<'_>, object: &Object, context: &Context) {
    set_condition(status, new, &context.timestamp(), &[("observedGeneration", json!(object.generation()))]);
}

pub(crate) struct Gateways {
    context: Arc<Context>,
    classes: Informer,
    gateways: Informer,
    routes: Informer,
    namespaces: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (classes, gateways) = (informers.of(&GATEWAY_CLASSES), informers.of(&GATEWAYS));
    let (routes, namespaces) = (informers.of(&HTTP_ROUTES), informers.of(&NAMESPACES));
    let all = gateways.clone();
    let of_class = Source::new(classes.clone(), move |class| {
        let of = |gateway: &&SharedObject| gateway.str_at("/spec/gatewayClassName") == class.name();
        all.list().iter().filter(of).map(Key::of).collect()
    });
    let of_route = Source::new(routes.clone(), |route| {
        attach::parents(route).map(|parent| Key::new(&parent.namespace, &parent.name)).collect()
    });
    let sources = vec![Source::own(gateways.clone()), of_class, of_route];
    (Arc::new(Gateways { context: Arc::clone(context), classes, gateways, routes, namespaces }), sources)
}

#[async_trait]
impl Reconcile for Gateways {
    fn name(&self) -> &'static str {
        "gateway-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(gateway) = self.gateways.get_key(key).filter(|gateway| is_ours(&self.classes, gateway)) else {
            return Ok(None);
        };
        let mut status = gateway.get("status").cloned().unwrap_or_else(|| json!({}));
        let listeners: Vec<Value> =
            list(&gateway, "/spec/listeners").iter().map(|listener| self.listener(&gateway, listener)).collect();
        let any = listeners.iter().any(|listener| {
            list(listener, "/conditions")
                .iter()
                .any(|c| c.str_at("/type") == "Accepted" && c.str_at("/status") == "True")
        });
        let fields = object_of(&mut status);
        fields.insert("listeners".into(), listeners.into());
        match &self.context.config.gateway_address {
            Some(address) => {
                fields.insert("addresses".into(), json!([{"type": "IPAddress", "value": address}]));
            }
            None => drop(fields.remove("addresses")),
        }
        let accepted = match any {
            true => ("True", "Accepted", "Gateway is accepted", "Programmed", "Gateway is served"),
            false => {
                ("False", "ListenersNotValid", "No listener can be served", "Invalid", "No listener can be served")
            }
        };
        let (state, reason, message, programmed, served) = accepted;
        observe(&mut status, Condition { kind: "Accepted", status: state, reason, message }, &gateway, &self.context);
        let programmed = Condition { kind: "Programmed", status: state, reason: programmed, message: served };
        observe(&mut status, programmed, &gateway, &self.context);
        self.context.write_status(&GATEWAYS, &gateway, status).await?;
        Ok(None)
    }
}

impl Gateways {
    fn listener(&self, gateway: &SharedObject, listener: &Value) -> Value {
        let name = listener.str_at("/name");
        let known = list(gateway, "/status/listeners").iter().find(|known| known.str_at("/name") == name);
        let mut status =
            json!({"conditions": known.and_then(|known| known.get("conditions")).cloned().unwrap_or(json!([]))});
        let attached = self.routes.list().iter().filter(|route| self.is_attached(gateway, name, route)).count();
        let http = listener.str_at("/protocol") == "HTTP";
        let clash = list(gateway, "/spec/listeners").iter().any(|other| {
            other.str_at("/name") != name
                && int(other, "/port") == int(listener, "/port")
                && other.str_at("/hostname") == listener.str_at("/hostname")
        });
        let kinds = list(listener, "/allowedRoutes/kinds");
        let known_kind =
            |kind: &Value| kind.str_at("/kind") == "HTTPRoute" && matches!(kind.str_at("/group"), "" | GROUP);
        let good_kinds = kinds.iter().all(known_kind);
        let takes = kinds.is_empty() || kinds.iter().any(known_kind);
        let fields = object_of(&mut status);
        fields.insert("name".into(), name.into());
        fields.insert("attachedRoutes".into(), attached.into());
        let supported = if http && takes { json!([{"group": GROUP, "kind": "HTTPRoute"}]) } else { json!([]) };
        fields.insert("supportedKinds".into(), supported);
        let protocol = format!("Protocol {} is not supported, only HTTP is", listener.str_at("/protocol"));
        let yes = |kind, reason, message| Condition { kind, status: "True", reason, message };
        let no = |kind, reason, message| Condition { kind, status: "False", reason, message };
        let conditions = [
            match http {
                true => yes("Accepted", "Accepted", "Listener is accepted"),
                false => no("Accepted", "UnsupportedProtocol", protocol.as_str()),
            },
            match http && !clash {
                true => yes("Programmed", "Programmed", "Listener is served"),
                false => no("Programmed", "Invalid", "Listener is not served"),
            },
            match good_kinds {
                true => yes("ResolvedRefs", "ResolvedRefs", "All references are resolved"),
                false => no("ResolvedRefs", "InvalidRouteKinds", "Only HTTPRoute can be attached"),
            },
            match clash {
                true => yes("Conflicted", "HostnameConflict", "Another listener has the same port and hostname"),
                false => no("Conflicted", "NoConflicts", "No conflicts"),
            },
        ];
        for condition in conditions {
            observe(&mut status, condition, gateway, &self.context);
        }
        status
    }

    fn is_attached(&self, gateway: &SharedObject, listener: &str, route: &SharedObject) -> bool {
        attach::parents(route).filter(|parent| parent.means(gateway)).any(|parent| {
            attach::listeners(gateway, route, &parent, &self.namespaces)
                .is_ok_and(|listeners| listeners.iter().any(|name| name == listener))
        })
    }
}
