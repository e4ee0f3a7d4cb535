//! The router's nftables ruleset: a table `atoll` in families `ip` and `ip6`, which say the same about the two addresses
//! that every workload has, and one in family `arp`; all in the router's own namespace.
//!
//! ```text
//! prerouting -450  sources       a frame comes from a link with that link's own MAC and IP address, or by the way out with
//!                                one from outside, or is dropped; in `ip6` without extension headers that say how to route it.
//!                                What the router alone may send (DHCP's answers, router advertisements, redirects): to `router_alone`.
//!                                Fragments, questions to DNS, questions for an address: no more than `limits.rs` says
//! prerouting -150  returns       answers to connections that the relay made for clients outside are led to its sockets
//! prerouting -100  services_in   map (address, protocol, port) -> chain of one service -> DNAT to an endpoint
//! output     -100  services_out  the same for the router's own connections
//! input         0  input         DNS, ping, and what Services lead to the activator; in `ip6` neighbour discovery too
//! forward       0  forward       answers pass; what is still addressed to a ClusterIP has no endpoint: refused; then
//!                                map `egress` by source: the namespace's own, or a chain of policies -> chain `ingress`,
//!                                again nothing that the router alone may send, which a Service's port could hide; then
//!                                map `ingress` by destination: the same -> `counted`: accept, if the source may have
//!                                one more connection; or out by the uplink, if there is one. What comes in by the uplink starts at `ingress`. All else -> chain `refused`
//! output        0  output        what the relay sends for clients outside starts at `ingress`, what the activator sends for workloads at `egress`; the refusal of endpointless services and of the outside for the router's own connections
//! postrouting 100  hairpin       a pod that reached itself through a Service sees the router as its peer
//! arp input     0  senders       an ARP packet names its link's own addresses as sender, or is dropped
//! ```
//!
//! Objects of the two IP families have the same names. A link's name, MAC and IPv6 address are made from its IPv4 address,
//! so the elements of the sets are right or absent, never stale. What is in no map is refused: a workload talks to nobody
//! until `policy.rs` knows it. Each packet that opens a connection costs two map look-ups and the rules of the policies
//! that select the two workloads; how many other policies there are does not matter.

use crate::attach::{ALL_DHCP_SERVERS, TAP_PREFIX};
use crate::config::{GATEWAY, GATEWAY6, RouterConfig};
use crate::error::Result;
use crate::limits::{self, Cause, Limits};
use crate::netlink::Socket;
use crate::netlink::nft::{
    self, AnonymousSet, BaseChain, Element, Family, Field, Hook, Policy, R0, R4, R6, Rule, Transaction, Unreachable,
    Value, concat, interface_name, octets,
};
use crate::netlink::route::Mac;
use crate::policy::{Block, Network, Ranges, dhcp_client, ranges};
use crate::relay::MARK;
use crate::router::VOID;
use crate::uplink::{LINK as UPLINK, RELAY};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const TABLE: &str = "atoll";
/// Before parts of packets are put together, so that nobody sends parts of another's packets.
const BEFORE_FRAGMENTS: i32 = -450;
/// ICMPv6, which may be of neighbours.
const DISCOVERY: &str = "discovery";
/// Goes up with every change of the ruleset below; a router found with another one gets it replaced.
const VERSION: u32 = 13;

const LINKS: &str = "links";
const SENDERS: &str = "senders";
/// Taps and their machines' MACs: who may ask for an address.
const MACHINES: &str = "machines";
const HAIRPINS: &str = "hairpins";
/// Map of services; see `services.rs`.
pub const SERVICES: &str = "services";
/// Maps from a workload's address to the chain that its connections out or in go through; see `policy.rs`.
pub const EGRESS: &str = "egress";
pub const INGRESS: &str = "ingress";
/// Map from a workload's address to the number of its namespace, and the set of (number, address).
pub const NAMESPACES: &str = "namespaces";
pub const MEMBERS: &str = "members";
/// Chain of what has passed its source's side.
pub const TO_INGRESS: &str = "to_ingress";
/// Chains of workloads that no policy isolates.
pub const EGRESS_DEFAULT: &str = "egress_default";
pub const INGRESS_DEFAULT: &str = "ingress_default";
pub const REFUSED: &str = "refused";
/// NFLOG group of refused packets.
pub const LOG_GROUP: u16 = 77;
/// Refused packets told to the log, a second; and how much of each.
const LOG_RATE: u32 = 50;
const LOG_BYTES: u32 = 128;

/// On packets that the relay (`exposed`) sends with the address of a client outside, on their connections, and on the
/// answers. No namespace has this number.
pub const RELAYED: u32 = 0xffff_fff1;
/// On packets that the activator sends with the address of a workload; on their connections, and on the answers.
pub const ACTIVATOR: u32 = 0xffff_fff2;
pub const TO_ACTIVATOR: u32 = 0xffff_fff4;
/// On connections that a Service led to the activator.
pub const ACTIVATED: u32 = 0xffff_fff3;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
/// Extension headers that a packet may not have: hop-by-hop options, routing and destination options. What they ask of a
/// router (source routes, alerts, home addresses) nobody here may ask.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LINK_LOCAL: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);
const MULTICAST: (Ipv6Addr, u8) = (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8);
const INVALID: u32 = 1;
const ESTABLISHED_OR_RELATED: u32 = 2 | 4;

/// A workload's link as the ruleset knows it.
pub struct Link {
    pub name: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub address6: Ipv6Addr,
    /// Of a machine, which asks for its neighbours itself.
    pub link_local: Option<Ipv6Addr>,
}

/// What differs between the tables of the two IP families.
pub(crate) struct Side {
    pub family: Family,
    /// All workloads' addresses; all ClusterIPs.
    pods: [(IpAddr, u8); 2],
    services: (IpAddr, u8),
    loopback: (IpAddr, u8),
    /// What the way out does not lead to.
    inside: Ranges,
    pub dns: IpAddr,
    pub limits: Limits,
    router: IpAddr,
    gateway: IpAddr,
    /// The host on the link to it, where it has an address there.
    host: Option<IpAddr>,
    /// The link that leads nowhere: where what has no other route leaves.
    nowhere: &'static str,
    echo_request: u8,
}

impl Side {
    fn of(config: &RouterConfig, family: Family) -> Side {
        match family {
            Family::Ip | Family::Arp => Side {
                family,
                pods: [config.pod_cidr, config.subnet_cidr].map(|pods| (pods.base().into(), pods.prefix())),
                services: (config.service_cidr.base().into(), config.service_cidr.prefix()),
                loopback: (Ipv4Addr::new(127, 0, 0, 0).into(), 8),
                inside: inside(config),
                dns: config.dns_address.into(),
                limits: config.limits,
                router: config.router_address().into(),
                gateway: GATEWAY.into(),
                host: None,
                nowhere: "lo",
                echo_request: 8,
            },
            Family::Ip6 => Side {
                family,
                pods: [config.pod_cidr6, config.subnet_cidr6].map(|pods| (pods.base().into(), pods.prefix())),
                services: (config.service_cidr6.base().into(), config.service_cidr6.prefix()),
                loopback: (Ipv6Addr::LOCALHOST.into(), 128),
                inside: inside(config),
                dns: config.dns_address6().into(),
                limits: config.limits,
                router: config.router_address6().into(),
                gateway: GATEWAY6.into(),
                host: Some(config.host_address6().into()),
                nowhere: VOID,
                echo_request: 128,
            },
        }
    }
    pub fn rule(&self) -> Rule {
        Rule::of(self.family)
    }
    fn inside(&self, t: &mut Transaction) -> AnonymousSet {
        match self.family {
            Family::Ip | Family::Arp => t.add_anonymous_ranges(&self.inside.v4),
            Family::Ip6 => t.add_anonymous_ranges6(&self.inside.v6),
        }
    }
    /// Says what the table was made for. The `arp` table does not depend on anything.
    fn comment(&self) -> String {
        let ([pods, subnets], services) = (self.pods, self.services);
        let Limits { connections, questions } = self.limits;
        match self.family {
            Family::Arp => format!("ruleset {VERSION}"),
            Family::Ip | Family::Ip6 => {
                let networks = [pods, subnets, services].map(|(base, prefix)| format!("{base}/{prefix}")).join(" ");
                let networks = format!("{networks} {}", self.dns);
                format!("ruleset {VERSION}: {networks}, {connections} connections, {questions} questions")
            }
        }
    }
}

const FAMILIES: [Family; 3] = [Family::Arp, Family::Ip6, Family::Ip];

/// Makes sure that the ruleset is there for these links. Answers whether it was made anew, so that services and policies
/// have to be written again.
pub fn ensure(socket: &mut Socket, config: &RouterConfig, links: &[Link]) -> Result<bool> {
    let mut found = Vec::new();
    for family in FAMILIES {
        found.push((Side::of(config, family), nft::table_comment(socket, TABLE, family)?));
    }
    let fresh = found.iter().any(|(side, comment)| comment.as_ref() != Some(&side.comment()));
    let mut transaction = Transaction::new(TABLE);
    for (side, comment) in &found {
        transaction.family(side.family);
        if fresh {
            if comment.is_some() {
                transaction.delete_table();
            }
            transaction.add_table(&side.comment());
            match side.family {
                Family::Arp => senders(&mut transaction),
                Family::Ip | Family::Ip6 => ruleset(&mut transaction, side),
            }
        } else if side.family == Family::Arp {
            transaction.flush_set(SENDERS);
        } else {
            transaction.flush_set(LINKS);
            transaction.flush_set(MACHINES);
            transaction.flush_set(HAIRPINS);
        }
    }
    for link in links {
        admit(&mut transaction, link);
    }
    transaction.commit(socket)?;
    Ok(fresh)
}

/// Lets a link's own traffic in.
pub fn admit(transaction: &mut Transaction, link: &Link) {
    for (family, set, key) in elements(link) {
        transaction.family(family);
        transaction.add_elements(set, &[Element::key(key)]);
    }
    transaction.family(Family::Ip);
}

/// Undoes [`admit`]; what is not there must be added first, since removing an absent element fails the transaction.
pub fn expel(transaction: &mut Transaction, link: &Link) {
    admit(transaction, link);
    for (family, set, key) in elements(link) {
        transaction.family(family);
        transaction.delete_elements(set, &[Element::key(key)]);
    }
    transaction.family(Family::Ip);
}

fn elements(link: &Link) -> Vec<(Family, &'static str, Vec<u8>)> {
    let own = |address: IpAddr| concat(&[&interface_name(&link.name), &link.mac, &octets(address)]);
    let twice = |address: IpAddr| concat(&[&octets(address), &octets(address)]);
    let (v4, v6) = (link.address.into(), link.address6.into());
    let mut all = vec![
        (Family::Ip, LINKS, own(v4)),
        (Family::Ip, HAIRPINS, twice(v4)),
        (Family::Arp, SENDERS, own(v4)),
        (Family::Ip6, LINKS, own(v6)),
        (Family::Ip6, HAIRPINS, twice(v6)),
    ];
    if let Some(address) = link.link_local {
        let machine = concat(&[&interface_name(&link.name), &link.mac]);
        all.push((Family::Ip6, LINKS, own(address.into())));
        all.extend(Family::INET.map(|family| (family, MACHINES, machine.clone())));
    }
    all
}

/// Everything of one IP family's table.
fn ruleset(t: &mut Transaction, side: &Side) {
    let address = side.family.address();
    t.add_set(LINKS, &[Field::InterfaceName, Field::Ether, address], &Value::None);
    t.add_set(MACHINES, &[Field::InterfaceName, Field::Ether], &Value::None);
    t.add_set(HAIRPINS, &[address, address], &Value::None);
    t.add_set(SERVICES, &[address, Field::Protocol, Field::Port], &Value::Verdict);
    t.add_set(EGRESS, &[address], &Value::Verdict);
    t.add_set(INGRESS, &[address], &Value::Verdict);
    t.add_set(NAMESPACES, &[address], &Value::Data(&[Field::Mark]));
    t.add_set(MEMBERS, &[Field::Mark, address], &Value::None);
    chains(t);
    sources(t, side);
    t.add_rule(limits::COUNTED, side.rule().if_input(UPLINK).accept());
    t.add_rule(limits::COUNTED, side.rule().if_mark(RELAYED).accept());
    limits::ruleset(t, side);
    input(t, side);
    t.add_rule("output", side.rule().if_state(ESTABLISHED_OR_RELATED).accept());
    relayed(t, side);
    activator(t, side);
    services(t, side);
    forward(t, side);
    t.add_rule("hairpin", itself(side).source_nat(side.router));
    t.add_rule(REFUSED, side.rule().at_most(LOG_RATE).log(LOG_GROUP, LOG_BYTES));
    t.add_rule(REFUSED, side.rule().count().if_protocol(TCP).reject_reset());
    t.add_rule(REFUSED, side.rule().reject_unreachable(Unreachable::Prohibited));
}

fn chains(t: &mut Transaction) {
    let base = |name, kind, hook, priority, policy| BaseChain { name, kind, hook, priority, policy };
    for chain in [
        base("sources", "filter", Hook::Prerouting, BEFORE_FRAGMENTS, Policy::Drop),
        base("returns", "filter", Hook::Prerouting, -150, Policy::Accept),
        base("services_in", "nat", Hook::Prerouting, -100, Policy::Accept),
        base("services_out", "nat", Hook::Output, -100, Policy::Accept),
        base("input", "filter", Hook::Input, 0, Policy::Drop),
        base("forward", "filter", Hook::Forward, 0, Policy::Drop),
        base("output", "filter", Hook::Output, 0, Policy::Accept),
        base("hairpin", "nat", Hook::Postrouting, 100, Policy::Accept),
    ] {
        t.add_base_chain(&chain);
    }
    let limits = [limits::COUNTED, limits::GROUPS, limits::FRAGMENTS, limits::QUESTIONS, limits::ASKING];
    for chain in
        [TO_INGRESS, EGRESS_DEFAULT, INGRESS_DEFAULT, DISCOVERY].into_iter().chain(limits).chain(Cause::chains())
    {
        t.add_chain(chain);
    }
}

/// What comes from a link with the link's own addresses.
pub fn own(side: &Side) -> Rule {
    let rule = side.rule().load_input_name(R0).load_link_source(R4).load_source(R6);
    rule.if_in_set(LINKS, R0)
}

/// What comes from a machine's link with the link's own MAC.
fn machine(side: &Side) -> Rule {
    side.rule().load_input_name(R0).load_link_source(R4).if_in_set(MACHINES, R0)
}

fn sources(t: &mut Transaction, side: &Side) {
    t.add_rule("sources", side.rule().if_input("lo").accept());
    if side.family == Family::Ip6 {
        for header in EXTENSIONS {
            t.add_rule("sources", side.rule().if_extension(header).drop());
        }
    }
    t.add_rule("sources", side.rule().if_not_to_us().goto(limits::GROUPS));
    router_alone(t, side, "sources");
    if side.family == Family::Ip6 {
        t.add_rule("sources", side.rule().if_protocol(ICMP6).jump(DISCOVERY));
        t.add_rule("sources", side.rule().load_source(R0).if_within(R0, LINK_LOCAL.0, LINK_LOCAL.1).drop());
    }
    // What the relay writes: workloads' own SYNs, which go to its listener, and answers from outside.
    for (base, prefix) in side.pods {
        let written = side.rule().if_input(RELAY).if_protocol(TCP).load_source(R0).if_within(R0, base, prefix);
        t.add_rule("sources", written.untracked().accept());
    }
    if let Some(host) = side.host {
        let refusals = side.rule().if_input(UPLINK).if_protocol(ICMP6).if_source(host);
        t.add_rule("sources", refusals.accept().comment("the host's, about what it cannot forward"));
    }
    for link in [UPLINK, RELAY] {
        let inside = side.inside(t);
        t.add_rule("sources", side.rule().if_input(link).load_source(R0).if_in(inside, R0).drop());
        t.add_rule("sources", side.rule().if_input(link).accept());
    }
    t.add_rule("sources", side.rule().if_fragment().goto(limits::FRAGMENTS));
    t.add_rule("sources", side.rule().if_destination(side.dns).goto(limits::QUESTIONS));
    t.add_rule("sources", own(side).accept());
    let asks = machine(side).if_protocol(UDP);
    if side.family == Family::Ip6 {
        for chain in [limits::GROUPS, DISCOVERY] {
            for kind in [NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT] {
                t.add_rule(chain, own(side).if_icmp_type(kind).if_on_link().accept());
            }
            let solicitation = machine(side).if_icmp_type(ROUTER_SOLICITATION).if_on_link();
            t.add_rule(chain, solicitation.goto(limits::ASKING));
            let discovery = side.rule().if_icmp_types(ROUTER_SOLICITATION, REDIRECT);
            t.add_rule(chain, discovery.drop().comment("routers and redirects are nobody's to announce"));
        }
        t.add_rule(limits::GROUPS, asks.if_destination(ALL_DHCP_SERVERS).if_destination_port(547).goto(limits::ASKING));
    } else {
        let asks = asks.if_source(Ipv4Addr::UNSPECIFIED).if_destination(Ipv4Addr::BROADCAST);
        t.add_rule(limits::GROUPS, asks.if_destination_port(67).goto(limits::ASKING));
    }
}

/// DHCP's answers, from whatever port; router advertisements (RFC 1256; RFC 4861) and redirects.
fn router_alone(t: &mut Transaction, side: &Side, chain: &str) {
    let client = side.rule().if_protocol(UDP).if_destination_port(dhcp_client(side.family));
    t.add_rule(chain, client.goto(Cause::Announcements.word()));
    let kinds = match side.family {
        Family::Ip | Family::Arp => [5, 9],
        Family::Ip6 => [ROUTER_ADVERTISEMENT, REDIRECT],
    };
    for kind in kinds {
        t.add_rule(chain, side.rule().if_icmp_type(kind).goto(Cause::Announcements.word()));
    }
}

fn input(t: &mut Transaction, side: &Side) {
    t.add_rule("input", side.rule().if_input("lo").accept());
    t.add_rule("input", side.rule().if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("input", side.rule().if_input(RELAY).if_mark(MARK).accept());
    let dns = |protocol| side.rule().if_destination(side.dns).if_protocol(protocol).if_destination_port(53);
    t.add_rule("input", dns(UDP).accept());
    t.add_rule("input", dns(TCP).goto(limits::COUNTED));
    let activated = side.rule().if_protocol(TCP).if_destination(side.router).load_connection_mark(R0);
    t.add_rule("input", activated.equal(R0, &ACTIVATED.to_ne_bytes()).goto(limits::COUNTED));
    if side.family == Family::Ip6 {
        for kind in [ROUTER_SOLICITATION, NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT] {
            t.add_rule("input", side.rule().if_icmp_type(kind).accept());
        }
    }
    // Questions for an address; `sources` knows whose.
    let from_tap = || side.rule().load_input_name(R0).equal(R0, TAP_PREFIX.as_bytes()).if_protocol(UDP);
    match side.family {
        Family::Ip | Family::Arp => t.add_rule("input", from_tap().if_destination_port(67).accept()),
        Family::Ip6 => {
            t.add_rule("input", from_tap().if_destination(ALL_DHCP_SERVERS).if_destination_port(547).accept())
        }
    }
    if side.family == Family::Ip6 {
        t.add_rule("input", side.rule().if_destination_in(MULTICAST.0, MULTICAST.1).drop());
    }
    t.add_rule("input", side.rule().if_icmp_type(side.echo_request).goto(limits::COUNTED));
    t.add_rule("input", side.rule().goto(REFUSED));
}

/// A packet from a workload to itself.
fn itself(side: &Side) -> Rule {
    side.rule().load_source(R0).load_destination(R0.after(side.family.address())).if_in_set(HAIRPINS, R0)
}

/// The relay's connections in the name of clients outside are judged as if they had come in by a link.
fn relayed(t: &mut Transaction, side: &Side) {
    let marked = side.rule().load_connection_mark(R0).equal(R0, &RELAYED.to_ne_bytes());
    t.add_rule("returns", marked.set_mark(R0));
    let own = || side.rule().if_mark(RELAYED);
    t.add_rule("output", own().if_output("lo").accept().comment("refusals, on their way back to the relay"));
    t.add_rule("output", own().set_connection_mark(R0));
    t.add_rule("output", own().goto(TO_INGRESS));
}

/// The activator's connections in the name of workloads are judged as if these had made them.
fn activator(t: &mut Transaction, side: &Side) {
    let returning = || side.rule().load_connection_mark(R0).equal(R0, &TO_ACTIVATOR.to_ne_bytes()).set_mark(R0);
    t.add_rule("returns", returning());
    // A refusal takes the way of an answer.
    t.add_rule(REFUSED, returning());
    t.add_rule("output", side.rule().if_mark(TO_ACTIVATOR).if_output("lo").accept());
    let own = || side.rule().if_mark(ACTIVATOR);
    t.add_rule("output", own().if_state(INVALID).mark(TO_ACTIVATOR).goto(REFUSED));
    t.add_rule("output", own().mark_connection(TO_ACTIVATOR));
    let itself = own().load_source(R0).load_destination(R0.after(side.family.address())).if_in_set(HAIRPINS, R0);
    t.add_rule("output", itself.goto(limits::COUNTED));
    t.add_rule("output", own().load_source(R0).verdict_map(EGRESS, R0));
    t.add_rule("output", own().goto(REFUSED));
}

fn services(t: &mut Transaction, side: &Side) {
    let protocol = R0.after(side.family.address());
    let port = protocol.after(Field::Protocol);
    for chain in ["services_in", "services_out"] {
        let rule = side.rule().load_destination(R0).load_protocol(protocol).load_destination_port(port);
        t.add_rule(chain, rule.verdict_map(SERVICES, R0));
    }
    t.add_rule("forward", side.rule().if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("forward", side.rule().if_state(INVALID).drop());
    t.add_rule("output", side.rule().if_destination(side.dns).accept());
    for chain in ["forward", "output"] {
        let service = || side.rule().if_destination_in(side.services.0, side.services.1);
        t.add_rule(chain, service().if_protocol(TCP).reject_reset().comment("no endpoint"));
        t.add_rule(chain, service().reject_unreachable(Unreachable::Port).comment("no endpoint"));
    }
}

fn forward(t: &mut Transaction, side: &Side) {
    // What has no other route leads nowhere: a workload's is refused below like any other, the router's own here.
    // A redirected connection still counts as leaving that way here, so pods are let through by address.
    let whole = |address| (address, if side.family == Family::Ip6 { 128 } else { 32 });
    let here = [side.loopback, whole(side.router), whole(side.gateway)];
    for (base, prefix) in here.into_iter().chain(side.pods) {
        t.add_rule("output", side.rule().if_destination_in(base, prefix).accept());
    }
    for link in [side.nowhere, UPLINK, RELAY] {
        t.add_rule("output", side.rule().if_output(link).reject_unreachable(Unreachable::Prohibited));
    }
    t.add_rule("forward", itself(side).goto(limits::COUNTED).comment("a workload always reaches itself"));
    t.add_rule("forward", side.rule().if_input(UPLINK).if_output(UPLINK).goto(REFUSED));
    t.add_rule("forward", side.rule().if_input(RELAY).goto(REFUSED));
    t.add_rule("forward", side.rule().if_input(UPLINK).goto(TO_INGRESS));
    t.add_rule("forward", side.rule().load_source(R0).verdict_map(EGRESS, R0));
    t.add_rule("forward", side.rule().goto(REFUSED));
    router_alone(t, side, TO_INGRESS);
    t.add_rule(TO_INGRESS, side.rule().load_destination(R0).verdict_map(INGRESS, R0));
    let inside = side.inside(t);
    t.add_rule(TO_INGRESS, side.rule().load_destination(R0).if_in(inside, R0).goto(REFUSED));
    t.add_rule(TO_INGRESS, side.rule().if_output(RELAY).if_protocol(TCP).mark_connection(MARK));
    for link in [UPLINK, RELAY] {
        t.add_rule(TO_INGRESS, side.rule().if_output(link).goto(limits::COUNTED));
    }
    t.add_rule(TO_INGRESS, side.rule().goto(REFUSED));
    defaults(t, side.family, true);
}

/// Where clouds keep their machines' secrets, beside link-local addresses: Alibaba, Azure, Oracle; Amazon, Google.
const METADATA: [(IpAddr, u8); 5] = [
    (IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), 32),
    (IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)), 32),
    (IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)), 32),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0)), 32),
    (IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), 128),
];

/// Whether clouds keep secrets at this address.
pub(crate) fn is_metadata(address: IpAddr) -> bool {
    let network = |(base, prefix): (IpAddr, u8)| Block { network: Network { base, prefix }, except: Vec::new() };
    METADATA.into_iter().any(|one| ranges(&[network(one)]).contains(address))
}

/// What is never outside: what nobody has, workloads and Services, this machine, links, groups, clouds' secrets; and
/// those IPv4 addresses in the clothes of IPv6 (RFC 4291, 2.5.5; RFC 6052).
pub(crate) fn inside(config: &RouterConfig) -> Ranges {
    let v4 = |a, b, c, d, prefix| (IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix);
    let v6 = |first, prefix| (IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0)), prefix);
    let translated = |high, prefix| (IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, 0)), prefix);
    let all = [
        v4(0, 0, 0, 0, 8),
        v4(127, 0, 0, 0, 8),
        v4(169, 254, 0, 0, 16),
        v4(224, 0, 0, 0, 3),
        v6(0, 64),
        v6(LINK_LOCAL.0.segments()[0], LINK_LOCAL.1),
        v6(MULTICAST.0.segments()[0], MULTICAST.1),
        translated(0x7f00, 104),
        translated(0xa9fe, 112),
    ];
    let own = config.networks();
    let own4 = own.v4.into_iter().map(|network| (network.base().into(), network.prefix()));
    let own6 = own.v6.into_iter().map(|network| (network.base().into(), network.prefix()));
    let all = all.into_iter().chain(own4).chain(own6);
    let network = |(base, prefix)| Block { network: Network { base, prefix }, except: Vec::new() };
    let blocks: Vec<Block> = all.chain(METADATA).map(network).collect();
    ranges(&blocks)
}

/// What workloads that no policy isolates may do: reach their own namespace, or everything. The transaction is left at
/// this family.
pub fn defaults(t: &mut Transaction, family: Family, private: bool) {
    t.family(family);
    for chain in [EGRESS_DEFAULT, INGRESS_DEFAULT] {
        t.flush_chain(chain);
        if chain == INGRESS_DEFAULT {
            let published = t.rule().if_input(UPLINK).if_translated(true);
            t.add_rule(chain, published.accept().comment("a port of the node that a Service opened"));
            t.add_rule(chain, t.rule().if_mark(RELAYED).accept().comment("the same, by the relay"));
        }
        let same = if private {
            let number = t.rule().load_source(R0).load_mapped(NAMESPACES, R0, R0).set_mark(R0);
            number
                .load_mark(R0)
                .load_destination(R0.after(Field::Mark))
                .if_in_set(MEMBERS, R0)
                .comment("the same namespace")
        } else {
            t.rule()
        };
        t.add_rule(chain, if chain == EGRESS_DEFAULT { same.goto(TO_INGRESS) } else { same.goto(limits::COUNTED) });
        t.add_rule(chain, Rule::new().goto(REFUSED));
    }
}

fn senders(t: &mut Transaction) {
    t.add_set(SENDERS, &[Field::InterfaceName, Field::Ether, Field::Address], &Value::None);
    t.add_base_chain(&BaseChain {
        name: "senders",
        kind: "filter",
        hook: Hook::ArpInput,
        priority: 0,
        policy: Policy::Drop,
    });
    let own = Rule::new().load_input_name(R0).load_arp_sender(R4, R6);
    t.add_rule("senders", own.if_in_set(SENDERS, R0).accept());
    let probe = Rule::new().load_arp_sender(R4, R6).equal(R6, &[0; 4]);
    t.add_rule("senders", probe.accept().comment("is this address taken? (RFC 5227)"));
}
