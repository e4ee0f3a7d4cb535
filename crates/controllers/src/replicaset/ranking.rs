//! Which pods go first when there are too many, as Kubernetes orders them: those that have no node, then by phase, those
//! not ready, the cheapest by `controller.kubernetes.io/pod-deletion-cost`, those that share a node with more of their
//! kind, those ready for a shorter time (by powers of two), those restarted more, the youngest.

use crate::objects::{created, int, is_ready, list, ready_since};
use api::object::{Meta, Object, SharedObject};
use std::cmp::Reverse;
use std::collections::HashMap;

type Rank = (bool, u8, bool, i64, Reverse<usize>, u32, Reverse<i64>, u32, String);

/// `count` of `pods`; `related` are the pods counted per node.
pub(super) fn first_to_go(
    pods: &[SharedObject],
    related: &[SharedObject],
    now: i64,
    count: usize,
) -> Vec<SharedObject> {
    let mut per_node: HashMap<&str, usize> = HashMap::new();
    for pod in related {
        *per_node.entry(pod.str_at("/spec/nodeName")).or_default() += 1;
    }
    let mut ranked: Vec<(Rank, &SharedObject)> = pods
        .iter()
        .map(|pod| {
            let on_node = per_node.get(pod.str_at("/spec/nodeName")).copied().unwrap_or(0);
            (rank(pod, on_node, now), pod)
        })
        .collect();
    ranked.sort_by(|a, b| a.0.cmp(&b.0));
    ranked.into_iter().take(count).map(|(_, pod)| pod.clone()).collect()
}

fn rank(pod: &Object, on_node: usize, now: i64) -> Rank {
    let phase = match pod.str_at("/status/phase") {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost = pod.annotation("controller.kubernetes.io/pod-deletion-cost").and_then(|text| text.parse().ok());
    let restarts: i64 =
        list(pod, "/status/containerStatuses").iter().filter_map(|status| int(status, "/restartCount")).sum();
    (
        !pod.str_at("/spec/nodeName").is_empty(),
        phase,
        is_ready(pod),
        cost.unwrap_or(0),
        Reverse(on_node),
        ready_since(pod).map_or(0, |since| magnitude(now - since)),
        Reverse(restarts),
        magnitude(now - created(pod)),
        pod.uid().to_owned(),
    )
}

/// Times are compared by their power of two, so that among pods of about one age chance decides (by uid).
fn magnitude(seconds: i64) -> u32 {
    u64::try_from(seconds).map_or(0, |seconds| seconds.checked_ilog2().map_or(0, |power| power + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    const NOW: i64 = 1_700_000_000;

    fn pod(name: &str, node: &str, ready_for: Option<i64>, cost: &str, restarts: i64) -> SharedObject {
        let mut pod = json!({
            "metadata": {"name": name, "uid": name, "creationTimestamp": api::time::rfc3339(NOW - 100_000)},
            "spec": {"nodeName": node},
            "status": {"phase": "Running", "containerStatuses": [{"restartCount": restarts}]}});
        if let Some(seconds) = ready_for {
            pod["status"]["conditions"] =
                json!([{"type": "Ready", "status": "True", "lastTransitionTime": api::time::rfc3339(NOW - seconds)}]);
        }
        if !cost.is_empty() {
            pod.set_annotation("controller.kubernetes.io/pod-deletion-cost", cost);
        }
        Arc::new(pod)
    }

    #[test]
    fn order() {
        let pods = [
            pod("old", "n2", Some(90_000), "", 0),
            pod("restarted", "n2", Some(90_000), "", 3),
            pod("young", "n2", Some(10), "", 0),
            pod("crowded", "n1", Some(90_000), "", 0),
            pod("cheap", "n2", Some(90_000), "-5", 0),
            pod("not-ready", "n2", None, "", 0),
            pod("unbound", "", None, "", 0),
        ];
        let mut related = pods.to_vec();
        related.extend((0..9).map(|n| pod(&format!("other{n}"), "n1", Some(1), "", 0)));
        let order: Vec<String> = first_to_go(&pods, &related, NOW, 7).iter().map(|pod| pod.name().to_owned()).collect();
        assert_eq!(order, ["unbound", "not-ready", "cheap", "crowded", "young", "restarted", "old"]);
    }
}
