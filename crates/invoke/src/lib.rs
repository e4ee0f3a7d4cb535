//! The Invoke API: what AWS Lambda's clients speak, for the functions of this cloud. A function is a Knative Service; here
//! it is created, changed, listed and called in Lambda's words.
//!
//! Every request is signed ([`signature`]) by an access key, a Secret of the type [`ACCESS_KEY`]. A key acts for its Secret's
//! namespace: that is the account. Functions are called through the gateway ([`dispatch`]), which wakes what sleeps.
//!
//! What is invoked without waiting for its result is written to the store first ([`messages`]); what a clock asks for
//! ([`schedules`]), and CloudEvents for triggers ([`events`]), too.
#![forbid(unsafe_code)]

mod answer;
mod cloudevent;
mod destination;
mod dispatch;
mod events;
mod filters;
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
pub use events::Push;
pub use functions::{Package, Packager};
pub use keys::TYPE as ACCESS_KEY;

use api::client::Client;
use api::streams::PodStreams;
use dispatch::Dispatcher;
use events::Events;
use messages::Messages;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// What the API is served with.
pub struct Config {
    /// Where the API listens; without one, only messages are delivered and schedules kept.
    pub listener: Option<TcpListener>,
    /// Where CloudEvents for brokers are taken.
    pub events: Option<TcpListener>,
    /// What whoever sends them there has to know, as a bearer token.
    pub events_token: Option<String>,
    /// What is put into the registry.
    pub pushes: mpsc::Receiver<Push>,
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
    let taking = config.events.map(tokio::net::TcpListener::from_std).transpose()?;
    let address = taking.as_ref().map(tokio::net::TcpListener::local_addr).transpose()?;
    let dispatcher = Dispatcher::new(config.client.clone(), config.gateway, config.invoke_key, config.cluster_domain);
    let messages = Arc::new(Messages::new(Arc::new(dispatcher)));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(schedules::keep(config.client.clone(), messages.clone()));
    let events = Arc::new(Events::new(messages.clone(), address, config.events_token));
    tasks.spawn(messages.clone().deliver(events.clone()));
    tasks.spawn(events.clone().keep());
    tasks.spawn(events.clone().follow(config.pushes));
    if let Some(listener) = taking {
        let answer = move |request| {
            let events = events.clone();
            async move { events.answer(request).await }
        };
        tasks.spawn(http_api::serve(listener, answer));
    }
    if let Some(listener) = listener {
        let shared = Arc::new(http_api::Shared::new(messages, config.streams, config.packager));
        let answer = move |request| {
            let shared = shared.clone();
            async move { shared.answer(request).await }
        };
        tasks.spawn(http_api::serve(listener, answer));
    }
    // A sender that is gone says the same.
    let _ = stop.wait_for(|stop| *stop).await;
    // What is cut off is tried again by who sent it, or by the store's messages.
    tasks.shutdown().await;
    Ok(())
}
