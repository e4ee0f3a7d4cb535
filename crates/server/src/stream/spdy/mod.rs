//! Server side of one SPDY/3.1 connection, as Kubernetes clients use it: the client opens streams, both ends send data
//! on them.
//!
//! One task reads, one writes. What a stream receives waits in a queue bounded in bytes per stream and per connection;
//! when a queue is full, reading stops until its stream has been served (there is nothing else one can do: clients of
//! this protocol do not keep to windows). What is sent waits in one bounded queue, first come first served, so that
//! streams take turns.
//!
//! Windows: credit for what was consumed is always given back. The peer's windows are kept to from the moment it says
//! anything about windows (SETTINGS or WINDOW_UPDATE); the clients in use never do, and would stall at 64 KiB if we
//! waited for them.

pub mod frame;
pub mod headers;
mod reader;

use bytes::{Bytes, BytesMut};
use frame::{MAX_DATA, ResetReason};
use headers::Headers;
use reader::Reader;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

const DATA_WAITING: usize = 8;
/// Credit is given back in steps of this.
const CREDIT_STEP: u32 = 32 << 10;
const DEFAULT_WINDOW: i64 = 64 << 10;
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long the peer may take to hang up after we did.
const LINGER: Duration = Duration::from_secs(5);

/// A stream that the client opened; already replied to.
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub receive: Receive,
    pub send: Send,
}

struct Chunk {
    bytes: Bytes,
    _of_stream: OwnedSemaphorePermit,
    _of_connection: OwnedSemaphorePermit,
}

/// The client's half of a stream.
pub struct Receive {
    id: u32,
    chunks: mpsc::UnboundedReceiver<Chunk>,
    uncredited: u32,
    shared: Arc<Shared>,
}

impl Receive {
    /// The next bytes; `None` when the client has finished or reset the stream, or is gone.
    pub async fn recv(&mut self) -> Option<Bytes> {
        let chunk = self.chunks.recv().await?;
        self.uncredited = self.uncredited.saturating_add(chunk.bytes.len() as u32);
        if self.uncredited >= CREDIT_STEP {
            let credit = std::mem::take(&mut self.uncredited);
            let mut state = self.shared.lock();
            let waiting = state.credits.entry(self.id).or_default();
            *waiting = waiting.saturating_add(credit);
            drop(state);
            self.shared.wake.notify_one();
        }
        Some(chunk.bytes)
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        self.chunks.close();
        let mut unread = self.uncredited;
        while let Ok(chunk) = self.chunks.try_recv() {
            unread = unread.saturating_add(chunk.bytes.len() as u32);
        }
        self.shared.credit_connection(unread);
    }
}

/// The stream or the connection is closed.
#[derive(Debug)]
pub struct Closed;

/// Our half of a stream. Dropped without [`Send::finish`] it resets the stream.
pub struct Send {
    id: u32,
    finished: bool,
    shared: Arc<Shared>,
}

impl Send {
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), Closed> {
        while !data.is_empty() {
            let allowed = self.shared.window(self.id, data.len().min(MAX_DATA)).await?;
            let chunk = data.split_to(allowed);
            self.shared.put(Outgoing { stream: self.id, fin: false, data: chunk }).await?;
        }
        Ok(())
    }

    /// Ends our half.
    pub async fn finish(mut self) -> Result<(), Closed> {
        self.finished = true;
        if !self.shared.close_local(self.id) {
            return Err(Closed);
        }
        self.shared.put(Outgoing { stream: self.id, fin: true, data: Bytes::new() }).await
    }

    /// Returns when nothing can be sent any more: the client reset the stream or is gone.
    pub async fn closed(&self) {
        loop {
            let changed = self.shared.window_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.shared.lock().streams.contains_key(&self.id) {
                return;
            }
            tokio::select! {
                () = self.shared.closed.cancelled() => return,
                () = changed => {}
            }
        }
    }

    /// Refuses the stream.
    pub fn reset(mut self, reason: ResetReason) {
        self.finished = true;
        self.shared.reset(self.id, reason);
    }
}

impl Drop for Send {
    fn drop(&mut self) {
        if !self.finished {
            self.shared.reset(self.id, ResetReason::Cancel);
        }
    }
}

struct Outgoing {
    stream: u32,
    fin: bool,
    data: Bytes,
}

struct Halves {
    local_open: bool,
    remote_open: bool,
    /// What the peer allowed beyond its initial window, less what was sent.
    window: i64,
}

#[derive(Default)]
struct State {
    control: VecDeque<Bytes>,
    credits: BTreeMap<u32, u32>,
    streams: HashMap<u32, Halves>,
    /// Whether the peer keeps windows.
    windows: bool,
    initial_window: i64,
    connection_window: i64,
    last_stream: u32,
}

struct Shared {
    state: Mutex<State>,
    /// There is something in `control` or `credits`.
    wake: Notify,
    /// A window grew or a stream closed.
    window_changed: Notify,
    data: mpsc::Sender<Outgoing>,
    closed: CancellationToken,
}

impl Shared {
    /// No code panics while it holds the lock; a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn put(&self, outgoing: Outgoing) -> Result<(), Closed> {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(Closed),
            sent = self.data.send(outgoing) => sent.map_err(|_| Closed),
        }
    }

    /// Waits until some of `wanted` bytes may be sent on a stream, and counts them as sent.
    async fn window(&self, stream: u32, wanted: usize) -> Result<usize, Closed> {
        loop {
            let changed = self.window_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.lock();
                let (keeps, initial, connection) = (state.windows, state.initial_window, state.connection_window);
                let halves = state.streams.get_mut(&stream).filter(|halves| halves.local_open).ok_or(Closed)?;
                let room = (initial + halves.window).min(DEFAULT_WINDOW + connection);
                let allowed = if keeps { wanted.min(usize::try_from(room).unwrap_or(0)) } else { wanted };
                if allowed > 0 {
                    halves.window -= allowed as i64;
                    state.connection_window -= allowed as i64;
                    return Ok(allowed);
                }
            }
            tokio::select! {
                () = self.closed.cancelled() => return Err(Closed),
                () = changed => {}
            }
        }
    }

    /// Whether our half was open.
    fn close_local(&self, id: u32) -> bool {
        let mut state = self.lock();
        let Some(halves) = state.streams.get_mut(&id) else { return false };
        let was_open = std::mem::replace(&mut halves.local_open, false);
        if !halves.remote_open {
            state.streams.remove(&id);
        }
        was_open
    }

    fn close_remote(&self, id: u32) {
        let mut state = self.lock();
        let Some(halves) = state.streams.get_mut(&id) else { return };
        halves.remote_open = false;
        if !halves.local_open {
            state.streams.remove(&id);
        }
    }

    fn reset(&self, id: u32, reason: ResetReason) {
        if self.lock().streams.remove(&id).is_some() {
            self.control(frame::reset(id, reason));
        }
        self.window_changed.notify_waiters();
    }

    /// For bytes that no stream will consume.
    fn credit_connection(&self, bytes: u32) {
        if bytes > 0 {
            let mut state = self.lock();
            let credit = state.credits.entry(0).or_default();
            *credit = credit.saturating_add(bytes);
            drop(state);
            self.wake.notify_one();
        }
    }

    fn control(&self, frame: Bytes) {
        self.lock().control.push_back(frame);
        self.wake.notify_one();
    }

    /// Everything that goes before data.
    fn take_control(&self, buffer: &mut BytesMut) {
        let mut state = self.lock();
        for frame in state.control.drain(..) {
            buffer.extend_from_slice(&frame);
        }
        let mut total: u32 = 0;
        for (stream, credit) in std::mem::take(&mut state.credits) {
            total = total.saturating_add(credit);
            if stream != 0 && state.streams.get(&stream).is_some_and(|halves| halves.remote_open) {
                buffer.extend_from_slice(&frame::window_update(stream, credit));
            }
        }
        if total > 0 {
            buffer.extend_from_slice(&frame::window_update(0, total));
        }
    }
}

/// A running connection.
pub struct Connection {
    streams: mpsc::Receiver<Stream>,
    shared: Arc<Shared>,
    finish: CancellationToken,
    writer: tokio::task::JoinHandle<()>,
}

impl Connection {
    /// Starts the tasks that serve `io`. They end with the connection, or when this value is dropped.
    pub fn start<IO: AsyncRead + AsyncWrite + std::marker::Send + 'static>(io: IO) -> Connection {
        let (data, outgoing) = mpsc::channel(DATA_WAITING);
        let (opened, streams) = mpsc::channel(64);
        let state = State { initial_window: DEFAULT_WINDOW, ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Notify::new(),
            window_changed: Notify::new(),
            data,
            closed: CancellationToken::new(),
        });
        let finish = CancellationToken::new();
        let (read, write) = tokio::io::split(io);
        let reader = Reader::new(read, opened, Arc::clone(&shared));
        tokio::spawn(reader.run());
        let writer = tokio::spawn(write_frames(write, outgoing, Arc::clone(&shared), finish.clone()));
        Connection { streams, shared, finish, writer }
    }

    /// The next stream the client opens; `None` when it is gone.
    pub async fn accept(&mut self) -> Option<Stream> {
        tokio::select! {
            biased;
            stream = self.streams.recv() => stream,
            () = self.shared.closed.cancelled() => None,
        }
    }

    /// Cancelled when the connection is over.
    pub fn closed(&self) -> CancellationToken {
        self.shared.closed.clone()
    }

    /// Writes what is waiting, says goodbye and waits a while for the client to hang up, so that nothing is lost.
    pub async fn finish(mut self) {
        self.finish.cancel();
        let _ = tokio::time::timeout(LINGER * 6, &mut self.writer).await;
        let _ = tokio::time::timeout(LINGER, self.shared.closed.cancelled()).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

async fn write_frames<W: AsyncWrite + Unpin>(
    mut io: W,
    mut outgoing: mpsc::Receiver<Outgoing>,
    shared: Arc<Shared>,
    finish: CancellationToken,
) {
    let result = tokio::select! {
        result = write_until_done(&mut io, &mut outgoing, &shared, &finish) => result,
        () = shared.closed.cancelled() => return,
    };
    if let Err(error) = result {
        tracing::debug!(%error, "SPDY connection ended");
        shared.closed.cancel();
    }
}

async fn write_until_done<W: AsyncWrite + Unpin>(
    io: &mut W,
    outgoing: &mut mpsc::Receiver<Outgoing>,
    shared: &Shared,
    finish: &CancellationToken,
) -> std::io::Result<()> {
    let mut buffer = BytesMut::with_capacity(2 * MAX_DATA);
    let mut pings = tokio::time::interval_at(tokio::time::Instant::now() + PING_EVERY, PING_EVERY);
    let mut next_ping = 2u32;
    let mut finishing = false;
    loop {
        let next = tokio::select! {
            biased;
            () = shared.wake.notified() => None,
            () = finish.cancelled(), if !finishing => {
                finishing = true;
                outgoing.close();
                None
            }
            next = outgoing.recv() => match next {
                Some(next) => Some(next),
                None => break,
            },
            _ = pings.tick() => {
                buffer.extend_from_slice(&frame::ping(next_ping));
                next_ping = next_ping.wrapping_add(2);
                None
            }
        };
        shared.take_control(&mut buffer);
        if let Some(first) = next {
            frame::put_data(&mut buffer, first.stream, first.fin, &first.data);
            while buffer.len() < 2 * MAX_DATA {
                let Ok(more) = outgoing.try_recv() else { break };
                frame::put_data(&mut buffer, more.stream, more.fin, &more.data);
            }
        }
        io.write_all(&buffer).await?;
        io.flush().await?;
        buffer.clear();
    }
    shared.take_control(&mut buffer);
    buffer.extend_from_slice(&frame::go_away(shared.lock().last_stream));
    io.write_all(&buffer).await?;
    io.flush().await?;
    io.shutdown().await
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
