//! The ports over `image::Store` and `network::Router`. Both are synchronous: their work goes to blocking threads.

use crate::boundary::{Rootfs, SandboxImage, SandboxNetwork};
use crate::ports::{
    Attach, Bandwidth, Compiled, Credentials, DiskImage, Exposure, ImageConfig, ImageError, Images, Leased,
    NetworkError, Networks, NotOpen, Records, Refused, ResolvedImage, ServiceRule,
};
use async_trait::async_trait;
use image::{Digest, Kind, PullOptions, Reference, Store};
use network::dns::{Outside, Views};
use network::{AttachRequest, DnsServer, Exposer, Isolation, LinkKind, Router, Subnet, SubnetUse};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Pin owners, used in turn: the new set is pinned before the old one is let go.
const OWNERS: [&str; 2] = ["agent-a", "agent-b"];

pub(crate) struct StoreImages {
    store: Arc<Store>,
    host_netns: Option<PathBuf>,
    pull: PullOptions,
}

impl StoreImages {
    pub fn new(store: Arc<Store>, host_netns: Option<PathBuf>, pull: PullOptions) -> Self {
        StoreImages { store, host_netns, pull }
    }

    async fn run<T: Send + 'static>(
        &self,
        reference: &str,
        work: impl FnOnce(&Store, &str) -> image::Result<T> + Send + 'static,
    ) -> Result<T, ImageError> {
        let (store, name) = (self.store.clone(), reference.to_owned());
        match tokio::task::spawn_blocking(move || work(&store, &name)).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(translate(reference, &error)),
            Err(error) => Err(ImageError::Unusable { reference: reference.into(), message: error.to_string() }),
        }
    }
}

fn translate(reference: &str, error: &image::Error) -> ImageError {
    use image::Error as E;
    let (reference, message) = (reference.to_owned(), error.chain());
    match error {
        E::InvalidReference { why, .. } => ImageError::InvalidName { reference, why: why.clone() },
        E::InvalidDigest(_) => ImageError::InvalidName { reference, why: message },
        E::NotFound(_)
        | E::Platform { .. }
        | E::Registry { .. }
        | E::RegistryNotFound { .. }
        | E::Refused { .. }
        | E::Unauthorized { .. }
        | E::DigestMismatch { .. }
        | E::SizeMismatch { .. } => ImageError::Pull { reference, message },
        _ => ImageError::Unusable { reference, message },
    }
}

/// Whether a name has a registry's host in front.
fn has_host(reference: &str) -> bool {
    reference.split_once('/').is_some_and(|(first, _)| first.contains(['.', ':']) || first == "localhost")
}

/// The image if it is in the store's own repositories: its registry is here, there is nothing to fetch.
fn own(store: &Store, reference: &str) -> Option<ResolvedImage> {
    if has_host(reference) || !store.resolve(reference).is_ok_and(|found| !has_host(&found.reference)) {
        return None;
    }
    resolved(store, reference).ok()
}

fn resolved(store: &Store, reference: &str) -> image::Result<ResolvedImage> {
    let found = store.resolve(reference)?;
    let (config, rootfs) = match found.kind {
        Kind::Container { config, layers } => {
            let run = config.config;
            let config = ImageConfig {
                entrypoint: run.entrypoint,
                cmd: run.cmd,
                env: run.env,
                user: run.user,
                workdir: run.working_dir,
                volumes: run.volumes.into_keys().collect(),
                ports: run.exposed_ports.into_keys().collect(),
                stop_signal: run.stop_signal,
            };
            (config, Rootfs::Layers { image: found.reference.clone(), layers })
        }
        Kind::Component { path, digest } => {
            let rootfs = Rootfs::Component { image: found.reference.clone(), path, digest: digest.to_string() };
            (ImageConfig::default(), rootfs)
        }
        Kind::Disk(_) => (ImageConfig::default(), Rootfs::Machine),
    };
    Ok(ResolvedImage { reference: reference.to_owned(), id: found.digest.to_string(), size: 0, config, rootfs })
}

#[async_trait]
impl Images for StoreImages {
    async fn find(&self, reference: &str) -> Result<Option<ResolvedImage>, ImageError> {
        let result = self.run(reference, |store, name| match resolved(store, name) {
            Err(image::Error::NotFound(_)) => Ok(None),
            other => other.map(Some),
        });
        result.await
    }

    async fn pull(&self, reference: &str, credentials: &[Credentials]) -> Result<ResolvedImage, ImageError> {
        let host = Reference::parse(reference, self.store.local_hosts())
            .map_err(|e| translate(reference, &e))?
            .on_docker_hub()
            .repository
            .host
            .unwrap_or_default();
        let matching =
            credentials.iter().find(|c| c.registry == host || (host == "docker.io" && c.registry == "index.docker.io"));
        let options = PullOptions {
            credentials: matching
                .map(|c| image::Credentials { username: c.username.clone(), password: c.password.clone() }),
            ..self.pull.clone()
        };
        let netns = self.host_netns.clone();
        let work = move |store: &Store, name: &str| {
            if let Some(image) = own(store, name) {
                return Ok(image);
            }
            let fetch = || store.pull(name, &options, &image::silent).map(drop);
            match &netns {
                Some(path) => network::in_netns(path, fetch).unwrap_or_else(|error| {
                    Err(image::Error::Registry { host: host.clone(), why: format!("host network: {error}") })
                })?,
                None => fetch()?,
            }
            let size = store.inspect(name).map(|i| i.size).unwrap_or(0);
            resolved(store, name).map(|image| ResolvedImage { size, ..image })
        };
        self.run(reference, work).await
    }

    async fn block(&self, reference: &str) -> Result<SandboxImage, ImageError> {
        let work = |store: &Store, name: &str| {
            let found = store.resolve(name)?;
            let path = store.block_image(&found, &image::silent)?;
            match found.kind {
                Kind::Container { layers, .. } => Ok(SandboxImage { layers, path }),
                Kind::Component { .. } | Kind::Disk(_) => Err(image::Error::NotFound(name.to_owned())),
            }
        };
        self.run(reference, work).await
    }

    async fn disk(&self, reference: &str) -> Result<DiskImage, ImageError> {
        let disk = self.run(reference, |store, name| store.disk_image(name, None)).await?;
        Ok(DiskImage { path: disk.path, format: disk.format })
    }

    async fn collect(&self, in_use: &BTreeSet<String>) -> Result<u64, ImageError> {
        let in_use = in_use.clone();
        let work = move |store: &Store, _: &str| {
            let owners = store.pin_owners()?;
            let (new, old) =
                if owners.iter().any(|o| o == OWNERS[0]) { (OWNERS[1], OWNERS[0]) } else { (OWNERS[0], OWNERS[1]) };
            store.unpin(new)?;
            for digest in in_use.iter().filter_map(|d| d.parse::<Digest>().ok()) {
                store.pin(new, &digest)?;
            }
            store.unpin(old)?;
            store.gc(store.collection()).map(|report| report.bytes)
        };
        self.run("", work).await
    }
}

pub(crate) struct RouterNetworks {
    router: Arc<Router>,
    pub dns: OnceLock<Arc<DnsServer>>,
    /// Where ports of the host are opened.
    host_netns: Option<PathBuf>,
    exposer: Arc<Mutex<Option<Exposer>>>,
}

impl RouterNetworks {
    pub fn new(router: Arc<Router>, host_netns: Option<PathBuf>) -> Self {
        RouterNetworks { router, dns: OnceLock::new(), host_netns, exposer: Arc::default() }
    }

    pub fn router(&self) -> &Router {
        &self.router
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Router) -> network::Result<T> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let router = self.router.clone();
        match tokio::task::spawn_blocking(move || work(&router)).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(failed(operation, &error)),
            Err(error) => Err(NetworkError { operation, message: error.to_string(), reason: None }),
        }
    }
}

fn failed(operation: &'static str, error: &network::Error) -> NetworkError {
    let reason = match error {
        network::Error::Exhausted { .. } => Some("NetworkExhausted"),
        network::Error::NoSubnet(_) => Some("NetworkNotReady"),
        _ => None,
    };
    NetworkError { operation, message: crate::volumes::chain(error), reason }
}

/// One Service with a foreign address must not keep all others from working.
fn served(router: &Router, rules: Vec<ServiceRule>) -> Vec<ServiceRule> {
    let config = router.config();
    let (ours, foreign): (Vec<_>, Vec<_>) = rules.into_iter().partition(|rule| config.serves(rule.cluster_ip));
    let (v4, v6) = (config.service_cidr, config.service_cidr6);
    for rule in foreign {
        let (namespace, name) = (&rule.namespace, &rule.name);
        tracing::warn!("service {namespace}/{name}: address {} is not in {v4} or {v6}", rule.cluster_ip);
    }
    ours
}

#[async_trait]
impl Networks for RouterNetworks {
    async fn attach(&self, request: &Attach) -> Result<SandboxNetwork, NetworkError> {
        let wanted = AttachRequest {
            uid: request.uid.clone(),
            namespace: request.namespace.clone(),
            address_key: request.address_key.clone(),
            kind: if request.tap { LinkKind::Tap } else { LinkKind::Namespace },
            place: request.place.clone(),
        };
        let bandwidth = request.bandwidth;
        let attach = move |router: &Router| {
            let attachment = router.attach(&wanted)?;
            router.set_bandwidth(&wanted.uid, bandwidth)?;
            Ok(attachment)
        };
        let attachment = self.run("attach", attach).await?;
        Ok(SandboxNetwork {
            address: Some(attachment.address),
            address6: attachment.address6,
            netns: attachment.netns,
            tap: attachment.tap,
            router_netns: Some(self.router.netns_path()),
            mac: attachment.mac,
            gateway: Some(attachment.gateway),
            mtu: attachment.mtu,
            ..SandboxNetwork::default()
        })
    }

    async fn add_subnet(&self, subnet: &Subnet) -> Result<(), Refused> {
        const WHAT: &str = "subnet";
        let (subnet, path) = (subnet.clone(), self.host_netns.clone());
        let work = move |router: &Router| {
            let host = path.as_deref().map(std::fs::File::open).transpose();
            let host = host.map_err(|error| format!("the host's network namespace: {error}"));
            Ok(host.map(|host| router.add_subnet(host.as_ref().map(AsFd::as_fd), &subnet)))
        };
        let failed_here = |message: String| Refused::Failed(NetworkError { operation: WHAT, message, reason: None });
        match self.run(WHAT, work).await.map_err(Refused::Failed)?.map_err(failed_here)? {
            Ok(()) => Ok(()),
            Err(network::Error::Subnet { why, .. }) => Err(Refused::Misfit(why)),
            Err(error) => Err(Refused::Failed(failed(WHAT, &error))),
        }
    }

    async fn remove_subnet(&self, name: &str) -> Result<bool, NetworkError> {
        let name = name.to_owned();
        self.run("subnet", move |router| router.remove_subnet(&name)).await
    }

    async fn subnets(&self) -> Vec<SubnetUse> {
        self.router.subnets()
    }

    async fn set_bandwidth(&self, uid: &str, bandwidth: Bandwidth) -> Result<(), NetworkError> {
        let uid = uid.to_owned();
        self.run("bandwidth", move |router| router.set_bandwidth(&uid, bandwidth)).await
    }

    async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        let uid = uid.to_owned();
        self.run("detach", move |router| router.detach(&uid)).await
    }

    async fn sync_services(&self, rules: Vec<ServiceRule>) -> Result<(), NetworkError> {
        self.run("services", move |router| router.sync_services(&served(router, rules)).map(drop)).await
    }

    async fn change_services(&self, before: Vec<ServiceRule>, after: Vec<ServiceRule>) -> Result<bool, NetworkError> {
        let work = move |router: &Router| Ok(router.change_services(&before, &served(router, after))?.is_some());
        self.run("services", work).await
    }

    async fn sync_exposed(&self, exposures: Vec<Exposure>) -> Result<Vec<NotOpen>, NetworkError> {
        let (exposer, host) = (self.exposer.clone(), self.host_netns.clone());
        let work = move |router: &Router| {
            let mut exposer = exposer.lock().unwrap_or_else(PoisonError::into_inner);
            let exposer = match (&mut *exposer, &host) {
                (Some(exposer), _) => exposer,
                (None, Some(host)) if !exposures.is_empty() => exposer.insert(Exposer::open(router, host)?),
                (None, _) => return Ok(Vec::new()),
            };
            exposer.sync(router, exposures)
        };
        self.run("ports of the host", work).await
    }

    async fn sync_dns(&self, records: Records) -> Result<(), NetworkError> {
        if let Some(dns) = self.dns.get().cloned() {
            let _ = tokio::task::spawn_blocking(move || dns.set(&records)).await;
        }
        Ok(())
    }

    async fn idle_addresses(&self) -> Vec<String> {
        self.router.idle_addresses()
    }

    async fn release_address(&self, key: &str) -> Result<(), NetworkError> {
        let key = key.to_owned();
        self.run("release the address", move |router| router.release_address(&key)).await
    }

    async fn leases(&self) -> Vec<Leased> {
        self.router.leases()
    }

    fn outside(&self) -> network::policy::Ranges {
        self.router.outside()
    }

    async fn sync_egress_addresses(&self, sources: BTreeMap<IpAddr, IpAddr>) -> Result<(), NetworkError> {
        if !self.router.leads_out() {
            return Ok(());
        }
        self.run("egress addresses", move |router| router.sync_egress_addresses(&sources)).await
    }

    async fn sync_policies(&self, compiled: Compiled) -> Result<(), NetworkError> {
        let workloads = &compiled.policies.workloads;
        let out = workloads.iter().filter(|(_, workload)| compiled.policies.lets_out(workload));
        let named = workloads.iter().map(|(address, workload)| {
            let sets = compiled.policies.names_of(workload);
            (*address, sets.into_iter().flat_map(|set| set.patterns.iter().cloned()).collect::<Vec<_>>())
        });
        let views = Views {
            open: compiled.policies.isolation == Isolation::Open,
            namespaces: workloads.iter().map(|(address, own)| (*address, own.namespace.clone())).collect(),
            visible: compiled.visible,
            outside: Outside::These(out.map(|(address, _)| *address).collect()),
            named: named.filter(|(_, names)| !names.is_empty()).collect(),
        };
        // Rules first: what a name leads to can be let out to before anyone may ask for it.
        let synced = self.run("policies", move |router| router.sync_policies(compiled.policies).map(drop)).await;
        if let Some(dns) = self.dns.get() {
            dns.set_views(views);
        }
        synced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_in_use_is_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path().join("images")).unwrap());
        let images = StoreImages::new(store.clone(), None, PullOptions::default());
        let one = format!("sha256:{}", "1".repeat(64));
        let two = format!("sha256:{}", "2".repeat(64));
        images.collect(&BTreeSet::from([one.clone(), "nonsense".to_owned()])).await.unwrap();
        assert_eq!(store.pin_owners().unwrap().len(), 1);
        images.collect(&BTreeSet::from([two.clone()])).await.unwrap();
        let owners = store.pin_owners().unwrap();
        assert_eq!(owners.len(), 1);
        let pins = std::fs::read_dir(dir.path().join("images/pins").join(&owners[0])).unwrap().flatten();
        let pins: Vec<_> = pins.map(|e| e.file_name().into_string().unwrap()).collect();
        assert_eq!(pins, ["2".repeat(64)]);
    }

    #[test]
    fn which_names_have_a_registry() {
        for (name, has) in [("app", false), ("team/app:1", false), ("r.example/app", true), ("127.0.0.1:5000/a", true)]
        {
            assert_eq!(has_host(name), has, "{name}");
        }
    }
}
