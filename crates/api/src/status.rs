//! `Status`: the one error type of the API, as Kubernetes writes it
//! (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/>).

use serde_json::{Value, json};

pub type StatusResult<T> = Result<T, Status>;

/// An answer about what may not exist.
pub trait Found<T> {
    /// `None` where it does not.
    fn found(self) -> StatusResult<Option<T>>;
}

impl<T> Found<T> for StatusResult<T> {
    fn found(self) -> StatusResult<Option<T>> {
        match self {
            Err(status) if status.is_not_found() => Ok(None),
            other => other.map(Some),
        }
    }
}

/// Machine-readable reason; decides the HTTP code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    NotAcceptable,
    AlreadyExists,
    Conflict,
    Expired,
    RequestEntityTooLarge,
    UnsupportedMediaType,
    Invalid,
    TooManyRequests,
    InternalError,
    ServiceUnavailable,
    Timeout,
}

impl Reason {
    pub fn code(self) -> u16 {
        match self {
            Reason::BadRequest => 400,
            Reason::Unauthorized => 401,
            Reason::Forbidden => 403,
            Reason::NotFound => 404,
            Reason::MethodNotAllowed => 405,
            Reason::NotAcceptable => 406,
            Reason::AlreadyExists | Reason::Conflict => 409,
            Reason::Expired => 410,
            Reason::RequestEntityTooLarge => 413,
            Reason::UnsupportedMediaType => 415,
            Reason::Invalid => 422,
            Reason::TooManyRequests => 429,
            Reason::InternalError => 500,
            Reason::ServiceUnavailable => 503,
            Reason::Timeout => 504,
        }
    }
    /// The wire name: the variant's own name.
    pub fn name(self) -> String {
        format!("{self:?}")
    }
}

/// One cause of an `Invalid` or `Conflict` status: which field, what was wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// `FieldValueRequired`, `FieldValueInvalid`, `FieldValueNotSupported`, `FieldManagerConflict`, ...
    pub reason: String,
    pub message: String,
    /// Path of the field, `spec.containers[0].image`.
    pub field: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    pub reason: Reason,
    pub message: String,
    pub name: String,
    pub group: String,
    pub kind: String,
    pub uid: String,
    pub causes: Vec<Cause>,
    pub retry_after_seconds: Option<u32>,
}

impl Status {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Status {
            reason,
            message: message.into(),
            name: String::new(),
            group: String::new(),
            kind: String::new(),
            uid: String::new(),
            causes: Vec::new(),
            retry_after_seconds: None,
        }
    }
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Reason::BadRequest, message)
    }
    pub fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(Reason::InternalError, format!("Internal error occurred: {error}"))
    }
    /// `plural.group "name" not found`, as Kubernetes words it.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Self {
        Self::new(Reason::NotFound, format!("{} \"{name}\" not found", qualified(plural, group)))
            .about(group, plural, name)
    }
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Self {
        Self::new(Reason::AlreadyExists, format!("{} \"{name}\" already exists", qualified(plural, group)))
            .about(group, plural, name)
    }
    pub fn conflict(group: &str, plural: &str, name: &str, why: &str) -> Self {
        Self::new(
            Reason::Conflict,
            format!("Operation cannot be fulfilled on {} \"{name}\": {why}", qualified(plural, group)),
        )
        .about(group, plural, name)
    }
    /// `Kind.group "name" is invalid: field: message`, one cause each.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let list: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let text = if list.len() == 1 { list.concat() } else { format!("[{}]", list.join(", ")) };
        let mut status =
            Self::new(Reason::Invalid, format!("{} \"{name}\" is invalid: {text}", qualified(kind, group)))
                .about(group, kind, name);
        status.causes = causes;
        status
    }
    pub fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        (self.group, self.kind, self.name) = (group.to_owned(), kind.to_owned(), name.to_owned());
        self
    }
    pub fn is_not_found(&self) -> bool {
        self.reason == Reason::NotFound
    }
    pub fn is_conflict(&self) -> bool {
        self.reason == Reason::Conflict
    }
    pub fn code(&self) -> u16 {
        self.reason.code()
    }
    /// The wire form: a `v1` `Status` object.
    pub fn to_json(&self) -> Value {
        let causes: Vec<Value> =
            self.causes.iter().map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field})).collect();
        let mut details = serde_json::Map::new();
        for (key, value) in [("name", &self.name), ("group", &self.group), ("kind", &self.kind), ("uid", &self.uid)] {
            if !value.is_empty() {
                details.insert(key.into(), value.as_str().into());
            }
        }
        if !causes.is_empty() {
            details.insert("causes".into(), causes.into());
        }
        if let Some(seconds) = self.retry_after_seconds {
            details.insert("retryAfterSeconds".into(), seconds.into());
        }
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
               "message": self.message, "reason": self.reason.name(), "details": details, "code": self.code()})
    }
}

fn qualified(resource: &str, group: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}
