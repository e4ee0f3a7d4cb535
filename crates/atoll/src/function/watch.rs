//! `atoll function logs`: the logs of a function's instances, those that come while it follows included.

use super::api::{Api, Refusal};
use super::{At, LOOK, services};
use crate::cli::{Failure, Outcome};
use ::api::object::Meta;
use http_body_util::BodyExt;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

const SERVICE: &str = "serving.knative.dev/service";

pub async fn logs(at: &At, name: &str, follow: bool, tail: Option<u64>) -> Outcome {
    let api = Arc::new(at.api()?);
    let namespace = at.namespace(&api);
    // A name that does not exist is an error; a function without instances is not.
    api.get(&format!("{}/{name}", services(&namespace))).await?;
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut streams = tokio::task::JoinSet::new();
    loop {
        let list = api.get(&format!("{pods}?labelSelector={SERVICE}%3D{name}")).await?;
        for pod in list.get("items").and_then(Value::as_array).into_iter().flatten() {
            let started = pod.pointer("/status/containerStatuses/0/state/waiting").is_none()
                && pod.pointer("/status/containerStatuses/0").is_some();
            if started && seen.insert(pod.str_at("/metadata/uid").to_owned()) {
                let container = pod.str_at("/spec/containers/0/name");
                let mut path = format!("{pods}/{}/log?container={container}", pod.str_at("/metadata/name"));
                if follow {
                    path.push_str("&follow=true");
                }
                if let Some(lines) = tail {
                    path.push_str(&format!("&tailLines={lines}"));
                }
                streams.spawn(stream(api.clone(), path));
            }
        }
        if !follow {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK * 5) => {}
            Some(ended) = streams.join_next() => told(ended)?,
        }
    }
    while let Some(ended) = streams.join_next().await {
        told(ended)?;
    }
    Ok(())
}

fn told(ended: Result<Outcome, tokio::task::JoinError>) -> Outcome {
    ended.unwrap_or_else(|error| Err(Failure(error.to_string())))
}

/// Copies one log to standard output, whole lines at a time so that several do not mix.
async fn stream(api: Arc<Api>, path: String) -> Outcome {
    let response = api.send("GET", &path, "application/json", Vec::new()).await?;
    if !response.status().is_success() {
        let status = response.status();
        let body = super::api::read(response.into_body()).await?;
        let told: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        return match status.as_u16() {
            // It went while we looked.
            404 => Ok(()),
            _ => Err(Refusal::Other(Failure(format!("{} ({status})", told.str_at("/message")))).into()),
        };
    }
    let mut body = response.into_body();
    let mut pending: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { break };
        let Ok(data) = frame.into_data() else { continue };
        pending.extend_from_slice(&data);
        if let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') {
            let rest = pending.split_off(end + 1);
            print(&pending)?;
            pending = rest;
        }
    }
    print(&pending)
}

fn print(bytes: &[u8]) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| Failure(format!("standard output: {e}")))
}
