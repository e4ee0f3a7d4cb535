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

use bytes::{Bytes, BytesMut};
use frame::{Control, HEAD, Head, MAX_DATA, ResetReason, SpdyError};
use headers::{Deflater, Headers, Inflater};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Streams open at a time; 512 forwarded connections.
const MAX_STREAMS: usize = 1024;
/// Received and not yet consumed bytes of one stream.
const STREAM_BUFFER: usize = 1 << 20;
/// The same of all streams of a connection.
const CONNECTION_BUFFER: usize = 8 << 20;
/// Control frames waiting to be written; a peer that makes us answer more does not read.
const MAX_CONTROL_WAITING: usize = 4096;
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
        let reader = Reader {
            io: read,
            buffer: BytesMut::with_capacity(64 << 10),
            inflater: Inflater::default(),
            deflater: Deflater::default(),
            inbound: HashMap::new(),
            budget: Arc::new(Semaphore::new(CONNECTION_BUFFER)),
            opened,
            shared: Arc::clone(&shared),
        };
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

struct Inbound {
    chunks: mpsc::UnboundedSender<Chunk>,
    budget: Arc<Semaphore>,
}

struct Reader<R> {
    io: R,
    buffer: BytesMut,
    inflater: Inflater,
    deflater: Deflater,
    inbound: HashMap<u32, Inbound>,
    budget: Arc<Semaphore>,
    opened: mpsc::Sender<Stream>,
    shared: Arc<Shared>,
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("reading: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Spdy(#[from] SpdyError),
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(mut self) {
        let closed = self.shared.closed.clone();
        let result = tokio::select! {
            result = self.read_all() => result,
            () = closed.cancelled() => Ok(()),
        };
        if let Err(error) = result {
            tracing::debug!(%error, "SPDY connection ended");
        }
        closed.cancel();
        self.shared.window_changed.notify_waiters();
    }

    /// Reads until at least `wanted` bytes are buffered; false at the end of the connection.
    async fn fill(&mut self, wanted: usize) -> std::io::Result<bool> {
        while self.buffer.len() < wanted {
            self.buffer.reserve(16 << 10);
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn read_all(&mut self) -> Result<(), ReadError> {
        while self.fill(HEAD).await? {
            let Some(head) = self.buffer.split_to(HEAD).first_chunk::<HEAD>().copied() else { break };
            match Head::parse(head)? {
                Head::Control { kind, flags, length } => {
                    if !self.fill(length).await? {
                        break;
                    }
                    let body = self.buffer.split_to(length);
                    self.control(Control::parse(kind, flags, &body)?)?;
                }
                Head::Data { stream, fin, length } => {
                    if !self.data(stream, length).await? {
                        break;
                    }
                    if fin {
                        self.end_of(stream);
                    }
                }
            }
        }
        Ok(())
    }

    /// Passes on the payload of a data frame in pieces as they come; false at the end of the connection.
    async fn data(&mut self, stream: u32, length: usize) -> Result<bool, ReadError> {
        let mut left = length;
        while left > 0 {
            if !self.fill(1).await? {
                return Ok(false);
            }
            let piece = self.buffer.split_to(left.min(self.buffer.len()).min(MAX_DATA)).freeze();
            left -= piece.len();
            self.deliver(stream, piece).await;
        }
        Ok(true)
    }

    async fn deliver(&mut self, stream: u32, bytes: Bytes) {
        let size = bytes.len() as u32;
        if let Some(inbound) = self.inbound.get(&stream) {
            let permits = async {
                let of_stream = Arc::clone(&inbound.budget).acquire_many_owned(size).await.ok()?;
                let of_connection = Arc::clone(&self.budget).acquire_many_owned(size).await.ok()?;
                Some((of_stream, of_connection))
            };
            let permits = tokio::select! {
                permits = permits => permits,
                () = inbound.chunks.closed() => None,
            };
            if let Some((_of_stream, _of_connection)) = permits
                && inbound.chunks.send(Chunk { bytes, _of_stream, _of_connection }).is_ok()
            {
                return;
            }
        }
        self.shared.credit_connection(size);
    }

    fn end_of(&mut self, stream: u32) {
        self.inbound.remove(&stream);
        self.shared.close_remote(stream);
    }

    fn control(&mut self, control: Control<'_>) -> Result<(), SpdyError> {
        if self.shared.lock().control.len() > MAX_CONTROL_WAITING {
            return Err(SpdyError::Unread);
        }
        match control {
            Control::SynStream { stream, fin, headers } => {
                let headers = self.inflater.headers(headers)?;
                self.open(stream, fin, headers)?;
            }
            // Keeps the compression states together.
            Control::SynReply { stream, fin, headers } | Control::Headers { stream, fin, headers } => {
                self.inflater.headers(headers)?;
                if fin {
                    self.end_of(stream);
                }
            }
            Control::Reset { stream, status: _ } => {
                self.inbound.remove(&stream);
                self.shared.lock().streams.remove(&stream);
                self.shared.window_changed.notify_waiters();
            }
            // Odd ids are the client's; even ones answer ours.
            Control::Ping(id) if !id.is_multiple_of(2) => self.shared.control(frame::ping(id)),
            Control::Settings { initial_window: Some(size) } => {
                let mut state = self.shared.lock();
                (state.windows, state.initial_window) = (true, i64::from(size));
                drop(state);
                self.shared.window_changed.notify_waiters();
            }
            Control::WindowUpdate { stream, delta } => {
                let mut state = self.shared.lock();
                state.windows = true;
                match state.streams.get_mut(&stream) {
                    _ if stream == 0 => state.connection_window = grown(state.connection_window, delta),
                    Some(halves) => halves.window = grown(halves.window, delta),
                    None => {}
                }
                drop(state);
                self.shared.window_changed.notify_waiters();
            }
            Control::Ping(_) | Control::Settings { .. } | Control::GoAway { .. } | Control::Other(_) => {}
        }
        Ok(())
    }

    fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), SpdyError> {
        if self.inbound.len() >= MAX_STREAMS {
            // Streams that we reset and the client did not end.
            self.inbound.retain(|_, inbound| !inbound.chunks.is_closed());
        }
        let mut state = self.shared.lock();
        if id.is_multiple_of(2) || id <= state.last_stream {
            return Err(SpdyError::StreamId(id));
        }
        state.last_stream = id;
        if state.streams.len() >= MAX_STREAMS || self.inbound.len() >= MAX_STREAMS {
            state.control.push_back(frame::reset(id, ResetReason::RefusedStream));
            drop(state);
            self.shared.wake.notify_one();
            return Ok(());
        }
        state.streams.insert(id, Halves { local_open: true, remote_open: true, window: 0 });
        let reply = frame::syn_reply(id, &self.deflater.headers(&[])?);
        state.control.push_back(reply);
        drop(state);
        self.shared.wake.notify_one();
        let (chunks, received) = mpsc::unbounded_channel();
        let stream = Stream {
            id,
            headers,
            receive: Receive { id, chunks: received, uncredited: 0, shared: Arc::clone(&self.shared) },
            send: Send { id, finished: false, shared: Arc::clone(&self.shared) },
        };
        self.inbound.insert(id, Inbound { chunks, budget: Arc::new(Semaphore::new(STREAM_BUFFER)) });
        if fin {
            self.end_of(id);
        }
        // Dropped if no one takes it, and so reset.
        let _ = self.opened.try_send(stream);
        Ok(())
    }
}

/// A window never grows beyond what 31 bits can say.
fn grown(window: i64, delta: u32) -> i64 {
    (window + i64::from(delta)).min(i64::from(i32::MAX))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
