//! A request's head, as long as it is a plain one.

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use std::mem::MaybeUninit;

/// Header lines; a head that has more is left to hyper.
const MAX_HEADERS: usize = 64;

pub struct Asked {
    pub parts: Parts,
    /// The client wants nothing further.
    pub close: bool,
}

/// Takes a request from what was read; `None`, and nothing is taken, unless it is there as a whole and as plain as can be:
/// origin form, HTTP/1.1, no body, nothing that is about the connection but whether it stays, at most `max_headers` lines.
pub fn parse(read: &mut BytesMut, max_headers: usize) -> Option<Asked> {
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut request, read, &mut lines);
    let Ok(httparse::Status::Complete(length)) = parsed else { return None };
    let (Some(1), Some(method), Some(path)) = (request.version, request.method, request.path) else { return None };
    let method = Method::from_bytes(method.as_bytes()).ok().filter(|method| *method != Method::CONNECT)?;
    if !path.starts_with('/') {
        return None;
    }
    let count = request.headers.len();
    if count > max_headers {
        return None;
    }
    let start = read.as_ptr() as usize;
    let head = Bytes::copy_from_slice(read.get(..length)?);
    // Values are slices of the head, not copies. An empty one may point anywhere.
    let part = |part: &[u8]| match (part.as_ptr() as usize).wrapping_sub(start) {
        at if !part.is_empty() && at.checked_add(part.len()).is_some_and(|end| end <= head.len()) => {
            head.slice(at..at + part.len())
        }
        _ => Bytes::new(),
    };
    let (mut close, mut headers) = (false, HeaderMap::with_capacity(count));
    for line in request.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).ok()?;
        match name {
            CONTENT_LENGTH | TRANSFER_ENCODING | UPGRADE | EXPECT | TE | TRAILER => return None,
            CONNECTION if line.value.eq_ignore_ascii_case(b"close") => close = true,
            CONNECTION if line.value.eq_ignore_ascii_case(b"keep-alive") => {}
            CONNECTION => return None,
            _ => {}
        }
        headers.append(name, HeaderValue::from_maybe_shared(part(line.value)).ok()?);
    }
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.uri = Uri::from_maybe_shared(part(path.as_bytes())).ok()?;
    parts.method = method;
    parts.headers = headers;
    bytes::Buf::advance(read, length);
    Some(Asked { parts, close })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_requests_one_after_the_other() {
        let mut read = BytesMut::from(
            "GET /a?b=c HTTP/1.1\r\nHost: x\r\nEmpty:\r\nConnection: Keep-Alive\r\n\r\nDELETE / HTTP/1.1\r\nConnection: close\r\n\r\nGE",
        );
        let first = parse(&mut read, 100).unwrap();
        assert_eq!((first.parts.method, first.close), (Method::GET, false));
        assert_eq!((first.parts.uri.path(), first.parts.uri.query()), ("/a", Some("b=c")));
        assert_eq!(
            (&first.parts.headers["host"], &first.parts.headers["empty"]),
            (&"x".parse().unwrap(), &"".parse().unwrap())
        );
        let second = parse(&mut read, 100).unwrap();
        assert_eq!((second.parts.method, second.close), (Method::DELETE, true));
        assert!(parse(&mut read, 100).is_none());
        assert_eq!(read, "GE");
    }

    #[test]
    fn what_is_not_plain_is_left_alone() {
        for text in [
            "GET / HTTP/1.0\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\n",
            "GET http://x/ HTTP/1.1\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\n\r\n",
            "CONNECT /x HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
            "GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
            "GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            "GET / HTTP/1.1\r\nConnection: close, x\r\n\r\n",
            "GET / HTTP/1.1\r\nTE: trailers\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ] {
            let mut read = BytesMut::from(text);
            assert!(parse(&mut read, 100).is_none(), "{text}");
            assert_eq!(read, text);
        }
        let mut read = BytesMut::from(format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(MAX_HEADERS + 1)).as_str());
        assert!(parse(&mut read, 100).is_none());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let text = format!("GET / HTTP/1.1\r\n{}\r\n\r\n", String::from_utf8_lossy(&bytes));
            let _ = parse(&mut BytesMut::from(text.as_str()), 100);
            let _ = parse(&mut BytesMut::from(&bytes[..]), 100);
        }
    }
}
