//! GRPCRoute, TLSRoute and Ingress: rules across their fields.

use super::field::{Problems, at, has, int, items, items_mut, object_mut, present, text};
use super::gateway;
use crate::names;
use crate::object::Object;
use crate::status::Cause;
use serde_json::Value;

pub fn validate_grpc(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    gateway::hostnames(&mut p, spec);
    for (index, rule) in items(spec, "rules").iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        for (number, one) in items(rule, "matches").iter().enumerate() {
            grpc_method(&mut p, &format!("{path}.matches[{number}].method"), at(one, "method"));
        }
        gateway::filters(&mut p, &format!("{path}.filters"), items(rule, "filters"), &[]);
        backends(&mut p, &path, rule);
        gateway::session(&mut p, &format!("{path}.sessionPersistence"), at(rule, "sessionPersistence"));
    }
    p.into_causes()
}

fn grpc_method(p: &mut Problems, path: &str, method: &Value) {
    if method.is_null() {
        return;
    }
    let (service, name) = (text(method, "service"), text(method, "method"));
    if service.is_empty() && name.is_empty() {
        p.required(path, "One or both of 'service' or 'method' must be specified");
    }
    for (field, value) in [("service", service), ("method", name)] {
        let path = format!("{path}.{field}");
        if text(method, "type") == "RegularExpression" {
            if regex::Regex::new(value).is_err() {
                p.invalid_text(&path, value, "must be a valid regular expression");
            }
            continue;
        }
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || (byte == b'.' && field == "service");
        if !value.bytes().all(fine) {
            p.invalid_text(&path, value, "must be a name of letters, digits and '_' (and '.' in a service)");
        }
    }
}

fn backends(p: &mut Problems, path: &str, rule: &Value) {
    for (number, backend) in items(rule, "backendRefs").iter().enumerate() {
        let path = format!("{path}.backendRefs[{number}]");
        if text(backend, "kind") == "Service" && text(backend, "group").is_empty() && !has(backend, "port") {
            p.required(&format!("{path}.port"), "Must have port for Service reference");
        }
    }
}

pub fn validate_tls(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    gateway::hostnames(&mut p, spec);
    for (index, rule) in items(spec, "rules").iter().enumerate() {
        backends(&mut p, &format!("spec.rules[{index}]"), rule);
    }
    p.into_causes()
}

/// What the API machinery of Ingress fills in: nothing but the type of a path, which is required.
pub fn default_ingress(new: &mut Object) {
    let Some(spec) = object_mut(new, "/spec") else { return };
    for rule in items_mut(spec, "rules") {
        let Some(http) = rule.get_mut("http").and_then(Value::as_object_mut) else { continue };
        for path in items_mut(http, "paths") {
            if path.get("path").is_some_and(|path| path == "") {
                path.insert("path".into(), "/".into());
            }
        }
    }
}

pub fn validate_ingress(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    let (rules, default) = (items(spec, "rules"), at(spec, "defaultBackend"));
    if rules.is_empty() && default.is_null() {
        p.invalid_text("spec", "", "either `defaultBackend` or `rules` must be specified");
    }
    if !default.is_null() {
        ingress_backend(&mut p, "spec.defaultBackend", default);
    }
    p.optional_rule("spec.ingressClassName", text(spec, "ingressClassName"), names::dns_subdomain);
    for (index, rule) in rules.iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        host(&mut p, &format!("{path}.host"), text(rule, "host"));
        for (number, one) in items(at(rule, "http"), "paths").iter().enumerate() {
            let path = format!("{path}.http.paths[{number}]");
            ingress_path(&mut p, &path, one);
            ingress_backend(&mut p, &format!("{path}.backend"), at(one, "backend"));
        }
    }
    for (index, tls) in items(spec, "tls").iter().enumerate() {
        for (number, name) in items(tls, "hosts").iter().enumerate() {
            host(&mut p, &format!("spec.tls[{index}].hosts[{number}]"), name.as_str().unwrap_or(""));
        }
        let path = format!("spec.tls[{index}].secretName");
        p.optional_rule(&path, text(tls, "secretName"), names::dns_subdomain);
    }
    p.into_causes()
}

fn host(p: &mut Problems, path: &str, host: &str) {
    if host.is_empty() {
        return;
    }
    if host.parse::<std::net::IpAddr>().is_ok() {
        p.invalid_text(path, host, "must be a DNS name, not an IP address");
    }
    p.rule(path, host, names::wildcard_subdomain);
}

fn ingress_path(p: &mut Problems, path: &str, one: &Value) {
    let value = text(one, "path");
    match text(one, "pathType") {
        "Exact" | "Prefix" => {
            if !value.starts_with('/') {
                p.invalid_text(&format!("{path}.path"), value, "must be an absolute path");
            }
            for bad in ["//", "/./", "/../", "%2f", "%2F"] {
                if value.contains(bad) {
                    p.invalid_text(&format!("{path}.path"), value, &format!("must not contain '{bad}'"));
                }
            }
        }
        "ImplementationSpecific" => {
            if !value.is_empty() && !value.starts_with('/') {
                p.invalid_text(&format!("{path}.path"), value, "must be an absolute path");
            }
        }
        "" => p.required(&format!("{path}.pathType"), "pathType must be specified"),
        other => {
            let known = ["Exact", "ImplementationSpecific", "Prefix"];
            p.unsupported(&format!("{path}.pathType"), other, &known);
        }
    }
}

fn ingress_backend(p: &mut Problems, path: &str, backend: &Value) {
    match present(backend, &["service", "resource"]).as_slice() {
        ["service"] => {}
        ["resource"] => return,
        _ => return p.invalid_text(path, "", "either a service or a resource backend is required, not both"),
    }
    let service = at(backend, "service");
    p.rule(&format!("{path}.service.name"), text(service, "name"), names::dns_label);
    let port = at(service, "port");
    match (int(port, "number"), text(port, "name")) {
        (Some(number), "") => p.port(&format!("{path}.service.port.number"), number),
        (None, name) if !name.is_empty() => {}
        _ => p.required(&format!("{path}.service.port"), "port name or number is required, and not both"),
    }
}

pub fn validate_class(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let controller = text(at(new, "spec"), "controller");
    let domain = controller.split_once('/').map(|(domain, path)| (names::dns_subdomain(domain), path));
    if domain.is_none_or(|(problems, path)| !problems.is_empty() || path.is_empty()) || controller.len() > 250 {
        let detail = "must be a domain-prefixed path (such as \"acme.io/foo\") of at most 250 characters";
        p.invalid_text("spec.controller", controller, detail);
    }
    if let Some(old) = old {
        p.immutable("spec.controller", at(at(new, "spec"), "controller"), at(at(old, "spec"), "controller"));
    }
    p.into_causes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;
    use serde_json::json;

    fn told(group: &str, plural: &str, spec: Value) -> Vec<String> {
        let kind = kinds::find(group, plural).unwrap();
        let mut object = json!({"metadata": {"name": "x"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, None));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn ingresses() {
        let to = json!({"service": {"name": "web", "port": {"number": 80}}});
        let rule = |path: &str, kind: &str| {
            json!({"rules": [{"host": "*.a.b", "http":
                {"paths": [{"path": path, "pathType": kind, "backend": to}]}}]})
        };
        let told = |spec| told("networking.k8s.io", "ingresses", spec);
        assert!(told(rule("/", "Prefix")).is_empty());
        assert_eq!(
            told(json!({})),
            ["spec: Invalid value: \"\": either `defaultBackend` or `rules` must be specified"]
        );
        assert!(told(rule("a", "Prefix"))[0].contains("spec.rules[0].http.paths[0].path: Invalid value: \"a\""));
        assert!(told(rule("/", "Fuzzy"))[0].contains("pathType: Unsupported value: \"Fuzzy\""));
        let nothing = json!({"defaultBackend": {"service": {"name": "web"}}});
        assert!(!told(nothing).is_empty());
    }

    #[test]
    fn grpc_and_tls_routes() {
        let told = |plural, spec| told("gateway.networking.k8s.io", plural, spec);
        let method = |method: Value| json!({"rules": [{"matches": [{"method": method}]}]});
        assert!(told("grpcroutes", method(json!({"service": "a.B", "method": "C"}))).is_empty());
        assert!(told("grpcroutes", method(json!({"service": "a/B"})))[0].contains("matches[0].method.service"));
        assert!(told("grpcroutes", method(json!({})))[0].contains("One or both of"));
        let route = json!({"hostnames": ["a.b"], "rules": [{"backendRefs": [{"name": "s"}]}]});
        assert!(told("tlsroutes", route)[0].contains("spec.rules[0].backendRefs[0].port"));
    }
}
