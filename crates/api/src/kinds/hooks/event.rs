//! Events for functions: messages, and the schedules that make them.

use super::field::{Problems, at, text};
use crate::cron;
use crate::names;
use crate::object::{Meta, Object};
use crate::status::Cause;
use base64::Engine as _;

/// Bytes of an event.
const EVENT: usize = 256 << 10;
/// A schedule's messages are named by it and a number.
const NAME: usize = 52;

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
    p.into_causes()
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
