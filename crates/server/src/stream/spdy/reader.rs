//! The reading task of a connection: frames in, streams opened, bytes handed to them.

use super::frame::{self, Control, HEAD, Head, MAX_DATA, ResetReason, SpdyError};
use super::headers::{Deflater, Headers, Inflater};
use super::{Chunk, Halves, Receive, Send, Shared, Stream};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Semaphore, mpsc};

/// Streams open at a time; 512 forwarded connections.
pub(super) const MAX_STREAMS: usize = 1024;
/// Received and not yet consumed bytes of one stream.
const STREAM_BUFFER: usize = 1 << 20;
/// The same of all streams of a connection.
const CONNECTION_BUFFER: usize = 8 << 20;
/// Control frames waiting to be written; a peer that makes us answer more does not read.
const MAX_CONTROL_WAITING: usize = 4096;

struct Inbound {
    chunks: mpsc::UnboundedSender<Chunk>,
    budget: Arc<Semaphore>,
}

pub(super) struct Reader<R> {
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
    pub fn new(io: R, opened: mpsc::Sender<Stream>, shared: Arc<Shared>) -> Self {
        Reader {
            io,
            buffer: BytesMut::with_capacity(64 << 10),
            inflater: Inflater::default(),
            deflater: Deflater::default(),
            inbound: HashMap::new(),
            budget: Arc::new(Semaphore::new(CONNECTION_BUFFER)),
            opened,
            shared,
        }
    }

    pub async fn run(mut self) {
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
