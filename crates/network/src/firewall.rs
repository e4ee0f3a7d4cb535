//! The router's nftables ruleset: one `ip` table in the router's own namespace.
//!
//! ```text
//! prerouting -300  sources       a packet comes from a link with that link's own address, or is dropped
//! prerouting -100  services_in   map (address, protocol, port) -> chain of one service -> DNAT to an endpoint
//! output     -100  services_out  the same for the router's own connections
//! input         0  input         DNS and ping only
//! forward       0  forward       pod to pod; what is still addressed to a ClusterIP has no endpoint: refused
//! output        0  output        the same refusal for the router's own connections
//! postrouting 100  hairpin       a pod that reached itself through a Service sees the router as its peer
//! ```
//!
//! A link's name is made from its address, so the elements of the sets are right or absent, never stale. Policies will
//! hang on `forward`, where `links`, `pods` already say who is who.

use crate::config::RouterConfig;
use crate::error::Result;
use crate::netlink::Socket;
use crate::netlink::nft::{
    self, BaseChain, Element, Field, Hook, Policy, R0, R1, R2, R4, Rule, Transaction, Value, concat, interface_name,
};
use std::net::Ipv4Addr;

pub const TABLE: &str = "atoll";
/// Goes up with every change of the ruleset below; a router found with another one gets it replaced.
const VERSION: u32 = 1;

const LINKS: &str = "links";
const PODS: &str = "pods";
const HAIRPINS: &str = "hairpins";
/// Map of services; see `services.rs`.
pub const SERVICES: &str = "services";

const TCP: u8 = 6;
const UDP: u8 = 17;
const PORT_UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const INVALID: u32 = 1;
const ESTABLISHED_OR_RELATED: u32 = 2 | 4;

/// Makes sure that the ruleset is there; `workloads` are the links' names and addresses. Answers whether it was made
/// anew, so that services have to be written again.
pub fn ensure(socket: &mut Socket, config: &RouterConfig, workloads: &[(String, Ipv4Addr)]) -> Result<bool> {
    let comment = format!("ruleset {VERSION}: {} {} {}", config.pod_cidr, config.service_cidr, config.dns_address);
    let found = nft::table_comment(socket, TABLE)?;
    let fresh = found.as_ref() != Some(&comment);
    let mut transaction = Transaction::new(TABLE);
    if fresh {
        if found.is_some() {
            transaction.delete_table();
        }
        transaction.add_table(&comment);
        sets(&mut transaction);
        chains(&mut transaction, config);
    } else {
        for set in [LINKS, PODS, HAIRPINS] {
            transaction.flush_set(set);
        }
    }
    for (link, address) in workloads {
        admit(&mut transaction, link, *address);
    }
    transaction.commit(socket)?;
    Ok(fresh)
}

/// Lets a link's own traffic in.
pub fn admit(transaction: &mut Transaction, link: &str, address: Ipv4Addr) {
    for (set, key) in elements(link, address) {
        transaction.add_elements(set, &[Element::key(key)]);
    }
}

/// Undoes [`admit`]; what is not there must be added first, since removing an absent element fails the transaction.
pub fn expel(transaction: &mut Transaction, link: &str, address: Ipv4Addr) {
    admit(transaction, link, address);
    for (set, key) in elements(link, address) {
        transaction.delete_elements(set, &[Element::key(key)]);
    }
}

fn elements(link: &str, address: Ipv4Addr) -> [(&'static str, Vec<u8>); 3] {
    let octets = address.octets();
    [
        (LINKS, concat(&[&interface_name(link), &octets])),
        (PODS, octets.to_vec()),
        (HAIRPINS, concat(&[&octets, &octets])),
    ]
}

fn sets(transaction: &mut Transaction) {
    transaction.add_set(LINKS, &[Field::InterfaceName, Field::Address], &Value::None);
    transaction.add_set(PODS, &[Field::Address], &Value::None);
    transaction.add_set(HAIRPINS, &[Field::Address, Field::Address], &Value::None);
    transaction.add_set(SERVICES, &[Field::Address, Field::Protocol, Field::Port], &Value::Verdict);
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

    t.add_rule("sources", Rule::new().if_input("lo").accept());
    t.add_rule("sources", Rule::new().load_input_name(R0).load_source(R4).if_in_set(LINKS, R0).accept());

    for chain in ["services_in", "services_out"] {
        let rule = Rule::new().load_destination(R0).load_protocol(R1).load_destination_port(R2);
        t.add_rule(chain, rule.verdict_map(SERVICES, R0));
    }

    t.add_rule("input", Rule::new().if_input("lo").accept());
    t.add_rule("input", Rule::new().if_state(ESTABLISHED_OR_RELATED).accept());
    for protocol in [UDP, TCP] {
        let dns = Rule::new().if_destination(config.dns_address).if_protocol(protocol).if_destination_port(53);
        t.add_rule("input", dns.accept());
    }
    t.add_rule("input", Rule::new().if_icmp_type(ECHO_REQUEST).accept());
    t.add_rule("input", Rule::new().if_protocol(TCP).reject_reset());
    t.add_rule("input", Rule::new().reject_unreachable(PORT_UNREACHABLE));

    t.add_rule("forward", Rule::new().if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("forward", Rule::new().if_state(INVALID).drop());
    t.add_rule("output", Rule::new().if_destination(config.dns_address).accept());
    for chain in ["forward", "output"] {
        let service = || Rule::new().if_destination_in(config.service_cidr.base(), config.service_cidr.mask());
        t.add_rule(chain, service().if_protocol(TCP).reject_reset().comment("no endpoint"));
        t.add_rule(chain, service().reject_unreachable(PORT_UNREACHABLE).comment("no endpoint"));
    }
    let from_pod = Rule::new().load_source(R0).if_in_set(PODS, R0);
    t.add_rule("forward", from_pod.load_destination(R0).if_in_set(PODS, R0).accept().comment("pod to pod"));

    let itself = Rule::new().load_source(R0).load_destination(R1).if_in_set(HAIRPINS, R0);
    t.add_rule("hairpin", itself.source_nat(config.router_address()));
}
