//! Events for functions: messages, the schedules that make them, brokers and triggers.

use super::field::{Problems, at, has, text};
use crate::cron;
use crate::names;
use crate::object::{Meta, Object};
use crate::status::Cause;
use crate::time;
use base64::Engine as _;
use serde_json::Value;

/// Bytes of an event.
const EVENT: usize = 256 << 10;
/// A schedule's messages are named by it and a number.
const NAME: usize = 52;
/// Filters of triggers within filters.
const FILTER_DEPTH: usize = 8;

pub fn validate_message(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    p.rule("spec.function", text(spec, "function"), names::dns_label);
    match base64::engine::general_purpose::STANDARD.decode(text(spec, "body")) {
        Err(error) => p.invalid_text("spec.body", "", &format!("must be base64: {error}")),
        Ok(event) if event.len() > EVENT => {
            p.invalid_text("spec.body", "", &format!("must have at most {EVENT} bytes, and has {}", event.len()));
        }
        Ok(_) => {}
    }
    path_of(&mut p, "spec.path", text(spec, "path"));
    let dead_letter = at(spec, "deadLetter");
    if has(spec, "deadLetter") {
        p.rule("spec.deadLetter.function", text(dead_letter, "function"), names::dns_label);
        path_of(&mut p, "spec.deadLetter.path", text(dead_letter, "path"));
    }
    for (name, value) in at(spec, "headers").as_object().into_iter().flatten() {
        let path = format!("spec.headers[{name}]");
        let known = name == "content-type" || name.strip_prefix("ce-").is_some_and(is_attribute);
        if !known {
            p.invalid_text(&path, name, "only content-type and ce-*, in lower case, may be set");
        }
        if !value.as_str().unwrap_or_default().bytes().all(|b| (b' '..=b'~').contains(&b)) {
            p.invalid(&path, value, "must be printable ASCII");
        }
    }
    p.into_causes()
}

fn path_of(p: &mut Problems, field: &str, path: &str) {
    let fine = path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic());
    if !path.is_empty() && !fine {
        p.invalid_text(field, path, "must begin with / and be of printable ASCII without blanks");
    }
}

/// Names of a CloudEvent's attributes.
fn is_attribute(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

pub fn validate_broker(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    p.rule("metadata.name", new.name(), names::dns_label);
    delivery(&mut p, new, at(at(new, "spec"), "delivery"));
    p.into_causes()
}

pub fn validate_trigger(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    p.rule("spec.broker", text(spec, "broker"), names::dns_label);
    let before = old.map(|old| text(at(old, "spec"), "broker"));
    if before.is_some_and(|before| before != text(spec, "broker")) {
        p.invalid_text("spec.broker", text(spec, "broker"), "field is immutable");
    }
    if has(spec, "brokerRef") {
        p.forbidden("spec.brokerRef", "it is not there; spec.broker names a broker of this namespace");
    }
    for (index, one) in at(spec, "filters").as_array().into_iter().flatten().enumerate() {
        filter(&mut p, &format!("spec.filters[{index}]"), one, FILTER_DEPTH);
    }
    for (name, _) in at(at(spec, "filter"), "attributes").as_object().into_iter().flatten() {
        if !is_attribute(name) {
            let path = format!("spec.filter.attributes[{name}]");
            p.invalid_text(&path, name, "attributes are named in lower-case letters and digits");
        }
    }
    destination(&mut p, new, "spec.subscriber", at(spec, "subscriber"));
    delivery(&mut p, new, at(spec, "delivery"));
    p.into_causes()
}

/// One dialect, with names of attributes or further filters in it.
fn filter(p: &mut Problems, path: &str, value: &Value, depth: usize) {
    let Some(depth) = depth.checked_sub(1) else {
        p.forbidden(path, &format!("filters are nested at most {FILTER_DEPTH} deep"));
        return;
    };
    let fields = value.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    if fields.clone().count() != 1 {
        p.invalid_text(path, "", "exactly one of exact, prefix, suffix, all, any and not must be there");
    }
    for (dialect, inner) in fields {
        let path = format!("{path}.{dialect}");
        match dialect.as_str() {
            "exact" | "prefix" | "suffix" => attributes(p, &path, inner),
            "not" => filter(p, &path, inner, depth),
            "all" | "any" => {
                for (index, one) in inner.as_array().into_iter().flatten().enumerate() {
                    filter(p, &format!("{path}[{index}]"), one, depth);
                }
            }
            _ => p.forbidden(&path, "it is not there; exact, prefix, suffix, all, any and not are"),
        }
    }
}

fn attributes(p: &mut Problems, path: &str, wanted: &Value) {
    let wanted = wanted.as_object().into_iter().flatten();
    if wanted.clone().next().is_none() {
        p.required(path, "attributes with their values");
    }
    for (name, value) in wanted {
        let path = format!("{path}[{name}]");
        if !is_attribute(name) {
            p.invalid_text(&path, name, "attributes are named in lower-case letters and digits");
        }
        if value.as_str().is_none_or(str::is_empty) {
            p.invalid(&path, value, "must be a text that is not empty");
        }
    }
}

fn destination(p: &mut Problems, object: &Object, path: &str, value: &Value) {
    let reference = at(value, "ref");
    if !has(value, "ref") {
        url(p, object.namespace(), path, text(value, "uri"));
        return;
    }
    let group = text(reference, "apiVersion").split('/').next().unwrap_or_default();
    if !["serving.knative.dev", "v1"].contains(&group) {
        let supported = ["serving.knative.dev/v1", "v1"];
        p.unsupported(&format!("{path}.ref.apiVersion"), text(reference, "apiVersion"), &supported);
    }
    if text(reference, "kind") != "Service" {
        p.unsupported(&format!("{path}.ref.kind"), text(reference, "kind"), &["Service"]);
    }
    p.rule(&format!("{path}.ref.name"), text(reference, "name"), names::dns_label);
    if !["", object.namespace()].contains(&text(reference, "namespace")) {
        p.invalid_text(&format!("{path}.ref.namespace"), text(reference, "namespace"), "must be of the same namespace");
    }
    path_of(p, &format!("{path}.uri"), text(value, "uri"));
}

/// Only Services of the namespace are delivered to, also by URL; the object's status says whether it leads to one.
fn url(p: &mut Problems, namespace: &str, path: &str, uri: &str) {
    if uri.is_empty() {
        p.required(&format!("{path}.ref"), "a Knative Service or a Service, or uri with the URL of one");
        return;
    }
    let host = uri.strip_prefix("http://").and_then(|rest| rest.split(['/', ':']).next()).unwrap_or_default();
    let mut labels = host.split('.').skip(1);
    let own = labels.next() == Some(namespace) && matches!(labels.next(), None | Some("svc"));
    let clean = uri.len() <= 1024 && uri.bytes().all(|b| b.is_ascii_graphic() && !b"@#".contains(&b));
    if !own || !clean {
        let wanted = format!(
            "must lead to a Service of this namespace, as http://NAME.{namespace}.svc.cluster.local/PATH; other URLs are not delivered to"
        );
        p.invalid_text(&format!("{path}.uri"), uri, &wanted);
    }
}

fn delivery(p: &mut Problems, object: &Object, delivery: &Value) {
    for field in ["backoffDelay", "timeout"] {
        let value = text(delivery, field);
        if !value.is_empty() && time::iso_seconds(value).is_none_or(|seconds| !(1..=3600).contains(&seconds)) {
            let path = format!("spec.delivery.{field}");
            p.invalid_text(&path, value, "must be an ISO 8601 duration of at most an hour, such as PT2S");
        }
    }
    if has(delivery, "deadLetterSink") {
        destination(p, object, "spec.delivery.deadLetterSink", at(delivery, "deadLetterSink"));
    }
}

pub fn validate_schedule(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    if new.name().len() > NAME {
        p.invalid_text("metadata.name", new.name(), &format!("must be no more than {NAME} characters"));
    }
    p.rule("spec.function", text(spec, "function"), names::dns_label);
    if let Err(error) = cron::Schedule::parse(text(spec, "schedule")) {
        p.invalid_text("spec.schedule", text(spec, "schedule"), &error);
    }
    if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(text(spec, "body")) {
        p.invalid_text("spec.body", text(spec, "body"), &format!("must be JSON: {error}"));
    }
    p.into_causes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(causes: Vec<Cause>) -> Vec<String> {
        causes.into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn triggers_say_what_is_wrong_with_them() {
        let trigger = |change: serde_json::Value| {
            let mut spec =
                json!({"broker": "b", "subscriber": {"ref": {"apiVersion": "v1", "kind": "Service", "name": "s"}}});
            for (name, value) in change.as_object().unwrap() {
                spec[name] = value.clone();
            }
            fields(validate_trigger(&json!({"metadata": {"namespace": "n"}, "spec": spec}), None))
        };
        assert!(trigger(json!({"filter": {"attributes": {"type": "x", "myext1": ""}}})).is_empty());
        assert_eq!(trigger(json!({"filter": {"attributes": {"Type": "x"}}})), ["spec.filter.attributes[Type]"]);
        assert_eq!(trigger(json!({"subscriber": {}})), ["spec.subscriber.ref"]);
        for elsewhere in ["http://x", "https://s.n.svc/", "http://s.other.svc/", "http://a@s.n.svc/", "/path"] {
            assert_eq!(trigger(json!({"subscriber": {"uri": elsewhere}})), ["spec.subscriber.uri"], "{elsewhere}");
        }
        assert!(trigger(json!({"subscriber": {"uri": "http://s.n.svc.cluster.local/in?a=1"}})).is_empty());
        let filters = |filter: serde_json::Value| trigger(json!({ "filters": [filter] }));
        assert!(filters(json!({"any": [{"not": {"exact": {"type": "x"}}}, {"suffix": {"source": "/y"}}]})).is_empty());
        assert_eq!(filters(json!({"cesql": "source LIKE '%x'"})), ["spec.filters[0].cesql"]);
        assert_eq!(filters(json!({})), ["spec.filters[0]"]);
        assert_eq!(filters(json!({"exact": {"id": "1"}, "prefix": {"id": "1"}})), ["spec.filters[0]"]);
        assert_eq!(filters(json!({"not": {"prefix": {"Type": "x"}}})), ["spec.filters[0].not.prefix[Type]"]);
        assert_eq!(filters(json!({"all": [{"exact": {"id": ""}}]})), ["spec.filters[0].all[0].exact[id]"]);
        let mut deep = json!({"exact": {"id": "1"}});
        (0..20).for_each(|_| deep = json!({"not": deep}));
        assert_eq!(filters(deep).len(), 1);
        let delay = |text: &str| trigger(json!({"delivery": {"backoffDelay": text}}));
        assert!(delay("PT0.2S").is_empty());
        assert_eq!(delay("2s"), ["spec.delivery.backoffDelay"]);
        let sink = json!({"ref": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d", "namespace": "m"}});
        let path = "spec.delivery.deadLetterSink.ref";
        let wanted = ["apiVersion", "kind", "namespace"].map(|field| format!("{path}.{field}"));
        assert_eq!(trigger(json!({"delivery": {"deadLetterSink": sink}})), wanted);
    }

    #[test]
    fn bodies_and_times_are_checked() {
        let message = |body: &str| fields(validate_message(&json!({"spec": {"function": "f", "body": body}}), None));
        assert!(message("e30=").is_empty() && message("").is_empty());
        assert_eq!(message("{}"), ["spec.body"]);
        let large = base64::engine::general_purpose::STANDARD.encode(vec![0; EVENT + 1]);
        assert_eq!(message(&large), ["spec.body"]);
        let schedule = |schedule: &str, body: &str, name: &str| {
            let spec = json!({"function": "f", "schedule": schedule, "body": body});
            fields(validate_schedule(&json!({"metadata": {"name": name}, "spec": spec}), None))
        };
        assert!(schedule("@daily", "{}", "s").is_empty());
        assert_eq!(schedule("daily", "{", &"s".repeat(53)), ["metadata.name", "spec.schedule", "spec.body"]);
        let nameless = json!({"spec": {"function": "F_", "schedule": "@daily", "body": "1"}});
        assert_eq!(fields(validate_schedule(&nameless, None)), ["spec.function"]);
    }
}
