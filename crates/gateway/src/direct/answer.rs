//! An answer written in HTTP/1.1: the head, and what is there of the body already, in one go.

use crate::reply::ReplyBody;
use crate::wire::Wire;
use bytes::{Buf, Bytes};
use http::header::{CONNECTION, CONTENT_LENGTH, DATE, TRANSFER_ENCODING};
use http::{HeaderMap, Response, StatusCode};
use http_body::Body;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::task::Poll;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::AsyncWrite;

/// Pieces of a body up to this size are copied to where the head is.
const COPY: usize = 4 << 10;

thread_local! {
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// The second that the text is of.
    static NOW: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

/// How the client finds the end of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    None,
    /// Bytes that are still to come.
    Left(u64),
    Chunked,
}

/// Writes all of it. `bare` says that the client asked for the head only. An error leaves the connection useless.
pub async fn write<S: AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    response: Response<ReplyBody>,
    bare: bool,
    close: bool,
) -> io::Result<()> {
    let (parts, mut body) = response.into_parts();
    let bare = bare || parts.status == StatusCode::NOT_MODIFIED;
    let mut length = match body.size_hint().exact() {
        _ if bare || parts.status == StatusCode::NO_CONTENT => Length::None,
        Some(length) => Length::Left(length),
        None => Length::Chunked,
    };
    let mut out = ROOM.take();
    out.clear();
    head(&mut out, parts.status, &parts.headers, length, bare, close);
    while length != Length::None && length != Length::Left(0) {
        let frame = match poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx))).await {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                flush(wire, &mut out, &mut Bytes::new()).await?;
                poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
            }
        };
        let frame = match frame {
            None => break,
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                // What came counts; that it is not all shows when the connection ends.
                flush(wire, &mut out, &mut Bytes::new()).await?;
                return Err(error);
            }
        };
        // Trailers are for who asked for them; hyper serves those.
        let Ok(mut data) = frame.into_data() else { continue };
        if data.is_empty() {
            continue;
        }
        match &mut length {
            Length::None => {}
            Length::Left(left) => {
                let rest = left.checked_sub(data.len() as u64);
                *left = rest.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            }
            Length::Chunked => write!(out, "{:x}\r\n", data.len())?,
        }
        if data.len() <= COPY {
            out.extend_from_slice(&data);
        } else {
            flush(wire, &mut out, &mut data).await?;
        }
        if length == Length::Chunked {
            out.extend_from_slice(b"\r\n");
        }
        if out.len() > COPY {
            flush(wire, &mut out, &mut Bytes::new()).await?;
        }
    }
    match length {
        Length::Chunked => out.extend_from_slice(b"0\r\n\r\n"),
        Length::Left(1..) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Length::Left(0) | Length::None => {}
    }
    flush(wire, &mut out, &mut Bytes::new()).await?;
    ROOM.set(out);
    Ok(())
}

/// What frames the answer is the gateway's own, whatever the headers say.
fn head(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap, length: Length, bare: bool, close: bool) {
    if status == StatusCode::OK {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    } else {
        out.extend_from_slice(b"HTTP/1.1 ");
        out.extend_from_slice(status.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(status.canonical_reason().unwrap_or("Unknown").as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    for (name, value) in headers {
        // Without a body its length is only told, not counted on.
        if matches!(*name, TRANSFER_ENCODING | CONNECTION) || (*name == CONTENT_LENGTH && !bare) {
            continue;
        }
        line(out, name.as_str(), value.as_bytes());
    }
    if !headers.contains_key(DATE) {
        date(|text| line(out, "date", text));
    }
    match length {
        Length::Left(length) => {
            let mut room = [0; 20];
            line(out, "content-length", decimal(length, &mut room));
        }
        Length::Chunked => line(out, "transfer-encoding", b"chunked"),
        Length::None => {}
    }
    if close {
        line(out, "connection", b"close");
    }
    out.extend_from_slice(b"\r\n");
}

fn line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// A number's digits, at the end of `room`.
pub fn decimal(mut number: u64, room: &mut [u8; 20]) -> &[u8] {
    let mut first = room.len();
    for digit in room.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        first -= 1;
        if number == 0 {
            break;
        }
    }
    room.get(first..).unwrap_or_default()
}

/// The time as RFC 9110, section 5.6.7, writes it; made once a second.
fn date(put: impl FnOnce(&[u8])) {
    let now = SystemTime::now();
    let second = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    NOW.with_borrow_mut(|(known, text)| {
        if *known != second {
            *known = second;
            *text = httpdate::fmt_http_date(now);
        }
        put(text.as_bytes());
    });
}

/// Writes `out`, then `more`; both are empty afterwards.
async fn flush<S: AsyncWrite + Unpin>(wire: &mut Wire<S>, out: &mut Vec<u8>, more: &mut Bytes) -> io::Result<()> {
    let mut done = 0;
    loop {
        let rest = out.get(done..).unwrap_or_default();
        if rest.is_empty() && more.is_empty() {
            break;
        }
        let count = poll_fn(|cx| {
            let wire = Pin::new(&mut *wire);
            match more.is_empty() {
                true => wire.poll_write(cx, rest),
                false => wire.poll_write_vectored(cx, &[IoSlice::new(rest), IoSlice::new(more)]),
            }
        });
        let count = count.await?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let head = count.min(rest.len());
        done += head;
        more.advance((count - head).min(more.len()));
    }
    out.clear();
    poll_fn(|cx| Pin::new(&mut *wire).poll_flush(cx)).await
}

#[cfg(test)]
mod tests {
    use super::decimal;

    #[test]
    fn numbers_have_all_their_digits() {
        for number in [0, 9, 10, 1234, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
