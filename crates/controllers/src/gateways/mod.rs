//! The Gateway API: the class `atoll`, the default Gateway `default/atoll`, and the statuses of Gateways, their routes and
//! Ingresses.
//! The gateway itself reads the same objects; what is refused here it does not serve.
//!
//! The default Gateway takes HTTPRoutes of all namespaces. It is made at start unless a Gateway of the class is there.

mod attach;
mod conflicts;
mod ingresses;
mod listener;
mod policies;
mod references;
mod routes;
#[cfg(test)]
mod tests;

pub(crate) use ingresses::new as ingresses;
pub(crate) use policies::{backends as backend_policies, new as policies};
pub(crate) use routes::{grpc as grpc_routes, http as routes, tls as tls_routes};

use crate::context::{Condition, Context, GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES, NAMESPACES, set_condition};
use crate::objects::list;
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::{Reason, StatusResult};
use async_trait::async_trait;
use references::References;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

static GRPC_ROUTES: LazyLock<Resource> = LazyLock::new(|| Resource::new(GROUP, "v1", "grpcroutes"));
static TLS_ROUTES: LazyLock<Resource> = LazyLock::new(|| Resource::new(GROUP, "v1", "tlsroutes"));
static GRANTS: LazyLock<Resource> = LazyLock::new(|| Resource::new(GROUP, "v1", "referencegrants"));
static POLICIES: LazyLock<Resource> =
    LazyLock::new(|| Resource::new("gateway.atoll.dev", "v1alpha1", "trafficpolicies"));
static BACKEND_POLICIES: LazyLock<Resource> =
    LazyLock::new(|| Resource::new("gateway.atoll.dev", "v1alpha1", "backendpolicies"));
static SECRETS: LazyLock<Resource> = LazyLock::new(|| Resource::new("", "v1", "secrets"));
static CONFIG_MAPS: LazyLock<Resource> = LazyLock::new(|| Resource::new("", "v1", "configmaps"));
static INGRESSES: LazyLock<Resource> = LazyLock::new(|| Resource::new("networking.k8s.io", "v1", "ingresses"));
static INGRESS_CLASSES: LazyLock<Resource> =
    LazyLock::new(|| Resource::new("networking.k8s.io", "v1", "ingressclasses"));

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
    let class = json!({"apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": {"name": CLASS,
                       "annotations": {"ingressclass.kubernetes.io/is-default-class": "true"}},
                       "spec": {"controller": CONTROLLER}});
    made(context.client.create(&INGRESS_CLASSES, "", class).await)?;
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
    /// By kind.
    routes: [(&'static str, Informer); 3],
    namespaces: Informer,
    references: References,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (classes, gateways) = (informers.of(&GATEWAY_CLASSES), informers.of(&GATEWAYS));
    let namespaces = informers.of(&NAMESPACES);
    let routes = [("HTTPRoute", &*HTTP_ROUTES), ("GRPCRoute", &*GRPC_ROUTES), ("TLSRoute", &*TLS_ROUTES)]
        .map(|(kind, resource)| (kind, informers.of(resource)));
    let references = References::new(context);
    let all = gateways.clone();
    let of_class = Source::new(classes.clone(), move |class| {
        let of = |gateway: &&SharedObject| gateway.str_at("/spec/gatewayClassName") == class.name();
        all.list().iter().filter(of).map(Key::of).collect()
    });
    let mut sources = vec![Source::own(gateways.clone()), of_class];
    for (_, informer) in &routes {
        sources.push(Source::new(informer.clone(), |route| {
            attach::parents(route).map(|parent| Key::new(&parent.namespace, &parent.name)).collect()
        }));
    }
    // Certificates, authorities and leave to use them: of whatever Gateway names any.
    for informer in [&references.secrets, &references.config_maps, &references.grants] {
        let all = gateways.clone();
        sources.push(Source::new(informer.clone(), move |_| {
            let secure = |gateway: &&SharedObject| {
                list(gateway, "/spec/listeners").iter().any(|listener| listener.get("tls").is_some())
            };
            all.list().iter().filter(secure).map(Key::of).collect()
        }));
    }
    let context = Arc::clone(context);
    (Arc::new(Gateways { context, classes, gateways, routes, namespaces, references }), sources)
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
