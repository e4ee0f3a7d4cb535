//! Deployments and ReplicaSets.

use super::annotations;
use super::field::{Problems, at, fill, has, int, items, object_mut, pointer, text};
use super::pod_spec;
use crate::intstr::IntOrString;
use crate::object::Object;
use crate::selector::Selector;
use crate::status::Cause;
use serde_json::{Value, json};

pub fn default_template(object: &mut Object) {
    pod_spec::default_at(object, "/spec/template/spec");
}

pub fn default_deployment(object: &mut Object) {
    default_template(object);
    if let Some(strategy) = object_mut(object, "/spec/strategy")
        && strategy.get("type").and_then(Value::as_str) == Some("RollingUpdate")
    {
        fill(strategy, "rollingUpdate", json!({}));
    }
    if let Some(update) = object_mut(object, "/spec/strategy/rollingUpdate") {
        fill(update, "maxSurge", "25%");
        fill(update, "maxUnavailable", "25%");
    }
}

pub fn validate_replica_set(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    replicas_and_template(&mut p, new, old);
    p.into_causes()
}

pub fn validate_deployment(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    replicas_and_template(&mut p, new, old);
    let spec = at(new, "spec");
    strategy(&mut p, at(spec, "strategy"));
    p.at_least("spec.revisionHistoryLimit", int(spec, "revisionHistoryLimit"), 0);
    if let Some(deadline) = int(spec, "progressDeadlineSeconds") {
        p.at_least("spec.progressDeadlineSeconds", Some(deadline), 0);
        if deadline <= int(spec, "minReadySeconds").unwrap_or(0) {
            p.invalid("spec.progressDeadlineSeconds", &deadline.into(), "must be greater than minReadySeconds");
        }
    }
    p.into_causes()
}

fn replicas_and_template(p: &mut Problems, new: &Object, old: Option<&Object>) {
    let spec = at(new, "spec");
    let kind = text(new, "kind").to_lowercase();
    p.at_least("spec.replicas", int(spec, "replicas"), 0);
    p.at_least("spec.minReadySeconds", int(spec, "minReadySeconds"), 0);
    let selector = at(spec, "selector");
    let labels = pointer(spec, "/template/metadata/labels");
    let annotations = |object| pointer(object, "/spec/template/metadata/annotations");
    let known = old.map_or(&Value::Null, annotations);
    annotations::validate(p, "spec.template.metadata.annotations", annotations(new), known);
    if has(spec, "selector") {
        p.selector("spec.selector", selector);
        match Selector::from_object(selector) {
            Ok(parsed) if parsed.is_everything() => {
                p.invalid("spec.selector", selector, &format!("empty selector is invalid for {kind}"));
            }
            Ok(parsed) if !parsed.matches(labels) && has(spec, "template") => {
                let detail = "`selector` does not match template `labels`";
                p.invalid("spec.template.metadata.labels", &or_empty(labels), detail);
            }
            _ => {}
        }
    }
    if let Some(old) = old {
        p.immutable("spec.selector", selector, pointer(old, "/spec/selector"));
    }
    p.labels("spec.template.labels", labels);
    let pod = pointer(spec, "/template/spec");
    if pod.is_null() {
        if has(spec, "template") {
            p.required("spec.template.spec.containers", "");
        }
        return;
    }
    pod_spec::validate(p, "spec.template.spec", pod);
    let policy = text(pod, "restartPolicy");
    if matches!(policy, "OnFailure" | "Never") {
        p.unsupported("spec.template.spec.restartPolicy", policy, &["Always"]);
    }
    if has(pod, "activeDeadlineSeconds") {
        p.forbidden("spec.template.spec.activeDeadlineSeconds", "activeDeadlineSeconds in ReplicaSet is not Supported");
    }
    if !items(pod, "ephemeralContainers").is_empty() {
        p.forbidden("spec.template.spec.ephemeralContainers", "ephemeral containers not allowed in pod template");
    }
}

fn or_empty(value: &Value) -> Value {
    if value.is_null() { json!({}) } else { value.clone() }
}

fn strategy(p: &mut Problems, strategy: &Value) {
    let update = at(strategy, "rollingUpdate");
    match text(strategy, "type") {
        "Recreate" => {
            if !update.is_null() {
                let detail = "may not be specified when strategy `type` is 'Recreate'";
                p.forbidden("spec.strategy.rollingUpdate", detail);
            }
        }
        "RollingUpdate" | "" => rolling_update(p, update),
        other => p.unsupported("spec.strategy.type", other, &["Recreate", "RollingUpdate"]),
    }
}

const PERCENT: &str = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex \
    used for validation is '[0-9]+%')";

fn rolling_update(p: &mut Problems, update: &Value) {
    for field in ["maxUnavailable", "maxSurge"] {
        let path = format!("spec.strategy.rollingUpdate.{field}");
        match IntOrString::from_value(at(update, field)) {
            Some(IntOrString::Int(number)) => p.at_least(&path, Some(number), 0),
            Some(value @ IntOrString::Text(_)) if value.percent().is_none() => {
                p.invalid(&path, at(update, field), PERCENT)
            }
            Some(value) if field == "maxUnavailable" && value.percent() > Some(100) => {
                p.invalid(&path, at(update, field), "must not be greater than 100%");
            }
            _ => {}
        }
    }
    let zero = |field: &str| match IntOrString::from_value(at(update, field)) {
        Some(IntOrString::Int(number)) => number == 0,
        Some(value) => value.percent() == Some(0),
        None => false,
    };
    if zero("maxUnavailable") && zero("maxSurge") {
        let path = "spec.strategy.rollingUpdate.maxUnavailable";
        p.invalid(path, at(update, "maxUnavailable"), "may not be 0 when `maxSurge` is 0");
    }
}

pub fn warnings(object: &Object) -> Vec<String> {
    pod_spec::warnings("spec.template.spec", pointer(object, "/spec/template/spec"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    fn complete(spec: Value) -> Value {
        let kind = kinds::find("apps", "deployments").unwrap();
        let mut object =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        default_deployment(&mut object);
        object
    }

    fn template(labels: Value) -> Value {
        json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "a", "image": "i:1"}]}})
    }

    #[test]
    fn a_deployment_gets_what_kubernetes_gives_it() {
        let object =
            complete(json!({"selector": {"matchLabels": {"a": "b"}}, "template": template(json!({"a": "b"}))}));
        let spec = &object["spec"];
        assert_eq!(
            spec["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
        );
        assert_eq!(
            (&spec["replicas"], &spec["revisionHistoryLimit"], &spec["progressDeadlineSeconds"]),
            (&json!(1), &json!(10), &json!(600))
        );
        assert_eq!(spec["template"]["spec"]["containers"][0]["imagePullPolicy"], "IfNotPresent");
        assert!(spec["template"]["spec"].get("enableServiceLinks").is_none());
        assert!(validate_deployment(&object, None).is_empty());
    }

    #[test]
    fn selectors_and_strategies() {
        let mut object = complete(
            json!({"replicas": -1, "selector": {"matchLabels": {"a": "b"}}, "template": template(json!({"a": "c"})),
            "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}}),
        );
        let told = |object: &Value, old: Option<&Value>| {
            validate_deployment(object, old)
                .into_iter()
                .map(|c| format!("{}: {}", c.field, c.message))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            told(&object, None),
            [
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
                "spec.template.metadata.labels: Invalid value: {\"a\":\"c\"}: `selector` does not match template `labels`",
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
            ]
        );
        object = complete(json!({"selector": {"matchLabels": {"a": "b"}}, "template": template(json!({"a": "b"}))}));
        let other = complete(json!({"selector": {"matchLabels": {"a": "c"}}, "template": template(json!({"a": "c"}))}));
        assert_eq!(
            told(&other, Some(&object)),
            ["spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"c\"}}: field is immutable"]
        );
    }
}
