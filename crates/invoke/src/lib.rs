//! The Invoke API: what AWS Lambda's clients speak, for the functions of this cloud. A function is a Knative Service; here
//! it is created, changed, listed and called in Lambda's words.
//!
//! Every request is signed ([`signature`]) by an access key, a Secret of the type [`ACCESS_KEY`]. A key acts for its Secret's
//! namespace: that is the account. Functions are called through the gateway ([`dispatch`]), which wakes what sleeps.
//!
//! What is invoked without waiting for its result is written to the store first ([`messages`]); what a clock asks for
//! ([`schedules`]), too.
#![forbid(unsafe_code)]

mod answer;
mod dispatch;
mod functions;
pub mod fuzz;
mod http_api;
mod keys;
mod messages;
mod schedules;
mod settings;
mod signature;
mod tail;

pub use dispatch::InvokeKey;
pub use functions::{Package, Packager};
pub use keys::TYPE as ACCESS_KEY;

use api::client::Client;
use api::streams::PodStreams;
use dispatch::Dispatcher;
use messages::Messages;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use tokio::sync::watch;

/// What the API is served with.
pub struct Config {
    /// Where the API listens; without one, only messages are delivered and schedules kept.
    pub listener: Option<TcpListener>,
    pub client: Arc<dyn Client>,
    pub streams: Arc<dyn PodStreams>,
    /// The gateway.
    pub gateway: SocketAddr,
    /// The key of a namespace's function, by which its Lambda runtime knows our requests.
    pub invoke_key: InvokeKey,
    pub packager: Arc<dyn Packager>,
    pub cluster_domain: String,
}

/// Serves until `stop` becomes true.
pub async fn run(config: Config, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
    let listener = config.listener.map(tokio::net::TcpListener::from_std).transpose()?;
    let dispatcher = Dispatcher::new(config.client.clone(), config.gateway, config.invoke_key, config.cluster_domain);
    let messages = Arc::new(Messages::new(Arc::new(dispatcher)));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(messages.clone().deliver());
    tasks.spawn(schedules::keep(config.client.clone(), messages.clone()));
    if let Some(listener) = listener {
        let shared = Arc::new(http_api::Shared::new(messages, config.streams, config.packager));
        tasks.spawn(http_api::serve(shared, listener));
    }
    // A sender that is gone says the same.
    let _ = stop.wait_for(|stop| *stop).await;
    // What is cut off is tried again by who sent it, or by the store's messages.
    tasks.shutdown().await;
    Ok(())
}
