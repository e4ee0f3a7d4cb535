//! Gateway API: what its definitions say in rules across fields.

use super::field::{Problems, at, has, int, items, pointer, present, text};
use crate::names;
use crate::object::Object;
use crate::status::Cause;
use serde_json::{Value, json};
use std::collections::HashSet;

pub fn validate_class(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    if let Some(old) = old
        && pointer(new, "/spec/controllerName") != pointer(old, "/spec/controllerName")
    {
        p.invalid("spec.controllerName", pointer(new, "/spec/controllerName"), "Value is immutable");
    }
    p.into_causes()
}

pub fn validate_gateway(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let mut seen = HashSet::new();
    for (index, listener) in items(at(new, "spec"), "listeners").iter().enumerate() {
        let path = format!("spec.listeners[{index}]");
        p.optional_rule(&format!("{path}.name"), text(listener, "name"), names::dns_subdomain);
        let (protocol, tls) = (text(listener, "protocol"), at(listener, "tls"));
        match protocol {
            "HTTP" | "TCP" | "UDP" if !tls.is_null() => {
                p.invalid_text(
                    &format!("{path}.tls"),
                    "",
                    "tls must not be specified for protocols ['HTTP', 'TCP', 'UDP']",
                );
            }
            "HTTPS" if text(tls, "mode") == "Passthrough" => {
                p.invalid_text(
                    &format!("{path}.tls.mode"),
                    "Passthrough",
                    "tls mode must be Terminate for protocol HTTPS",
                );
            }
            "HTTPS" | "TLS" => {
                let terminates = text(tls, "mode") != "Passthrough";
                if terminates && items(tls, "certificateRefs").is_empty() && !has(tls, "options") {
                    let detail = "certificateRefs or options must be specified when mode is Terminate";
                    p.required(&format!("{path}.tls"), detail);
                }
            }
            _ => {}
        }
        if matches!(protocol, "TCP" | "UDP") && has(listener, "hostname") {
            let detail = "hostname must not be specified for protocols ['TCP', 'UDP']";
            p.invalid(&format!("{path}.hostname"), at(listener, "hostname"), detail);
        }
        if !seen.insert((int(listener, "port"), protocol, text(listener, "hostname"))) {
            let detail = "Combination of port, protocol and hostname must be unique for each listener";
            p.invalid(&path, &json!({"port": int(listener, "port"), "protocol": protocol}), detail);
        }
        p.selector(
            &format!("{path}.allowedRoutes.namespaces.selector"),
            pointer(listener, "/allowedRoutes/namespaces/selector"),
        );
    }
    p.into_causes()
}

pub fn validate_route(new: &Object, _: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    let spec = at(new, "spec");
    hostnames(&mut p, spec);
    for (index, rule) in items(spec, "rules").iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        for (number, one) in items(rule, "matches").iter().enumerate() {
            path_match(&mut p, &format!("{path}.matches[{number}].path"), at(one, "path"));
        }
        filters(&mut p, &format!("{path}.filters"), items(rule, "filters"), items(rule, "matches"));
        for (number, backend) in items(rule, "backendRefs").iter().enumerate() {
            let path = format!("{path}.backendRefs[{number}]");
            if text(backend, "kind") == "Service" && text(backend, "group").is_empty() && !has(backend, "port") {
                p.required(&format!("{path}.port"), "Must have port for Service reference");
            }
            filters(&mut p, &format!("{path}.filters"), items(backend, "filters"), &[]);
        }
        let redirects = items(rule, "filters").iter().any(|filter| text(filter, "type") == "RequestRedirect");
        if redirects && !items(rule, "backendRefs").is_empty() {
            p.invalid_text(&path, "", "RequestRedirect filter must not be used together with backendRefs");
        }
        timeouts(&mut p, &format!("{path}.timeouts"), at(rule, "timeouts"));
        retry(&mut p, &format!("{path}.retry"), at(rule, "retry"));
        session(&mut p, &format!("{path}.sessionPersistence"), at(rule, "sessionPersistence"));
    }
    p.into_causes()
}

pub(super) fn hostnames(p: &mut Problems, spec: &Value) {
    for (index, host) in items(spec, "hostnames").iter().enumerate() {
        let (path, host) = (format!("spec.hostnames[{index}]"), host.as_str().unwrap_or(""));
        p.rule(&path, host, names::wildcard_subdomain);
        if host.parse::<std::net::IpAddr>().is_ok() {
            p.invalid_text(&path, host, "must be a DNS name, not an IP address");
        }
    }
}

fn path_match(p: &mut Problems, path: &str, matched: &Value) {
    let (kind, value) = (text(matched, "type"), text(matched, "value"));
    if !matches!(kind, "Exact" | "PathPrefix") {
        if kind == "RegularExpression" && regex::Regex::new(value).is_err() {
            p.invalid_text(&format!("{path}.value"), value, "must be a valid regular expression");
        }
        return;
    }
    if !value.starts_with('/') {
        let detail = "value must be an absolute path and start with '/' when type one of ['Exact', 'PathPrefix']";
        p.invalid_text(&format!("{path}.value"), value, detail);
    }
    for bad in ["//", "/./", "/../", "%2f", "%2F", "#"] {
        if value.contains(bad) {
            let detail = format!("must not contain '{bad}' when type one of ['Exact', 'PathPrefix']");
            p.invalid_text(&format!("{path}.value"), value, &detail);
        }
    }
    for bad in ["/..", "/."] {
        if value.ends_with(bad) {
            let detail = format!("must not end with '{bad}' when type one of ['Exact', 'PathPrefix']");
            p.invalid_text(&format!("{path}.value"), value, &detail);
        }
    }
}

const FILTERS: [(&str, &str); 7] = [
    ("RequestHeaderModifier", "requestHeaderModifier"),
    ("ResponseHeaderModifier", "responseHeaderModifier"),
    ("RequestMirror", "requestMirror"),
    ("RequestRedirect", "requestRedirect"),
    ("URLRewrite", "urlRewrite"),
    ("ExtensionRef", "extensionRef"),
    ("CORS", "cors"),
];

/// An origin is scheme and host, with `*.` allowed before the host, or `*`.
fn cors(p: &mut Problems, path: &str, cors: &Value) {
    for (index, origin) in items(cors, "allowOrigins").iter().enumerate() {
        let origin = origin.as_str().unwrap_or("");
        let host = origin.split_once("://").map(|(_, host)| host.strip_prefix("*.").unwrap_or(host));
        let fine = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*', ' ']));
        if origin != "*" && !fine {
            let detail = "must be '*' or <scheme>://<host>[:<port>], whose host may begin with '*.'";
            p.invalid_text(&format!("{path}.allowOrigins[{index}]"), origin, detail);
        }
    }
    for field in ["allowMethods", "allowHeaders", "exposeHeaders"] {
        for (index, name) in items(cors, field).iter().enumerate() {
            let name = name.as_str().unwrap_or("");
            let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
            if name.is_empty() || !name.bytes().all(token) {
                p.invalid_text(&format!("{path}.{field}[{index}]"), name, "must be a token (RFC 9110, section 5.6.2)");
            }
        }
    }
}

/// Of GRPCRoutes as of HTTPRoutes.
pub(super) fn filters(p: &mut Problems, path: &str, filters: &[Value], matches: &[Value]) {
    let mut seen = HashSet::new();
    for (index, filter) in filters.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let kind = text(filter, "type");
        for (name, field) in FILTERS {
            if name == kind && !has(filter, field) {
                p.required(
                    &format!("{path}.{field}"),
                    &format!("filter.{field} must be specified for {kind} filter.type"),
                );
            } else if name != kind && has(filter, field) {
                let detail = format!("filter.{field} must be nil if the filter.type is not {name}");
                p.invalid_text(&format!("{path}.{field}"), "", &detail);
            }
        }
        if !matches!(kind, "RequestMirror" | "ExtensionRef") && !seen.insert(kind) {
            p.invalid_text(&path, kind, &format!("{kind} filter cannot be repeated"));
        }
        for field in ["requestRedirect", "urlRewrite"] {
            path_change(p, &format!("{path}.{field}.path"), pointer(filter, &format!("/{field}/path")), matches);
        }
        if let Some(code) = pointer(filter, "/requestRedirect/statusCode").as_i64()
            && !matches!(code, 301 | 302 | 303 | 307 | 308)
        {
            let known = ["301", "302", "303", "307", "308"];
            p.unsupported(&format!("{path}.requestRedirect.statusCode"), &code.to_string(), &known);
        }
        cors(p, &format!("{path}.cors"), at(filter, "cors"));
    }
    if seen.contains("RequestRedirect") && seen.contains("URLRewrite") {
        p.invalid_text(
            path,
            "",
            "May specify either httpRouteFilterRequestRedirect or httpRouteFilterRequestRewrite, but not both",
        );
    }
}

fn path_change(p: &mut Problems, path: &str, change: &Value, matches: &[Value]) {
    if change.is_null() {
        return;
    }
    let given = present(change, &["replaceFullPath", "replacePrefixMatch"]);
    let wanted = match text(change, "type") {
        "ReplaceFullPath" => "replaceFullPath",
        _ => "replacePrefixMatch",
    };
    if given != [wanted] {
        p.invalid_text(
            path,
            "",
            &format!("{wanted} and nothing else must be specified when type is set to '{}'", text(change, "type")),
        );
    }
    let by_prefix = |one: &Value| pointer(one, "/path/type") == "PathPrefix";
    if wanted == "replacePrefixMatch" && !matches.iter().all(by_prefix) {
        let detail = "When using replacePrefixMatch, every path match of the rule must be of type PathPrefix";
        p.invalid_text(path, "", detail);
    }
}

/// Seconds of a Gateway API duration such as `1h30m` or `500ms`, as milliseconds.
fn millis(text: &str) -> Option<u64> {
    let (mut total, mut rest) = (0u64, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest.get(..digits)?.parse().ok()?;
        let unit = rest.get(digits..)?;
        let (factor, length) = match unit.as_bytes() {
            [b'm', b's', ..] => (1, 2),
            [b's', ..] => (1000, 1),
            [b'm', ..] => (60_000, 1),
            [b'h', ..] => (3_600_000, 1),
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(factor)?)?;
        rest = unit.get(length..)?;
    }
    Some(total)
}

fn timeouts(p: &mut Problems, path: &str, timeouts: &Value) {
    let (request, backend) = (millis(text(timeouts, "request")), millis(text(timeouts, "backendRequest")));
    if let (Some(request), Some(backend)) = (request, backend)
        && request != 0
        && backend > request
    {
        let detail = "backendRequest timeout cannot be longer than request timeout";
        p.invalid_text(&format!("{path}.backendRequest"), text(timeouts, "backendRequest"), detail);
    }
}

fn retry(p: &mut Problems, path: &str, retry: &Value) {
    for (index, code) in items(retry, "codes").iter().enumerate() {
        if !code.as_i64().is_some_and(|code| (400..600).contains(&code)) {
            p.invalid(&format!("{path}.codes[{index}]"), code, "must be a status code from 400 to 599");
        }
    }
    p.at_least(&format!("{path}.attempts"), int(retry, "attempts"), 0);
}

pub(super) fn session(p: &mut Problems, path: &str, session: &Value) {
    let permanent = text(at(session, "cookieConfig"), "lifetimeType") == "Permanent";
    if permanent && !has(session, "absoluteTimeout") {
        let detail = "AbsoluteTimeout must be specified when cookie lifetimeType is Permanent";
        p.required(&format!("{path}.absoluteTimeout"), detail);
    }
    if has(session, "cookieConfig") && text(session, "type") == "Header" {
        p.invalid_text(&format!("{path}.cookieConfig"), "", "cookieConfig can only be set with type Cookie");
    }
    let name = text(session, "sessionName");
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !name.bytes().all(token) {
        p.invalid_text(&format!("{path}.sessionName"), name, "must be a token (RFC 9110, section 5.6.2)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;
    use crate::schema::strict;

    fn told(plural: &str, spec: Value) -> Vec<String> {
        let kind = kinds::find("gateway.networking.k8s.io", plural).unwrap();
        let mut object = json!({"metadata": {"name": "x"}, "spec": spec});
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        let mut causes = strict::validate_values(&kind.schema, &kind.types, &object);
        causes.extend((kind.hooks.validate.unwrap())(&object, None));
        causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn routes() {
        assert!(
            told(
                "httproutes",
                json!({"parentRefs": [{"name": "g"}], "hostnames": ["*.example.com"],
            "rules": [{"backendRefs": [{"name": "s", "port": 80}]}]})
            )
            .is_empty()
        );
        assert_eq!(
            told(
                "httproutes",
                json!({"hostnames": ["1.2.3.4"], "rules": [{"matches": [{"path": {"value": "a//b"}}],
                "filters": [{"type": "RequestRedirect"}, {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath"}}}],
                "backendRefs": [{"name": "s"}], "timeouts": {"request": "1s", "backendRequest": "1m"}}]})
            ),
            [
                "spec.hostnames[0]: Invalid value: \"1.2.3.4\": must be a DNS name, not an IP address",
                "spec.rules[0].matches[0].path.value: Invalid value: \"a//b\": value must be an absolute path and start with '/' when \
                 type one of ['Exact', 'PathPrefix']",
                "spec.rules[0].matches[0].path.value: Invalid value: \"a//b\": must not contain '//' when type one of ['Exact', \
                 'PathPrefix']",
                "spec.rules[0].filters[0].requestRedirect: Required value: filter.requestRedirect must be specified for \
                 RequestRedirect filter.type",
                "spec.rules[0].filters[1].urlRewrite.path: Invalid value: \"\": replaceFullPath and nothing else must be specified \
                 when type is set to 'ReplaceFullPath'",
                "spec.rules[0].filters: Invalid value: \"\": May specify either httpRouteFilterRequestRedirect or \
                 httpRouteFilterRequestRewrite, but not both",
                "spec.rules[0].backendRefs[0].port: Required value: Must have port for Service reference",
                "spec.rules[0]: Invalid value: \"\": RequestRedirect filter must not be used together with backendRefs",
                "spec.rules[0].timeouts.backendRequest: Invalid value: \"1m\": backendRequest timeout cannot be longer than request \
                 timeout",
            ]
        );
    }

    #[test]
    fn gateways() {
        let listener = |name: &str| json!({"name": name, "port": 80, "protocol": "HTTP"});
        assert!(told("gateways", json!({"gatewayClassName": "atoll", "listeners": [listener("a")]})).is_empty());
        assert_eq!(
            told(
                "gateways",
                json!({"gatewayClassName": "atoll", "listeners": [listener("a"), listener("b"),
                {"name": "c", "port": 443, "protocol": "HTTPS"}]})
            ),
            [
                "spec.listeners[1]: Invalid value: {\"port\":80,\"protocol\":\"HTTP\"}: Combination of port, protocol and hostname must \
                 be unique for each listener",
                "spec.listeners[2].tls: Required value: certificateRefs or options must be specified when mode is Terminate",
            ]
        );
    }
}
