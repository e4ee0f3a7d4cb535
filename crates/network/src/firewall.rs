//! The router's nftables ruleset: a table `atoll` in family `ip` and one in family `arp`, in the router's own namespace.
//!
//! ```text
//! prerouting -300  sources       a frame comes from a link with that link's own MAC and IP address, or is dropped
//! prerouting -100  services_in   map (address, protocol, port) -> chain of one service -> DNAT to an endpoint
//! output     -100  services_out  the same for the router's own connections
//! input         0  input         DNS and ping only
//! forward       0  forward       answers pass; what is still addressed to a ClusterIP has no endpoint: refused; then
//!                                map `egress` by source: the namespace's own, or a chain of policies -> chain `ingress`,
//!                                map `ingress` by destination: the same -> accept. All else -> chain `refused`
//! output        0  output        the refusal of endpointless services and of the outside for the router's own connections
//! postrouting 100  hairpin       a pod that reached itself through a Service sees the router as its peer
//! arp input     0  senders       an ARP packet names its link's own addresses as sender, or is dropped
//! ```
//!
//! A link's name and MAC are made from its address, so the elements of the sets are right or absent, never stale. What is
//! in no map is refused: a workload talks to nobody until `policy.rs` knows it. Each packet that opens a connection costs
//! two map look-ups and the rules of the policies that select the two workloads; how many other policies there are does
//! not matter.

use crate::config::{GATEWAY, RouterConfig};
use crate::error::Result;
use crate::netlink::Socket;
use crate::netlink::nft::{
    self, BaseChain, Element, Family, Field, Hook, Policy, R0, R1, R2, R4, R6, Rule, Transaction, Value, concat,
    interface_name,
};
use crate::netlink::route::Mac;
use std::net::Ipv4Addr;

pub const TABLE: &str = "atoll";
/// Goes up with every change of the ruleset below; a router found with another one gets it replaced.
const VERSION: u32 = 5;

const LINKS: &str = "links";
const SENDERS: &str = "senders";
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

const TCP: u8 = 6;
const UDP: u8 = 17;
const PORT_UNREACHABLE: u8 = 3;
const PROHIBITED: u8 = 13;
const ECHO_REQUEST: u8 = 8;
const INVALID: u32 = 1;
const ESTABLISHED_OR_RELATED: u32 = 2 | 4;

/// A workload's link as the ruleset knows it.
pub struct Link {
    pub name: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// Makes sure that the ruleset is there for these links. Answers whether it was made anew, so that services and policies
/// have to be written again.
pub fn ensure(socket: &mut Socket, config: &RouterConfig, links: &[Link]) -> Result<bool> {
    let comment = format!("ruleset {VERSION}: {} {} {}", config.pod_cidr, config.service_cidr, config.dns_address);
    let found = nft::table_comment(socket, TABLE, Family::Ip)?;
    let arp = nft::table_comment(socket, TABLE, Family::Arp)?;
    let fresh = found.as_ref() != Some(&comment) || arp.as_ref() != Some(&comment);
    let mut transaction = Transaction::new(TABLE);
    if fresh {
        for (family, there) in [(Family::Arp, arp.is_some()), (Family::Ip, found.is_some())] {
            transaction.family(family);
            if there {
                transaction.delete_table();
            }
            transaction.add_table(&comment);
        }
        sets(&mut transaction);
        chains(&mut transaction, config);
        services(&mut transaction, config);
        forward(&mut transaction, config);
        senders(&mut transaction);
    } else {
        for set in [LINKS, HAIRPINS] {
            transaction.flush_set(set);
        }
        transaction.family(Family::Arp);
        transaction.flush_set(SENDERS);
        transaction.family(Family::Ip);
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

fn elements(link: &Link) -> [(Family, &'static str, Vec<u8>); 3] {
    let octets = link.address.octets();
    let own = concat(&[&interface_name(&link.name), &link.mac, &octets]);
    [(Family::Ip, LINKS, own.clone()), (Family::Ip, HAIRPINS, concat(&[&octets, &octets])), (Family::Arp, SENDERS, own)]
}

fn sets(transaction: &mut Transaction) {
    let own = [Field::InterfaceName, Field::Ether, Field::Address];
    transaction.add_set(LINKS, &own, &Value::None);
    transaction.add_set(HAIRPINS, &[Field::Address, Field::Address], &Value::None);
    transaction.add_set(SERVICES, &[Field::Address, Field::Protocol, Field::Port], &Value::Verdict);
    transaction.add_set(EGRESS, &[Field::Address], &Value::Verdict);
    transaction.add_set(INGRESS, &[Field::Address], &Value::Verdict);
    transaction.add_set(NAMESPACES, &[Field::Address], &Value::Data(&[Field::Mark]));
    transaction.add_set(MEMBERS, &[Field::Mark, Field::Address], &Value::None);
    transaction.family(Family::Arp);
    transaction.add_set(SENDERS, &own, &Value::None);
    transaction.family(Family::Ip);
}

fn chains(t: &mut Transaction, config: &RouterConfig) {
    let base = |name, kind, hook, priority, policy| BaseChain { name, kind, hook, priority, policy };
    for chain in [
        base("sources", "filter", Hook::Prerouting, -300, Policy::Drop),
        base("services_in", "nat", Hook::Prerouting, -100, Policy::Accept),
        base("services_out", "nat", Hook::Output, -100, Policy::Accept),
        base("input", "filter", Hook::Input, 0, Policy::Drop),
        base("forward", "filter", Hook::Forward, 0, Policy::Drop),
        base("output", "filter", Hook::Output, 0, Policy::Accept),
        base("hairpin", "nat", Hook::Postrouting, 100, Policy::Accept),
    ] {
        t.add_base_chain(&chain);
    }

    for chain in [TO_INGRESS, EGRESS_DEFAULT, INGRESS_DEFAULT, REFUSED] {
        t.add_chain(chain);
    }

    t.add_rule("sources", Rule::new().if_input("lo").accept());
    let own = Rule::new().load_input_name(R0).load_link_source(R4).load_source(R6);
    t.add_rule("sources", own.if_in_set(LINKS, R0).accept());

    t.add_rule("input", Rule::new().if_input("lo").accept());
    t.add_rule("input", Rule::new().if_state(ESTABLISHED_OR_RELATED).accept());
    for protocol in [UDP, TCP] {
        let dns = Rule::new().if_destination(config.dns_address).if_protocol(protocol).if_destination_port(53);
        t.add_rule("input", dns.accept());
    }
    t.add_rule("input", Rule::new().if_icmp_type(ECHO_REQUEST).accept());
    t.add_rule("input", Rule::new().goto(REFUSED));

    let itself = Rule::new().load_source(R0).load_destination(R1).if_in_set(HAIRPINS, R0);
    t.add_rule("hairpin", itself.source_nat(config.router_address()));

    t.add_rule(REFUSED, Rule::new().at_most(LOG_RATE).log(LOG_GROUP, LOG_BYTES));
    t.add_rule(REFUSED, Rule::new().count().if_protocol(TCP).reject_reset());
    t.add_rule(REFUSED, Rule::new().reject_unreachable(PROHIBITED));
}

fn services(t: &mut Transaction, config: &RouterConfig) {
    for chain in ["services_in", "services_out"] {
        let rule = Rule::new().load_destination(R0).load_protocol(R1).load_destination_port(R2);
        t.add_rule(chain, rule.verdict_map(SERVICES, R0));
    }
    t.add_rule("forward", Rule::new().if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("forward", Rule::new().if_state(INVALID).drop());
    t.add_rule("output", Rule::new().if_destination(config.dns_address).accept());
    for chain in ["forward", "output"] {
        let service = || Rule::new().if_destination_in(config.service_cidr.base(), config.service_cidr.mask());
        t.add_rule(chain, service().if_protocol(TCP).reject_reset().comment("no endpoint"));
        t.add_rule(chain, service().reject_unreachable(PORT_UNREACHABLE).comment("no endpoint"));
    }
}

fn forward(t: &mut Transaction, config: &RouterConfig) {
    // What has no other route leads to loopback: a workload's is refused below like any other, the router's own here.
    // A redirected connection still counts as leaving by loopback here, so pods are let through by address.
    let pods = (config.pod_cidr.base(), u32::MAX.checked_shl(32 - u32::from(config.pod_cidr.prefix())).unwrap_or(0));
    let loopback = (Ipv4Addr::new(127, 0, 0, 0), 0xff00_0000);
    for (base, mask) in [loopback, (config.router_address(), u32::MAX), (GATEWAY, u32::MAX), pods] {
        t.add_rule("output", Rule::new().if_destination_in(base, mask).accept());
    }
    t.add_rule("output", Rule::new().if_output("lo").reject_unreachable(PROHIBITED));
    let itself = Rule::new().load_source(R0).load_destination(R1).if_in_set(HAIRPINS, R0);
    t.add_rule("forward", itself.accept().comment("a workload always reaches itself"));
    t.add_rule("forward", Rule::new().load_source(R0).verdict_map(EGRESS, R0));
    t.add_rule("forward", Rule::new().goto(REFUSED));
    t.add_rule(TO_INGRESS, Rule::new().load_destination(R0).verdict_map(INGRESS, R0));
    t.add_rule(TO_INGRESS, Rule::new().goto(REFUSED));
    defaults(t, true);
}

/// What workloads that no policy isolates may do: reach their own namespace, or everything.
pub fn defaults(t: &mut Transaction, private: bool) {
    for chain in [EGRESS_DEFAULT, INGRESS_DEFAULT] {
        t.flush_chain(chain);
        let same = if private {
            let number = Rule::new().load_source(R0).load_mapped(NAMESPACES, R0, R0).set_mark(R0);
            number.load_mark(R0).load_destination(R1).if_in_set(MEMBERS, R0).comment("the same namespace")
        } else {
            Rule::new()
        };
        t.add_rule(chain, if chain == EGRESS_DEFAULT { same.goto(TO_INGRESS) } else { same.accept() });
        t.add_rule(chain, Rule::new().goto(REFUSED));
    }
}

fn senders(t: &mut Transaction) {
    t.family(Family::Arp);
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
    t.family(Family::Ip);
}
