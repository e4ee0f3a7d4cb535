//! `path IMAGE COUNT`: the daemon's path. Each pod runs `/clock`, which writes the nanosecond it began at; that is set
//! against when the request was sent and when it was answered. Nothing is asked of the daemon in between.

use crate::{Fault, Target};
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const LIMIT: Duration = Duration::from_secs(30);
/// Longer than a start takes: asking earlier would be measured too.
const QUIET: Duration = Duration::from_millis(60);

fn now() -> Result<i64, Fault> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?)
}

/// One object a pod: name, and in nanoseconds of the clock when it was sent, accepted and executed.
pub async fn path(target: Target, image: &str, count: usize) -> Result<Value, Fault> {
    let mut sender = target.connect().await?;
    let pods = "/api/v1/namespaces/bench/pods";
    let mut measured = Vec::new();
    for turn in 0..count {
        let name = format!("path-{}-{turn}", std::process::id());
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
            "containers": [{"name": "main", "image": image, "command": ["/clock"]}]}});
        let sent = now()?;
        target.must(&mut sender, "POST", pods, pod).await?;
        let accepted = now()?;
        let until = Instant::now() + LIMIT;
        let executed: i64 = loop {
            tokio::time::sleep(QUIET).await;
            let (status, bytes) = target.call(&mut sender, "GET", &format!("{pods}/{name}/log"), Value::Null).await?;
            let text = String::from_utf8_lossy(&bytes);
            if let Some(line) = text.strip_suffix('\n').filter(|_| status == 200) {
                break line.parse().map_err(|_| format!("{name}: not a time: {line}"))?;
            }
            if Instant::now() > until {
                return Err(format!("{name} did not tell its time in {LIMIT:?}: {text}").into());
            }
        };
        measured.push(json!({"name": name, "sent": sent, "accepted": accepted, "executed": executed}));
        target.must(&mut sender, "DELETE", &format!("{pods}/{name}"), Value::Null).await?;
        while target.call(&mut sender, "GET", &format!("{pods}/{name}"), Value::Null).await?.0 != 404 {
            if Instant::now() > until + LIMIT {
                return Err(format!("{name} is not gone after {LIMIT:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    Ok(Value::Array(measured))
}
