//! Client connections: accepted up to a limit, spoken with in HTTP/1.1 or HTTP/2 as the client begins, drained at the end.

use crate::config::Config;
use crate::counters::{Counters, Level};
use crate::gateway::Shared;
use crate::proxy;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Pause after the kernel refused a connection (no descriptors left).
const PAUSE: Duration = Duration::from_millis(50);

/// Header lines of a request that hyper takes by itself.
const HYPER_MAX_HEADERS: usize = 100;

pub struct Limits {
    builder: Builder<TokioExecutor>,
    max_connections: usize,
    drain: Duration,
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
        Limits { builder, max_connections: config.max_connections, drain: config.drain }
    }
}

/// Accepts until `shutdown`, then lets requests in flight end.
pub async fn run(shared: Arc<Shared>, listener: TcpListener, limits: Limits, shutdown: impl Future<Output = ()>) {
    let Limits { builder, max_connections, drain } = limits;
    let builder = Arc::new(builder);
    let places = Arc::new(Semaphore::new(max_connections));
    let (ending, ended) = watch::channel(false);
    let mut shutdown = pin!(shutdown);
    loop {
        let accept = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accept => accepted,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, client)) => {
                let (shared, builder, ended) = (shared.clone(), builder.clone(), ended.clone());
                tokio::spawn(async move {
                    connection(shared, builder, stream, client, ended).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    drop(ended);
    ending.send_replace(true);
    // Every connection holds a receiver until it has ended.
    if tokio::time::timeout(drain, ending.closed()).await.is_err() {
        tracing::info!(connections = ending.receiver_count(), "connections were cut at the end of the drain time");
    }
    shared.cut.send_replace(true);
}

async fn connection(
    shared: Arc<Shared>,
    builder: Arc<Builder<TokioExecutor>>,
    stream: TcpStream,
    client: SocketAddr,
    mut ended: watch::Receiver<bool>,
) {
    let counters = shared.counters.clone();
    Counters::add(&counters.connections_total);
    let _open = Level::up(&counters.connections_open);
    let mut cut = shared.cut.subscribe();
    // Small answers leave at once; a failure only costs time.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(proxy::handle(shared, client, request).await) }
    });
    let mut serving = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = until(&mut ended) => {
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

/// Returns once the flag is up (or nobody can raise it any more).
pub async fn until(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|up| *up).await;
}
