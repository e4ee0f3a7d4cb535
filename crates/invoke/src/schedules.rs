//! Events that a clock asks for. Each time a schedule comes due, a message of that time's own name is written, once.

use crate::messages::{Event, Messages};
use api::client::{Client, ListOptions};
use api::cron;
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject, object_of};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Looked at again so often, in case the clock was set.
const LOOK: i64 = 60;

fn resource() -> Resource {
    Resource::new("functions.atoll.dev", "v1alpha1", "schedules")
}

/// Keeps all schedules, for ever.
pub async fn keep(client: Arc<dyn Client>, messages: Arc<Messages>) {
    let schedules = Informer::spawn(client.clone(), resource(), "", ListOptions::default());
    let functions = &messages.dispatcher.functions;
    schedules.synced().await;
    functions.synced().await;
    let (mut changes, mut others) = (schedules.subscribe(), functions.subscribe());
    loop {
        let now = api::time::now();
        let mut pause = if schedules.list().is_empty() { None } else { Some(LOOK) };
        for schedule in schedules.list() {
            let next = look(&client, &messages, &schedule, now).await;
            pause = pause.map(|pause| next.map_or(pause, |next| pause.min((next - now).max(1))));
        }
        let sleep = async {
            match pause {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds.unsigned_abs())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changes.next() => {}
            _ = others.next(), if pause.is_some() => {}
            () = sleep => {}
        }
    }
}

/// Writes the message that is due, if one is, and tells. Answers when the next one is.
async fn look(client: &Arc<dyn Client>, messages: &Messages, schedule: &SharedObject, now: i64) -> Option<i64> {
    let spec = |field: &str| schedule.pointer("/spec").and_then(|spec| spec.get(field));
    let times = match cron::Schedule::parse(schedule.str_at("/spec/schedule")) {
        Ok(times) if !schedule.is_deleting() => times,
        _ => return None,
    };
    let told = |pointer: &str| api::time::parse(schedule.str_at(pointer));
    let since = told("/status/lastScheduleTime").or_else(|| told("/metadata/creationTimestamp")).unwrap_or(now);
    let suspended = spec("suspend").and_then(Value::as_bool) == Some(true);
    let mut last = told("/status/lastScheduleTime");
    let found = messages.dispatcher.find(schedule.namespace(), schedule.str_at("/spec/function"));
    let state = match (&found, times.last(since, now).filter(|_| !suspended)) {
        (Err(error), _) => ("False", "FunctionNotFound", error.to_string()),
        (Ok(_), None) if suspended => ("True", "Suspended", String::new()),
        (Ok(_), None) => ("True", "Scheduled", String::new()),
        (Ok(function), Some(time)) => match send(messages, function, schedule, time).await {
            Ok(()) => {
                last = Some(time);
                ("True", "Scheduled", String::new())
            }
            Err(error) => ("False", "NotSent", error),
        },
    };
    let next = if suspended { None } else { times.next(now) };
    tell(client, schedule, state, last, next).await;
    // What could not be sent is tried again at the next look.
    next
}

async fn send(messages: &Messages, function: &SharedObject, schedule: &SharedObject, time: i64) -> Result<(), String> {
    let body = schedule.pointer("/spec/body").and_then(Value::as_str).unwrap_or("{}");
    let attempts = schedule.pointer("/spec/attempts").and_then(Value::as_i64);
    let name = format!("{}-{}", schedule.name(), time / 60);
    let event = Event { name: Some(&name), body: body.as_bytes(), attempts };
    messages.put(function, event).await.map_err(|status| status.to_string())
}

async fn tell(
    client: &Arc<dyn Client>,
    schedule: &SharedObject,
    (status, reason, message): (&str, &str, String),
    last: Option<i64>,
    next: Option<i64>,
) {
    let known = schedule.pointer("/status/conditions/0").unwrap_or(&Value::Null);
    let since = match known["status"] == status {
        true => known["lastTransitionTime"].clone(),
        false => api::time::now_rfc3339().into(),
    };
    let mut told = json!({"conditions": [{"type": "Ready", "status": status, "reason": reason, "message": message,
                                          "lastTransitionTime": since, "observedGeneration": schedule.generation()}]});
    for (field, time) in [("lastScheduleTime", last), ("nextScheduleTime", next)] {
        if let Some(time) = time {
            told[field] = api::time::rfc3339(time).into();
        }
    }
    if schedule.get("status") == Some(&told) {
        return;
    }
    let mut new = (**schedule).clone();
    object_of(&mut new).insert("status".into(), told);
    if let Err(error) = client.update_status(&resource(), schedule.namespace(), new).await
        && !error.is_not_found()
    {
        tracing::debug!(schedule = schedule.name(), %error, "its state was not written down, and will be");
    }
}
