//! What all workers of one agent share.

use crate::boundary::Boundary;
use crate::config::Config;
use crate::env::{Facts, ServiceEnv};
use crate::etc_files::Resolver;
use crate::events::Recorder;
use crate::ports::{Images, Networks};
use crate::record::IdRanges;
use crate::views::Views;
use api::client::Client;
use api::informer::Informer;
use api::k8s::api::core::v1::Service;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Images fetched at the same time.
const PULLS: usize = 4;

pub(crate) struct Shared {
    pub config: Config,
    pub client: Arc<dyn Client>,
    pub images: Arc<dyn Images>,
    pub networks: Arc<dyn Networks>,
    pub boundaries: BTreeMap<&'static str, Arc<dyn Boundary>>,
    pub events: Recorder,
    pub ids: IdRanges,
    pub views: Arc<Views>,
    pub services: Informer,
    pub node_resolver: Resolver,
    pub node_cpu_milli: u64,
    pub node_memory: u64,
    pub pulls: Arc<Semaphore>,
}

impl Shared {
    pub fn pull_slots() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(PULLS))
    }

    pub fn facts(&self, pod_ips: Vec<IpAddr>) -> Facts {
        Facts {
            pod_ips,
            host_ips: self.config.node_ips(),
            node_cpu_milli: self.node_cpu_milli,
            node_memory: self.node_memory,
        }
    }

    /// Services that a pod's environment shows: those of its namespace and `default/kubernetes`.
    pub async fn service_env(&self, namespace: &str, links: bool) -> Vec<ServiceEnv> {
        self.services.synced().await;
        let mut out = Vec::new();
        if let Some(master) = self.services.get("default", "kubernetes") {
            out.extend(service_env(&master));
        }
        if links {
            for service in self.services.list_in(namespace) {
                out.extend(service_env(&service).filter(|s| !(s.name == "kubernetes" && s.namespace == "default")));
            }
        }
        out
    }
}

fn service_env(object: &api::Object) -> Option<ServiceEnv> {
    let service = Service::deserialize(object).ok()?;
    let spec = service.spec?;
    let address = spec.cluster_ip.filter(|ip| !ip.is_empty() && ip != "None")?;
    let ports = spec
        .ports
        .unwrap_or_default()
        .into_iter()
        .filter_map(|p| {
            let port = u16::try_from(p.port).ok()?;
            Some((p.name.unwrap_or_default(), p.protocol.unwrap_or_else(|| "TCP".into()), port))
        })
        .collect();
    let (name, namespace) = (service.metadata.name?, service.metadata.namespace.unwrap_or_default());
    Some(ServiceEnv { name, namespace, address, ports })
}
