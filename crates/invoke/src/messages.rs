//! Events that nobody waits for: written to the store before they are acknowledged, delivered at least once, tried again
//! with growing pauses. What cannot be delivered stays, marked as dead, for a while.
//!
//! A message is an object of `functions.atoll.dev/v1alpha1`; its status says how often it was tried, and why it failed.

use crate::cloudevent::{self, CloudEvent};
use crate::dispatch::{Call, Dispatcher, Form, Outcome};
use crate::events::Events;
use api::client::{DeleteOptions, ListOptions};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject, object_of};
use api::status::StatusResult;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Bytes of an event that is not waited for, as Lambda has it.
pub const LARGEST: usize = 256 << 10;
/// Messages of a namespace that may wait.
const WAITING: usize = 10_000;
const WAITING_BYTES: usize = 64 << 20;
const ATTEMPTS: i64 = 3;
/// Before the second attempt; doubled for each further one.
const FIRST_PAUSE: i64 = 5;
const LONGEST_PAUSE: i64 = 3600;
/// How long a dead one is kept, seconds.
const KEEP: i64 = 7 * 86_400;
/// Attempts of a namespace under way.
const AT_ONCE: usize = 16;
const LOOK: Duration = Duration::from_secs(600);

pub fn resource() -> Resource {
    Resource::new("functions.atoll.dev", "v1alpha1", "messages")
}

/// An event, as it is put.
pub struct Event<'a> {
    /// One is made for it without.
    pub name: Option<&'a str>,
    pub body: &'a [u8],
    pub attempts: Option<i64>,
}

/// Who gets a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    /// A Service, rather than a Knative Service.
    pub service: bool,
    pub path: String,
}

impl Target {
    pub fn url(&self, namespace: &str, domain: &str) -> String {
        format!("http://{}.{namespace}.svc.{domain}{}", self.name, self.path)
    }

    fn to_json(&self) -> Value {
        let kind = if self.service { "Service" } else { "Function" };
        json!({"function": self.name, "kind": kind, "path": self.path})
    }

    fn of(value: &Value) -> Target {
        let text = |field: &str, default: &str| value.get(field).and_then(Value::as_str).unwrap_or(default).to_owned();
        Target { name: text("function", ""), service: text("kind", "") == "Service", path: text("path", "/") }
    }
}

/// A CloudEvent for one trigger's subscriber.
pub struct Parcel<'a> {
    pub namespace: &'a str,
    /// Owner reference: what it ends with.
    pub owner: Value,
    pub target: Target,
    pub headers: Vec<(String, String)>,
    pub body: &'a [u8],
    pub attempts: i64,
    pub linear: bool,
    /// Seconds.
    pub pause: Option<i64>,
    pub timeout: Option<i64>,
    pub dead_letter: Option<Target>,
    pub reply: Option<Reply>,
}

/// Where an answer goes that is an event itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub broker: String,
    /// How many such answers may still follow each other, as Knative's `knativebrokerttl`.
    pub hops: i64,
}

/// What waits, and who delivers it.
pub struct Messages {
    pub dispatcher: Arc<Dispatcher>,
    known: Informer,
}

impl Messages {
    pub fn new(dispatcher: Arc<Dispatcher>) -> Messages {
        let known = Informer::spawn(dispatcher.client.clone(), resource(), "", ListOptions::default());
        Messages { dispatcher, known }
    }

    /// Returns when the store has it. A message of that name that is there already is left as it is.
    pub async fn put(&self, function: &SharedObject, event: Event<'_>) -> StatusResult<()> {
        let namespace = function.namespace();
        self.room(namespace, event.body.len())?;
        let owner = json!([{"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": function.name(),
                            "uid": function.uid()}]);
        let mut object = json!({
            "apiVersion": "functions.atoll.dev/v1alpha1", "kind": "Message",
            "metadata": {"namespace": namespace, "ownerReferences": owner},
            "spec": {"function": function.name(), "attempts": event.attempts.unwrap_or(ATTEMPTS),
                     "body": STANDARD.encode(event.body)},
        });
        match event.name {
            Some(name) => object.metadata_mut().insert("name".into(), name.into()),
            None => object.metadata_mut().insert("generateName".into(), "event-".into()),
        };
        match self.dispatcher.client.create(&resource(), namespace, object).await {
            Err(status) if event.name.is_some() && status.code() == 409 => Ok(()),
            other => other.map(drop),
        }
    }

    /// Returns when the store has it.
    pub async fn send(&self, parcel: Parcel<'_>) -> StatusResult<()> {
        self.room(parcel.namespace, parcel.body.len())?;
        let mut spec = parcel.target.to_json();
        spec["headers"] = parcel.headers.into_iter().map(|(name, value)| (name, Value::from(value))).collect();
        spec["body"] = STANDARD.encode(parcel.body).into();
        spec["attempts"] = parcel.attempts.into();
        spec["backoffPolicy"] = if parcel.linear { "linear" } else { "exponential" }.into();
        for (field, seconds) in [("backoffSeconds", parcel.pause), ("timeoutSeconds", parcel.timeout)] {
            if let Some(seconds) = seconds {
                spec[field] = seconds.into();
            }
        }
        if let Some(target) = parcel.dead_letter {
            spec["deadLetter"] = target.to_json();
        }
        if let Some(reply) = parcel.reply {
            spec["reply"] = json!({"broker": reply.broker, "hops": reply.hops});
        }
        let object = json!({
            "apiVersion": "functions.atoll.dev/v1alpha1", "kind": "Message",
            "metadata": {"namespace": parcel.namespace, "generateName": "event-", "ownerReferences": [parcel.owner]},
            "spec": spec,
        });
        self.dispatcher.client.create(&resource(), parcel.namespace, object).await.map(drop)
    }

    /// Whether a namespace may have one more.
    fn room(&self, namespace: &str, more: usize) -> StatusResult<()> {
        let waiting = self.known.list_in(namespace);
        let bytes: usize = waiting.iter().map(|message| message.str_at("/spec/body").len()).sum();
        if waiting.len() >= WAITING || bytes + more * 4 / 3 > WAITING_BYTES {
            let message = format!(
                "{} messages of {bytes} bytes wait in namespace {namespace}, of at most {WAITING} and {WAITING_BYTES}; \
                 see `kubectl get messages`",
                waiting.len()
            );
            return Err(api::Status::new(api::status::Reason::TooManyRequests, message));
        }
        Ok(())
    }

    /// Delivers what is due, for ever; answers that are events go to `events`.
    pub async fn deliver(self: Arc<Self>, events: Arc<Events>) {
        let mut changes = self.known.subscribe();
        let under_way = Arc::new(UnderWay::default());
        loop {
            let now = api::time::now();
            let mut next = None;
            for message in self.known.list() {
                let due = due(&message);
                if due > now {
                    next = Some(next.map_or(due, |next: i64| next.min(due)));
                } else if under_way.begin(&message) {
                    let (events, dispatcher, under_way) = (events.clone(), self.dispatcher.clone(), under_way.clone());
                    tokio::spawn(async move {
                        if !attempt(&dispatcher, &events, &message).await {
                            // The store takes nothing now.
                            tokio::time::sleep(Duration::from_secs(FIRST_PAUSE.unsigned_abs())).await;
                        }
                        under_way.end(&message);
                    });
                }
            }
            let pause = next.map_or(LOOK, |next| Duration::from_secs((next - now).unsigned_abs()).min(LOOK));
            tokio::select! {
                _ = changes.next() => {}
                () = under_way.ended.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Messages that are being delivered: their uids by namespace, so that one namespace's slow functions hold up no other's.
#[derive(Default)]
struct UnderWay {
    uids: Mutex<HashMap<String, HashSet<String>>>,
    ended: Notify,
}

impl UnderWay {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, HashSet<String>>> {
        self.uids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is room for it, and it is not under way already.
    fn begin(&self, message: &SharedObject) -> bool {
        let mut all = self.lock();
        let uids = all.entry(message.namespace().to_owned()).or_default();
        uids.len() < AT_ONCE && uids.insert(message.uid().to_owned())
    }

    fn end(&self, message: &SharedObject) {
        let mut all = self.lock();
        if let Some(uids) = all.get_mut(message.namespace()) {
            uids.remove(message.uid());
            if uids.is_empty() {
                all.remove(message.namespace());
            }
        }
        self.ended.notify_one();
    }
}

/// Unix seconds at which something is to be done for a message: an attempt, or, when it is dead, its removal.
fn due(message: &SharedObject) -> i64 {
    let time = api::time::parse(message.str_at("/status/nextAttempt")).unwrap_or(0);
    if is_dead(message) { time + KEEP } else { time }
}

fn is_dead(message: &SharedObject) -> bool {
    message.str_at("/status/state") == "Dead"
}

/// After so many attempts.
fn pause(attempts: i64, first: i64, linear: bool) -> i64 {
    let factor = if linear { attempts } else { 1 << (attempts - 1).clamp(0, 20) };
    first.saturating_mul(factor).clamp(1, LONGEST_PAUSE)
}

/// Whether the store knows what came of it.
async fn attempt(dispatcher: &Dispatcher, events: &Events, known: &SharedObject) -> bool {
    // What was followed may be older than what an attempt just before wrote.
    let (namespace, name) = (known.namespace(), known.name());
    let message = match dispatcher.client.get(&resource(), namespace, name).await {
        Ok(message) => message,
        Err(status) => return status.is_not_found(),
    };
    if due(&message) > api::time::now() || message.uid() != known.uid() {
        return true;
    }
    if is_dead(&message) {
        return forget(dispatcher, &message).await;
    }
    let (why, code) = match deliver_once(dispatcher, events, &message).await {
        Ok(()) => return forget(dispatcher, &message).await,
        Err(failed) => failed,
    };
    let count = |pointer: &str| message.pointer(pointer).and_then(Value::as_i64);
    let attempts = count("/status/attempts").unwrap_or(0) + 1;
    let dead = attempts >= count("/spec/attempts").unwrap_or(ATTEMPTS);
    if dead && message.pointer("/spec/deadLetter").is_some() {
        return match pass_on(dispatcher, &message, code).await {
            Ok(()) => forget(dispatcher, &message).await,
            Err(error) => {
                tracing::warn!(message = name, %error, "it was not passed on to its dead letter sink, and will be");
                false
            }
        };
    }
    let first = count("/spec/backoffSeconds").unwrap_or(FIRST_PAUSE);
    let linear = message.str_at("/spec/backoffPolicy") == "linear";
    let next = api::time::now() + if dead { 0 } else { pause(attempts, first, linear) };
    let mut new = (*message).clone();
    let status = json!({"attempts": attempts, "state": if dead { "Dead" } else { "Waiting" }, "lastError": why,
                        "nextAttempt": api::time::rfc3339(next)});
    object_of(&mut new).insert("status".into(), status);
    let written = dispatcher.client.update_status(&resource(), namespace, new).await;
    if let Err(error) = &written {
        tracing::warn!(message = name, %error, "its attempt was not written down");
    }
    written.is_ok()
}

/// Or why not, and the answer's status if there was one.
async fn deliver_once(
    dispatcher: &Dispatcher,
    events: &Events,
    message: &SharedObject,
) -> Result<(), (String, Option<u16>)> {
    let body = STANDARD.decode(message.str_at("/spec/body"));
    let body = body.map_err(|error| (format!("its body is not base64: {error}"), None))?;
    let spec = message.get("spec").unwrap_or(&Value::Null);
    let target = Target::of(spec);
    let headers = spec.get("headers").and_then(Value::as_object).map(cloudevent::out).unwrap_or_default();
    let mut request = Form { path: target.path, headers, ..Form::default() };
    if let Some(seconds) = spec.get("timeoutSeconds").and_then(Value::as_u64) {
        request.limit = Duration::from_secs(seconds).min(request.limit);
    }
    let call = Call { event: Bytes::from(body), client_context: None, request };
    let called = match target.service {
        true => dispatcher.call_service(message.namespace(), &target.name, call).await,
        false => dispatcher.call(message.namespace(), &target.name, call).await,
    };
    match called {
        Ok(outcome) if !outcome.failed => {
            let status = outcome.status.as_u16();
            answered(events, message, outcome).await.map_err(|why| (why, Some(status)))
        }
        Ok(outcome) => {
            let why = String::from_utf8_lossy(&outcome.payload).chars().take(1024).collect();
            Err((why, Some(outcome.status.as_u16())))
        }
        Err(error) => Err((error.to_string(), None)),
    }
}

/// An answer that is an event goes back to the broker that the message came from; any other is nobody's.
async fn answered(events: &Events, message: &SharedObject, outcome: Outcome) -> Result<(), String> {
    let Some(reply) = message.pointer("/spec/reply") else { return Ok(()) };
    if !cloudevent::says_so(&outcome.headers) {
        return Ok(());
    }
    let (namespace, broker) = (message.namespace(), reply.str_at("/broker"));
    let hops = reply.get("hops").and_then(Value::as_i64).unwrap_or(0);
    if hops <= 0 {
        tracing::warn!(namespace, broker, "an answer is no event any more: too many followed each other");
        return Ok(());
    }
    if outcome.payload.len() > LARGEST {
        return Err(format!("its answer is an event of {} bytes; {LARGEST} are allowed", outcome.payload.len()));
    }
    let read = cloudevent::read(&outcome.headers, outcome.payload);
    let answers: Vec<CloudEvent> = read.map_err(|why| format!("its answer is an event that is not valid: {why}"))?;
    for answer in answers {
        let put = events.reply(namespace, broker, &answer, hops - 1).await;
        put.map_err(|status| format!("its answer was not taken by the broker {broker}: {status}"))?;
    }
    Ok(())
}

/// Makes a message for the dead letter sink, with the attributes that Knative gives it.
async fn pass_on(dispatcher: &Dispatcher, message: &SharedObject, code: Option<u16>) -> StatusResult<()> {
    let nothing = Value::Null;
    let spec = message.get("spec").unwrap_or(&nothing);
    let mut new = Target::of(spec.get("deadLetter").unwrap_or(&nothing)).to_json();
    new["headers"] = spec.get("headers").filter(|headers| headers.is_object()).cloned().unwrap_or_else(|| json!({}));
    new["headers"]["ce-knativeerrordest"] = Target::of(spec).url(message.namespace(), &dispatcher.domain).into();
    if let Some(code) = code {
        new["headers"]["ce-knativeerrorcode"] = code.to_string().into();
    }
    for field in ["body", "attempts", "backoffPolicy", "backoffSeconds", "timeoutSeconds"] {
        if let Some(value) = spec.get(field) {
            new[field] = value.clone();
        }
    }
    // Of this name there is one, however often it is tried to make it.
    let name = format!("{}-dead", message.name());
    let owners = message.pointer("/metadata/ownerReferences").cloned().unwrap_or_else(|| json!([]));
    let object = json!({
        "apiVersion": "functions.atoll.dev/v1alpha1", "kind": "Message",
        "metadata": {"namespace": message.namespace(), "name": name, "ownerReferences": owners}, "spec": new,
    });
    match dispatcher.client.create(&resource(), message.namespace(), object).await {
        Err(status) if status.code() == 409 => Ok(()),
        other => other.map(drop),
    }
}

async fn forget(dispatcher: &Dispatcher, message: &SharedObject) -> bool {
    let options = DeleteOptions { uid: Some(message.uid().to_owned()), ..DeleteOptions::default() };
    match dispatcher.client.delete(&resource(), message.namespace(), message.name(), &options).await {
        Err(error) if !error.is_not_found() => {
            tracing::warn!(message = message.name(), %error, "it was delivered but not removed, and will come again");
            false
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_dead_ones_rest() {
        assert_eq!([1, 2, 3, 60].map(|n| pause(n, 5, false)), [5, 10, 20, 3600]);
        assert_eq!([1, 2, 3].map(|n| pause(n, 2, true)), [2, 4, 6]);
        let of = |status: serde_json::Value| due(&Arc::new(json!({"status": status})));
        assert_eq!(of(json!({})), 0);
        assert_eq!(of(json!({"nextAttempt": "1970-01-01T00:01:00Z"})), 60);
        assert_eq!(of(json!({"state": "Dead", "nextAttempt": "1970-01-01T00:01:00Z"})), 60 + KEEP);
    }
}
