//! The server as the app sees it: configured once, usable in process at once, serving when told to.

use crate::auth::TokenIssuer;
use crate::core::Core;
use crate::http::{self, Service};
use crate::kinds::Kinds;
use crate::local::Local;
use crate::pki::{Pki, PkiError};
use crate::ranges::ServiceRanges;
use crate::{bootstrap, custom, history};
use api::client::Client;
use api::kind::Kind;
use api::status::Status;
use api::streams::PodStreams;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use store::Store;
use tokio_util::sync::CancellationToken;

pub struct Config {
    /// Bound already: by the app, in the host's network namespace.
    pub listener: TcpListener,
    /// Keys go to `data_dir/pki`.
    pub data_dir: PathBuf,
    /// The address clients reach the API by; in the certificate and in kubeconfigs.
    pub advertise: SocketAddr,
    pub store: Arc<dyn Store>,
    /// `cluster.local`
    pub cluster_domain: String,
    /// `10.43.0.0/16`
    pub service_cidr: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("service range {0:?}: must be an IPv4 CIDR between /8 and /27, like 10.43.0.0/16")]
    ServiceRange(String),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("service account tokens: {0}")]
    Tokens(#[from] crate::auth::TokenError),
    #[error("prepare initial objects: {0}")]
    Bootstrap(#[from] Status),
    #[error("listening socket")]
    Listener(#[source] std::io::Error),
    #[error("the server serves already")]
    Serving,
}

pub struct Server {
    core: Arc<Core>,
    pki: Arc<Pki>,
    listener: Mutex<Option<TcpListener>>,
    advertise: SocketAddr,
    stop: CancellationToken,
    /// Compaction, custom kinds: they run from the start, for in-process clients too.
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

impl Server {
    /// Keys, certificates, initial objects. After this [`Server::client`] works; nothing listens yet.
    pub async fn new(config: Config) -> Result<Arc<Server>, ServerError> {
        let kinds = api::kinds::builtin().into_iter().map(Arc::new).collect();
        Self::with_kinds(config, kinds).await
    }

    pub(crate) async fn with_kinds(config: Config, kinds: Vec<Arc<Kind>>) -> Result<Arc<Server>, ServerError> {
        let services = ServiceRanges::parse(&config.service_cidr)
            .ok_or_else(|| ServerError::ServiceRange(config.service_cidr.clone()))?;
        let domain = &config.cluster_domain;
        let advertise = reachable(config.advertise, &config.listener).map_err(ServerError::Listener)?;
        let names = crate::pki::server_names(advertise.ip(), services.api_address(), domain);
        let pki = Arc::new(Pki::open(&config.data_dir.join("pki"), names, SystemTime::now())?);
        let tokens = TokenIssuer::new(&pki.token_key(), format!("https://kubernetes.default.svc.{domain}"))?;
        let core = Arc::new(Core::new(config.store.clone(), Kinds::new(kinds), services, tokens));
        custom::load(&core).await?;
        bootstrap::run(&core, advertise).await?;
        let tasks = vec![
            tokio::spawn(history::run(config.store.clone())),
            tokio::spawn(custom::run(core.clone())),
            tokio::spawn(renew(pki.clone())),
        ];
        Ok(Arc::new(Server {
            core,
            pki,
            listener: Mutex::new(Some(config.listener)),
            advertise,
            stop: CancellationToken::new(),
            tasks,
        }))
    }

    /// The API for this process; works before and while the server listens.
    pub fn client(&self) -> Arc<dyn Client> {
        Arc::new(Local::new(self.core.clone()))
    }

    /// How logs, exec, attach and port-forward reach pods; until then they are refused.
    pub fn set_streams(&self, streams: Arc<dyn PodStreams>) {
        self.core.set_streams(streams);
    }

    /// Who answers what the network is asked; until then that is refused.
    pub fn set_inspect(&self, inspect: Arc<dyn api::inspect::Inspect>) {
        self.core.set_inspect(inspect);
    }

    /// What `/metrics` tells beside the server's own counters.
    pub fn set_metrics(&self, source: Arc<dyn api::metrics::Source>) {
        self.core.set_metrics(source);
    }

    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// `https://ADDRESS:PORT`
    pub fn url(&self) -> String {
        format!("https://{}", self.advertise)
    }

    /// Writes the administrator's kubeconfig and keeps it up to date.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<(), ServerError> {
        Ok(self.pki.write_kubeconfig(path, &self.url())?)
    }

    /// Serves until `shutdown` is ready, then ends watches, lets requests finish and returns.
    pub async fn serve(&self, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServerError> {
        let listener = self.listener.lock().unwrap_or_else(|e| e.into_inner()).take().ok_or(ServerError::Serving)?;
        listener.set_nonblocking(true).map_err(ServerError::Listener)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(ServerError::Listener)?;
        let service = Arc::new(Service::new(self.core.clone(), self.stop.clone()));
        let serving = http::serve(service, listener, self.pki.server_tls()?);
        tokio::pin!(serving);
        tokio::select! {
            () = &mut serving => {}
            () = shutdown => {
                self.stop.cancel();
                serving.await;
            }
        }
        Ok(())
    }
}

/// `advertise` with what it leaves open filled in: the port that was bound, loopback for "any address".
fn reachable(advertise: SocketAddr, listener: &TcpListener) -> std::io::Result<SocketAddr> {
    let mut address = advertise;
    if address.port() == 0 {
        address.set_port(listener.local_addr()?.port());
    }
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Ok(address)
}

/// Renews certificates before they end.
async fn renew(pki: Arc<Pki>) {
    loop {
        tokio::time::sleep(pki.renew_every()).await;
        let pki = pki.clone();
        let renewed = tokio::task::spawn_blocking(move || pki.renew(SystemTime::now())).await;
        match renewed {
            Ok(Ok(true)) => tracing::info!("certificates renewed"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::error!(%error, "certificate renewal"),
            Err(error) => tracing::error!(%error, "certificate renewal"),
        }
    }
}
