//! The gateway as its user sees it.

use crate::config::Config;
use crate::counters::Counters;
use crate::follow;
use crate::routing::Table;
use crate::serve::{self, Limits};
use crate::upstream::{Settings, Upstreams};
use api::client::Client;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("use the gateway's listening socket")]
    Listener(#[source] io::Error),
}

/// Serves the Gateways of one class at one address.
pub struct Gateway {
    config: Config,
    client: Arc<dyn Client>,
    counters: Arc<Counters>,
}

/// What all requests see.
pub(crate) struct Shared {
    table: RwLock<Option<Arc<Table>>>,
    pub counters: Arc<Counters>,
    /// True when what still runs is to be cut.
    pub cut: watch::Sender<bool>,
}

impl Shared {
    /// `None` until the API was read for the first time.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub fn set_table(&self, table: Table) {
        Counters::add(&self.counters.tables_total);
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(table));
    }
}

impl Gateway {
    pub fn new(config: Config, client: Arc<dyn Client>) -> Gateway {
        Gateway { config, client, counters: Arc::default() }
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.config.listener.local_addr()
    }

    /// Serves until `shutdown`, then drains and returns.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), GatewayError> {
        let Gateway { config, client, counters } = self;
        let limits = Limits::new(&config);
        config.listener.set_nonblocking(true).map_err(GatewayError::Listener)?;
        let listener = tokio::net::TcpListener::from_std(config.listener).map_err(GatewayError::Listener)?;
        let (table, cut) = (RwLock::new(None), watch::Sender::new(false));
        let shared = Arc::new(Shared { table, counters: counters.clone(), cut });
        let settings = Settings { counters, connect_timeout: config.connect_timeout, idle: config.upstream_idle };
        let following = tokio::spawn(follow::run(shared.clone(), client, config.class, Upstreams::new(settings)));
        serve::run(shared, listener, limits, shutdown).await;
        following.abort();
        Ok(())
    }
}
