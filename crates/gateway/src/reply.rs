//! The gateway's own answers, and the body type of all answers.

use crate::upstream::{Lease, UpstreamBody};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

/// What a client is sent.
// Nearly all are of the large variant; a box would cost each of them an allocation.
#[allow(clippy::large_enum_variant)]
pub enum ReplyBody {
    Text(Option<Bytes>),
    Http1(UpstreamBody),
    Http2 { body: Incoming, _lease: Lease },
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            ReplyBody::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            ReplyBody::Http1(body) => Pin::new(body).poll_frame(cx),
            ReplyBody::Http2 { body, .. } => Pin::new(body).poll_frame(cx).map_err(io::Error::other),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ReplyBody::Text(text) => text.is_none(),
            ReplyBody::Http1(body) => body.is_end_stream(),
            ReplyBody::Http2 { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ReplyBody::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            ReplyBody::Http1(body) => body.size_hint(),
            ReplyBody::Http2 { body, .. } => body.size_hint(),
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
