//! A pod's status from what is known of its containers: phase, conditions, container statuses. Pure.

use super::plan::{RestartPolicy, Role};
use super::slot::{Ended, Slot, State, time};
use api::k8s::api::core::v1 as core;
use api::k8s::apimachinery::pkg::apis::meta::v1::Time;
use api::sleep::Sleep;
use std::net::IpAddr;

/// Reason of a pod that sleeps.
const ASLEEP: &str = "Asleep";

/// What the containers do not tell.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    pub uid: String,
    /// Of each family, IPv4 first.
    pub host_ips: Vec<IpAddr>,
    pub pod_ips: Vec<IpAddr>,
    pub start_time: Option<Time>,
    /// The sandbox with its network is there.
    pub sandbox_ready: bool,
    pub initialized: bool,
    /// The end of the pod: `Succeeded`, or `Failed` with its reason and message.
    pub end: Option<End>,
    /// Pod-level reason and message while it cannot be started.
    pub trouble: Option<(String, String)>,
    pub asleep: Option<Sleep>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub succeeded: bool,
    pub reason: String,
    pub message: String,
}

pub(crate) fn compute(pod: &core::Pod, slots: &[Slot], around: &Surroundings, now: &Time) -> core::PodStatus {
    let empty = core::PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let old = pod.status.clone().unwrap_or_default();
    let phase = phase(slots, RestartPolicy::of(spec), around);
    let (reason, message) = match (&around.end, &around.trouble, around.asleep) {
        (Some(end), ..) => (end.reason.clone(), end.message.clone()),
        (None, Some((reason, message)), _) => (reason.clone(), message.clone()),
        (None, None, Some(how)) => (ASLEEP.into(), format!("The pod sleeps, {}; a request wakes it", how.word())),
        (None, None, None) => (String::new(), String::new()),
    };
    let some = |text: String| if text.is_empty() { None } else { Some(text) };
    let (main, init): (Vec<&Slot>, Vec<&Slot>) = slots.iter().partition(|s| s.role == Role::Main);
    let statuses = |slots: &[&Slot]| -> Option<Vec<core::ContainerStatus>> {
        let list: Vec<_> = slots.iter().map(|s| container_status(s, around)).collect();
        if list.is_empty() { None } else { Some(list) }
    };
    let texts = |ips: &[IpAddr]| -> Vec<String> { ips.iter().map(IpAddr::to_string).collect() };
    let (pod_ips, host_ips) = (texts(&around.pod_ips), texts(&around.host_ips));
    let listed = |ips: &[String]| (!ips.is_empty()).then(|| ips.to_vec());
    core::PodStatus {
        conditions: Some(conditions(spec, slots, around, &phase, old.conditions.unwrap_or_default(), now)),
        container_statuses: statuses(&main),
        init_container_statuses: statuses(&init),
        host_ip: host_ips.first().cloned(),
        host_ips: listed(&host_ips).map(|ips| ips.into_iter().map(|ip| core::HostIP { ip }).collect()),
        pod_ip: pod_ips.first().cloned(),
        pod_ips: listed(&pod_ips).map(|ips| ips.into_iter().map(|ip| core::PodIP { ip }).collect()),
        phase: Some(phase),
        qos_class: old.qos_class.filter(|q| !q.is_empty()).or_else(|| Some(qos_class(spec).to_owned())),
        reason: some(reason),
        message: some(message),
        start_time: around.start_time.clone(),
        nominated_node_name: None,
        ..old
    }
}

/// As kubelet's `getPhase`.
fn phase(slots: &[Slot], policy: RestartPolicy, around: &Surroundings) -> String {
    if let Some(end) = &around.end {
        return if end.succeeded { "Succeeded" } else { "Failed" }.into();
    }
    if !around.initialized && !slots.iter().any(|s| s.role == Role::Main && s.begun) {
        return "Pending".into();
    }
    let (mut waiting, mut running, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for slot in slots.iter().filter(|s| s.role == Role::Main) {
        match (&slot.state, slot.latest_end()) {
            (State::Running { .. }, _) if slot.hook_pending => waiting += 1,
            (State::Running { .. }, _) => running += 1,
            (_, Some(ended)) => {
                stopped += 1;
                succeeded += u32::from(ended.code == 0);
            }
            (_, None) => waiting += 1,
        }
    }
    let text = if waiting > 0 {
        if stopped > 0 || running > 0 { "Running" } else { "Pending" }
    } else if running > 0 || policy == RestartPolicy::Always {
        "Running"
    } else if stopped == succeeded {
        "Succeeded"
    } else if policy == RestartPolicy::Never {
        "Failed"
    } else {
        "Running"
    };
    // The end is announced once nothing runs any more, see `Surroundings::end`.
    if matches!(text, "Succeeded" | "Failed") { "Running".into() } else { text.into() }
}

fn terminated(uid: &str, name: &str, ended: &Ended) -> core::ContainerState {
    core::ContainerState {
        terminated: Some(core::ContainerStateTerminated {
            container_id: Some(container_id(uid, name, ended.attempt)),
            exit_code: ended.code,
            finished_at: time(ended.finished),
            message: if ended.message.is_empty() { None } else { Some(ended.message.clone()) },
            reason: Some(ended.reason.clone()),
            signal: ended.signal,
            started_at: time(ended.started),
        }),
        ..Default::default()
    }
}

fn container_id(uid: &str, name: &str, attempt: u32) -> String {
    format!("atoll://{uid}.{name}.{attempt}")
}

fn container_status(slot: &Slot, around: &Surroundings) -> core::ContainerStatus {
    let state = match &slot.state {
        State::Running { .. } if slot.hook_pending => waiting("ContainerCreating", ""),
        State::Running { started } => core::ContainerState {
            running: Some(core::ContainerStateRunning { started_at: time(*started) }),
            ..Default::default()
        },
        State::Waiting { reason, message } => {
            // What comes before it has not finished yet.
            let reason = match (reason.as_str(), slot.role) {
                ("ContainerCreating", Role::Main) if !around.initialized => "PodInitializing",
                (other, _) => other,
            };
            waiting(reason, message)
        }
        State::Ended(ended) => terminated(&around.uid, &slot.name, ended),
    };
    let ready = match slot.role {
        Role::Init => slot.latest_end().is_some_and(|e| e.code == 0) && !slot.is_running(),
        Role::Sidecar | Role::Main => is_ready(slot, around),
    };
    core::ContainerStatus {
        name: slot.name.clone(),
        container_id: slot.begun.then(|| container_id(&around.uid, &slot.name, slot.attempt)),
        image: slot.image_ref.clone(),
        image_id: slot.image_id.clone(),
        last_state: Some(slot.last.as_ref().map(|e| terminated(&around.uid, &slot.name, e)).unwrap_or_default()),
        ready,
        restart_count: i32::try_from(slot.attempt).unwrap_or(i32::MAX),
        started: Some(slot.started()),
        state: Some(state),
        ..Default::default()
    }
}

fn waiting(reason: &str, message: &str) -> core::ContainerState {
    core::ContainerState {
        waiting: Some(core::ContainerStateWaiting {
            message: if message.is_empty() { None } else { Some(message.to_owned()) },
            reason: Some(reason.to_owned()),
        }),
        ..Default::default()
    }
}

fn is_ready(slot: &Slot, around: &Surroundings) -> bool {
    slot.started() && slot.ready && around.end.is_none() && around.asleep.is_none()
}

fn conditions(
    spec: &core::PodSpec,
    slots: &[Slot],
    around: &Surroundings,
    phase: &str,
    old: Vec<core::PodCondition>,
    now: &Time,
) -> Vec<core::PodCondition> {
    let unready: Vec<&str> =
        slots.iter().filter(|s| s.role != Role::Init && !is_ready(s, around)).map(|s| s.name.as_str()).collect();
    let uninitialized: Vec<&str> = slots
        .iter()
        .filter(|s| match s.role {
            Role::Init => s.latest_end().is_none_or(|e| e.code != 0),
            Role::Sidecar => !s.started(),
            Role::Main => false,
        })
        .map(|s| s.name.as_str())
        .collect();
    let initialized = if around.initialized || uninitialized.is_empty() {
        (true, if phase == "Succeeded" { "PodCompleted" } else { "" }, String::new())
    } else {
        let list = uninitialized.join(" ");
        (false, "ContainersNotInitialized", format!("containers with incomplete status: [{list}]"))
    };
    let containers_ready = if phase == "Succeeded" {
        (false, "PodCompleted", String::new())
    } else if phase == "Failed" {
        (false, "PodFailed", String::new())
    } else if around.asleep.is_some() {
        (false, ASLEEP, String::new())
    } else if unready.is_empty() {
        (true, "", String::new())
    } else {
        (false, "ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" ")))
    };
    let gates: Vec<&str> = spec
        .readiness_gates
        .iter()
        .flatten()
        .map(|g| g.condition_type.as_str())
        .filter(|t| !old.iter().any(|c| c.type_ == *t && c.status == "True"))
        .collect();
    let ready = match &containers_ready {
        (true, ..) if !gates.is_empty() => {
            let text: Vec<String> = gates
                .iter()
                .map(|g| format!("corresponding condition of pod readiness gate \"{g}\" does not exist."))
                .collect();
            (false, "ReadinessGatesNotReady", text.join(", "))
        }
        other => other.clone(),
    };
    let mut out = Vec::new();
    let mut add = |kind: &str, (status, reason, message): (bool, &str, String)| {
        let status = if status { "True" } else { "False" };
        let before = old.iter().find(|c| c.type_ == kind);
        let since = before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
        out.push(core::PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            last_transition_time: Some(since.unwrap_or_else(|| now.clone())),
            reason: if reason.is_empty() { None } else { Some(reason.to_owned()) },
            message: if message.is_empty() { None } else { Some(message) },
            ..Default::default()
        });
    };
    add("PodReadyToStartContainers", (around.sandbox_ready, "", String::new()));
    add("Initialized", initialized);
    add("Ready", ready);
    add("ContainersReady", containers_ready);
    if !old.iter().any(|c| c.type_ == "PodScheduled") {
        add("PodScheduled", (true, "", String::new()));
    }
    const OURS: [&str; 4] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady"];
    out.extend(old.into_iter().filter(|c| !OURS.contains(&c.type_.as_str())));
    out
}

/// <https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/>
pub(crate) fn qos_class(spec: &core::PodSpec) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let resources = container.resources.clone().unwrap_or_default();
        let (limits, requests) = (resources.limits.unwrap_or_default(), resources.requests.unwrap_or_default());
        for name in ["cpu", "memory"] {
            let (limit, request) = (limits.get(name), requests.get(name));
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|r| Some(r) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn classes_of_service() {
        let class = |resources: serde_json::Value| {
            let spec: core::PodSpec =
                serde_json::from_value(json!({"containers": [{"name": "c", "resources": resources}]})).unwrap();
            qos_class(&spec)
        };
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"requests": {"cpu": "1"}})), "Burstable");
        assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Gi"}})), "Guaranteed");
        let same = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}});
        assert_eq!(class(same), "Guaranteed");
    }
}
