//! Services as the network sees them: rules for ClusterIPs and names for DNS, from Services and EndpointSlices. Pure
//! functions and one task: a change acts at once; further ones are gathered for as long as that took, at most for [`PAUSE`].
//! Only Services that changed are read again ([`known`]), and the network is handed only those.

mod known;

use crate::exposed::Followed;
use crate::ports::{NetworkError, Networks, Protocol, Records, ServiceRule};
use api::informer::{Change, Key};
use api::k8s::api::core::v1::{ServicePort, ServiceSpec};
use api::k8s::api::discovery::v1::{Endpoint, EndpointSlice};
use api::object::{Meta, SharedObject};
use api::topology::{Hints, Place};
use known::{Changed, Known, Seen};
use network::dns::{EndpointRecord, PortRecord, ServiceKind, ServiceRecord};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const PAUSE: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(2);
/// Everything is handed over again this often, should the kernel's state have been touched.
const RESYNC: Duration = Duration::from_secs(300);

/// Runs until cancelled.
pub(crate) async fn run(node: String, followed: Followed, networks: Arc<dyn Networks>) {
    let Followed { own, services, slices } = followed;
    let (mut service_changes, mut slice_changes) = (services.subscribe(), slices.subscribe());
    let mut own_changes = own.subscribe();
    let mut place = Place::of(&node, &own);
    services.synced().await;
    slices.synced().await;
    let mut known = Known::default();
    // What has changed since the last turn; absent: anything may have.
    let mut told: Option<Vec<Told>> = None;
    loop {
        let begun = Instant::now();
        while own_changes.try_next().is_some() {}
        let here = Place::of(&node, &own);
        if here != place {
            (place, told) = (here, None);
        }
        while let Some(change) = service_changes.try_next() {
            note(&mut told, Told::Service, change);
        }
        while let Some(change) = slice_changes.try_next() {
            note(&mut told, Told::Slice, change);
        }
        let changed = match told.take() {
            Some(told) => Some(known.apply(told.into_iter().map(|told| match told {
                Told::Service(key) => Seen::Service(key.clone(), services.get_key(&key)),
                Told::Slice(key) => Seen::Slice(key.clone(), slices.get_key(&key)),
            }))),
            None => {
                known = Known::of(&place, services.list(), slices.list());
                None
            }
        };
        let failed = hand_over(&*networks, &known, changed).await.is_err();
        tokio::time::sleep(begun.elapsed().min(PAUSE)).await;
        told = (!failed).then(Vec::new);
        tokio::select! {
            change = service_changes.next() => note(&mut told, Told::Service, change),
            change = slice_changes.next() => note(&mut told, Told::Slice, change),
            _ = own_changes.next() => {}
            () = tokio::time::sleep(if failed { RETRY } else { RESYNC }) => told = None,
        }
    }
}

enum Told {
    Service(Key),
    Slice(Key),
}

fn note(told: &mut Option<Vec<Told>>, of: fn(Key) -> Told, change: Change) {
    match change {
        Change::Object { key, .. } => told.iter_mut().for_each(|told| told.push(of(key.clone()))),
        Change::Everything => *told = None,
    }
}

/// Gives the network what changed, or, where that is not known here or there, all of it.
async fn hand_over(networks: &dyn Networks, known: &Known, changed: Option<Changed>) -> Result<(), NetworkError> {
    let names = changed.as_ref().is_none_or(|changed| changed.names);
    let done = match changed {
        Some(Changed { before, after, .. }) if before.is_empty() && after.is_empty() => Ok(true),
        Some(Changed { before, after, .. }) => networks.change_services(before, after).await,
        None => Ok(false),
    };
    let services = match done {
        Ok(false) => networks.sync_services(known.rules()).await,
        other => other.map(drop),
    };
    let records = if names { networks.sync_dns(known.records()).await } else { Ok(()) };
    for error in [&services, &records].into_iter().filter_map(|outcome| outcome.as_ref().err()) {
        tracing::warn!("services are not up to date, trying again: {error}");
    }
    services.and(records)
}

pub(crate) fn protocol(text: Option<&str>) -> Protocol {
    match text {
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        _ => Protocol::Tcp,
    }
}

/// By namespace and name of their Service.
pub(crate) type Slices = BTreeMap<(String, String), Vec<EndpointSlice>>;

/// Those of Services that `of` chooses, by namespace and name.
pub(crate) fn by_service<'a>(
    slices: impl IntoIterator<Item = &'a SharedObject>,
    of: impl Fn(&(String, String)) -> bool,
) -> Slices {
    let mut by_service: Slices = BTreeMap::new();
    for object in slices {
        let Some(service) = object.label("kubernetes.io/service-name") else { continue };
        let key = (object.namespace().to_owned(), service.to_owned());
        if !of(&key) {
            continue;
        }
        let Ok(slice) = EndpointSlice::deserialize(&**object) else { continue };
        if matches!(slice.address_type.as_str(), "IPv4" | "IPv6") {
            by_service.entry(key).or_default().push(slice);
        }
    }
    by_service
}

/// Pure: rules and names of these objects.
pub(crate) fn compute(
    place: &Place,
    services: Vec<SharedObject>,
    slices: Vec<SharedObject>,
) -> (Vec<ServiceRule>, Records) {
    let known = Known::of(place, services, slices);
    (known.rules(), known.records())
}

fn rules_and_record(
    place: &Place,
    key: (String, String),
    spec: &ServiceSpec,
    slices: &[EndpointSlice],
) -> (Vec<ServiceRule>, Option<ServiceRecord>) {
    let mut rules = Vec::new();
    let addresses = cluster_ips(spec);
    let external = spec.type_.as_deref() == Some("ExternalName");
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let kind = if external {
        let name = spec.external_name.as_deref().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        (!name.is_empty()).then_some(ServiceKind::External(name))
    } else if headless {
        Some(ServiceKind::Headless(headless_endpoints(spec, slices)))
    } else {
        for address in &addresses {
            rules.extend(rules_of(place, &key, spec, *address, slices));
        }
        (!addresses.is_empty()).then_some(ServiceKind::ClusterIp(addresses))
    };
    let record = kind.map(|kind| {
        let ports = dns_ports(spec, slices, headless);
        ServiceRecord { namespace: key.0, name: key.1, kind, ports }
    });
    (rules, record)
}

/// One for each of the Service's families.
pub(crate) fn cluster_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let all = spec.cluster_ips.iter().flatten().map(String::as_str).chain(spec.cluster_ip.as_deref());
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in all.filter_map(|text| text.parse().ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Ready, or, where none is, those that still serve while they end
/// (<https://kubernetes.io/docs/reference/networking/virtual-ips/#traffic-distribution>).
fn usable<'a>(endpoints: &[&'a Endpoint]) -> Vec<&'a Endpoint> {
    let condition = |e: &Endpoint, pick: fn(&api::k8s::api::discovery::v1::EndpointConditions) -> Option<bool>| {
        e.conditions.as_ref().and_then(pick)
    };
    let ready: Vec<_> = endpoints.iter().copied().filter(|e| condition(e, |c| c.ready) != Some(false)).collect();
    if !ready.is_empty() {
        return ready;
    }
    endpoints
        .iter()
        .copied()
        .filter(|e| condition(e, |c| c.serving) == Some(true) && condition(e, |c| c.terminating) == Some(true))
        .collect()
}

fn hints<'a>(endpoint: &'a &Endpoint) -> Hints<'a> {
    let Some(hints) = &endpoint.hints else { return Hints::default() };
    Hints {
        nodes: hints.for_nodes.iter().flatten().map(|node| &*node.name).collect(),
        zones: hints.for_zones.iter().flatten().map(|zone| &*zone.name).collect(),
    }
}

/// Where connections to a Service's port go, of one family, from a node; only to what is there too, if that is asked for.
pub(crate) fn endpoints(
    slices: &[EndpointSlice],
    v4: bool,
    port: &ServicePort,
    (place, local): (&Place, bool),
) -> Vec<(IpAddr, u16)> {
    let (family, name) = (if v4 { "IPv4" } else { "IPv6" }, port.name.as_deref().unwrap_or(""));
    let mut candidates: Vec<(&Endpoint, u16)> = Vec::new();
    for slice in slices.iter().filter(|slice| slice.address_type == family) {
        let found = slice.ports.iter().flatten().find(|p| p.name.as_deref().unwrap_or("") == name);
        let Some(target) = found.and_then(|p| p.port).and_then(|p| u16::try_from(p).ok()) else { continue };
        let here = |e: &&Endpoint| !local || e.node_name.as_deref() == Some(&*place.node);
        candidates.extend(slice.endpoints.iter().filter(here).map(|e| (e, target)));
    }
    let mut chosen = usable(&candidates.iter().map(|c| c.0).collect::<Vec<_>>());
    if !local {
        chosen = place.near(chosen, hints);
    }
    let endpoints: BTreeSet<(IpAddr, u16)> = candidates
        .iter()
        .filter(|(e, _)| chosen.iter().any(|c| std::ptr::eq(*c, *e)))
        .flat_map(|(e, target)| e.addresses.iter().filter_map(|a| a.parse().ok()).map(|a| (a, *target)))
        .collect();
    endpoints.into_iter().collect()
}

fn rules_of(
    place: &Place,
    key: &(String, String),
    spec: &ServiceSpec,
    address: IpAddr,
    slices: &[EndpointSlice],
) -> Vec<ServiceRule> {
    let local = spec.internal_traffic_policy.as_deref() == Some("Local");
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let seconds =
            spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref()).and_then(|c| c.timeout_seconds);
        seconds.and_then(|s| u32::try_from(s).ok()).unwrap_or(10_800)
    });
    let mut out = Vec::new();
    for port in spec.ports.iter().flatten() {
        let Ok(number) = u16::try_from(port.port) else { continue };
        let endpoints = endpoints(slices, address.is_ipv4(), port, (place, local));
        out.push(ServiceRule {
            namespace: key.0.clone(),
            name: key.1.clone(),
            cluster_ip: address,
            protocol: protocol(port.protocol.as_deref()),
            port: number,
            endpoints,
            affinity_seconds: affinity,
            sources: Vec::new(),
            activated: false,
        });
    }
    out
}

fn headless_endpoints(spec: &ServiceSpec, slices: &[EndpointSlice]) -> Vec<EndpointRecord> {
    let all: Vec<&Endpoint> = slices.iter().flat_map(|s| s.endpoints.iter()).collect();
    let chosen = if spec.publish_not_ready_addresses == Some(true) { all } else { usable(&all) };
    let mut out = Vec::new();
    for endpoint in chosen {
        for address in endpoint.addresses.iter().filter_map(|a| a.parse().ok()) {
            let record = EndpointRecord { address, hostname: endpoint.hostname.clone().filter(|h| !h.is_empty()) };
            if !out.contains(&record) {
                out.push(record);
            }
        }
    }
    out
}

fn dns_ports(spec: &ServiceSpec, slices: &[EndpointSlice], headless: bool) -> Vec<PortRecord> {
    let of_slices = |name: &str| {
        let ports = slices.iter().flat_map(|s| s.ports.iter().flatten());
        ports.filter(|p| p.name.as_deref().unwrap_or("") == name).find_map(|p| p.port)
    };
    let ports = spec.ports.iter().flatten().filter_map(|p| {
        let name = p.name.clone().filter(|n| !n.is_empty());
        let number = if headless { of_slices(name.as_deref().unwrap_or("")).unwrap_or(p.port) } else { p.port };
        Some(PortRecord { name, protocol: protocol(p.protocol.as_deref()), port: u16::try_from(number).ok()? })
    });
    ports.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn at(zone: &str) -> Place {
        Place { node: "n".into(), zone: Some(zone.into()) }
    }
    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn service(name: &str, spec: Value) -> SharedObject {
        Arc::new(
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"}, "spec": spec}),
        )
    }
    fn slice(service: &str, ports: Value, endpoints: Value) -> SharedObject {
        Arc::new(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{service}-1"), "namespace": "ns", "labels": {"kubernetes.io/service-name": service}},
            "ports": ports, "endpoints": endpoints}))
    }
    fn endpoint(address: &str, ready: bool) -> Value {
        json!({"addresses": [address], "conditions": {"ready": ready}})
    }

    #[test]
    fn cluster_ips() {
        let services = [service(
            "web",
            json!({"clusterIP": "10.43.0.5", "sessionAffinity": "ClientIP", "ports": [
                {"name": "http", "port": 80, "targetPort": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
        )];
        let slices = [slice(
            "web",
            json!([{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]),
            json!([endpoint("10.42.0.9", true), endpoint("10.42.0.3", true), endpoint("10.42.0.4", false)]),
        )];
        let (rules, records) = compute(&at("a"), services.to_vec(), slices.to_vec());
        let two = |port| vec![(ip("10.42.0.3"), port), (ip("10.42.0.9"), port)];
        assert_eq!(rules.len(), 2);
        assert_eq!((rules[0].protocol, rules[0].port, &rules[0].endpoints), (Protocol::Tcp, 80, &two(8080)));
        assert_eq!((rules[1].protocol, rules[1].port, &rules[1].endpoints), (Protocol::Udp, 53, &two(5353)));
        assert_eq!(rules[0].affinity_seconds, Some(10_800));
        assert_eq!(records.services[0].kind, ServiceKind::ClusterIp(vec![ip("10.43.0.5")]));
        assert_eq!(records.services[0].ports[0].port, 80);
    }

    #[test]
    fn only_what_changes_is_handed_on() {
        let spec = |address: &str| json!({"clusterIP": address, "ports": [{"port": 80}]});
        let (web, other) = (service("web", spec("10.43.0.5")), service("other", spec("10.43.0.6")));
        let of = |name: &str, addresses: &[&str]| {
            let all = addresses.iter().map(|address| endpoint(address, true)).collect();
            slice(name, json!([{"name": "", "port": 80}]), Value::Array(all))
        };
        let service =
            |object: &SharedObject, there: bool| Seen::Service(Key::of(object), there.then(|| object.clone()));
        let slice = |object: &SharedObject, there: bool| Seen::Slice(Key::of(object), there.then(|| object.clone()));
        let first = of("web", &["10.42.0.3"]);
        let mut known = Known::of(&at("a"), vec![web.clone()], vec![first.clone(), of("other", &["10.42.0.9"])]);
        let mut apply = |seen: Vec<Seen>| {
            let Changed { before, after, names } = known.apply(seen.into_iter());
            let all = (known.rules().len(), known.records().services.len());
            let counts = |rules: &[ServiceRule]| rules.iter().map(|rule| rule.endpoints.len()).collect::<Vec<_>>();
            (counts(&before), counts(&after), names, all)
        };
        assert_eq!(apply(vec![slice(&first, true)]), (vec![], vec![], false, (1, 1)), "nothing is new");
        let second = of("web", &["10.42.0.3", "10.42.0.4"]);
        assert_eq!(apply(vec![slice(&second, true)]), (vec![1], vec![2], false, (1, 1)));
        assert_eq!(apply(vec![slice(&second, false)]), (vec![2], vec![0], false, (1, 1)));
        assert_eq!(apply(vec![service(&other, true)]), (vec![], vec![1], true, (2, 2)), "its slice came first");
        assert_eq!(apply(vec![service(&web, false), slice(&second, true)]), (vec![0], vec![], true, (1, 1)));
        assert_eq!(apply(vec![service(&web, true)]), (vec![], vec![2], true, (2, 2)));
        // A slice that is another Service's from now on.
        let mut moved = (*second).clone();
        moved.set_label("kubernetes.io/service-name", "other");
        assert_eq!(apply(vec![slice(&Arc::new(moved), true)]), (vec![1, 2], vec![3, 0], false, (2, 2)));
    }

    #[test]
    fn each_family_has_its_own_endpoints() {
        let spec = json!({"clusterIP": "fd00:10:43::5", "clusterIPs": ["fd00:10:43::5", "10.43.0.5"], "ports": [{"port": 80}]});
        let ports = json!([{"name": "", "port": 8080}]);
        let mut six = (*slice("web", ports.clone(), json!([endpoint("fd00:10:42::3", true)]))).clone();
        six["addressType"] = "IPv6".into();
        six["metadata"]["name"] = "web-2".into();
        let slices = [slice("web", ports, json!([endpoint("10.42.0.3", true)])), Arc::new(six)];
        let (rules, records) = compute(&at("a"), vec![service("web", spec)], slices.to_vec());
        let of = |text: &str| &rules.iter().find(|rule| rule.cluster_ip == ip(text)).unwrap().endpoints;
        assert_eq!(of("10.43.0.5"), &[(ip("10.42.0.3"), 8080)]);
        assert_eq!(of("fd00:10:43::5"), &[(ip("fd00:10:42::3"), 8080)]);
        assert_eq!(records.services[0].kind, ServiceKind::ClusterIp(vec![ip("fd00:10:43::5"), ip("10.43.0.5")]));
    }

    #[test]
    fn without_ready_endpoints_those_that_still_serve_are_used() {
        let services = [service("web", json!({"clusterIP": "10.43.0.5", "ports": [{"port": 80}]}))];
        let ending =
            json!({"addresses": ["10.42.0.7"], "conditions": {"ready": false, "serving": true, "terminating": true}});
        let go = |endpoints: Value| {
            let slices = [slice("web", json!([{"name": "", "port": 80}]), endpoints)];
            compute(&at("a"), services.to_vec(), slices.to_vec()).0[0].endpoints.clone()
        };
        assert_eq!(go(json!([ending, endpoint("10.42.0.8", false)])), [(ip("10.42.0.7"), 80)]);
        assert_eq!(go(json!([ending, endpoint("10.42.0.8", true)])), [(ip("10.42.0.8"), 80)]);
        assert!(go(json!([])).is_empty());
    }

    #[test]
    fn hints_lead_to_what_is_near() {
        let services = [service("web", json!({"clusterIP": "10.43.0.5", "ports": [{"port": 80}]}))];
        let go = |place: &Place, endpoints: Value| {
            let slices = [slice("web", json!([{"name": "", "port": 80}]), endpoints)];
            let rules = compute(place, services.to_vec(), slices.to_vec()).0;
            rules[0].endpoints.iter().map(|(address, _)| address.to_string()).collect::<Vec<_>>().join(" ")
        };
        let hinted = |address: &str, ready: bool, zone: &str, node: Option<&str>| {
            let mut value = endpoint(address, ready);
            value["hints"] =
                json!({"forZones": [{"name": zone}], "forNodes": node.map(|node| json!([{"name": node}]))});
            value
        };
        let two = json!([hinted("10.42.0.3", true, "a", None), hinted("10.42.0.4", true, "b", None)]);
        assert_eq!(go(&at("a"), two.clone()), "10.42.0.3");
        assert_eq!(go(&at("b"), two.clone()), "10.42.0.4");
        let both = "10.42.0.3 10.42.0.4";
        assert_eq!(go(&at("c"), two.clone()), both, "none is for here");
        assert_eq!(go(&Place { zone: None, ..at("") }, two), both, "the node has no zone");
        let one = json!([hinted("10.42.0.3", true, "a", None), endpoint("10.42.0.4", true)]);
        assert_eq!(go(&at("a"), one), both, "not each has hints");
        let unready = json!([hinted("10.42.0.3", false, "a", None), hinted("10.42.0.4", true, "b", None)]);
        assert_eq!(go(&at("a"), unready), "10.42.0.4", "what is near is not ready");
        let nodes = json!([hinted("10.42.0.3", true, "a", Some("m")), hinted("10.42.0.4", true, "b", Some("n"))]);
        assert_eq!(go(&at("a"), nodes), "10.42.0.4", "the node comes before the zone");
    }

    #[test]
    fn headless_external_and_unset() {
        let services = [
            service("db", json!({"clusterIP": "None", "ports": [{"name": "pg", "port": 5432}]})),
            service("out", json!({"type": "ExternalName", "externalName": "Example.COM."})),
            service("new", json!({"ports": [{"port": 1}]})),
        ];
        let endpoints = json!([{"addresses": ["10.42.0.3"], "hostname": "db-0"}, endpoint("10.42.0.4", false)]);
        let slices = [slice("db", json!([{"name": "pg", "port": 6000}]), endpoints)];
        let (rules, records) = compute(&at("a"), services.to_vec(), slices.to_vec());
        assert!(rules.is_empty());
        let record = EndpointRecord { address: ip("10.42.0.3"), hostname: Some("db-0".into()) };
        assert_eq!(records.services[0].kind, ServiceKind::Headless(vec![record]));
        assert_eq!(records.services[0].ports[0].port, 6000);
        assert_eq!(records.services[1].kind, ServiceKind::External("example.com".into()));
        assert_eq!(records.services.len(), 2);
    }
}
