//! Answers made smaller on their way (RFC 9110, section 8.4), where a policy asks for it and the client takes it.
//!
//! Only whole texts whose length nobody else relies on: no ranges, no digests, no streams of events, no gRPC, nothing that
//! is encoded already or says `no-transform`.

use crate::counters::Counters;
use crate::reply::ReplyBody;
use bytes::Bytes;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    VARY,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use http_body::{Body, Frame};
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};

/// Answers that are compressed at a time; each costs up to half a megabyte. Further ones go as they are.
const MOST: u64 = 256;
/// Bytes that go into an encoder before others have a turn.
const STEP: usize = 64 << 10;
const GZIP_LEVEL: u32 = 4;
const ZSTD_LEVEL: i32 = 1;
/// How far back the encoder looks, as a power of two: what it holds in memory.
const ZSTD_WINDOW: u32 = 18;

const DEFAULT_TYPES: [&str; 12] = [
    "text/html",
    "text/plain",
    "text/css",
    "text/csv",
    "text/xml",
    "text/javascript",
    "application/javascript",
    "application/json",
    "application/problem+json",
    "application/xml",
    "application/wasm",
    "image/svg+xml",
];
const DEFAULT_MIN: u64 = 1024;

/// What a policy asks for.
#[derive(Debug)]
pub struct Compression {
    /// Media types in lower case, without parameters.
    types: Vec<String>,
    min: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Zstd,
    Gzip,
}

impl Compression {
    pub fn new(types: &[String], min: Option<u64>) -> Compression {
        let types = match types {
            [] => DEFAULT_TYPES.map(str::to_owned).into(),
            types => types.iter().map(|name| name.to_ascii_lowercase()).collect(),
        };
        Compression { types, min: min.unwrap_or(DEFAULT_MIN) }
    }

    /// Whether an answer like this is compressed for those who take it.
    fn covers(&self, response: &Response<ReplyBody>) -> bool {
        let (status, headers) = (response.status(), response.headers());
        let whole = !status.is_informational()
            && !matches!(
                status,
                StatusCode::NO_CONTENT
                    | StatusCode::RESET_CONTENT
                    | StatusCode::PARTIAL_CONTENT
                    | StatusCode::NOT_MODIFIED
            );
        let rules_out = |name: &HeaderName| {
            headers.get_all(name).iter().any(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
        };
        let relied_on = ["digest", "content-digest", "repr-digest", "content-md5"];
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        whole
            && !matches!(response.body(), ReplyBody::Text(_))
            && !rules_out(&CONTENT_ENCODING)
            && !headers.contains_key(CONTENT_RANGE)
            && !relied_on.iter().any(|name| headers.contains_key(*name))
            && !crate::upstream::has_token(headers, &CACHE_CONTROL, "no-transform")
            && length.is_none_or(|length| length >= self.min)
            && self.has_type(headers)
    }

    fn has_type(&self, headers: &HeaderMap) -> bool {
        let Some(text) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
        let media = text.split(';').next().unwrap_or_default().trim();
        // Events have to arrive when they happen, whatever a policy says.
        !media.eq_ignore_ascii_case("text/event-stream")
            && self.types.iter().any(|wanted| match wanted.strip_suffix('*') {
                Some(start) => media.get(..start.len()).is_some_and(|first| first.eq_ignore_ascii_case(start)),
                None => media.eq_ignore_ascii_case(wanted),
            })
    }

    /// Compresses the answer if that is asked for, and says what it depends on.
    pub fn apply(
        &self,
        asked: &Parts,
        mut response: Response<ReplyBody>,
        counters: &Arc<Counters>,
    ) -> Response<ReplyBody> {
        let taken = coding(&asked.headers);
        if response.status() == StatusCode::NOT_MODIFIED {
            // It is about what the client was sent, which was weak if it was compressed (RFC 9110, section 8.8.1).
            if taken.is_some() {
                weaken(response.headers_mut());
            }
            return response;
        }
        if !self.covers(&response) {
            return response;
        }
        vary(response.headers_mut());
        let Some(coding) = taken.filter(|_| asked.method != Method::HEAD) else { return response };
        let Some(place) = Place::take(counters) else { return response };
        let encoder = match Encoder::new(coding) {
            Ok(encoder) => encoder,
            Err(error) => {
                tracing::debug!("an answer goes as it is: {error}");
                return response;
            }
        };
        Counters::add(&counters.compressed_total);
        let headers = response.headers_mut();
        headers.remove(CONTENT_LENGTH);
        headers.remove(ACCEPT_RANGES);
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
        weaken(headers);
        response.map(|body| {
            let state = State { body, encoder: Some(encoder), dirty: false, last: None, _place: place };
            ReplyBody::Compressed(Box::new(Compressed(state)))
        })
    }
}

/// An entity tag says "byte for byte the same" no longer.
fn weaken(headers: &mut HeaderMap) {
    let Some(tag) = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/")) else { return };
    if let Ok(weak) = HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()) {
        headers.insert(ETAG, weak);
    }
}

fn vary(headers: &mut HeaderMap) {
    let known = |name: &str| crate::upstream::has_token(headers, &VARY, name);
    if !known("*") && !known("accept-encoding") {
        headers.append(VARY, HeaderValue::from_static("accept-encoding"));
    }
}

impl Coding {
    fn name(self) -> &'static str {
        match self {
            Coding::Zstd => "zstd",
            Coding::Gzip => "gzip",
        }
    }
}

/// The coding that the client likes best; `None` if it wants none of them, or rather none (RFC 9110, section 12.5.3).
fn coding(headers: &HeaderMap) -> Option<Coding> {
    let (mut gzip, mut zstd, mut identity, mut any) = (None, None, None, None);
    for value in headers.get_all(ACCEPT_ENCODING) {
        for element in value.to_str().ok()?.split(',') {
            let mut parts = element.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
            let weight = weight.map_or(Some(1000), thousandths)?;
            let place = match name.to_ascii_lowercase().as_str() {
                "gzip" | "x-gzip" => &mut gzip,
                "zstd" => &mut zstd,
                "identity" => &mut identity,
                "*" => &mut any,
                _ => continue,
            };
            place.get_or_insert(weight);
        }
    }
    let weight = |named: Option<u16>| named.or(any).unwrap_or(0);
    let best = if weight(zstd) >= weight(gzip) { (Coding::Zstd, weight(zstd)) } else { (Coding::Gzip, weight(gzip)) };
    // What is not named is as good as the least that is.
    (best.1 > 0 && best.1 >= identity.unwrap_or(0)).then_some(best.0)
}

/// A quality value in thousandths (RFC 9110, section 12.4.2).
fn thousandths(text: &str) -> Option<u16> {
    let (whole, rest) = text.split_once('.').unwrap_or((text, ""));
    if rest.len() > 3 || !rest.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let rest = format!("{rest:0<3}").parse::<u16>().ok()?;
    match (whole, rest) {
        ("0", rest) => Some(rest),
        ("1", 0) => Some(1000),
        _ => None,
    }
}

/// One of the encoders that there may be.
#[derive(Debug)]
struct Place(Arc<Counters>);

impl Place {
    fn take(counters: &Arc<Counters>) -> Option<Place> {
        let gauge = &counters.compressions_active;
        gauge.fetch_update(Relaxed, Relaxed, |active| (active < MOST).then(|| active + 1)).ok()?;
        Some(Place(counters.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.compressions_active.fetch_sub(1, Relaxed);
    }
}

enum Encoder {
    Gzip(GzEncoder<Vec<u8>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
}

impl Encoder {
    fn new(coding: Coding) -> io::Result<Encoder> {
        Ok(match coding {
            Coding::Gzip => Encoder::Gzip(GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL))),
            Coding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                encoder.window_log(ZSTD_WINDOW)?;
                Encoder::Zstd(encoder)
            }
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Encoder::Gzip(encoder) => encoder.write_all(bytes),
            Encoder::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Encoder::Gzip(encoder) => encoder.flush(),
            Encoder::Zstd(encoder) => encoder.flush(),
        }
    }

    /// What has come out so far.
    fn take(&mut self) -> Bytes {
        let out = match self {
            Encoder::Gzip(encoder) => encoder.get_mut(),
            Encoder::Zstd(encoder) => encoder.get_mut(),
        };
        std::mem::take(out).into()
    }

    fn finish(self) -> io::Result<Bytes> {
        Ok(match self {
            Encoder::Gzip(encoder) => encoder.finish()?,
            Encoder::Zstd(encoder) => encoder.finish()?,
        }
        .into())
    }
}

/// A body being compressed as it comes.
pub struct Compressed(State);

struct State {
    body: ReplyBody,
    /// `None` once all is out.
    encoder: Option<Encoder>,
    /// The encoder holds something back.
    dirty: bool,
    /// Trailers, which come last.
    last: Option<Frame<Bytes>>,
    _place: Place,
}

impl Compressed {
    pub fn inner(&mut self) -> &mut ReplyBody {
        &mut self.0.body
    }

    pub fn is_end_stream(&self) -> bool {
        self.0.encoder.is_none() && self.0.last.is_none()
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let State { body, encoder: slot, dirty, last, .. } = &mut self.0;
        let Some(encoder) = slot else { return Poll::Ready(last.take().map(Ok)) };
        let mut taken = 0;
        let result = loop {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        taken += data.len();
                        *dirty |= !data.is_empty();
                        if let Err(error) = encoder.write(&data) {
                            break Err(error);
                        }
                        let out = encoder.take();
                        if !out.is_empty() {
                            break Ok(out);
                        }
                        if taken > STEP {
                            cx.waker().wake_by_ref();
                            return Poll::Pending;
                        }
                    }
                    Err(trailers) => {
                        *last = Some(trailers);
                        break slot.take().map_or_else(|| Ok(Bytes::new()), Encoder::finish);
                    }
                },
                Poll::Ready(None) => break slot.take().map_or_else(|| Ok(Bytes::new()), Encoder::finish),
                Poll::Ready(Some(Err(error))) => break Err(error),
                Poll::Pending if *dirty => {
                    // Whoever speaks slowly is heard slowly, not at the end.
                    *dirty = false;
                    match encoder.flush().map(|()| encoder.take()) {
                        Ok(out) if out.is_empty() => return Poll::Pending,
                        result => break result,
                    }
                }
                Poll::Pending => return Poll::Pending,
            }
        };
        if result.is_err() {
            *slot = None;
            *last = None;
        }
        Poll::Ready(Some(result.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn accepts(text: &str) -> Option<Coding> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, text.parse().unwrap());
        coding(&headers)
    }

    #[test]
    fn what_the_client_likes_best() {
        use Coding::{Gzip, Zstd};
        for (text, wanted) in [
            ("gzip", Some(Gzip)),
            ("x-gzip;q=0.5", Some(Gzip)),
            ("GZIP ; Q=0.001", Some(Gzip)),
            ("deflate, gzip, br, zstd", Some(Zstd)),
            ("gzip;q=1.0, zstd;q=0.9", Some(Gzip)),
            ("*", Some(Zstd)),
            ("*, zstd;q=0", Some(Gzip)),
            ("gzip;q=0, *", Some(Zstd)),
            ("gzip;q=0", None),
            ("*;q=0", None),
            ("identity, gzip;q=0.5", None),
            ("identity;q=0, gzip;q=0.5", Some(Gzip)),
            ("identity;q=0", None),
            ("br", None),
            ("", None),
            ("gzip;q=2", None),
            ("gzip;q=0.1234", None),
        ] {
            assert_eq!(accepts(text), wanted, "{text}");
        }
        assert_eq!(coding(&HeaderMap::new()), None);
    }

    #[test]
    fn types_with_and_without_parameters() {
        let has = |types: &[&str], media: &str| {
            let types: Vec<String> = types.iter().map(|text| (*text).to_owned()).collect();
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, media.parse().unwrap());
            Compression::new(&types, None).has_type(&headers)
        };
        assert!(has(&[], "text/html; charset=utf-8") && has(&[], "Application/JSON"));
        assert!(!has(&[], "image/png") && !has(&[], "application/grpc") && !has(&[], ""));
        assert!(has(&["text/*"], "text/x") && !has(&["text/*"], "texts/x") && !has(&["text/*"], "text/event-stream"));
    }

    #[test]
    fn tags_become_weak_once() {
        let mut headers = HeaderMap::new();
        headers.insert(ETAG, "\"a\"".parse().unwrap());
        weaken(&mut headers);
        weaken(&mut headers);
        assert_eq!(headers[ETAG], "W/\"a\"");
    }

    proptest! {
        #[test]
        fn foreign_lists_never_panic(text in "[ -~]{0,60}") {
            let _ = accepts(&text);
        }
    }
}
