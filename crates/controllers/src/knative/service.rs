//! Knative Services: the Configuration and the Route of each, and what they say.

use super::{SERVICE, SERVICE_UID, State, ensure, handed_down, set_conditions};
use crate::context::{Context, KN_CONFIGURATIONS, KN_ROUTES, KN_SERVICES};
use crate::objects::{controller_name, controller_reference, list};
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) struct Services {
    context: Arc<Context>,
    services: Informer,
    configurations: Informer,
    routes: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (services, configurations) = (informers.of(&KN_SERVICES), informers.of(&KN_CONFIGURATIONS));
    let routes = informers.of(&KN_ROUTES);
    let owner = |object: &Object| {
        let name = controller_name(object, &KN_SERVICES, "Service");
        name.map(|name| Key::new(object.namespace(), name)).into_iter().collect::<Vec<_>>()
    };
    let sources = vec![
        Source::own(services.clone()),
        Source::new(configurations.clone(), owner),
        Source::new(routes.clone(), owner),
    ];
    (Arc::new(Services { context: Arc::clone(context), services, configurations, routes }), sources)
}

#[async_trait]
impl Reconcile for Services {
    fn name(&self) -> &'static str {
        "service-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(service) = self.services.get_key(key).filter(|service| !service.is_deleting()) else {
            return Ok(None);
        };
        let configuration =
            self.make(&KN_CONFIGURATIONS, self.configurations.get_key(key), &service, configuration(&service)).await?;
        let route = self.make(&KN_ROUTES, self.routes.get_key(key), &service, route(&service)).await?;
        let status = self.status(&service, &configuration, &route);
        self.context.write_status(&KN_SERVICES, &service, status).await?;
        Ok(None)
    }
}

impl Services {
    async fn make(
        &self,
        resource: &api::kind::Resource,
        known: Option<SharedObject>,
        service: &SharedObject,
        mut wanted: Object,
    ) -> StatusResult<Result<SharedObject, String>> {
        let metadata = wanted.metadata_mut();
        let mut labels = handed_down(service, "labels");
        object_of(&mut labels).insert(SERVICE.into(), service.name().into());
        object_of(&mut labels).insert(SERVICE_UID.into(), service.uid().into());
        metadata.insert("name".into(), service.name().into());
        metadata.insert("labels".into(), labels);
        metadata.insert("annotations".into(), handed_down(service, "annotations"));
        let owner = controller_reference(&KN_SERVICES, "Service", service);
        metadata.insert("ownerReferences".into(), json!([owner]));
        ensure(&self.context, resource, known, service.namespace(), wanted).await
    }

    fn status(
        &self,
        service: &SharedObject,
        configuration: &Result<SharedObject, String>,
        route: &Result<SharedObject, String>,
    ) -> Value {
        let mut status = service.get("status").cloned().unwrap_or_else(|| json!({}));
        let state = |made: &Result<SharedObject, String>, kind: &str| match made {
            Ok(object) => State::of(Some(object), "Ready"),
            Err(name) => State::failed(
                "NotOwned",
                format!("There is an existing {kind} {name:?} that the Service does not own."),
            ),
        };
        let ready =
            [("ConfigurationsReady", state(configuration, "Configuration")), ("RoutesReady", state(route, "Route"))];
        let fields = object_of(&mut status);
        fields.insert("observedGeneration".into(), service.generation().into());
        let mut copy = |from: &Result<SharedObject, String>, names: &[&str]| {
            let Ok(from) = from else { return };
            for name in names {
                match from.pointer(&format!("/status/{name}")) {
                    Some(value) => drop(fields.insert((*name).into(), value.clone())),
                    None => drop(fields.remove(*name)),
                }
            }
        };
        copy(configuration, &["latestCreatedRevisionName", "latestReadyRevisionName"]);
        copy(route, &["url", "address", "traffic"]);
        set_conditions(&mut status, &ready, &self.context.timestamp());
        status
    }
}

fn configuration(service: &Object) -> Object {
    json!({"apiVersion": "serving.knative.dev/v1", "kind": "Configuration",
           "spec": {"template": service.pointer("/spec/template").cloned().unwrap_or_else(|| json!({}))}})
}

fn route(service: &Object) -> Object {
    let mut traffic: Vec<Value> = list(service, "/spec/traffic").to_vec();
    if traffic.is_empty() {
        traffic.push(json!({"latestRevision": true, "percent": 100}));
    }
    for target in &mut traffic {
        // A target without a revision follows this Service's own Configuration.
        if target.str_at("/revisionName").is_empty() {
            object_of(target).insert("configurationName".into(), service.name().into());
            object_of(target).insert("latestRevision".into(), true.into());
        }
    }
    json!({"apiVersion": "serving.knative.dev/v1", "kind": "Route", "spec": {"traffic": traffic}})
}
