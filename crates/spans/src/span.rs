//! What a span says.

use serde::{Deserialize, Serialize};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

/// One request at one place that served it (OpenTelemetry's kind `SERVER`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Span {
    pub trace: u128,
    pub id: u64,
    /// The caller's span.
    pub parent: Option<u64>,
    /// W3C `tracestate`, as it came.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub state: String,
    pub name: String,
    /// Unix nanoseconds.
    pub start: i64,
    pub end: i64,
    /// Why it failed.
    pub error: Option<String>,
    pub attributes: Vec<(String, Value)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    Flag(bool),
    Number(u64),
    Text(String),
}

/// What made a span: OpenTelemetry's resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    pub attributes: Vec<(&'static str, String)>,
}

/// A new trace's or span's: never zero, never the same twice in a process, and unpredictable as far as the standard
/// library's hash keys are.
pub fn identifier() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    thread_local! { static KEYS: RandomState = RandomState::new(); }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    KEYS.with(|keys| keys.hash_one((count, clock::now_nanos()))).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_differ() {
        let many: std::collections::BTreeSet<u64> = (0..10_000).map(|_| identifier()).collect();
        assert!(many.len() == 10_000 && !many.contains(&0));
    }

    #[test]
    fn spans_cross_processes() {
        let span = Span {
            trace: u128::MAX - 1,
            id: u64::MAX,
            parent: None,
            state: "a=b".into(),
            name: "GET".into(),
            start: 1,
            end: 2,
            error: Some("no".into()),
            attributes: vec![
                ("a".into(), Value::Flag(true)),
                ("b".into(), Value::Number(u64::MAX)),
                ("c".into(), Value::Text("7".into())),
            ],
        };
        let text = serde_json::to_string(&span).unwrap();
        assert_eq!(serde_json::from_str::<Span>(&text).unwrap(), span);
    }
}
