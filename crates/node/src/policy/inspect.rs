//! What `atoll network` asks, through the API.

use super::{Compiled, Enforcer};
use crate::adaptors::RouterNetworks;
use crate::config::Config;
use crate::exposed::{Exposed, Followed};
use crate::ports::{Exposure, Protocol};
use crate::proxy;
use api::inspect::{Answer, Explained, Inspect, Lines, Question, Told};
use api::status::{Status, StatusResult};
use api::topology::Place;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use network::policy::{Flow, Reason, pod_address};
use network::refused::{Refused, RefusedLog};
use network::{Cause, Leads, Pattern, RouterConfig};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// Questions that are being answered, at most.
const ASKERS: usize = 16;
/// Answers that are written together, if there are so many.
const AT_ONCE: usize = 64;
/// How often a follower of the log is told what is new.
const TURN: Duration = Duration::from_millis(200);

pub(crate) struct Inspector {
    pub(super) config: RouterConfig,
    pub(super) router: Arc<RouterNetworks>,
    pub(super) enforcer: Arc<Enforcer>,
    followed: Followed,
    exposed: Exposed,
    log: Option<RefusedLog>,
    slots: Arc<Semaphore>,
}

impl Inspector {
    pub fn new(config: &Config, router: Arc<RouterNetworks>, enforcer: Arc<Enforcer>, followed: Followed) -> Inspector {
        let log = match RefusedLog::start(router.router()) {
            Ok(log) => Some(log),
            Err(error) => {
                tracing::warn!("atoll network log will show nothing: {error}");
                None
            }
        };
        let place = Place { node: config.name.clone(), zone: None };
        let exposed = Exposed { place, exposing: config.exposing.clone() };
        Inspector {
            config: router.router().config().clone(),
            router,
            enforcer,
            followed,
            exposed,
            log,
            slots: Arc::new(Semaphore::new(ASKERS)),
        }
    }

    fn place(&self) -> Place {
        Place::of(&self.exposed.place.node, &self.followed.own)
    }

    /// A line for each answer.
    pub async fn answer(self: Arc<Self>, question: Question) -> StatusResult<Lines> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            let mut status =
                Status::new(api::status::Reason::TooManyRequests, "the network is asked too much at once; try again");
            status.retry_after_seconds = Some(1);
            status
        })?;
        let answers = match question {
            Question::Explain { from, to, protocol, port } => {
                let asked = (from.as_str(), to.as_str(), protocol.as_str(), port);
                let all = self.explain_all(asked).await.map_err(Status::bad_request)?;
                stream::iter(all.into_iter().map(Answer::Explained)).boxed()
            }
            Question::Log { follow } => self.refusals(follow),
            Question::Connections => stream::iter(self.connections().await?).boxed(),
            Question::Capture { namespace, pod, port, count } => {
                let frames = self.capture(&format!("{namespace}/{pod}"), port).await?;
                let frames =
                    frames.take(count.map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(usize::MAX)));
                stream::iter([Answer::Capturing]).chain(frames).boxed()
            }
        };
        let line = move |some: Vec<Answer>| {
            let _held = &slot;
            lines(&some)
        };
        Ok(answers.ready_chunks(AT_ONCE).map(line).boxed())
    }

    async fn explain_all(&self, asked: (&str, &str, &str, Option<u16>)) -> Result<Vec<Explained>, String> {
        let current = self.enforcer.settled().await;
        match host_name(&current, asked.1) {
            Some(name) => self.explain_name(&current, asked, &name).await,
            None => self.explain(&current, asked),
        }
    }

    /// What was refused, and what will be if it is followed.
    fn refusals(self: Arc<Self>, follow: bool) -> BoxStream<'static, Answer> {
        let turn = move |(inspector, after, first): (Arc<Inspector>, u64, bool)| async move {
            if !first {
                if !follow {
                    return None;
                }
                tokio::time::sleep(TURN).await;
            }
            let news = inspector.log.as_ref().map(|log| log.since(after)).unwrap_or_default();
            let after = news.last().map_or(after, |refused| refused.number);
            let current = inspector.enforcer.current();
            let told: Vec<Answer> = news.iter().map(|one| Answer::Refused(inspector.told(&current, one))).collect();
            Some((stream::iter(told), (inspector, after, false)))
        };
        stream::unfold((self, 0, true), turn).flatten().boxed()
    }

    fn told(&self, current: &Compiled, refused: &Refused) -> Told {
        let flow = &refused.flow;
        let (egress, ingress) = self.judge(current, flow);
        let limits = self.config.limits;
        let why = match (refused.cause, &egress, &ingress) {
            (Cause::Connections, ..) => {
                let most = limits.connections;
                format!(
                    "limit: {most} connections of one workload, open or new in a second (atoll up --workload-connections)"
                )
            }
            (Cause::Questions, ..) => format!("limit: {} questions a second to the DNS server", limits.questions),
            (Cause::Fragments, ..) => "limit: parts of packets from one workload".to_owned(),
            (Cause::Groups, ..) => "multicast and broadcast go nowhere: there is no layer 2".to_owned(),
            (Cause::Announcements, ..) => Reason::RouterAlone.to_string(),
            (Cause::Policy, Err(why), _) => format!("egress: {why}"),
            (Cause::Policy, _, Err(why)) => format!("ingress: {why}"),
            // Policies have changed since, or a packet in the middle of a connection that was ended.
            (Cause::Policy, Ok(_), Ok(_)) => "no longer refused".to_owned(),
        };
        Told {
            at: refused.at.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            from: self.name(current, flow.source),
            to: self.name(current, flow.destination),
            protocol: protocol_name(flow.protocol),
            port: flow.port,
            why,
        }
    }

    /// Why each side lets a flow through, or why not.
    fn judge(&self, current: &Compiled, flow: &Flow) -> (Result<String, String>, Result<String, String>) {
        if self.is_node(flow.source) {
            let why = "the node, with its probes and the gateway, reaches every workload".to_owned();
            return (Ok(why.clone()), Ok(why));
        }
        let names = self.router.router().by_name();
        let decision = current.policies.decide(&self.config, flow, &|key, address| names.has(key, address));
        let text = |reason: &Reason| if reason.allows() { Ok(reason.to_string()) } else { Err(reason.to_string()) };
        if self.is_node(flow.destination) {
            let dns = flow.port == 53 && self.is_dns(flow.destination);
            return match dns || matches!(flow.protocol, 1 | 58) {
                true => (Ok("names and ping are for everyone".into()), Ok("names and ping are for everyone".into())),
                false => (Ok(String::new()), Err("the node and Atoll's own ports are closed to workloads".into())),
            };
        }
        let inside = self.config.networks().contains(flow.destination);
        if !inside && !current.policies.is_outside(flow.destination) {
            let why = "the address is outside, and no uplink leads there (atoll up --egress)".to_owned();
            return (text(&decision.egress), Err(why));
        }
        if !self.config.is_foreign(flow.source) {
            return (text(&decision.egress), text(&decision.ingress));
        }
        let opened = self.opened(flow);
        let egress = match (&opened, decision.egress.allows()) {
            (Ok(port), _) => Ok(format!("it is outside, and comes by {port}")),
            (Err(_), true) => text(&decision.egress),
            (Err(why), false) => Err(why.clone()),
        };
        let ingress = match (&decision.ingress, opened) {
            (Reason::OtherNamespace, Ok(port)) => {
                Ok(format!("no policy isolates it, and {port} opens it to the outside"))
            }
            (reason, _) => text(reason),
        };
        (egress, ingress)
    }

    /// The port of the host that leads a client outside to a workload's.
    fn opened(&self, flow: &Flow) -> Result<String, String> {
        let (exposures, _) = Exposed { place: self.place(), ..self.exposed.clone() }
            .compute(&self.followed.services.list(), &self.followed.slices.list());
        let leads_there = |exposure: &&Exposure| match &exposure.leads {
            Leads::To { endpoints, .. } => {
                exposure.protocol.number() == flow.protocol && endpoints.contains(&(flow.destination, flow.port))
            }
            Leads::Health { .. } => false,
        };
        let workload = pod_address(&self.config, flow.destination);
        let leases = self.router.router().leases();
        let owner = leases.iter().find(|lease| Some(lease.address) == workload).map(|lease| &*lease.namespace);
        let all: Vec<_> = exposures.iter().filter(leads_there).filter(|e| owner == Some(&*e.namespace)).collect();
        let name = |e: &Exposure| format!("port {} of the host (Service {}/{})", e.listen, e.namespace, e.name);
        match all.iter().find(|exposure| exposure.admits(flow.source)) {
            Some(open) => Ok(name(open)),
            None => Err(match all.first() {
                Some(closed) => format!("{} takes its loadBalancerSourceRanges alone", name(closed)),
                None => {
                    "it is outside, and no port of the host leads here (Services of type NodePort, LoadBalancer)".into()
                }
            }),
        }
    }

    fn is_node(&self, address: IpAddr) -> bool {
        let router = match address {
            IpAddr::V4(address) => [self.config.router_address(), network::GATEWAY].contains(&address),
            IpAddr::V6(address) => [self.config.router_address6(), network::GATEWAY6].contains(&address),
        };
        router || self.is_dns(address)
    }

    fn is_dns(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.config.dns_address,
            IpAddr::V6(address) => address == self.config.dns_address6(),
        }
    }

    pub(super) fn name(&self, current: &Compiled, address: IpAddr) -> String {
        let pod = pod_address(&self.config, address).and_then(|pod| current.policies.workloads.get(&pod));
        match pod {
            Some(workload) => format!("{}/{} ({address})", workload.namespace, workload.name),
            None if self.is_node(address) => format!("node ({address})"),
            None => address.to_string(),
        }
    }

    fn explain(
        &self,
        current: &Compiled,
        (from, to, protocol, port): (&str, &str, &str, Option<u16>),
    ) -> Result<Vec<Explained>, String> {
        let number = protocol_number(protocol)?;
        let (source, wanted) = (self.resolve(current, from)?, self.resolve(current, to)?);
        let wanted = self.as_family_of(source, wanted);
        let source = self.as_family_of(wanted, source);
        let mut destinations = vec![(wanted, port)];
        let service = match wanted {
            IpAddr::V4(address) => self.config.service_cidr.contains(address),
            IpAddr::V6(address) => self.config.service_cidr6.contains(address),
        };
        if service && !self.is_dns(wanted) {
            destinations = self.endpoints(wanted, number, port)?;
        }
        let one = |(destination, port): (IpAddr, Option<u16>)| {
            let protocol_number = if number == 1 && destination.is_ipv6() { 58 } else { number };
            let flow = Flow { source, destination, protocol: protocol_number, port: port.unwrap_or(0) };
            let judged = self.judge(current, &flow);
            let ends = [self.name(current, source), self.name(current, destination)];
            explained(ends, (protocol, port), judged)
        };
        Ok(destinations.into_iter().map(one).collect())
    }

    /// A name is asked for, and each of its addresses judged; what the workload has not asked for yet as if it had.
    async fn explain_name(
        &self,
        current: &Compiled,
        (from, to, protocol, port): (&str, &str, &str, Option<u16>),
        name: &str,
    ) -> Result<Vec<Explained>, String> {
        let number = protocol_number(protocol)?;
        let source = self.resolve(current, from)?;
        let asked = name.to_owned();
        let addresses = self.ask(move |router| network::dns::look_up(router, &asked)).await?;
        if addresses.is_empty() {
            let why =
                "has no address, here or from the servers of /etc/resolv.conf, which are asked with an uplink only";
            return Err(format!("{to}: {why} (atoll up --egress)"));
        }
        let mut all = Vec::new();
        for address in addresses {
            if !self.is_outside(current, address) {
                all.extend(self.explain(current, (from, &address.to_string(), protocol, port))?);
                continue;
            }
            let source = self.as_family_of(address, source);
            let protocol_number = if number == 1 && address.is_ipv6() { 58 } else { number };
            let flow = Flow { source, destination: address, protocol: protocol_number, port: port.unwrap_or(0) };
            let mut judged = self.judge(current, &flow);
            if judged.0.is_err() {
                let of_name = |key: &str, _| current.policies.names.get(key).is_some_and(|set| set.matches(name));
                let egress = current.policies.decide(&self.config, &flow, &of_name).egress;
                if egress.allows() {
                    judged.0 = Ok(format!("{egress}, from when it has asked for {name}"));
                }
            }
            let ends = [self.name(current, source), format!("{name} ({address})")];
            all.push(explained(ends, (protocol, port), judged));
        }
        Ok(all)
    }

    /// Whether it is not an address of the cluster's own.
    fn is_outside(&self, current: &Compiled, address: IpAddr) -> bool {
        !self.config.networks().contains(address) && !self.is_node(address) && {
            let pod = pod_address(&self.config, address);
            !pod.is_some_and(|pod| current.policies.workloads.contains_key(&pod))
        }
    }

    /// A workload's other address where one of IPv6 was named as its peer.
    fn as_family_of(&self, peer: IpAddr, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(pod) if peer.is_ipv6() && self.config.is_workloads(pod) => self.config.v6_of(pod).into(),
            other => other,
        }
    }

    /// Where connections to a Service's address go.
    fn endpoints(&self, address: IpAddr, number: u8, port: Option<u16>) -> Result<Vec<(IpAddr, Option<u16>)>, String> {
        let (rules, _) = proxy::compute(&self.place(), self.followed.services.list(), self.followed.slices.list());
        let of: Vec<_> = rules.iter().filter(|rule| rule.cluster_ip == address).collect();
        let Some(first) = of.first() else { return Err(format!("{address}: no Service has that address")) };
        let name = format!("Service {}/{}", first.namespace, first.name);
        let protocol = |rule: &Protocol| rule.number() == number;
        let rule = of.iter().find(|rule| protocol(&rule.protocol) && port.is_none_or(|port| port == rule.port));
        let Some(rule) = rule else {
            return Err(format!("{name} has no such port; kubectl get service -n {} shows which", first.namespace));
        };
        match rule.endpoints.as_slice() {
            [] if rule.activated => Err(format!("{name} sleeps: a connection from its own namespace wakes it")),
            [] => Err(format!("{name} has no endpoint that is ready: connections are refused")),
            all => Ok(all.iter().map(|(address, port)| (*address, Some(*port))).collect()),
        }
    }

    /// `NAMESPACE/POD`, `POD` (of namespace `default`), `svc/NAMESPACE/NAME`, `node` or an address.
    pub(super) fn resolve(&self, current: &Compiled, text: &str) -> Result<IpAddr, String> {
        if text == "node" {
            return Ok(self.config.router_address().into());
        }
        if let Ok(address) = text.parse() {
            return Ok(address);
        }
        if let Some((namespace, name)) = text.strip_prefix("svc/").and_then(|rest| rest.split_once('/')) {
            let service = self.followed.services.get(namespace, name);
            let address = service.as_ref().and_then(|s| s.pointer("/spec/clusterIP")?.as_str()?.parse().ok());
            return address.ok_or_else(|| format!("{text}: no Service with an address of its own"));
        }
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        let found = current.policies.workloads.iter().find(|(_, w)| &*w.namespace == namespace && &*w.name == name);
        found.map(|(address, _)| IpAddr::V4(*address)).ok_or_else(|| {
            format!(
                "{text}: no pod {name} with an address in namespace {namespace}; name it NAMESPACE/POD, svc/NAMESPACE/NAME, \
                 node, an address or a name such as api.example.org"
            )
        })
    }
}

/// What is no workload, but can be a name of DNS.
fn host_name(current: &Compiled, text: &str) -> Option<String> {
    let is_pod = current.policies.workloads.values().any(|own| &*own.namespace == "default" && &*own.name == text);
    if is_pod || !text.contains('.') || text.parse::<IpAddr>().is_ok() {
        return None;
    }
    match text.parse() {
        Ok(Pattern::Exact(name)) => Some(name.into()),
        Ok(Pattern::Below(_)) | Err(()) => None,
    }
}

fn explained(
    [from, to]: [String; 2],
    (protocol, port): (&str, Option<u16>),
    (egress, ingress): (Result<String, String>, Result<String, String>),
) -> Explained {
    let allowed = egress.is_ok() && ingress.is_ok();
    let text = |side: Result<String, String>| match side {
        Ok(why) | Err(why) => why,
    };
    Explained { from, to, protocol: protocol.to_owned(), port, allowed, egress: text(egress), ingress: text(ingress) }
}

fn protocol_number(name: &str) -> Result<u8, String> {
    match name {
        "tcp" => Ok(6),
        "udp" => Ok(17),
        "sctp" => Ok(132),
        "icmp" => Ok(1),
        other => Err(format!("protocol: {other:?}: must be tcp, udp, sctp or icmp")),
    }
}

pub(super) fn protocol_name(number: u8) -> String {
    match number {
        1 | 58 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        132 => "sctp".into(),
        other => other.to_string(),
    }
}

fn lines(answers: &[Answer]) -> std::io::Result<Bytes> {
    let mut text = Vec::new();
    for answer in answers {
        serde_json::to_writer(&mut text, answer)?;
        text.push(b'\n');
    }
    Ok(text.into())
}

/// The network's desk: asked by the API once the agent runs.
pub(crate) struct Desk(pub Arc<OnceLock<Arc<Inspector>>>);

#[async_trait]
impl Inspect for Desk {
    async fn ask(&self, question: Question) -> StatusResult<Lines> {
        let not_yet = || Status::new(api::status::Reason::ServiceUnavailable, "the node agent has not started yet");
        self.0.get().ok_or_else(not_yet)?.clone().answer(question).await
    }
}
