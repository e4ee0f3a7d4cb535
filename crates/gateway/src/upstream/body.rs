//! Bodies on their way: the request's pumped to the endpoint, the response's read from it as the client takes it.
//! Nothing is buffered beyond one read; whoever is slow slows the other side.

use super::endpoint::{Connection, Lease};
use super::framing::{Framing, may_trail};
use super::http1::poll_read;
use super::request_body::RequestBody;
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// A request's body being sent.
#[derive(Debug)]
pub struct Pump {
    body: RequestBody,
    chunked: bool,
    queue: VecDeque<Bytes>,
    ended: bool,
    touched: bool,
    client_failed: bool,
    given_up: bool,
}

impl Pump {
    pub fn new(body: RequestBody, chunked: bool) -> Pump {
        let (queue, ended, touched) = (VecDeque::new(), false, false);
        Pump { body, chunked, queue, ended, touched, client_failed: false, given_up: false }
    }

    /// The error that `poll` answered was the client's.
    pub fn client_failed(&self) -> bool {
        self.client_failed
    }

    /// The endpoint takes no more.
    pub fn give_up(&mut self) {
        self.given_up = true;
    }

    /// The body, if nothing was taken of it.
    pub fn untouched(self) -> Option<RequestBody> {
        (!self.touched).then_some(self.body)
    }

    pub fn poll(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.given_up {
            return Poll::Pending;
        }
        loop {
            while let Some(front) = self.queue.front_mut() {
                match Pin::new(&mut *stream).poll_write(cx, front) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(count)) => {
                        bytes::Buf::advance(front, count);
                        if front.is_empty() {
                            self.queue.pop_front();
                        }
                    }
                }
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {
                    self.end(None);
                }
                Poll::Ready(Some(Err(error))) => {
                    self.client_failed = true;
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Some(Ok(frame))) => {
                    self.touched = true;
                    match frame.into_data() {
                        Ok(data) => self.push(data),
                        Err(frame) => self.end(frame.into_trailers().ok()),
                    }
                }
            }
        }
    }

    fn end(&mut self, trailers: Option<HeaderMap>) {
        self.ended = true;
        if !self.chunked {
            return;
        }
        let mut end = b"0\r\n".to_vec();
        for (name, value) in trailers.iter().flatten().filter(|(name, _)| may_trail(name)) {
            end.extend_from_slice(name.as_str().as_bytes());
            end.extend_from_slice(b": ");
            end.extend_from_slice(value.as_bytes());
            end.extend_from_slice(b"\r\n");
        }
        end.extend_from_slice(b"\r\n");
        self.queue.push_back(end.into());
    }

    fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        if self.chunked {
            self.queue.push_back(format!("{:x}\r\n", data.len()).into());
            self.queue.push_back(data);
            self.queue.push_back(Bytes::from_static(b"\r\n"));
        } else {
            self.queue.push_back(data);
        }
    }
}

/// A response's body. When it has ended cleanly the connection is kept for the next request; when it is dropped before,
/// the connection is closed.
#[derive(Debug)]
pub struct UpstreamBody {
    open: Option<(Connection, Lease)>,
    framing: Framing,
    keep: bool,
    pump: Option<Pump>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// The whole body was there with the head.
    whole: Option<Bytes>,
}

impl UpstreamBody {
    pub(super) fn new(
        connection: Connection,
        lease: Lease,
        framing: Framing,
        keep: bool,
        pump: Option<Pump>,
    ) -> UpstreamBody {
        let open = Some((connection, lease));
        let mut body = UpstreamBody { open, framing, keep, pump, deadline: None, whole: None };
        body.take_whole();
        body
    }

    /// Small bodies come in one read with their head; then the connection is free at once.
    fn take_whole(&mut self) {
        let (Framing::Length(left), Some((connection, _)), None) = (&self.framing, &mut self.open, &self.pump) else {
            return;
        };
        if *left == 0 {
            // A switch of protocols has no body, but the connection is still of use.
            if self.keep {
                self.finish();
            }
            return;
        }
        if connection.read.len() as u64 >= *left
            && let Ok(Some(bytes)) = self.framing.take(&mut connection.read)
        {
            self.whole = Some(bytes);
            self.finish();
        }
    }

    /// Time by which all of it must have come.
    pub fn set_deadline(&mut self, deadline: tokio::time::Instant) {
        if self.open.is_some() {
            self.deadline = Some(Box::pin(tokio::time::sleep_until(deadline)));
        }
    }

    /// The bare connection after a switch of protocols, with what was already read from it.
    pub fn into_tunnel(mut self) -> Option<(TcpStream, BytesMut, Lease)> {
        let (connection, lease) = self.open.take()?;
        Some((connection.stream, connection.read, lease))
    }

    fn finish(&mut self) {
        if let Some((connection, lease)) = self.open.take()
            && self.keep
            && self.pump.is_none()
        {
            lease.endpoint().keep(connection);
        }
    }

    fn poll_read_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(bytes) = self.whole.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        let Some((connection, _)) = &mut self.open else { return Poll::Ready(None) };
        if let Some(pump) = &mut self.pump {
            match pump.poll(&mut connection.stream, cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.pump = None,
                Poll::Ready(Err(_)) => pump.give_up(),
            }
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
        }
        loop {
            match self.framing.take(&mut connection.read) {
                Err(error) => return Poll::Ready(Some(Err(error))),
                Ok(Some(bytes)) => {
                    if matches!(self.framing, Framing::Length(0)) {
                        self.finish();
                    }
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Ok(None) => {}
            }
            if self.framing.is_done() {
                let trailers = self.framing.take_trailers();
                self.finish();
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
            match poll_read(connection, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) if matches!(self.framing, Framing::Close) => {
                    self.open = None;
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(0)) => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let body = self.get_mut();
        let result = body.poll_read_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &result {
            tracing::debug!("a response was cut short: {error}");
            body.open = None;
        }
        result
    }

    fn is_end_stream(&self) -> bool {
        self.whole.is_none() && self.open.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.whole, &self.framing) {
            (Some(bytes), _) => SizeHint::with_exact(bytes.len() as u64),
            (None, Framing::Length(left)) => SizeHint::with_exact(*left),
            _ => SizeHint::default(),
        }
    }
}
