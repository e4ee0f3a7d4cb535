//! Where an HTTP/1.1 response body ends (RFC 9112, section 6), decoding chunks on the way. Bytes come from tenants'
//! servers: every length has a limit, and what contradicts itself is an error, never a guess.

use bytes::{Buf, Bytes, BytesMut};
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, COOKIE,
    HOST, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::io;

/// Bytes of a chunk-size line or of all trailers.
const MAX_LINE: usize = 4096;
const MAX_TRAILERS: usize = 32;

/// What is left of a body.
#[derive(Debug)]
pub enum Framing {
    /// This many bytes.
    Length(u64),
    Chunked(Chunks),
    /// Until the connection is closed.
    Close,
}

/// A chunked body's decoder.
#[derive(Debug)]
pub struct Chunks {
    state: State,
    /// Bytes of trailers so far.
    length: usize,
    trailers: HeaderMap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Size,
    Data(u64),
    /// The line end after a chunk's data.
    DataEnd,
    Trailers,
    Done,
}

impl Default for Chunks {
    fn default() -> Self {
        Chunks { state: State::Size, length: 0, trailers: HeaderMap::new() }
    }
}

impl Framing {
    pub fn is_done(&self) -> bool {
        match self {
            Framing::Length(left) => *left == 0,
            Framing::Chunked(chunks) => chunks.state == State::Done,
            Framing::Close => false,
        }
    }

    /// What came after a chunked body that is done.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match self {
            Framing::Chunked(chunks) if chunks.state == State::Done && !chunks.trailers.is_empty() => {
                Some(std::mem::take(&mut chunks.trailers))
            }
            _ => None,
        }
    }

    /// Takes the next piece of the body from what was read; `None` means more has to be read (or the body is done).
    pub fn take(&mut self, read: &mut BytesMut) -> io::Result<Option<Bytes>> {
        match self {
            Framing::Length(left) => {
                let now = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len());
                *left -= now as u64;
                Ok((now > 0).then(|| read.split_to(now).freeze()))
            }
            Framing::Chunked(chunks) => chunks.take(read),
            Framing::Close => Ok((!read.is_empty()).then(|| read.split().freeze())),
        }
    }
}

impl Chunks {
    fn take(&mut self, read: &mut BytesMut) -> io::Result<Option<Bytes>> {
        loop {
            match self.state {
                State::Size => {
                    let Some(line) = line(read)? else { return Ok(None) };
                    let size = size(&line)?;
                    self.state = if size == 0 { State::Trailers } else { State::Data(size) };
                }
                State::Data(left) => {
                    let now = usize::try_from(left).unwrap_or(usize::MAX).min(read.len());
                    if now == 0 {
                        return Ok(None);
                    }
                    let left = left - now as u64;
                    self.state = if left == 0 { State::DataEnd } else { State::Data(left) };
                    return Ok(Some(read.split_to(now).freeze()));
                }
                State::DataEnd => {
                    if read.len() < 2 {
                        return Ok(None);
                    }
                    if !read.starts_with(b"\r\n") {
                        return Err(invalid("no line end after a chunk"));
                    }
                    read.advance(2);
                    self.state = State::Size;
                }
                State::Trailers => {
                    let Some(line) = line(read)? else { return Ok(None) };
                    self.length += line.len() + 2;
                    if self.length > MAX_LINE || self.trailers.len() > MAX_TRAILERS {
                        return Err(invalid("trailers are too long"));
                    }
                    match trailer(&line)? {
                        None => self.state = State::Done,
                        Some((name, value)) if may_trail(&name) => drop(self.trailers.append(name, value)),
                        Some(_) => {}
                    }
                }
                State::Done => return Ok(None),
            }
        }
    }
}

/// A trailer line; `None` is the empty one at the end.
fn trailer(line: &[u8]) -> io::Result<Option<(HeaderName, HeaderValue)>> {
    if line.is_empty() {
        return Ok(None);
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or_else(|| invalid("a trailer without a colon"))?;
    let (name, value) = line.split_at_checked(colon).unwrap_or_default();
    let value = value.get(1..).unwrap_or_default().trim_ascii();
    let name = HeaderName::from_bytes(name).map_err(|_| invalid("a trailer's name is not valid"))?;
    let value = HeaderValue::from_bytes(value).map_err(|_| invalid("a trailer's value is not valid"))?;
    Ok(Some((name, value)))
}

/// Fields that frame, route, authenticate or describe the body mean nothing after it (RFC 9110, section 6.5.1).
pub fn may_trail(name: &HeaderName) -> bool {
    !matches!(
        *name,
        AUTHORIZATION
            | CACHE_CONTROL
            | CONNECTION
            | CONTENT_ENCODING
            | CONTENT_LENGTH
            | CONTENT_RANGE
            | CONTENT_TYPE
            | COOKIE
            | HOST
            | SET_COOKIE
            | TE
            | TRAILER
            | TRANSFER_ENCODING
            | UPGRADE
    )
}

/// A line without its end, which must be CR LF.
fn line(read: &mut BytesMut) -> io::Result<Option<BytesMut>> {
    match read.iter().position(|byte| *byte == b'\n') {
        Some(end) if end >= 1 && read.get(end - 1) == Some(&b'\r') => {
            let mut line = read.split_to(end + 1);
            line.truncate(end - 1);
            Ok(Some(line))
        }
        Some(_) => Err(invalid("a line without CR LF in a chunked body")),
        None if read.len() > MAX_LINE => Err(invalid("a line too long in a chunked body")),
        None => Ok(None),
    }
}

fn size(line: &[u8]) -> io::Result<u64> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let after = line.get(digits..).unwrap_or_default();
    let bare = after.iter().find(|byte| !matches!(byte, b' ' | b'\t')).is_none_or(|byte| *byte == b';');
    if digits == 0 || digits > 15 || !bare {
        return Err(invalid("not a chunk size"));
    }
    let text = std::str::from_utf8(line.get(..digits).unwrap_or_default()).unwrap_or_default();
    u64::from_str_radix(text, 16).map_err(|_| invalid("not a chunk size"))
}

pub fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes input that arrives in pieces.
    fn decode(pieces: &[&[u8]]) -> io::Result<(Vec<u8>, bool, usize)> {
        let mut framing = Framing::Chunked(Chunks::default());
        let (mut read, mut body) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            read.extend_from_slice(piece);
            while let Some(bytes) = framing.take(&mut read)? {
                body.extend_from_slice(&bytes);
            }
        }
        Ok((body, framing.is_done(), read.len()))
    }

    #[test]
    fn chunks_extensions_and_trailers() {
        let text = b"5;a=b\r\nhello\r\nA \r\n, wonderfu\r\n0\r\nX: y\r\n\r\nHTTP";
        assert_eq!(decode(&[text]).unwrap(), (b"hello, wonderfu".to_vec(), true, 4));
        for bad in [
            &b"\r\n"[..],
            b"g\r\n",
            b"-1\r\n",
            b"0x5\r\nhello\r\n",
            b"5\nhello",
            b"5\r\nhelloX\r\n",
            b"1000000000000000\r\n",
            b"5 5\r\n",
        ] {
            assert!(decode(&[bad]).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        assert!(decode(&[&[b'1'; MAX_LINE + 1]]).is_err());
        for bad in [&b"0\r\nno colon\r\n\r\n"[..], b"0\r\na b: c\r\n\r\n", b"0\r\na: \x01\r\n\r\n"] {
            assert!(decode(&[bad]).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn trailers_are_kept_but_for_those_that_mean_nothing_there() {
        let mut framing = Framing::Chunked(Chunks::default());
        let mut read = BytesMut::from(&b"0\r\ngrpc-status:  0 \r\nContent-Length: 5\r\nX: y\r\n\r\n"[..]);
        assert!(framing.take(&mut read).unwrap().is_none() && framing.is_done());
        let trailers = framing.take_trailers().unwrap();
        assert_eq!(
            (trailers.len(), &trailers["grpc-status"], &trailers["x"]),
            (2, &"0".parse().unwrap(), &"y".parse().unwrap())
        );
        assert!(framing.take_trailers().is_none());
    }

    proptest! {
        #[test]
        fn however_it_is_cut_it_reads_the_same(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..20), 0..6),
            cuts in proptest::collection::vec(0usize..200, 0..6),
        ) {
            let mut text = Vec::new();
            for chunk in &chunks {
                text.extend(format!("{:x}\r\n", chunk.len()).bytes());
                text.extend(chunk);
                text.extend(b"\r\n");
            }
            text.extend(b"0\r\n\r\n");
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % text.len()).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(decode(&pieces).unwrap(), (chunks.concat(), true, 0));
        }
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&[&bytes]);
        }
    }
}
