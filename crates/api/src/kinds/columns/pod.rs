//! Columns of pods, above all the one word that says how a pod is.

use super::{age_column, code, list, name_column, number, or_none};
use crate::kind::Column;
use crate::object::{Meta, Object};
use crate::time;
use serde_json::Value;

pub fn pod() -> Vec<Column> {
    vec![
        name_column(),
        code("Ready", "string", 0, |pod, _| {
            let summary = Summary::of(pod);
            format!("{}/{}", summary.ready, summary.total).into()
        }),
        code("Status", "string", 0, |pod, _| Summary::of(pod).reason.into()),
        code("Restarts", "string", 0, |pod, now| Summary::of(pod).restarts(now).into()),
        age_column(),
        code("IP", "string", 1, |pod, _| {
            let first = pod.str_at("/status/podIPs/0/ip");
            or_none(if first.is_empty() { pod.str_at("/status/podIP") } else { first })
        }),
        code("Node", "string", 1, |pod, _| or_none(pod.str_at("/spec/nodeName"))),
        code("Nominated Node", "string", 1, |pod, _| or_none(pod.str_at("/status/nominatedNodeName"))),
        code("Readiness Gates", "string", 1, |pod, _| readiness_gates(pod)),
    ]
}

#[derive(Debug, Default)]
struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    /// Unix seconds of the last end of a container; 0 = never.
    last_restart: i64,
}

impl Summary {
    fn of(pod: &Object) -> Summary {
        let restartable = |name: &str| {
            let container = list(pod, "/spec/initContainers").iter().find(|c| c.str_at("/name") == name);
            container.is_some_and(|c| c.str_at("/restartPolicy") == "Always")
        };
        let sidecars =
            list(pod, "/spec/initContainers").iter().filter(|c| c.str_at("/restartPolicy") == "Always").count();
        let phase = pod.str_at("/status/phase");
        let reason = pod.str_at("/status/reason");
        let mut summary = Summary {
            reason: if reason.is_empty() { phase.to_owned() } else { reason.to_owned() },
            total: list(pod, "/spec/containers").len() + sidecars,
            ..Default::default()
        };
        let gated = |c: &Value| c.str_at("/type") == "PodScheduled" && c.str_at("/reason") == "SchedulingGated";
        if list(pod, "/status/conditions").iter().any(gated) {
            summary.reason = "SchedulingGated".into();
        }
        let initializing = summary.init_containers(pod, restartable);
        if !initializing || condition(pod, "Initialized") {
            summary.containers(pod);
        }
        if pod.is_deleting() {
            if pod.str_at("/status/reason") == "NodeLost" {
                summary.reason = "Unknown".into();
            } else if !matches!(phase, "Succeeded" | "Failed") {
                summary.reason = "Terminating".into();
            }
        }
        summary
    }

    /// Looks at init containers; whether one of them is still to be waited for.
    fn init_containers(&mut self, pod: &Object, restartable: impl Fn(&str) -> bool) -> bool {
        let (mut all, mut last_of_all) = (0, 0);
        for (index, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
            let count = number(status, "/restartCount");
            let last = last_end(status);
            let sidecar = restartable(status.str_at("/name"));
            all += count;
            last_of_all = last_of_all.max(last);
            if sidecar {
                self.restarts += count;
                self.last_restart = self.last_restart.max(last);
            }
            let terminated = status.pointer("/state/terminated").filter(|state| state.is_object());
            let waiting = status.str_at("/state/waiting/reason");
            if terminated.is_some_and(|state| number(state, "/exitCode") == 0) {
                continue;
            }
            if sidecar && status.get("started").and_then(Value::as_bool) == Some(true) {
                self.ready += usize::from(status.get("ready").and_then(Value::as_bool) == Some(true));
                continue;
            }
            self.reason = match terminated {
                Some(state) => format!("Init:{}", ended(state)),
                None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
                None => format!("Init:{index}/{}", list(pod, "/spec/initContainers").len()),
            };
            (self.restarts, self.last_restart) = (all, last_of_all);
            return true;
        }
        false
    }

    fn containers(&mut self, pod: &Object) {
        let mut running = false;
        for status in list(pod, "/status/containerStatuses").iter().rev() {
            self.restarts += number(status, "/restartCount");
            self.last_restart = self.last_restart.max(last_end(status));
            let waiting = status.str_at("/state/waiting/reason");
            let terminated = status.pointer("/state/terminated").filter(|state| state.is_object());
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if let Some(state) = terminated {
                self.reason = ended(state);
            } else if status.get("ready").and_then(Value::as_bool) == Some(true)
                && status.pointer("/state/running").is_some_and(Value::is_object)
            {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && running {
            self.reason = if condition(pod, "Ready") { "Running".into() } else { "NotReady".into() };
        }
    }

    fn restarts(&self, now: i64) -> String {
        if self.restarts != 0 && self.last_restart != 0 {
            format!("{} ({} ago)", self.restarts, time::human_duration(now - self.last_restart))
        } else {
            self.restarts.to_string()
        }
    }
}

/// How a container ended, in a word.
fn ended(state: &Value) -> String {
    let reason = state.str_at("/reason");
    let signal = number(state, "/signal");
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", number(state, "/exitCode"))
    }
}

fn last_end(status: &Value) -> i64 {
    time::parse(status.str_at("/lastState/terminated/finishedAt")).unwrap_or(0)
}

fn condition(pod: &Object, kind: &str) -> bool {
    list(pod, "/status/conditions").iter().any(|c| c.str_at("/type") == kind && c.str_at("/status") == "True")
}

fn readiness_gates(pod: &Object) -> Value {
    let gates = list(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".into();
    }
    let met = gates.iter().filter(|gate| condition(pod, gate.str_at("/conditionType"))).count();
    format!("{met}/{}", gates.len()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shown(status: Value) -> (String, String, String) {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}],
            "initContainers": [{"name": "i"}, {"name": "j"}]}, "status": status});
        let summary = Summary::of(&pod);
        (format!("{}/{}", summary.ready, summary.total), summary.reason.clone(), summary.restarts(100))
    }

    #[test]
    fn words_for_what_pods_do() {
        let row =
            |ready: &str, reason: &str, restarts: &str| (ready.to_owned(), reason.to_owned(), restarts.to_owned());
        assert_eq!(shown(json!({"phase": "Pending"})), row("0/2", "Pending", "0"));
        let running = json!({"name": "a", "ready": true, "restartCount": 0, "state": {"running": {}}});
        assert_eq!(
            shown(json!({"phase": "Running", "containerStatuses": [running, running]})),
            row("2/2", "Running", "0")
        );
        let crashing = json!({"name": "b", "ready": false, "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "finishedAt": "1970-01-01T00:00:40Z"}}});
        assert_eq!(
            shown(json!({"phase": "Running", "containerStatuses": [running, crashing]})),
            row("1/2", "CrashLoopBackOff", "3 (60s ago)")
        );
        let failed =
            json!({"name": "i", "restartCount": 0, "state": {"terminated": {"exitCode": 2, "reason": "Error"}}});
        assert_eq!(
            shown(json!({"phase": "Pending", "initContainerStatuses": [failed]})),
            row("0/2", "Init:Error", "0")
        );
        let done =
            json!({"name": "i", "restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        let going = json!({"name": "j", "restartCount": 0, "state": {"running": {}}});
        assert_eq!(
            shown(json!({"phase": "Pending", "initContainerStatuses": [done, going]})),
            row("0/2", "Init:1/2", "0")
        );
        let ended =
            json!({"name": "a", "restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        assert_eq!(
            shown(json!({"phase": "Succeeded", "containerStatuses": [ended, ended]})),
            row("0/2", "Completed", "0")
        );
        assert_eq!(
            shown(json!({"phase": "Running", "containerStatuses": [ended, running]})),
            row("1/2", "NotReady", "0")
        );
        let killed = json!({"name": "a", "restartCount": 0, "state": {"terminated": {"exitCode": 137, "signal": 9}}});
        assert_eq!(shown(json!({"phase": "Failed", "containerStatuses": [killed]})), row("0/2", "Signal:9", "0"));
        assert_eq!(shown(json!({"phase": "Failed", "reason": "Evicted"})), row("0/2", "Evicted", "0"));
        let deleting =
            json!({"metadata": {"deletionTimestamp": "2020-01-01T00:00:00Z"}, "status": {"phase": "Running"}});
        assert_eq!(Summary::of(&deleting).reason, "Terminating");
    }

    #[test]
    fn shapes_that_make_no_sense_do_not_panic() {
        for odd in [
            json!(1),
            json!({"status": {"containerStatuses": "x"}}),
            json!({"status": {"containerStatuses": [1, null, {}]}}),
        ] {
            for column in pod() {
                if let crate::kind::Cell::Code(code) = column.cell {
                    code(&odd, 0);
                }
            }
        }
    }
}
