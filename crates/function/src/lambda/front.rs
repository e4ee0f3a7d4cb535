//! The pod's own port: HTTP requests become events of API Gateway's format; who knows the function's key brings events as
//! they are.

use super::broker::{Answer, Broker, Chunks, Event, Failure, Refusal, request_id};
use super::event::{self, About};
use super::http_server::{Body, full, json_answer};
use super::{INVOKE_KEY, PAYLOAD, POD};
use crate::host::{PARENT, Trace};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A streamed answer that begins with its status and headers.
const INTEGRATION: &str = "application/vnd.awslambda.http-integration-response";
/// What follows those.
const SEPARATOR: [u8; 8] = [0; 8];
const PRELUDE: usize = 128 << 10;
/// A client may take so long to send its body.
const BODY_TIME: Duration = Duration::from_secs(60);

pub(super) async fn handle(broker: Arc<Broker>, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let key = parts.headers.remove(INVOKE_KEY);
    let is_raw = key.is_some_and(|key| constant_time_eq(key.as_bytes(), broker.spec.invoke_key.as_bytes()));
    let body = match tokio::time::timeout(BODY_TIME, Limited::new(body, PAYLOAD).collect()).await {
        Ok(Ok(whole)) => whole.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return message(StatusCode::PAYLOAD_TOO_LARGE, &format!("an event has at most {PAYLOAD} bytes"));
        }
        Ok(Err(_)) | Err(_) => return message(StatusCode::BAD_REQUEST, "the request's body broke off"),
    };
    let id = request_id();
    let trace = trace(&parts.headers);
    match is_raw {
        true => raw(&broker, id, trace, &parts.headers, body).await,
        false => proxied(&broker, id, trace, &parts, &body, peer).await,
    }
}

fn constant_time_eq(a: &[u8], b: &[u8]) -> bool {
    !b.is_empty() && a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

fn message(status: StatusCode, text: &str) -> Response<Body> {
    json_answer(status, full(json!({"message": text}).to_string().into()))
}

/// W3C's trace context in X-Ray's words.
fn trace(headers: &HeaderMap) -> String {
    let mut own = HeaderMap::new();
    for parent in headers.get_all(PARENT) {
        own.append(PARENT, parent.clone());
    }
    let trace = Trace::continue_in(&mut own, false);
    let id = format!("{:032x}", trace.id);
    let (time, rest) = id.split_at_checked(8).unwrap_or((&id, ""));
    format!("Root=1-{time}-{rest};Parent={:016x};Sampled={}", trace.span, u8::from(trace.sampled()))
}

async fn raw(broker: &Broker, id: String, trace: String, headers: &HeaderMap, body: Bytes) -> Response<Body> {
    let client_context = headers.get("lambda-runtime-client-context").cloned();
    let outcome = broker.invoke(Event { id: id.clone(), body, trace, client_context }).await;
    let mut answer = match outcome {
        Ok(Answer::Whole(bytes)) => json_answer(StatusCode::OK, full(bytes)),
        Ok(Answer::Stream(kind, chunks)) => streamed(kind, Vec::new(), chunks),
        Ok(Answer::Failed(failure)) | Err(Refusal::TimedOut(failure)) => {
            let mut answer = json_answer(StatusCode::OK, full(failure.body));
            answer.headers_mut().insert("x-amz-function-error", HeaderValue::from_static("Unhandled"));
            answer
        }
        Err(Refusal::TooMany) => message(StatusCode::TOO_MANY_REQUESTS, "Rate Exceeded."),
        Err(Refusal::NotTaken) => message(StatusCode::SERVICE_UNAVAILABLE, "the runtime took no event in time"),
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        answer.headers_mut().insert("x-amzn-requestid", id);
    }
    if let Ok(pod) = HeaderValue::from_str(&broker.spec.pod) {
        answer.headers_mut().insert(POD, pod);
    }
    answer
}

async fn proxied(
    broker: &Broker,
    id: String,
    trace: String,
    parts: &Parts,
    body: &Bytes,
    peer: SocketAddr,
) -> Response<Body> {
    let about =
        About { function: &broker.spec.name, request_id: &id, peer: peer.ip().to_string(), now: clock::now_nanos() };
    let event = event::of_request(parts, body, &about).to_string();
    let outcome = broker.invoke(Event { id: id.clone(), body: event.into(), trace, client_context: None }).await;
    match outcome {
        Ok(Answer::Whole(bytes)) => match event::to_answer(&bytes) {
            Ok(answer) => answer.map(full),
            Err(why) => failed(&Failure::new("InvalidResult", &why)),
        },
        Ok(Answer::Stream(kind, chunks))
            if kind.as_ref().is_some_and(|kind| kind.as_bytes() == INTEGRATION.as_bytes()) =>
        {
            match begun(chunks).await {
                Ok(answer) => answer,
                Err(why) => failed(&Failure::new("InvalidResult", &why)),
            }
        }
        Ok(Answer::Stream(kind, chunks)) => streamed(kind, Vec::new(), chunks),
        Ok(Answer::Failed(failure)) => failed(&failure),
        Err(Refusal::TimedOut(_)) => message(StatusCode::GATEWAY_TIMEOUT, "the function did not answer in time"),
        Err(Refusal::TooMany) => message(StatusCode::TOO_MANY_REQUESTS, "too many requests wait for the function"),
        Err(Refusal::NotTaken) => message(StatusCode::SERVICE_UNAVAILABLE, "the function took no event in time"),
    }
}

/// What kind of failure it was; its details are for the function's author, not for who called.
fn failed(failure: &Failure) -> Response<Body> {
    let mut answer = message(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error");
    if let Ok(kind) = HeaderValue::from_str(&failure.kind) {
        answer.headers_mut().insert("x-amzn-errortype", kind);
    }
    answer
}

/// Status and headers come first in the stream, as JSON; eight zero bytes end them.
async fn begun(mut chunks: Chunks) -> Result<Response<Body>, String> {
    let mut read = BytesMut::new();
    let at = loop {
        if let Some(at) = read.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
            break at;
        }
        if read.len() > PRELUDE {
            return Err(format!("the streamed answer's head has more than {PRELUDE} bytes"));
        }
        match chunks.recv().await {
            Some(Ok(chunk)) => read.extend_from_slice(&chunk),
            Some(Err(why)) => return Err(why),
            None => return Err("the streamed answer ended within its head".into()),
        }
    };
    let head = read.split_to(at);
    let _ = read.split_to(SEPARATOR.len());
    let head: Value = serde_json::from_slice(&head).map_err(|e| format!("the streamed answer's head: {e}"))?;
    let head = event::head(head.as_object().ok_or("the streamed answer's head is no object")?)?;
    let rest = streamed(None, vec![read.freeze()], chunks);
    let (mut parts, _) = head.into_parts();
    parts.headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/octet-stream"));
    Ok(Response::from_parts(parts, rest.into_body()))
}

fn streamed(kind: Option<HeaderValue>, first: Vec<Bytes>, chunks: Chunks) -> Response<Body> {
    let first = stream::iter(first.into_iter().filter(|chunk| !chunk.is_empty()).map(Ok));
    let rest = stream::unfold(chunks, |mut chunks| async move { chunks.recv().await.map(|chunk| (chunk, chunks)) });
    let frames = first.chain(rest).map(|chunk| chunk.map(Frame::data).map_err(std::io::Error::other));
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[test]
    fn traces_are_told_in_x_rays_words() {
        let mut headers = HeaderMap::new();
        let parent = HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        headers.insert("traceparent", parent);
        let told = trace(&headers);
        assert!(told.starts_with("Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;Parent="), "{told}");
        assert!(told.ends_with(";Sampled=1"), "{told}");
        assert!(trace(&HeaderMap::new()).starts_with("Root=1-"));
    }

    #[test]
    fn an_empty_key_opens_nothing() {
        assert!(constant_time_eq(b"a", b"a"));
        assert!(!constant_time_eq(b"", b"") && !constant_time_eq(b"a", b"b") && !constant_time_eq(b"a", b"ab"));
    }

    #[tokio::test]
    async fn a_streamed_answer_begins_with_its_head() {
        let of = |parts: Vec<&'static [u8]>| async move {
            let (sender, chunks) = mpsc::channel(8);
            for part in parts {
                sender.send(Ok(Bytes::from_static(part))).await.unwrap();
            }
            drop(sender);
            begun(chunks).await
        };
        let parts: Vec<&[u8]> =
            vec![b"{\"statusCode\":202,", b"\"headers\":{\"x\":\"1\"}}\0\0\0", b"\0\0\0\0\0hel", b"lo"];
        let answer = of(parts).await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["x"]), (202, &HeaderValue::from_static("1")));
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "hello");
        assert!(of(vec![b"{}"]).await.unwrap_err().contains("within its head"));
        assert!(of(vec![b"[]\0\0\0\0\0\0\0\0"]).await.unwrap_err().contains("no object"));
    }
}
