//! What the agent needs of the image store and of the network, as two narrow traits. The adaptors over
//! `image::Store` and `network::Router` are in [`crate::adaptors`]; tests bring fakes.

use crate::boundary::{Rootfs, SandboxImage, SandboxNetwork};
pub use crate::policy::Compiled;
use async_trait::async_trait;
pub use network::dns::Records;
pub use network::{Bandwidth, Exposure, Leased, NotOpen, Place, Protocol, ServiceRule};
use network::{Misfit, Subnet, SubnetUse};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

/// The parts of an OCI image configuration that shape a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `KEY=value`.
    pub env: Vec<String>,
    pub user: String,
    pub workdir: String,
    pub volumes: Vec<String>,
    /// `8080/tcp`.
    pub ports: Vec<String>,
    /// `SIGQUIT`, `3` or empty.
    pub stop_signal: String,
}

#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// Normalised reference.
    pub reference: String,
    /// `sha256:...`.
    pub id: String,
    pub size: u64,
    pub config: ImageConfig,
    pub rootfs: Rootfs,
}

/// User name and password for one registry host.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub registry: String,
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({} at {})", self.username, self.registry)
    }
}

/// A disk inside an image: the backing file of a machine's disk, never written to.
#[derive(Clone, Debug)]
pub struct DiskImage {
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    #[error("couldn't parse image name \"{reference}\": {why}")]
    InvalidName { reference: String, why: String },
    /// Could not be fetched: not there, no access, no network, wrong architecture, damaged.
    #[error("{message}")]
    Pull { reference: String, message: String },
    /// It is here but not what is needed (no disk inside, not unpackable, ...).
    #[error("image \"{reference}\": {message}")]
    Unusable { reference: String, message: String },
}

#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// The image if it is here already, ready to run. Never touches the network.
    async fn find(&self, reference: &str) -> Result<Option<ResolvedImage>, ImageError>;
    /// Fetches the image (again) and unpacks it. Concurrent pulls of one reference share the work.
    async fn pull(&self, reference: &str, credentials: &[Credentials]) -> Result<ResolvedImage, ImageError>;
    /// The root file system of an image that is here as a block device, made if need be.
    async fn block(&self, reference: &str) -> Result<SandboxImage, ImageError> {
        let message = "no block device can be made of it here".into();
        Err(ImageError::Unusable { reference: reference.into(), message })
    }
    /// The disk in an image that is here.
    async fn disk(&self, reference: &str) -> Result<DiskImage, ImageError>;
    /// Lets the store drop what no pod uses; called from time to time. Returns bytes freed.
    async fn collect(&self, in_use: &BTreeSet<String>) -> Result<u64, ImageError>;
}

/// What a pod asks of the network.
#[derive(Clone, Debug)]
pub struct Attach {
    pub uid: String,
    pub namespace: String,
    /// The address belongs to this key, so a machine keeps its own over re-creations.
    pub address_key: Option<String>,
    /// A tap in the router instead of a namespace.
    pub tap: bool,
    pub bandwidth: Bandwidth,
    pub place: Place,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation}: {message}")]
pub struct NetworkError {
    pub operation: &'static str,
    pub message: String,
    /// For the state of containers that wait for it, where the user has to do something.
    pub reason: Option<&'static str>,
}

/// Why there is no such subnet.
#[derive(Debug, Clone)]
pub enum Refused {
    Misfit(Misfit),
    Failed(NetworkError),
}

#[async_trait]
pub trait Networks: Send + Sync + 'static {
    /// Idempotent by `uid`.
    async fn attach(&self, request: &Attach) -> Result<SandboxNetwork, NetworkError>;
    /// Where a pod's address is to be from; `asked` is what the pod itself says.
    async fn place(&self, _uid: &str, _namespace: &str, _asked: Option<&str>) -> Result<Place, NetworkError> {
        Ok(Place::default())
    }
    /// Lets workloads have addresses of a subnet; idempotent.
    async fn add_subnet(&self, _subnet: &Subnet) -> Result<(), Refused> {
        Ok(())
    }
    /// Ends a subnet; answers whether it has ended: nobody has an address of it.
    async fn remove_subnet(&self, _name: &str) -> Result<bool, NetworkError> {
        Ok(true)
    }
    async fn subnets(&self) -> Vec<SubnetUse> {
        Vec::new()
    }
    /// Limits what an attached pod sends and receives from now on.
    async fn set_bandwidth(&self, _uid: &str, _bandwidth: Bandwidth) -> Result<(), NetworkError> {
        Ok(())
    }
    /// Idempotent; unknown uids are fine.
    async fn detach(&self, uid: &str) -> Result<(), NetworkError>;
    /// Replaces all Service rules.
    async fn sync_services(&self, rules: Vec<ServiceRule>) -> Result<(), NetworkError>;
    /// Replaces those rules by these; false: it does not know which there are, and has to be handed all.
    async fn change_services(&self, before: Vec<ServiceRule>, after: Vec<ServiceRule>) -> Result<bool, NetworkError>;
    /// Replaces all ports of the host that lead to workloads; answers those that could not be opened.
    async fn sync_exposed(&self, _exposures: Vec<Exposure>) -> Result<Vec<NotOpen>, NetworkError> {
        Ok(Vec::new())
    }
    /// Replaces all DNS records.
    async fn sync_dns(&self, records: Records) -> Result<(), NetworkError>;
    /// Keys whose address no pod has at present.
    async fn idle_addresses(&self) -> Vec<String> {
        Vec::new()
    }
    /// Ends an idle key's hold on its address; one that a pod has again is left alone.
    async fn release_address(&self, _key: &str) -> Result<(), NetworkError> {
        Ok(())
    }
    /// Everything that is attached.
    async fn leases(&self) -> Vec<Leased> {
        Vec::new()
    }
    /// Where the way out leads.
    fn outside(&self) -> network::policy::Ranges {
        network::policy::Ranges::default()
    }
    /// Replaces the sources that workloads' connections leave by the uplink with, where it is not the host's choice.
    async fn sync_egress_addresses(&self, _sources: BTreeMap<IpAddr, IpAddr>) -> Result<(), NetworkError> {
        Ok(())
    }
    /// Replaces all policies.
    async fn sync_policies(&self, _policies: Compiled) -> Result<(), NetworkError> {
        Ok(())
    }
}
