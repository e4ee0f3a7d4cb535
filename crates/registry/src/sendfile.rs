//! Blobs go from the page cache to the socket without passing through this process.
//!
//! hyper writes bodies as bytes. A blob's body is made of slices of one array that is never read ([`placeholder`]); the
//! connection ([`Connection`]) knows them by their address and sends as many bytes of the file in their place. Responses
//! of a connection are written in order, so the files wait in a queue. A piece is only offered once its ends are in the
//! page cache, or a blocking thread has read it in: a slow disk stalls no async thread.

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use rustix::fs::sendfile;
use rustix::io::{ReadWriteFlags, preadv2};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const PIECE: usize = 1 << 20;
static PLACE: [u8; PIECE] = [0; PIECE];

fn placeholder(length: usize) -> Bytes {
    Bytes::from_static(PLACE.get(..length).unwrap_or(&PLACE))
}

fn is_placeholder(bytes: &[u8]) -> bool {
    !bytes.is_empty() && PLACE.as_ptr_range().contains(&bytes.as_ptr())
}

/// A file's part that is to be sent.
struct Part {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

/// The parts that one connection has yet to send.
#[derive(Clone, Default)]
pub(crate) struct Parts(Arc<Mutex<VecDeque<Part>>>);

impl Parts {
    /// The body of a response of this connection. It has to be sent: the queue keeps its place.
    pub fn body(&self, file: File, offset: u64, length: u64) -> FileBody {
        let file = Arc::new(file);
        if length > 0
            && let Ok(mut parts) = self.0.lock()
        {
            parts.push_back(Part { file: file.clone(), offset, left: length });
        }
        FileBody { file, next: offset, left: length, reading: None }
    }
}

pub(crate) struct FileBody {
    file: Arc<File>,
    next: u64,
    left: u64,
    /// A piece on its way from the disk.
    reading: Option<JoinHandle<io::Result<()>>>,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let length = self.left.min(PIECE as u64);
        if length == 0 {
            return Poll::Ready(None);
        }
        if self.reading.is_none() && !is_cached(&self.file, self.next, length) {
            let (file, offset) = (self.file.clone(), self.next);
            self.reading = Some(tokio::task::spawn_blocking(move || read_in(&file, offset, length)));
        }
        if let Some(reading) = &mut self.reading {
            let done = ready!(Pin::new(reading).poll(context)).map_err(io::Error::other).flatten();
            self.reading = None;
            if let Err(error) = done {
                return Poll::Ready(Some(Err(error)));
            }
        }
        self.next += length;
        self.left -= length;
        Poll::Ready(Some(Ok(Frame::data(placeholder(length as usize)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Whether both ends of a piece are in the page cache. File systems that cannot tell are read by blocking threads.
fn is_cached(file: &File, offset: u64, length: u64) -> bool {
    [offset, offset + length - 1].into_iter().all(|at| {
        let mut byte = [0u8; 1];
        matches!(preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT), Ok(1))
    })
}

fn read_in(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let mut buffer = vec![0u8; 128 * 1024];
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let wanted = (end - at).min(buffer.len() as u64) as usize;
        let slot = buffer.get_mut(..wanted).unwrap_or_default();
        file.read_exact_at(slot, at)?;
        at += wanted as u64;
    }
    Ok(())
}

/// A client's connection that sends files where it is given placeholders.
pub(crate) struct Connection {
    stream: TcpStream,
    parts: Parts,
}

impl Connection {
    pub fn new(stream: TcpStream, parts: Parts) -> Connection {
        Connection { stream, parts }
    }

    fn poll_sendfile(&self, context: &mut Context<'_>, length: usize) -> Poll<io::Result<usize>> {
        let mut parts = self.parts.0.lock().map_err(|_| io::Error::other("the queue of files is poisoned"))?;
        let part = parts.front_mut().ok_or_else(|| io::Error::other("no file is to be sent"))?;
        let length = part.left.min(length as u64) as usize;
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            let (file, offset) = (&part.file, &mut part.offset);
            let send = || sendfile(&self.stream, file, Some(offset), length).map_err(io::Error::from);
            match self.stream.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Poll::Ready(Err(error)),
                // The file is shorter than it was.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(sent) => {
                    part.left = part.left.saturating_sub(sent as u64);
                    if part.left == 0 {
                        parts.pop_front();
                    }
                    return Poll::Ready(Ok(sent));
                }
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if is_placeholder(bytes) {
            return this.poll_sendfile(context, bytes.len());
        }
        Pin::new(&mut this.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let plain = slices.iter().position(|s| is_placeholder(s)).unwrap_or(slices.len());
        let (before, after) = slices.split_at(plain);
        match after.first() {
            Some(place) if before.iter().all(|s| s.is_empty()) => this.poll_sendfile(context, place.len()),
            _ => Pin::new(&mut this.stream).poll_write_vectored(context, before),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
