//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>): a request comes to its instance as a span of the caller's
//! trace, or of a new one.

use http::{HeaderMap, HeaderName, HeaderValue};
use spans::identifier;

pub(crate) const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");
/// Bytes of `tracestate` that go with a span; section 3.3.1.5.
const STATE_BYTES: usize = 512;
/// Section 3.2.2.5.1: who set it may have recorded the trace.
const SAMPLED: u8 = 1;

/// An invocation's place in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    pub id: u128,
    /// The invocation's own span.
    pub span: u64,
    /// The caller's.
    pub parent: Option<u64>,
    pub state: String,
    flags: u8,
}

impl Trace {
    /// Replaces `traceparent` by one that names the invocation as the parent of what the function does; `recorded` says
    /// that its span is.
    pub fn continue_in(headers: &mut HeaderMap, recorded: bool) -> Trace {
        let mut lines = headers.get_all(PARENT).iter();
        let known = match (lines.next().and_then(|line| line.to_str().ok()), lines.next()) {
            (Some(line), None) => read(line),
            _ => None,
        };
        let (id, parent, mut flags) = match known {
            Some((id, parent, flags)) => (id, Some(parent), flags),
            None => {
                // What went with an unreadable parent means nothing.
                headers.remove(STATE);
                (u128::from(identifier()) << 64 | u128::from(identifier()), None, 0)
            }
        };
        if recorded {
            flags |= SAMPLED;
        }
        let state = headers.get(STATE).and_then(|state| state.to_str().ok());
        let state = state.filter(|state| state.len() <= STATE_BYTES).unwrap_or_default().to_owned();
        let trace = Trace { id, span: identifier(), parent, state, flags };
        headers.insert(PARENT, trace.header());
        trace
    }

    /// `traceparent` of what the invocation asks for.
    pub fn header(&self) -> HeaderValue {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.id, self.span, self.flags);
        HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    pub fn sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }
}

/// Section 3.2: `version-trace-parent-flags` in lower-case hexadecimal; all zeros are invalid. A version above ours may go
/// on after the flags.
fn read(text: &str) -> Option<(u128, u64, u8)> {
    let mut parts = text.split('-');
    let mut field = |length: usize| {
        let part = parts.next()?;
        let fine = part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        fine.then_some(part)
    };
    let (version, trace, parent, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    let further = parts.next().is_some();
    let (trace, parent) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(parent, 16).ok()?);
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let invalid = version == "ff" || trace == 0 || parent == 0 || (version == "00" && further);
    (!invalid).then_some((trace, parent, flags))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn continued(parent: &str, recorded: bool) -> (Trace, String) {
        let mut headers = HeaderMap::new();
        headers.insert(PARENT, HeaderValue::from_str(parent).unwrap());
        headers.insert(STATE, HeaderValue::from_static("shop=1"));
        let trace = Trace::continue_in(&mut headers, recorded);
        (trace, headers.get(PARENT).unwrap().to_str().unwrap().to_owned())
    }

    #[test]
    fn the_trace_stays_and_the_parent_is_new() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let (own, out) = continued(&format!("00-{trace}-00f067aa0ba902b7-01"), false);
        assert_eq!((own.parent, own.state.as_str()), (Some(0x00f0_67aa_0ba9_02b7), "shop=1"));
        assert_eq!(out, format!("00-{trace}-{:016x}-01", own.span));
        let (_, later) = continued(&format!("01-{trace}-00f067aa0ba902b7-00-what-ever"), false);
        assert!(later.starts_with(&format!("00-{trace}-")) && later.ends_with("-00"));
        let (_, recorded) = continued(&format!("00-{trace}-00f067aa0ba902b7-00"), true);
        assert!(recorded.ends_with("-01"), "who comes next may record, too");
        for bad in [
            format!("00-{trace}-0000000000000000-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("ff-{trace}-00f067aa0ba902b7-01"),
            format!("00-{trace}-00f067aa0ba902b7-01-more"),
            format!("00-{}-00f067aa0ba902b7-01", trace.to_uppercase()),
        ] {
            let (own, out) = continued(&bad, false);
            assert!(!out.contains(trace) && own.parent.is_none() && own.state.is_empty(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_in_a_valid_one_goes_out(text in "[ -~]{0,80}") {
            prop_assert!(read(&continued(&text, true).1).is_some());
        }
    }
}
