//! What the cluster's names are made from.

use crate::config::Networks;
use crate::services::Protocol;
use std::net::IpAddr;

/// Everything that has a name. Set as a whole: [`super::DnsServer::set`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    pub services: Vec<ServiceRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRecord {
    pub namespace: String,
    pub name: String,
    pub kind: ServiceKind,
    pub ports: Vec<PortRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// One address, or one of each family.
    ClusterIp(Vec<IpAddr>),
    /// `clusterIP: None`: the endpoints' own addresses.
    Headless(Vec<EndpointRecord>),
    /// An alias of a name elsewhere.
    External(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRecord {
    pub address: IpAddr,
    /// Pod hostname: `<hostname>.<service>.<namespace>.svc.<domain>`.
    pub hostname: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRecord {
    /// Unnamed ports have no SRV record.
    pub name: Option<String>,
    pub protocol: Protocol,
    /// The Service's port, or the endpoints' for a headless one.
    pub port: u16,
}

/// What a zone is responsible for.
#[derive(Clone, Debug)]
pub struct Authority {
    /// `cluster.local`, lower case, no dot at the end.
    pub domain: String,
    /// Reverse names of these networks are ours.
    pub networks: Networks,
    pub dns_addresses: Vec<IpAddr>,
}
