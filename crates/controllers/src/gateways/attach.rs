//! Whether a route may be attached to a Gateway, and to which of its listeners: pure but for the labels of namespaces.

use super::GROUP;
use crate::objects::{int, list};
use api::informer::Informer;
use api::object::{Meta, Object};
use api::selector::Selector;
use serde_json::Value;

/// A parent reference of a route.
pub(super) struct Parent<'a> {
    pub reference: &'a Value,
    pub namespace: String,
    pub name: String,
}

/// References to Gateways.
pub(super) fn parents(route: &Object) -> impl Iterator<Item = Parent<'_>> {
    let of_gateway = |reference: &&Value| {
        matches!(reference.str_at("/group"), "" | GROUP) && matches!(reference.str_at("/kind"), "" | "Gateway")
    };
    list(route, "/spec/parentRefs").iter().filter(of_gateway).map(|reference| {
        let namespace = match reference.str_at("/namespace") {
            "" => route.namespace(),
            namespace => namespace,
        };
        Parent { reference, namespace: namespace.to_owned(), name: reference.str_at("/name").to_owned() }
    })
}

impl Parent<'_> {
    pub fn means(&self, gateway: &Object) -> bool {
        gateway.namespace() == self.namespace && gateway.name() == self.name
    }
}

/// Why a route is not accepted: reason and message of its condition.
pub(super) type Refusal = (&'static str, String);

/// Whether a listener serves routes of a kind: TLS that is passed on is for TLSRoutes, HTTP and HTTPS for the others.
pub(super) fn serves(listener: &Value, kind: &str) -> bool {
    match (listener.str_at("/protocol"), listener.str_at("/tls/mode")) {
        ("HTTP", _) | ("HTTPS", "" | "Terminate") => matches!(kind, "HTTPRoute" | "GRPCRoute"),
        ("TLS", "Passthrough") => kind == "TLSRoute",
        _ => false,
    }
}

/// Names of the listeners the route is attached to.
pub(super) fn listeners(
    gateway: &Object,
    kind: &str,
    route: &Object,
    parent: &Parent<'_>,
    namespaces: &Informer,
) -> Result<Vec<String>, Refusal> {
    let section = parent.reference.str_at("/sectionName");
    let port = int(parent.reference, "/port");
    let named: Vec<&Value> = list(gateway, "/spec/listeners")
        .iter()
        .filter(|listener| section.is_empty() || listener.str_at("/name") == section)
        .filter(|listener| port.is_none() || int(listener, "/port") == port)
        .filter(|listener| serves(listener, kind))
        .collect();
    if named.is_empty() {
        return Err(("NoMatchingParent", "No listener of the Gateway is meant by sectionName and port".into()));
    }
    let allowed: Vec<&Value> =
        named.into_iter().filter(|listener| allows(listener, gateway, kind, route, namespaces)).collect();
    if allowed.is_empty() {
        let message = format!("The listeners do not allow {kind}s of this namespace (allowedRoutes)");
        return Err(("NotAllowedByListeners", message));
    }
    let hosts: Vec<&str> = list(route, "/spec/hostnames").iter().filter_map(Value::as_str).collect();
    let matching: Vec<String> = allowed
        .iter()
        .filter(|listener| {
            let own = listener.str_at("/hostname");
            own.is_empty() || hosts.is_empty() || hosts.iter().any(|host| meet(own, host))
        })
        .map(|listener| listener.str_at("/name").to_owned())
        .collect();
    if matching.is_empty() {
        let message = "No hostname of the route matches a listener's hostname".to_owned();
        return Err(("NoMatchingListenerHostname", message));
    }
    Ok(matching)
}

fn allows(listener: &Value, gateway: &Object, kind: &str, route: &Object, namespaces: &Informer) -> bool {
    let kinds = list(listener, "/allowedRoutes/kinds");
    if !kinds.is_empty() && !kinds.iter().any(|allowed| allowed.str_at("/kind") == kind) {
        return false;
    }
    match listener.str_at("/allowedRoutes/namespaces/from") {
        "All" => true,
        "Selector" => {
            let selector = listener.pointer("/allowedRoutes/namespaces/selector").unwrap_or(&Value::Null);
            let namespace = namespaces.get("", route.namespace());
            let selector = Selector::from_object(selector).unwrap_or_else(|_| Selector::nothing());
            namespace.is_some_and(|namespace| selector.matches_object(&namespace))
        }
        _ => route.namespace() == gateway.namespace(),
    }
}

/// Whether two host names, of which either may begin with `*.`, have a host in common.
fn meet(a: &str, b: &str) -> bool {
    match (a.strip_prefix("*."), b.strip_prefix("*.")) {
        (None, None) => a.eq_ignore_ascii_case(b),
        (Some(suffix), None) => is_under(b, suffix),
        (None, Some(suffix)) => is_under(a, suffix),
        (Some(one), Some(other)) => one.eq_ignore_ascii_case(other) || is_under(one, other) || is_under(other, one),
    }
}

fn is_under(host: &str, suffix: &str) -> bool {
    let Some(at) = host.len().checked_sub(suffix.len()).filter(|at| *at > 1) else { return false };
    host.get(at..).is_some_and(|end| end.eq_ignore_ascii_case(suffix)) && host.as_bytes().get(at - 1) == Some(&b'.')
}

#[cfg(test)]
mod tests {
    use super::meet;

    #[test]
    fn hostnames() {
        assert!(meet("a.b", "A.B") && !meet("a.b", "b.b"));
        assert!(meet("*.b.c", "a.b.c") && meet("x.a.b.c", "*.b.c"));
        assert!(!meet("*.b.c", "b.c") && !meet("*.b.c", "ab.c") && !meet("*.b.c", ".b.c"));
        assert!(meet("*.b.c", "*.c") && !meet("*.b.c", "*.d"));
    }
}
