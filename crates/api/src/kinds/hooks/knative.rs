//! Knative Serving: defaults its admission fills, and what it refuses.

use super::field::{Problems, at, fill, has, int, items, items_mut, object_mut, pointer, text};
use super::{annotations, pod_spec, volume};
use crate::names;
use crate::object::{Meta, Object, child, object_of};
use crate::sleep::{SLEEP, Sleep};
use crate::status::Cause;
use serde_json::{Map, Value, json};

/// Seconds a request may take when nothing is said, and at most.
const TIMEOUT: i64 = 300;
const MAX_TIMEOUT: i64 = 600;
const MAX_CONCURRENCY: i64 = 1000;

pub fn default_service(service: &mut Object) {
    let spec = child(object_of(service), "spec");
    if spec.get("traffic").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        spec.insert("traffic".into(), json!([{"latestRevision": true, "percent": 100}]));
    }
    for target in items_mut(spec, "traffic") {
        let named = target.get("revisionName").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        fill(target, "latestRevision", !named);
    }
    default_at(service, "/spec/template/spec");
}

pub fn default_configuration(configuration: &mut Object) {
    default_at(configuration, "/spec/template/spec");
}

pub fn default_revision(revision: &mut Object) {
    default_at(revision, "/spec");
}

fn default_at(object: &mut Object, pointer: &str) {
    let Some(spec) = object_mut(object, pointer) else { return };
    fill(spec, "containerConcurrency", 0);
    fill(spec, "timeoutSeconds", TIMEOUT);
    fill(spec, "enableServiceLinks", false);
    pod_spec::default(spec);
    // Here the account has one name only.
    spec.remove("serviceAccount");
    let one = spec.get("containers").and_then(Value::as_array).is_some_and(|list| list.len() == 1);
    for container in items_mut(spec, "containers") {
        if one {
            fill(container, "name", "user-container");
        }
        if one || container.get("ports").and_then(Value::as_array).is_some_and(|ports| !ports.is_empty()) {
            default_probe(container);
        }
    }
}

/// The container that answers requests is ready when its port accepts connections.
fn default_probe(container: &mut Map<String, Value>) {
    let probe = child(container, "readinessProbe");
    let handled =
        ["exec", "httpGet", "tcpSocket", "grpc"].iter().any(|kind| probe.get(*kind).is_some_and(|v| !v.is_null()));
    if !handled {
        probe.insert("tcpSocket".into(), json!({"port": 0}));
    }
    // What the schema fills in a probe that was there before.
    for (field, value) in
        [("successThreshold", 1), ("timeoutSeconds", 1), ("periodSeconds", 10), ("failureThreshold", 3)]
    {
        fill(probe, field, value);
    }
}

pub fn validate_service(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    p.rule("metadata.name", new.name(), names::dns_1035_label);
    template(&mut p, new);
    traffic(&mut p, "spec.traffic", at(new, "spec"), false);
    p.into_causes()
}

pub fn validate_configuration(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    template(&mut p, new);
    p.into_causes()
}

pub fn validate_route(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    if items(at(new, "spec"), "traffic").is_empty() {
        p.required("spec.traffic", "");
    }
    traffic(&mut p, "spec.traffic", at(new, "spec"), true);
    p.into_causes()
}

pub fn validate_revision(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    match old {
        Some(old) if at(new, "spec") != at(old, "spec") => {
            p.forbidden("spec", "Immutable fields changed: a revision never changes");
        }
        _ => spec(&mut p, "spec", at(new, "spec")),
    }
    p.into_causes()
}

fn template(p: &mut Problems, object: &Object) {
    let template = pointer(object, "/spec/template");
    if template.is_null() {
        p.required("spec.template", "");
        return;
    }
    let name = pointer(template, "/metadata/name").as_str().unwrap_or("");
    if !name.is_empty() {
        p.rule("spec.template.metadata.name", name, names::dns_1035_label);
        let prefix = format!("{}-", object.name());
        if !name.starts_with(&prefix) {
            let detail = format!("must have prefix {prefix:?}");
            p.invalid_text("spec.template.metadata.name", name, &detail);
        }
    }
    p.labels("spec.template.metadata.labels", pointer(template, "/metadata/labels"));
    let annotations = pointer(template, "/metadata/annotations");
    annotations::validate(p, "spec.template.metadata.annotations", annotations, &Value::Null);
    for annotation in ["autoscaling.knative.dev/min-scale", "autoscaling.knative.dev/max-scale"] {
        let value = at(pointer(template, "/metadata/annotations"), annotation);
        if let Some(text) = value.as_str().filter(|text| text.parse::<u32>().is_err()) {
            p.invalid_text(
                &format!("spec.template.metadata.annotations[{annotation}]"),
                text,
                "must be a whole number from 0 on",
            );
        }
    }
    let class = pointer(template, "/spec/runtimeClassName").as_str().unwrap_or("");
    if let Err(detail) = Sleep::of_revision(at(annotations, SLEEP).as_str(), class) {
        let path = format!("spec.template.metadata.annotations[{SLEEP}]");
        p.invalid_text(&path, at(annotations, SLEEP).as_str().unwrap_or(""), &detail);
    }
    if has(template, "spec") {
        spec(p, "spec.template.spec", at(template, "spec"));
    } else {
        p.required("spec.template.spec", "");
    }
}

fn spec(p: &mut Problems, path: &str, spec: &Value) {
    let volumes = volume::validate(p, &format!("{path}.volumes"), items(spec, "volumes"));
    let containers = items(spec, "containers");
    let mut with_ports = 0;
    let mut seen = std::collections::HashSet::new();
    for list in ["containers", "initContainers"] {
        for (index, container) in items(spec, list).iter().enumerate() {
            let path = format!("{path}.{list}[{index}]");
            let name = text(container, "name");
            if name.is_empty() {
                p.required(&format!("{path}.name"), "");
            } else if !seen.insert(name) {
                p.duplicate(&format!("{path}.name"), &name.into());
            }
            pod_spec::validate_container(p, &path, &without_open_probe(container), &volumes);
            let ports = items(container, "ports");
            with_ports += usize::from(list == "containers" && !ports.is_empty());
            if ports.len() > 1 {
                p.forbidden(&format!("{path}.ports"), "more than one container port is set");
            }
            for (number, port) in ports.iter().enumerate() {
                p.one_of(&format!("{path}.ports[{number}].name"), text(port, "name"), &["h2c", "http1"]);
            }
        }
    }
    if containers.len() > 1 && with_ports != 1 {
        let detail = format!("exactly one container must have a port, {with_ports} have");
        p.invalid(&format!("{path}.containers"), &with_ports.into(), &detail);
    }
    let within = |p: &mut Problems, field: &str, least: i64, most: i64| {
        if let Some(value) = int(spec, field).filter(|value| !(least..=most).contains(value)) {
            p.invalid(&format!("{path}.{field}"), &value.into(), &format!("expected {least} <= {value} <= {most}"));
        }
    };
    within(p, "containerConcurrency", 0, MAX_CONCURRENCY);
    within(p, "timeoutSeconds", 0, MAX_TIMEOUT);
    let longest = int(spec, "timeoutSeconds").unwrap_or(TIMEOUT);
    within(p, "responseStartTimeoutSeconds", 0, longest);
    within(p, "idleTimeoutSeconds", 0, longest);
    p.optional_rule(&format!("{path}.runtimeClassName"), text(spec, "runtimeClassName"), names::dns_subdomain);
    p.optional_rule(&format!("{path}.serviceAccountName"), text(spec, "serviceAccountName"), names::dns_subdomain);
}

/// Port 0 in a readiness probe means "the container's port", which only exists once a pod is made.
fn without_open_probe(container: &Value) -> Value {
    let mut container = container.clone();
    let open = |pointer_: &str| pointer(&container, pointer_).as_i64() == Some(0);
    if open("/readinessProbe/tcpSocket/port")
        || open("/readinessProbe/httpGet/port")
        || open("/readinessProbe/grpc/port")
    {
        object_of(&mut container).remove("readinessProbe");
    }
    container
}

fn traffic(p: &mut Problems, path: &str, spec: &Value, route: bool) {
    let targets = items(spec, "traffic");
    let (mut sum, mut tags) = (0, std::collections::HashSet::new());
    for (index, target) in targets.iter().enumerate() {
        let path = format!("{path}[{index}]");
        sum += int(target, "percent").unwrap_or(0);
        let revision = text(target, "revisionName");
        let latest = at(target, "latestRevision").as_bool();
        if !revision.is_empty() && latest == Some(true) {
            p.invalid(&format!("{path}.latestRevision"), &true.into(), "may not be true when revisionName is set");
        }
        if revision.is_empty() && latest == Some(false) {
            p.invalid(&format!("{path}.latestRevision"), &false.into(), "may not be false when revisionName is empty");
        }
        if !route && has(target, "configurationName") {
            p.forbidden(&format!("{path}.configurationName"), "may not be set in a Service");
        }
        if route && revision.is_empty() && !has(target, "configurationName") {
            p.required(&path, "expected exactly one of configurationName, revisionName");
        }
        let tag = text(target, "tag");
        p.optional_rule(&format!("{path}.tag"), tag, names::dns_label);
        if !tag.is_empty() && !tags.insert(tag) {
            p.duplicate(&format!("{path}.tag"), &tag.into());
        }
        if !text(target, "url").is_empty() {
            p.forbidden(&format!("{path}.url"), "must not be set");
        }
    }
    if !targets.is_empty() && sum != 100 {
        p.invalid(path, &sum.into(), &format!("Traffic targets sum to {sum}, want 100"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    fn complete(spec: Value) -> Value {
        let kind = kinds::find("serving.knative.dev", "services").unwrap();
        let mut object = json!({"metadata": {"name": "hello"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        default_service(&mut object);
        object
    }

    #[test]
    fn a_function_gets_what_knative_gives_it() {
        let object = complete(
            json!({"template": {"spec": {"containers": [{"image": "hello:1", "ports": [{"containerPort": 8080}]}]}}}),
        );
        let spec = &object["spec"];
        assert_eq!(spec["traffic"], json!([{"latestRevision": true, "percent": 100}]));
        let inner = &spec["template"]["spec"];
        assert_eq!((&inner["containerConcurrency"], &inner["timeoutSeconds"]), (&json!(0), &json!(300)));
        assert_eq!(inner["containers"][0]["name"], "user-container");
        assert_eq!(inner["containers"][0]["readinessProbe"]["tcpSocket"], json!({"port": 0}));
        assert_eq!(validate_service(&object, None), []);
        let kind = kinds::find("serving.knative.dev", "services").unwrap();
        assert_eq!(strict::validate_values(&kind.schema, &kind.types, &object), []);
    }

    #[test]
    fn names_traffic_and_limits() {
        let object = complete(json!({"traffic": [{"percent": 90, "revisionName": "hello-1", "latestRevision": true}],
            "template": {"metadata": {"name": "other-1"}, "spec": {"timeoutSeconds": 900, "containers": [{"image": "x",
                "ports": [{"containerPort": 1}, {"containerPort": 2}]}]}}}));
        let told: Vec<String> =
            validate_service(&object, None).into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        assert_eq!(
            told,
            [
                "spec.template.metadata.name: Invalid value: \"other-1\": must have prefix \"hello-\"",
                "spec.template.spec.containers[0].ports: Forbidden: more than one container port is set",
                "spec.template.spec.timeoutSeconds: Invalid value: 900: expected 0 <= 900 <= 600",
                "spec.traffic[0].latestRevision: Invalid value: true: may not be true when revisionName is set",
                "spec.traffic: Invalid value: 90: Traffic targets sum to 90, want 100",
            ]
        );
    }
}
