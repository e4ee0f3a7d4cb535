//! After a switch of protocols (WebSocket): bytes both ways until one side ends, or the gateway does.

use crate::gateway::Shared;
use crate::upstream::Lease;
use bytes::BytesMut;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

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
