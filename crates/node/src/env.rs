//! A container's environment: image, Services, `envFrom`, `env`, with `$(NAME)` expanded; and the downward API's
//! fields. Pure.

use crate::quantity;
use crate::sources::{SourceKind, Sources};
use api::k8s::api::core::v1::{Container, EnvVarSource, ObjectFieldSelector, Pod, ResourceFieldSelector};
use api::k8s::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Facts of the pod that its own object may not carry yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Of each family, IPv4 first.
    pub pod_ips: Vec<IpAddr>,
    pub host_ips: Vec<IpAddr>,
    pub node_cpu_milli: u64,
    pub node_memory: u64,
}

/// One Service as environment variables show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceEnv {
    pub name: String,
    pub namespace: String,
    pub address: String,
    /// name, protocol, port
    pub ports: Vec<(String, String, u16)>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum EnvError {
    #[error("{word} \"{name}\" not found")]
    NoSource { word: &'static str, name: String },
    #[error("couldn't find key {key} in {word} {namespace}/{name}")]
    NoKey { word: &'static str, namespace: String, name: String, key: String },
    #[error("env \"{name}\": {word} {source_name} key {key}: value is not UTF-8")]
    NotText { name: String, word: &'static str, source_name: String, key: String },
    #[error("env \"{name}\": {why}")]
    Field { name: String, why: String },
}

/// Expands `$(NAME)` from `lookup`. `$$` is a literal `$`; a reference to an unknown name stays as it is.
pub(crate) fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let after = &from[1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some(inner) = after.strip_prefix('(') {
            match inner.find(')') {
                Some(end) => {
                    let name = &inner[..end];
                    match lookup(name) {
                        Some(value) => out.push_str(&value),
                        None => {
                            out.push_str("$(");
                            out.push_str(name);
                            out.push(')');
                        }
                    }
                    rest = &inner[end + 1..];
                }
                None => {
                    out.push_str("$(");
                    rest = inner;
                }
            }
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Ordered map of variables: a later setting replaces the value but keeps the place.
#[derive(Clone, Debug, Default)]
struct Vars {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Vars {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }
    fn into_pairs(mut self) -> Vec<(String, String)> {
        let values = &mut self.values;
        self.order.iter().filter_map(|name| values.remove_entry(name)).collect()
    }
}

fn usable_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

/// The variables Kubernetes sets for Services: `NAME_SERVICE_HOST` and the Docker link forms.
pub(crate) fn service_vars(services: &[ServiceEnv]) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for service in services {
        let prefix = service.name.to_ascii_uppercase().replace('-', "_");
        let Some(first) = service.ports.first() else { continue };
        out.push((format!("{prefix}_SERVICE_HOST"), service.address.clone()));
        out.push((format!("{prefix}_SERVICE_PORT"), first.2.to_string()));
        for (name, _, port) in service.ports.iter().filter(|p| !p.0.is_empty()) {
            out.push((
                format!("{prefix}_SERVICE_PORT_{}", name.to_ascii_uppercase().replace('-', "_")),
                port.to_string(),
            ));
        }
        for (index, (_, protocol, port)) in service.ports.iter().enumerate() {
            let lower = protocol.to_ascii_lowercase();
            let url = format!("{lower}://{}:{port}", service.address);
            if index == 0 {
                out.push((format!("{prefix}_PORT"), url.clone()));
            }
            let port_prefix = format!("{prefix}_PORT_{port}_{}", protocol.to_ascii_uppercase());
            out.push((port_prefix.clone(), url));
            out.push((format!("{port_prefix}_PROTO"), lower));
            out.push((format!("{port_prefix}_PORT"), port.to_string()));
            out.push((format!("{port_prefix}_ADDR"), service.address.clone()));
        }
    }
    out
}

pub(crate) struct EnvInput<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    /// `KEY=value` of the image.
    pub image_env: &'a [String],
    pub services: &'a [ServiceEnv],
    pub sources: &'a Sources,
    pub facts: &'a Facts,
    pub hostname: &'a str,
}

#[derive(Debug, Default)]
pub(crate) struct Env {
    pub vars: Vec<(String, String)>,
    /// Keys of `envFrom` sources that cannot be variable names.
    pub skipped: Vec<String>,
    /// Only what the pod itself set (with Services): `$(NAME)` in commands sees no image variables.
    expandable: BTreeMap<String, String>,
}

impl Env {
    /// `text` with `$(NAME)` expanded the way `command` and `args` are.
    pub fn expand(&self, text: &str) -> String {
        expand(text, |name| self.expandable.get(name).cloned())
    }
}

/// The whole environment in the order and with the precedence kubelet uses.
pub(crate) fn build(input: &EnvInput<'_>) -> Result<Env, EnvError> {
    let namespace = input.pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut own = Vars::default();
    let mut skipped = Vec::new();
    for from in input.container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (kind, name, optional) = if let Some(r) = &from.config_map_ref {
            (SourceKind::ConfigMap, &r.name, r.optional.unwrap_or(false))
        } else if let Some(r) = &from.secret_ref {
            (SourceKind::Secret, &r.name, r.optional.unwrap_or(false))
        } else {
            continue;
        };
        if !input.sources.exists(kind, name) {
            if optional {
                continue;
            }
            return Err(EnvError::NoSource { word: kind.word(), name: name.clone() });
        }
        for (key, value) in input.sources.all(kind, name) {
            let key = format!("{prefix}{key}");
            match String::from_utf8(value) {
                Ok(value) if usable_name(&key) && !value.contains('\0') => own.set(&key, value),
                _ => skipped.push(key),
            }
        }
    }
    let services: BTreeMap<String, String> = service_vars(input.services).into_iter().collect();
    for var in input.container.env.iter().flatten() {
        if !usable_name(&var.name) {
            skipped.push(var.name.clone());
            continue;
        }
        let value = match (&var.value, &var.value_from) {
            (_, Some(from)) => match from_source(input, namespace, &var.name, from)? {
                Some(value) => value,
                None => continue,
            },
            (Some(text), None) => expand(text, |name| own.values.get(name).or_else(|| services.get(name)).cloned()),
            (None, None) => String::new(),
        };
        own.set(&var.name, value);
    }
    let mut all = Vars::default();
    all.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    all.set("HOSTNAME", input.hostname.to_owned());
    for pair in input.image_env {
        if let Some((name, value)) = pair.split_once('=')
            && usable_name(name)
        {
            all.set(name, value.to_owned());
        }
    }
    let mut expandable = services.clone();
    for (name, value) in services {
        all.set(&name, value);
    }
    for (name, value) in own.into_pairs() {
        expandable.insert(name.clone(), value.clone());
        all.set(&name, value.replace('\0', ""));
    }
    Ok(Env { vars: all.into_pairs(), skipped, expandable })
}

fn from_source(
    input: &EnvInput<'_>,
    namespace: &str,
    variable: &str,
    from: &EnvVarSource,
) -> Result<Option<String>, EnvError> {
    let field = |why: String| EnvError::Field { name: variable.to_owned(), why };
    if let Some(selector) = &from.field_ref {
        return pod_field(input.pod, selector, input.facts).map(Some).map_err(field);
    }
    if let Some(selector) = &from.resource_field_ref {
        return container_resource(input.pod, Some(input.container), selector, input.facts).map(Some).map_err(field);
    }
    let (kind, name, key, optional) = if let Some(r) = &from.config_map_key_ref {
        (SourceKind::ConfigMap, &r.name, &r.key, r.optional.unwrap_or(false))
    } else if let Some(r) = &from.secret_key_ref {
        (SourceKind::Secret, &r.name, &r.key, r.optional.unwrap_or(false))
    } else {
        return Err(field("valueFrom names no source".into()));
    };
    let word = kind.word();
    match input.sources.bytes(kind, name, key) {
        Some(bytes) => String::from_utf8(bytes).map(Some).map_err(|_| EnvError::NotText {
            name: variable.to_owned(),
            word,
            source_name: name.clone(),
            key: key.clone(),
        }),
        None if optional => Ok(None),
        None if !input.sources.exists(kind, name) => Err(EnvError::NoSource { word, name: name.clone() }),
        None => Err(EnvError::NoKey {
            word: if kind == SourceKind::Secret { "Secret" } else { "ConfigMap" },
            namespace: namespace.to_owned(),
            name: name.clone(),
            key: key.clone(),
        }),
    }
}

/// `key="value"` lines as the downward API writes labels and annotations.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        map.into_iter().flatten().map(|(k, v)| format!("{k}={}", serde_json::Value::from(v.as_str()))).collect();
    lines.join("\n")
}

fn subscript<'a>(path: &'a str, base: &str) -> Option<&'a str> {
    path.strip_prefix(base)?.strip_prefix("['")?.strip_suffix("']")
}

/// A field of the pod, by `fieldPath`.
pub(crate) fn pod_field(pod: &Pod, selector: &ObjectFieldSelector, facts: &Facts) -> Result<String, String> {
    let meta = &pod.metadata;
    let path = selector.field_path.as_str();
    if let Some(key) = subscript(path, "metadata.labels") {
        return Ok(meta.labels.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    if let Some(key) = subscript(path, "metadata.annotations") {
        return Ok(meta.annotations.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    let spec = pod.spec.as_ref();
    let first = |ips: &[IpAddr]| ips.first().map(IpAddr::to_string).unwrap_or_default();
    let all = |ips: &[IpAddr]| ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => format_map(meta.labels.as_ref()),
        "metadata.annotations" => format_map(meta.annotations.as_ref()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => {
            spec.and_then(|s| s.service_account_name.clone()).unwrap_or_else(|| "default".into())
        }
        "status.hostIP" => first(&facts.host_ips),
        "status.hostIPs" => all(&facts.host_ips),
        "status.podIP" => first(&facts.pod_ips),
        "status.podIPs" => all(&facts.pod_ips),
        _ => return Err(format!("fieldPath \"{path}\" is not supported")),
    })
}

/// A resource field (`limits.cpu`, `requests.memory`, ...) of a container; without a limit it is what the node has.
pub(crate) fn container_resource(
    pod: &Pod,
    container: Option<&Container>,
    selector: &ResourceFieldSelector,
    facts: &Facts,
) -> Result<String, String> {
    let container = match selector.container_name.as_deref().filter(|n| !n.is_empty()) {
        Some(name) => pod
            .spec
            .iter()
            .flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()))
            .find(|c| c.name == name)
            .ok_or_else(|| format!("resourceFieldRef.containerName: no container \"{name}\""))?,
        None => container.ok_or("resourceFieldRef.containerName is required")?,
    };
    let (list, key) = selector.resource.split_once('.').unwrap_or(("", selector.resource.as_str()));
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|r| r.limits.as_ref()).and_then(|m| m.get(key));
    let requests = resources.and_then(|r| r.requests.as_ref()).and_then(|m| m.get(key));
    let node = match key {
        "cpu" => Some(Quantity(format!("{}m", facts.node_cpu_milli))),
        "memory" => Some(Quantity(facts.node_memory.to_string())),
        _ => None,
    };
    let zero = Quantity("0".into());
    let found = match list {
        "limits" => limits.or(node.as_ref()),
        "requests" => requests.or(limits),
        _ => return Err(format!("resource \"{}\" is not supported", selector.resource)),
    };
    let divisor = selector.divisor.as_ref().map(|d| d.0.as_str()).filter(|d| *d != "0" && !d.is_empty()).unwrap_or("1");
    let quantity = &found.unwrap_or(&zero).0;
    quantity::divided(quantity, divisor).ok_or_else(|| format!("cannot divide {quantity} by {divisor}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn table(name: &str) -> Option<String> {
        match name {
            "A" => Some("1".into()),
            "B" => Some("$(A)".into()),
            _ => None,
        }
    }

    #[test]
    fn expansion_as_kubelet_does_it() {
        for (text, want) in [
            ("$(A)", "1"),
            ("x$(A)y", "x1y"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(B)", "$(A)"),
            ("$(NO)", "$(NO)"),
            ("$(A", "$(A"),
            ("$A", "$A"),
            ("$", "$"),
            ("$()", "$()"),
            ("$$", "$"),
        ] {
            assert_eq!(expand(text, table), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn expansion_keeps_text_without_dollar(text in "[^$]*") {
            prop_assert_eq!(expand(&text, table), text);
        }
        #[test]
        fn doubled_dollars_are_an_escape(text in "\\PC*") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), table), text);
        }
        #[test]
        fn expansion_never_loses_plain_text(before in "[^$]*", after in "[^$]*") {
            prop_assert_eq!(expand(&format!("{before}$(A){after}"), table), format!("{before}1{after}"));
        }
    }

    fn input<'a>(pod: &'a Pod, sources: &'a Sources, facts: &'a Facts, services: &'a [ServiceEnv]) -> EnvInput<'a> {
        EnvInput {
            pod,
            container: &pod.spec.as_ref().unwrap().containers[0],
            image_env: &[],
            services,
            sources,
            facts,
            hostname: "h",
        }
    }

    #[test]
    fn all_forms() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "b"}},
            "spec": {"nodeName": "n", "containers": [{"name": "c",
                "resources": {"limits": {"cpu": "250m", "memory": "64Mi"}},
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}}, {"secretRef": {"name": "no", "optional": true}}],
                "env": [
                    {"name": "X", "value": "$(P_k)-$(SVC_SERVICE_HOST)-$(Y)"},
                    {"name": "Y", "valueFrom": {"secretKeyRef": {"name": "s", "key": "pw"}}},
                    {"name": "Z", "value": "$(Y)"},
                    {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
                    {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                    {"name": "OPT", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "no", "optional": true}}}
                ]}]}
        }))
        .unwrap();
        let mut sources = Sources::default();
        sources.insert(SourceKind::ConfigMap, "cm", &json!({"data": {"k": "v"}}));
        sources.insert(SourceKind::Secret, "s", &json!({"data": {"pw": "c2VjcmV0"}}));
        let pod_ips = vec!["10.42.0.2".parse().unwrap(), "fd00:10:42::2".parse().unwrap()];
        let facts = Facts { pod_ips, ..Facts::default() };
        let services = [ServiceEnv {
            name: "svc".into(),
            namespace: "ns".into(),
            address: "10.43.0.1".into(),
            ports: vec![("http".into(), "TCP".into(), 80)],
        }];
        let env = build(&input(&pod, &sources, &facts, &services)).unwrap();
        let get = |name: &str| env.vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(get("X"), Some("v-10.43.0.1-$(Y)"));
        assert_eq!(get("Z"), Some("secret"));
        assert_eq!(get("N"), Some("b"));
        assert_eq!(get("IP"), Some("10.42.0.2"));
        assert_eq!(get("CPU"), Some("250"));
        assert_eq!(get("OPT"), None);
        assert_eq!(get("SVC_PORT_80_TCP_ADDR"), Some("10.43.0.1"));
        assert_eq!(get("SVC_SERVICE_PORT_HTTP"), Some("80"));
        assert_eq!(env.expand("$(Z) $(PATH)"), "secret $(PATH)");
    }

    #[test]
    fn missing_sources_say_what_is_missing() {
        let pod = |from: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"metadata": {"namespace": "ns"}, "spec": {"containers": [
                {"name": "c", "env": [{"name": "A", "valueFrom": from}]}]}}))
            .unwrap()
        };
        let facts = Facts::default();
        let mut sources = Sources::default();
        sources.insert(SourceKind::ConfigMap, "cm", &json!({"data": {}}));
        let p = pod(json!({"configMapKeyRef": {"name": "cm", "key": "k"}}));
        let e = build(&input(&p, &sources, &facts, &[])).unwrap_err();
        assert_eq!(e.to_string(), "couldn't find key k in ConfigMap ns/cm");
        let p = pod(json!({"secretKeyRef": {"name": "s", "key": "k"}}));
        let e = build(&input(&p, &sources, &facts, &[])).unwrap_err();
        assert_eq!(e.to_string(), "secret \"s\" not found");
    }
}
