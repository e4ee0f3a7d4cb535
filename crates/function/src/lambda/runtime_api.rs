//! The runtime API, as the function's own process sees it on the pod's loopback.
//! <https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html>

use super::broker::{Answer, Broker, Failure};
use super::http_server::{Body, full, json_answer};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::json;
use std::sync::Arc;

const VERSION: &str = "/2018-06-01/runtime/";
const ERROR_TYPE: HeaderName = HeaderName::from_static("lambda-runtime-function-error-type");
const RESPONSE_MODE: HeaderName = HeaderName::from_static("lambda-runtime-function-response-mode");
/// Bytes of an error's description.
const ERROR_LIMIT: usize = 256 << 10;
/// Bytes of a streamed answer.
const STREAM_LIMIT: usize = 200 << 20;

pub(super) async fn handle(broker: Arc<Broker>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let Some(rest) = parts.uri.path().strip_prefix(VERSION) else {
        return told(StatusCode::NOT_FOUND, "NotFound", "the runtime API begins with /2018-06-01/runtime/");
    };
    let path: Vec<&str> = rest.split('/').collect();
    match (&parts.method, path.as_slice()) {
        (&Method::GET, ["invocation", "next"]) => next(&broker).await,
        (&Method::POST, ["invocation", id, "response"]) if is_streaming(&parts.headers) => {
            stream(&broker, id, parts.headers.get(CONTENT_TYPE).cloned(), body).await
        }
        (&Method::POST, ["invocation", id, "response"]) => respond(&broker, id, body).await,
        (&Method::POST, ["invocation", id, "error"]) => {
            let failure = failure(&parts.headers, body).await;
            accepted(broker.answer(id, Answer::Failed(failure)))
        }
        (&Method::POST, ["init", "error"]) => {
            let failure = failure(&parts.headers, body).await;
            broker.init_failed(&failure);
            accepted(true)
        }
        _ => told(StatusCode::NOT_FOUND, "NotFound", "the runtime API has no such operation"),
    }
}

fn is_streaming(headers: &HeaderMap) -> bool {
    headers.get(RESPONSE_MODE).is_some_and(|mode| mode.as_bytes().eq_ignore_ascii_case(b"streaming"))
}

async fn next(broker: &Broker) -> Response<Body> {
    let work = broker.next().await;
    let mut answer = json_answer(StatusCode::OK, full(work.event.body));
    let spec = &broker.spec;
    let headers = [
        ("lambda-runtime-aws-request-id", Some(work.event.id)),
        ("lambda-runtime-deadline-ms", Some(work.deadline_ms.to_string())),
        ("lambda-runtime-invoked-function-arn", Some(spec.arn.clone())),
        ("lambda-runtime-trace-id", Some(work.event.trace).filter(|trace| !trace.is_empty())),
    ];
    for (name, value) in headers {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
            answer.headers_mut().insert(name, value);
        }
    }
    if let Some(context) = work.event.client_context {
        answer.headers_mut().insert("lambda-runtime-client-context", context);
    }
    answer
}

async fn respond(broker: &Broker, id: &str, body: Incoming) -> Response<Body> {
    if broker.deadline(id).is_none() {
        return unknown();
    }
    match Limited::new(body, super::PAYLOAD).collect().await {
        Ok(whole) => accepted(broker.answer(id, Answer::Whole(whole.to_bytes()))),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            let message =
                format!("Response payload size exceeded maximum allowed payload size ({} bytes).", super::PAYLOAD);
            broker.answer(id, Answer::Failed(Failure::new("Function.ResponseSizeTooLarge", &message)));
            told(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &message)
        }
        Err(_) => {
            let failure = Failure::new("Runtime.TruncatedResponse", "the runtime broke off its response");
            accepted(broker.answer(id, Answer::Failed(failure)))
        }
    }
}

async fn stream(broker: &Broker, id: &str, kind: Option<HeaderValue>, mut body: Incoming) -> Response<Body> {
    let Some(deadline) = broker.deadline(id) else { return unknown() };
    let Some(chunks) = broker.begin(id, kind) else { return unknown() };
    let mut left = STREAM_LIMIT;
    let pump = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| error.to_string())?;
            match frame.into_data() {
                Ok(data) => {
                    left = left.checked_sub(data.len()).ok_or_else(|| format!("more than {STREAM_LIMIT} bytes"))?;
                    // Who invoked may have gone; the runtime says the rest to nobody.
                    let _ = chunks.send(Ok(data)).await;
                }
                Err(other) => {
                    let trailers = other.into_trailers().unwrap_or_default();
                    if let Some(kind) = trailers.get(ERROR_TYPE) {
                        return Err(String::from_utf8_lossy(kind.as_bytes()).into_owned());
                    }
                }
            }
        }
        Ok(())
    };
    match tokio::time::timeout_at(deadline, pump).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            let _ = chunks.send(Err(why)).await;
        }
        Err(_) => {
            broker.time_out(id);
            let _ = chunks.try_send(Err("timed out".into()));
        }
    }
    broker.finish(id);
    accepted(true)
}

/// What the runtime says went wrong; a description that is too long or none is replaced.
async fn failure(headers: &HeaderMap, body: Incoming) -> Failure {
    let kind = headers.get(ERROR_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("Unhandled").to_owned();
    let body = Limited::new(body, ERROR_LIMIT).collect().await.map(|whole| whole.to_bytes()).unwrap_or_default();
    match serde_json::from_slice::<serde_json::Value>(&body) {
        Ok(value) if value.is_object() => Failure { kind, body },
        _ => Failure::new(&kind, "the runtime gave no readable description of its error"),
    }
}

fn accepted(known: bool) -> Response<Body> {
    match known {
        true => json_answer(StatusCode::ACCEPTED, full(Bytes::from_static(b"{\"status\":\"OK\"}\n"))),
        false => unknown(),
    }
}

fn unknown() -> Response<Body> {
    told(StatusCode::BAD_REQUEST, "InvalidRequestID", "no invocation of this request id is under way")
}

fn told(status: StatusCode, kind: &str, message: &str) -> Response<Body> {
    json_answer(status, full(json!({"errorType": kind, "errorMessage": message}).to_string().into()))
}
