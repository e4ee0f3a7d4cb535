//! Probes and lifecycle hooks: exactly one handler, and numbers that make sense.

use super::field::{Problems, at, flag, has, int, items, present, text};
use serde_json::Value;

/// Which probe it is; they differ in what they may set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Liveness,
    Readiness,
    Startup,
}

pub fn validate(p: &mut Problems, path: &str, probe: &Value, of: Use) {
    if probe.is_null() {
        return;
    }
    handler(p, path, probe, &["exec", "httpGet", "tcpSocket", "grpc"]);
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        p.at_least(&format!("{path}.{field}"), int(probe, field), 0);
    }
    if of != Use::Readiness
        && let Some(value) = int(probe, "successThreshold").filter(|value| *value != 1)
    {
        p.invalid(&format!("{path}.successThreshold"), &value.into(), "must be 1");
    }
    let grace = format!("{path}.terminationGracePeriodSeconds");
    match int(probe, "terminationGracePeriodSeconds") {
        Some(value) if of == Use::Readiness => {
            p.invalid(&grace, &value.into(), "must not be set for readinessProbes");
        }
        Some(value) if value <= 0 => p.invalid(&grace, &value.into(), "must be greater than 0"),
        _ => {}
    }
}

pub fn lifecycle(p: &mut Problems, path: &str, lifecycle: &Value) {
    for hook in ["postStart", "preStop"] {
        let value = at(lifecycle, hook);
        if !value.is_null() {
            handler(p, &format!("{path}.{hook}"), value, &["exec", "httpGet", "tcpSocket", "sleep"]);
        }
    }
}

fn handler(p: &mut Problems, path: &str, value: &Value, kinds: &[&str]) {
    let given = present(value, kinds);
    for extra in given.iter().skip(1) {
        p.forbidden(&format!("{path}.{extra}"), "may not specify more than 1 handler type");
    }
    let Some(kind) = given.first() else {
        p.required(path, "must specify a handler type");
        return;
    };
    let (path, value) = (format!("{path}.{kind}"), at(value, kind));
    match *kind {
        "exec" if items(value, "command").is_empty() => p.required(&format!("{path}.command"), ""),
        "httpGet" => {
            if text(value, "path").is_empty() {
                p.required(&format!("{path}.path"), "");
            }
            p.port_or_name(&format!("{path}.port"), at(value, "port"));
            p.one_of(&format!("{path}.scheme"), text(value, "scheme"), &["HTTP", "HTTPS"]);
            for (index, header) in items(value, "httpHeaders").iter().enumerate() {
                let name = text(header, "name");
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) {
                    let detail = "a valid HTTP header must consist of alphanumeric characters, '-' or '_' (e.g. \
                        'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')";
                    p.invalid_text(&format!("{path}.httpHeaders[{index}].name"), name, detail);
                }
            }
        }
        "tcpSocket" => p.port_or_name(&format!("{path}.port"), at(value, "port")),
        "grpc" => p.port(&format!("{path}.port"), int(value, "port").unwrap_or(0)),
        "sleep" => p.at_least(&format!("{path}.seconds"), int(value, "seconds"), 0),
        _ => {}
    }
}

/// What init containers may not have unless they go on running beside the others.
pub fn forbid_for_init(p: &mut Problems, path: &str, container: &Value) {
    for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
        if has(container, field) {
            p.forbidden(&format!("{path}.{field}"), "may not be set for init containers without restartPolicy=Always");
        }
    }
}

/// Checks that belong to a container's security settings.
pub fn security_context(p: &mut Problems, path: &str, context: &Value) {
    for field in ["runAsUser", "runAsGroup", "fsGroup"] {
        if let Some(id) = int(context, field).filter(|id| !(0..=2_147_483_647).contains(id)) {
            p.invalid(&format!("{path}.{field}"), &id.into(), "must be between 0 and 2147483647, inclusive");
        }
    }
    let escalation = at(context, "allowPrivilegeEscalation").as_bool();
    if flag(context, "privileged") && escalation == Some(false) {
        p.invalid(path, context, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
    }
    if escalation == Some(false) && items(at(context, "capabilities"), "add").iter().any(|c| c == "CAP_SYS_ADMIN") {
        p.invalid(path, context, "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN");
    }
    let seccomp = at(context, "seccompProfile");
    if !seccomp.is_null() {
        let path = format!("{path}.seccompProfile");
        let kind = text(seccomp, "type");
        p.one_of(&format!("{path}.type"), kind, &["Localhost", "RuntimeDefault", "Unconfined"]);
        match (kind, has(seccomp, "localhostProfile")) {
            ("Localhost", false) => {
                p.required(&format!("{path}.localhostProfile"), "must be set when seccomp type is Localhost");
            }
            ("RuntimeDefault" | "Unconfined", true) => {
                p.invalid(
                    &format!("{path}.localhostProfile"),
                    at(seccomp, "localhostProfile"),
                    "can only be set when seccomp type is Localhost",
                );
            }
            _ => {}
        }
    }
}
