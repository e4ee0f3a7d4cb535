//! Streams into pods: exec, attach and port-forward over WebSocket and SPDY/3.1.
//!
//! What callers use (the container has been chosen and access checked before):
//!
//! ```text
//! pub type Response = http::Response<http_body_util::Full<bytes::Bytes>>;
//! pub async fn exec<B>(request: Request<B>, streams: Arc<dyn PodStreams>, target: Target,
//!                      command: Vec<String>, wanted: Wanted) -> Response
//! pub async fn attach<B>(request: Request<B>, streams: Arc<dyn PodStreams>, target: Target,
//!                        wanted: Wanted) -> Response
//! pub async fn port_forward<B>(request: Request<B>, streams: Arc<dyn PodStreams>, target: Target) -> Response
//! ```
//!
//! `request` must be the one hyper handed out, so that `hyper::upgrade::on` works: serve connections with upgrades
//! (`serve_connection_with_upgrades`), HTTP/1.1. GET (WebSocket) and POST (SPDY) both come here. The response is
//! `101 Switching Protocols`, or a `Status` when the pod, the subprotocol or the request does not allow it; after
//! a 101 the pump runs in a task of its own.
//!
//! | client | exec, attach | port-forward |
//! |---|---|---|
//! | kubectl from 1.31 | WebSocket `v5.channel.k8s.io` | WebSocket `SPDY/3.1+portforward.k8s.io`: SPDY in messages |
//! | older, Go clients | SPDY `v4.channel.k8s.io` | SPDY `portforward.k8s.io` |
//! | KubeVirt's console and VNC ([`plain`]) | WebSocket, messages are the bytes | |
//! | Python, JavaScript, browsers | WebSocket `v4.channel.k8s.io`, base64 | WebSocket `v4.channel.k8s.io`, `?ports=` |

mod forward;
mod negotiate;
mod remote;
pub mod spdy;
mod websocket;

use api::status::{Reason, Status};
use api::streams::{Duplex, PodStreams, Target, Wanted};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use negotiate::{Offer, refuse};
use remote::{Begin, Purpose, Remote, Start};
use std::sync::Arc;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Upgraded connections at once.
const MAX_SESSIONS: usize = 1024;
static SESSIONS: Semaphore = Semaphore::const_new(MAX_SESSIONS);

/// A place among the sessions, or why there is none.
fn place() -> Result<SemaphorePermit<'static>, Status> {
    SESSIONS.try_acquire().map_err(|_| {
        let mut status = Status::new(
            Reason::TooManyRequests,
            format!("{MAX_SESSIONS} exec, attach and port-forward sessions are open; end some or try again later"),
        );
        status.retry_after_seconds = Some(5);
        status
    })
}

pub type Response = http::Response<Full<Bytes>>;

/// Ends the handler early with the response that says why.
macro_rules! or_refuse {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(status) => return refuse(&status),
        }
    };
}

/// `POST|GET .../pods/x/exec`.
pub async fn exec<B>(
    request: Request<B>,
    streams: Arc<dyn PodStreams>,
    target: Target,
    command: Vec<String>,
    wanted: Wanted,
) -> Response {
    if command.is_empty() {
        return refuse(&Status::bad_request("you must specify at least one command for the container"));
    }
    let start: Start = Box::new(|wanted| Box::pin(async move { streams.exec(&target, command, wanted).await }));
    remote(request, wanted, Purpose::Exec, start).await
}

/// `POST|GET .../pods/x/attach`.
pub async fn attach<B>(request: Request<B>, streams: Arc<dyn PodStreams>, target: Target, wanted: Wanted) -> Response {
    let start: Start = Box::new(|wanted| Box::pin(async move { streams.attach(&target, wanted).await }));
    remote(request, wanted, Purpose::Attach, start).await
}

async fn remote<B>(mut request: Request<B>, mut wanted: Wanted, purpose: Purpose, start: Start) -> Response {
    let offer = or_refuse!(Offer::read(request.headers(), request.version()));
    // With a terminal standard error comes merged.
    wanted.stderr &= !wanted.tty;
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return refuse(&Status::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    let known = match offer {
        Offer::WebSocket { .. } => remote::WEBSOCKET_PROTOCOLS,
        Offer::Spdy { .. } => remote::SPDY_PROTOCOLS,
    };
    let protocol = match offer.choose(known, Some("")) {
        Ok(protocol) => protocol,
        Err(response) => return *response,
    };
    let place = or_refuse!(place());
    // A program in a terminal begins when the size of the terminal is known, which comes over the stream. Everything
    // else begins now, so that what prevents it is a plain answer.
    let begin = if wanted.tty && purpose == Purpose::Exec {
        Begin::WithSize(start)
    } else {
        Begin::Started(Box::new(or_refuse!(start(wanted).await)))
    };
    let remote = Remote { begin, wanted, purpose, protocol };
    let upgrade = hyper::upgrade::on(&mut request);
    let response = offer.accept(protocol);
    tokio::spawn(async move {
        let _place = place;
        match upgrade.await {
            Ok(upgraded) => match offer {
                Offer::WebSocket { .. } => remote.over_websocket(TokioIo::new(upgraded)).await,
                Offer::Spdy { .. } => remote.over_spdy(TokioIo::new(upgraded)).await,
            },
            Err(error) => tracing::debug!(%error, "the client left before the stream began"),
        }
    });
    response
}

/// KubeVirt's name for a WebSocket whose messages are a byte stream.
const PLAIN: &str = "plain.kubevirt.io";

/// A byte stream both ways, begun with `open` once the request is seen to be a WebSocket's. Names of subprotocols that are not
/// known here are passed over, as browsers' clients of RFB send some (`binary`).
pub async fn plain<B>(
    mut request: Request<B>,
    open: impl Future<Output = Result<Box<dyn Duplex>, Status>>,
) -> Response {
    let offer = or_refuse!(Offer::read(request.headers(), request.version()));
    if matches!(offer, Offer::Spdy { .. }) {
        return refuse(&Status::bad_request("unable to upgrade: only websocket is spoken here"));
    }
    let protocol = match offer.choose(&[PLAIN, "binary", "binary.kubevirt.io"], Some("")) {
        Ok(protocol) => protocol,
        Err(response) => return *response,
    };
    let place = or_refuse!(place());
    let mut stream = or_refuse!(open.await);
    let upgrade = hyper::upgrade::on(&mut request);
    let response = offer.accept(protocol);
    tokio::spawn(async move {
        let _place = place;
        match upgrade.await {
            Ok(upgraded) => {
                let mut tunnel = websocket::Tunnel::new(websocket::server(TokioIo::new(upgraded)).await);
                let _ = tokio::io::copy_bidirectional(&mut tunnel, &mut stream).await;
            }
            Err(error) => tracing::debug!(%error, "the client left before the stream began"),
        }
    });
    response
}

/// `POST|GET .../pods/x/portforward`.
pub async fn port_forward<B>(mut request: Request<B>, streams: Arc<dyn PodStreams>, target: Target) -> Response {
    let offer = or_refuse!(Offer::read(request.headers(), request.version()));
    let (known, default) = match offer {
        Offer::WebSocket { .. } => (forward::WEBSOCKET_PROTOCOLS, None),
        Offer::Spdy { .. } => (forward::SPDY_PROTOCOLS, Some("")),
    };
    let protocol = match offer.choose(known, default) {
        Ok(protocol) => protocol,
        Err(response) => return *response,
    };
    let place = or_refuse!(place());
    let forward = forward::Forward { streams, target };
    let channels = match offer {
        Offer::WebSocket { .. } if protocol != forward::TUNNEL => {
            Some(or_refuse!(forward::ports(request.uri().query().unwrap_or_default())))
        }
        _ => None,
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let response = offer.accept(protocol);
    tokio::spawn(async move {
        let _place = place;
        match (upgrade.await, offer, channels) {
            (Ok(upgraded), Offer::WebSocket { .. }, Some(ports)) => {
                forward.over_channels(TokioIo::new(upgraded), protocol, ports).await;
            }
            (Ok(upgraded), Offer::WebSocket { .. }, None) => {
                let socket = websocket::server(TokioIo::new(upgraded)).await;
                forward.over_spdy(websocket::Tunnel::new(socket)).await;
            }
            (Ok(upgraded), Offer::Spdy { .. }, _) => forward.over_spdy(TokioIo::new(upgraded)).await,
            (Err(error), ..) => tracing::debug!(%error, "the client left before the stream began"),
        }
    });
    response
}
