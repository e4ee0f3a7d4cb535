//! Answers: bodies, and errors in the spec's form.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use image::Error;
use std::io;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;
pub(crate) type Answer = Response<Body>;

/// A refusal; becomes `{"errors": [{code, message, detail}]}`.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub status: StatusCode,
    /// The spec's error code.
    pub code: &'static str,
    pub message: String,
    pub headers: Vec<(&'static str, String)>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, code, message: message.into(), headers: Vec::new() }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Refusal {
        self.headers.push((name, value.into()));
        self
    }

    pub fn answer(self) -> Answer {
        let body = serde_json::json!({
            "errors": [{"code": self.code, "message": self.message, "detail": null}],
        });
        let mut answer = json(self.status, &body);
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
    if status != StatusCode::NO_CONTENT {
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

/// Values that a header cannot hold are left out.
pub(crate) fn set(answer: &mut Answer, name: &'static str, value: &str) {
    if let Ok(value) = http::HeaderValue::from_str(value) {
        answer.headers_mut().insert(http::HeaderName::from_static(name), value);
    }
}
