//! Who is at the other end of a client's connection.

use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
pub struct Peer {
    pub client: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
    /// Came over TLS.
    pub secure: bool,
    /// The server name that TLS was made for; empty if the client named none.
    pub name: String,
    /// The listener whose certificate and demands held.
    pub listener: Option<Arc<str>>,
    /// The client's, as endpoints are told it.
    pub address: String,
}

impl Peer {
    pub fn new(client: SocketAddr, local: SocketAddr, secure: bool) -> Peer {
        Peer { client, local, secure, name: String::new(), listener: None, address: client.ip().to_string() }
    }
}
