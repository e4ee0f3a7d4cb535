//! Reconcilers and scheduler: what turns wanted state into objects that the node agent, the network and the gateway act
//! on. They see the API only, through [`api::client::Client`] and informers; every one is level-triggered and idempotent.
//!
//! [`run`] starts them all. `runner` and `queue` are the machinery; each other module is one kind of reconciler.
#![forbid(unsafe_code)]

mod balancers;
mod claim;
mod context;
mod deployment;
mod endpoints;
mod events;
mod gateways;
mod gc;
mod knative;
mod machines;
mod namespaces;
mod nodes;
mod objects;
mod queue;
mod recent;
mod replicaset;
mod runner;
mod scheduler;
#[cfg(test)]
mod testing;

pub use context::{Clock, Config};

use api::client::Client;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Runs all reconcilers until `shutdown` becomes true (or its sender is dropped) and all have stopped.
pub async fn run(client: Arc<dyn Client>, config: Config, shutdown: watch::Receiver<bool>) {
    let context = context::Context::new(client, config);
    let mut tasks = JoinSet::new();
    for (workers, make) in RECONCILERS {
        let (reconciler, sources) = make(&context);
        runner::spawn(&mut tasks, &context, reconciler, sources, *workers, &shutdown);
    }
    tasks.spawn(runner::until(shutdown.clone(), scheduler::run(Arc::clone(&context))));
    tasks.spawn(runner::until(shutdown.clone(), gc::run(Arc::clone(&context))));
    tasks.spawn(runner::until(shutdown.clone(), gateways::make_defaults(Arc::clone(&context))));
    tasks.spawn(runner::until(shutdown.clone(), knative::autoscale(Arc::clone(&context))));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!(%error, "a controller has died");
        }
    }
}

type Make = fn(&Arc<context::Context>) -> (Arc<dyn runner::Reconcile>, Vec<runner::Source>);

/// Each with the number of its workers.
const RECONCILERS: &[(usize, Make)] = &[
    (4, deployment::new),
    (4, replicaset::new),
    (2, endpoints::new),
    (1, balancers::new),
    (2, namespaces::new),
    (1, nodes::new),
    (1, nodes::ended_pods),
    (1, gateways::classes),
    (1, gateways::new),
    (2, gateways::routes),
    (1, gateways::grpc_routes),
    (1, gateways::tls_routes),
    (1, gateways::ingresses),
    (1, gateways::policies),
    (1, gateways::backend_policies),
    (2, knative::services),
    (2, knative::configurations),
    (2, knative::revisions),
    (1, knative::routes),
    (2, machines::machines),
    (2, machines::instances),
    (1, machines::snapshots),
    (1, machines::contents),
    (1, machines::restores),
    (1, machines::clones),
];
