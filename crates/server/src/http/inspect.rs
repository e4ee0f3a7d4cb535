//! What the network is asked: `GET /apis/subresources.atoll.dev/v1alpha1/...` ([`api::inspect`]), answered by a line of JSON for each
//! thing there is to tell, as long as there is something to come.

use super::{Query, Request, Response, Service, method_not_allowed, no_such_path, respond, route::ResourcePath};
use api::inspect::{Question, VERSION};
use api::status::{Status, StatusResult};
use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, StatusCode};

/// Longest name of an end of a connection.
const END: usize = 512;

pub async fn handle(service: &Service, request: Request, path: &ResourcePath, query: &Query) -> StatusResult<Response> {
    let question = question(path, query)?;
    if *request.method() != Method::GET {
        return Err(method_not_allowed());
    }
    let lines = service.core.inspect()?.ask(question).await?;
    let stop = service.stop.clone();
    let lines = lines.take_until(async move { stop.cancelled_owned().await });
    let mut response = respond::bytes(StatusCode::OK, "application/jsonl", Bytes::new());
    *response.body_mut() = respond::stream(lines);
    Ok(response)
}

fn question(path: &ResourcePath, query: &Query) -> StatusResult<Question> {
    if path.version != VERSION || !path.rest.is_empty() {
        return Err(no_such_path());
    }
    let port = |least: u16| match query.number::<u16>("port")? {
        Some(port) if port < least => Err(Status::bad_request("port: Invalid value: must be from 1 to 65535")),
        port => Ok(port),
    };
    let of_namespace = (path.plural.as_str(), path.subresource.as_str(), path.namespace.is_empty());
    match of_namespace {
        ("pods", "capture", false) => Ok(Question::Capture {
            namespace: path.namespace.clone(),
            pod: path.name.clone(),
            port: port(1)?,
            count: query.number("count")?,
        }),
        (_, "", true) if path.name.is_empty() => match path.plural.as_str() {
            "connections" => Ok(Question::Connections),
            "refusals" => Ok(Question::Log { follow: query.flag("follow") }),
            "explanations" => Ok(Question::Explain {
                from: end(query, "from")?,
                to: end(query, "to")?,
                protocol: query.get("protocol").to_owned(),
                port: port(0)?,
            }),
            _ => Err(no_such_path()),
        },
        _ => Err(no_such_path()),
    }
}

fn end(query: &Query, name: &str) -> StatusResult<String> {
    match query.get(name) {
        "" => Err(Status::bad_request(format!("{name}: Required value: name an end of the connection"))),
        text if text.len() > END => {
            Err(Status::bad_request(format!("{name}: Too long: may not be more than {END} bytes")))
        }
        text => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::route::{Route, parse};

    fn asked(rest: &str, query: &str) -> StatusResult<Question> {
        let Route::Resource(path) = parse(&format!("/apis/{}/{rest}", api::inspect::GROUP)) else { panic!("{rest}") };
        question(&path, &Query::parse(query))
    }

    #[test]
    fn questions() {
        let capture = asked("v1alpha1/namespaces/shop/pods/web/capture", "port=80&count=3").unwrap();
        let (namespace, pod) = ("shop".to_owned(), "web".to_owned());
        assert_eq!(capture, Question::Capture { namespace, pod, port: Some(80), count: Some(3) });
        assert_eq!(asked("v1alpha1/connections", "").unwrap(), Question::Connections);
        assert_eq!(asked("v1alpha1/refusals", "follow=true").unwrap(), Question::Log { follow: true });
        let (from, to, protocol) = ("shop/web".to_owned(), "db.shop".to_owned(), "tcp".to_owned());
        let explain = asked("v1alpha1/explanations", "from=shop%2Fweb&to=db.shop&protocol=tcp&port=1").unwrap();
        assert_eq!(explain, Question::Explain { from, to, protocol, port: Some(1) });
        let long = format!("from=a&to={}", "a".repeat(513));
        for (path, query, code) in [
            ("v1/connections", "", 404),
            ("v1alpha1/nothing", "", 404),
            ("v1alpha1/connections/one", "", 404),
            ("v1alpha1/namespaces/shop/connections", "", 404),
            ("v1alpha1/namespaces/shop/pods/web", "", 404),
            ("v1alpha1/namespaces/shop/pods/web/capture/more", "", 404),
            ("v1alpha1/pods/web/capture", "", 404),
            ("v1alpha1/namespaces/shop/pods/web/capture", "port=0", 400),
            ("v1alpha1/namespaces/shop/pods/web/capture", "port=65536", 400),
            ("v1alpha1/namespaces/shop/pods/web/capture", "count=-1", 400),
            ("v1alpha1/explanations", "from=a", 400),
            ("v1alpha1/explanations", &long, 400),
        ] {
            assert_eq!(asked(path, query).unwrap_err().code(), code, "{path}?{query}");
        }
    }
}
