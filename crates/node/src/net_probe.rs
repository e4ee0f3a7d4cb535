//! The network side of probes and hooks: HTTP, TCP and gRPC from the agent's own network namespace, which is the router
//! of all pods. What answers is a tenant's: answers are bounded and nothing of them is trusted.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::rustls;

const REDIRECTS: usize = 10;
const BODY_LIMIT: usize = 10 << 10;
pub(crate) const USER_AGENT: &str = "kube-probe/1.33";

/// A GET to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HttpGet {
    pub tls: bool,
    pub host: String,
    pub port: u16,
    /// With its query.
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl HttpGet {
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}{}", self.host, self.port, self.path)
    }
}

fn dial_error(what: &str, host: &str, port: u16, error: &std::io::Error) -> String {
    let text = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        std::io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        _ => error.to_string(),
    };
    format!("{what}dial tcp {host}:{port}: {text}")
}

/// Succeeds if the port accepts.
pub(crate) async fn tcp(host: &str, port: u16) -> Result<(), String> {
    TcpStream::connect((host, port)).await.map(drop).map_err(|e| dial_error("", host, port, &e))
}

/// Succeeds with a status from 200 to 399. Redirects are followed as long as they stay on the same host.
pub(crate) async fn http(get: &HttpGet) -> Result<(), String> {
    let mut at = get.clone();
    for _ in 0..REDIRECTS {
        let response = send_get(&at).await?;
        let status = response.status();
        if status.is_redirection() {
            let location = response.headers().get(http::header::LOCATION).and_then(|v| v.to_str().ok());
            match location.and_then(|l| follow(&at, l)) {
                Some(next) => {
                    at = next;
                    continue;
                }
                None => return Ok(()),
            }
        }
        if status >= StatusCode::OK && status < StatusCode::BAD_REQUEST {
            return Ok(());
        }
        return Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()));
    }
    Err(format!("Get \"{}\": stopped after {REDIRECTS} redirects", get.url()))
}

/// Where a redirect leads, if it is a relative one or to the same host.
fn follow(from: &HttpGet, location: &str) -> Option<HttpGet> {
    let uri: http::Uri = location.parse().ok()?;
    let mut next = from.clone();
    next.path = match uri.path_and_query().map(|p| p.as_str()).unwrap_or("/") {
        "" => "/".to_owned(),
        path => path.to_owned(),
    };
    if let Some(authority) = uri.authority() {
        if authority.host() != from.host {
            return None;
        }
        next.tls = uri.scheme_str() == Some("https");
        next.port = authority.port_u16().unwrap_or(if next.tls { 443 } else { 80 });
    } else if !location.starts_with('/') {
        return None;
    }
    Some(next)
}

async fn send_get(get: &HttpGet) -> Result<Response<Incoming>, String> {
    let what = format!("Get \"{}\": ", get.url());
    let stream = TcpStream::connect((get.host.as_str(), get.port))
        .await
        .map_err(|e| dial_error(&what, &get.host, get.port, &e))?;
    let own_host = get.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, v)| v.clone());
    let mut request = Request::get(&get.path)
        .header(http::header::HOST, own_host.unwrap_or_else(|| format!("{}:{}", get.host, get.port)));
    let given = |name: &str| get.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !given("user-agent") {
        request = request.header(http::header::USER_AGENT, USER_AGENT);
    }
    if !given("accept") {
        request = request.header(http::header::ACCEPT, "*/*");
    }
    for (name, value) in get.headers.iter().filter(|(n, v)| !n.eq_ignore_ascii_case("host") && !v.is_empty()) {
        request = request.header(name, value);
    }
    let request = request
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("{what}{e}"))?;
    let failed = |e: &dyn std::fmt::Display| format!("{what}{e}");
    if get.tls {
        let name = rustls::pki_types::ServerName::try_from(get.host.clone()).map_err(|e| failed(&e))?;
        let connector = tokio_rustls::TlsConnector::from(trusting()?);
        let stream = connector.connect(name, stream).await.map_err(|e| failed(&e))?;
        exchange(TokioIo::new(stream), request).await.map_err(|e| failed(&e))
    } else {
        exchange(TokioIo::new(stream), request).await.map_err(|e| failed(&e))
    }
}

async fn exchange<I>(io: I, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, hyper::Error>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::Builder::new().max_buf_size(64 << 10).handshake(io).await?;
    // Ends with the response, or with the sender when the probe times out.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    sender.send_request(request).await
}

/// Probes do not verify certificates: what a pod serves to itself is rarely signed for its address
/// (<https://kubernetes.io/docs/tasks/configure-pod-container/configure-liveness-readiness-startup-probes/#http-probes>).
fn trusting() -> Result<Arc<rustls::ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(TrustAnyone { provider: provider.clone() });
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct TrustAnyone {
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl rustls::client::danger::ServerCertVerifier for TrustAnyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// `grpc.health.v1.Health/Check` (<https://github.com/grpc/grpc/blob/master/doc/health-checking.md>).
pub(crate) async fn grpc(host: &str, port: u16, service: &str) -> Result<(), String> {
    let stream = TcpStream::connect((host, port)).await.map_err(|e| dial_error("", host, port, &e))?;
    let failed = |e: &dyn std::fmt::Display| format!("gRPC health check at {host}:{port}: {e}");
    let handshake = hyper::client::conn::http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| failed(&e))?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let request = Request::post(format!("http://{host}:{port}/grpc.health.v1.Health/Check"))
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .header(http::header::USER_AGENT, USER_AGENT)
        .body(Full::new(Bytes::from(grpc_request(service)?)))
        .map_err(|e| failed(&e))?;
    let response = sender.send_request(request).await.map_err(|e| failed(&e))?;
    if let Some(status) = response.headers().get("grpc-status").filter(|s| *s != "0") {
        return Err(grpc_status(status, service));
    }
    let body = Limited::new(response.into_body(), BODY_LIMIT).collect().await.map_err(|e| failed(&e))?;
    if let Some(status) = body.trailers().and_then(|t| t.get("grpc-status")).filter(|s| *s != "0") {
        return Err(grpc_status(status, service));
    }
    match serving_status(&body.to_bytes()) {
        Some(1) => Ok(()),
        Some(status) => {
            let word = match status {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "an unknown status",
            };
            Err(format!("service unhealthy (responded with \"{word}\")"))
        }
        None => Err(failed(&"the answer is not a HealthCheckResponse")),
    }
}

fn grpc_status(status: &http::HeaderValue, service: &str) -> String {
    match status.as_bytes() {
        b"12" => "this server does not implement the grpc health protocol (grpc.health.v1.Health)".into(),
        b"5" => format!("service \"{service}\" is not known to the health server"),
        other => format!("rpc failed with grpc-status {}", String::from_utf8_lossy(other)),
    }
}

/// A length-prefixed `HealthCheckRequest { string service = 1; }`.
fn grpc_request(service: &str) -> Result<Vec<u8>, String> {
    let length = u8::try_from(service.len()).ok().filter(|n| *n < 126).ok_or("grpc.service: longer than 125 bytes")?;
    let mut message = Vec::new();
    if length > 0 {
        message.extend([0x0a, length]);
        message.extend(service.as_bytes());
    }
    let mut framed = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap_or(0)];
    framed.extend(message);
    Ok(framed)
}

/// `HealthCheckResponse { ServingStatus status = 1; }`; an absent field is 0.
fn serving_status(framed: &[u8]) -> Option<u8> {
    let message = framed.get(5..)?;
    if framed.first() != Some(&0) {
        return None;
    }
    match message {
        [] => Some(0),
        [0x08, value, ..] if *value < 0x80 => Some(*value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn server(answers: Vec<&'static str>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let n = stream.read(&mut request).await.unwrap();
                assert!(String::from_utf8_lossy(&request[..n]).contains("user-agent: kube-probe/"));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        port
    }
    fn get(port: u16) -> HttpGet {
        HttpGet { tls: false, host: "127.0.0.1".into(), port, path: "/healthz?a=b".into(), headers: Vec::new() }
    }

    #[tokio::test]
    async fn http_answers() {
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let bad = "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";
        let here = "HTTP/1.1 302 Go\r\nlocation: /other\r\ncontent-length: 0\r\n\r\n";
        let away = "HTTP/1.1 302 Go\r\nlocation: http://example.invalid/\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(http(&get(server(vec![ok]).await)).await, Ok(()));
        assert_eq!(http(&get(server(vec![here, ok]).await)).await, Ok(()));
        assert_eq!(http(&get(server(vec![away]).await)).await, Ok(()));
        let error = http(&get(server(vec![bad]).await)).await.unwrap_err();
        assert_eq!(error, "HTTP probe failed with statuscode: 503");
        assert!(http(&get(server(vec!["garbage\r\n\r\n"]).await)).await.is_err());
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let error = http(&get(free)).await.unwrap_err();
        assert!(error.ends_with(&format!("dial tcp 127.0.0.1:{free}: connect: connection refused")), "{error}");
        assert!(tcp("127.0.0.1", free).await.is_err());
    }

    #[tokio::test]
    async fn tls_without_verification() {
        let made = rcgen::generate_simple_self_signed(vec!["elsewhere.example".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut request = vec![0; 4096];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 OK\r\n\r\n").await.unwrap();
            let _ = stream.shutdown().await;
        });
        assert_eq!(http(&HttpGet { tls: true, ..get(port) }).await, Ok(()));
    }

    #[tokio::test]
    async fn grpc_health() {
        async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let reply = Response::builder().header("content-type", "application/grpc");
            Ok(match body.get(7..).unwrap_or_default() {
                b"up" => reply.body(Full::new(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]))),
                b"down" => reply.body(Full::new(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 2]))),
                _ => reply.header("grpc-status", "5").body(Full::default()),
            }
            .unwrap())
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = hyper::service::service_fn(answer);
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        assert_eq!(grpc("127.0.0.1", port, "up").await, Ok(()));
        let error = grpc("127.0.0.1", port, "down").await.unwrap_err();
        assert_eq!(error, "service unhealthy (responded with \"NOT_SERVING\")");
        assert!(grpc("127.0.0.1", port, "other").await.unwrap_err().contains("not known"));
    }

    #[test]
    fn health_messages() {
        assert_eq!(grpc_request("").unwrap(), [0, 0, 0, 0, 0]);
        assert_eq!(grpc_request("ab").unwrap(), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(serving_status(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(serving_status(&[0, 0, 0, 0, 0]), Some(0));
        assert_eq!(serving_status(&[1, 0, 0, 0, 2, 8, 1]), None);
        assert_eq!(serving_status(&[0]), None);
        assert!(grpc_request(&"a".repeat(126)).is_err());
    }
}
