//! A function's own requests. The connections are made by its connector ([`crate::connect`]); TLS and HTTP are spoken here,
//! in the jail, by HTTP/1.1, one request a connection.

use super::function::Counters;
use crate::connect::{AT_ONCE, Ask, Failure, MOST, Told};
use crate::wire::{packet, unpack};
use bytes::Bytes;
use http::header::{CONNECTION, HOST};
use http::uri::Scheme;
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Sleep, timeout};
use tokio_rustls::TlsConnector;
use wasmtime_wasi_http::{Error as HttpError, RequestOptions, WasiBody};

/// Requests under way of one function, connections being made and answers being read alike.
const UNDER_WAY: usize = 256;
/// Bytes of the list of certificate authorities.
const ROOTS: u64 = 8 << 20;
const HEAD: usize = 64 << 10;
const HEADERS: usize = 100;
/// Until an answer begins, and between two of its parts.
const SILENCE: Duration = Duration::from_secs(60);
const BROKEN: &str = "what makes its connections has ended; the function is started again";

type Waiting = HashMap<u64, oneshot::Sender<Result<TcpStream, Failure>>>;
type Ending = Box<dyn Future<Output = Result<(), HttpError>> + Send>;
type Answered = (Response<WasiBody>, Ending);

pub(super) struct Outbound {
    socket: AsyncFd<OwnedFd>,
    waiting: Mutex<Waiting>,
    asked: AtomicU64,
    connecting: Semaphore,
    under_way: Arc<Semaphore>,
    /// Or why there is none.
    tls: Result<TlsConnector, String>,
    /// Bytes of one body.
    most: u64,
    counters: Arc<Counters>,
}

/// Why a function's own request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error(transparent)]
    Connection(#[from] Failure),
    #[error("{BROKEN}")]
    Broken,
    #[error("{UNDER_WAY} of its requests are under way already")]
    Busy,
    #[error("method CONNECT")]
    Method,
    #[error("not a URL with a host of its own")]
    Url,
    #[error("TLS: {0}")]
    Tls(String),
    #[error("no answer began within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Http(String),
}

impl Failed {
    fn code(&self) -> HttpError {
        let dns = |text: &str| HttpError::DnsError { rcode: Some(text.into()), info_code: None };
        match self {
            Failed::Connection(Failure::NoSuchName { .. }) => dns("NXDOMAIN"),
            Failed::Connection(Failure::Resolver { code, .. }) => dns(&format!("RCODE {code}")),
            Failed::Connection(Failure::NoResolver { .. }) => HttpError::DnsTimeout,
            Failed::Connection(Failure::Refused { .. }) => HttpError::ConnectionRefused,
            Failed::Connection(Failure::Late { .. }) => HttpError::ConnectionTimeout,
            // The codes for these cannot say which host.
            Failed::Connection(
                Failure::NotAllowed { .. } | Failure::Inside { .. } | Failure::Never { .. } | Failure::Other { .. },
            )
            | Failed::Broken
            | Failed::Tls(_)
            | Failed::Http(_) => HttpError::InternalError(Some(self.to_string())),
            Failed::Busy => HttpError::ConnectionLimitReached,
            Failed::Method => HttpError::HttpRequestMethodInvalid,
            Failed::Url => HttpError::HttpRequestUriInvalid,
            Failed::Silent(_) => HttpError::HttpResponseTimeout,
        }
    }
}

impl Outbound {
    /// `socket` leads to the connector; `roots` is a list of certificate authorities, in PEM. In a runtime's context.
    pub fn new(socket: OwnedFd, roots: OwnedFd, most: u64, counters: Arc<Counters>) -> Result<Outbound, String> {
        let failed = |e: std::io::Error| format!("connector: {e}");
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| failed(e.into()))?;
        Ok(Outbound {
            socket: crate::sys::pollable(socket).map_err(failed)?,
            waiting: Mutex::default(),
            asked: AtomicU64::new(0),
            connecting: Semaphore::new(AT_ONCE),
            under_way: Arc::new(Semaphore::new(UNDER_WAY)),
            tls: tls(roots),
            most,
            counters,
        })
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Hands connections to who waits for them, until the connector has ended.
    pub async fn hand_out(&self) {
        while let Ok(mut ready) = self.socket.readable().await {
            let read = ready.try_io(|socket| match packet(socket.as_fd()) {
                Err(Errno::AGAIN) => Err(std::io::ErrorKind::WouldBlock.into()),
                Err(errno) => Err(std::io::Error::from(errno)),
                Ok(packet) => Ok(packet),
            });
            let (told, descriptors) = match read {
                Err(_) => continue,
                Ok(Ok(Some(packet))) => match unpack::<Told>(packet) {
                    Ok(told) => told,
                    Err(_) => break,
                },
                Ok(Ok(None) | Err(_)) => break,
            };
            let Some(waiting) = self.waiting().remove(&told.id) else { continue };
            let result = match (told.failure, descriptors.into_iter().next()) {
                (Some(failure), _) => Err(failure),
                (None, Some(socket)) => adopt(socket),
                (None, None) => break,
            };
            let _ = waiting.send(result);
        }
        // Whoever waits sees its sender go.
        self.waiting().clear();
    }

    async fn connect(&self, host: &str, port: u16, limit: Duration) -> Result<TcpStream, Failed> {
        let _place = self.connecting.acquire().await.map_err(|_| Failed::Broken)?;
        let id = self.asked.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(id, sender);
        let _gone = Forgotten { outbound: self, id };
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ask = Ask { id, host: host.to_owned(), port, limit_ms };
        crate::wire::send(self.socket.get_ref(), &ask, &[]).map_err(|_| Failed::Broken)?;
        let late = || Failure::Late { host: host.to_owned(), port };
        // The connector keeps to the limit; this is for one that does not answer at all.
        let told = timeout(limit + Duration::from_secs(5), receiver).await.map_err(|_| late())?;
        Ok(told.map_err(|_| Failed::Broken)??)
    }

    pub async fn send(
        self: Arc<Outbound>,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
    ) -> Result<Answered, Failed> {
        if request.method() == Method::CONNECT {
            return Err(Failed::Method);
        }
        let uri = request.uri().clone();
        let authority =
            uri.authority().filter(|a| !a.host().is_empty() && !a.as_str().contains('@')).ok_or(Failed::Url)?;
        let encrypted = uri.scheme() == Some(&Scheme::HTTPS);
        let port = match (authority.port(), encrypted) {
            (None, true) => 443,
            (None, false) => 80,
            (Some(port), _) => port.as_str().parse().ok().filter(|port| *port > 0).ok_or(Failed::Url)?,
        };
        let place = self.under_way.clone().try_acquire_owned().map_err(|_| Failed::Busy)?;
        self.counters.outbound_requests.fetch_add(1, Ordering::Relaxed);
        let options = options.unwrap_or_default();
        let limit = options.connect_timeout.map_or(MOST, |own| own.min(MOST));
        let stream =
            Metered { stream: self.connect(authority.host(), port, limit).await?, counters: self.counters.clone() };
        let stream: Box<dyn Stream> = match encrypted {
            false => Box::new(stream),
            true => {
                let late = |_| Failed::Tls(format!("{}:{port}: no handshake in time", authority.host()));
                let said = |e: std::io::Error| Failed::Tls(format!("{}:{port}: {e}", authority.host()));
                let connector = self.tls.as_ref().map_err(|why| Failed::Tls(why.clone()))?;
                let handshake = connector.connect(server_name(authority.host())?, stream);
                Box::new(timeout(limit, handshake).await.map_err(late)?.map_err(said)?)
            }
        };
        self.exchange(stream, request, &uri, &options, place).await
    }

    async fn exchange(
        &self,
        stream: Box<dyn Stream>,
        mut request: Request<WasiBody>,
        uri: &Uri,
        options: &RequestOptions,
        place: tokio::sync::OwnedSemaphorePermit,
    ) -> Result<Answered, Failed> {
        let failed = |e: hyper::Error| Failed::Http(super::super::error::chain(&e));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD).max_headers(HEADERS);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(failed)?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = path.parse().map_err(|_| Failed::Url)?;
        if !request.headers().contains_key(HOST) {
            let host = uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
            request.headers_mut().insert(HOST, host.ok_or(Failed::Url)?);
        }
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        let most = self.most;
        let request = request.map(|body| Bounded::new(body, most, HttpError::HttpRequestBodySize, None));
        let driving = super::function::AbortOnDrop::new(tokio::spawn(connection).abort_handle());
        let first = options.first_byte_timeout.map_or(SILENCE, |own| own.min(SILENCE));
        let answer = timeout(first, sender.send_request(request)).await;
        let answer = answer.map_err(|_| Failed::Silent(first))?.map_err(failed)?;
        let silence = options.between_bytes_timeout.map_or(SILENCE, |own| own.min(SILENCE));
        let answer = answer.map(|body| {
            let body = body.map_err(|e| HttpError::InternalError(Some(super::super::error::chain(&e))));
            let bounded = Bounded::new(body, most, HttpError::HttpResponseBodySize, Some(silence));
            Held { body: bounded, _driving: driving, _place: place }.boxed_unsync()
        });
        Ok((answer, Box::new(std::future::ready(Ok(())))))
    }
}

/// A request of the instance's, as its hook sends it; the author reads in the log what failed.
pub(super) async fn request(
    outbound: Arc<Outbound>,
    log: Arc<super::log::Log>,
    request: Request<WasiBody>,
    options: Option<RequestOptions>,
) -> Result<Answered, HttpError> {
    let what = target(request.uri());
    outbound.send(request, options).await.map_err(|failed| {
        log.note(&format!("atoll: the request to {what} failed: {failed}"));
        failed.code()
    })
}

/// Without what may be secret.
pub(super) fn target(uri: &Uri) -> String {
    format!("{}://{}", uri.scheme_str().unwrap_or("http"), uri.authority().map_or("", |a| a.as_str()))
}

/// Forgets who waited when it does not wait any more.
struct Forgotten<'a> {
    outbound: &'a Outbound,
    id: u64,
}

impl Drop for Forgotten<'_> {
    fn drop(&mut self) {
        self.outbound.waiting().remove(&self.id);
    }
}

fn adopt(socket: OwnedFd) -> Result<TcpStream, Failure> {
    let other = |e: std::io::Error| Failure::Other { host: String::new(), port: 0, why: e.to_string() };
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true).map_err(other)?;
    let _ = stream.set_nodelay(true);
    TcpStream::from_std(stream).map_err(other)
}

fn tls(roots: OwnedFd) -> Result<TlsConnector, String> {
    let mut pem = Vec::new();
    File::from(roots).take(ROOTS).read_to_end(&mut pem).map_err(|e| format!("certificate authorities: {e}"))?;
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok));
    if store.is_empty() {
        return Err("this machine has no list of certificate authorities; its administrator can install one".into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config.map_err(|e| e.to_string())?.with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn server_name(host: &str) -> Result<ServerName<'static>, Failed> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let bare = bare.strip_suffix('.').unwrap_or(bare);
    ServerName::try_from(bare.to_owned()).map_err(|e| Failed::Tls(format!("{host}: {e}")))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Counts what goes over the network, TLS and headers and all.
struct Metered {
    stream: TcpStream,
    counters: Arc<Counters>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context, buffer: &mut ReadBuf) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(task, buffer))?;
        let more = buffer.filled().len().saturating_sub(before) as u64;
        self.counters.outbound_received.fetch_add(more, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(task, bytes))?;
        self.counters.outbound_sent.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(task)
    }
}

/// A body of at most so many bytes, which may be silent for so long.
struct Bounded<B> {
    body: B,
    most: u64,
    left: u64,
    too_large: fn(Option<u64>) -> HttpError,
    silence: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl<B> Bounded<B> {
    fn new(body: B, most: u64, too_large: fn(Option<u64>) -> HttpError, silence: Option<Duration>) -> Bounded<B> {
        let silence = silence.map(|limit| (limit, Box::pin(tokio::time::sleep(limit))));
        Bounded { body, most, left: most, too_large, silence }
    }
}

impl<B: Body<Data = Bytes, Error = HttpError> + Unpin> Body for Bounded<B> {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Context) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(task);
        let Poll::Ready(frame) = polled else {
            if let Some((_, silence)) = &mut self.silence {
                ready!(silence.as_mut().poll(task));
                return Poll::Ready(Some(Err(HttpError::ConnectionReadTimeout)));
            }
            return Poll::Pending;
        };
        if let Some((limit, silence)) = &mut self.silence {
            silence.as_mut().reset(tokio::time::Instant::now() + *limit);
        }
        if let Some(Ok(frame)) = &frame {
            let length = frame.data_ref().map_or(0, |data| data.len() as u64);
            let Some(left) = self.left.checked_sub(length) else {
                return Poll::Ready(Some(Err((self.too_large)(Some(self.most)))));
            };
            self.left = left;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, with its connection: who lets go of one lets go of the other.
struct Held<B> {
    body: B,
    _driving: super::function::AbortOnDrop,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Context) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(task)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
