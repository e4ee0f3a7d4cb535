//! Stopping everything from what is on disk alone, for `atoll down`: no API is asked.

use crate::boundary::{Boundary, Phase};
use crate::config::Config;
use crate::ports::Networks;
use crate::record::{self, Record};
use crate::volumes::tree;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// However long a pod's grace is, `down` waits no longer than this.
const MOST_GRACE: Duration = Duration::from_secs(60);
const LAST_CALL: Duration = Duration::from_secs(30);

/// Stops all sandboxes, with each pod's grace, and removes their network. Logs and last statuses stay. Answers how many
/// there were.
pub(crate) async fn destroy_all(
    config: &Config,
    networks: &Arc<dyn Networks>,
    boundaries: &BTreeMap<&'static str, Arc<dyn Boundary>>,
) -> usize {
    let copy = config.clone();
    let found = match tokio::task::spawn_blocking(move || record::scan(&copy)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::error!("{}: {error}", config.pods_dir().display());
            return 0;
        }
        Err(_) => return 0,
    };
    let mut tasks = tokio::task::JoinSet::new();
    for record in found.records.into_iter().filter(|r| !r.ended) {
        let Some(boundary) = boundaries.get(record.boundary.as_str()).cloned() else {
            tracing::error!(pod = record.sandbox.name, "boundary \"{}\" is not known here", record.boundary);
            continue;
        };
        let networks = networks.clone();
        tasks.spawn(async move { stop(record, boundary, networks).await });
    }
    let mut count = 0;
    while let Some(done) = tasks.join_next().await {
        count += usize::from(matches!(done, Ok(true)));
    }
    for uid in found.bare {
        if let Err(error) = networks.detach(&uid).await {
            tracing::warn!(pod = uid, "network: {error}");
        }
    }
    count
}

async fn stop(record: Record, boundary: Arc<dyn Boundary>, networks: Arc<dyn Networks>) -> bool {
    let sandbox = &record.sandbox;
    if record.asleep.is_some()
        && let Ok(Err(error)) = tokio::time::timeout(LAST_CALL, boundary.wake(sandbox)).await
    {
        tracing::debug!(pod = sandbox.name, "cannot wake up to stop: {error}");
    }
    let running = || async {
        let listed = tokio::time::timeout(LAST_CALL, boundary.list(sandbox)).await;
        let listed = listed.ok().and_then(Result::ok).unwrap_or_default();
        listed.into_iter().filter(|c| matches!(c.phase, Phase::Running { .. })).map(|c| c.name).collect::<Vec<_>>()
    };
    let mut left = running().await;
    let was_running = !left.is_empty();
    for name in &left {
        let number = record.stop_signals.get(name).copied().unwrap_or(15);
        if let Err(error) = boundary.signal(sandbox, name, number).await {
            tracing::debug!(pod = sandbox.name, container = name, "signal {number}: {error}");
        }
    }
    let until = Instant::now() + Duration::from_secs(record.grace_seconds).min(MOST_GRACE);
    while !left.is_empty() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        left = running().await;
    }
    match tokio::time::timeout(LAST_CALL, boundary.destroy(sandbox)).await {
        Ok(Ok(()) | Err(crate::boundary::BoundaryError::NoSandbox(_))) => {}
        Ok(Err(error)) => {
            tracing::error!(pod = sandbox.name, namespace = sandbox.namespace, "cannot be stopped: {error}");
            return false;
        }
        Err(_) => {
            tracing::error!(pod = sandbox.name, namespace = sandbox.namespace, "cannot be stopped: no answer");
            return false;
        }
    }
    if !sandbox.network.host
        && let Err(error) = networks.detach(&sandbox.uid).await
    {
        tracing::warn!(pod = sandbox.name, "network: {error}");
    }
    let (dir, run_dir) = (sandbox.dir.clone(), sandbox.run_dir.clone());
    let _ = tokio::task::spawn_blocking(move || {
        // The record goes: a later start makes the sandbox anew.
        let _ = std::fs::remove_file(dir.join("sandbox.json"));
        tree::unmount_below(&dir);
        let _ = tree::remove(&run_dir);
    })
    .await;
    was_running
}
