//! The table on the host, `atoll-<instance>`, in family `ip` and, where the kernel lets IPv6 pass, `ip6`:
//!
//! ```text
//! prerouting -100  ports        (`ip`) to an address of the host and a port in set `exposed`: to the router, source kept
//! input         0  closed       what comes by the link is for others: the host itself is refused
//! forward       0  passing      segment sizes are lowered to what the route carries; with `nat` nobody opens
//!                               connections to workloads' addresses
//! postrouting 100  translation  with `nat`: workloads get the source in map `sources`, or that of the link they leave by
//! ```

use super::{Egress, NODE, Uplink};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::netlink::Socket;
use crate::netlink::nft::{
    self, BaseChain, Element, ElementValue, Family, Field, Hook, Policy, R0, R1, Rule, Transaction, Unreachable, Value,
    concat, octets,
};
use crate::services::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Goes up with every change of the rules below.
const VERSION: u32 = 4;
const SOURCES: &str = "sources";
const EXPOSED: &str = "exposed";
const TCP: u8 = 6;
const NEW: u32 = 8;
const ESTABLISHED_OR_RELATED: u32 = 2 | 4;

/// Makes sure that the tables are there, of the family `ip6` too if `v6`; answers whether they were made anew.
pub fn ensure(socket: &mut Socket, name: &str, config: &RouterConfig, (egress, v6): (Egress, bool)) -> Result<bool> {
    let RouterConfig { pod_cidr, pod_cidr6, subnet_cidr, subnet_cidr6, .. } = config;
    let comment = format!("uplink {VERSION}: {egress:?} {pod_cidr} {pod_cidr6} {subnet_cidr} {subnet_cidr6}");
    let mut t = Transaction::new(name);
    let mut fresh = false;
    for family in Family::INET {
        let wanted = family == Family::Ip || v6;
        let found = nft::table_comment(socket, name, family)?;
        if found.as_ref() == Some(&comment) && wanted {
            continue;
        }
        t.family(family);
        if found.is_some() {
            t.delete_table();
        }
        if wanted {
            t.add_table(&comment);
            table(&mut t, family);
            rules(&mut t, name, config, (egress, family));
        }
        fresh = true;
    }
    t.commit(socket)?;
    Ok(fresh)
}

fn table(t: &mut Transaction, family: Family) {
    t.add_set(SOURCES, &[family.address()], &Value::Data(&[family.address()]));
    let base = |name, kind, hook, priority| BaseChain { name, kind, hook, priority, policy: Policy::Accept };
    if family == Family::Ip {
        t.add_set(EXPOSED, &[Field::Protocol, Field::Port], &Value::None);
        t.add_base_chain(&base("ports", "nat", Hook::Prerouting, -100));
    }
    for chain in [
        base("closed", "filter", Hook::Input, 0),
        base("passing", "filter", Hook::Forward, 0),
        base("translation", "nat", Hook::Postrouting, 100),
    ] {
        t.add_base_chain(&chain);
    }
}

fn rules(t: &mut Transaction, link: &str, config: &RouterConfig, (egress, family): (Egress, Family)) {
    let rule = || Rule::of(family);
    if family == Family::Ip {
        let local = rule().unless_input(link).if_destination_local();
        let exposed = local.load_protocol(R0).load_destination_port(R1).if_in_set(EXPOSED, R0);
        t.add_rule("ports", exposed.destination_nat_to(NODE));
    }
    t.add_rule("closed", rule().if_input(link).if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("closed", rule().if_input(link).if_protocol(TCP).reject_reset());
    t.add_rule("closed", rule().if_input(link).reject_unreachable(Unreachable::Prohibited));

    t.add_rule("passing", rule().if_input(link).clamp_segments());
    t.add_rule("passing", rule().if_output(link).clamp_segments());
    if egress == Egress::Nat {
        let opened = rule().if_output(link).if_state(NEW).if_translated(false);
        t.add_rule("passing", opened.reject_unreachable(Unreachable::Prohibited));
        t.add_rule("translation", rule().if_output(link).accept());
        for (base, prefix) in pods(config, family) {
            let from = || rule().load_source(R0).if_within(R0, base, prefix);
            t.add_rule("translation", from().load_source(R0).load_mapped(SOURCES, R0, R0).source_nat_from(R0));
            t.add_rule("translation", from().masquerade());
        }
    }
}

/// All workloads' addresses.
fn pods(config: &RouterConfig, family: Family) -> [(IpAddr, u8); 2] {
    match family {
        Family::Ip | Family::Arp => {
            [config.pod_cidr, config.subnet_cidr].map(|pods| (pods.base().into(), pods.prefix()))
        }
        Family::Ip6 => [config.pod_cidr6, config.subnet_cidr6].map(|pods| (pods.base().into(), pods.prefix())),
    }
}

impl Uplink {
    /// Of both families; those of IPv6 are another's where the link does not carry it.
    pub(super) fn sync_sources(&mut self, wanted: &BTreeMap<IpAddr, IpAddr>) -> Result<()> {
        let mut wanted = wanted.clone();
        wanted.retain(|own, to| own.is_ipv6() == to.is_ipv6() && (self.v6 || own.is_ipv4()));
        if self.sources.as_ref() == Some(&wanted) {
            return Ok(());
        }
        self.sources = None;
        let mut t = Transaction::new(&self.table);
        for family in Family::INET.into_iter().filter(|family| *family == Family::Ip || self.v6) {
            let of_family = wanted.iter().filter(|(own, _)| own.is_ipv6() == (family == Family::Ip6));
            let element = |(own, to): (&IpAddr, &IpAddr)| Element::new(octets(*own), ElementValue::Data(octets(*to)));
            let elements: Vec<Element> = of_family.map(element).collect();
            t.family(family);
            t.flush_set(SOURCES);
            t.add_elements(SOURCES, &elements);
        }
        t.commit(&mut self.socket)?;
        self.sources = Some(wanted);
        Ok(())
    }

    pub(super) fn sync_exposed(&mut self, wanted: &BTreeSet<(Protocol, u16)>) -> Result<()> {
        if self.exposed.as_ref() == Some(wanted) {
            return Ok(());
        }
        let element =
            |(protocol, port): &(Protocol, u16)| Element::key(concat(&[&[protocol.number()], &port.to_be_bytes()]));
        let elements: Vec<Element> = wanted.iter().map(element).collect();
        self.exposed = None;
        let mut t = Transaction::new(&self.table);
        t.flush_set(EXPOSED);
        t.add_elements(EXPOSED, &elements);
        t.commit(&mut self.socket)?;
        self.exposed = Some(wanted.clone());
        Ok(())
    }
}
