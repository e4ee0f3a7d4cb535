//! Routes: which revisions get the requests of a name, carried out by an HTTPRoute at the gateway and a Service inside.
//!
//! Inside, the Service of a Route with one target selects that revision's pods. With several targets it has no selector,
//! and an EndpointSlice names the pods of all of them: there requests are shared by pods, at the gateway by percent. Where a
//! target may sleep, an annotation leads connections through the gateway, which wakes it and shares them by percent, too.

use super::revision::{port, service_ports};
use super::scale::Rules;
use super::{LOCAL, REVISION_UID, ROUTE, ROUTING_STATE, SERVICE, State, child_name, ensure, set_conditions};
use crate::context::{Context, ENDPOINT_SLICES, HTTP_ROUTES, KN_CONFIGURATIONS, KN_REVISIONS, KN_ROUTES, SERVICES};
use crate::endpoints::{MANAGED_BY, SERVICE_NAME};
use crate::gateways::{DEFAULT_NAME, DEFAULT_NAMESPACE};
use crate::objects::{controller_name, controller_reference, int, is_controlled_by, list};
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::{DeleteOptions, Patch};
use api::demand::BACKENDS;
use api::informer::{Informer, Key};
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject, object_of};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const MANAGER: &str = "route-controller.serving.knative.dev";

pub(crate) struct Routes {
    context: Arc<Context>,
    routes: Informer,
    configurations: Informer,
    revisions: Informer,
    services: Informer,
    http: Informer,
    slices: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let routes = informers.of(&KN_ROUTES);
    let (configurations, revisions) = (informers.of(&KN_CONFIGURATIONS), informers.of(&KN_REVISIONS));
    let (services, http) = (informers.of(&SERVICES), informers.of(&HTTP_ROUTES));
    let slices = informers.of(&ENDPOINT_SLICES);
    let naming = |routes: &Informer, namespace: &str, field: &str, name: &str| -> Vec<Key> {
        let names = |route: &&SharedObject| list(route, "/spec/traffic").iter().any(|t| t.str_at(field) == name);
        routes.list_in(namespace).iter().filter(names).map(Key::of).collect()
    };
    let known = routes.clone();
    let of_configuration =
        Source::new(configurations.clone(), move |c| naming(&known, c.namespace(), "/configurationName", c.name()));
    let known = routes.clone();
    let of_revision = Source::new(revisions.clone(), move |revision| {
        let mut keys = naming(&known, revision.namespace(), "/revisionName", revision.name());
        let served = |route: &&SharedObject| {
            list(route, "/status/traffic").iter().any(|t| t.str_at("/revisionName") == revision.name())
        };
        keys.extend(known.list_in(revision.namespace()).iter().filter(served).map(Key::of));
        keys
    });
    let owner = |object: &Object| {
        let name = controller_name(object, &KN_ROUTES, "Route");
        name.map(|name| Key::new(object.namespace(), name)).into_iter().collect::<Vec<_>>()
    };
    let known = routes.clone();
    let of_slice = Source::new(slices.clone(), move |slice| {
        let name = slice.label(SERVICE_NAME).unwrap_or("");
        let served = |route: &&SharedObject| {
            let traffic = list(route, "/status/traffic");
            traffic.len() > 1 && traffic.iter().any(|t| t.str_at("/revisionName") == name)
        };
        known.list_in(slice.namespace()).iter().filter(served).map(Key::of).collect()
    });
    let sources = vec![
        Source::own(routes.clone()),
        of_configuration,
        of_revision,
        Source::new(services.clone(), owner),
        Source::new(http.clone(), owner),
        Source::new(slices.clone(), owner),
        of_slice,
    ];
    let context = Arc::clone(context);
    (Arc::new(Routes { context, routes, configurations, revisions, services, http, slices }), sources)
}

/// A target with its revision found.
struct Target {
    revision: SharedObject,
    percent: i64,
    latest: bool,
    configuration: String,
    tag: String,
}

#[async_trait]
impl Reconcile for Routes {
    fn name(&self) -> &'static str {
        "route-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(route) = self.routes.get_key(key) else {
            self.label_revisions(&key.namespace).await?;
            return Ok(None);
        };
        if route.is_deleting() {
            return Ok(None);
        }
        let mut status = route.get("status").cloned().unwrap_or_else(|| json!({}));
        object_of(&mut status).insert("observedGeneration".into(), route.generation().into());
        let (assigned, ingress) = match self.targets(&route) {
            Ok(targets) => {
                self.describe(&route, &targets, &mut status);
                (State::True, self.carry_out(&route, &targets).await?)
            }
            // What is served now goes on being served.
            Err(why) => (why, State::unknown("", "")),
        };
        let certificate = State::True;
        let all =
            [("AllTrafficAssigned", assigned), ("CertificateProvisioned", certificate), ("IngressReady", ingress)];
        set_conditions(&mut status, &all, &self.context.timestamp());
        self.context.write_status(&KN_ROUTES, &route, status).await?;
        self.label_revisions(&key.namespace).await?;
        Ok(None)
    }
}

/// What [`BACKENDS`] says of these: nothing, unless one of them may sleep.
fn asleep(parts: &[(&Target, i64)]) -> String {
    if !parts.iter().any(|(target, _)| Rules::of(&target.revision).min == 0) {
        return String::new();
    }
    let one = |(target, percent): &(&Target, i64)| format!("{}={percent}", target.revision.name());
    parts.iter().map(one).collect::<Vec<_>>().join(",")
}

impl Routes {
    fn targets(&self, route: &SharedObject) -> Result<Vec<Target>, State> {
        let mut targets = Vec::new();
        for spec in list(route, "/spec/traffic") {
            let named = spec.str_at("/revisionName");
            let configuration = spec.str_at("/configurationName");
            let revision = if named.is_empty() {
                self.newest(route, configuration)?
            } else {
                let found = self.revisions.get(route.namespace(), named);
                let missing =
                    || State::failed("RevisionMissing", format!("Revision {named:?} referenced in traffic not found."));
                let found = found.ok_or_else(missing)?;
                match State::of(Some(&found), "Ready") {
                    State::True => found,
                    State::False(..) => {
                        let message = format!("Revision {named:?} referenced in traffic failed to become ready.");
                        return Err(State::failed("RevisionMissing", message));
                    }
                    State::Unknown(..) => {
                        let message = format!("Revision {named:?} referenced in traffic is not ready yet.");
                        return Err(State::Unknown("RevisionMissing".into(), message));
                    }
                }
            };
            targets.push(Target {
                revision,
                percent: int(spec, "/percent").unwrap_or(0),
                latest: named.is_empty(),
                configuration: configuration.to_owned(),
                tag: spec.str_at("/tag").to_owned(),
            });
        }
        if targets.is_empty() {
            return Err(State::failed("RevisionMissing", "The route has no traffic targets."));
        }
        Ok(targets)
    }

    /// The newest ready revision of a Configuration.
    fn newest(&self, route: &SharedObject, configuration: &str) -> Result<SharedObject, State> {
        let Some(found) = self.configurations.get(route.namespace(), configuration) else {
            let message = format!("Configuration {configuration:?} referenced in traffic not found.");
            return Err(State::failed("ConfigurationMissing", message));
        };
        let revision = self.revisions.get(route.namespace(), found.str_at("/status/latestReadyRevisionName"));
        revision.ok_or_else(|| match State::of(Some(&found), "Ready") {
            State::False(..) => {
                let message = format!("Configuration {configuration:?} does not have any ready Revision.");
                State::failed("RevisionMissing", message)
            }
            _ => {
                let message = format!("Configuration {configuration:?} is waiting for a Revision to become ready.");
                State::Unknown("RevisionMissing".into(), message)
            }
        })
    }

    fn is_local(&self, route: &Object) -> bool {
        route.label(LOCAL) == Some("cluster-local")
    }

    fn inside(&self, route: &Object, name: &str) -> String {
        format!("{name}.{}.svc.{}", route.namespace(), self.context.config.cluster_domain)
    }

    fn outside(&self, route: &Object, name: &str) -> String {
        format!("{name}.{}.{}", route.namespace(), self.context.config.domain)
    }

    fn url(&self, route: &Object, name: &str) -> String {
        if self.is_local(route) {
            return format!("http://{}", self.inside(route, name));
        }
        let host = self.outside(route, name);
        match self.context.config.gateway_port {
            80 => format!("http://{host}"),
            port => format!("http://{host}:{port}"),
        }
    }

    fn describe(&self, route: &SharedObject, targets: &[Target], status: &mut Value) {
        let shown = |target: &Target| {
            let mut value = json!({"revisionName": target.revision.name(), "latestRevision": target.latest});
            let fields = object_of(&mut value);
            if target.percent > 0 {
                fields.insert("percent".into(), target.percent.into());
            }
            if !target.tag.is_empty() {
                fields.insert("tag".into(), target.tag.as_str().into());
                let name = child_name(&format!("{}-{}", target.tag, route.name()), "");
                fields.insert("url".into(), self.url(route, &name).into());
            }
            // Only a Route made by hand shows which Configuration it follows.
            if target.latest && route.label(SERVICE).is_none() {
                fields.insert("configurationName".into(), target.configuration.as_str().into());
            }
            value
        };
        let traffic: Vec<Value> = targets.iter().map(shown).collect();
        let fields = object_of(status);
        fields.insert("url".into(), self.url(route, route.name()).into());
        fields.insert("address".into(), json!({"url": format!("http://{}", self.inside(route, route.name()))}));
        fields.insert("traffic".into(), traffic.into());
    }

    /// Services, HTTPRoutes and slices of the name itself and of each tag. Answers with `IngressReady`.
    async fn carry_out(&self, route: &SharedObject, targets: &[Target]) -> StatusResult<State> {
        let mut names: BTreeMap<String, Vec<(&Target, i64)>> = BTreeMap::new();
        let shared =
            targets.iter().filter(|target| target.percent > 0).map(|target| (target, target.percent)).collect();
        names.insert(route.name().to_owned(), shared);
        for target in targets.iter().filter(|target| !target.tag.is_empty()) {
            let name = child_name(&format!("{}-{}", target.tag, route.name()), "");
            names.entry(name).or_default().push((target, 100));
        }
        let mut ingress = State::True;
        for (name, parts) in &names {
            let service = self.service(route, name, parts);
            let known = self.services.get(route.namespace(), name);
            if let Err(name) = ensure(&self.context, &SERVICES, known, route.namespace(), service).await? {
                let message = format!("There is an existing Service {name:?} that the Route does not own.");
                return Ok(State::failed("NotOwned", message));
            }
            self.fill_slices(route, name, parts).await?;
            let wanted = self.http_route(route, name, parts);
            let known = self.http.get(route.namespace(), name);
            match ensure(&self.context, &HTTP_ROUTES, known, route.namespace(), wanted).await? {
                Ok(made) => {
                    if let Some(why) = refused(&made) {
                        ingress = why;
                    }
                }
                Err(name) => {
                    let message = format!("There is an existing HTTPRoute {name:?} that the Route does not own.");
                    return Ok(State::failed("NotOwned", message));
                }
            }
        }
        self.remove_others(route, &SERVICES, &self.services, &names).await?;
        self.remove_others(route, &HTTP_ROUTES, &self.http, &names).await?;
        Ok(ingress)
    }

    fn metadata(&self, route: &SharedObject, name: &str) -> Value {
        let mut labels = json!({ROUTE: route.name()});
        if let Some(service) = route.label(SERVICE) {
            object_of(&mut labels).insert(SERVICE.into(), service.into());
        }
        json!({"name": name, "labels": labels,
               "ownerReferences": [controller_reference(&KN_ROUTES, "Route", route)]})
    }

    fn service(&self, route: &SharedObject, name: &str, parts: &[(&Target, i64)]) -> Object {
        let selector = match parts {
            [(target, _)] => json!({REVISION_UID: target.revision.uid()}),
            _ => Value::Null,
        };
        let ports = parts.first().map_or_else(|| json!([]), |(target, _)| service_ports(&target.revision));
        let mut spec = json!({"ports": ports, "selector": selector});
        if self.services.get(route.namespace(), name).is_none() {
            object_of(&mut spec).insert("type".into(), "ClusterIP".into());
            if spec["selector"].is_null() {
                object_of(&mut spec).remove("selector");
            }
        }
        let mut metadata = self.metadata(route, name);
        let asleep = asleep(parts);
        let said = |service: SharedObject| service.annotation(BACKENDS).is_some_and(|said| said != asleep);
        if !asleep.is_empty() || self.services.get(route.namespace(), name).is_some_and(said) {
            object_of(&mut metadata).insert("annotations".into(), json!({BACKENDS: asleep}));
        }
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    }

    fn http_route(&self, route: &SharedObject, name: &str, parts: &[(&Target, i64)]) -> Object {
        let mut hosts = vec![self.inside(route, name)];
        if !self.is_local(route) {
            hosts.push(self.outside(route, name));
        }
        let backend = |(target, weight): &(&Target, i64)| json!({"group": "", "kind": "Service", "name": target.revision.name(), "port": 80, "weight": weight});
        let backends: Vec<Value> = parts.iter().map(backend).collect();
        let seconds = parts.iter().filter_map(|(target, _)| int(&target.revision, "/spec/timeoutSeconds")).max();
        let mut rule = json!({"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": backends});
        if let Some(seconds) = seconds {
            object_of(&mut rule).insert("timeouts".into(), json!({"request": format!("{seconds}s")}));
        }
        let parent = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway",
                            "name": DEFAULT_NAME, "namespace": DEFAULT_NAMESPACE});
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
               "metadata": self.metadata(route, name),
               "spec": {"parentRefs": [parent], "hostnames": hosts, "rules": [rule]}})
    }

    /// With several targets: their revisions' endpoints, one slice for each.
    async fn fill_slices(&self, route: &SharedObject, name: &str, parts: &[(&Target, i64)]) -> StatusResult<()> {
        let mut known = self.slices.list_in(route.namespace());
        known.retain(|slice| slice.label(SERVICE_NAME) == Some(name) && slice.label(MANAGED_BY) == Some(MANAGER));
        let mut wanted: BTreeMap<String, Object> = BTreeMap::new();
        if parts.len() > 1 {
            for source in self.slices.list_in(route.namespace()) {
                let of = |(target, _): &&(&Target, i64)| source.label(SERVICE_NAME) == Some(target.revision.name());
                let Some((target, _)) = parts.iter().find(of) else { continue };
                let mut metadata = self.metadata(route, &child_name(name, &format!("-{}", suffix(source.name()))));
                let labels = metadata.get_mut("labels").map(object_of);
                if let Some(labels) = labels {
                    labels.insert(SERVICE_NAME.into(), name.into());
                    labels.insert(MANAGED_BY.into(), MANAGER.into());
                }
                let named = service_ports(&target.revision);
                let number = list(&source, "/ports")
                    .first()
                    .and_then(|p| int(p, "/port"))
                    .unwrap_or_else(|| port(&target.revision));
                let ports = json!([{"name": named.str_at("/0/name"), "port": number, "protocol": "TCP"}]);
                let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
                                   "addressType": "IPv4", "ports": ports, "endpoints": source.get("endpoints")});
                wanted.insert(slice.name().to_owned(), slice);
            }
        }
        for old in &known {
            match wanted.remove(old.name()) {
                Some(slice) => {
                    let mut new = (**old).clone();
                    for field in ["ports", "endpoints"] {
                        object_of(&mut new).insert(field.into(), slice.get(field).cloned().unwrap_or(Value::Null));
                    }
                    self.context.write(&ENDPOINT_SLICES, old, new).await?;
                }
                None => self.delete(&ENDPOINT_SLICES, old).await?,
            }
        }
        for (_, slice) in wanted {
            self.context.create_or_get(&ENDPOINT_SLICES, route.namespace(), slice).await?;
        }
        Ok(())
    }

    /// What was made for tags that are gone.
    async fn remove_others(
        &self,
        route: &SharedObject,
        resource: &Resource,
        informer: &Informer,
        names: &BTreeMap<String, Vec<(&Target, i64)>>,
    ) -> StatusResult<()> {
        for object in informer.list_in(route.namespace()) {
            if is_controlled_by(&object, route.uid()) && !names.contains_key(object.name()) {
                self.delete(resource, &object).await?;
            }
        }
        Ok(())
    }

    async fn delete(&self, resource: &Resource, object: &SharedObject) -> StatusResult<()> {
        let options = DeleteOptions { uid: Some(object.uid().to_owned()), ..Default::default() };
        match self.context.client.delete(resource, object.namespace(), object.name(), &options).await {
            Err(error) if !is_race(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Tells the namespace's revisions whether any route names them.
    async fn label_revisions(&self, namespace: &str) -> StatusResult<()> {
        let mut served: BTreeSet<String> = BTreeSet::new();
        for route in self.routes.list_in(namespace).iter().filter(|route| !route.is_deleting()) {
            match self.targets(route) {
                Ok(targets) => served.extend(targets.iter().map(|target| target.revision.name().to_owned())),
                Err(_) => {
                    let traffic = list(route, "/status/traffic").iter();
                    served.extend(traffic.map(|target| target.str_at("/revisionName").to_owned()));
                    let named = list(route, "/spec/traffic").iter();
                    served.extend(named.map(|target| target.str_at("/revisionName").to_owned()));
                }
            }
        }
        for revision in self.revisions.list_in(namespace) {
            let now = revision.label(ROUTING_STATE).unwrap_or("");
            let wanted = match served.contains(revision.name()) {
                true => "active",
                // One that no route has named yet is still to be tried.
                false if now == "pending" && !self.is_superseded(&revision) => continue,
                false => "reserve",
            };
            if now == wanted {
                continue;
            }
            let patch = json!({"metadata": {"uid": revision.uid(), "labels": {ROUTING_STATE: wanted}}});
            let name = revision.name();
            match self.context.client.patch(&KN_REVISIONS, namespace, name, "", Patch::Merge(patch)).await {
                Err(error) if !is_race(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// A newer revision of the same Configuration is served or being made.
    fn is_superseded(&self, revision: &Object) -> bool {
        let owner = controller_name(revision, &KN_CONFIGURATIONS, "Configuration");
        let configuration = owner.and_then(|name| self.configurations.get(revision.namespace(), name));
        let newest = configuration.and_then(|found| newer(&found, revision).map(str::to_owned));
        newest.is_some_and(|newest| self.revisions.get(revision.namespace(), &newest).is_some())
    }
}

/// The newest revision, if a Configuration says that it is another one. What it said before it made this one says nothing.
pub(super) fn newer<'a>(configuration: &'a Object, revision: &Object) -> Option<&'a str> {
    let knows =
        int(configuration, "/status/observedGeneration").unwrap_or(0) >= super::configuration::generation(revision);
    let newest = configuration.str_at("/status/latestCreatedRevisionName");
    (knows && !newest.is_empty() && newest != revision.name()).then_some(newest)
}

/// A short mark of another object's name.
fn suffix(name: &str) -> String {
    api::names::safe_encode(&crate::objects::fnv32a(name.bytes()).to_string())
}

/// Why the gateway does not serve an HTTPRoute (yet).
fn refused(route: &SharedObject) -> Option<State> {
    let conditions = list(route, "/status/parents/0/conditions");
    let accepted = conditions.iter().find(|condition| condition.str_at("/type") == "Accepted");
    let current = accepted.filter(|accepted| int(accepted, "/observedGeneration") == Some(route.generation()));
    match current.map(|accepted| (accepted.str_at("/status"), accepted)) {
        Some(("True", _)) => None,
        Some(("False", why)) => Some(State::failed(why.str_at("/reason"), why.str_at("/message"))),
        _ => Some(State::unknown("Uninitialized", "Waiting for the gateway to be ready")),
    }
}
