//! Streams into pods: exec, attach and port-forward over WebSocket and SPDY/3.1.
//!
//! What callers use (the container has been chosen and access checked before):
//!
//! ```text
//! pub type Response = hyper::Response<http_body_util::Full<bytes::Bytes>>;
//! pub async fn exec<B>(request: hyper::Request<B>, streams: Arc<dyn PodStreams>, target: Target,
//!                      command: Vec<String>, wanted: Wanted) -> Response
//! pub async fn attach<B>(request: hyper::Request<B>, streams: Arc<dyn PodStreams>, target: Target,
//!                        wanted: Wanted) -> Response
//! pub async fn port_forward<B>(request: hyper::Request<B>, streams: Arc<dyn PodStreams>, target: Target) -> Response
//! ```
//!
//! `request` must be the one hyper handed out, so that `hyper::upgrade::on` works: serve connections with upgrades
//! (`serve_connection_with_upgrades`), HTTP/1.1. GET (WebSocket) and POST (SPDY) both come here. The response is
//! `101 Switching Protocols`, or a `Status` when the pod, the subprotocol or the request does not allow it; after
//! a 101 the pump runs in a task of its own.
