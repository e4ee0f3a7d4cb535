//! Which ports of the host lead to which workloads: node ports, the ports of load balancers, external addresses, and ports
//! that tell whether there are endpoints. A pure function and one task.
//!
//! A port belongs to one Service: node ports come first, then the oldest Service. What a Service asks for and does not get
//! is told by an event; nothing else waits for it.

use crate::config::Exposing;
use crate::events::{About, Level, Recorder};
use crate::ports::{Exposure, Networks, Protocol};
use crate::proxy::{self, Slices};
use api::informer::{Informer, Subscription};
use api::k8s::api::core::v1::{Service, ServicePort, ServiceSpec};
use api::object::{Meta, SharedObject};
use api::topology::Place;
use network::Leads;
use network::policy::{Block, Network, Ranges, ranges};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

const PAUSE: Duration = Duration::from_millis(50);
/// After a port could not be opened.
const RETRY: Duration = Duration::from_secs(10);
const RESYNC: Duration = Duration::from_secs(300);
/// Ports of the host at once; each is a descriptor.
const MOST: usize = 4096;

/// What cannot be, and of which Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    pub namespace: String,
    pub name: String,
    pub reason: &'static str,
    pub message: String,
}

/// What the API says: the node itself, Services and EndpointSlices.
#[derive(Clone)]
pub(crate) struct Followed {
    pub own: Informer,
    pub services: Informer,
    pub slices: Informer,
}

/// What is needed to say which ports are open.
#[derive(Clone)]
pub(crate) struct Exposed {
    pub place: Place,
    pub exposing: Exposing,
}

impl Exposed {
    /// Runs until cancelled.
    pub async fn run(mut self, followed: Followed, networks: Arc<dyn Networks>, events: Recorder) {
        let Followed { own, services, slices } = followed;
        let (mut service_changes, mut slice_changes) = (services.subscribe(), slices.subscribe());
        let mut own_changes = own.subscribe();
        services.synced().await;
        slices.synced().await;
        let mut told = BTreeSet::new();
        loop {
            while service_changes.try_next().is_some() {}
            while slice_changes.try_next().is_some() {}
            while own_changes.try_next().is_some() {}
            self.place = Place::of(&self.place.node, &own);
            let (exposures, mut problems) = self.compute(&services.list(), &slices.list());
            let mut again = RESYNC;
            match networks.sync_exposed(exposures).await {
                Ok(closed) => problems.extend(closed.iter().map(|closed| {
                    again = RETRY;
                    let Exposure { namespace, name, listen, protocol, .. } = &closed.exposure;
                    let message = format!("{listen}/{}: {}", text(*protocol), closed.why);
                    Problem { namespace: namespace.clone(), name: name.clone(), reason: "PortNotOpen", message }
                })),
                Err(error) => {
                    again = RETRY;
                    tracing::warn!("ports of the host are not up to date, trying again: {error}");
                }
            }
            let problems: BTreeSet<Problem> = problems.into_iter().collect();
            for problem in problems.difference(&told) {
                if let Some(service) = services.get(&problem.namespace, &problem.name) {
                    events.record(About::service(&service), Level::Warning, problem.reason, &*problem.message);
                }
            }
            told = problems;
            tokio::time::sleep(PAUSE).await;
            tokio::select! {
                () = self.moved(&own, &mut own_changes) => {}
                _ = service_changes.next() => {}
                _ = slice_changes.next() => {}
                () = tokio::time::sleep(again) => {}
            }
        }
    }

    /// Until the node is in another zone.
    async fn moved(&self, own: &Informer, changes: &mut Subscription) {
        while Place::of(&self.place.node, own) == self.place {
            changes.next().await;
        }
    }

    /// Pure: the ports, and what of them cannot be.
    pub fn compute(&self, services: &[SharedObject], slices: &[SharedObject]) -> (Vec<Exposure>, Vec<Problem>) {
        let mut open: Vec<(&SharedObject, ServiceSpec)> = services.iter().filter_map(exposed).collect();
        let age = |service: &SharedObject| service.str_at("/metadata/creationTimestamp").to_owned();
        open.sort_by_cached_key(|(service, _)| {
            (age(service), service.namespace().to_owned(), service.name().to_owned())
        });
        let keys: BTreeSet<(String, String)> = open.iter().map(|(service, _)| key(service)).collect();
        let slices = proxy::by_service(slices, |key| keys.contains(key));
        let mut plan = Plan { of: self, slices, owners: HashMap::new(), exposures: Vec::new(), problems: Vec::new() };
        for (service, spec) in &open {
            plan.node_ports(service, spec);
        }
        for (service, spec) in &open {
            plan.own_ports(service, spec);
        }
        (plan.exposures, plan.problems)
    }
}

fn key(service: &SharedObject) -> (String, String) {
    (service.namespace().to_owned(), service.name().to_owned())
}

/// A Service that something outside may be able to reach.
fn exposed(service: &SharedObject) -> Option<(&SharedObject, ServiceSpec)> {
    let kind = service.str_at("/spec/type");
    let externals =
        service.pointer("/spec/externalIPs").and_then(|all| all.as_array()).is_some_and(|all| !all.is_empty());
    if !(matches!(kind, "NodePort" | "LoadBalancer") || (externals && kind != "ExternalName")) {
        return None;
    }
    Some((service, Service::deserialize(&**service).ok()?.spec?))
}

pub(crate) fn text(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

struct Plan<'a> {
    of: &'a Exposed,
    slices: Slices,
    /// Who has a port already.
    owners: HashMap<(SocketAddr, Protocol), String>,
    exposures: Vec<Exposure>,
    problems: Vec<Problem>,
}

impl Plan<'_> {
    fn problem(&mut self, service: &SharedObject, reason: &'static str, message: String) {
        let (namespace, name) = key(service);
        self.problems.push(Problem { namespace, name, reason, message });
    }

    fn add(&mut self, service: &SharedObject, listen: SocketAddr, protocol: Protocol, sources: &Ranges, leads: Leads) {
        let (namespace, name) = key(service);
        let port = format!("{listen}/{}", text(protocol));
        if let Some(owner) = self.owners.get(&(listen, protocol)) {
            return self.problem(service, "PortInUse", format!("{port} is Service {owner}'s, which is older"));
        }
        if self.exposures.len() >= MOST {
            let message = format!("{port} is not open: {MOST} ports of the host are, and no more can be");
            return self.problem(service, "TooManyPorts", message);
        }
        self.owners.insert((listen, protocol), format!("{namespace}/{name}"));
        self.exposures.push(Exposure { namespace, name, listen, protocol, leads, sources: sources.clone() });
    }

    fn leads(&self, service: &SharedObject, spec: &ServiceSpec, port: &ServicePort, v4: bool) -> Leads {
        let local = spec.external_traffic_policy.as_deref() == Some("Local");
        let slices = self.slices.get(&key(service)).map(Vec::as_slice).unwrap_or_default();
        let endpoints = proxy::endpoints(slices, v4, port, (&self.of.place, local));
        Leads::To { endpoints, sticky: spec.session_affinity.as_deref() == Some("ClientIP") }
    }

    /// Node ports, and the port that tells whether there are endpoints.
    fn node_ports(&mut self, service: &SharedObject, spec: &ServiceSpec) {
        let (families, sources) = (families(spec), sources(spec));
        let health = spec.health_check_node_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
        for address in self.of.exposing.node_ports.iter().filter(|address| families.contains(&address.is_ipv4())) {
            for port in spec.ports.iter().flatten() {
                let Some(number) = port.node_port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0) else {
                    continue;
                };
                let leads = self.leads(service, spec, port, address.is_ipv4());
                let protocol = proxy::protocol(port.protocol.as_deref());
                self.add(service, (*address, number).into(), protocol, &sources, leads);
            }
            if let Some(number) = health {
                let leads = Leads::Health { endpoints: self.local_endpoints(service, spec) };
                self.add(service, (*address, number).into(), Protocol::Tcp, &Ranges::default(), leads);
            }
        }
    }

    /// Addresses of endpoints here.
    fn local_endpoints(&self, service: &SharedObject, spec: &ServiceSpec) -> usize {
        let slices = self.slices.get(&key(service)).map(Vec::as_slice).unwrap_or_default();
        let v4 = families(spec).first().copied().unwrap_or(true);
        let ports = spec.ports.iter().flatten();
        let all = ports.flat_map(|port| proxy::endpoints(slices, v4, port, (&self.of.place, true)));
        all.map(|(address, _)| address).collect::<BTreeSet<IpAddr>>().len()
    }

    /// The Service's own ports, at the addresses of a load balancer and at external ones.
    fn own_ports(&mut self, service: &SharedObject, spec: &ServiceSpec) {
        let (families, sources) = (families(spec), sources(spec));
        let mut addresses: Vec<IpAddr> = Vec::new();
        let mut refused = BTreeSet::new();
        if api::balancing::is_ours(service) {
            let ingress = service.pointer("/status/loadBalancer/ingress").and_then(|all| all.as_array());
            for one in ingress.into_iter().flatten() {
                // What is in a status may be anybody's writing; the administrator's word is the configuration.
                let own = one.str_at("/ip").parse().ok().filter(|ip| self.of.exposing.load_balancers.contains(ip));
                addresses.extend(own);
                for port in one.pointer("/ports").and_then(|all| all.as_array()).into_iter().flatten() {
                    if let (Some(address), false) = (own, port.str_at("/error").is_empty()) {
                        let number = port.pointer("/port").and_then(|n| n.as_i64()).unwrap_or(0);
                        refused.insert((address, number, port.str_at("/protocol").to_owned()));
                    }
                }
            }
        }
        let allowed: Vec<Block> = self.of.exposing.external_ips.iter().map(|network| block(*network)).collect();
        let allowed = ranges(&allowed);
        for external in spec.external_ips.iter().flatten() {
            match external.parse::<IpAddr>() {
                Ok(address) if allowed.contains(address) => addresses.push(address),
                _ => {
                    let message = format!(
                        "spec.externalIPs: {external} is not open: an administrator has to allow it, atoll up --external-ips"
                    );
                    self.problem(service, "ExternalAddressRefused", message);
                }
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        for address in addresses.into_iter().filter(|address| families.contains(&address.is_ipv4())) {
            for port in spec.ports.iter().flatten() {
                let Ok(number) = u16::try_from(port.port) else { continue };
                let protocol = proxy::protocol(port.protocol.as_deref());
                if !refused.contains(&(address, i64::from(port.port), text(protocol).to_owned())) {
                    let leads = self.leads(service, spec, port, address.is_ipv4());
                    self.add(service, (address, number).into(), protocol, &sources, leads);
                }
            }
        }
    }
}

/// Whether each is IPv4, the first being the Service's first.
fn families(spec: &ServiceSpec) -> Vec<bool> {
    proxy::cluster_ips(spec).iter().map(IpAddr::is_ipv4).collect()
}

fn block(network: Network) -> Block {
    Block { network, except: Vec::new() }
}

/// Who may connect. A list of which nothing can be read lets in nobody.
fn sources(spec: &ServiceSpec) -> Ranges {
    let asked = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    if asked.is_empty() || spec.type_.as_deref() != Some("LoadBalancer") {
        return Ranges::default();
    }
    let blocks: Vec<Block> = asked.iter().filter_map(|text| text.trim().parse().ok()).map(block).collect();
    match blocks.is_empty() {
        true => ranges(&[block(Network::whole(Ipv4Addr::UNSPECIFIED))]),
        false => ranges(&blocks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn exposed() -> Exposed {
        let addresses = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
        let exposing = Exposing {
            node_ports: addresses(&["127.0.0.1", "::1"]),
            load_balancers: addresses(&["192.0.2.1"]),
            external_ips: vec!["198.51.100.0/24".parse().unwrap()],
        };
        Exposed { place: Place { node: "here".into(), zone: None }, exposing }
    }

    fn service(name: &str, spec: Value, status: Value) -> SharedObject {
        let mut all = json!({"clusterIP": "10.43.0.5", "ports": [{"port": 80, "nodePort": 30080}]});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let created = format!("2026-01-01T00:00:{:02}Z", name.len());
        Arc::new(json!({"apiVersion": "v1", "kind": "Service", "spec": all, "status": status,
            "metadata": {"name": name, "namespace": "ns", "creationTimestamp": created}}))
    }

    fn slice(service: &str) -> SharedObject {
        let endpoint = |address: &str, node: &str| json!({"addresses": [address], "nodeName": node});
        Arc::new(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": service, "namespace": "ns", "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "", "port": 8080}],
            "endpoints": [endpoint("10.42.0.3", "here"), endpoint("10.42.0.4", "there")]}))
    }

    /// `127.0.0.1:30080 ns/web 2`: where, whose, and to how many endpoints.
    fn told(services: &[SharedObject]) -> (Vec<String>, Vec<String>) {
        let slices: Vec<SharedObject> = services.iter().map(|service| slice(service.name())).collect();
        let (exposures, problems) = exposed().compute(services, &slices);
        let one = |e: &Exposure| {
            let to = match &e.leads {
                Leads::To { endpoints, .. } => endpoints.len().to_string(),
                Leads::Health { endpoints } => format!("health {endpoints}"),
            };
            format!("{} {} {to}", e.listen, e.name)
        };
        let problem = |p: &Problem| format!("{} {}: {}", p.name, p.reason, p.message);
        (exposures.iter().map(one).collect(), problems.iter().map(problem).collect())
    }

    #[test]
    fn node_ports_listen_where_the_administrator_says() {
        let plain = service("plain", json!({}), json!({}));
        let web = service("web", json!({"type": "NodePort"}), json!({}));
        assert_eq!(told(&[plain, web]), (vec!["127.0.0.1:30080 web 2".into()], vec![]));
        let dual = json!({"type": "NodePort", "clusterIPs": ["10.43.0.5", "fd00:10:43::5"]});
        let (ports, _) = told(&[service("web", dual, json!({}))]);
        assert_eq!(ports, ["127.0.0.1:30080 web 2", "[::1]:30080 web 0"]);
    }

    #[test]
    fn a_load_balancer_listens_at_addresses_of_its_status_that_are_allowed() {
        let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30090,
            "loadBalancerSourceRanges": ["203.0.113.0/24 "]});
        let status = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": "192.0.2.99"}]}});
        let (ports, problems) = told(&[service("web", spec.clone(), status.clone())]);
        assert_eq!(ports, ["127.0.0.1:30080 web 1", "127.0.0.1:30090 web health 1", "192.0.2.1:80 web 1"]);
        assert!(problems.is_empty());
        let all = [service("web", spec.clone(), status.clone())];
        let (exposures, _) = exposed().compute(&all, &[]);
        assert!(exposures[2].admits("203.0.113.9".parse().unwrap()));
        assert!(!exposures[2].admits("127.0.0.1".parse().unwrap()));
        assert!(!exposures[0].admits("2001:db8::1".parse().unwrap()));
        assert!(exposures[1].admits("127.0.0.1".parse().unwrap()));
        // A port that the controller refused, and a class of others.
        let refused = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1",
            "ports": [{"port": 80, "protocol": "TCP", "error": "PortInUse"}]}]}});
        assert_eq!(told(&[service("web", spec.clone(), refused)]).0.len(), 2);
        let mut foreign = spec;
        foreign["loadBalancerClass"] = "example.com/other".into();
        assert_eq!(told(&[service("web", foreign, status)]).0.len(), 2);
    }

    #[test]
    fn the_older_service_has_the_port_and_external_addresses_must_be_allowed() {
        let spec = |ips: &[&str]| json!({"externalIPs": ips, "ports": [{"port": 80}]});
        let services = [
            service("newer", spec(&["198.51.100.7", "192.0.2.50"]), json!({})),
            service("old", spec(&["198.51.100.7"]), json!({})),
        ];
        let (ports, problems) = told(&services);
        assert_eq!(ports, ["198.51.100.7:80 old 2"]);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("newer ExternalAddressRefused: spec.externalIPs: 192.0.2.50"), "{problems:?}");
        assert!(problems[1].starts_with("newer PortInUse: 198.51.100.7:80/TCP is Service ns/old's"), "{problems:?}");
    }

    #[test]
    fn ranges_that_cannot_be_read_let_in_nobody() {
        let spec = json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["nonsense"]});
        let (exposures, _) = exposed().compute(&[service("web", spec, json!({}))], &[]);
        assert!(!exposures[0].admits("203.0.113.9".parse().unwrap()) && !exposures[0].admits("::1".parse().unwrap()));
    }
}
