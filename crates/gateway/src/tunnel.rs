//! After a switch of protocols (WebSocket): bytes both ways until one side ends, or the gateway does.

use crate::gateway::Shared;
use crate::proxy::random;
use crate::proxy_protocol;
use crate::routing::{Backend, Target, pick};
use crate::upstream::Lease;
use bytes::BytesMut;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Endpoints that are tried for one TLS connection.
const ATTEMPTS: usize = 3;

/// Joins the two once the client has its answer. `read` came from the endpoint already.
pub fn spawn(shared: &Arc<Shared>, upgrade: OnUpgrade, mut stream: TcpStream, read: BytesMut, lease: Lease) {
    let mut cut = shared.cut.subscribe();
    tokio::spawn(async move {
        let Ok(client) = upgrade.await else { return };
        let mut client = TokioIo::new(client);
        let _lease = lease;
        let copy = async {
            client.write_all(&read).await?;
            client.flush().await?;
            tokio::io::copy_bidirectional(&mut client, &mut stream).await
        };
        tokio::select! {
            result = copy => {
                if let Err(error) = result {
                    tracing::debug!("an upgraded connection ended: {error}");
                }
            }
            () = crate::serve::until(&mut cut) => {}
        }
    });
}

/// Joins a TLS client with a backend of its route, once that is connected; `read` is what the client said so
/// far, `from` its address, `to` the one that it connected to.
pub async fn join(
    client: TcpStream,
    read: &[u8],
    (from, to): (SocketAddr, SocketAddr),
    backends: &[Backend],
    total_weight: u64,
) -> io::Result<Joined> {
    let upstream = match pick(backends, total_weight, random()).map(|backend| &backend.target) {
        Some(Target::Upstream(upstream)) => upstream,
        Some(Target::Invalid(why)) => return Err(io::Error::new(io::ErrorKind::NotFound, &**why)),
        None => return Err(io::Error::new(io::ErrorKind::NotFound, "the route has no backend")),
    };
    let rules = upstream.group().rules.clone();
    let key = rules.key(from.ip(), &http::HeaderMap::new());
    let mut tried = None;
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the service has no ready endpoint"));
    for _ in 0..ATTEMPTS {
        let Some(endpoint) = upstream.pick(random(), key, tried.as_ref()).endpoint() else { break };
        result = endpoint.dial().await.map(|stream| (stream, Lease::take(endpoint.clone())));
        if result.is_ok() {
            break;
        }
        endpoint.failed();
        tried = Some(endpoint);
    }
    let (mut stream, lease) = result?;
    if let Some(version) = rules.proxy_protocol {
        stream.write_all(&proxy_protocol::header(version, from, to)).await?;
    }
    stream.write_all(read).await?;
    Ok(Joined { client, stream, _lease: lease })
}

/// A client and the backend that it talks to, still encrypted.
pub struct Joined {
    client: TcpStream,
    stream: TcpStream,
    _lease: Lease,
}

impl Joined {
    pub async fn run(mut self, shared: &Shared) {
        let mut cut = shared.cut.subscribe();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut self.client, &mut self.stream) => {}
            () = crate::serve::until(&mut cut) => {}
        }
    }
}
