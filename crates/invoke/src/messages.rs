//! Events that nobody waits for: written to the store before they are acknowledged, delivered at least once, tried again
//! with growing pauses. What cannot be delivered stays, marked as dead, for a while.
//!
//! A message is an object of `functions.atoll.dev/v1alpha1`; its status says how often it was tried, and why it failed.

use crate::dispatch::{Call, Dispatcher};
use api::client::{DeleteOptions, ListOptions};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject, object_of};
use api::status::StatusResult;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::json;
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
        let waiting = self.known.list_in(namespace);
        let bytes: usize = waiting.iter().map(|message| message.str_at("/spec/body").len()).sum();
        if waiting.len() >= WAITING || bytes + event.body.len() * 4 / 3 > WAITING_BYTES {
            let message = format!(
                "{} messages of {bytes} bytes wait in namespace {namespace}, of at most {WAITING} and {WAITING_BYTES}; \
                 see `kubectl get messages`",
                waiting.len()
            );
            return Err(api::Status::new(api::status::Reason::TooManyRequests, message));
        }
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

    /// Delivers what is due, for ever.
    pub async fn deliver(self: Arc<Self>) {
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
                    let (dispatcher, under_way) = (self.dispatcher.clone(), under_way.clone());
                    tokio::spawn(async move {
                        if !attempt(&dispatcher, &message).await {
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

fn pause(attempts: i64) -> i64 {
    let doubled = u32::try_from(attempts - 1).ok().and_then(|n| FIRST_PAUSE.checked_shl(n.min(20)));
    doubled.unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE)
}

/// Whether the store knows what came of it.
async fn attempt(dispatcher: &Dispatcher, known: &SharedObject) -> bool {
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
    let why = match STANDARD.decode(message.str_at("/spec/body")) {
        Err(error) => format!("its body is not base64: {error}"),
        Ok(body) => {
            let call = Call { event: Bytes::from(body), client_context: None };
            match dispatcher.call(namespace, message.str_at("/spec/function"), call).await {
                Ok(outcome) if !outcome.failed => return forget(dispatcher, &message).await,
                Ok(outcome) => String::from_utf8_lossy(&outcome.payload).chars().take(1024).collect(),
                Err(error) => error.to_string(),
            }
        }
    };
    let count = |pointer: &str| message.pointer(pointer).and_then(serde_json::Value::as_i64);
    let attempts = count("/status/attempts").unwrap_or(0) + 1;
    let dead = attempts >= count("/spec/attempts").unwrap_or(ATTEMPTS);
    let next = api::time::now() + if dead { 0 } else { pause(attempts) };
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
        assert_eq!([1, 2, 3, 60].map(pause), [5, 10, 20, 3600]);
        let of = |status: serde_json::Value| due(&Arc::new(json!({"status": status})));
        assert_eq!(of(json!({})), 0);
        assert_eq!(of(json!({"nextAttempt": "1970-01-01T00:01:00Z"})), 60);
        assert_eq!(of(json!({"state": "Dead", "nextAttempt": "1970-01-01T00:01:00Z"})), 60 + KEEP);
    }
}
