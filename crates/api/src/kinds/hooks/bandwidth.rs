//! The bandwidth annotations of pods and of what pods are made from.

use super::field::{Problems, at};
use crate::bandwidth::{self, EGRESS, INGRESS};
use serde_json::Value;

/// Checks the annotations at `path`. What `old` has too has been taken before, and stays.
pub fn validate(p: &mut Problems, path: &str, annotations: &Value, old: &Value) {
    for key in [INGRESS, EGRESS] {
        if let Some(text) = at(annotations, key).as_str()
            && at(old, key).as_str() != Some(text)
            && let Err(detail) = bandwidth::parse(text)
        {
            p.invalid_text(&format!("{path}[{key}]"), text, &detail);
        }
    }
}
