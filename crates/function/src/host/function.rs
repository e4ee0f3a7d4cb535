//! One function: its listener, its connections, one instance a request.

use super::context::Context;
use super::durations::Durations;
use super::invocation::Invocation;
use super::log::Log;
use super::outbound::Outbound;
use super::recorder::Recorder;
use super::ticker::Ticker;
use crate::wire::{Exit, FunctionSpec, FunctionStats};
use bytes::Bytes;
use clock::now_nanos as now;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context as Task, Poll};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use wasmtime::Store;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::{Error as HttpError, WasiHttpView};

const CONNECTIONS: usize = 1024;
const HEADERS: Duration = Duration::from_secs(30);
/// How many times the limit on the beginning of an answer the whole may take.
const WHOLE: u32 = 10;
/// Requests that wait for a place, per place.
const QUEUE: u64 = 4;

type Content = UnsyncBoxBody<Bytes, HttpError>;

#[derive(Default)]
pub(super) struct Counters {
    pub cpu: AtomicU64,
    pub memory: AtomicU64,
    /// Of one instance, the most so far.
    pub memory_peak: AtomicU64,
    pub cold_starts: AtomicU64,
    pub queue_micros: AtomicU64,
    pub durations: Durations,
    requests: AtomicU64,
    failures: AtomicU64,
    in_flight: AtomicU64,
    waiting: AtomicU64,
    pub run_micros: AtomicU64,
    pub memory_kib_micros: AtomicU64,
    pub received_bytes: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub outbound_requests: AtomicU64,
    pub outbound_sent: AtomicU64,
    pub outbound_received: AtomicU64,
}

/// Whether a function goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Run,
    /// Take nothing new; be done by then.
    Stop {
        until: Instant,
        signal: Option<i32>,
    },
}

/// What the functions of a host have in common.
pub(super) struct Shared {
    pub ticker: Arc<Ticker>,
    pub instances: Arc<Semaphore>,
    pub recorder: Arc<Recorder>,
}

pub(super) struct Function {
    pub spec: FunctionSpec,
    pub started: i64,
    pub log: Arc<Log>,
    pub wish: watch::Sender<Wish>,
    pre: ProxyPre<Context>,
    pub counters: Arc<Counters>,
    outbound: Option<Arc<Outbound>>,
    places: Arc<Semaphore>,
    /// No request has run yet.
    cold: AtomicBool,
    shared: Shared,
}

impl Function {
    pub fn new(
        spec: FunctionSpec,
        pre: ProxyPre<Context>,
        log: Arc<Log>,
        counters: Arc<Counters>,
        outbound: Option<Arc<Outbound>>,
        shared: Shared,
    ) -> Function {
        let places = Arc::new(Semaphore::new(spec.limits.concurrency.max(1) as usize));
        Function {
            spec,
            started: now(),
            log,
            wish: watch::Sender::new(Wish::Run),
            pre,
            counters,
            outbound,
            places,
            cold: AtomicBool::new(true),
            shared,
        }
    }

    pub fn recorder(&self) -> &Recorder {
        &self.shared.recorder
    }

    pub fn stats(&self) -> FunctionStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FunctionStats {
            cpu_nanos: get(&self.counters.cpu),
            memory_bytes: get(&self.counters.memory),
            memory_peak_bytes: get(&self.counters.memory_peak),
            cold_starts: get(&self.counters.cold_starts),
            waiting: get(&self.counters.waiting),
            queue_micros: get(&self.counters.queue_micros),
            durations: self.counters.durations.read(),
            duration_micros: self.counters.durations.sum(),
            received_bytes: get(&self.counters.received_bytes),
            requests: get(&self.counters.requests),
            failures: get(&self.counters.failures),
            in_flight: get(&self.counters.in_flight),
            run_micros: get(&self.counters.run_micros),
            memory_kib_micros: get(&self.counters.memory_kib_micros),
            sent_bytes: get(&self.counters.sent_bytes),
            outbound_requests: get(&self.counters.outbound_requests),
            outbound_sent_bytes: get(&self.counters.outbound_sent),
            outbound_received_bytes: get(&self.counters.outbound_received),
        }
    }

    /// Serves until it is told to stop; tells how it ended.
    pub async fn serve(self: Arc<Function>, listener: TcpListener) -> Exit {
        let mut wish = self.wish.subscribe();
        // One may have come before this task began to listen.
        wish.mark_changed();
        let (closing, closed) = watch::channel(false);
        let mut connections = JoinSet::new();
        let connections_end = async {
            match &self.outbound {
                Some(outbound) => outbound.hand_out().await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(connections_end);
        let (until, signal) = loop {
            let full = connections.len() >= CONNECTIONS;
            tokio::select! {
                accepted = listener.accept(), if !full => match accepted {
                    Ok((stream, _)) => { connections.spawn(self.clone().connection(stream, closed.clone())); }
                    // Out of descriptors; a client that is gone already comes here, too.
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                },
                Some(_) = connections.join_next() => {}
                () = &mut connections_end => {
                    return Exit { code: 255, signal: None, finished: now(), message: "its connector ended".into() };
                }
                changed = wish.changed() => {
                    if changed.is_err() {
                        break (Instant::now(), None);
                    }
                    if let Wish::Stop { until, signal } = *wish.borrow_and_update() {
                        break (until, signal);
                    }
                }
            }
        };
        drop(listener);
        let _ = closing.send(true);
        let drained = async { while connections.join_next().await.is_some() {} };
        let whole = tokio::select! {
            drained = tokio::time::timeout_at(until.into(), drained) => drained.is_ok(),
            () = &mut connections_end => false,
        };
        connections.shutdown().await;
        match signal {
            Some(signal) => Exit { code: 128 + signal, signal: Some(signal), finished: now(), message: String::new() },
            None => {
                let message = if whole { "" } else { "requests under way were cut off at the end of the grace period" };
                Exit { code: 0, signal: None, finished: now(), message: message.into() }
            }
        }
    }

    async fn connection(self: Arc<Function>, stream: TcpStream, mut closed: watch::Receiver<bool>) {
        let _ = stream.set_nodelay(true);
        let service = service_fn(move |request| {
            let function = self.clone();
            async move { Ok::<_, Infallible>(function.handle(request).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
        builder.http2().timer(TokioTimer::new()).max_concurrent_streams(128);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = closed.wait_for(|closed| *closed) => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }

    async fn handle(self: Arc<Function>, mut request: Request<Incoming>) -> Response<Content> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let invocation = Invocation::begin(self.clone(), &mut request);
        let limit = Duration::from_millis(self.spec.limits.timeout_ms.max(1));
        let answered = match tokio::time::timeout(limit, self.admit()).await {
            Ok(Ok(places)) => {
                invocation.admitted(self.cold.swap(false, Ordering::Relaxed));
                let left = limit.saturating_sub(invocation.age());
                self.run(request, &invocation, places, left).await
            }
            Ok(Err(refusal)) => Err(refusal),
            Err(_) => Err(Refusal::Busy),
        };
        let answer = answered.unwrap_or_else(|refusal| {
            self.counters.failures.fetch_add(1, Ordering::Relaxed);
            self.log.note(&format!("atoll: {}: {refusal}", invocation.what()));
            invocation.failed(&refusal);
            refusal.answer()
        });
        invocation.answered(answer.status());
        answer
    }

    /// A place among the function's requests, and one in the host's pool.
    async fn admit(&self) -> Result<Places, Refusal> {
        let _waiting = Gauge::enter(&self.counters.waiting);
        let allowed = u64::from(self.spec.limits.concurrency.max(1)) * QUEUE;
        if self.counters.waiting.load(Ordering::Relaxed) > allowed {
            return Err(Refusal::Busy);
        }
        let own = self.places.clone().acquire_owned().await.map_err(|_| Refusal::Busy)?;
        let hosts = self.shared.instances.clone().acquire_owned().await.map_err(|_| Refusal::Busy)?;
        Ok(Places { _own: own, _hosts: hosts })
    }

    async fn run(
        self: &Arc<Function>,
        request: Request<Incoming>,
        invocation: &Arc<Invocation>,
        places: Places,
        limit: Duration,
    ) -> Result<Response<Content>, Refusal> {
        let context = Context::new(&self.spec, &self.log, invocation, self.outbound.clone());
        let mut store = Store::new(self.pre.engine(), context);
        store.limiter(|context| &mut context.memory);
        store.set_epoch_deadline(1);
        store.epoch_deadline_async_yield_and_update(1);
        let (sender, receiver) = oneshot::channel();
        let bad = |e: wasmtime::Error| Refusal::Request(format!("{e:#}"));
        let request = request.map(|body| Received { body, invocation: invocation.clone() });
        let incoming = store.data_mut().http().new_incoming_request(Scheme::Http, request).map_err(bad)?;
        let outparam = store.data_mut().http().new_response_outparam(sender).map_err(bad)?;
        let function = self.clone();
        let instance = async move {
            let _in_flight = Gauge::enter(&function.counters.in_flight);
            let _ticking = function.shared.ticker.enter();
            let _places = places;
            let proxy = function.pre.instantiate_async(&mut store).await?;
            proxy.wasi_http_incoming_handler().call_handle(&mut store, incoming, outparam).await
        };
        let whole =
            tokio::time::timeout(limit * WHOLE, Measured::new(instance, self.spec.limits.cpu_ms, invocation.clone()));
        let function = self.clone();
        // A task of its own: the function may go on after its answer has begun.
        let task = tokio::spawn(async move {
            match whole.await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(describe(&error)),
                Err(_) => {
                    function.log.note("atoll: a request was ended: it took ten times its time limit");
                    Err("it took too long".to_owned())
                }
            }
        });
        let abort = AbortOnDrop(task.abort_handle());
        match tokio::time::timeout(limit, receiver).await {
            Ok(Ok(Ok(response))) => {
                let most = self.spec.limits.response_bytes;
                if response.body().size_hint().lower() > most {
                    return Err(Refusal::Large(most));
                }
                let (log, noted) = (self.log.clone(), invocation.clone());
                tokio::spawn(async move {
                    if let Ok(Err(why)) = task.await {
                        noted.failed(&why);
                        log.note(&format!("atoll: after its answer the function failed: {why}"));
                    }
                });
                let guarded = |body| Guarded {
                    body,
                    abort: Some(abort),
                    left: most,
                    function: self.clone(),
                    invocation: invocation.clone(),
                };
                Ok(response.map(|body| guarded(body).boxed_unsync()))
            }
            Ok(Ok(Err(code))) => Err(Refusal::Code(code)),
            // The instance went without an answer: its task knows why.
            Ok(Err(_)) => Err(match task.await {
                Ok(Ok(())) => Refusal::Trap("it ended without an answer".into()),
                Ok(Err(why)) => Refusal::Trap(why),
                Err(error) => Refusal::Trap(error.to_string()),
            }),
            Err(_) => Err(Refusal::Late(limit)),
        }
    }
}

/// What a request holds while its instance lives.
struct Places {
    _own: OwnedSemaphorePermit,
    _hosts: OwnedSemaphorePermit,
}

#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("too many requests at once")]
    Busy,
    #[error("a request that cannot be passed on: {0}")]
    Request(String),
    #[error("the function answered with the error {0:?}")]
    Code(ErrorCode),
    #[error("the function failed: {0}")]
    Trap(String),
    #[error("no answer within {0:?}")]
    Late(Duration),
    #[error("an answer of more than {0} bytes")]
    Large(u64),
}

impl Refusal {
    fn answer(&self) -> Response<Content> {
        let (status, text) = match self {
            Refusal::Busy => (StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n"),
            Refusal::Request(_) => (StatusCode::BAD_REQUEST, "the request is not well-formed\n"),
            Refusal::Code(_) | Refusal::Trap(_) | Refusal::Large(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "the function failed; its log says why\n")
            }
            Refusal::Late(_) => (StatusCode::GATEWAY_TIMEOUT, "the function did not answer in time\n"),
        };
        let mut response = Response::new(
            Full::new(Bytes::from_static(text.as_bytes())).map_err(|never| match never {}).boxed_unsync(),
        );
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// The reason first, then the uppermost frames of the function's stack.
fn describe(error: &wasmtime::Error) -> String {
    let text = format!("{error:?}");
    text.lines().take(24).collect::<Vec<_>>().join("\n")
}

/// Counts up while it lives.
struct Gauge<'a>(&'a AtomicU64);

impl<'a> Gauge<'a> {
    fn enter(counter: &'a AtomicU64) -> Gauge<'a> {
        counter.fetch_add(1, Ordering::Relaxed);
        Gauge(counter)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds the time an instance computes to the function's account, and ends it when it had its share. It yields at every
/// tick, which is as exact as this is.
struct Measured<F> {
    inner: Pin<Box<F>>,
    /// Zero is no limit.
    most: Duration,
    invocation: Arc<Invocation>,
    spent: Duration,
}

impl<F> Measured<F> {
    fn new(inner: F, cpu_ms: u64, invocation: Arc<Invocation>) -> Measured<F> {
        Measured { inner: Box::pin(inner), most: Duration::from_millis(cpu_ms), invocation, spent: Duration::ZERO }
    }
}

impl<F: Future<Output = wasmtime::Result<()>>> Future for Measured<F> {
    type Output = wasmtime::Result<()>;

    fn poll(mut self: Pin<&mut Self>, task: &mut Task) -> Poll<wasmtime::Result<()>> {
        let begun = Instant::now();
        let result = self.inner.as_mut().poll(task);
        let spent = begun.elapsed();
        self.invocation.computed(spent);
        self.spent += spent;
        let most = self.most;
        match result {
            Poll::Pending if !most.is_zero() && self.spent > most => {
                Poll::Ready(Err(wasmtime::Error::msg(format!("it used more than {most:?} of processor time"))))
            }
            other => other,
        }
    }
}

pub(super) struct AbortOnDrop(AbortHandle);

impl AbortOnDrop {
    pub fn new(handle: AbortHandle) -> AbortOnDrop {
        AbortOnDrop(handle)
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A request's body, whose bytes are counted.
struct Received {
    body: Incoming,
    invocation: Arc<Invocation>,
}

impl Body for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Task) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(task);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.invocation.received(frame.data_ref().map_or(0, |data| data.len() as u64));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body whose loss ends the instance that writes it: the client has gone. So does one that grows too large.
struct Guarded {
    body: Content,
    abort: Option<AbortOnDrop>,
    /// Bytes that may still come.
    left: u64,
    function: Arc<Function>,
    invocation: Arc<Invocation>,
}

impl Guarded {
    /// The answer is whole: what the function still does is its own affair.
    fn release(&mut self) {
        std::mem::forget(self.abort.take());
    }
}

impl Body for Guarded {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Task) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(task);
        match &polled {
            Poll::Ready(None) => self.release(),
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.invocation.sent(length);
                let Some(left) = self.left.checked_sub(length) else {
                    let most = self.function.spec.limits.response_bytes;
                    self.function.counters.failures.fetch_add(1, Ordering::Relaxed);
                    self.function.log.note(&format!("atoll: an answer was cut off: {}", Refusal::Large(most)));
                    self.invocation.failed(Refusal::Large(most));
                    self.abort = None;
                    return Poll::Ready(Some(Err(HttpError::HttpResponseBodySize(Some(most)))));
                };
                self.left = left;
            }
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.release();
        }
    }
}
