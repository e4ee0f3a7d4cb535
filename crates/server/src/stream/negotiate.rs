//! Which transport and which subprotocol a request asks for, and the answer that switches to it.

use super::Response;
use api::status::{Reason, Status};
use bytes::Bytes;
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{StatusCode, Version};
use http_body_util::Full;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const STREAM_PROTOCOL: &str = "x-stream-protocol-version";
const ACCEPTED_PROTOCOLS: &str = "x-accepted-stream-protocol-versions";
const WEBSOCKET_PROTOCOL: &str = "sec-websocket-protocol";
const SPDY: &str = "SPDY/3.1";
/// Names of subprotocols that one request may list.
const MAX_OFFERED: usize = 32;

/// A request to switch protocols.
#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    WebSocket { key: Vec<u8>, protocols: Vec<String> },
    Spdy { protocols: Vec<String> },
}

fn tokens(headers: &HeaderMap, name: impl http::header::AsHeaderName) -> Vec<String> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    let tokens = values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty());
    tokens.take(MAX_OFFERED).map(str::to_owned).collect()
}

fn lists(headers: &HeaderMap, name: impl http::header::AsHeaderName, wanted: &str) -> bool {
    tokens(headers, name).iter().any(|token| token.eq_ignore_ascii_case(wanted))
}

impl Offer {
    pub fn read(headers: &HeaderMap, version: Version) -> Result<Offer, Status> {
        if version != Version::HTTP_11 || !lists(headers, CONNECTION, "upgrade") {
            return Err(Status::bad_request("Upgrade request required"));
        }
        if lists(headers, UPGRADE, "websocket") {
            let key = headers.get("sec-websocket-key").map(|key| key.as_bytes().to_vec()).unwrap_or_default();
            if key.is_empty() || key.len() > 64 {
                return Err(Status::bad_request("Sec-WebSocket-Key must be 16 bytes in base64"));
            }
            if !lists(headers, "sec-websocket-version", "13") {
                return Err(Status::bad_request("Sec-WebSocket-Version must be 13"));
            }
            return Ok(Offer::WebSocket { key, protocols: tokens(headers, WEBSOCKET_PROTOCOL) });
        }
        if lists(headers, UPGRADE, SPDY) {
            return Ok(Offer::Spdy { protocols: tokens(headers, STREAM_PROTOCOL) });
        }
        Err(Status::bad_request(format!(
            "unable to upgrade: Upgrade is {:?}; websocket and {SPDY} are spoken here",
            tokens(headers, UPGRADE).join(", ")
        )))
    }

    /// The first subprotocol the client names that is among `known`; without a name `default`, if there is one.
    pub fn choose(&self, known: &[&'static str], default: Option<&'static str>) -> Result<&'static str, Box<Response>> {
        let (Offer::WebSocket { protocols, .. } | Offer::Spdy { protocols }) = self;
        if protocols.is_empty()
            && let Some(default) = default
        {
            return Ok(default);
        }
        let chosen = protocols.iter().find_map(|offered| known.iter().find(|name| **name == offered.as_str()));
        chosen.copied().ok_or_else(|| {
            let message = format!(
                "unable to upgrade: unable to negotiate protocol: client supports [{}], server accepts [{}]",
                protocols.join(" "),
                known.join(" ")
            );
            let mut response = refuse(&Status::new(Reason::Forbidden, message));
            for name in known {
                response.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
            }
            Box::new(response)
        })
    }

    /// `101 Switching Protocols`.
    pub fn accept(&self, protocol: &'static str) -> Response {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        let protocol_header = match self {
            Offer::WebSocket { key, .. } => {
                headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
                if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key)) {
                    headers.insert("sec-websocket-accept", accept);
                }
                WEBSOCKET_PROTOCOL
            }
            Offer::Spdy { .. } => {
                headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
                STREAM_PROTOCOL
            }
        };
        if !protocol.is_empty() {
            headers.insert(protocol_header, HeaderValue::from_static(protocol));
        }
        response
    }
}

/// A `Status` as a plain response.
pub fn refuse(status: &Status) -> Response {
    let mut response = Response::new(Full::new(Bytes::from(status.to_json().to_string())));
    *response.status_mut() = StatusCode::from_u16(status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn reads_what_clients_send() {
        let websocket = headers(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io, v4.channel.k8s.io"),
        ]);
        let offer = Offer::read(&websocket, Version::HTTP_11).expect("an offer");
        assert_eq!(offer.choose(&["v4.channel.k8s.io", "v5.channel.k8s.io"], None).ok(), Some("v5.channel.k8s.io"));
        let response = offer.accept("v5.channel.k8s.io");
        assert_eq!(response.status(), 101);
        assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let spdy = headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ]);
        let offer = Offer::read(&spdy, Version::HTTP_11).expect("an offer");
        assert_eq!(offer.choose(&["v4.channel.k8s.io"], Some("")).ok(), Some("v4.channel.k8s.io"));
    }

    #[test]
    fn refuses_the_rest() {
        for bad in [
            headers(&[]),
            headers(&[("connection", "close"), ("upgrade", "websocket")]),
            headers(&[("connection", "upgrade"), ("upgrade", "h2c")]),
            headers(&[("connection", "upgrade"), ("upgrade", "websocket")]),
            headers(&[("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "x")]),
        ] {
            assert_eq!(Offer::read(&bad, Version::HTTP_11).expect_err("refused").code(), 400);
        }
        let offer = Offer::Spdy { protocols: vec!["v9".into()] };
        let response = offer.choose(&["v4.channel.k8s.io"], Some("")).expect_err("unknown");
        assert_eq!(response.status(), 403);
        assert_eq!(response.headers()[ACCEPTED_PROTOCOLS], "v4.channel.k8s.io");
    }
}
