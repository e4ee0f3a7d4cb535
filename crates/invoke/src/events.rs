//! Brokers and Triggers: CloudEvents come in, over HTTP or from this cloud itself, and become messages for the subscribers of
//! the triggers that want them. Who sent one is told so when the store has all of its messages.

use crate::answer::Answer;
use crate::cloudevent::{self, CloudEvent, Invalid};
use crate::destination;
use crate::dispatch::is_lambda;
use crate::filters;
use crate::messages::{LARGEST, Messages, Parcel, Reply, Target};
use api::client::ListOptions;
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject, object_of};
use api::status::Status;
use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Annotation of a Broker that gets an event for every push to the registry: the beginning of repositories' names.
const PUSHES: &str = "eventing.atoll.dev/registry-push";
const PUSHED: &str = "dev.atoll.registry.push";
const RETRIES: i64 = 9;
/// Answers that are events may follow each other so often, as in Knative.
const HOPS: i64 = 255;
const BODY_TIME: Duration = Duration::from_secs(60);
/// Between two looks at what is referred to.
const LOOK: Duration = Duration::from_secs(60);

/// A manifest that was put into the registry.
#[derive(Clone, Debug)]
pub struct Push {
    pub repository: String,
    pub tag: Option<String>,
    pub digest: String,
    pub media_type: String,
}

fn eventing(plural: &str) -> Resource {
    Resource::new("eventing.knative.dev", "v1", plural)
}

pub struct Events {
    messages: Arc<Messages>,
    brokers: Informer,
    triggers: Informer,
    services: Informer,
    /// Where events are taken over HTTP.
    address: Option<SocketAddr>,
    token: Option<String>,
}

/// Why an event was not taken.
enum Refused {
    NoBroker,
    Invalid(Invalid),
    Large,
    Late,
    Store(Status),
}

impl From<Invalid> for Refused {
    fn from(invalid: Invalid) -> Refused {
        Refused::Invalid(invalid)
    }
}

impl Events {
    pub fn new(messages: Arc<Messages>, address: Option<SocketAddr>, token: Option<String>) -> Events {
        let follow =
            |resource| Informer::spawn(messages.dispatcher.client.clone(), resource, "", ListOptions::default());
        let (brokers, triggers) = (follow(eventing("brokers")), follow(eventing("triggers")));
        let services = follow(Resource::new("", "v1", "services"));
        Events { messages, brokers, triggers, services, address, token }
    }

    /// Without a token whoever reaches the address may send events: then it is this machine's own.
    fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let (Some(one), None) = (given.next(), given.next()) else { return false };
        let given = one.as_bytes().split_at_checked("Bearer ".len());
        given.is_some_and(|(scheme, given)| {
            let same =
                given.len() == token.len() && given.iter().zip(token.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0;
            scheme.eq_ignore_ascii_case(b"bearer ") && same
        })
    }

    /// Takes what was posted to `/NAMESPACE/BROKER`.
    pub async fn answer(&self, request: Request<Incoming>) -> Answer {
        if request.method() != Method::POST {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "events are posted");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return answer;
        }
        if !self.allows(request.headers()) {
            let mut answer =
                text(StatusCode::UNAUTHORIZED, "the token of --events-token is needed: authorization: Bearer TOKEN");
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return answer;
        }
        match self.take(request).await {
            Ok(()) => text(StatusCode::ACCEPTED, ""),
            Err(Refused::NoBroker) => {
                text(StatusCode::NOT_FOUND, "no such broker; events are posted to /NAMESPACE/BROKER")
            }
            Err(Refused::Invalid(invalid @ Invalid::Format(_))) => {
                text(StatusCode::UNSUPPORTED_MEDIA_TYPE, &invalid.to_string())
            }
            Err(Refused::Invalid(invalid)) => text(StatusCode::BAD_REQUEST, &invalid.to_string()),
            Err(Refused::Large) => {
                text(StatusCode::PAYLOAD_TOO_LARGE, &format!("an event has at most {LARGEST} bytes"))
            }
            Err(Refused::Late) => text(StatusCode::REQUEST_TIMEOUT, "the event did not arrive in time"),
            Err(Refused::Store(status)) => {
                let code = StatusCode::from_u16(status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                let code = if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS {
                    StatusCode::SERVICE_UNAVAILABLE
                } else {
                    code
                };
                text(code, &status.to_string())
            }
        }
    }

    async fn take(&self, request: Request<Incoming>) -> Result<(), Refused> {
        let (parts, body) = request.into_parts();
        let mut segments = parts.uri.path().trim_matches('/').split('/');
        let (Some(namespace), Some(name), None) = (segments.next(), segments.next(), segments.next()) else {
            return Err(Refused::NoBroker);
        };
        self.brokers.synced().await;
        self.triggers.synced().await;
        let broker =
            self.brokers.get(namespace, name).filter(|broker| !broker.is_deleting()).ok_or(Refused::NoBroker)?;
        let collected = tokio::time::timeout(BODY_TIME, Limited::new(body, LARGEST).collect()).await;
        let body = match collected.map_err(|_| Refused::Late)? {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => return Err(Refused::Large),
            Err(error) => return Err(Invalid::Content(error.to_string()).into()),
        };
        for event in cloudevent::read(&parts.headers, body)? {
            self.publish(&broker, &event, HOPS).await.map_err(Refused::Store)?;
        }
        Ok(())
    }

    /// Returns when the store has a message for every trigger that wants the event.
    async fn publish(&self, broker: &SharedObject, event: &CloudEvent, hops: i64) -> Result<(), Status> {
        for trigger in self.triggers.list_in(broker.namespace()) {
            let wants = || filters::wants(trigger.get("spec").unwrap_or(&Value::Null), event);
            if trigger.str_at("/spec/broker") == broker.name() && !trigger.is_deleting() && wants() {
                self.put(broker, &trigger, event, hops).await?;
            }
        }
        Ok(())
    }

    /// What a subscriber answered, which may be followed by `hops` more answers. A broker that is gone wants nothing.
    pub async fn reply(&self, namespace: &str, broker: &str, event: &CloudEvent, hops: i64) -> Result<(), Status> {
        match self.brokers.get(namespace, broker).filter(|broker| !broker.is_deleting()) {
            Some(broker) => self.publish(&broker, event, hops).await,
            None => Ok(()),
        }
    }

    fn target(&self, destination: Option<&Value>, namespace: &str) -> Result<Target, String> {
        let dispatcher = &self.messages.dispatcher;
        let is_function = |name: &str| dispatcher.find(namespace, name).is_ok();
        destination::target(destination, namespace, &dispatcher.domain, is_function)
    }

    async fn put(
        &self,
        broker: &SharedObject,
        trigger: &SharedObject,
        event: &CloudEvent,
        hops: i64,
    ) -> Result<(), Status> {
        let delivery =
            trigger.pointer("/spec/delivery").or_else(|| broker.pointer("/spec/delivery")).unwrap_or(&Value::Null);
        let seconds = |field: &str| delivery.get(field).and_then(Value::as_str).and_then(api::time::iso_seconds);
        // One that can lead nowhere was not let in; the trigger's status says so.
        let Ok(target) = self.target(trigger.pointer("/spec/subscriber"), trigger.namespace()) else { return Ok(()) };
        let lambda = !target.service
            && self.messages.dispatcher.find(trigger.namespace(), &target.name).is_ok_and(|found| is_lambda(&found));
        let (headers, body) = match lambda || delivery.get("format").and_then(Value::as_str) == Some("json") {
            // Lambda functions see no headers.
            true => {
                let content_type = ("content-type".to_owned(), "application/cloudevents+json".to_owned());
                (vec![content_type], Bytes::from(event.to_json().to_string()))
            }
            false => (event.headers(), event.data.clone()),
        };
        let parcel = Parcel {
            namespace: trigger.namespace(),
            owner: json!({"apiVersion": "eventing.knative.dev/v1", "kind": "Trigger", "name": trigger.name(), "uid": trigger.uid()}),
            target,
            headers,
            body: &body,
            attempts: delivery.get("retry").and_then(Value::as_i64).unwrap_or(RETRIES) + 1,
            linear: delivery.get("backoffPolicy").and_then(Value::as_str) == Some("linear"),
            pause: seconds("backoffDelay"),
            timeout: seconds("timeout"),
            dead_letter: delivery
                .get("deadLetterSink")
                .and_then(|sink| self.target(Some(sink), trigger.namespace()).ok()),
            reply: Some(Reply { broker: broker.name().to_owned(), hops }),
        };
        self.messages.send(parcel).await
    }

    /// Gives pushes to the brokers that want them, for ever.
    pub async fn follow(self: Arc<Self>, mut pushes: mpsc::Receiver<Push>) {
        self.brokers.synced().await;
        self.triggers.synced().await;
        while let Some(push) = pushes.recv().await {
            let event = match of_push(&push) {
                Ok(event) => event,
                Err(error) => {
                    tracing::warn!(repository = push.repository, %error, "a push is no event");
                    continue;
                }
            };
            for broker in self.brokers.list() {
                let wanted =
                    broker.pointer("/metadata/annotations").and_then(|all| all.get(PUSHES)).and_then(Value::as_str);
                if !wanted.is_some_and(|prefix| push.repository.starts_with(prefix)) || broker.is_deleting() {
                    continue;
                }
                if let Err(error) = self.publish(&broker, &event, HOPS).await {
                    tracing::warn!(broker = broker.name(), %error, "an event of a push to the registry was lost");
                }
            }
        }
    }

    /// Keeps the states of brokers and triggers, for ever.
    pub async fn keep(self: Arc<Self>) {
        for informer in [&self.brokers, &self.triggers, &self.services, &self.messages.dispatcher.functions] {
            informer.synced().await;
        }
        let mut changes = [&self.brokers, &self.triggers, &self.services, &self.messages.dispatcher.functions]
            .map(Informer::subscribe);
        loop {
            for broker in self.brokers.list() {
                self.tell(eventing("brokers"), &broker, self.broker_status(&broker)).await;
            }
            for trigger in self.triggers.list() {
                self.tell(eventing("triggers"), &trigger, self.trigger_status(&trigger)).await;
            }
            let [brokers, triggers, services, functions] = &mut changes;
            tokio::select! {
                _ = brokers.next() => {}
                _ = triggers.next() => {}
                _ = services.next() => {}
                _ = functions.next() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn broker_status(&self, broker: &SharedObject) -> (Value, Vec<Condition>) {
        match self.address {
            Some(address) => {
                let url = format!("http://{address}/{}/{}", broker.namespace(), broker.name());
                (json!({"address": {"name": "http", "url": url}}), vec![Condition::good("Addressable")])
            }
            None => {
                let why = "`atoll up --events-addr` says where events are taken";
                (json!({}), vec![Condition::bad("Addressable", "NoAddress", why)])
            }
        }
    }

    fn trigger_status(&self, trigger: &SharedObject) -> (Value, Vec<Condition>) {
        let namespace = trigger.namespace();
        let broker = match self.brokers.get(namespace, trigger.str_at("/spec/broker")) {
            Some(_) => Condition::good("BrokerReady"),
            None => {
                let why =
                    format!("broker {:?} does not exist in namespace {namespace}", trigger.str_at("/spec/broker"));
                Condition::bad("BrokerReady", "BrokerDoesNotExist", &why)
            }
        };
        let mut status = json!({});
        let mut conditions = vec![broker];
        let places = [
            ("/spec/subscriber", "SubscriberResolved", "subscriberUri"),
            ("/spec/delivery/deadLetterSink", "DeadLetterSinkResolved", "deadLetterSinkUri"),
        ];
        for (pointer, kind, field) in places {
            let Some(destination) = trigger.pointer(pointer) else { continue };
            match self.target(Some(destination), namespace).and_then(|target| self.there(namespace, target)) {
                Ok(target) => {
                    status[field] = target.url(namespace, &self.messages.dispatcher.domain).into();
                    conditions.push(Condition::good(kind));
                }
                Err(why) => conditions.push(Condition::bad(kind, "Unresolved", &why)),
            }
        }
        (status, conditions)
    }

    fn there(&self, namespace: &str, target: Target) -> Result<Target, String> {
        let found = match target.service {
            true => self.services.get(namespace, &target.name).is_some(),
            false => self.messages.dispatcher.find(namespace, &target.name).is_ok(),
        };
        let what = if target.service { "Service" } else { "Knative Service" };
        if found {
            Ok(target)
        } else {
            Err(format!("{what} {:?} does not exist in namespace {namespace}", target.name))
        }
    }

    async fn tell(&self, resource: Resource, object: &SharedObject, (mut status, conditions): (Value, Vec<Condition>)) {
        let now = api::time::now_rfc3339();
        let known = |kind: &str, state: &str| {
            let list = object.pointer("/status/conditions").and_then(Value::as_array);
            let before = list.and_then(|list| list.iter().find(|c| c["type"] == kind && c["status"] == state));
            before.map_or_else(|| now.clone().into(), |before| before["lastTransitionTime"].clone())
        };
        let bad = conditions.iter().find(|condition| condition.problem.is_some());
        let ready = Condition { kind: "Ready", problem: bad.and_then(|bad| bad.problem.clone()) };
        let list: Vec<Value> = conditions.iter().chain([&ready]).map(|condition| condition.to_json(known)).collect();
        status["conditions"] = list.into();
        status["observedGeneration"] = object.generation().into();
        if object.get("status") == Some(&status) {
            return;
        }
        let mut new = (**object).clone();
        object_of(&mut new).insert("status".into(), status);
        let client = &self.messages.dispatcher.client;
        if let Err(error) = client.update_status(&resource, object.namespace(), new).await
            && !error.is_not_found()
        {
            tracing::debug!(name = object.name(), %error, "its state was not written down, and will be");
        }
    }
}

struct Condition {
    kind: &'static str,
    /// Reason and message of what is wrong.
    problem: Option<(String, String)>,
}

impl Condition {
    fn good(kind: &'static str) -> Condition {
        Condition { kind, problem: None }
    }

    fn bad(kind: &'static str, reason: &str, message: &str) -> Condition {
        Condition { kind, problem: Some((reason.to_owned(), message.to_owned())) }
    }

    fn to_json(&self, since: impl Fn(&str, &str) -> Value) -> Value {
        match &self.problem {
            None => json!({"type": self.kind, "status": "True", "lastTransitionTime": since(self.kind, "True")}),
            Some((reason, message)) => {
                json!({"type": self.kind, "status": "False", "reason": reason, "message": message,
                                              "lastTransitionTime": since(self.kind, "False")})
            }
        }
    }
}

fn of_push(push: &Push) -> Result<CloudEvent, Invalid> {
    let attributes = [
        ("specversion", "1.0".to_owned()),
        ("id", api::names::uid()),
        ("source", format!("/registry/{}", push.repository)),
        ("type", PUSHED.to_owned()),
        ("subject", push.tag.clone().unwrap_or_else(|| push.digest.clone())),
        ("time", api::time::now_rfc3339()),
    ];
    let data =
        json!({"repository": push.repository, "tag": push.tag, "digest": push.digest, "mediaType": push.media_type});
    CloudEvent::new(attributes.map(|(name, value)| (name.to_owned(), value)), &data)
}

fn text(status: StatusCode, text: &str) -> Answer {
    let body = if text.is_empty() { String::new() } else { format!("{text}\n") };
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_is_an_event() {
        let push = Push {
            repository: "team/app".into(),
            tag: Some("1".into()),
            digest: "sha256:x".into(),
            media_type: "m".into(),
        };
        let event = of_push(&push).unwrap();
        assert_eq!((event.get("type"), event.get("subject")), (Some(PUSHED), Some("1")));
        assert_eq!(event.to_json()["data"]["repository"], "team/app");
    }
}
