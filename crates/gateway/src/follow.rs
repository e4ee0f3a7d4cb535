//! Follows the API: a changed EndpointSlice changes its Service's endpoints at once, everything else makes a new table.

use crate::activator::sleepers;
use crate::gateway::Shared;
use crate::policy::{Attached, Backends, Limiters};
use crate::routing::{Objects, build};
use crate::tls::{self, Cache};
use crate::upstream::{Upstream, Upstreams, addresses};
use api::client::{Client, ListOptions};
use api::informer::{Change, Informer, Subscription};
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use api::topology::Place;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

const GROUP: &str = "gateway.networking.k8s.io";
const INGRESS: &str = "networking.k8s.io";
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Changes that come within this time make one table.
const GATHER: Duration = Duration::from_millis(2);
const TIDY: Duration = Duration::from_secs(15);

struct Informers {
    /// The node's object, and where that says it is.
    own: Informer,
    place: Place,
    classes: Informer,
    gateways: Informer,
    routes: Informer,
    grpc_routes: Informer,
    tls_routes: Informer,
    ingresses: Informer,
    ingress_classes: Informer,
    services: Informer,
    namespaces: Informer,
    slices: Informer,
    grants: Informer,
    secrets: Informer,
    config_maps: Informer,
    policies: Informer,
    backend_policies: Informer,
}

/// What outlives a table.
#[derive(Default)]
struct State {
    certificates: Cache,
    limiters: Limiters,
}

/// What changed since the last look.
#[derive(Default)]
struct Dirty {
    table: bool,
    /// Namespace and name of services whose slices changed.
    services: HashSet<(String, String)>,
}

pub async fn run(
    shared: Arc<Shared>,
    client: Arc<dyn Client>,
    (node, class): (String, String),
    mut upstreams: Upstreams,
) {
    let mut informers = Informers::start(&client, &node);
    let mut own = informers.own.subscribe();
    let mut subscriptions = informers.subscribe();
    let mut slices = informers.slices.subscribe();
    informers.synced().await;
    let mut state = State::default();
    rebuild(&shared, &informers, &class, &mut upstreams, &mut state);
    let mut tidy = tokio::time::interval(TIDY);
    loop {
        let mut dirty = Dirty::default();
        tokio::select! {
            change = slices.next() => dirty.slice(change),
            _ = own.next() => {}
            () = any(&mut subscriptions) => {
                dirty.table = true;
                tokio::time::sleep(GATHER).await;
            }
            _ = tidy.tick() => upstreams.iter().for_each(|upstream| {
                upstream.endpoints().iter().for_each(|endpoint| endpoint.tidy());
            }),
        }
        while let Some(change) = slices.try_next() {
            dirty.slice(change);
        }
        while own.try_next().is_some() {}
        let place = Place::of(&node, &informers.own);
        if place != informers.place {
            informers.place = place;
            dirty.table = true;
        }
        for subscription in &mut subscriptions {
            while subscription.try_next().is_some() {
                dirty.table = true;
            }
        }
        if dirty.table {
            rebuild(&shared, &informers, &class, &mut upstreams, &mut state);
        } else {
            for upstream in upstreams.iter() {
                if dirty.services.contains(&(upstream.namespace.clone(), upstream.service.clone())) {
                    refresh(&informers, upstream);
                }
            }
        }
    }
}

/// Waits for a change of any of them.
async fn any(subscriptions: &mut [Subscription]) {
    let mut waiting: Vec<_> = subscriptions.iter_mut().map(|subscription| Box::pin(subscription.next())).collect();
    std::future::poll_fn(|cx| {
        let ready = waiting.iter_mut().any(|next| Future::poll(next.as_mut(), cx).is_ready());
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

impl Dirty {
    fn slice(&mut self, change: Change) {
        match change {
            Change::Everything => self.table = true,
            Change::Object { old, new, .. } => {
                for slice in [old, new].into_iter().flatten() {
                    if let Some(service) = slice.label(SERVICE_NAME) {
                        self.services.insert((slice.namespace().to_owned(), service.to_owned()));
                    }
                }
            }
        }
    }
}

fn rebuild(shared: &Shared, informers: &Informers, class: &str, upstreams: &mut Upstreams, state: &mut State) {
    let objects = Objects {
        classes: informers.classes.list(),
        gateways: informers.gateways.list(),
        routes: informers.routes.list(),
        services: informers.services.list(),
        namespaces: informers.namespaces.list(),
        grants: informers.grants.list(),
        grpc_routes: informers.grpc_routes.list(),
        tls_routes: informers.tls_routes.list(),
        ingresses: informers.ingresses.list(),
        ingress_classes: informers.ingress_classes.list(),
        secrets: informers.secrets.list(),
        config_maps: informers.config_maps.list(),
        policies: informers.policies.list(),
        backend_policies: informers.backend_policies.list(),
    };
    upstreams.begin();
    let policies = Attached::read(&objects, &mut state.limiters);
    let table = build(&objects, class, upstreams, &policies);
    let sites = tls::build(&objects, class, upstreams, &mut state.certificates);
    let asleep = sleepers(&objects.services, upstreams);
    upstreams.retire();
    let backends = Backends::read(&objects);
    for upstream in upstreams.iter() {
        upstream.set_rules(backends.of(&upstream.namespace, &upstream.service));
        refresh(informers, upstream);
    }
    tracing::debug!(entries = table.len(), "made a new routing table");
    shared.set_sleepers(asleep);
    shared.set_table(table, sites);
}

fn refresh(informers: &Informers, upstream: &Upstream) {
    let slices: Vec<SharedObject> = informers
        .slices
        .list_in(&upstream.namespace)
        .into_iter()
        .filter(|slice| slice.label(SERVICE_NAME) == Some(&upstream.service))
        .collect();
    upstream.set_endpoints(&addresses(slices.iter(), &upstream.port_name, &informers.place));
}

impl Informers {
    fn start(client: &Arc<dyn Client>, node: &str) -> Informers {
        let named = ListOptions { field_selector: format!("metadata.name={node}"), ..ListOptions::default() };
        let own = Informer::spawn(client.clone(), Resource::new("", "v1", "nodes"), "", named);
        let follow = |group: &str, version: &str, plural: &str| {
            Informer::spawn(client.clone(), Resource::new(group, version, plural), "", ListOptions::default())
        };
        Informers {
            place: Place::of(node, &own),
            own,
            classes: follow(GROUP, "v1", "gatewayclasses"),
            gateways: follow(GROUP, "v1", "gateways"),
            routes: follow(GROUP, "v1", "httproutes"),
            grpc_routes: follow(GROUP, "v1", "grpcroutes"),
            tls_routes: follow(GROUP, "v1", "tlsroutes"),
            ingresses: follow(INGRESS, "v1", "ingresses"),
            ingress_classes: follow(INGRESS, "v1", "ingressclasses"),
            services: follow("", "v1", "services"),
            namespaces: follow("", "v1", "namespaces"),
            slices: follow("discovery.k8s.io", "v1", "endpointslices"),
            grants: follow(GROUP, "v1", "referencegrants"),
            secrets: follow("", "v1", "secrets"),
            config_maps: follow("", "v1", "configmaps"),
            policies: follow("gateway.atoll.dev", "v1alpha1", "trafficpolicies"),
            backend_policies: follow("gateway.atoll.dev", "v1alpha1", "backendpolicies"),
        }
    }

    /// All whose changes make a new table.
    fn all(&self) -> [&Informer; 14] {
        [
            &self.classes,
            &self.gateways,
            &self.routes,
            &self.grpc_routes,
            &self.tls_routes,
            &self.ingresses,
            &self.ingress_classes,
            &self.services,
            &self.namespaces,
            &self.grants,
            &self.secrets,
            &self.config_maps,
            &self.policies,
            &self.backend_policies,
        ]
    }

    fn subscribe(&self) -> Vec<Subscription> {
        self.all().into_iter().map(Informer::subscribe).collect()
    }

    async fn synced(&self) {
        for informer in self.all() {
            informer.synced().await;
        }
        self.slices.synced().await;
    }
}
