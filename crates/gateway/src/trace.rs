//! W3C trace context: the gateway is a span of its own between client and endpoint
//! (https://www.w3.org/TR/trace-context/, sections 3.2 and 4.3).

use http::{HeaderMap, HeaderName};

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A trace that a request belongs to, and the gateway's span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    pub id: u128,
    span: u64,
    flags: u8,
}

impl Trace {
    /// The trace that the client names, with a span of the gateway's. A header that is not valid, or given twice, is none.
    pub fn read(headers: &HeaderMap, span: u64) -> Option<Trace> {
        let mut lines = headers.get_all(TRACEPARENT).iter();
        let (line, None) = (lines.next()?.to_str().ok()?, lines.next()) else { return None };
        let mut parts = line.split('-');
        let (version, id, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |text: &str, length: usize| {
            let fine = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            (text.len() == length && text.bytes().all(fine)).then_some(())
        };
        hex(version, 2).and(hex(id, 32)).and(hex(parent, 16)).and(hex(flags, 2))?;
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let (id, parent) = (u128::from_str_radix(id, 16).ok()?, u64::from_str_radix(parent, 16).ok()?);
        let flags = u8::from_str_radix(flags, 16).ok()?;
        // Of the flags only "sampled" is known.
        (id != 0 && parent != 0).then_some(Trace { id, span: span.max(1), flags: flags & 1 })
    }

    /// A trace that begins here.
    pub fn begin(id: u128, span: u64) -> Trace {
        Trace { id: id.max(1), span: span.max(1), flags: 0 }
    }

    /// The header for endpoints.
    pub fn header(self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.id, self.span, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(line: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, line.parse().ok()?);
        Trace::read(&headers, 7).map(Trace::header)
    }

    #[test]
    fn a_trace_goes_on_with_a_span_of_our_own() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let wanted = format!("00-{trace}-0000000000000007-01");
        assert_eq!(read(&format!("00-{trace}-b7ad6b7169203331-01")).as_ref(), Some(&wanted));
        assert_eq!(read(&format!("cc-{trace}-b7ad6b7169203331-03-what-the-future")).as_ref(), Some(&wanted));
        for bad in [
            format!("00-{trace}-b7ad6b7169203331-01-more"),
            format!("ff-{trace}-b7ad6b7169203331-01"),
            format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            format!("00-{trace}-0000000000000000-01"),
            format!("00-{}-b7ad6b7169203331-01", trace.to_uppercase()),
            "00-1-2-3".to_owned(),
        ] {
            assert_eq!(read(&bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn foreign_text_never_panics(text in "[0-9a-f-]{0,70}") {
            let _ = read(&text);
        }
    }
}
