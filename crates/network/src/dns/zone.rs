//! Finds the answer to a question: an index of all names, made once per change of the records.

use super::codec::{
    Code, Data, Query, Record, Reply, TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_CNAME, TYPE_NS, TYPE_PTR, TYPE_SOA, TYPE_SRV,
    TYPE_TXT,
};
use super::records::{Authority, EndpointRecord, Records, ServiceKind};
use super::views::View;
use crate::services::Protocol;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Seconds; short, because answers follow live state.
pub const TTL: u32 = 5;
const MAX_ALIASES: usize = 8;
/// Records of an answer; the largest message holds no more.
const MAX_RECORDS: usize = 4096;

#[derive(Default)]
struct Node {
    addresses: Vec<IpAddr>,
    services: Vec<(u16, String)>,
    alias: Option<String>,
    text: Option<String>,
}

/// All names of the cluster.
pub struct Zone {
    authority: Authority,
    serial: u32,
    nodes: HashMap<String, Node>,
    reverse: HashMap<IpAddr, Vec<String>>,
}

/// What to do with a question.
pub enum Outcome {
    Reply(Reply),
    /// Not ours.
    Elsewhere,
}

impl Zone {
    pub fn new(authority: Authority, serial: u32, records: &Records) -> Zone {
        let mut zone = Zone { authority, serial, nodes: HashMap::new(), reverse: HashMap::new() };
        let domain = zone.authority.domain.clone();
        for service in &records.services {
            let (namespace, name) = (service.namespace.to_lowercase(), service.name.to_lowercase());
            let name = format!("{name}.{namespace}.svc.{domain}");
            match &service.kind {
                ServiceKind::ClusterIp(addresses) => {
                    zone.node(&name).addresses.extend(addresses);
                    for address in addresses {
                        zone.reverse.entry(*address).or_default().push(name.clone());
                    }
                    zone.ports(service, &name, std::slice::from_ref(&name));
                }
                ServiceKind::Headless(endpoints) => {
                    let mut targets: Vec<String> =
                        endpoints.iter().map(|endpoint| zone.endpoint(&name, endpoint)).collect();
                    // A host with an address of each family is one target.
                    let mut seen = HashSet::new();
                    targets.retain(|target| seen.insert(target.clone()));
                    zone.ports(service, &name, &targets);
                }
                ServiceKind::External(target) => {
                    let target = target.trim_end_matches('.').to_lowercase();
                    zone.node(&name).alias = Some(target);
                }
            }
        }
        let dns = zone.authority.dns_addresses.clone();
        zone.node(&zone.primary()).addresses = dns;
        zone.node(&format!("dns-version.{domain}")).text = Some("1.1.0".to_owned());
        for node in zone.nodes.values_mut() {
            node.addresses.sort_unstable();
            node.addresses.dedup();
        }
        zone
    }

    /// One address of a headless service: its own name and a share in the service's.
    fn endpoint(&mut self, service: &str, endpoint: &EndpointRecord) -> String {
        let EndpointRecord { address, hostname } = endpoint;
        self.node(service).addresses.push(*address);
        let dashed = address.to_string().replace(['.', ':'], "-");
        let host = hostname.as_ref().filter(|name| !name.is_empty()).map_or(dashed, |name| name.to_lowercase());
        let name = format!("{host}.{service}");
        self.node(&name).addresses.push(*address);
        if hostname.is_some() {
            self.reverse.entry(*address).or_default().push(name.clone());
        }
        name
    }

    fn ports(&mut self, service: &super::ServiceRecord, name: &str, targets: &[String]) {
        for port in &service.ports {
            let Some(label) = port.name.as_ref().filter(|label| !label.is_empty()) else { continue };
            let protocol = match port.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            };
            let node = self.node(&format!("_{}._{protocol}.{name}", label.to_lowercase()));
            node.services.extend(targets.iter().map(|target| (port.port, target.clone())));
        }
    }

    /// The node of this name, made with all names above it: those exist too, if only without records.
    fn node(&mut self, name: &str) -> &mut Node {
        let mut above = name;
        while let Some((_, rest)) = above.split_once('.')
            && rest.len() >= self.authority.domain.len()
            && !self.nodes.contains_key(rest)
        {
            self.nodes.insert(rest.to_owned(), Node::default());
            above = rest;
        }
        self.nodes.entry(name.to_owned()).or_default()
    }

    fn primary(&self) -> String {
        format!("ns.dns.{}", self.authority.domain)
    }

    /// Answers, or says that the name is not ours. `turn` rotates the order of several addresses.
    pub fn answer(&self, query: &Query, turn: usize, view: View<'_>) -> Outcome {
        let Some(name) = &query.name else { return Outcome::Reply(self.absent(Code::NameError)) };
        if self.is_inside(name) {
            return Outcome::Reply(self.inside(name, query.kind, turn, view));
        }
        match reverse_address(name) {
            Some(address) if self.authority.networks.contains(address) => {
                Outcome::Reply(self.pointer(address, query.kind, view))
            }
            _ => Outcome::Elsewhere,
        }
    }

    fn is_inside(&self, name: &str) -> bool {
        name.strip_suffix(self.authority.domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// Whether a name is of no namespace, or of one that the asker sees.
    fn is_seen(&self, name: &str, view: View<'_>) -> bool {
        let above = name.strip_suffix(self.authority.domain.as_str()).and_then(|rest| rest.strip_suffix(".svc."));
        above.is_none_or(|above| view.sees(above.rsplit('.').next().unwrap_or(above)))
    }

    fn inside(&self, name: &str, kind: u16, turn: usize, view: View<'_>) -> Reply {
        let mut reply = Reply { authoritative: true, ..Reply::of(Code::NoError) };
        if let Some(address) = self.pod_address(name) {
            if is_asked(kind, &address) {
                reply.answers.push(address_record(None, address));
            }
            return self.or_no_data(reply);
        }
        let mut owner: Option<String> = None;
        for _ in 0..MAX_ALIASES {
            let current = owner.as_deref().unwrap_or(name);
            let Some(node) = self.nodes.get(current).filter(|_| self.is_seen(current, view)) else {
                // An alias that leads outside, or nowhere, is all there is to say; a name of ours must exist.
                return if owner.is_some() { reply } else { self.absent(Code::NameError) };
            };
            if let Some(target) = &node.alias {
                reply.answers.push(record(owner.clone(), Data::Cname(target.clone())));
                if kind == TYPE_CNAME || !self.is_inside(target) {
                    return reply;
                }
                owner = Some(target.clone());
                continue;
            }
            self.collect(&mut reply, current, node, kind, owner.clone(), turn);
            break;
        }
        self.or_no_data(reply)
    }

    fn collect(&self, reply: &mut Reply, name: &str, node: &Node, kind: u16, owner: Option<String>, turn: usize) {
        let any = kind == TYPE_ANY;
        let count = node.addresses.iter().filter(|address| is_asked(kind, address)).count();
        let start = turn.checked_rem(count).unwrap_or(0);
        let asked = node.addresses.iter().filter(|address| is_asked(kind, address));
        let turned = asked.cycle().skip(start).take(count.min(MAX_RECORDS));
        reply.answers.extend(turned.map(|address| address_record(owner.clone(), *address)));
        if kind == TYPE_SRV || any {
            let (count, all) = (node.services.len(), node.services.iter());
            let turned = all.cycle().skip(turn.checked_rem(count).unwrap_or(0)).take(count.min(MAX_RECORDS));
            for (port, target) in turned {
                let data = Data::Srv { priority: 0, weight: 100, port: *port, target: target.clone() };
                reply.answers.push(record(owner.clone(), data));
                let addresses = self.nodes.get(target).map_or(&[][..], |node| &node.addresses);
                let glue = addresses.iter().map(|address| address_record(Some(target.clone()), *address));
                reply.additional.extend(glue);
            }
        }
        if let Some(text) = &node.text
            && (kind == TYPE_TXT || any)
        {
            reply.answers.push(record(owner, Data::Txt(text.clone())));
        }
        if name == self.authority.domain {
            if kind == TYPE_SOA || any {
                reply.answers.push(Record { ttl: TTL, ..self.soa() });
            }
            if kind == TYPE_NS || any {
                reply.answers.push(record(None, Data::Ns(self.primary())));
            }
        }
    }

    fn pointer(&self, address: IpAddr, kind: u16, view: View<'_>) -> Reply {
        let names = self.reverse.get(&address).map(Vec::as_slice).unwrap_or_default();
        let names: Vec<&String> = names.iter().filter(|name| self.is_seen(name, view)).collect();
        if names.is_empty() {
            return self.absent(Code::NameError);
        }
        let mut reply = Reply { authoritative: true, ..Reply::of(Code::NoError) };
        if kind == TYPE_PTR || kind == TYPE_ANY {
            reply.answers.extend(names.into_iter().map(|name| record(None, Data::Ptr(name.clone()))));
        }
        self.or_no_data(reply)
    }

    /// `10-42-0-7.<namespace>.pod.<domain>`, or `fd00-10-42--7`.
    fn pod_address(&self, name: &str) -> Option<IpAddr> {
        let rest = name.strip_suffix(self.authority.domain.as_str())?.strip_suffix(".pod.")?;
        let (dashed, _namespace) = rest.split_once('.')?;
        let v4 = || dashed.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
        let v6 = || dashed.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6);
        v4().or_else(v6).filter(|address| self.authority.networks.contains(*address))
    }

    fn or_no_data(&self, reply: Reply) -> Reply {
        if reply.answers.is_empty() { self.absent(Code::NoError) } else { reply }
    }

    /// "No such name" or "no such record", with the SOA that says for how long.
    fn absent(&self, code: Code) -> Reply {
        Reply { authoritative: true, authority: vec![self.soa()], ..Reply::of(code) }
    }

    fn soa(&self) -> Record {
        let domain = &self.authority.domain;
        let (primary, mailbox) = (self.primary(), format!("hostmaster.{domain}"));
        record(Some(domain.clone()), Data::Soa { primary, mailbox, serial: self.serial })
    }
}

fn record(name: Option<String>, data: Data) -> Record {
    Record { name, ttl: TTL, data }
}

/// Whether a question of this type asks for such an address.
fn is_asked(kind: u16, address: &IpAddr) -> bool {
    match kind {
        TYPE_A => address.is_ipv4(),
        TYPE_AAAA => address.is_ipv6(),
        other => other == TYPE_ANY,
    }
}

fn address_record(name: Option<String>, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(address) => Data::A(address),
        IpAddr::V6(address) => Data::Aaaa(address),
    };
    record(name, data)
}

/// `4.3.2.1.in-addr.arpa` is 1.2.3.4; below `ip6.arpa` each of 32 labels is a hexadecimal digit, the last one first.
fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(text) = name.strip_suffix(".in-addr.arpa") {
        let [a, b, c, d] = text.parse::<Ipv4Addr>().ok()?.octets();
        return Some(Ipv4Addr::new(d, c, b, a).into());
    }
    let (mut bits, mut count) = (0u128, 0);
    for label in name.strip_suffix(".ip6.arpa")?.rsplit('.') {
        let digit = label.chars().next().filter(|_| label.len() == 1)?.to_digit(16)?;
        bits = (bits << 4) | u128::from(digit);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from_bits(bits).into())
}

#[cfg(test)]
mod tests {
    use super::super::codec::{parse, question};
    use super::super::{PortRecord, ServiceRecord};
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn zone() -> Zone {
        let port = |name: Option<&str>| PortRecord { name: name.map(str::to_owned), protocol: Protocol::Tcp, port: 80 };
        let service =
            |name: &str, kind, ports| ServiceRecord { namespace: "shop".into(), name: name.into(), kind, ports };
        let endpoints = vec![
            EndpointRecord { address: ip("10.42.0.7"), hostname: Some("db-0".into()) },
            EndpointRecord { address: ip("10.42.0.8"), hostname: None },
            EndpointRecord { address: ip("fd00:10:42::7"), hostname: Some("db-0".into()) },
            EndpointRecord { address: ip("fd00:10:42::8"), hostname: None },
        ];
        let records = Records {
            services: vec![
                service("web", ServiceKind::ClusterIp(vec![ip("10.43.0.5")]), vec![port(Some("http"))]),
                service(
                    "two",
                    ServiceKind::ClusterIp(vec![ip("fd00:10:43::6"), ip("10.43.0.6")]),
                    vec![port(Some("h"))],
                ),
                service("db", ServiceKind::Headless(endpoints), vec![port(Some("pg")), port(None)]),
                service("out", ServiceKind::External("Example.org.".into()), vec![]),
                service("alias", ServiceKind::External("web.shop.svc.cluster.local".into()), vec![]),
                service("loop", ServiceKind::External("loop.shop.svc.cluster.local".into()), vec![]),
                service("empty", ServiceKind::Headless(vec![]), vec![]),
            ],
        };
        let authority = Authority {
            domain: "cluster.local".into(),
            networks: crate::RouterConfig::new("", "").networks(),
            dns_addresses: vec![ip("10.43.0.10"), ip("fd00:10:43::a")],
        };
        Zone::new(authority, 1, &records)
    }

    fn ask(name: &str, kind: u16) -> Option<Reply> {
        ask_as(View::Everything, name, kind)
    }

    fn ask_as(view: View<'_>, name: &str, kind: u16) -> Option<Reply> {
        match zone().answer(&parse(&question(1, name, kind, None)).unwrap(), 0, view) {
            Outcome::Reply(reply) => Some(reply),
            Outcome::Elsewhere => None,
        }
    }

    fn data(name: &str, kind: u16) -> (Code, Vec<Data>) {
        let reply = ask(name, kind).unwrap();
        (reply.code, reply.answers.into_iter().map(|record| record.data).collect())
    }

    #[test]
    fn services_have_addresses_ports_and_reverse_names() {
        let web = Data::A(Ipv4Addr::new(10, 43, 0, 5));
        assert_eq!(data("WEB.shop.svc.cluster.local", TYPE_A), (Code::NoError, vec![web.clone()]));
        let reply = ask("_http._tcp.web.shop.svc.cluster.local", TYPE_SRV).unwrap();
        assert!(matches!(&reply.answers[0].data, Data::Srv { port: 80, target, .. }
            if target == "web.shop.svc.cluster.local"));
        assert_eq!(reply.additional[0].data, web);
        let name = Data::Ptr("web.shop.svc.cluster.local".into());
        assert_eq!(data("5.0.43.10.in-addr.arpa", TYPE_PTR), (Code::NoError, vec![name]));
        assert_eq!(data("7.0.43.10.in-addr.arpa", TYPE_PTR).0, Code::NameError);
        assert!(ask("1.0.0.127.in-addr.arpa", TYPE_PTR).is_none());
    }

    #[test]
    fn both_families_have_names() {
        let two = "two.shop.svc.cluster.local";
        let (v4, v6) = (Data::A(Ipv4Addr::new(10, 43, 0, 6)), Data::Aaaa("fd00:10:43::6".parse().unwrap()));
        assert_eq!(data(two, TYPE_A).1, vec![v4.clone()]);
        assert_eq!(data(two, TYPE_AAAA).1, vec![v6.clone()]);
        let reply = ask("_h._tcp.two.shop.svc.cluster.local", TYPE_SRV).unwrap();
        let glue: Vec<Data> = reply.additional.into_iter().map(|record| record.data).collect();
        assert_eq!(glue, [v4, v6]);
        let reverse = |address: &str| {
            let digits: Vec<char> =
                format!("{:032x}", address.parse::<Ipv6Addr>().unwrap().to_bits()).chars().rev().collect();
            digits.iter().map(|digit| format!("{digit}.")).collect::<String>() + "ip6.arpa"
        };
        assert_eq!(data(&reverse("fd00:10:43::6"), TYPE_PTR).1, [Data::Ptr(two.into())]);
        assert_eq!(data(&reverse("fd00:10:42::7"), TYPE_PTR).1, [Data::Ptr("db-0.db.shop.svc.cluster.local".into())]);
        assert_eq!(data(&reverse("fd00:10:43::7"), TYPE_PTR).0, Code::NameError);
        assert!(ask(&reverse("2001:db8::1"), TYPE_PTR).is_none());
        assert!(ask("1.ip6.arpa", TYPE_PTR).is_none());
        assert!(ask(&reverse("fd00:10:43::6").replace("0.", "0"), TYPE_PTR).is_none());
        assert_eq!(data("db.shop.svc.cluster.local", TYPE_AAAA).1.len(), 2);
        let first = vec![Data::Aaaa("fd00:10:42::7".parse().unwrap())];
        assert_eq!(data("db-0.db.shop.svc.cluster.local", TYPE_AAAA).1, first);
        assert_eq!(data("fd00-10-42--8.db.shop.svc.cluster.local", TYPE_AAAA).1.len(), 1);
        let named = vec![Data::Aaaa("fd00:10:42::304".parse().unwrap())];
        assert_eq!(data("fd00-10-42--304.shop.pod.cluster.local", TYPE_AAAA).1, named);
        assert_eq!(data("fd00-10-42--304.shop.pod.cluster.local", TYPE_A), (Code::NoError, vec![]));
        assert_eq!(data("2001-db8--1.shop.pod.cluster.local", TYPE_AAAA).0, Code::NameError);
    }

    #[test]
    fn headless_services_name_their_endpoints() {
        assert_eq!(data("db.shop.svc.cluster.local", TYPE_A).1.len(), 2);
        let first = vec![Data::A(Ipv4Addr::new(10, 42, 0, 7))];
        assert_eq!(data("db-0.db.shop.svc.cluster.local", TYPE_A).1, first);
        assert_eq!(data("10-42-0-8.db.shop.svc.cluster.local", TYPE_A).1.len(), 1);
        assert_eq!(data("_pg._tcp.db.shop.svc.cluster.local", TYPE_SRV).1.len(), 3);
        assert_eq!(data("7.0.42.10.in-addr.arpa", TYPE_PTR).1, [Data::Ptr("db-0.db.shop.svc.cluster.local".into())]);
        assert_eq!(data("10-42-3-4.shop.pod.cluster.local", TYPE_A).1, [Data::A(Ipv4Addr::new(10, 42, 3, 4))]);
    }

    #[test]
    fn what_is_not_seen_does_not_exist() {
        let visible = std::collections::BTreeSet::from(["shop".to_owned()]);
        let own = View::Of { namespace: "shop", visible: None };
        let guest = View::Of { namespace: "other", visible: Some(&visible) };
        let stranger = View::Of { namespace: "other", visible: None };
        let names = [
            ("web.shop.svc.cluster.local", TYPE_A),
            ("_http._tcp.web.shop.svc.cluster.local", TYPE_SRV),
            ("db-0.db.shop.svc.cluster.local", TYPE_A),
            ("5.0.43.10.in-addr.arpa", TYPE_PTR),
            ("7.0.42.10.in-addr.arpa", TYPE_PTR),
            ("out.shop.svc.cluster.local", TYPE_CNAME),
        ];
        for (name, kind) in names {
            for view in [own, guest] {
                assert_eq!(ask_as(view, name, kind).unwrap().code, Code::NoError, "{name} {view:?}");
            }
            for view in [stranger, View::Nothing] {
                let reply = ask_as(view, name, kind).unwrap();
                assert_eq!((reply.code, reply.answers.len()), (Code::NameError, 0), "{name} {view:?}");
            }
        }
        // The namespace itself is no more there than one that is not there at all.
        for name in ["shop.svc.cluster.local", "nothing.svc.cluster.local"] {
            assert_eq!(ask_as(stranger, name, TYPE_A).unwrap().code, Code::NameError, "{name}");
        }
        assert_eq!(ask_as(stranger, "cluster.local", TYPE_SOA).unwrap().code, Code::NoError);
    }

    #[test]
    fn aliases_are_followed_inside_only() {
        assert_eq!(data("out.shop.svc.cluster.local", TYPE_A).1, [Data::Cname("example.org".into())]);
        let (_, both) = data("alias.shop.svc.cluster.local", TYPE_A);
        assert!(matches!(both.as_slice(), [Data::Cname(_), Data::A(_)]));
        assert_eq!(data("loop.shop.svc.cluster.local", TYPE_A).1.len(), MAX_ALIASES);
    }

    #[test]
    fn absence_is_said_in_the_right_way() {
        let reply = ask("web.shop.svc.cluster.local", TYPE_AAAA).unwrap();
        assert!(reply.code == Code::NoError && reply.answers.is_empty() && reply.authority.len() == 1);
        assert_eq!(data("shop.svc.cluster.local", TYPE_A), (Code::NoError, vec![]));
        assert_eq!(data("nothing.shop.svc.cluster.local", TYPE_A), (Code::NameError, vec![]));
        assert_eq!(data("empty.shop.svc.cluster.local", TYPE_A).0, Code::NameError);
        assert!(ask("example.org", TYPE_A).is_none());
        assert!(ask("notcluster.local", TYPE_A).is_none());
    }
}
