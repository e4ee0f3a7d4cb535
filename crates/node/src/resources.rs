//! `resources` of containers and of the pod as a whole.

use crate::boundary::Resources;
use crate::quantity::{milli, value};
use api::k8s::api::core::v1::{Container, PodSpec};

pub(crate) fn of_container(container: &Container) -> Resources {
    let resources = container.resources.clone().unwrap_or_default();
    let (limits, requests) = (resources.limits.unwrap_or_default(), resources.requests.unwrap_or_default());
    let cpu_limit = limits.get("cpu").and_then(|q| milli(&q.0)).filter(|v| *v > 0);
    let memory_limit = limits.get("memory").and_then(|q| value(&q.0)).filter(|v| *v > 0);
    Resources {
        cpu_request_milli: requests.get("cpu").and_then(|q| milli(&q.0)).or(cpu_limit).unwrap_or(0),
        cpu_limit_milli: cpu_limit,
        memory_request: requests.get("memory").and_then(|q| value(&q.0)).or(memory_limit).unwrap_or(0),
        memory_limit,
        pids_limit: None,
    }
}

/// Sum of the containers (a limit only if all have one), at least the largest init container.
pub(crate) fn of_pod(spec: &PodSpec, pids_limit: Option<u64>) -> Resources {
    let sum = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b?));
    let most = |a: Option<u64>, b: Option<u64>| Some(a?.max(b?));
    let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let mut total = Resources { cpu_limit_milli: Some(0), memory_limit: Some(0), ..Resources::default() };
    for one in spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(is_sidecar)).map(of_container)
    {
        total.cpu_request_milli = total.cpu_request_milli.saturating_add(one.cpu_request_milli);
        total.memory_request = total.memory_request.saturating_add(one.memory_request);
        total.cpu_limit_milli = sum(total.cpu_limit_milli, one.cpu_limit_milli);
        total.memory_limit = sum(total.memory_limit, one.memory_limit);
    }
    for one in spec.init_containers.iter().flatten().filter(|c| !is_sidecar(c)).map(of_container) {
        total.cpu_request_milli = total.cpu_request_milli.max(one.cpu_request_milli);
        total.memory_request = total.memory_request.max(one.memory_request);
        total.cpu_limit_milli = most(total.cpu_limit_milli, one.cpu_limit_milli);
        total.memory_limit = most(total.memory_limit, one.memory_limit);
    }
    total.cpu_limit_milli = total.cpu_limit_milli.filter(|v| *v > 0);
    total.memory_limit = total.memory_limit.filter(|v| *v > 0);
    total.pids_limit = pids_limit;
    total
}

/// A signal by name (`SIGTERM`, `TERM`, `RTMIN+3`) or number.
pub(crate) fn signal(text: &str) -> Option<i32> {
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: i32 = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? };
        return (0..=30).contains(&offset).then_some(34 + offset);
    }
    let table = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("TTIN", 21),
        ("TTOU", 22),
        ("URG", 23),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("WINCH", 28),
        ("IO", 29),
        ("PWR", 30),
        ("SYS", 31),
    ];
    table.iter().find(|(n, _)| *n == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sums() {
        let spec = |v| -> PodSpec { serde_json::from_value(v).unwrap() };
        let total = of_pod(
            &spec(json!({
            "containers": [{"name": "a", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}},
                           {"name": "b", "resources": {"limits": {"cpu": "500m"}, "requests": {"memory": "1Mi"}}}],
            "initContainers": [{"name": "i", "resources": {"limits": {"cpu": "4"}}}]})),
            Some(7),
        );
        assert_eq!((total.cpu_limit_milli, total.memory_limit, total.pids_limit), (Some(4000), None, Some(7)));
        assert_eq!((total.cpu_request_milli, total.memory_request), (4000, (1 << 30) + (1 << 20)));
        let none = of_pod(&spec(json!({"containers": [{"name": "a"}]})), None);
        assert_eq!((none.cpu_limit_milli, none.memory_limit), (None, None));
    }

    #[test]
    fn signals() {
        for (text, want) in [("SIGQUIT", Some(3)), ("term", Some(15)), ("9", Some(9)), ("SIGRTMIN+3", Some(37))] {
            assert_eq!(signal(text), want, "{text}");
        }
        for text in ["", "0", "65", "SIGFOO", "RTMIN+99", "RTMIN-1"] {
            assert_eq!(signal(text), None, "{text}");
        }
    }
}
