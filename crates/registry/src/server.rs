//! Connections and the way of one request.

use crate::access::{Access, Administrator, Caller, Permit, enter};
use crate::answer::{self, Answer, Refusal, set};
use crate::route::{Endpoint, Miss, query};
use crate::rules::TagRules;
use crate::sendfile::{Connection, Parts};
use crate::{blobs, listing, manifests, uploads};
use http::header::{AUTHORIZATION, EXPECT, ORIGIN};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use image::Store;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};

/// Connections at once; more wait in the listener's queue.
const CONNECTIONS: usize = 512;
/// What is read of a body before it is passed on.
const BUFFER: usize = 512 * 1024;
/// A refused body is read on for this many bytes and this long.
const REFUSED: usize = 4 << 20;
const LINGER: Duration = Duration::from_secs(2);
const HEADERS: Duration = Duration::from_secs(30);
/// Requests under way get this long after shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(10);

/// What the registry is made of.
pub struct Config {
    pub listener: std::net::TcpListener,
    pub store: Arc<Store>,
    pub access: Arc<dyn Access>,
    pub rules: TagRules,
    pub limits: Limits,
    /// Told of every manifest that was put.
    pub pushed: Option<Arc<dyn Fn(Pushed) + Send + Sync>>,
}

/// A manifest that was put.
#[derive(Clone, Debug)]
pub struct Pushed {
    pub repository: String,
    pub tag: Option<String>,
    pub digest: String,
    pub media_type: String,
}

impl Config {
    /// Everything but the listener and the store as it is by default.
    pub fn new(listener: std::net::TcpListener, store: Arc<Store>) -> Config {
        let (access, rules, limits) = (Arc::new(Administrator), TagRules::default(), Limits::default());
        Config { listener, store, access, rules, limits, pushed: None }
    }
}

/// The size of one upload is the store's `Limits::blob_bytes`.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bodies of blobs received at once; more wait.
    pub uploads: usize,
    /// Unfinished uploads; more are refused.
    pub sessions: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { uploads: 64, sessions: 10_000 }
    }
}

/// What every request sees.
pub(crate) struct Registry {
    pub store: Arc<Store>,
    pub access: Arc<dyn Access>,
    pub rules: TagRules,
    pub limits: Limits,
    pub pushed: Option<Arc<dyn Fn(Pushed) + Send + Sync>>,
    /// Places for bodies of blobs.
    pub receiving: Arc<Semaphore>,
    fixed_tags: Mutex<()>,
}

impl Registry {
    /// Held while a tag that may not be moved is looked at and set or deleted.
    pub fn fixed_tags(&self) -> MutexGuard<'_, ()> {
        self.fixed_tags.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Serves until `shutdown` resolves, then lets requests under way finish for a few seconds.
pub async fn serve(config: Config, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
    let Config { listener, store, access, rules, limits, pushed } = config;
    let receiving = Arc::new(Semaphore::new(limits.uploads));
    let registry = Arc::new(Registry { store, access, rules, limits, pushed, receiving, fixed_tags: Mutex::new(()) });
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let (stop, stopping) = watch::channel(false);
    tokio::pin!(shutdown);
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place.map_err(io::Error::other)?,
            () = &mut shutdown => break,
        };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                // Out of descriptors, or the client was gone already: neither ends the service.
                Err(error) => {
                    tracing::warn!(%error, "registry: accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        let (registry, stopping) = (registry.clone(), stopping.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            connection(registry, stream, peer, stopping).await;
        });
    }
    drop(listener);
    let _ = stop.send(true);
    let _ = tokio::time::timeout(DRAIN, places.acquire_many(CONNECTIONS as u32)).await;
    Ok(())
}

async fn connection(registry: Arc<Registry>, stream: TcpStream, peer: SocketAddr, mut stopping: watch::Receiver<bool>) {
    let parts = Parts::default();
    let io = Connection::new(stream, parts.clone());
    let service = service_fn(move |request| {
        let (registry, parts) = (registry.clone(), parts.clone());
        async move { Ok::<_, Infallible>(handle(request, registry, peer, parts).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .writev(true)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stop| *stop) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(DRAIN, connection).await;
}

async fn handle(request: Request<Incoming>, registry: Arc<Registry>, peer: SocketAddr, parts: Parts) -> Answer {
    let (head, mut body) = request.into_parts();
    let (method, path) = (head.method.clone(), head.uri.path().to_owned());
    let waits = head.headers.contains_key(EXPECT);
    let authorization = head.headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let caller = Caller { peer, authorization };
    let mut answer = match dispatch(head, &mut body, registry, &caller, &parts).await {
        Ok(answer) => answer,
        Err(refusal) => {
            if !waits {
                drain(&mut body).await;
            }
            refusal.answer()
        }
    };
    set(&mut answer, "docker-distribution-api-version", "registry/2.0");
    set(&mut answer, "x-content-type-options", "nosniff");
    tracing::debug!(%method, path, status = answer.status().as_u16(), "registry");
    if method == Method::HEAD {
        // Headers stay, Content-Length among them.
        let (parts, _) = answer.into_parts();
        return Answer::from_parts(parts, answer::empty(StatusCode::OK).into_body());
    }
    answer
}

/// Reads on for a moment, so that a client still sending gets to read why it was refused.
async fn drain(body: &mut Incoming) {
    let read = async {
        let mut left = REFUSED;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, |d| d.len()));
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, read).await;
}

async fn dispatch(
    head: http::request::Parts,
    body: &mut Incoming,
    registry: Arc<Registry>,
    caller: &Caller,
    parts: &Parts,
) -> Result<Answer, Refusal> {
    // Registry clients never send it; a browser showing someone's page does.
    if head.headers.contains_key(ORIGIN) {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", "requests from web pages are not served"));
    }
    let endpoint = Endpoint::parse(head.uri.path()).map_err(|miss| match miss {
        Miss::Path => {
            Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such endpoint; the registry's begin with /v2/")
        }
        Miss::Malformed(error) => error.into(),
    })?;
    if !endpoint.methods().contains(&head.method) {
        let allowed = endpoint.methods().iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
        let message = format!("{} is not possible here", head.method);
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).with("allow", allowed));
    }
    let (registry, headers, query) = (&registry, &head.headers, query(head.uri.query()));
    let (verb, _) = endpoint.wants(&head.method);
    let permit = |repository| Permit::ask(&*registry.access, caller, verb, repository);
    match (endpoint, head.method) {
        (Endpoint::Version, _) => {
            enter(&*registry.access, caller, verb)?;
            Ok(answer::json(StatusCode::OK, &serde_json::json!({})))
        }
        (Endpoint::Catalog, _) => {
            enter(&*registry.access, caller, verb)?;
            listing::catalog(registry, caller, &query).await
        }
        (Endpoint::Tags(r), _) => listing::tags(registry, permit(r)?, &query).await,
        (Endpoint::Referrers(r, digest), _) => listing::referrers(registry, permit(r)?, digest, &query).await,
        (Endpoint::Manifest(r, s), Method::PUT) => manifests::put(registry, permit(r)?, s, headers, body).await,
        (Endpoint::Manifest(r, s), Method::DELETE) => manifests::delete(registry, permit(r)?, s).await,
        (Endpoint::Manifest(r, s), _) => manifests::get(registry, permit(r)?, s, headers).await,
        (Endpoint::Blob(r, digest), Method::DELETE) => blobs::delete(registry, permit(r)?, digest).await,
        (Endpoint::Blob(r, digest), Method::HEAD) => blobs::head(registry, permit(r)?, digest).await,
        (Endpoint::Blob(r, digest), _) => blobs::get(registry, permit(r)?, digest, headers, parts).await,
        (Endpoint::Uploads(r), _) => uploads::begin(registry, permit(r)?, caller, &query, headers, body).await,
        (Endpoint::Upload(r, id), Method::PATCH) => uploads::append(registry, permit(r)?, &id, headers, body).await,
        (Endpoint::Upload(r, id), Method::PUT) => {
            uploads::finish(registry, permit(r)?, &id, &query, headers, body).await
        }
        (Endpoint::Upload(r, id), Method::DELETE) => uploads::cancel(registry, permit(r)?, id).await,
        (Endpoint::Upload(r, id), _) => uploads::status(registry, permit(r)?, id).await,
    }
}

/// Runs a synchronous call of the store off the async threads.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: FnOnce() -> image::Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Refusal::from),
        Err(error) => {
            tracing::error!(%error, "registry request panicked");
            Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the request failed; atoll's log says why"))
        }
    }
}
