//! The end of what a function logged during one call: LogType Tail.

use api::client::Client;
use api::kind::Resource;
use api::object::Meta;
use api::streams::{LogOptions, PodStreams, Target};
use futures_util::StreamExt;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the log that are told, as Lambda has it.
const TOLD: usize = 4096;
const READ: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(2);

/// What pod and time say of one call.
pub struct Told<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub request_id: &'a str,
    /// Unix nanoseconds.
    pub begun: i64,
    pub took: Duration,
    pub memory: i64,
}

/// What the pod wrote since the call began, between Lambda's own lines.
pub async fn of(client: &Arc<dyn Client>, streams: &Arc<dyn PodStreams>, call: &Told<'_>) -> Vec<u8> {
    let mut log = format!("START RequestId: {} Version: $LATEST\n", call.request_id).into_bytes();
    let lines = tokio::time::timeout(PATIENCE, read(client, streams, call)).await;
    log.extend(lines.ok().flatten().unwrap_or_default());
    let (id, took, memory) = (call.request_id, call.took, call.memory);
    let (exact, billed) = (took.as_secs_f64() * 1000.0, took.as_micros().div_ceil(1000));
    log.extend(
        format!(
            "END RequestId: {id}\nREPORT RequestId: {id}\tDuration: {exact:.2} ms\tBilled Duration: {billed} ms\t\
             Memory Size: {memory} MB\n"
        )
        .as_bytes(),
    );
    let from = log.len().saturating_sub(TOLD);
    log.split_off(from)
}

async fn read(client: &Arc<dyn Client>, streams: &Arc<dyn PodStreams>, call: &Told<'_>) -> Option<Vec<u8>> {
    let pod = client.get(&Resource::new("", "v1", "pods"), call.namespace, call.pod).await.ok()?;
    let target = Target {
        namespace: call.namespace.to_owned(),
        pod: call.pod.to_owned(),
        pod_uid: pod.uid().to_owned(),
        container: pod.str_at("/spec/containers/0/name").to_owned(),
    };
    let options = LogOptions {
        since_nanos: Some(i128::from(call.begun)),
        limit_bytes: Some(READ),
        stream: "All".into(),
        ..LogOptions::default()
    };
    let mut lines = streams.logs(&target, options).await.ok()?;
    let mut log = Vec::new();
    while let Some(Ok(chunk)) = lines.next().await {
        log.extend_from_slice(&chunk);
    }
    Some(log)
}
