//! `atoll function logs`: the logs of a function's instances: those that are gone, those that run, and those that come while
//! it follows.

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

/// Of the logs there are.
#[derive(clap::Args)]
pub struct Wanted {
    /// Go on as more comes, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only of what has ended: instances that are gone, and those before a restart
    #[arg(short, long, conflicts_with = "follow")]
    previous: bool,
    /// Only so many last lines of those that are gone, and of each instance
    #[arg(long, value_name = "LINES")]
    tail: Option<u64>,
    /// Only what is not older, such as 30s, 10m or 2h
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    since: Option<u64>,
    /// The time before each line
    #[arg(long)]
    timestamps: bool,
}

fn seconds(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?}: a number with s, m, h or d is needed, such as 10m");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).filter(|n| *n > 0).ok_or_else(wrong)
}

impl Wanted {
    fn query(&self) -> String {
        let mut query = String::new();
        if let Some(lines) = self.tail {
            query.push_str(&format!("&tailLines={lines}"));
        }
        if let Some(seconds) = self.since {
            query.push_str(&format!("&sinceSeconds={seconds}"));
        }
        if self.timestamps {
            query.push_str("&timestamps=true");
        }
        query
    }
}

pub async fn logs(at: &At, name: &str, wanted: &Wanted) -> Outcome {
    let api = Arc::new(at.api()?);
    let namespace = at.namespace(&api);
    let service = format!("{}/{name}", services(&namespace));
    // A name that does not exist is an error; a function without instances is not.
    api.get(&service).await?;
    let query = wanted.query();
    stream(api.clone(), format!("{service}/log?{}", query.trim_start_matches('&'))).await?;
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
                let path = format!("{pods}/{}/log?container={container}{query}", pod.str_at("/metadata/name"));
                let (api, follow, previous) = (api.clone(), wanted.follow, wanted.previous);
                let restarted = pod.pointer("/status/containerStatuses/0/lastState/terminated").is_some();
                streams.spawn(async move {
                    if restarted {
                        stream(api.clone(), format!("{path}&previous=true")).await?;
                    }
                    match (previous, follow) {
                        (true, _) => Ok(()),
                        (false, true) => stream(api, format!("{path}&follow=true")).await,
                        (false, false) => stream(api, path).await,
                    }
                });
            }
        }
        if !wanted.follow {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("2h"), Ok(7200));
        for bad in ["", "s", "5", "0s", "-1m", "1w", "é", "99999999999999999999h", "18446744073709551615d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
