//! HTTP/1.1 requests without a body, spoken by hand: read and parsed at once, answered in one write, without a timer, a
//! queue or a buffer for each.
//!
//! Whatever is more than that (a body, an upgrade, a head that comes in pieces or is not by the book, HTTP/2) is left to
//! hyper with all that was not answered yet, for the rest of the connection: no request is ever looked at by both.

mod answer;
mod ask;

use crate::gateway::Shared;
use crate::peer::Peer;
use crate::proxy;
use crate::serve::{Limits, until};
use crate::wire::Wire;
use bytes::BytesMut;
use http::header::CONNECTION;
use http::{HeaderValue, Method};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

/// Bytes of one read. A head that is longer is left to hyper.
const READ: usize = 16 << 10;

thread_local! {
    /// Connections have a buffer only while something is in it.
    static ROOM: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// What is to be done with the connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Close,
    Hyper,
}

/// Serves until there is something for hyper, the client has enough, or `ended`.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    shared: &Arc<Shared>,
    peer: &Peer,
    limits: &Limits,
    ended: &watch::Receiver<bool>,
) -> io::Result<Next> {
    let mut waiting = ended.clone();
    let mut waiting = pin!(until(&mut waiting));
    let mut idle = Idle { patience: limits.head_timeout, since: Instant::now(), sleep: None };
    loop {
        idle.since = Instant::now();
        let Some(mut read) = poll_fn(|cx| poll_next(wire, &mut idle, waiting.as_mut(), cx)).await? else {
            return Ok(Next::Close);
        };
        while !read.is_empty() {
            let asked = if read.len() > limits.max_head { None } else { ask::parse(&mut read, limits.max_headers) };
            let Some(asked) = asked else {
                wire.unread(read);
                return Ok(Next::Hyper);
            };
            let response = proxy::respond(shared, peer, &asked.parts, &mut None, None).await;
            let enough = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"close");
            let close = asked.close || *ended.borrow() || response.headers().get(CONNECTION).is_some_and(enough);
            answer::write(wire, response, asked.parts.method == Method::HEAD, close).await?;
            if close {
                wire.shutdown().await?;
                return Ok(Next::Close);
            }
        }
    }
}

/// How long nothing was said. One timer for all of a connection's requests: it is looked at when it fires.
struct Idle {
    patience: Duration,
    since: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Idle {
    fn poll_over(&mut self, cx: &mut Context<'_>) -> bool {
        let Idle { patience, since, sleep } = self;
        let sleep = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(*since + *patience)));
        while sleep.as_mut().poll(cx).is_ready() {
            let until = *since + *patience;
            if until <= Instant::now() {
                return true;
            }
            sleep.as_mut().reset(until);
        }
        false
    }
}

/// What the client says next; `None` if it has closed, or has to.
fn poll_next<S: AsyncRead + Unpin>(
    wire: &mut Wire<S>,
    idle: &mut Idle,
    ending: Pin<&mut impl Future<Output = ()>>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<BytesMut>>> {
    let read = ROOM.with_borrow_mut(|room| {
        let mut room = ReadBuf::new(room);
        Pin::new(wire).poll_read(cx, &mut room).map_ok(|()| BytesMut::from(room.filled()))
    });
    match read {
        Poll::Ready(read) => Poll::Ready(read.map(|read| Some(read).filter(|read| !read.is_empty()))),
        Poll::Pending if ending.poll(cx).is_ready() || idle.poll_over(cx) => Poll::Ready(Ok(None)),
        Poll::Pending => Poll::Pending,
    }
}
