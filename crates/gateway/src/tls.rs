//! TLS: which listener a server name belongs to, with which certificate, or where it is passed on to, still encrypted.
//!
//! `build` makes the [`Sites`] from Gateways, Ingresses, TLSRoutes and Secrets; `certificates` reads the latter. A change
//! replaces the sites as a whole: connections keep what they began with.

mod build;
mod certificates;

pub use build::{Cache, build};

use crate::peer::Peer;
use crate::routing::{Backend, HostPattern};
use bytes::BytesMut;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// Bytes in which a client must have said hello.
const MAX_HELLO: usize = 64 << 10;
/// A fatal alert: unrecognized_name (RFC 6066, section 3).
pub const UNKNOWN_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// What is done with connections for a name.
#[derive(Debug)]
pub enum Site {
    Terminate {
        /// `namespace/gateway/listener`.
        listener: Arc<str>,
        config: Arc<ServerConfig>,
    },
    Pass {
        backends: Vec<Backend>,
        total_weight: u64,
    },
}

/// All names.
#[derive(Debug, Default)]
pub struct Sites {
    exact: HashMap<Box<str>, Arc<Site>>,
    wildcard: HashMap<Box<str>, Arc<Site>>,
    any: Option<Arc<Site>>,
}

impl Sites {
    /// Whoever has a name first keeps it.
    fn add(&mut self, host: HostPattern, site: Arc<Site>) {
        match host {
            HostPattern::Any => drop(self.any.get_or_insert(site)),
            HostPattern::Wildcard(suffix) => drop(self.wildcard.entry(suffix).or_insert(site)),
            HostPattern::Exact(name) => drop(self.exact.entry(name).or_insert(site)),
        }
    }

    /// The most specific site for a name in lower case; an empty one is no name.
    pub fn find(&self, name: &str) -> Option<&Arc<Site>> {
        if let Some(site) = self.exact.get(name) {
            return Some(site);
        }
        let mut rest = name;
        while let Some((_, suffix)) = rest.split_once('.') {
            if let Some(site) = self.wildcard.get(suffix) {
                return Some(site);
            }
            rest = suffix;
        }
        self.any.as_ref()
    }

    /// Whether a request for `host` may come over this connection: what the client was asked for there must have been
    /// asked for here.
    pub fn same_listener(&self, peer: &Peer, host: &str) -> bool {
        if peer.name == host {
            return true;
        }
        match self.find(host).map(Arc::as_ref) {
            Some(Site::Terminate { listener, .. }) => peer.listener.as_ref() == Some(listener),
            Some(Site::Pass { .. }) => false,
            // Nobody serves it; that is said with a 404.
            None => true,
        }
    }
}

/// Reads until the client has said which name it wants. `read` keeps the bytes.
pub async fn hello(stream: &mut TcpStream, read: &mut BytesMut) -> io::Result<String> {
    let mut acceptor = Acceptor::default();
    let mut fed = 0;
    loop {
        let mut new = read.get(fed..).unwrap_or_default();
        while !new.is_empty() {
            match acceptor.read_tls(&mut new)? {
                0 => break,
                count => fed += count,
            }
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().unwrap_or_default().to_ascii_lowercase();
                    return Ok(name.trim_end_matches('.').to_owned());
                }
                Ok(None) => {}
                Err((error, _)) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
        if read.len() > MAX_HELLO {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a TLS hello that is too long"));
        }
        if stream.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
