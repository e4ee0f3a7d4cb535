//! Client connections: accepted up to a limit, spoken with in HTTP/1.1 or HTTP/2 as the client begins, drained at the end.

use crate::config::Config;
use crate::counters::{Counters, Level};
use crate::direct::{self, Next};
use crate::gateway::Shared;
use crate::peer::Peer;
use crate::proxy;
use crate::proxy_protocol;
use crate::tls::{self, Site};
use crate::tunnel;
use crate::wire::Wire;
use bytes::{Buf, BytesMut};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;

/// Pause after the kernel refused a connection (no descriptors left).
const PAUSE: Duration = Duration::from_millis(50);

/// Header lines of a request that hyper takes by itself.
const HYPER_MAX_HEADERS: usize = 100;

pub struct Limits {
    builder: Builder<TokioExecutor>,
    max_connections: usize,
    drain: Duration,
    handshake_timeout: Duration,
    body_timeout: Duration,
    pub head_timeout: Duration,
    pub max_head: usize,
    pub max_headers: usize,
}

impl Limits {
    pub fn new(config: &Config) -> Limits {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(config.head_timeout)
            .max_buf_size(config.max_head.max(8 << 10))
            .half_close(true);
        // Set only where it differs: hyper takes its own limit from the stack, any other from the heap.
        if config.max_headers != HYPER_MAX_HEADERS {
            builder.http1().max_headers(config.max_headers);
        }
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(config.max_streams)
            .max_header_list_size(u32::try_from(config.max_head).unwrap_or(u32::MAX))
            .keep_alive_interval(config.head_timeout)
            .keep_alive_timeout(Duration::from_secs(20));
        Limits {
            builder,
            max_connections: config.max_connections,
            drain: config.drain,
            handshake_timeout: config.handshake_timeout,
            body_timeout: config.body_timeout,
            head_timeout: config.head_timeout,
            max_head: config.max_head,
            max_headers: config.max_headers,
        }
    }
}

/// A socket that clients come to.
pub struct Door {
    pub listener: TcpListener,
    pub secure: bool,
    /// Connections begin with a PROXY protocol header.
    pub announced: bool,
}

/// Accepts until `shutdown`, then lets requests in flight end.
pub async fn run(shared: Arc<Shared>, doors: Vec<Door>, limits: Limits, shutdown: impl Future<Output = ()>) {
    let limits = Arc::new(limits);
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let (ending, ended) = watch::channel(false);
    let mut accepting = JoinSet::new();
    for door in doors {
        accepting.spawn(accept(shared.clone(), door, limits.clone(), places.clone(), ended.clone()));
    }
    drop(ended);
    shutdown.await;
    // The sockets are closed with the tasks that own them.
    accepting.shutdown().await;
    ending.send_replace(true);
    // Every connection holds a receiver until it has ended.
    if tokio::time::timeout(limits.drain, ending.closed()).await.is_err() {
        tracing::info!(connections = ending.receiver_count(), "connections were cut at the end of the drain time");
    }
    shared.cut.send_replace(true);
}

async fn accept(
    shared: Arc<Shared>,
    door: Door,
    limits: Arc<Limits>,
    places: Arc<Semaphore>,
    ended: watch::Receiver<bool>,
) {
    loop {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        match door.listener.accept().await {
            Ok((stream, client)) => {
                let arrival = Arrival { shared: shared.clone(), limits: limits.clone(), ended: ended.clone() };
                tokio::spawn(async move {
                    arrival.admit(stream, client, door.secure, door.announced).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// A client's connection that was accepted, and what it is served with.
struct Arrival {
    shared: Arc<Shared>,
    limits: Arc<Limits>,
    ended: watch::Receiver<bool>,
}

impl Arrival {
    async fn admit(self, stream: TcpStream, client: SocketAddr, secure: bool, announced: bool) {
        let counters = self.shared.counters.clone();
        Counters::add(&counters.connections_total);
        let _open = Level::up(&counters.connections_open);
        // Small answers leave at once; a failure only costs time.
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().unwrap_or(client);
        let wire = Wire::new(stream, BytesMut::new(), self.limits.body_timeout);
        if !secure && !announced {
            let peer = Peer::new(client, local, false);
            return self.serve(wire, peer).await;
        }
        let mut ended = self.ended.clone();
        let known = tokio::select! {
            known = tokio::time::timeout(self.limits.handshake_timeout, self.know(wire, client, secure, announced)) => known,
            () = until(&mut ended) => return,
        };
        match known {
            Ok(Ok(Known::Plain(wire, peer))) => self.serve(wire, peer).await,
            Ok(Ok(Known::Secure(stream, peer))) => {
                let wire = Wire::new(*stream, BytesMut::new(), self.limits.body_timeout);
                self.serve(wire, peer).await;
            }
            Ok(Ok(Known::Passed(joined))) => joined.run(&self.shared).await,
            Ok(Err(error)) => {
                Counters::add(&counters.tls_handshake_failures_total);
                tracing::debug!(%client, "no connection: {error}");
            }
            Err(_) => {
                Counters::add(&counters.tls_handshake_failures_total);
                tracing::debug!(%client, "the client did not say who it is in time");
            }
        }
    }

    /// Finds out who is there: PROXY protocol, then TLS.
    async fn know(
        &self,
        wire: Wire<TcpStream>,
        mut client: SocketAddr,
        secure: bool,
        announced: bool,
    ) -> io::Result<Known> {
        let (mut stream, mut read) = wire.into_parts();
        let local = stream.local_addr()?;
        if announced {
            client = proxy_header(&mut stream, &mut read).await?.unwrap_or(client);
        }
        let patience = self.limits.body_timeout;
        if !secure {
            let peer = Peer::new(client, local, secure);
            return Ok(Known::Plain(Wire::new(stream, read, patience), peer));
        }
        let counters = &self.shared.counters;
        let name = tls::hello(&mut stream, &mut read).await?;
        let site = self.shared.sites().find(&name).cloned();
        match site.as_deref() {
            None => {
                Counters::add(&counters.tls_unknown_name_total);
                stream.write_all(&tls::UNKNOWN_NAME).await?;
                Err(io::Error::new(io::ErrorKind::NotFound, format!("nothing is served for the name {name:?}")))
            }
            Some(Site::Pass { backends, total_weight }) => {
                Counters::add(&counters.tls_passed_through_total);
                let joined = tunnel::join(stream, &read, (client, local), backends, *total_weight).await?;
                Ok(Known::Passed(Box::new(joined)))
            }
            Some(Site::Terminate { listener, config }) => {
                let acceptor = tokio_rustls::TlsAcceptor::from(config.clone());
                let stream = acceptor.accept(Wire::new(stream, read, patience)).await?;
                Counters::add(&counters.tls_handshakes_total);
                let peer = Peer { name, listener: Some(listener.clone()), ..Peer::new(client, local, secure) };
                Ok(Known::Secure(Box::new(stream), peer))
            }
        }
    }

    /// Speaks HTTP until either side has enough.
    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, mut wire: Wire<S>, peer: Peer) {
        let client = peer.client;
        let mut cut = self.shared.cut.subscribe();
        let next = tokio::select! {
            biased;
            next = direct::serve(&mut wire, &self.shared, &peer, &self.limits, &self.ended) => next,
            () = until(&mut cut) => return,
        };
        match next {
            Ok(Next::Hyper) => Box::pin(self.serve_hyper(wire, peer, cut)).await,
            Ok(Next::Close) => {}
            Err(error) => tracing::debug!(%client, "connection ended: {error}"),
        }
    }

    async fn serve_hyper<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        mut self,
        stream: Wire<S>,
        peer: Peer,
        mut cut: watch::Receiver<bool>,
    ) {
        let (client, peer) = (peer.client, Arc::new(peer));
        let shared = self.shared.clone();
        let service = service_fn(move |request| {
            let (shared, peer) = (shared.clone(), peer.clone());
            async move { Ok::<_, Infallible>(proxy::handle(shared, peer, request).await) }
        });
        let mut serving = pin!(self.limits.builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        let result = tokio::select! {
            result = serving.as_mut() => result,
            () = until(&mut self.ended) => {
                serving.as_mut().graceful_shutdown();
                tokio::select! {
                    result = serving.as_mut() => result,
                    () = until(&mut cut) => Ok(()),
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%client, "connection ended: {error}");
        }
    }
}

enum Known {
    Plain(Wire<TcpStream>, Peer),
    Secure(Box<TlsStream<Wire<TcpStream>>>, Peer),
    /// Handed on to a backend, still encrypted.
    Passed(Box<tunnel::Joined>),
}

async fn proxy_header(stream: &mut TcpStream, read: &mut BytesMut) -> io::Result<Option<SocketAddr>> {
    loop {
        if let Some(header) = proxy_protocol::parse(read)? {
            read.advance(header.length);
            return Ok(header.client);
        }
        if read.len() > proxy_protocol::MAX || stream.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Returns once the flag is up (or nobody can raise it any more).
pub async fn until(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|up| *up).await;
}
