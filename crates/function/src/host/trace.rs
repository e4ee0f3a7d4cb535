//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>): a request comes to its instance as a span of the caller's
//! trace, or of a new one.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::hash::{BuildHasher, RandomState};

const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// Replaces `traceparent` by one that names the invocation as the parent of what the function does.
pub(crate) fn continue_in(headers: &mut HeaderMap) {
    let known = headers.get(PARENT).and_then(|value| value.to_str().ok()).and_then(trace_and_flags);
    let (trace, flags) = known.unwrap_or_else(|| {
        // What went with an unreadable parent means nothing.
        headers.remove(STATE);
        (format!("{:016x}{:016x}", identifier(), identifier()), "00".to_owned())
    });
    let value = format!("00-{trace}-{:016x}-{flags}", identifier());
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert(PARENT, value);
    }
}

/// Section 3.2: `version-trace-parent-flags` in lower-case hexadecimal; all zeros are invalid. A version above ours may go
/// on after the flags.
fn trace_and_flags(text: &str) -> Option<(String, String)> {
    let mut parts = text.split('-');
    let mut field = |length: usize| {
        let part = parts.next()?;
        let fine = part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        fine.then_some(part)
    };
    let (version, trace, parent, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    let zero = |part: &str| part.bytes().all(|b| b == b'0');
    let further = parts.next().is_some();
    let invalid = version == "ff" || zero(trace) || zero(parent) || (version == "00" && further);
    (!invalid).then(|| (trace.to_owned(), flags.to_owned()))
}

/// Never zero; unpredictable as far as the standard library's hash keys are.
fn identifier() -> u64 {
    RandomState::new().hash_one(clock::now_nanos()) | 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn continued(parent: &str) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(PARENT, HeaderValue::from_str(parent).unwrap());
        continue_in(&mut headers);
        headers.get(PARENT).unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn the_trace_stays_and_the_parent_is_new() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let out = continued(&format!("00-{trace}-00f067aa0ba902b7-01"));
        assert!(out.starts_with(&format!("00-{trace}-")) && out.ends_with("-01") && !out.contains("00f067aa0ba902b7"));
        let later = continued(&format!("01-{trace}-00f067aa0ba902b7-01-what-ever"));
        assert!(later.starts_with(&format!("00-{trace}-")));
        for bad in [
            format!("00-{trace}-0000000000000000-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("ff-{trace}-00f067aa0ba902b7-01"),
            format!("00-{trace}-00f067aa0ba902b7-01-more"),
            format!("00-{}-00f067aa0ba902b7-01", trace.to_uppercase()),
        ] {
            assert!(!continued(&bad).contains(trace), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_in_a_valid_one_goes_out(text in "[ -~]{0,80}") {
            prop_assert!(trace_and_flags(&continued(&text)).is_some());
        }
    }
}
