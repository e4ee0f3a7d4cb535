//! Port-forward: connections into a pod, many over one upgraded connection.
//!
//! Over SPDY the client opens two streams for each connection, `data` and `error`, tied by a `requestid` and carrying
//! the `port`. Over plain WebSocket channels there is one connection for each port of `?ports=`, on channels 2n (data)
//! and 2n+1 (error), each begun by the port in two bytes, little-endian.

use super::spdy::frame::ResetReason;
use super::spdy::{Connection, Stream};
use super::websocket::{self, Channel, Channels, Encoding};
use api::status::Status;
use api::streams::{Duplex, PodStreams, Target};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// SPDY frames in the messages of a WebSocket.
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
pub const WEBSOCKET_PROTOCOLS: &[&str] = &[TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];
pub const SPDY_PROTOCOLS: &[&str] = &["portforward.k8s.io"];

/// Streams that wait for their other half.
const MAX_WAITING: usize = 256;
const MAX_PORTS: usize = 32;
const BUFFER: usize = 32 << 10;

/// Which pod connections go to.
#[derive(Clone)]
pub struct Forward {
    pub streams: Arc<dyn PodStreams>,
    pub target: Target,
}

/// `ports=8080&ports=81` or `ports=8080,81`.
pub fn ports(query: &str) -> Result<Vec<u16>, Status> {
    let lists = query.split('&').filter_map(|pair| pair.split_once('=')).filter(|(key, _)| *key == "ports");
    let values = lists.flat_map(|(_, value)| value.split(','));
    let values = values.flat_map(|value| value.split("%2C")).flat_map(|value| value.split("%2c"));
    let ports: Vec<u16> = values
        .take(MAX_PORTS + 1)
        .map(|value| match value.parse() {
            Ok(0) | Err(_) => Err(Status::bad_request(format!("ports: {value:?} is not a port (1 to 65535)"))),
            Ok(port) => Ok(port),
        })
        .collect::<Result<_, _>>()?;
    match ports.len() {
        0 => Err(Status::bad_request("query parameter \"ports\" is required")),
        1..=MAX_PORTS => Ok(ports),
        _ => Err(Status::bad_request(format!("ports: at most {MAX_PORTS} can be forwarded at once"))),
    }
}

#[derive(Default)]
struct Pair {
    data: Option<Stream>,
    error: Option<Stream>,
}

impl Forward {
    pub async fn over_spdy<IO: AsyncRead + AsyncWrite + Send + 'static>(self, io: IO) {
        let mut connection = Connection::start(io);
        let mut waiting: HashMap<String, Pair> = HashMap::new();
        let mut forwards = JoinSet::new();
        while let Some(stream) = connection.accept().await {
            while forwards.try_join_next().is_some() {}
            let is_error = match stream.headers.get("streamtype") {
                "error" => true,
                "data" => false,
                _ => {
                    stream.send.reset(ResetReason::ProtocolError);
                    continue;
                }
            };
            // Old clients send no request id; their data stream follows its error stream.
            let id = match stream.headers.get("requestid") {
                "" if is_error => format!("#{}", stream.id),
                "" => format!("#{}", stream.id.saturating_sub(2)),
                id => id.to_owned(),
            };
            if waiting.len() >= MAX_WAITING && !waiting.contains_key(&id) {
                stream.send.reset(ResetReason::RefusedStream);
                continue;
            }
            let pair = waiting.entry(id.clone()).or_default();
            let place = if is_error { &mut pair.error } else { &mut pair.data };
            if place.is_some() {
                stream.send.reset(ResetReason::ProtocolError);
                continue;
            }
            *place = Some(stream);
            if pair.data.is_some()
                && pair.error.is_some()
                && let Some(Pair { data: Some(data), error: Some(error) }) = waiting.remove(&id)
            {
                forwards.spawn(self.clone().forward(data, error));
            }
        }
    }

    async fn connect(&self, port: &str) -> Result<Box<dyn Duplex>, String> {
        let failed =
            |why: &dyn std::fmt::Display| format!("error forwarding port {port} to pod {}: {why}", self.target.pod);
        match port.parse::<u16>() {
            Ok(0) | Err(_) => Err(failed(&"not a port (1 to 65535)")),
            Ok(port) => self.streams.port_forward(&self.target, port).await.map_err(|status| failed(&status)),
        }
    }

    async fn forward(self, data: Stream, mut error: Stream) {
        match self.connect(data.headers.get("port")).await {
            Err(message) => {
                let _ = error.send.send(message.into()).await;
                let _ = error.send.finish().await;
                let _ = data.send.finish().await;
            }
            Ok(duplex) => {
                relay(duplex, data).await;
                let _ = error.send.finish().await;
            }
        }
    }

    pub async fn over_channels<IO>(self, io: IO, protocol: &str, ports: Vec<u16>)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let encoding = if protocol.contains("base64") { Encoding::Base64 } else { Encoding::Binary };
        let channels = Channels::start(websocket::server(io).await, encoding);
        let gone = channels.gone();
        let mut inputs = Vec::new();
        let mut forwards = JoinSet::new();
        for (index, port) in ports.into_iter().enumerate() {
            let number = u8::try_from(2 * index).unwrap_or(u8::MAX - 1);
            let (data, error) = (channels.channel(number), channels.channel(number + 1));
            let (input, received) = mpsc::channel(8);
            inputs.push(input);
            let forward = self.clone();
            forwards.spawn(async move {
                data.send(&port.to_le_bytes()).await;
                error.send(&port.to_le_bytes()).await;
                match forward.connect(&port.to_string()).await {
                    Ok(duplex) => relay_channel(duplex, data, received).await,
                    Err(message) => {
                        error.send(message.as_bytes()).await;
                    }
                }
            });
        }
        let (mut incoming, ending) = channels.split();
        let mut reading = tokio::spawn({
            let gone = gone.clone();
            async move {
                while let Some((channel, payload)) = incoming.next().await {
                    // Odd channels are for errors; clients send nothing there.
                    if channel.is_multiple_of(2)
                        && let Some(input) = inputs.get(usize::from(channel / 2))
                    {
                        let _ = input.send(payload).await;
                    }
                }
                gone.cancel();
            }
        });
        let ended = tokio::select! {
            () = async { while forwards.join_next().await.is_some() {} } => true,
            () = gone.cancelled() => false,
        };
        if ended {
            let reading = async {
                let _ = (&mut reading).await;
            };
            ending.finish(reading).await;
        }
        gone.cancel();
        reading.abort();
    }
}

/// Reads some bytes; empty at the end or on error (a connection that breaks has ended).
async fn read_some(read: &mut ReadHalf<Box<dyn Duplex>>, buffer: &mut BytesMut) -> Bytes {
    buffer.reserve(BUFFER);
    match read.take(BUFFER as u64).read_buf(buffer).await {
        Ok(_) => buffer.split().freeze(),
        Err(_) => Bytes::new(),
    }
}

async fn relay(duplex: Box<dyn Duplex>, stream: Stream) {
    let (mut read, mut write) = tokio::io::split(duplex);
    let (mut receive, mut send) = (stream.receive, stream.send);
    let up = async move {
        while let Some(bytes) = receive.recv().await {
            if write.write_all(&bytes).await.is_err() || write.flush().await.is_err() {
                return;
            }
        }
        // The client has sent all it will; the pod may still answer.
        let _ = write.shutdown().await;
    };
    let down = async move {
        let mut buffer = BytesMut::new();
        loop {
            let bytes = tokio::select! {
                bytes = read_some(&mut read, &mut buffer) => bytes,
                () = send.closed() => return,
            };
            if bytes.is_empty() {
                let _ = send.finish().await;
                return;
            }
            if send.send(bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(up, down);
}

async fn relay_channel(duplex: Box<dyn Duplex>, data: Channel, mut received: mpsc::Receiver<Bytes>) {
    let (mut read, mut write) = tokio::io::split(duplex);
    let up = async move {
        while let Some(bytes) = received.recv().await {
            if write.write_all(&bytes).await.is_err() || write.flush().await.is_err() {
                return;
            }
        }
    };
    let down = async move {
        let mut buffer = BytesMut::new();
        loop {
            let bytes = read_some(&mut read, &mut buffer).await;
            if bytes.is_empty() || !data.send(&bytes).await {
                return;
            }
        }
    };
    // Channels cannot be half closed: when the pod has ended, it is over.
    tokio::select! {
        () = async { up.await; std::future::pending::<()>().await } => {}
        () = down => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_a_query() {
        assert_eq!(ports("ports=80&x=1&ports=443,8080").ok(), Some(vec![80, 443, 8080]));
        assert_eq!(ports("ports=80%2C81").ok(), Some(vec![80, 81]));
        for bad in ["", "ports=", "ports=0", "ports=65536", "ports=x"] {
            assert_eq!(ports(bad).expect_err(bad).code(), 400);
        }
        assert!(ports(&"ports=1&".repeat(40)).is_err());
    }
}
