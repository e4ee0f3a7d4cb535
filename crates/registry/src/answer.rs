//! Answers: bodies, and errors in the spec's form.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, IF_NONE_MATCH, WARNING};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use image::{Digest, Error};
use std::io;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;
pub(crate) type Answer = Response<Body>;

/// A refusal; becomes `{"errors": [{code, message, detail}]}`.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub status: StatusCode,
    /// The spec's error code.
    pub code: &'static str,
    /// One error each.
    pub messages: Vec<String>,
    pub headers: Vec<(&'static str, String)>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal::each(status, code, vec![message.into()])
    }

    pub fn each(status: StatusCode, code: &'static str, messages: Vec<String>) -> Refusal {
        Refusal { status, code, messages, headers: Vec::new() }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Refusal {
        self.headers.push((name, value.into()));
        self
    }

    pub fn answer(self) -> Answer {
        let errors: Vec<_> = self
            .messages
            .iter()
            .map(|message| serde_json::json!({"code": self.code, "message": message, "detail": null}))
            .collect();
        let mut answer = json(self.status, &serde_json::json!({ "errors": errors }));
        for (name, value) in self.headers {
            set(&mut answer, name, &value);
        }
        answer
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        let (status, code) = match &error {
            Error::BlobUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            Error::NotFound(_) => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN"),
            Error::UploadUnknown(_) => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            Error::UploadBusy(_) => (StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID"),
            Error::UploadRange { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            Error::DigestMismatch { .. } | Error::InvalidDigest(_) => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            Error::SizeMismatch { .. } => (StatusCode::BAD_REQUEST, "SIZE_INVALID"),
            Error::InvalidReference { .. } => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            Error::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            Error::MissingReferenced { .. } => (StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN"),
            Error::Invalid { .. } => (StatusCode::BAD_REQUEST, "MANIFEST_INVALID"),
            Error::BlobInUse(_) => (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED"),
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                let message = "the registry's disk is full; remove images (atoll image rm) or make room";
                return Refusal::new(StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN", message);
            }
            other => {
                tracing::error!(error = %other.chain(), "registry request failed");
                let message = "the store failed; atoll's log says why";
                return Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", message);
            }
        };
        Refusal::new(status, code, error.to_string())
    }
}

pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default().map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    if status != StatusCode::NO_CONTENT && status != StatusCode::NOT_MODIFIED {
        set(&mut answer, CONTENT_LENGTH.as_str(), "0");
    }
    answer
}

pub(crate) fn bytes(status: StatusCode, media_type: &str, content: impl Into<Bytes>) -> Answer {
    let content = content.into();
    let length = content.len().to_string();
    let mut answer = Response::new(Full::new(content).map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    set(&mut answer, CONTENT_TYPE.as_str(), media_type);
    set(&mut answer, CONTENT_LENGTH.as_str(), &length);
    answer
}

pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Answer {
    bytes(status, "application/json", value.to_string())
}

/// Whether the client has this already (`If-None-Match`).
pub(crate) fn not_modified(headers: &HeaderMap, digest: &Digest) -> bool {
    let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let mut tags = known.split(',').map(|t| t.trim().trim_start_matches("W/").trim_matches('"'));
    !known.is_empty() && tags.any(|t| t == "*" || t == digest.to_string())
}

/// Adds a warning that clients show to their users (spec: at most 4096 bytes in all).
pub(crate) fn warn(answer: &mut Answer, text: &str) {
    let text: String = text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(400).collect();
    let value = format!("299 - \"{}\"", text.replace('\\', "").replace('"', "'"));
    let all: usize = answer.headers().get_all(WARNING).iter().map(|v| v.len()).sum();
    if let (true, Ok(value)) = (all + value.len() <= 4096, http::HeaderValue::from_str(&value)) {
        answer.headers_mut().append(WARNING, value);
    }
}

/// Values that a header cannot hold are left out.
pub(crate) fn set(answer: &mut Answer, name: &'static str, value: &str) {
    if let Ok(value) = http::HeaderValue::from_str(value) {
        answer.headers_mut().insert(http::HeaderName::from_static(name), value);
    }
}
