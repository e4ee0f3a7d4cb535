//! One HTTP/1.1 exchange with an endpoint, spoken by hand so that it costs no task and no queue: the head is written,
//! the request's body pumped while the response's head is awaited, and the rest of both handed to [`UpstreamBody`].

use super::body::{Pump, UpstreamBody};
use super::endpoint::{Connection, Lease};
use super::framing::{Chunks, Framing, invalid};
use super::request_body::RequestBody;
use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use tokio::io::{AsyncReadExt, AsyncWrite};

/// Bytes and lines of a response's head.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 100;
/// Room made before each read.
const READ: usize = 8 << 10;
/// Interim responses before the final one.
const MAX_INTERIM: usize = 16;

/// What came of an exchange.
#[derive(Debug)]
pub struct Exchange {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: UpstreamBody,
}

/// Why there is no response, and what the endpoint may have seen of the request.
#[derive(Debug)]
pub struct Failure {
    pub error: io::Error,
    /// Not a byte of the request was taken.
    pub unsent: bool,
    /// Nothing came back; with a kept connection that was closed meanwhile, or a request that may be repeated, it can
    /// be sent again.
    pub silent: bool,
    /// It was the client's body that failed.
    pub client: bool,
    /// The body was not touched yet.
    pub body: Option<RequestBody>,
}

/// A response's head.
#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub version: Version,
    /// No more is said of the body than one length, of the connection at most that it stays.
    plain: bool,
}

/// Sends the head in `connection.out` and the body, and awaits the response's head. `body` is `None` when the request has
/// none; `chunked` says how it is framed.
pub async fn exchange(
    mut connection: Connection,
    lease: Lease,
    method: &Method,
    body: Option<RequestBody>,
    chunked: bool,
) -> Result<Exchange, Failure> {
    let mut written = 0;
    let sent = poll_fn(|cx| write_all(&mut connection, cx, &mut written)).await;
    if let Err(error) = sent {
        return Err(Failure { error, unsent: written == 0, silent: true, client: false, body });
    }
    let mut pump = body.map(|body| Pump::new(body, chunked));
    let mut interim = 0;
    let result = poll_fn(|cx| {
        if let Some(running) = &mut pump
            && let Poll::Ready(result) = running.poll(&mut connection.stream, cx)
        {
            // A server may answer and close without reading everything; its answer counts.
            match result {
                Ok(()) => pump = None,
                Err(error) if running.client_failed() => return Poll::Ready(Err(error)),
                Err(_) => running.give_up(),
            }
        }
        loop {
            match parse_head(&mut connection.read) {
                Err(error) => return Poll::Ready(Err(error)),
                Ok(Some(head)) if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS => {
                    interim += 1;
                    if interim > MAX_INTERIM {
                        return Poll::Ready(Err(invalid("too many interim responses")));
                    }
                    continue;
                }
                Ok(Some(head)) => return Poll::Ready(Ok(head)),
                Ok(None) if connection.read.len() > MAX_HEAD => {
                    return Poll::Ready(Err(invalid("the response's head is too long")));
                }
                Ok(None) => {}
            }
            match poll_read(&mut connection, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    })
    .await;
    match result {
        Ok(head) => {
            let failure = |error| Failure { error, unsent: false, silent: false, client: false, body: None };
            respond(head, connection, lease, method, pump).map_err(failure)
        }
        Err(error) => {
            let silent = connection.read.is_empty() && interim == 0;
            let client = pump.as_ref().is_some_and(Pump::client_failed);
            Err(Failure { error, unsent: false, silent, client, body: pump.and_then(Pump::untouched) })
        }
    }
}

fn respond(
    mut head: Head,
    connection: Connection,
    lease: Lease,
    method: &Method,
    pump: Option<Pump>,
) -> io::Result<Exchange> {
    let (framing, keep) = framing(&mut head, method)?;
    let (status, headers) = (head.status, head.headers);
    let keep = keep && status != StatusCode::SWITCHING_PROTOCOLS;
    Ok(Exchange { status, headers, body: UpstreamBody::new(connection, lease, framing, keep, pump) })
}

fn write_all(connection: &mut Connection, cx: &mut Context<'_>, written: &mut usize) -> Poll<io::Result<()>> {
    while let Some(rest) = connection.out.get(*written..).filter(|rest| !rest.is_empty()) {
        match Pin::new(&mut connection.stream).poll_write(cx, rest) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(count)) => *written += count,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(Ok(()))
}

/// Reads some bytes; 0 is the end.
pub(super) fn poll_read(connection: &mut Connection, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    connection.read.reserve(READ);
    pin!(connection.stream.read_buf(&mut connection.read)).poll(cx)
}

/// Takes a response's head from what was read; `None` if it is not there as a whole.
pub fn parse_head(read: &mut BytesMut) -> io::Result<Option<Head>> {
    if read.is_empty() {
        return Ok(None);
    }
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, read, &mut lines);
    let length = match parsed {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(invalid("the response's head is not HTTP/1.1")),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or_else(|| invalid("the response's status is not valid"))?;
    let version = if response.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let start = read.as_ptr() as usize;
    let mut lines = Vec::with_capacity(response.headers.len());
    let (mut lengths, mut others) = (0, 0);
    for line in response.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| invalid("a header's name is not valid"))?;
        match name {
            CONTENT_LENGTH => lengths += 1,
            CONNECTION if line.value.eq_ignore_ascii_case(b"keep-alive") => {}
            CONNECTION | TRANSFER_ENCODING => others += 1,
            _ => {}
        }
        lines.push((name, (line.value.as_ptr() as usize).wrapping_sub(start), line.value.len()));
    }
    let head = read.split_to(length).freeze();
    let mut headers = HeaderMap::with_capacity(lines.len());
    for (name, at, len) in lines {
        // Values are slices of the head, not copies. An empty value may point anywhere.
        let value = if len == 0 { Bytes::new() } else { head.slice(at..at + len) };
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| invalid("a header's value is not valid"))?;
        headers.append(name, value);
    }
    Ok(Some(Head { status, headers, version, plain: lengths == 1 && others == 0 }))
}

/// RFC 9112, section 6.3; takes the headers that only frame away.
fn framing(head: &mut Head, method: &Method) -> io::Result<(Framing, bool)> {
    let status = head.status;
    if head.plain && status == StatusCode::OK && *method != Method::HEAD && head.version == Version::HTTP_11 {
        let length = head.headers.get(CONTENT_LENGTH).and_then(content_length);
        let length = length.ok_or_else(|| invalid("Content-Length is not a number"))?;
        return Ok((Framing::Length(length), true));
    }
    let close = head.version != Version::HTTP_11 || has_token(&head.headers, &CONNECTION, "close");
    let coded = head.headers.contains_key(TRANSFER_ENCODING);
    if *method == Method::HEAD || status == StatusCode::NOT_MODIFIED {
        head.headers.remove(TRANSFER_ENCODING);
        return Ok((Framing::Length(0), !close));
    }
    if status == StatusCode::NO_CONTENT || status.is_informational() {
        head.headers.remove(TRANSFER_ENCODING);
        head.headers.remove(CONTENT_LENGTH);
        return Ok((Framing::Length(0), !close));
    }
    if coded {
        let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
        let plain = codings.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !plain || codings.next().is_some() || head.version != Version::HTTP_11 {
            return Err(invalid("the response has a transfer coding other than chunked"));
        }
        // Both lengths: the chunks count, and the connection is not trusted any further.
        let both = head.headers.remove(CONTENT_LENGTH).is_some();
        head.headers.remove(TRANSFER_ENCODING);
        return Ok((Framing::Chunked(Chunks::default()), !close && !both));
    }
    let mut lengths = head.headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok((Framing::Close, false)) };
    let length = content_length(first).ok_or_else(|| invalid("Content-Length is not a number"))?;
    if lengths.any(|other| content_length(other) != Some(length)) {
        return Err(invalid("Content-Length is given twice, differently"));
    }
    if head.headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
        head.headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok((Framing::Length(length), !close))
}

fn content_length(value: &HeaderValue) -> Option<u64> {
    let bytes = value.as_bytes();
    if bytes.is_empty() || bytes.len() > 18 || !bytes.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Whether a list header has this element, in any case.
pub fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let elements = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(','));
    elements.into_iter().any(|element| element.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str, method: Method) -> io::Result<(Head, Framing, bool)> {
        let mut bytes = BytesMut::from(text);
        let mut head = parse_head(&mut bytes)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (framing, keep) = framing(&mut head, &method)?;
        Ok((head, framing, keep))
    }

    #[test]
    fn bodies_are_framed_by_the_book() {
        let get = |text| read(text, Method::GET);
        assert!(matches!(get("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), Ok((_, Framing::Length(5), true))));
        assert!(matches!(get("HTTP/1.1 200\r\nConnection: Close\r\nContent-Length: 5\r\n\r\n"), Ok((_, _, false))));
        assert!(matches!(get("HTTP/1.1 200 OK\r\n\r\n"), Ok((_, Framing::Close, false))));
        assert!(matches!(get("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n"), Ok((_, Framing::Length(5), false))));
        assert!(matches!(get("HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n"), Ok((_, Framing::Length(0), true))));
        let both = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: Chunked\r\n\r\n";
        let (head, framing, keep) = get(both).unwrap();
        assert!(matches!(framing, Framing::Chunked(_)) && !keep && head.headers.is_empty());
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
        assert!(matches!(read(head, Method::HEAD), Ok((h, Framing::Length(0), true)) if h.headers.len() == 1));
        for bad in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
        ] {
            assert!(get(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&format!("HTTP/1.1 200 OK\r\n{}", String::from_utf8_lossy(&bytes)), Method::GET);
            let mut bytes = BytesMut::from(&bytes[..]);
            let _ = parse_head(&mut bytes);
        }
    }
}
