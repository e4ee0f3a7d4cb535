//! A client's connection as bytes: what was read from it to see who it is comes first, and a client that takes nothing for
//! too long is let go.

use bytes::{Buf, BytesMut};
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

#[derive(Debug)]
pub struct Wire<S> {
    /// Read already.
    front: BytesMut,
    stream: S,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Wire<S> {
    /// `patience` is how long the client may take nothing of what it is sent.
    pub fn new(stream: S, front: BytesMut, patience: Duration) -> Wire<S> {
        Wire { front, stream, patience, stalled: None }
    }

    /// These bytes are read again.
    pub fn unread(&mut self, mut bytes: BytesMut) {
        bytes.unsplit(std::mem::take(&mut self.front));
        self.front = bytes;
    }

    pub fn into_parts(self) -> (S, BytesMut) {
        (self.stream, self.front)
    }

    /// Passes the outcome of a write on, and ends the connection when it has been pending for too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            if self.stalled.is_some() {
                self.stalled = None;
            }
            return outcome;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if wire.front.is_empty() {
            return Pin::new(&mut wire.stream).poll_read(cx, into);
        }
        let count = wire.front.len().min(into.remaining());
        into.put_slice(wire.front.get(..count).unwrap_or_default());
        wire.front.advance(count);
        if wire.front.is_empty() {
            wire.front = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        let outcome = Pin::new(&mut wire.stream).poll_write(cx, bytes);
        wire.watch(cx, outcome)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        let outcome = Pin::new(&mut wire.stream).poll_write_vectored(cx, slices);
        wire.watch(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let outcome = Pin::new(&mut wire.stream).poll_flush(cx);
        wire.watch(cx, outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let outcome = Pin::new(&mut wire.stream).poll_shutdown(cx);
        wire.watch(cx, outcome)
    }
}
