//! The gateway as its user sees it.

use crate::access::AccessLog;
use crate::activator::{self, Sleepers};
use crate::config::Config;
use crate::counters::Counters;
use crate::follow;
use crate::metrics;
use crate::routing::Table;
use crate::serve::{self, Door, Limits};
use crate::tls::Sites;
use crate::upstream::{Settings, Upstreams};
use api::client::Client;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("use the gateway's listening socket")]
    Listener(#[source] io::Error),
    #[error("start the writer of the access log")]
    AccessLog(#[source] io::Error),
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
    sites: RwLock<Arc<Sites>>,
    sleepers: RwLock<Arc<Sleepers>>,
    pub body_timeout: Duration,
    pub connect_timeout: Duration,
    pub access: Option<AccessLog>,
    pub counters: Arc<Counters>,
    /// True when what still runs is to be cut.
    pub cut: watch::Sender<bool>,
}

impl Shared {
    /// `None` until the API was read for the first time.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub fn sites(&self) -> Arc<Sites> {
        self.sites.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub fn sleepers(&self) -> Arc<Sleepers> {
        self.sleepers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub fn set_sleepers(&self, sleepers: Sleepers) {
        *self.sleepers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(sleepers);
    }
    pub fn set_table(&self, table: Table, sites: Sites) {
        Counters::add(&self.counters.tables_total);
        *self.sites.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(sites);
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

    pub fn tls_addr(&self) -> Option<SocketAddr> {
        self.config.tls_listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.config.listener.local_addr()
    }

    /// Serves until `shutdown`, then drains and returns.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), GatewayError> {
        let Gateway { config, client, counters } = self;
        let limits = Limits::new(&config);
        let open = |listener: std::net::TcpListener| {
            listener.set_nonblocking(true).map_err(GatewayError::Listener)?;
            tokio::net::TcpListener::from_std(listener).map_err(GatewayError::Listener)
        };
        let announced = config.proxy_protocol;
        let mut doors = vec![Door { listener: open(config.listener)?, secure: false, announced }];
        if let Some(listener) = config.tls_listener {
            doors.push(Door { listener: open(listener)?, secure: true, announced });
        }
        if let Some(listener) = config.inner_listener {
            doors.push(Door { listener: open(listener)?, secure: false, announced: false });
        }
        let metrics_door = config.metrics_listener.map(open).transpose()?;
        let access = config.access_log.map(|sink| AccessLog::new(sink.format, sink.out, counters.clone()));
        let access = access.transpose().map_err(GatewayError::AccessLog)?;
        let shared = Arc::new(Shared {
            table: RwLock::new(None),
            sites: RwLock::default(),
            sleepers: RwLock::default(),
            body_timeout: config.body_timeout,
            connect_timeout: config.connect_timeout,
            access,
            counters: counters.clone(),
            cut: watch::Sender::new(false),
        });
        let telling = metrics_door.map(|listener| tokio::spawn(metrics::serve(listener, counters.clone())));
        let settings = Settings {
            counters,
            demand: config.demand,
            connect_timeout: config.connect_timeout,
            idle: config.upstream_idle,
        };
        let mut waking = JoinSet::new();
        if let Some(inside) = config.inside {
            // A share of its own, so that workloads take no place of clients outside.
            let places = activator::Places::new(config.max_connections);
            for listener in inside.listeners {
                waking.spawn(activator::run(shared.clone(), open(listener)?, inside.connect.clone(), places.clone()));
            }
        }
        let following =
            tokio::spawn(follow::run(shared.clone(), client, (config.node, config.class), Upstreams::new(settings)));
        serve::run(shared, doors, limits, shutdown).await;
        waking.shutdown().await;
        following.abort();
        if let Some(telling) = telling {
            telling.abort();
        }
        Ok(())
    }
}
