//! Revisions: a Deployment and a Service each, and whether it can answer requests.

use super::scale::Rules;
use super::{
    CONFIGURATION, CONFIGURATION_UID, GENERATION, REVISION, REVISION_UID, ROUTING_STATE, SERVICE, SERVICE_UID, State,
    child_name, ensure, handed_down, pods_asleep, set_conditions,
};
use crate::context::{Context, DEPLOYMENTS, KN_REVISIONS, PODS, SERVICES};
use crate::objects::{condition, condition_status, controller_name, controller_reference, int, list};
use crate::runner::{Again, Reconcile, Source};
use api::client::Patch;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::sleep::{ASLEEP, Sleep};
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Map, Value, json};
use std::sync::Arc;

const DEFAULT_PORT: i64 = 8080;
const DEADLINE: i64 = 600;
/// What the wasm boundary goes by.
const TIMEOUT: &str = "functions.atoll.dev/timeout-seconds";
const CONCURRENCY: &str = "functions.atoll.dev/concurrency";
/// Requests that one instance of a function can have.
const MOST_CONCURRENT: i64 = 256;

pub(crate) struct Revisions {
    context: Arc<Context>,
    revisions: Informer,
    deployments: Informer,
    services: Informer,
    pods: Informer,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (revisions, deployments) = (informers.of(&KN_REVISIONS), informers.of(&DEPLOYMENTS));
    let (services, pods) = (informers.of(&SERVICES), informers.of(&PODS));
    let owner = |object: &Object| {
        let name = controller_name(object, &KN_REVISIONS, "Revision");
        name.map(|name| Key::new(object.namespace(), name)).into_iter().collect::<Vec<_>>()
    };
    let of_pod = Source::new(pods.clone(), |pod| {
        pod.label(REVISION).map(|name| Key::new(pod.namespace(), name)).into_iter().collect()
    });
    let sources = vec![
        Source::own(revisions.clone()),
        Source::new(deployments.clone(), owner),
        Source::new(services.clone(), owner),
        of_pod,
    ];
    (Arc::new(Revisions { context: Arc::clone(context), revisions, deployments, services, pods }), sources)
}

/// The container that answers requests.
fn serving(spec: &Value) -> Option<&Value> {
    let containers = list(spec, "/containers");
    containers.iter().find(|container| !list(container, "/ports").is_empty()).or_else(|| containers.first())
}

pub(super) fn port(revision: &Object) -> i64 {
    let spec = revision.get("spec").unwrap_or(&Value::Null);
    serving(spec).and_then(|container| int(container, "/ports/0/containerPort")).unwrap_or(DEFAULT_PORT)
}

/// `http1` or `h2c`, as the port's name says.
fn protocol(revision: &Object) -> &'static str {
    let spec = revision.get("spec").unwrap_or(&Value::Null);
    match serving(spec).map_or("", |container| container.str_at("/ports/0/name")) {
        "h2c" => "h2c",
        _ => "http1",
    }
}

#[async_trait]
impl Reconcile for Revisions {
    fn name(&self) -> &'static str {
        "revision-controller"
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(revision) = self.revisions.get_key(key).filter(|revision| !revision.is_deleting()) else {
            return Ok(None);
        };
        let known = self.deployments.get(&key.namespace, &child_name(revision.name(), "-deployment"));
        let replicas = replicas(&revision, known.as_deref());
        let wanted = self.deployment(&revision, replicas);
        // A revision never changes: of its Deployment only the number of pods does.
        let wanted = match &known {
            Some(_) => only_replicas(&wanted),
            None => wanted,
        };
        let deployment = ensure(&self.context, &DEPLOYMENTS, known, &key.namespace, wanted).await?;
        let wanted = service(&revision);
        let known = self.services.get(&key.namespace, wanted.name());
        let service = ensure(&self.context, &SERVICES, known, &key.namespace, wanted).await?;
        let asleep = deployment.as_ref().ok().and_then(|deployment| pods_asleep(deployment));
        self.rest(&revision, asleep).await?;
        // One that sleeps is none.
        let replicas = if asleep.is_some() { 0 } else { replicas };
        let status = self.status(&revision, &deployment, &service, replicas);
        self.context.write_status(&KN_REVISIONS, &revision, status).await?;
        Ok(None)
    }
}

/// Pods wanted now: what the autoscaler set, within the revision's bounds.
fn replicas(revision: &Object, deployment: Option<&Object>) -> i64 {
    let rules = Rules::of(revision);
    let now = deployment.and_then(|deployment| int(deployment, "/spec/replicas"));
    match revision.label(ROUTING_STATE) {
        Some("reserve") => 0,
        Some("active") => rules.within(now.unwrap_or(rules.initial)),
        // To be tried, whether or not it may sleep later.
        _ => rules.within(now.unwrap_or(0).max(rules.initial)).max(1),
    }
}

impl Revisions {
    /// Its pods sleep, or are awake, as its Deployment is.
    async fn rest(&self, revision: &SharedObject, asleep: Option<Sleep>) -> StatusResult<()> {
        let word = asleep.map(Sleep::word);
        for pod in self.pods.list_in(revision.namespace()) {
            let own = pod.label(REVISION_UID) == Some(revision.uid()) && !pod.is_deleting();
            if !own || pod.annotation(ASLEEP) == word {
                continue;
            }
            let patch = Patch::Merge(json!({"metadata": {"uid": pod.uid(), "annotations": {ASLEEP: word}}}));
            match self.context.client.patch(&PODS, pod.namespace(), pod.name(), "", patch).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn deployment(&self, revision: &SharedObject, replicas: i64) -> Object {
        let labels = pod_labels(revision);
        let mut annotations = handed_down(revision, "annotations");
        let fields = object_of(&mut annotations);
        fields.retain(|key, _| !key.starts_with("serving.knative.dev/"));
        let number = |field: &str| int(revision, &format!("/spec/{field}")).filter(|number| *number > 0);
        if let Some(seconds) = number("timeoutSeconds") {
            fields.entry(TIMEOUT).or_insert_with(|| seconds.to_string().into());
        }
        if let Some(concurrency) = number("containerConcurrency") {
            fields.entry(CONCURRENCY).or_insert_with(|| concurrency.min(MOST_CONCURRENT).to_string().into());
        }
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": child_name(revision.name(), "-deployment"), "labels": labels,
                         "ownerReferences": [controller_reference(&KN_REVISIONS, "Revision", revision)]},
            "spec": {
                "replicas": replicas,
                "progressDeadlineSeconds": DEADLINE,
                "selector": {"matchLabels": {REVISION_UID: revision.uid()}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}},
                "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod_spec(revision)},
            },
        })
    }

    fn status(
        &self,
        revision: &SharedObject,
        deployment: &Result<SharedObject, String>,
        service: &Result<SharedObject, String>,
        wanted: i64,
    ) -> Value {
        let mut status = revision.get("status").cloned().unwrap_or_else(|| json!({}));
        let (resources, healthy) = self.health(revision, deployment, service, wanted, &status);
        let available = deployment.as_ref().ok().and_then(|d| int(d, "/status/availableReplicas")).unwrap_or(0);
        let fields = object_of(&mut status);
        fields.insert("observedGeneration".into(), revision.generation().into());
        fields.insert("desiredReplicas".into(), wanted.into());
        fields.insert("actualReplicas".into(), available.into());
        for (field, containers) in
            [("containerStatuses", "/spec/containers"), ("initContainerStatuses", "/spec/initContainers")]
        {
            let statuses = self.digests(revision, containers);
            if !statuses.is_empty() {
                fields.insert(field.into(), statuses.into());
            }
        }
        let now = self.context.timestamp();
        set_conditions(&mut status, &[("ContainerHealthy", healthy), ("ResourcesAvailable", resources)], &now);
        // Whether it gets requests says nothing about whether it could.
        let (state, reason, message) = match revision.label(ROUTING_STATE) {
            Some("reserve") => ("False", "NoTraffic", "The target is not receiving traffic."),
            _ if wanted == 0 => ("False", "NoTraffic", "The target is not receiving traffic."),
            _ if available > 0 => ("True", "", ""),
            _ => ("Unknown", "Deploying", ""),
        };
        let active = crate::context::Condition { kind: "Active", status: state, reason, message };
        crate::context::set_condition(&mut status, active, &now, &[("severity", json!("Info"))]);
        if let Some(Value::Array(list)) = status.get_mut("conditions") {
            list.sort_by(|a, b| a.str_at("/type").cmp(b.str_at("/type")));
        }
        status
    }

    /// `ResourcesAvailable` and `ContainerHealthy`.
    fn health(
        &self,
        revision: &SharedObject,
        deployment: &Result<SharedObject, String>,
        service: &Result<SharedObject, String>,
        wanted: i64,
        before: &Value,
    ) -> (State, State) {
        let foreign = |kind: &str, name: &str| {
            State::failed("NotOwned", format!("There is an existing {kind} {name:?} that we do not own."))
        };
        let deployment = match (deployment, service) {
            (Ok(deployment), Ok(_)) => deployment,
            (Err(name), _) => return (foreign("Deployment", name), State::unknown("", "")),
            (_, Err(name)) => return (foreign("Service", name), State::unknown("", "")),
        };
        if wanted == 0 {
            // What it was when it had pods.
            let known = |kind| match condition(before, kind).map_or("", |known| known.str_at("/status")) {
                "True" => State::True,
                _ => State::unknown("", ""),
            };
            return (known("ResourcesAvailable"), known("ContainerHealthy"));
        }
        if int(deployment, "/status/availableReplicas").unwrap_or(0) > 0 {
            return (State::True, State::True);
        }
        let deploying = State::unknown("Deploying", "");
        let progress = list(deployment, "/status/conditions").iter().find(|c| c.str_at("/type") == "Progressing");
        let failure = list(deployment, "/status/conditions").iter().find(|c| c.str_at("/type") == "ReplicaFailure");
        let told = |found: &Value| State::failed(found.str_at("/reason"), found.str_at("/message"));
        if let Some(failure) = failure.filter(|found| found.str_at("/status") == "True") {
            return (told(failure), deploying);
        }
        if let Some((reason, message, of_container)) = self.trouble(revision) {
            let state = State::failed(reason, message);
            return if of_container { (deploying, state) } else { (state, deploying) };
        }
        match progress.filter(|found| found.str_at("/status") == "False") {
            Some(progress) => {
                let message = match progress.str_at("/message") {
                    "" => "Initial scale was never achieved",
                    message => message,
                };
                (State::failed(progress.str_at("/reason"), message), deploying)
            }
            // On its way back from zero it is what it was.
            None => match ["ResourcesAvailable", "ContainerHealthy"].map(|kind| condition_status(before, kind)) {
                ["True", "True"] => (State::True, State::True),
                _ => (deploying.clone(), deploying),
            },
        }
    }

    /// What keeps a pod of the revision from running: reason, message, and whether its own code is to blame.
    fn trouble(&self, revision: &SharedObject) -> Option<(String, String, bool)> {
        let pods = self.pods.list_in(revision.namespace());
        let own = pods.iter().filter(|pod| pod.label(REVISION_UID) == Some(revision.uid()) && !pod.is_deleting());
        for pod in own {
            for container in list(pod, "/status/containerStatuses") {
                let ended =
                    container.pointer("/lastState/terminated").or_else(|| container.pointer("/state/terminated"));
                if let Some(ended) = ended.filter(|ended| int(ended, "/exitCode").is_some_and(|code| code != 0)) {
                    let code = int(ended, "/exitCode").unwrap_or(0);
                    let message = match ended.str_at("/message") {
                        "" => format!("Container failed with: exit code {code}"),
                        text => format!("Container failed with: {text}"),
                    };
                    return Some((format!("ExitCode{code}"), message, true));
                }
                let waiting = container.str_at("/state/waiting/reason");
                if !matches!(waiting, "" | "ContainerCreating" | "PodInitializing") {
                    return Some((waiting.into(), container.str_at("/state/waiting/message").into(), false));
                }
            }
            let scheduled = list(pod, "/status/conditions").iter().find(|c| c.str_at("/type") == "PodScheduled");
            if let Some(refused) = scheduled.filter(|scheduled| scheduled.str_at("/status") == "False") {
                return Some((refused.str_at("/reason").into(), refused.str_at("/message").into(), false));
            }
        }
        None
    }

    /// Images by digest, as far as pods tell.
    fn digests(&self, revision: &SharedObject, containers: &str) -> Vec<Value> {
        let pods = self.pods.list_in(revision.namespace());
        let pod = pods.iter().find(|pod| pod.label(REVISION_UID) == Some(revision.uid()));
        let digest = |name: &str, image: &str| {
            let statuses = pod.map(|pod| list(pod, "/status/containerStatuses")).unwrap_or_default();
            let id = statuses.iter().find(|s| s.str_at("/name") == name).map_or("", |s| s.str_at("/imageID"));
            let id = id.rsplit_once("://").map_or(id, |(_, id)| id);
            match (image.contains('@'), id.rsplit_once('@').map_or(id, |(_, digest)| digest)) {
                (true, _) => Some(image.to_owned()),
                (false, digest) if digest.starts_with("sha256:") => {
                    let repository =
                        image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(image, |(r, _)| r);
                    Some(format!("{repository}@{digest}"))
                }
                _ => None,
            }
        };
        list(revision, containers)
            .iter()
            .map(|container| {
                let mut shown = json!({"name": container.str_at("/name")});
                if let Some(digest) = digest(container.str_at("/name"), container.str_at("/image")) {
                    object_of(&mut shown).insert("imageDigest".into(), digest.into());
                }
                shown
            })
            .collect()
    }
}

fn only_replicas(deployment: &Object) -> Object {
    let mut metadata = deployment.get("metadata").cloned().unwrap_or_else(|| json!({}));
    object_of(&mut metadata).remove("labels");
    json!({"metadata": metadata, "spec": {"replicas": deployment.pointer("/spec/replicas")}})
}

fn pod_labels(revision: &Object) -> Value {
    let mut labels = handed_down(revision, "labels");
    let fields = object_of(&mut labels);
    fields.retain(|key, _| !key.starts_with("serving.knative.dev/"));
    for key in [SERVICE, SERVICE_UID, CONFIGURATION, CONFIGURATION_UID, GENERATION] {
        if let Some(value) = revision.label(key) {
            fields.insert(key.into(), value.into());
        }
    }
    fields.insert("app".into(), revision.name().into());
    fields.insert(REVISION.into(), revision.name().into());
    fields.insert(REVISION_UID.into(), revision.uid().into());
    labels
}

/// The revision's spec as a pod's: without what only Knative knows, with what its runtime contract promises.
fn pod_spec(revision: &Object) -> Value {
    let mut spec = revision.get("spec").cloned().unwrap_or_else(|| json!({}));
    let number = port(revision);
    let name = serving(&spec).map_or("", |container| container.str_at("/name")).to_owned();
    let fields = object_of(&mut spec);
    for own in ["containerConcurrency", "timeoutSeconds", "responseStartTimeoutSeconds", "idleTimeoutSeconds"] {
        fields.remove(own);
    }
    let seconds = revision.pointer("/spec/timeoutSeconds").and_then(Value::as_i64).unwrap_or(300);
    fields.entry("terminationGracePeriodSeconds").or_insert_with(|| seconds.into());
    let told = [
        ("K_SERVICE", revision.label(SERVICE).unwrap_or("")),
        ("K_CONFIGURATION", revision.label(CONFIGURATION).unwrap_or("")),
        ("K_REVISION", revision.name()),
    ];
    for list in ["containers", "initContainers"] {
        let Some(Value::Array(containers)) = fields.get_mut(list) else { continue };
        for container in containers {
            let serves = list == "containers" && container.str_at("/name") == name;
            complete(object_of(container), serves.then_some(number), &told);
        }
    }
    spec
}

fn complete(container: &mut Map<String, Value>, port: Option<i64>, told: &[(&str, &str)]) {
    let env = container.entry("env").or_insert_with(|| json!([]));
    if let Value::Array(env) = env {
        if let Some(port) = port {
            env.retain(|variable| variable.str_at("/name") != "PORT");
            env.push(json!({"name": "PORT", "value": port.to_string()}));
        }
        for (name, value) in told {
            env.retain(|variable| variable.str_at("/name") != *name);
            env.push(json!({"name": name, "value": value}));
        }
    }
    let Some(port) = port else { return };
    let known = container.get("ports").and_then(Value::as_array).and_then(|ports| ports.first());
    let named = known.map_or("", |port| port.str_at("/name"));
    let named = if named.is_empty() { "user-port" } else { named }.to_owned();
    container.insert("ports".into(), json!([{"name": named, "containerPort": port, "protocol": "TCP"}]));
    for probe in ["readinessProbe", "livenessProbe", "startupProbe"] {
        let Some(Value::Object(probe)) = container.get_mut(probe) else { continue };
        for handler in ["httpGet", "tcpSocket", "grpc"] {
            let Some(Value::Object(handler)) = probe.get_mut(handler) else { continue };
            // Port 0, or none, is the container's own.
            if handler.get("port").is_none_or(|port| port.is_null() || *port == 0) {
                handler.insert("port".into(), port.into());
            }
        }
        // Knative looks all the time until the first success; here once a second is the shortest.
        if probe.get("periodSeconds").and_then(Value::as_i64) == Some(0) || !probe.contains_key("periodSeconds") {
            probe.insert("periodSeconds".into(), 1.into());
        }
    }
    if !container.contains_key("readinessProbe") {
        let probe = json!({"tcpSocket": {"port": port}, "successThreshold": 1, "periodSeconds": 1});
        container.insert("readinessProbe".into(), probe);
    }
}

fn service(revision: &Object) -> Object {
    let labels = pod_labels(revision);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": revision.name(), "labels": labels,
                     "ownerReferences": [controller_reference(&KN_REVISIONS, "Revision", revision)]},
        "spec": {"type": "ClusterIP", "selector": {REVISION_UID: revision.uid()},
                 "ports": service_ports(revision)},
    })
}

pub(super) fn service_ports(revision: &Object) -> Value {
    let (name, application) = match protocol(revision) {
        "h2c" => ("http2", "kubernetes.io/h2c"),
        _ => ("http", "http"),
    };
    json!([{"name": name, "port": 80, "protocol": "TCP", "targetPort": port(revision), "appProtocol": application}])
}
