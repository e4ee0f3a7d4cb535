//! Knative Serving: a Service is a Configuration and a Route; each change of a Configuration's template makes a Revision,
//! a Revision is a Deployment and a Service of its own; a Route sends requests to revisions.
//!
//! ```text
//! Service ─┬─▶ Configuration ──▶ Revision <name>-00001 ──▶ Deployment, Service <name>-00001
//!          └─▶ Route ──▶ Service <name>, HTTPRoute <name>  (and <tag>-<name> of both for each tag)
//! ```
//! Revisions that get requests, or are to be looked at for the first time, have pods, as many as [`autoscaler`] finds
//! right; the others have none.

mod autoscaler;
mod configuration;
mod revision;
mod route;
mod scale;
mod service;
#[cfg(test)]
mod tests;

pub(crate) use autoscaler::run as autoscale;
pub(crate) use configuration::new as configurations;
pub(crate) use revision::new as revisions;
pub(crate) use route::new as routes;
pub(crate) use service::new as services;

use crate::context::Context;
use crate::objects::list;
use api::kind::Resource;
use api::object::{Meta, Object, SharedObject, child, object_of};
use api::sleep::{ASLEEP, SLEEP, Sleep};
use api::status::StatusResult;
use serde_json::{Value, json};

const SERVICE: &str = "serving.knative.dev/service";
const SERVICE_UID: &str = "serving.knative.dev/serviceUID";
const CONFIGURATION: &str = "serving.knative.dev/configuration";
const CONFIGURATION_UID: &str = "serving.knative.dev/configurationUID";
const GENERATION: &str = "serving.knative.dev/configurationGeneration";
const REVISION: &str = "serving.knative.dev/revision";
const REVISION_UID: &str = "serving.knative.dev/revisionUID";
const ROUTE: &str = "serving.knative.dev/route";
/// `pending` until a route names it first, then `active` or `reserve`.
const ROUTING_STATE: &str = "serving.knative.dev/routingState";
const LOCAL: &str = "networking.knative.dev/visibility";

/// What a revision's pods do at zero; `None`: they go.
fn sleep_of(revision: &Object) -> Option<Sleep> {
    let class = revision.str_at("/spec/runtimeClassName");
    // what is no such word was refused by the API
    Sleep::of_revision(revision.annotation(SLEEP), class).ok().flatten()
}

/// How a revision's pods sleep now, as its Deployment says.
fn pods_asleep(deployment: &Object) -> Option<Sleep> {
    deployment.annotation(ASLEEP).and_then(|text| Sleep::of_pod(text).ok())
}

/// What a condition says: nothing yet, good, or bad and why.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Unknown(String, String),
    True,
    False(String, String),
}

impl State {
    fn unknown(reason: &str, message: &str) -> State {
        State::Unknown(reason.to_owned(), message.to_owned())
    }
    fn failed(reason: impl Into<String>, message: impl Into<String>) -> State {
        State::False(reason.into(), message.into())
    }
    /// A condition of another object; not about its newest generation is not known.
    fn of(object: Option<&SharedObject>, kind: &str) -> State {
        let Some(object) = object else { return State::unknown("", "") };
        let observed = crate::objects::int(object, "/status/observedGeneration").unwrap_or(0);
        let found = list(object, "/status/conditions").iter().find(|condition| condition.str_at("/type") == kind);
        let text = |field: &str| found.map_or("", |found| found.str_at(field)).to_owned();
        match found.map_or("", |found| found.str_at("/status")) {
            _ if observed != object.generation() => State::unknown("", ""),
            "True" => State::True,
            "False" => State::False(text("/reason"), text("/message")),
            _ => State::Unknown(text("/reason"), text("/message")),
        }
    }
}

/// Sets these conditions and `Ready`, which is false if one is false, else unknown if one is. Sorted by type, as Knative
/// writes them.
fn set_conditions(status: &mut Value, states: &[(&str, State)], now: &str) {
    // Of equals the first, which is nearest to the cause.
    let worst = states.iter().rev().map(|(_, state)| state).max_by_key(|state| match state {
        State::True => 0,
        State::Unknown(..) => 1,
        State::False(..) => 2,
    });
    let ready = worst.cloned().unwrap_or(State::True);
    let all = states.iter().cloned().chain([("Ready", ready)]);
    for (kind, state) in all {
        let (status_text, reason, message) = match &state {
            State::True => ("True", "", ""),
            State::False(reason, message) => ("False", reason.as_str(), message.as_str()),
            State::Unknown(reason, message) => ("Unknown", reason.as_str(), message.as_str()),
        };
        let new = crate::context::Condition { kind, status: status_text, reason, message };
        crate::context::set_condition(status, new, now, &[]);
    }
    if let Some(Value::Array(list)) = status.get_mut("conditions") {
        list.sort_by(|a, b| a.str_at("/type").cmp(b.str_at("/type")));
    }
}

/// Labels and annotations of `from` that Knative hands down.
fn handed_down(from: &Object, field: &str) -> Value {
    let mut all = from.pointer(&format!("/metadata/{field}")).cloned().filter(Value::is_object).unwrap_or(json!({}));
    object_of(&mut all).retain(|key, _| !key.starts_with("kubectl.kubernetes.io/"));
    all
}

/// A name for something made for `parent`, at most 63 long.
fn child_name(parent: &str, suffix: &str) -> String {
    let full = format!("{parent}{suffix}");
    if full.len() <= 63 {
        return full;
    }
    let mark = api::names::safe_encode(&crate::objects::fnv32a(full.bytes()).to_string());
    crate::objects::joined(parent, &format!("-{mark}{suffix}"), 63)
}

/// Brings the parts of a made object that matter (`spec`, labels, annotations) to what is wanted; others' labels and
/// annotations stay. Creates it if missing. Objects of somebody else are not touched: `Err` with their name.
async fn ensure(
    context: &Context,
    resource: &Resource,
    known: Option<SharedObject>,
    namespace: &str,
    wanted: Object,
) -> StatusResult<Result<SharedObject, String>> {
    let Some(known) = known else {
        let made = context.create_or_get(resource, namespace, wanted.clone()).await?;
        return Ok(owned(made, &wanted));
    };
    let known = match owned(known, &wanted) {
        Ok(known) => known,
        Err(name) => return Ok(Err(name)),
    };
    let mut new = (*known).clone();
    for field in ["labels", "annotations"] {
        for (key, value) in crate::objects::map(&wanted, &format!("/metadata/{field}")) {
            child(new.metadata_mut(), field).insert(key.clone(), value.clone());
        }
    }
    if let Some(spec) = wanted.get("spec") {
        let fields = child(object_of(&mut new), "spec");
        for (key, value) in spec.as_object().into_iter().flatten() {
            match value.is_null() {
                true => drop(fields.remove(key)),
                false => drop(fields.insert(key.clone(), value.clone())),
            }
        }
    }
    Ok(Ok(context.write(resource, &known, new).await?))
}

fn owned(object: SharedObject, wanted: &Object) -> Result<SharedObject, String> {
    let owner = wanted.controller_ref().map_or("", |owner| owner.str_at("/uid"));
    match crate::objects::is_controlled_by(&object, owner) {
        true => Ok(object),
        false => Err(object.name().to_owned()),
    }
}
