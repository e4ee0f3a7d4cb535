//! Answers in Lambda's form.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

pub type Answer = Response<Full<Bytes>>;

/// What is refused: status, AWS's name for it, and why.
#[derive(Debug)]
pub struct Refused {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
}

impl Refused {
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> Refused {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Refused { status, code, message: message.into() }
    }
    pub fn parameter(message: impl Into<String>) -> Refused {
        Refused::new(400, "InvalidParameterValueException", message)
    }
    pub fn not_found(name: &str) -> Refused {
        let message = format!("Function not found: {}", crate::functions::arn(name));
        Refused::new(404, "ResourceNotFoundException", message)
    }
    pub fn conflict(message: impl Into<String>) -> Refused {
        Refused::new(409, "ResourceConflictException", message)
    }
    pub fn service(message: impl Into<String>) -> Refused {
        Refused::new(500, "ServiceException", message)
    }
    pub fn into_answer(self) -> Answer {
        let kind = if self.status.is_client_error() { "User" } else { "Service" };
        let mut answer = with(self.status, &json!({"Type": kind, "Message": self.message, "message": self.message}));
        answer.headers_mut().insert("x-amzn-errortype", HeaderValue::from_static(self.code));
        answer
    }
}

impl From<api::Status> for Refused {
    fn from(status: api::Status) -> Refused {
        let (code, name) = match status.code() {
            404 => (404, "ResourceNotFoundException"),
            409 => (409, "ResourceConflictException"),
            400 | 403 | 422 => (400, "InvalidParameterValueException"),
            429 => (429, "TooManyRequestsException"),
            _ => (500, "ServiceException"),
        };
        Refused::new(code, name, status.to_string())
    }
}

pub fn with(status: StatusCode, body: &Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_string())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

pub fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::new()));
    *answer.status_mut() = status;
    answer
}
