//! Who is at the other end of a client's connection.

use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
pub struct Peer {
    pub client: SocketAddr,
    /// Came over TLS.
    pub secure: bool,
    /// The server name that TLS was made for; empty if the client named none.
    pub name: String,
    /// The listener whose certificate and demands held.
    pub listener: Option<Arc<str>>,
}
