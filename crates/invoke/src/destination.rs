//! Where a `Destination` leads: by name to a Knative Service or a Service of the namespace, or by a URL to one of them.

use crate::messages::Target;
use serde_json::Value;

/// `is_function` says whether a name is a Knative Service's.
pub fn target(
    destination: Option<&Value>,
    namespace: &str,
    domain: &str,
    is_function: impl Fn(&str) -> bool,
) -> Result<Target, String> {
    let uri = destination.and_then(|d| d.get("uri")).and_then(Value::as_str);
    let Some(reference) = destination.and_then(|d| d.get("ref")) else {
        let uri = uri.ok_or("ref or uri: a Knative Service or a Service must be named")?;
        let (name, path) = address(uri, namespace, domain)?;
        return Ok(Target { service: !is_function(&name), name, path });
    };
    let text = |field: &str| reference.get(field).and_then(Value::as_str).unwrap_or_default();
    let service = match (text("apiVersion").split('/').next().unwrap_or_default(), text("kind")) {
        ("serving.knative.dev", "Service") => false,
        ("v1", "Service") => true,
        (group, kind) => return Err(format!("ref: {group} {kind}: a Knative Service or a Service must be named")),
    };
    if !["", namespace].contains(&text("namespace")) {
        return Err(format!("ref.namespace: {:?}: it must be of this namespace", text("namespace")));
    }
    let path = uri.unwrap_or("/");
    if !path.starts_with('/') {
        return Err(format!("uri: {path:?}: with ref it is a path"));
    }
    Ok(Target { name: text("name").to_owned(), service, path: path.to_owned() })
}

/// Name and path of `http://NAME.NAMESPACE.svc.DOMAIN/PATH`.
fn address(uri: &str, namespace: &str, domain: &str) -> Result<(String, String), String> {
    let elsewhere = || {
        format!(
            "uri: {uri:?}: it must lead to a Service of this namespace, as http://NAME.{namespace}.svc.{domain}/PATH"
        )
    };
    let rest = uri.strip_prefix("http://").ok_or_else(elsewhere)?;
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let host = match authority.split_once(':') {
        None | Some((_, "80" | "")) => authority.split(':').next().unwrap_or_default(),
        Some((_, port)) => return Err(format!("uri: port {port}: events go to a Service's first port; leave it out")),
    };
    let (name, rest) = host.split_once('.').ok_or_else(elsewhere)?;
    let full = format!("{namespace}.svc.{domain}");
    let short = format!("{namespace}.svc");
    let fine = api::names::dns_label(name).is_empty() && [namespace, short.as_str(), full.as_str()].contains(&rest);
    if fine { Ok((name.to_owned(), path.to_owned())) } else { Err(elsewhere()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn to(value: Value) -> Result<Target, String> {
        target(Some(&value), "shop", "cluster.local", |name| name == "greet")
    }

    #[test]
    fn destinations_are_of_the_namespace() {
        let reference = |api: &str, namespace: &str| json!({"apiVersion": api, "kind": "Service", "name": "f", "namespace": namespace});
        assert_eq!(
            to(json!({"ref": reference("serving.knative.dev/v1", "")})).unwrap(),
            Target { name: "f".into(), service: false, path: "/".into() }
        );
        let service = to(json!({"ref": reference("v1", "shop"), "uri": "/in"})).unwrap();
        assert!(service.service && service.path == "/in");
        assert!(to(json!({"ref": reference("v1", "other")})).unwrap_err().contains("namespace"));
        assert!(to(json!({"ref": reference("apps/v1", "")})).unwrap_err().contains("apps"));
        assert!(to(json!({"ref": reference("v1", ""), "uri": "in"})).unwrap_err().contains("path"));
        assert!(target(None, "shop", "cluster.local", |_| true).unwrap_err().contains("ref or uri"));
    }

    #[test]
    fn urls_lead_to_services_of_the_namespace_or_nowhere() {
        let at = |uri: &str| to(json!({ "uri": uri }));
        let found =
            |name: &str, service: bool, path: &str| Ok(Target { name: name.into(), service, path: path.into() });
        assert_eq!(at("http://greet.shop.svc.cluster.local/in?a=1"), found("greet", false, "/in?a=1"));
        assert_eq!(at("http://web.shop.svc"), found("web", true, "/"));
        assert_eq!(at("http://web.shop:80/"), found("web", true, "/"));
        for elsewhere in [
            "http://web.other.svc.cluster.local/",
            "http://example.com/",
            "https://web.shop.svc.cluster.local/",
            "http://web/",
            "http://169.254.169.254/latest",
            "http://a@web.shop.svc/",
            "http://web.shop.svc.example.com/",
            "/in",
            "",
        ] {
            assert!(at(elsewhere).unwrap_err().contains("must lead to a Service of this namespace"), "{elsewhere}");
        }
        assert!(at("http://web.shop.svc:8080/").unwrap_err().contains("port 8080"));
    }
}
