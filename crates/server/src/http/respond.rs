//! Answers: bytes, JSON, `Status`, compressed when that pays.

use super::{Body, Response};
use api::status::Status;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde_json::Value;
use std::io::Write;

/// Bodies from this size on are compressed for clients that accept it.
pub const COMPRESS_FROM: usize = 128 << 10;
/// Warnings told in one answer, at most, and the length of each.
const WARNINGS: usize = 16;
const WARNING_BYTES: usize = 1024;

pub fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

pub fn stream<S>(stream: S) -> Body
where
    S: futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static,
{
    use futures_util::StreamExt;
    StreamBody::new(stream.map(|item| item.map(Frame::data))).boxed_unsync()
}

pub fn bytes(code: StatusCode, content_type: &'static str, body: Bytes) -> Response {
    let mut response = Response::new(full(body));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

pub fn text(code: StatusCode, body: impl Into<Bytes>) -> Response {
    let mut response = bytes(code, "text/plain; charset=utf-8", body.into());
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

pub fn json(code: StatusCode, value: &Value) -> Response {
    bytes(code, "application/json", serde_json::to_vec(value).unwrap_or_default().into())
}

/// A refusal as a `v1` `Status`.
pub fn status(status: &Status) -> Response {
    let code = StatusCode::from_u16(status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if code.is_server_error() {
        tracing::warn!(code = code.as_u16(), "{}", status.message);
    }
    let mut response = json(code, &status.to_json());
    if let Some(seconds) = status.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"atoll\""));
    }
    response
}

/// `Warning: 299 - "text"` headers.
pub fn warn(response: &mut Response, warnings: &[String]) {
    for warning in warnings.iter().take(WARNINGS) {
        let mut text = String::from("299 - \"");
        for c in warning.chars().filter(|c| !c.is_control()) {
            if text.len() > WARNING_BYTES {
                break;
            }
            if matches!(c, '"' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push('"');
        if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

pub fn accepts_gzip(headers: &HeaderMap) -> bool {
    let value = headers.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).unwrap_or("");
    value.split(',').any(|part| {
        let mut parts = part.split(';').map(str::trim);
        parts.next() == Some("gzip") && !parts.any(|p| p == "q=0")
    })
}

/// Compresses a large body of known bytes.
pub fn compressed(content_type: &'static str, body: Bytes, gzip: bool) -> Response {
    if !gzip || body.len() < COMPRESS_FROM {
        return bytes(StatusCode::OK, content_type, body);
    }
    match self::gzip(&body) {
        Some(small) => {
            let mut response = bytes(StatusCode::OK, content_type, small);
            response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
            response
        }
        None => bytes(StatusCode::OK, content_type, body),
    }
}

pub fn gzip(body: &[u8]) -> Option<Bytes> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::with_capacity(body.len() / 8), flate2::Compression::fast());
    encoder.write_all(body).and_then(|()| encoder.finish()).ok().map(Bytes::from)
}

/// What [`gzip`] made small.
pub fn gunzip(body: &[u8]) -> Bytes {
    let mut out = Vec::new();
    match std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(body), &mut out) {
        Ok(_) => out.into(),
        Err(_) => Bytes::new(),
    }
}
