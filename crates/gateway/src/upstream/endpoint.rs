//! One address behind a Service: its open connections, its load, its recent failures.

use super::Settings;
use super::request_body::RequestBody;
use crate::counters::Counters;
use api::demand::Share;
use bytes::BytesMut;
use hyper::client::conn::http2::SendRequest;
use rustix::net::RecvFlags;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// Idle connections kept per endpoint: as many as a herd of clients had under way, or its next requests would each wait for a
/// new one.
const MAX_IDLE: usize = 4096;
/// Those of an endpoint that keep their buffers.
const WITH_BUFFERS: usize = 128;
const READ_BUFFER: usize = 8 << 10;
const HEAD_BUFFER: usize = 1 << 10;
/// Idle connections of this process.
static KEPT: AtomicUsize = AtomicUsize::new(0);
const FIRST_EJECTION: Duration = Duration::from_secs(1);
const MAX_EJECTION: Duration = Duration::from_secs(30);
/// A request that must not be sent twice only uses a connection that was in use this recently: servers close idle ones,
/// and the two events can cross on the wire.
const FRESH: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// Its name towards clients.
    pub id: u64,
    settings: Arc<Settings>,
    idle: Mutex<Vec<Idle>>,
    http2: tokio::sync::Mutex<Option<SendRequest<RequestBody>>>,
    active: AtomicUsize,
    failures: AtomicU32,
    /// Milliseconds since start of the process; 0 is not ejected.
    ejected_until: AtomicU64,
    retired: AtomicBool,
    since: Instant,
    room: Arc<Room>,
}

/// Where requests wait while all endpoints of an upstream have as many as they may.
#[derive(Debug, Default)]
pub struct Room {
    waiting: AtomicUsize,
    freed: Notify,
}

/// A place among those that wait.
pub struct Waiting<'a>(&'a Room);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

impl Room {
    /// `None` if that many wait already.
    pub fn wait(&self, most: usize) -> Option<Waiting<'_>> {
        let place = self.waiting.fetch_update(SeqCst, SeqCst, |waiting| (waiting < most).then(|| waiting + 1));
        place.is_ok().then(|| Waiting(self))
    }

    /// Completes when there may be room.
    pub fn freed(&self) -> tokio::sync::futures::Notified<'_> {
        self.freed.notified()
    }

    /// All look again.
    pub fn all(&self) {
        self.freed.notify_waiters();
    }
}

/// An HTTP/1.1 connection to an endpoint.
#[derive(Debug)]
pub struct Connection {
    pub stream: TcpStream,
    /// What was read and not yet used.
    pub read: BytesMut,
    /// Room to write a request's head in.
    pub out: Vec<u8>,
    /// Served a request before.
    pub reused: bool,
    /// Is closed after this request.
    pub once: bool,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
    _kept: Kept,
}

/// A share of what this process keeps at most: a quarter of the files that it may have open.
#[derive(Debug)]
struct Kept(());

impl Kept {
    fn take() -> Option<Kept> {
        static MOST: OnceLock<usize> = OnceLock::new();
        let most = *MOST.get_or_init(|| {
            let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
            files.and_then(|files| usize::try_from(files / 4).ok()).unwrap_or(usize::MAX)
        });
        KEPT.fetch_update(Relaxed, Relaxed, |kept| (kept < most).then(|| kept + 1)).ok().map(|_| Kept(()))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Relaxed);
    }
}

impl Connection {
    /// Whether the endpoint has neither closed it nor said anything unasked. What came since the event loop looked last is
    /// asked of the kernel only where a mistake could not be made good.
    fn is_quiet(&self, repeatable: bool) -> bool {
        let blocks = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.stream.try_read(&mut [0]).is_err_and(blocks)
            && (repeatable
                || rustix::net::recv(&self.stream, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT)
                    .is_err_and(|errno| errno == rustix::io::Errno::WOULDBLOCK))
    }
}

/// A request's share of an endpoint's load, until its response has ended.
#[derive(Debug)]
pub struct Lease(Arc<Endpoint>, #[allow(dead_code)] Option<Share>);

impl Lease {
    pub fn take(endpoint: Arc<Endpoint>) -> Lease {
        endpoint.active.fetch_add(1, Relaxed);
        Lease(endpoint, None)
    }
    /// With the request's share of its Service's load; the share is given back if the endpoint has `most` already.
    pub fn within(most: usize, endpoint: &Arc<Endpoint>, share: Share) -> Result<Lease, Share> {
        let active = &endpoint.active;
        if most == usize::MAX {
            active.fetch_add(1, Relaxed);
        } else if active.fetch_update(SeqCst, SeqCst, |count| (count < most).then(|| count + 1)).is_err() {
            return Err(share);
        }
        share.arrive();
        Ok(Lease(endpoint.clone(), Some(share)))
    }
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, SeqCst);
        if self.0.room.waiting.load(SeqCst) > 0 {
            self.0.room.freed.notify_one();
        }
    }
}

fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    // Never 0, which means "not ejected".
    START.get_or_init(Instant::now).elapsed().as_millis() as u64 + 1
}

impl Endpoint {
    pub(super) fn new(address: SocketAddr, id: u64, settings: Arc<Settings>, room: Arc<Room>) -> Endpoint {
        Endpoint {
            address,
            id,
            settings,
            idle: Mutex::default(),
            http2: tokio::sync::Mutex::default(),
            active: AtomicUsize::new(0),
            failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            since: Instant::now(),
            room,
        }
    }

    pub fn active(&self) -> usize {
        self.active.load(Relaxed)
    }

    /// Time since it was first known.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    pub fn counters(&self) -> &Counters {
        &self.settings.counters
    }

    pub fn is_ejected(&self) -> bool {
        let until = self.ejected_until.load(Relaxed);
        until != 0 && until > now_ms()
    }

    /// The endpoint answered.
    pub fn succeeded(&self) {
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
            self.ejected_until.store(0, Relaxed);
        }
    }

    /// It could not be connected to, or broke off: it is passed over for a while that doubles each time.
    pub fn failed(&self) {
        let before = self.failures.fetch_add(1, Relaxed).min(16);
        let pause = FIRST_EJECTION.saturating_mul(1 << before).min(MAX_EJECTION);
        self.ejected_until.store(now_ms() + pause.as_millis() as u64, Relaxed);
        Counters::add(&self.counters().ejections_total);
        self.lock().clear();
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Relaxed);
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An open connection: an idle one if it still lives, else a new one. `repeatable` says that the request may be sent
    /// again if a kept connection turns out to be closed.
    pub async fn connect(&self, repeatable: bool) -> io::Result<Connection> {
        if let Some(connection) = self.pop(repeatable) {
            Counters::add(&self.counters().upstream_reused_total);
            return Ok(connection);
        }
        Box::pin(self.connect_new()).await
    }

    pub async fn connect_new(&self) -> io::Result<Connection> {
        let stream = self.dial().await?;
        Ok(Connection {
            stream,
            read: BytesMut::with_capacity(READ_BUFFER),
            out: Vec::with_capacity(HEAD_BUFFER),
            reused: false,
            once: false,
        })
    }

    pub async fn dial(&self) -> io::Result<TcpStream> {
        Counters::add(&self.counters().upstream_connects_total);
        let connecting = TcpStream::connect(self.address);
        let result = match tokio::time::timeout(self.settings.connect_timeout, connecting).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        if result.is_err() {
            Counters::add(&self.counters().upstream_connect_failures_total);
        }
        let stream = result?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn pop(&self, repeatable: bool) -> Option<Connection> {
        let mut idle = self.lock();
        while let Some(own) = idle.pop() {
            let age = own.since.elapsed();
            if age > self.settings.idle || (!repeatable && age > FRESH) {
                // The rest has been idle for longer still.
                if age > self.settings.idle {
                    idle.clear();
                } else {
                    idle.push(own);
                }
                return None;
            }
            let connection = own.connection;
            if connection.is_quiet(repeatable) {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection whose exchange ended cleanly.
    pub fn keep(&self, mut connection: Connection) {
        if connection.once || self.retired.load(Relaxed) || !connection.read.is_empty() {
            return;
        }
        connection.reused = true;
        let mut idle = self.lock();
        if idle.len() >= WITH_BUFFERS {
            (connection.read, connection.out) = (BytesMut::new(), Vec::new());
        }
        if idle.len() < MAX_IDLE
            && let Some(_kept) = Kept::take()
        {
            idle.push(Idle { connection, since: Instant::now(), _kept });
        }
    }

    /// Closes what has been idle for too long.
    pub fn tidy(&self) {
        let limit = self.settings.idle;
        self.lock().retain(|own| own.since.elapsed() <= limit);
    }

    /// The one HTTP/2 connection, made if there is none.
    pub async fn http2(&self) -> io::Result<SendRequest<RequestBody>> {
        let mut slot = self.http2.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let io = hyper_util::rt::TokioIo::new(self.dial().await?);
        let executor = hyper_util::rt::TokioExecutor::new();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(executor, io).await.map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("HTTP/2 connection to an endpoint ended: {error}");
            }
        });
        *slot = Some(sender.clone());
        Ok(sender)
    }
}
