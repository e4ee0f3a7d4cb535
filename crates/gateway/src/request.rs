//! A request as it came in, checked once: whose it is, which path it means, and how it is written for an endpoint.

use crate::policy::Grant;
use crate::routing::{HeaderChanges, Seen};
use crate::trace::Trace;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use std::borrow::Cow;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Longest host name that is looked at.
const MAX_HOST: usize = 261;

/// Why a request is not carried any further: status and text.
pub type Refusal = (http::StatusCode, &'static str);

fn bad(why: &'static str) -> Refusal {
    (http::StatusCode::BAD_REQUEST, why)
}

/// Where a request goes.
#[derive(Debug)]
pub struct Place<'a> {
    /// As the client wrote it, with its port.
    pub authority: &'a str,
    /// Lower case, without port.
    pub host: Cow<'a, str>,
    /// With dot segments resolved.
    pub path: Cow<'a, str>,
    pub query: Option<&'a str>,
}

impl<'a> Place<'a> {
    /// Reads and checks; what is ambiguous is refused.
    pub fn of(parts: &'a Parts) -> Result<Place<'a>, Refusal> {
        if parts.method == Method::CONNECT {
            return Err((http::StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not served here"));
        }
        let authority = authority(parts)?;
        let name = crate::routing::split_port(authority).0;
        let name = name.strip_suffix('.').unwrap_or(name);
        let host = if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(name.to_ascii_lowercase())
        } else {
            Cow::Borrowed(name)
        };
        let path = match parts.uri.path() {
            "" => "/",
            path => path,
        };
        if !path.starts_with('/') {
            return Err(bad("the request's target is not a path"));
        }
        Ok(Place { authority, host, path: normalise(path), query: parts.uri.query() })
    }

    pub fn seen(&'a self, parts: &'a Parts) -> Seen<'a> {
        Seen { method: &parts.method, path: &self.path, query: self.query, headers: &parts.headers }
    }
}

/// The one host that the request names.
fn authority(parts: &Parts) -> Result<&str, Refusal> {
    let mut lines = parts.headers.get_all(HOST).iter();
    let line = lines.next().map(|value| value.to_str().map_err(|_| bad("Host is not valid"))).transpose()?;
    if lines.next().is_some() {
        return Err(bad("Host is given twice"));
    }
    let target = parts.uri.authority().map(|authority| authority.as_str());
    let host = match (target, line) {
        (Some(target), Some(line)) if parts.version == Version::HTTP_2 && !target.eq_ignore_ascii_case(line) => {
            return Err(bad("Host and :authority differ"));
        }
        (Some(target), _) => target,
        (None, Some(line)) => line,
        (None, None) if parts.version < Version::HTTP_11 => "",
        (None, None) => return Err(bad("Host is missing")),
    };
    let fine =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':' | b'[' | b']' | b'%');
    if host.len() > MAX_HOST || !host.bytes().all(fine) {
        return Err(bad("Host is not valid"));
    }
    Ok(host)
}

/// The path as RFC 3986, section 6.2.2, makes equal ones alike: escapes of unreserved characters are undone, `.` and `..`
/// segments resolved, so that a rule for `/public` cannot be walked out of and one for `/private` not walked around.
pub fn normalise(path: &str) -> Cow<'_, str> {
    let plain = if path.contains('%') { Cow::Owned(unescape(path)) } else { Cow::Borrowed(path) };
    if !plain.contains("/.") {
        return plain;
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = plain.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            _ => {
                kept.push(segment);
                continue;
            }
        }
        if last {
            kept.push("");
        }
    }
    Cow::Owned(format!("/{}", kept.join("/")))
}

/// Undoes escapes of unreserved characters; a `%` that escapes nothing is escaped itself.
fn unescape(path: &str) -> String {
    let mut plain = String::with_capacity(path.len() + 8);
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('%') {
        plain.push_str(before);
        let code = after.get(..2).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let byte = code.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = match (byte, code) {
            (Some(byte), _) if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') => {
                plain.push(char::from(byte));
                after.get(2..).unwrap_or_default()
            }
            (Some(_), Some(digits)) => {
                plain.push('%');
                plain.push_str(digits);
                after.get(2..).unwrap_or_default()
            }
            _ => {
                plain.push_str("%25");
                after
            }
        };
    }
    plain.push_str(rest);
    plain
}

/// Headers that concern one connection only, or that the gateway writes itself.
fn is_local(name: &HeaderName) -> bool {
    match *name {
        CONNECTION | TRANSFER_ENCODING | CONTENT_LENGTH | UPGRADE | TE | HOST | EXPECT | FORWARDED => true,
        PROXY_AUTHORIZATION => true,
        _ => matches!(
            name.as_str(),
            "keep-alive"
                | "proxy-connection"
                | "x-forwarded-for"
                | "x-forwarded-proto"
                | "x-forwarded-host"
                | "http2-settings"
                | "traceparent"
        ),
    }
}

/// Whether `Connection` names this header as one for this connection only.
fn is_named(connection: &HeaderMap, name: &HeaderName) -> bool {
    connection.contains_key(CONNECTION) && crate::upstream::has_token(connection, &CONNECTION, name.as_str())
}

/// How a request's body is sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    None,
    Exactly(u64),
    Chunked,
}

/// A request's head for an endpoint.
#[derive(Clone, Copy)]
pub struct Outgoing<'a> {
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub host: &'a [u8],
    /// The host that the client asked for.
    pub client_host: &'a str,
    /// Its address, as text.
    pub client: &'a str,
    /// The client came over TLS.
    pub secure: bool,
    pub trace: Option<Trace>,
    pub length: Length,
    /// Value of `Upgrade` if the client wants to switch protocols.
    pub upgrade: Option<&'a HeaderValue>,
}

impl Outgoing<'_> {
    /// Writes the head in HTTP/1.1.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(self.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.path.as_bytes());
        if let Some(query) = self.query {
            out.push(b'?');
            out.extend_from_slice(query.as_bytes());
        }
        out.extend_from_slice(b" HTTP/1.1\r\n");
        line(out, "host", self.host);
        let mut cookies = false;
        for (name, value) in self.headers {
            if is_local(name) || is_named(self.headers, name) {
                continue;
            }
            // HTTP/2 clients split cookies; over HTTP/1.1 they are one line (RFC 9113, 8.2.3).
            if *name == COOKIE {
                if !cookies {
                    cookies = true;
                    self.write_cookies(out);
                }
                continue;
            }
            line(out, name.as_str(), value.as_bytes());
        }
        self.write_forwarded(|name, value| line(out, name, value));
        match self.length {
            Length::None => {}
            Length::Exactly(length) => line(out, "content-length", length.to_string().as_bytes()),
            Length::Chunked => line(out, "transfer-encoding", b"chunked"),
        }
        if let Some(protocol) = self.upgrade {
            line(out, "connection", b"upgrade");
            line(out, "upgrade", protocol.as_bytes());
        } else if self.headers.contains_key(TE) && crate::upstream::has_token(self.headers, &TE, "trailers") {
            line(out, "te", b"trailers");
            line(out, "connection", b"te");
        }
        out.extend_from_slice(b"\r\n");
    }

    fn write_cookies(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"cookie: ");
        for (index, value) in self.headers.get_all(COOKIE).iter().enumerate() {
            if index > 0 {
                out.extend_from_slice(b"; ");
            }
            out.extend_from_slice(value.as_bytes());
        }
        out.extend_from_slice(b"\r\n");
    }

    /// Who asked, for what. What the client claimed itself is not believed: this is the edge.
    fn write_forwarded(&self, mut write: impl FnMut(&'static str, &[u8])) {
        let proto = if self.secure { "https" } else { "http" };
        let mut text = String::with_capacity(128);
        write("x-forwarded-for", self.client.as_bytes());
        write("x-forwarded-proto", proto.as_bytes());
        write("x-forwarded-host", self.client_host.as_bytes());
        // RFC 7239. Quoted, since ports and IPv6 addresses are no tokens; a host has neither quote nor backslash.
        let quotes = if self.client.contains(':') { ["for=\"[", "]\""] } else { ["for=", ""] };
        for part in [quotes[0], self.client, quotes[1], ";host=\"", self.client_host, "\";proto=", proto] {
            text.push_str(part);
        }
        write("forwarded", text.as_bytes());
        if let Some(trace) = self.trace {
            write("traceparent", trace.header().as_bytes());
        }
    }

    /// The headers for an HTTP/2 endpoint.
    pub fn http2_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(self.headers.len() + 4);
        for (name, value) in self.headers {
            if !(is_local(name) || is_named(self.headers, name)) {
                headers.append(name, value.clone());
            }
        }
        if crate::upstream::has_token(self.headers, &TE, "trailers") {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        self.write_forwarded(|name, value| {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                headers.insert(name, value);
            }
        });
        if let Length::Exactly(length) = self.length {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        headers
    }
}

fn line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Takes from a response what concerns the endpoint's connection only; `Content-Length` frames the body on both sides.
pub fn strip_response(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        for name in named.iter().filter(|name| **name != CONTENT_LENGTH) {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    let local = [TRANSFER_ENCODING, UPGRADE, TE, KEEP_ALIVE, PROXY_CONNECTION];
    // Hardly ever there: one look at all is cheaper than one for each.
    if headers.keys().any(|name| local.contains(name)) {
        for name in local {
            headers.remove(name);
        }
    }
}

/// Applies changes, copying the headers only if there are any.
pub fn changed<'a>(headers: &'a HeaderMap, changes: [&HeaderChanges; 2]) -> Cow<'a, HeaderMap> {
    if changes.iter().all(|changes| changes.is_empty()) {
        return Cow::Borrowed(headers);
    }
    let mut headers = headers.clone();
    for changes in changes {
        changes.apply(&mut headers);
    }
    Cow::Owned(headers)
}

/// Applies what a policy changes; it has the last word over what a route says.
pub fn granted<'a>(headers: Cow<'a, HeaderMap>, grant: &Grant) -> Cow<'a, HeaderMap> {
    if grant.is_empty() {
        return headers;
    }
    let mut headers = headers.into_owned();
    grant.apply(&mut headers);
    Cow::Owned(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn parts(request: http::request::Builder) -> Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn paths_cannot_be_walked_out_of() {
        for (path, wanted) in [
            ("/a/b", "/a/b"),
            ("/public/../admin", "/admin"),
            ("/public/%2e%2E/admin", "/admin"),
            ("/public/.%2e", "/"),
            ("/a/./b/.", "/a/b/"),
            ("/../../x", "/x"),
            ("/a/.b/..c", "/a/.b/..c"),
            ("/a//b", "/a//b"),
            ("/%70rivate/%7E", "/private/~"),
            ("/a%2Fb%20%zz%", "/a%2Fb%20%25zz%25"),
            ("/%252e%252e/a", "/%252e%252e/a"),
            ("/%%32e%%32e/a", "/%252e%252e/a"),
        ] {
            assert_eq!(normalise(path), wanted, "{path}");
        }
    }

    #[test]
    fn the_host_is_named_once() {
        let host = |request| Place::of(&parts(request)).map(|place| place.host.into_owned()).map_err(|e| e.1);
        assert_eq!(host(Request::get("/").header("host", "A.b:80")).unwrap(), "a.b");
        assert_eq!(host(Request::get("http://c.d/").header("host", "a.b")).unwrap(), "c.d");
        assert_eq!(host(Request::get("/").version(Version::HTTP_10)).unwrap(), "");
        assert!(host(Request::get("/")).is_err());
        assert!(host(Request::get("/").header("host", "a").header("host", "a")).is_err());
        assert!(host(Request::get("/").header("host", "a/b")).is_err());
        assert!(host(Request::get("http://c.d/").version(Version::HTTP_2).header("host", "a.b")).is_err());
    }

    #[test]
    fn heads_are_written_without_what_is_local() {
        let parts = parts(
            Request::post("/x?q=1")
                .header("host", "a.b")
                .header("connection", "keep-alive, X-Secret")
                .header("x-secret", "1")
                .header("transfer-encoding", "chunked")
                .header("x-forwarded-for", "6.6.6.6")
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .header("accept", "*/*"),
        );
        let place = Place::of(&parts).unwrap();
        let outgoing = Outgoing {
            method: &parts.method,
            headers: &parts.headers,
            path: &place.path,
            query: place.query,
            host: b"a.b",
            client_host: place.authority,
            client: "10.0.0.1",
            secure: false,
            trace: None,
            length: Length::Chunked,
            upgrade: None,
        };
        let mut out = Vec::new();
        outgoing.write(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "POST /x?q=1 HTTP/1.1\r\nhost: a.b\r\ncookie: a=1; b=2\r\naccept: */*\r\nx-forwarded-for: 10.0.0.1\r\n\
             x-forwarded-proto: http\r\nx-forwarded-host: a.b\r\n\
             forwarded: for=10.0.0.1;host=\"a.b\";proto=http\r\ntransfer-encoding: chunked\r\n\r\n"
        );
    }

    proptest! {
        #[test]
        fn normalised_paths_stay_normal(path in "(/(\\.|%2[eE]|a|b%)*){1,6}") {
            let once = normalise(&path).into_owned();
            prop_assert!(once.starts_with('/'));
            let dots = |s: &str| matches!(s.replace("%2e", ".").replace("%2E", ".").as_str(), "." | "..");
            prop_assert!(!once.split('/').any(dots), "{once}");
            prop_assert_eq!(normalise(&once).into_owned(), once);
        }
    }
}
