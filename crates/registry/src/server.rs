//! Connections and the way of one request.

use crate::answer::{self, Answer, Refusal, set};
use crate::route::{Endpoint, Miss, query};
use crate::{blobs, manifests};
use http::header::ORIGIN;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use image::Store;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// Connections at once; more wait in the listener's queue.
const CONNECTIONS: usize = 512;
const HEADERS: Duration = Duration::from_secs(30);
/// Requests under way get this long after shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(10);

/// Serves until `shutdown` resolves, then lets requests under way finish for a few seconds.
pub async fn serve(
    listener: std::net::TcpListener,
    store: Arc<Store>,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
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
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors, or the client was gone already: neither ends the service.
                Err(error) => {
                    tracing::warn!(%error, "registry: accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        let (store, mut stopping) = (store.clone(), stopping.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| {
                let store = store.clone();
                async move { Ok::<_, Infallible>(handle(request, store).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = stopping.wait_for(|stop| *stop) => {}
            }
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(DRAIN, connection).await;
        });
    }
    drop(listener);
    let _ = stop.send(true);
    let _ = tokio::time::timeout(DRAIN, places.acquire_many(CONNECTIONS as u32)).await;
    Ok(())
}

async fn handle(request: Request<Incoming>, store: Arc<Store>) -> Answer {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let head = method == Method::HEAD;
    let mut answer = match dispatch(request, store).await {
        Ok(answer) => answer,
        Err(refusal) => refusal.answer(),
    };
    set(&mut answer, "docker-distribution-api-version", "registry/2.0");
    set(&mut answer, "x-content-type-options", "nosniff");
    tracing::debug!(%method, path, status = answer.status().as_u16(), "registry");
    if head {
        // Headers stay, Content-Length among them.
        let (parts, _) = answer.into_parts();
        return Answer::from_parts(parts, answer::empty(StatusCode::OK).into_body());
    }
    answer
}

async fn dispatch(request: Request<Incoming>, store: Arc<Store>) -> Result<Answer, Refusal> {
    // Registry clients never send it; a browser showing someone's page does.
    if request.headers().contains_key(ORIGIN) {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", "requests from web pages are not served"));
    }
    let endpoint = Endpoint::parse(request.uri().path()).map_err(|miss| match miss {
        Miss::Path => {
            Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such endpoint; the registry's begin with /v2/")
        }
        Miss::Malformed(error) => error.into(),
    })?;
    if !endpoint.methods().contains(request.method()) {
        let allowed = endpoint.methods().iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
        let message = format!("{} is not possible here", request.method());
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).with("allow", allowed));
    }
    let query = query(request.uri().query());
    let method = request.method().clone();
    match (endpoint, method) {
        (Endpoint::Version, _) => Ok(answer::json(StatusCode::OK, &serde_json::json!({}))),
        (Endpoint::Catalog, _) => manifests::catalog(store, query).await,
        (Endpoint::Tags(repository), _) => manifests::tags(store, repository, query).await,
        (Endpoint::Referrers(repository, digest), _) => manifests::referrers(store, repository, digest, query).await,
        (Endpoint::Manifest(repository, selector), Method::PUT) => {
            manifests::put(store, repository, selector, request).await
        }
        (Endpoint::Manifest(repository, selector), Method::DELETE) => {
            manifests::delete(store, repository, selector).await
        }
        (Endpoint::Manifest(repository, selector), _) => manifests::get(store, repository, selector).await,
        (Endpoint::Blob(_, digest), Method::DELETE) => blobs::delete(store, digest).await,
        (Endpoint::Blob(_, digest), method) => {
            blobs::get(store, digest, request.headers(), method == Method::HEAD).await
        }
        (Endpoint::Uploads(repository), _) => blobs::begin(store, repository, query, request).await,
        (Endpoint::Upload(repository, id), Method::PATCH) => blobs::append(store, repository, id, request).await,
        (Endpoint::Upload(repository, id), Method::PUT) => blobs::finish(store, repository, id, query, request).await,
        (Endpoint::Upload(_, id), Method::DELETE) => blobs::cancel(store, id).await,
        (Endpoint::Upload(repository, id), _) => blobs::status(store, repository, id).await,
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
