//! The two ways Kubernetes uses WebSocket: numbered channels, one byte (or one digit and base64) before each message;
//! and as a tunnel for a byte stream.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};
use tokio_util::sync::CancellationToken;

/// Longest message that is read. Clients send pieces of 32 KiB or so.
const MAX_MESSAGE: usize = 4 << 20;
/// Most payload put into one message.
const MAX_PAYLOAD: usize = 64 << 10;
const PING_EVERY: Duration = Duration::from_secs(20);
const LINGER: Duration = Duration::from_secs(5);
const WAITING: usize = 8;

/// Server end over an upgraded connection.
pub async fn server<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

/// How a message carries its channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// First byte is the channel.
    Binary,
    /// First character is the channel's digit, the rest base64.
    Base64,
}

impl Encoding {
    pub fn encode(self, channel: u8, data: &[u8]) -> Message {
        match self {
            Encoding::Binary => {
                let mut message = BytesMut::with_capacity(data.len() + 1);
                message.put_u8(channel);
                message.put_slice(data);
                Message::Binary(message.freeze())
            }
            Encoding::Base64 => Message::text(format!("{channel}{}", STANDARD.encode(data))),
        }
    }

    /// Channel and payload; `None` for a message without a channel, or one that is not base64 where it should be.
    pub fn decode(self, mut message: Bytes) -> Option<(u8, Bytes)> {
        if message.is_empty() {
            return None;
        }
        let payload = message.split_off(1);
        let channel = *message.first()?;
        match self {
            Encoding::Binary => Some((channel, payload)),
            Encoding::Base64 => {
                let digit = channel.checked_sub(b'0').filter(|digit| *digit <= 9)?;
                Some((digit, STANDARD.decode(&payload).ok()?.into()))
            }
        }
    }
}

/// Sends on one channel.
#[derive(Clone)]
pub struct Channel {
    number: u8,
    encoding: Encoding,
    messages: mpsc::Sender<Message>,
}

impl Channel {
    /// False when the client is gone.
    pub async fn send(&self, data: &[u8]) -> bool {
        if data.is_empty() {
            return self.messages.send(self.encoding.encode(self.number, data)).await.is_ok();
        }
        for piece in data.chunks(MAX_PAYLOAD) {
            if self.messages.send(self.encoding.encode(self.number, piece)).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// A WebSocket with channels: a task writes what the channels send, the caller reads.
pub struct Channels {
    encoding: Encoding,
    messages: mpsc::Sender<Message>,
    reader: Pin<Box<dyn Stream<Item = Bytes> + Send>>,
    writer: tokio::task::JoinHandle<()>,
    gone: CancellationToken,
}

impl Channels {
    pub fn start<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        socket: WebSocketStream<IO>,
        encoding: Encoding,
    ) -> Self {
        let (messages, outgoing) = mpsc::channel(WAITING);
        let (sink, stream) = socket.split();
        let gone = CancellationToken::new();
        let writer = tokio::spawn(write_messages(sink, outgoing, gone.clone()));
        let reader = stream
            .take_while(|message| std::future::ready(matches!(message, Ok(message) if !message.is_close())))
            .filter_map(|message| {
                std::future::ready(match message {
                    Ok(Message::Binary(bytes)) => Some(bytes),
                    Ok(Message::Text(text)) => Some(text.into()),
                    _ => None,
                })
            });
        Channels { encoding, messages, reader: Box::pin(reader), writer, gone }
    }

    pub fn channel(&self, number: u8) -> Channel {
        Channel { number, encoding: self.encoding, messages: self.messages.clone() }
    }

    /// Cancelled when writing failed.
    pub fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// The parts for a reader of its own, and what ends the connection in order.
    pub fn split(self) -> (Incoming, Ending) {
        let ending = Ending { writer: self.writer, messages: self.messages };
        (Incoming { encoding: self.encoding, reader: self.reader }, ending)
    }
}

pub struct Incoming {
    encoding: Encoding,
    reader: Pin<Box<dyn Stream<Item = Bytes> + Send>>,
}

impl Incoming {
    /// Channel and payload of the next message that has them; `None` when the client is gone.
    pub async fn next(&mut self) -> Option<(u8, Bytes)> {
        loop {
            if let Some(message) = self.encoding.decode(self.reader.next().await?) {
                return Some(message);
            }
        }
    }
}

pub struct Ending {
    writer: tokio::task::JoinHandle<()>,
    messages: mpsc::Sender<Message>,
}

impl Ending {
    /// Writes what is waiting and closes; all channels must have been dropped. `reading` ends when the client has
    /// closed too.
    pub async fn finish(self, reading: impl Future<Output = ()>) {
        drop(self.messages);
        let _ = tokio::time::timeout(LINGER * 6, self.writer).await;
        let _ = tokio::time::timeout(LINGER, reading).await;
    }
}

async fn write_messages<S>(mut sink: S, mut outgoing: mpsc::Receiver<Message>, gone: CancellationToken)
where
    S: Sink<Message> + Unpin,
{
    let mut pings = tokio::time::interval_at(tokio::time::Instant::now() + PING_EVERY, PING_EVERY);
    loop {
        let message = tokio::select! {
            biased;
            () = gone.cancelled() => return,
            message = outgoing.recv() => message,
            _ = pings.tick() => Some(Message::Ping(Bytes::new())),
        };
        let sent = match message {
            Some(message) => sink.send(message).await,
            None => {
                let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                let _ = sink.send(Message::Close(Some(close))).await;
                return;
            }
        };
        if sent.is_err() {
            gone.cancel();
            return;
        }
    }
}

/// A WebSocket as a byte stream: what is written goes out in binary messages, the payload of those that come is read.
pub struct Tunnel<IO> {
    socket: WebSocketStream<IO>,
    rest: Bytes,
}

impl<IO> Tunnel<IO> {
    pub fn new(socket: WebSocketStream<IO>) -> Self {
        Tunnel { socket, rest: Bytes::new() }
    }
}

fn io_error(error: tokio_tungstenite::tungstenite::Error) -> io::Error {
    match error {
        tokio_tungstenite::tungstenite::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let size = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(size));
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(cx)).map_err(io_error)?;
        let piece = buf.get(..buf.len().min(MAX_PAYLOAD)).unwrap_or(buf);
        self.socket.start_send_unpin(Message::Binary(Bytes::copy_from_slice(piece))).map_err(io_error)?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_close_unpin(cx).map_err(io_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn channels_are_one_byte_or_one_digit() {
        assert_eq!(Encoding::Binary.encode(1, b"ab"), Message::Binary(Bytes::from_static(b"\x01ab")));
        assert_eq!(Encoding::Base64.encode(1, b"ab"), Message::text("1YWI="));
        assert_eq!(Encoding::Base64.decode(Bytes::from_static(b"0YWI=")), Some((0, Bytes::from_static(b"ab"))));
        assert_eq!(Encoding::Base64.decode(Bytes::from_static(b"xYWI=")), None);
        assert_eq!(Encoding::Binary.decode(Bytes::new()), None);
    }

    proptest! {
        #[test]
        fn never_panics_and_round_trips(data in prop::collection::vec(any::<u8>(), 0..50), channel in 0..10u8) {
            let _ = Encoding::Binary.decode(data.clone().into());
            let _ = Encoding::Base64.decode(data.clone().into());
            for encoding in [Encoding::Binary, Encoding::Base64] {
                let message = encoding.encode(channel, &data).into_data();
                prop_assert_eq!(encoding.decode(message), Some((channel, Bytes::from(data.clone()))));
            }
        }
    }

    #[tokio::test]
    async fn a_tunnel_is_a_byte_stream() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (near, far) = tokio::io::duplex(4096);
        let mut client = Tunnel::new(WebSocketStream::from_raw_socket(near, Role::Client, None).await);
        let mut server = Tunnel::new(server(far).await);
        let echo = tokio::spawn(async move {
            let mut buffer = [0; 1000];
            loop {
                let size = server.read(&mut buffer).await.expect("read");
                if size == 0 {
                    return;
                }
                server.write_all(&buffer[..size]).await.expect("written");
                server.flush().await.expect("flushed");
            }
        });
        let sent: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        let (mut read, mut write) = tokio::io::split(&mut client);
        let expected = sent.clone();
        let writing = async {
            write.write_all(&sent).await.expect("written");
            write.flush().await.expect("flushed");
        };
        let mut got = vec![0; expected.len()];
        let reading = async { read.read_exact(&mut got).await.expect("read") };
        tokio::join!(writing, reading);
        assert_eq!(got, expected);
        client.shutdown().await.expect("closed");
        echo.await.expect("no panic");
    }
}
