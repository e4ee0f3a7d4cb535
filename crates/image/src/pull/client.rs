//! The HTTP side of a pull: connections, redirects, tokens, time limits.

use super::auth::{Challenge, Credentials};
use super::{PullOptions, tls};
use crate::error::{Error, Result};
use crate::reference::DOCKER_HUB;
use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::cell::RefCell;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;

const REDIRECTS: usize = 5;
/// No byte for this long: the connection is given up and the download continued on another.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);
const TOKEN_LIMIT: u64 = 256 << 10;

pub(crate) struct Client {
    host: String,
    base: String,
    repository: String,
    /// What a token is asked for, unless the registry says.
    actions: &'static str,
    insecure: bool,
    credentials: Option<Credentials>,
    tls: Option<Arc<rustls::ClientConfig>>,
    silence: Duration,
    pub tries: u32,
    /// `Authorization` that the registry took, once asked for.
    authorization: RefCell<Option<HeaderValue>>,
}

pub(crate) type Answer = Response<Incoming>;
type Sent = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a request carries. Made anew when it has to be sent again.
#[derive(Clone)]
pub(crate) enum Payload {
    None,
    Bytes(Bytes),
    /// With its size, and how much of it has been taken.
    File(Arc<File>, u64, Arc<AtomicU64>),
}

impl Payload {
    fn body(&self) -> Sent {
        match self {
            Payload::None => Empty::new().map_err(|never| match never {}).boxed_unsync(),
            Payload::Bytes(bytes) => Full::new(bytes.clone()).map_err(|never| match never {}).boxed_unsync(),
            Payload::File(file, size, taken) => {
                taken.store(0, Ordering::Relaxed);
                FileBody { file: file.clone(), at: 0, size: *size, taken: taken.clone() }.boxed_unsync()
            }
        }
    }
}

/// A file from its beginning. Reads block; the runtime is this transfer's own.
struct FileBody {
    file: Arc<File>,
    at: u64,
    size: u64,
    taken: Arc<AtomicU64>,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let left = self.size - self.at;
        if left == 0 {
            return Poll::Ready(None);
        }
        let mut piece = vec![0u8; left.min(256 << 10) as usize];
        Poll::Ready(Some(match self.file.read_exact_at(&mut piece, self.at) {
            Ok(()) => {
                self.at += piece.len() as u64;
                self.taken.store(self.at, Ordering::Relaxed);
                Ok(Frame::data(piece.into()))
            }
            Err(e) => Err(e),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.at == self.size
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.size - self.at)
    }
}

impl Client {
    pub fn new(host: &str, repository: &str, options: &PullOptions, actions: &'static str) -> Result<Client> {
        let server = if host == DOCKER_HUB { "registry-1.docker.io" } else { host };
        let insecure = options.insecure_hosts.iter().any(|h| h == host) || is_loopback(server);
        let credentials = match &options.credentials {
            Some(given) => Some(given.clone()),
            None => super::auth::configured(options.docker_config.as_deref(), host)?,
        };
        let tls = if insecure { None } else { Some(tls::config(options.ca_certificates.as_deref(), host)?) };
        let scheme = if insecure { "http" } else { "https" };
        Ok(Client {
            host: host.to_owned(),
            base: format!("{scheme}://{server}/v2/{repository}/"),
            repository: repository.to_owned(),
            actions,
            insecure,
            credentials,
            tls,
            silence: options.silence.unwrap_or(SILENCE),
            tries: if options.tries == 0 { super::TRIES } else { options.tries },
            authorization: RefCell::new(None),
        })
    }

    /// For a URL that is no registry's: no credentials, TLS if it says so.
    pub fn for_url(uri: &Uri, options: &PullOptions) -> Result<Client> {
        let host = uri.authority().map(ToString::to_string).filter(|h| !h.contains('@'));
        let host = host.ok_or_else(|| Error::invalid(uri.to_string(), "a URL needs a host, and no user in it"))?;
        let insecure = uri.scheme_str() != Some("https");
        let tls = if insecure { None } else { Some(tls::config(options.ca_certificates.as_deref(), &host)?) };
        Ok(Client {
            host,
            base: String::new(),
            repository: String::new(),
            actions: "pull",
            insecure,
            credentials: None,
            tls,
            silence: options.silence.unwrap_or(SILENCE),
            tries: if options.tries == 0 { super::TRIES } else { options.tries },
            authorization: RefCell::new(None),
        })
    }

    /// GET of a URL, redirects followed.
    pub async fn download(&self, uri: &Uri, what: &str) -> Result<Answer> {
        let response = self.follow(&Method::GET, uri, &[], None, &Payload::None).await?;
        match response.status() {
            StatusCode::OK => Ok(response),
            status => Err(self.refusal(response, status, what).await),
        }
    }

    pub fn failed(&self, why: impl Into<String>) -> Error {
        Error::Registry { host: self.host.clone(), why: why.into() }
    }

    /// GET below the repository; only answers with content (200, 206) come back.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)], what: &str) -> Result<Answer> {
        let response = self.ask(Method::GET, path, headers, &Payload::None, what).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            status => Err(self.refusal(response, status, what).await),
        }
    }

    /// A request below the repository, or to a URL that the registry gave. Answers challenges; other refusals are the
    /// caller's to read.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        payload: &Payload,
        what: &str,
    ) -> Result<Answer> {
        let url = if path.contains("://") { path.to_owned() } else { format!("{}{path}", self.base) };
        let uri: Uri = url.parse().map_err(|_| self.failed(format!("{path:?} makes no URL")))?;
        let mut asked = false;
        loop {
            let authorization = self.authorization.borrow().clone().filter(|_| self.is_own(&uri));
            let response = self.follow(&method, &uri, headers, authorization, payload).await?;
            if response.status() != StatusCode::UNAUTHORIZED || asked || !self.is_own(&uri) {
                return Ok(response);
            }
            asked = true;
            let authorization = self.authorize(&response, what).await?;
            *self.authorization.borrow_mut() = Some(authorization);
        }
    }

    /// Credentials go to the registry's own host alone.
    fn is_own(&self, uri: &Uri) -> bool {
        let own = self.base.parse::<Uri>().ok();
        own.is_some_and(|own| own.authority() == uri.authority() && own.scheme() == uri.scheme())
    }

    /// Where an upload goes on: the `Location` of its answer as a full URL.
    pub fn location(&self, asked: &str, response: &Answer) -> Result<String> {
        let base: Uri = format!("{}{asked}", self.base).parse().map_err(|_| self.failed("a URL that is none"))?;
        let base = if asked.contains("://") { asked.parse().unwrap_or(base) } else { base };
        let given = header(response, "location").ok_or_else(|| self.failed("an upload without a Location"))?;
        let target = absolute(&base, &given).ok_or_else(|| self.failed("an upload's Location is no URL"))?;
        if base.scheme_str() == Some("https") && target.scheme_str() != Some("https") {
            return Err(self.failed("an upload may not go on from https to plain http"));
        }
        Ok(target.to_string())
    }

    pub async fn refusal(&self, response: Answer, status: StatusCode, what: &str) -> Error {
        let (host, what) = (self.host.clone(), what.to_owned());
        match status {
            StatusCode::NOT_FOUND => Error::RegistryNotFound { host, what },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Error::Unauthorized { host, what, status: status.as_u16() }
            }
            _ => {
                let said = self.small_body(response, 4096, "answer").await.unwrap_or_default();
                let said: String =
                    String::from_utf8_lossy(&said).chars().filter(|c| !c.is_control()).take(300).collect();
                // Too many requests, a timeout and the registry's own failures pass.
                if status.is_client_error() && ![408, 425, 429].contains(&status.as_u16()) {
                    return Error::Refused { host, what, status: status.as_u16(), said };
                }
                self.failed(format!("answered {status} to a request for {what}: {said}"))
            }
        }
    }

    /// One request with its redirects. Credentials do not travel to another host, nor anything from TLS to plain text.
    async fn follow(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &[(&str, &str)],
        authorization: Option<HeaderValue>,
        payload: &Payload,
    ) -> Result<Answer> {
        let mut uri = uri.clone();
        let mut authorization = authorization;
        for _ in 0..=REDIRECTS {
            let response = self.send(method, &uri, headers, authorization.as_ref(), payload).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
            let target =
                location.and_then(|l| absolute(&uri, l)).ok_or_else(|| self.failed("a redirect to nowhere"))?;
            if uri.scheme_str() == Some("https") && target.scheme_str() != Some("https") {
                return Err(self.failed("a redirect from https to plain http is not followed"));
            }
            if target.authority() != uri.authority() {
                authorization = None;
            }
            uri = target;
        }
        Err(self.failed(format!("more than {REDIRECTS} redirects")))
    }

    async fn send(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &[(&str, &str)],
        authorization: Option<&HeaderValue>,
        payload: &Payload,
    ) -> Result<Answer> {
        let authority = uri.authority().ok_or_else(|| self.failed("a URL without a host"))?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri.path_and_query().map_or("/", |p| p.as_str()))
            .header(HOST, authority.as_str())
            .header(USER_AGENT, concat!("atoll/", env!("CARGO_PKG_VERSION")));
        for (name, value) in headers {
            request = request
                .header(HeaderName::from_bytes(name.as_bytes()).map_err(|e| self.failed(e.to_string()))?, *value);
        }
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        let request = request.body(payload.body()).map_err(|e| self.failed(e.to_string()))?;
        let answer = self.exchange(uri, request);
        match payload {
            Payload::File(_, _, taken) => self.while_taken(answer, taken, authority.as_str()).await,
            Payload::None | Payload::Bytes(_) => self.timed(answer, authority.as_str()).await?,
        }
    }

    /// One connection per request: blobs are large, and requests few.
    async fn exchange(&self, uri: &Uri, request: Request<Sent>) -> Result<Answer> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let connecting = tokio::time::timeout(CONNECT, TcpStream::connect((host, port)));
        let stream = connecting
            .await
            .map_err(|_| self.failed(format!("no connection to {host}:{port} within {} s", CONNECT.as_secs())))?
            .map_err(|e| self.failed(format!("cannot connect to {host}:{port}: {e}")))?;
        let _ = stream.set_nodelay(true);
        if !secure {
            return self.speak(stream, request).await;
        }
        let config = match &self.tls {
            Some(config) => config.clone(),
            None => tls::config(None, &self.host)?,
        };
        let name =
            ServerName::try_from(host.to_owned()).map_err(|_| self.failed(format!("{host:?} is no host name")))?;
        let stream = tokio_rustls::TlsConnector::from(config)
            .connect(name, stream)
            .await
            .map_err(|e| self.failed(format!("TLS with {host}:{port}: {e}")))?;
        self.speak(stream, request).await
    }

    async fn speak<S>(&self, stream: S, request: Request<Sent>) -> Result<Answer>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let failed = |e: hyper::Error| self.failed(chain(&e));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        // Ends with the runtime at the latest.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        sender.send_request(request).await.map_err(failed)
    }

    /// However long a large body takes, as long as some of it is taken.
    async fn while_taken(
        &self,
        answer: impl Future<Output = Result<Answer>>,
        taken: &AtomicU64,
        what: &str,
    ) -> Result<Answer> {
        let mut answer = std::pin::pin!(answer);
        let mut before = None;
        loop {
            match tokio::time::timeout(self.silence, &mut answer).await {
                Ok(answer) => return answer,
                Err(_) => {
                    let now = taken.load(Ordering::Relaxed);
                    if before.replace(now) == Some(now) {
                        return Err(self.failed(format!("{what}: took nothing for {:?}", self.silence)));
                    }
                }
            }
        }
    }

    pub async fn timed<T>(&self, future: impl Future<Output = T>, what: &str) -> Result<T> {
        let limit = tokio::time::timeout(self.silence, future).await;
        limit.map_err(|_| self.failed(format!("{what}: no answer for {:?}", self.silence)))
    }

    pub async fn small_body(&self, response: Answer, limit: u64, what: &str) -> Result<Vec<u8>> {
        let body = Limited::new(response.into_body(), limit as usize);
        let collected = self.timed(body.collect(), what).await?;
        let collected = collected.map_err(|e| match e.downcast_ref::<http_body_util::LengthLimitError>() {
            Some(_) => Error::TooLarge { what: what.to_owned(), limit },
            None => self.failed(format!("{what}: {e}")),
        })?;
        Ok(collected.to_bytes().to_vec())
    }

    /// Answers a challenge.
    async fn authorize(&self, response: &Answer, what: &str) -> Result<HeaderValue> {
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenges.iter().filter_map(|h| h.to_str().ok()).find_map(Challenge::parse);
        let unauthorized = || Error::Unauthorized { host: self.host.clone(), what: what.to_owned(), status: 401 };
        let text = match challenge.ok_or_else(unauthorized)? {
            Challenge::Basic => self.credentials.as_ref().ok_or_else(unauthorized)?.basic(),
            Challenge::Bearer { realm, service, scope } => {
                format!("Bearer {}", self.token(&realm, service, scope, what).await?)
            }
        };
        let mut value =
            HeaderValue::from_str(&text).map_err(|_| self.failed("its token has characters a header cannot"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn token(&self, realm: &str, service: Option<String>, scope: Option<String>, what: &str) -> Result<String> {
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:{}", self.repository, self.actions));
        let mut url = format!("{realm}{}scope={}", if realm.contains('?') { '&' } else { '?' }, encode(&scope));
        if let Some(service) = service {
            url.push_str(&format!("&service={}", encode(&service)));
        }
        let uri: Uri = url.parse().map_err(|_| self.failed(format!("its token realm {realm:?} is no URL")))?;
        if uri.scheme_str() != Some("https") && !self.insecure {
            return Err(self.failed(format!("its token realm {realm:?} is not https; credentials are not sent there")));
        }
        let basic = self.credentials.as_ref().map(Credentials::basic);
        let basic = basic.and_then(|b| HeaderValue::from_str(&b).ok());
        let response = self.follow(&Method::GET, &uri, &[], basic, &Payload::None).await?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(self.refusal(response, status, what).await);
        }
        let bytes = self.small_body(response, TOKEN_LIMIT, "token").await?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|e| self.failed(format!("its token answer: {e}")))?;
        token.token.or(token.access_token).ok_or_else(|| self.failed("its token answer has no token"))
    }
}

/// `127.0.0.0/8`, `::1` and `localhost`, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_matches(['[', ']']);
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn absolute(base: &Uri, location: &str) -> Option<Uri> {
    let target: Uri = location.parse().ok()?;
    if target.scheme().is_some() && target.authority().is_some() {
        return matches!(target.scheme_str(), Some("http" | "https")).then_some(target);
    }
    let path = target.path_and_query()?.clone();
    Uri::builder().scheme(base.scheme()?.clone()).authority(base.authority()?.clone()).path_and_query(path).build().ok()
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' | b',' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

pub(crate) fn header(response: &Answer, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_goes_without_tls() {
        for host in ["127.0.0.1:5000", "localhost", "localhost:80", "[::1]:5000", "127.9.9.9"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "10.0.0.1:5000", "registry.example", "127.0.0.1.example:5000"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
