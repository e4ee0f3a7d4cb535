//! The gateway's own answers, and the body type of all answers.

use crate::compress::Compressed;
use crate::upstream::{Lease, UpstreamBody};
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::time::{Instant, Sleep};

/// What a client is sent.
// Nearly all are of the large variant; a box would cost each of them an allocation.
#[allow(clippy::large_enum_variant)]
pub enum ReplyBody {
    Text(Option<Bytes>),
    /// From a cache.
    Stored(Option<Bytes>),
    /// What was read ahead, and the rest.
    Ahead(Box<(VecDeque<io::Result<Frame<Bytes>>>, ReplyBody)>),
    Http1(UpstreamBody),
    Http2 {
        body: Incoming,
        deadline: Option<Pin<Box<Sleep>>>,
        _lease: Lease,
    },
    Compressed(Box<Compressed>),
}

impl ReplyBody {
    /// Time by which all of it must have come.
    pub fn set_deadline(&mut self, time: Instant) {
        match self {
            ReplyBody::Text(_) | ReplyBody::Stored(_) => {}
            ReplyBody::Ahead(ahead) => ahead.1.set_deadline(time),
            ReplyBody::Http1(body) => body.set_deadline(time),
            ReplyBody::Http2 { deadline, .. } => *deadline = Some(Box::pin(tokio::time::sleep_until(time))),
            ReplyBody::Compressed(body) => body.inner().set_deadline(time),
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            ReplyBody::Text(text) | ReplyBody::Stored(text) => {
                Poll::Ready(text.take().map(|text| Ok(Frame::data(text))))
            }
            ReplyBody::Ahead(ahead) => match ahead.0.pop_front() {
                Some(frame) => Poll::Ready(Some(frame)),
                None => Pin::new(&mut ahead.1).poll_frame(cx),
            },
            ReplyBody::Http1(body) => Pin::new(body).poll_frame(cx),
            ReplyBody::Http2 { body, deadline, .. } => {
                if deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
                }
                Pin::new(body).poll_frame(cx).map_err(io::Error::other)
            }
            ReplyBody::Compressed(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ReplyBody::Text(text) | ReplyBody::Stored(text) => text.is_none(),
            ReplyBody::Ahead(ahead) => ahead.0.is_empty() && ahead.1.is_end_stream(),
            ReplyBody::Http1(body) => body.is_end_stream(),
            ReplyBody::Http2 { body, .. } => body.is_end_stream(),
            ReplyBody::Compressed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ReplyBody::Text(text) | ReplyBody::Stored(text) => {
                SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64))
            }
            ReplyBody::Http1(body) => body.size_hint(),
            ReplyBody::Http2 { body, .. } => body.size_hint(),
            ReplyBody::Compressed(_) | ReplyBody::Ahead(_) => SizeHint::default(),
        }
    }
}

/// A plain text answer.
pub fn text(status: StatusCode, text: &str) -> Response<ReplyBody> {
    let text = Bytes::from(format!("{text}\n"));
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_LENGTH, text.len().into());
    assemble(status, headers, ReplyBody::Text(Some(text)))
}

pub fn redirect(status: StatusCode, location: HeaderValue) -> Response<ReplyBody> {
    let mut headers = HeaderMap::with_capacity(2);
    headers.insert(LOCATION, location);
    headers.insert(CONTENT_LENGTH, 0.into());
    assemble(status, headers, ReplyBody::Text(None))
}

pub fn assemble(status: StatusCode, headers: HeaderMap, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// An answer without a body.
pub fn empty(status: StatusCode, headers: HeaderMap) -> Response<ReplyBody> {
    assemble(status, headers, ReplyBody::Text(None))
}

/// The connection is not used any further.
pub fn close(mut response: Response<ReplyBody>) -> Response<ReplyBody> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// gRPC clients read errors from trailers: what the gateway answers itself is said there (gRPC over HTTP/2, "Responses").
pub fn speak_grpc(asked: &Parts, response: &mut Response<ReplyBody>) {
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    let own = matches!(response.body(), ReplyBody::Text(_)) && response.status().as_u16() >= 400;
    if !own || !asked.headers.get(CONTENT_TYPE).is_some_and(is_grpc) {
        return;
    }
    let code = match response.status() {
        StatusCode::BAD_REQUEST => 13,
        StatusCode::UNAUTHORIZED => 16,
        StatusCode::FORBIDDEN => 7,
        StatusCode::NOT_FOUND => 12,
        StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => 4,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::PAYLOAD_TOO_LARGE => 8,
        status if status.is_server_error() => 14,
        _ => 2,
    };
    let message = match response.body_mut() {
        ReplyBody::Text(text) => text.take().unwrap_or_default(),
        ReplyBody::Stored(_)
        | ReplyBody::Ahead(_)
        | ReplyBody::Http1(_)
        | ReplyBody::Http2 { .. }
        | ReplyBody::Compressed(_) => Bytes::new(),
    };
    let message = percent_encoding::percent_encode(message.trim_ascii(), percent_encoding::CONTROLS).to_string();
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.remove(CONTENT_LENGTH);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", code.into());
    if let Ok(message) = HeaderValue::try_from(message.replace('"', "'")) {
        headers.insert("grpc-message", message);
    }
}
