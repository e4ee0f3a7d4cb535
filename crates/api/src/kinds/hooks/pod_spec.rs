//! The specification of a pod, wherever it stands: in a Pod, in the template of a Deployment, in a Knative revision.

use super::field::{Problems, at, fill, flag, has, int, items, items_mut, object_mut, present, text};
use super::{probe, volume};
use crate::names;
use crate::quantity::Quantity;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::net::IpAddr;

/// Fills what depends on other fields.
pub fn default(spec: &mut Map<String, Value>) {
    let host_network = spec.get("hostNetwork").and_then(Value::as_bool).unwrap_or(false);
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in items_mut(spec, list) {
            default_container(container, host_network);
        }
    }
    for volume in items_mut(spec, "volumes") {
        let named = volume.iter().any(|(field, value)| field != "name" && !value.is_null());
        if !named {
            volume.insert("emptyDir".into(), json!({}));
        }
    }
    for (from, to) in [("serviceAccountName", "serviceAccount"), ("serviceAccount", "serviceAccountName")] {
        if let Some(account) = spec.get(from).cloned().filter(|account| !account.is_null()) {
            fill(spec, to, account);
        }
    }
}

fn default_container(container: &mut Map<String, Value>, host_network: bool) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or("");
    if !image.is_empty() {
        let policy = if is_latest(image) { "Always" } else { "IfNotPresent" };
        fill(container, "imagePullPolicy", policy);
    }
    if host_network {
        for port in items_mut(container, "ports") {
            if let Some(number) = port.get("containerPort").cloned() {
                fill(port, "hostPort", number);
            }
        }
    }
}

/// Whether an image reference means "the newest": no digest, and no tag or `latest`.
fn is_latest(image: &str) -> bool {
    let name = image.rsplit('/').next().unwrap_or(image);
    !image.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

pub fn validate(p: &mut Problems, path: &str, spec: &Value) {
    let volumes = volume::validate(p, &format!("{path}.volumes"), items(spec, "volumes"));
    let mut names = HashSet::new();
    if has(spec, "containers") && items(spec, "containers").is_empty() {
        p.required(&format!("{path}.containers"), "");
    }
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for (index, container) in items(spec, list).iter().enumerate() {
            let path = format!("{path}.{list}[{index}]");
            let name = text(container, "name");
            if !name.is_empty() && !names.insert(name) {
                p.duplicate(&format!("{path}.name"), &name.into());
            }
            validate_container(p, &path, container, &volumes);
            if list == "initContainers" {
                match text(container, "restartPolicy") {
                    "Always" => {}
                    "" => probe::forbid_for_init(p, &path, container),
                    other => p.unsupported(&format!("{path}.restartPolicy"), other, &["Always"]),
                }
            } else if has(container, "restartPolicy") {
                p.forbidden(&format!("{path}.restartPolicy"), "may not be set for non-init containers");
            }
        }
    }
    settings(p, path, spec);
    scheduling(p, path, spec);
}

fn settings(p: &mut Problems, path: &str, spec: &Value) {
    p.one_of(&format!("{path}.restartPolicy"), text(spec, "restartPolicy"), &["Always", "OnFailure", "Never"]);
    let policy = text(spec, "dnsPolicy");
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    p.one_of(&format!("{path}.dnsPolicy"), policy, &policies);
    let servers = items(at(spec, "dnsConfig"), "nameservers");
    if policy == "None" && servers.is_empty() {
        let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        p.required(&format!("{path}.dnsConfig.nameservers"), detail);
    }
    for (index, server) in servers.iter().enumerate() {
        address(p, &format!("{path}.dnsConfig.nameservers[{index}]"), server.as_str().unwrap_or(""));
    }
    for (index, alias) in items(spec, "hostAliases").iter().enumerate() {
        address(p, &format!("{path}.hostAliases[{index}].ip"), text(alias, "ip"));
        for (number, host) in items(alias, "hostnames").iter().enumerate() {
            let path = format!("{path}.hostAliases[{index}].hostnames[{number}]");
            p.rule(&path, host.as_str().unwrap_or(""), names::dns_subdomain);
        }
    }
    p.at_least(&format!("{path}.terminationGracePeriodSeconds"), int(spec, "terminationGracePeriodSeconds"), 0);
    if let Some(seconds) = int(spec, "activeDeadlineSeconds").filter(|s| !(1..=i64::from(i32::MAX)).contains(s)) {
        let detail = "must be between 1 and 2147483647, inclusive";
        p.invalid(&format!("{path}.activeDeadlineSeconds"), &seconds.into(), detail);
    }
    for (field, rule) in [
        ("hostname", names::dns_label as fn(&str) -> Vec<String>),
        ("subdomain", names::dns_label),
        ("nodeName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
        ("serviceAccountName", names::dns_subdomain),
        ("priorityClassName", names::dns_subdomain),
    ] {
        p.optional_rule(&format!("{path}.{field}"), text(spec, field), rule);
    }
    probe::security_context(p, &format!("{path}.securityContext"), at(spec, "securityContext"));
    if flag(spec, "hostPID") && flag(spec, "shareProcessNamespace") {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        p.invalid(&format!("{path}.shareProcessNamespace"), &true.into(), detail);
    }
}

fn address(p: &mut Problems, path: &str, value: &str) {
    if value.parse::<IpAddr>().is_err() {
        p.invalid_text(path, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
}

fn scheduling(p: &mut Problems, path: &str, spec: &Value) {
    p.labels(&format!("{path}.nodeSelector"), at(spec, "nodeSelector"));
    for (index, toleration) in items(spec, "tolerations").iter().enumerate() {
        validate_toleration(p, &format!("{path}.tolerations[{index}]"), toleration);
    }
    for (index, constraint) in items(spec, "topologySpreadConstraints").iter().enumerate() {
        let path = format!("{path}.topologySpreadConstraints[{index}]");
        if let Some(skew) = int(constraint, "maxSkew").filter(|skew| *skew <= 0) {
            p.invalid(&format!("{path}.maxSkew"), &skew.into(), "must be greater than zero");
        }
        if text(constraint, "topologyKey").is_empty() {
            p.required(&format!("{path}.topologyKey"), "can not be empty");
        }
        let supported = ["DoNotSchedule", "ScheduleAnyway"];
        p.one_of(&format!("{path}.whenUnsatisfiable"), text(constraint, "whenUnsatisfiable"), &supported);
        p.selector(&format!("{path}.labelSelector"), at(constraint, "labelSelector"));
    }
    let affinity = at(spec, "affinity");
    node_affinity(p, &format!("{path}.affinity.nodeAffinity"), at(affinity, "nodeAffinity"));
    for kind in ["podAffinity", "podAntiAffinity"] {
        pod_affinity(p, &format!("{path}.affinity.{kind}"), at(affinity, kind));
    }
}

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

fn weight(p: &mut Problems, path: &str, preference: &Value) {
    if !int(preference, "weight").is_some_and(|weight| (1..=100).contains(&weight)) {
        p.invalid(&format!("{path}.weight"), at(preference, "weight"), "must be in the range 1-100");
    }
}

fn node_affinity(p: &mut Problems, path: &str, affinity: &Value) {
    let required = at(affinity, REQUIRED);
    let terms = items(required, "nodeSelectorTerms");
    let path_terms = format!("{path}.{REQUIRED}.nodeSelectorTerms");
    if !required.is_null() && terms.is_empty() {
        p.required(&path_terms, "must have at least one node selector term");
    }
    for (index, term) in terms.iter().enumerate() {
        node_term(p, &format!("{path_terms}[{index}]"), term);
    }
    for (index, preference) in items(affinity, PREFERRED).iter().enumerate() {
        let path = format!("{path}.{PREFERRED}[{index}]");
        weight(p, &path, preference);
        node_term(p, &format!("{path}.preference"), at(preference, "preference"));
    }
}

fn node_term(p: &mut Problems, path: &str, term: &Value) {
    for list in ["matchExpressions", "matchFields"] {
        for (index, expression) in items(term, list).iter().enumerate() {
            let path = format!("{path}.{list}[{index}]");
            let (operator, values) = (text(expression, "operator"), items(expression, "values"));
            match operator {
                "In" | "NotIn" if values.is_empty() => {
                    p.required(&format!("{path}.values"), "must be specified when `operator` is 'In' or 'NotIn'");
                }
                "Exists" | "DoesNotExist" if !values.is_empty() => {
                    let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                    p.forbidden(&format!("{path}.values"), detail);
                }
                "Gt" | "Lt" if values.len() != 1 => {
                    let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
                    p.required(&format!("{path}.values"), detail);
                }
                "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
                _ => p.invalid_text(&format!("{path}.operator"), operator, "not a valid selector operator"),
            }
            p.rule(&format!("{path}.key"), text(expression, "key"), names::qualified_name);
        }
    }
}

fn pod_affinity(p: &mut Problems, path: &str, affinity: &Value) {
    let mut term = |path: &str, term: &Value| {
        if text(term, "topologyKey").is_empty() {
            p.required(&format!("{path}.topologyKey"), "can not be empty");
        }
        p.selector(&format!("{path}.labelSelector"), at(term, "labelSelector"));
    };
    for (index, required) in items(affinity, REQUIRED).iter().enumerate() {
        term(&format!("{path}.{REQUIRED}[{index}]"), required);
    }
    for (index, preference) in items(affinity, PREFERRED).iter().enumerate() {
        term(&format!("{path}.{PREFERRED}[{index}].podAffinityTerm"), at(preference, "podAffinityTerm"));
    }
    for (index, preference) in items(affinity, PREFERRED).iter().enumerate() {
        weight(p, &format!("{path}.{PREFERRED}[{index}]"), preference);
    }
}

pub fn validate_toleration(p: &mut Problems, path: &str, toleration: &Value) {
    let (key, operator, effect) = (text(toleration, "key"), text(toleration, "operator"), text(toleration, "effect"));
    p.optional_rule(&format!("{path}.key"), key, names::qualified_name);
    if key.is_empty() && operator != "Exists" {
        p.invalid_text(
            &format!("{path}.operator"),
            operator,
            "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
        );
    }
    match operator {
        "" | "Equal" => p.rule(&format!("{path}.operator"), text(toleration, "value"), names::label_value),
        "Exists" => {
            if !text(toleration, "value").is_empty() {
                p.invalid(&format!("{path}.operator"), toleration, "value must be empty when `operator` is 'Exists'");
            }
        }
        other => p.unsupported(&format!("{path}.operator"), other, &["Equal", "Exists"]),
    }
    if has(toleration, "tolerationSeconds") && effect != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        p.invalid_text(&format!("{path}.effect"), effect, detail);
    }
    p.one_of(&format!("{path}.effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
}

pub fn validate_container(p: &mut Problems, path: &str, container: &Value, volumes: &HashSet<&str>) {
    let name = text(container, "name");
    if !name.is_empty() {
        p.rule(&format!("{path}.name"), name, names::dns_label);
    } else if has(container, "name") {
        p.required(&format!("{path}.name"), "");
    }
    let image = text(container, "image");
    if image.is_empty() {
        p.required(&format!("{path}.image"), "");
    } else if image.trim() != image {
        p.invalid_text(&format!("{path}.image"), image, "must not have leading or trailing whitespace");
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    p.one_of(&format!("{path}.imagePullPolicy"), text(container, "imagePullPolicy"), &policies);
    let messages = ["File", "FallbackToLogsOnError"];
    p.one_of(&format!("{path}.terminationMessagePolicy"), text(container, "terminationMessagePolicy"), &messages);
    ports(p, &format!("{path}.ports"), items(container, "ports"));
    environment(p, path, container);
    mounts(p, &format!("{path}.volumeMounts"), container, volumes);
    resources(p, &format!("{path}.resources"), at(container, "resources"));
    probe::lifecycle(p, &format!("{path}.lifecycle"), at(container, "lifecycle"));
    for (field, of) in [
        ("livenessProbe", probe::Use::Liveness),
        ("readinessProbe", probe::Use::Readiness),
        ("startupProbe", probe::Use::Startup),
    ] {
        probe::validate(p, &format!("{path}.{field}"), at(container, field), of);
    }
    probe::security_context(p, &format!("{path}.securityContext"), at(container, "securityContext"));
}

fn ports(p: &mut Problems, path: &str, ports: &[Value]) {
    let mut seen = HashSet::new();
    for (index, port) in ports.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let name = text(port, "name");
        if !name.is_empty() {
            p.rule(&format!("{path}.name"), name, names::port_name);
            if !seen.insert(name) {
                p.duplicate(&format!("{path}.name"), &name.into());
            }
        }
        match int(port, "containerPort") {
            Some(0) => p.required(&format!("{path}.containerPort"), ""),
            Some(number) => p.port(&format!("{path}.containerPort"), number),
            None => {}
        }
        if let Some(number) = int(port, "hostPort").filter(|number| *number != 0) {
            p.port(&format!("{path}.hostPort"), number);
        }
        p.one_of(&format!("{path}.protocol"), text(port, "protocol"), &["SCTP", "TCP", "UDP"]);
    }
}

const FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn environment(p: &mut Problems, path: &str, container: &Value) {
    for (index, variable) in items(container, "env").iter().enumerate() {
        let path = format!("{path}.env[{index}]");
        match text(variable, "name") {
            "" => p.required(&format!("{path}.name"), ""),
            name => p.rule(&format!("{path}.name"), name, names::env_name),
        }
        let from = at(variable, "valueFrom");
        if !from.is_null() {
            value_from(p, &format!("{path}.valueFrom"), from, !text(variable, "value").is_empty());
        }
    }
    for (index, source) in items(container, "envFrom").iter().enumerate() {
        let path = format!("{path}.envFrom[{index}]");
        p.optional_rule(&format!("{path}.prefix"), text(source, "prefix"), names::env_name);
        let given = present(source, &["configMapRef", "secretRef"]);
        match given.as_slice() {
            [] => p.invalid_text(&path, "", "must specify one of: `configMapRef` or `secretRef`"),
            [one] if text(at(source, one), "name").is_empty() => p.required(&format!("{path}.{one}.name"), ""),
            [_] => {}
            _ => p.invalid_text(&path, "", "may not have more than one field specified at a time"),
        }
    }
}

fn value_from(p: &mut Problems, path: &str, from: &Value, has_value: bool) {
    let given = present(from, &["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef"]);
    match given.as_slice() {
        [] => {
            let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`";
            p.invalid_text(path, "", detail);
        }
        _ if has_value => p.invalid_text(path, "", "may not be specified when `value` is not empty"),
        [one] => {
            let (path, source) = (format!("{path}.{one}"), at(from, one));
            match *one {
                "fieldRef" => field_path(p, &format!("{path}.fieldPath"), text(source, "fieldPath")),
                "resourceFieldRef" => {
                    if text(source, "resource").is_empty() {
                        p.required(&format!("{path}.resource"), "");
                    }
                }
                _ => {
                    if text(source, "key").is_empty() {
                        p.required(&format!("{path}.key"), "");
                    } else {
                        p.rule(&format!("{path}.key"), text(source, "key"), names::config_key);
                    }
                    if text(source, "name").is_empty() {
                        p.required(&format!("{path}.name"), "");
                    }
                }
            }
        }
        _ => p.invalid_text(path, "", "may not have more than one field specified at a time"),
    }
}

fn field_path(p: &mut Problems, path: &str, value: &str) {
    let subscript = |prefix: &str| {
        value.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("['")).is_some_and(|rest| rest.ends_with("']"))
    };
    if value.is_empty() {
        p.required(path, "");
    } else if !FIELDS.contains(&value) && !subscript("metadata.labels") && !subscript("metadata.annotations") {
        p.invalid_text(path, value, &format!("error converting fieldPath: field label not supported: {value}"));
    }
}

fn mounts(p: &mut Problems, path: &str, container: &Value, volumes: &HashSet<&str>) {
    let mut paths = HashSet::new();
    for (index, mount) in items(container, "volumeMounts").iter().enumerate() {
        let path = format!("{path}[{index}]");
        let name = text(mount, "name");
        if name.is_empty() {
            p.required(&format!("{path}.name"), "");
        } else if !volumes.contains(name) {
            p.not_found(&format!("{path}.name"), name);
        }
        let target = text(mount, "mountPath");
        if target.is_empty() {
            p.required(&format!("{path}.mountPath"), "");
        } else if !paths.insert(target) {
            p.invalid_text(&format!("{path}.mountPath"), target, "must be unique");
        }
        volume::inside(p, &format!("{path}.subPath"), text(mount, "subPath"));
        volume::inside(p, &format!("{path}.subPathExpr"), text(mount, "subPathExpr"));
        if !text(mount, "subPath").is_empty() && !text(mount, "subPathExpr").is_empty() {
            let detail = "subPathExpr and subPath are mutually exclusive";
            p.invalid_text(&format!("{path}.subPathExpr"), text(mount, "subPathExpr"), detail);
        }
        let propagation = text(mount, "mountPropagation");
        p.one_of(&format!("{path}.mountPropagation"), propagation, &["Bidirectional", "HostToContainer", "None"]);
        if propagation == "Bidirectional" && !flag(at(container, "securityContext"), "privileged") {
            let detail = "Bidirectional mount propagation is available only to privileged containers";
            p.forbidden(&format!("{path}.mountPropagation"), detail);
        }
    }
}

pub fn resources(p: &mut Problems, path: &str, resources: &Value) {
    let limits = at(resources, "limits");
    for list in ["limits", "requests"] {
        for (name, value) in at(resources, list).as_object().into_iter().flatten() {
            let path = format!("{path}.{list}");
            p.rule(&path, name, names::qualified_name);
            let Ok(quantity) = Quantity::from_value(value) else { continue };
            if quantity.is_negative() {
                p.invalid(&format!("{path}[{name}]"), value, "must be greater than or equal to 0");
            }
            let whole = !matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage");
            if whole && !quantity.is_whole() {
                p.invalid(&format!("{path}[{name}]"), value, "must be an integer");
            }
            let limit = limits.get(name).and_then(|limit| Quantity::from_value(limit).ok());
            if let (true, Some(limit)) = (list == "requests", limit)
                && quantity > limit
            {
                let detail = format!("must be less than or equal to {name} limit of {limit}");
                p.invalid_text(&path, &quantity.to_string(), &detail);
            }
        }
    }
}

/// Warnings for a pod's specification: what is allowed but hardly meant.
pub fn warnings(path: &str, spec: &Value) -> Vec<String> {
    let mut all = Vec::new();
    for list in ["initContainers", "containers"] {
        for (index, container) in items(spec, list).iter().enumerate() {
            let mut seen = HashSet::new();
            for (number, variable) in items(container, "env").iter().enumerate() {
                let name = text(variable, "name");
                if !seen.insert(name) {
                    all.push(format!(
                        "{path}.{list}[{index}].env[{number}]: hides previous definition of \"{name}\", which may be dropped \
                         when using apply"
                    ));
                }
            }
            let mut seen = HashSet::new();
            for (number, port) in items(container, "ports").iter().enumerate() {
                if !seen.insert((int(port, "containerPort"), text(port, "protocol"))) {
                    all.push(format!(
                        "{path}.{list}[{index}].ports[{number}]: duplicate port definition with {path}.{list}[{index}].ports"
                    ));
                }
            }
        }
    }
    all.truncate(20);
    all
}

/// The specification at `pointer`, to be filled.
pub fn default_at(object: &mut Value, pointer: &str) {
    if let Some(spec) = object_mut(object, pointer) {
        default(spec);
    }
}
