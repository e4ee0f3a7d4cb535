//! A request's body on its way to an endpoint: streamed, kept aside up to a limit where it may be needed again (retries,
//! mirrors), and given up when its sender stalls.

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Sleep;

/// Bytes of a body that are kept for retries and mirrors; of larger ones nothing is.
pub const KEEP: usize = 64 << 10;

/// A whole body.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    pub bytes: Bytes,
    pub trailers: Option<HeaderMap>,
}

#[derive(Debug)]
pub struct RequestBody {
    kept: Option<Kept>,
    rest: Option<Incoming>,
    tee: Option<Box<Tee>>,
    limit: Option<Limit>,
    stall: Option<Stall>,
}

#[derive(Debug)]
struct Tee {
    bytes: BytesMut,
    trailers: Option<HeaderMap>,
    whole: watch::Sender<Option<Kept>>,
}

/// Bytes that may still come.
#[derive(Debug)]
struct Limit {
    left: u64,
}

#[derive(Debug)]
struct Stall {
    after: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl RequestBody {
    pub fn new(body: Incoming) -> RequestBody {
        RequestBody { kept: None, rest: Some(body), tee: None, limit: None, stall: None }
    }

    pub fn empty() -> RequestBody {
        RequestBody::again(&Kept::default())
    }

    /// The same body once more.
    pub fn again(kept: &Kept) -> RequestBody {
        let kept = Some(kept.clone()).filter(|kept| !kept.bytes.is_empty() || kept.trailers.is_some());
        RequestBody { kept, rest: None, tee: None, limit: None, stall: None }
    }

    /// An error when no byte came for this long while one could have been taken.
    pub fn stalls_after(mut self, after: Duration) -> RequestBody {
        self.stall = Some(Stall { after, waiting: None });
        self
    }

    /// An error when more bytes than this come.
    pub fn at_most(mut self, bytes: u64) -> RequestBody {
        self.limit = Some(Limit { left: bytes });
        self
    }

    /// What is answered becomes the whole body once all of it was sent on, if it was not larger than [`KEEP`].
    pub fn keep(&mut self) -> watch::Receiver<Option<Kept>> {
        let (whole, watching) = watch::channel(None);
        self.tee = Some(Box::new(Tee { bytes: BytesMut::new(), trailers: None, whole }));
        if self.is_end_stream() {
            self.tell();
        }
        watching
    }

    fn tell(&mut self) {
        if let Some(tee) = self.tee.take() {
            let Tee { bytes, trailers, whole } = *tee;
            whole.send_replace(Some(Kept { bytes: bytes.freeze(), trailers }));
        }
    }

    fn seen(&mut self, frame: &Frame<Bytes>) -> io::Result<()> {
        if let (Some(limit), Some(data)) = (&mut self.limit, frame.data_ref()) {
            let left = limit.left.checked_sub(data.len() as u64);
            limit.left = left.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        }
        let Some(tee) = &mut self.tee else { return Ok(()) };
        match frame.data_ref() {
            Some(data) if tee.bytes.len() + data.len() > KEEP => self.tee = None,
            Some(data) => tee.bytes.extend_from_slice(data),
            None => tee.trailers = frame.trailers_ref().cloned(),
        }
        Ok(())
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(stall) = &mut self.stall else { return false };
        let waiting = stall.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall.after)));
        waiting.as_mut().poll(cx).is_ready()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let body = self.get_mut();
        if let Some(kept) = &mut body.kept {
            if !kept.bytes.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut kept.bytes)))));
            }
            let trailers = kept.trailers.take();
            body.kept = None;
            if let Some(trailers) = trailers {
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
        }
        let Some(rest) = &mut body.rest else { return Poll::Ready(None) };
        match Pin::new(rest).poll_frame(cx) {
            Poll::Pending if body.poll_stalled(cx) => {
                body.rest = None;
                Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())))
            }
            Poll::Pending => Poll::Pending,
            Poll::Ready(frame) => {
                if let Some(stall) = &mut body.stall {
                    stall.waiting = None;
                }
                match frame {
                    None => {
                        body.rest = None;
                        body.tell();
                        Poll::Ready(None)
                    }
                    Some(Err(error)) => Poll::Ready(Some(Err(io::Error::other(error)))),
                    Some(Ok(frame)) => match body.seen(&frame) {
                        Err(error) => Poll::Ready(Some(Err(error))),
                        Ok(()) => {
                            if body.is_end_stream() {
                                body.tell();
                            }
                            Poll::Ready(Some(Ok(frame)))
                        }
                    },
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.kept.is_none() && self.rest.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.kept, &self.rest) {
            (Some(kept), _) if kept.trailers.is_none() => SizeHint::with_exact(kept.bytes.len() as u64),
            (Some(_), _) => SizeHint::default(),
            (None, Some(rest)) => rest.size_hint(),
            (None, None) => SizeHint::with_exact(0),
        }
    }
}
