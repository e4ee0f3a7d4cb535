//! `pods/NAME[:PORT]/proxy` and `services/NAME[:PORT]/proxy`: one HTTP request to a port of a pod, through the way that
//! port-forward takes.

use super::route::ResourcePath;
use super::{Request, Response};
use crate::auth::Permit;
use crate::core::{Core, Target};
use api::kind::Kind;
use api::object::{Meta, Object};
use api::status::{Reason, Status, StatusResult};
use api::streams;
use http::header::{self, HeaderName};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// From connecting to the first byte of the answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What concerns one hop only (RFC 9110 §7.6.1), and who asked: a workload is never told.
const DROPPED: [HeaderName; 10] = [
    header::AUTHORIZATION,
    header::CONNECTION,
    header::HOST,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::COOKIE,
];

pub async fn handle(
    core: &Core,
    _permit: &Permit,
    kind: &Arc<Kind>,
    path: &ResourcePath,
    request: Request,
) -> StatusResult<Response> {
    let (scheme, name, port) = split(&path.name)?;
    if scheme == "https" {
        return Err(Status::bad_request("https is not proxied; use http"));
    }
    let target = Target::new(kind, &path.namespace, name);
    let object = core.get(&target).await?;
    let (pod, port) = if &*kind.resource.plural == "services" {
        endpoint(core, &target, &object, port).await?
    } else {
        let port = pod_port(&object, port)
            .ok_or_else(|| Status::bad_request(format!("pod {name} has no port {port:?}; name one after a colon")))?;
        (object, port)
    };
    let into = streams::Target {
        namespace: path.namespace.clone(),
        pod: pod.name().to_owned(),
        pod_uid: pod.uid().to_owned(),
        container: String::new(),
    };
    let streams = core.streams()?;
    let forwarded = async {
        let connection = streams.port_forward(&into, port).await?;
        let failed = |error: hyper::Error| {
            Status::new(Reason::ServiceUnavailable, format!("error trying to reach pod {}: {error}", into.pod))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(connection)).await.map_err(failed)?;
        tokio::spawn(async move { drop(connection.await) });
        sender.send_request(rewritten(request, path, &into.pod, port)?).await.map_err(failed)
    };
    let late = || Status::new(Reason::Timeout, format!("pod {} does not answer on port {port}", into.pod));
    let mut response = tokio::time::timeout(PATIENCE, forwarded).await.map_err(|_| late())??;
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
        response.headers_mut().remove(name);
    }
    Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
}

/// `[scheme:]name[:port]`
fn split(text: &str) -> StatusResult<(&str, &str, &str)> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [name] => Ok(("", name, "")),
        [name, port] => Ok(("", name, port)),
        [scheme @ ("" | "http" | "https"), name, port] => Ok((scheme, name, port)),
        _ => Err(Status::bad_request(format!("invalid proxy target {text:?}: name, name:port or scheme:name:port"))),
    }
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn number(value: Option<&Value>) -> Option<u16> {
    value.and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0)
}

/// A pod's port by number or name; its first one if none is asked for.
fn pod_port(pod: &Object, asked: &str) -> Option<u16> {
    let mut ports = list(pod, "/spec/containers").iter().flat_map(|c| list(c, "/ports"));
    match asked.parse::<u16>() {
        Ok(port) => Some(port).filter(|p| *p > 0),
        Err(_) if asked.is_empty() => number(ports.next()?.get("containerPort")),
        Err(_) => number(ports.find(|p| p.str_at("/name") == asked)?.get("containerPort")),
    }
}

/// A ready pod behind a service and its port there.
async fn endpoint(core: &Core, target: &Target, service: &Object, asked: &str) -> StatusResult<(Object, u16)> {
    let none = |why: &str| {
        Status::new(Reason::ServiceUnavailable, format!("no endpoints available for service \"{}\"{why}", target.name))
    };
    let ports = list(service, "/spec/ports");
    let chosen = match asked {
        "" => ports.first(),
        _ => ports
            .iter()
            .find(|p| p.str_at("/name") == asked || number(p.get("port")).is_some_and(|n| asked.parse() == Ok(n))),
    };
    let chosen = chosen.ok_or_else(|| Status::bad_request(format!("service {} has no port {asked:?}", target.name)))?;
    let kinds = core.kinds.current();
    let (Some(slices), Some(pods)) =
        (kinds.any_version("discovery.k8s.io", "endpointslices"), kinds.any_version("", "pods"))
    else {
        return Err(none(""));
    };
    let labels = format!("kubernetes.io/service-name={}", target.name);
    let filter = crate::watch::Filter::parse(&target.namespace, &labels, "", &[])?;
    for slice in core.list(&crate::rest::ListRequest::all(slices, filter)).await?.items {
        let port = list(&slice, "/ports").iter().find(|p| p.str_at("/name") == chosen.str_at("/name"));
        let Some(port) = port.and_then(|p| number(p.get("port"))) else { continue };
        for endpoint in list(&slice, "/endpoints") {
            let ready = endpoint.pointer("/conditions/ready").and_then(Value::as_bool).unwrap_or(true);
            if !ready || endpoint.str_at("/targetRef/kind") != "Pod" {
                continue;
            }
            if let Some(pod) = core.fetch(pods, &target.namespace, endpoint.str_at("/targetRef/name")).await? {
                return Ok((pod, port));
            }
        }
    }
    Err(none(""))
}

/// The request as the workload sees it.
fn rewritten(request: Request, path: &ResourcePath, pod: &str, port: u16) -> StatusResult<Request> {
    let (mut parts, body) = request.into_parts();
    let encode =
        |part: &String| percent_encoding::utf8_percent_encode(part, percent_encoding::NON_ALPHANUMERIC).to_string();
    let mut uri = format!("/{}", path.rest.iter().map(encode).collect::<Vec<_>>().join("/"));
    if parts.uri.path().ends_with('/') && uri.len() > 1 {
        uri.push('/');
    }
    if let Some(query) = parts.uri.query() {
        uri.push('?');
        uri.push_str(query);
    }
    parts.uri = uri.parse().map_err(|_| Status::bad_request("the proxied path is not valid"))?;
    parts.version = http::Version::HTTP_11;
    for name in DROPPED {
        parts.headers.remove(name);
    }
    let impersonation: Vec<HeaderName> =
        parts.headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in impersonation {
        parts.headers.remove(name);
    }
    let host = header::HeaderValue::from_str(&format!("{pod}:{port}"));
    parts.headers.insert(header::HOST, host.map_err(|_| Status::bad_request("the pod's name is no host name"))?);
    Ok(Request::from_parts(parts, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn targets_and_ports() {
        assert_eq!(split("web:80").unwrap(), ("", "web", "80"));
        assert_eq!(split("http:web:80").unwrap(), ("http", "web", "80"));
        assert_eq!(split("web").unwrap(), ("", "web", ""));
        assert!(split("ftp:web:80").is_err() && split("a:b:c:d").is_err());
        let pod = json!({"spec": {"containers": [{"ports": [{"containerPort": 8080, "name": "http"}]}]}});
        assert_eq!(pod_port(&pod, ""), Some(8080));
        assert_eq!(pod_port(&pod, "http"), Some(8080));
        assert_eq!(pod_port(&pod, "9"), Some(9));
        assert_eq!((pod_port(&pod, "x"), pod_port(&pod, "0"), pod_port(&pod, "70000")), (None, None, None));
    }
}
