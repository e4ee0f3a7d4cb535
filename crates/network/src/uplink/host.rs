//! The one table on the host, `atoll-<instance>`:
//!
//! ```text
//! prerouting -100  ports        to an address of the host and a port in set `exposed`: to the router, source kept
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
    concat,
};
use crate::services::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Goes up with every change of the rules below.
const VERSION: u32 = 1;
const SOURCES: &str = "sources";
const EXPOSED: &str = "exposed";
const TCP: u8 = 6;
const NEW: u32 = 8;
const ESTABLISHED_OR_RELATED: u32 = 2 | 4;

/// Makes sure that the table is there; answers whether it was made anew.
pub fn ensure(socket: &mut Socket, name: &str, config: &RouterConfig, egress: Egress) -> Result<bool> {
    let comment = format!("uplink {VERSION}: {egress:?} {}", config.pod_cidr);
    let found = nft::table_comment(socket, name, Family::Ip)?;
    if found.as_ref() == Some(&comment) {
        return Ok(false);
    }
    let mut t = Transaction::new(name);
    if found.is_some() {
        t.delete_table();
    }
    t.add_table(&comment);
    t.add_set(EXPOSED, &[Field::Protocol, Field::Port], &Value::None);
    t.add_set(SOURCES, &[Field::Address], &Value::Data(&[Field::Address]));
    let base = |name, kind, hook, priority| BaseChain { name, kind, hook, priority, policy: Policy::Accept };
    for chain in [
        base("ports", "nat", Hook::Prerouting, -100),
        base("closed", "filter", Hook::Input, 0),
        base("passing", "filter", Hook::Forward, 0),
        base("translation", "nat", Hook::Postrouting, 100),
    ] {
        t.add_base_chain(&chain);
    }
    rules(&mut t, name, config, egress);
    t.commit(socket)?;
    Ok(true)
}

fn rules(t: &mut Transaction, link: &str, config: &RouterConfig, egress: Egress) {
    let local = Rule::new().unless_input(link).if_destination_local();
    let exposed = local.load_protocol(R0).load_destination_port(R1).if_in_set(EXPOSED, R0);
    t.add_rule("ports", exposed.destination_nat_to(NODE));

    t.add_rule("closed", Rule::new().if_input(link).if_state(ESTABLISHED_OR_RELATED).accept());
    t.add_rule("closed", Rule::new().if_input(link).if_protocol(TCP).reject_reset());
    t.add_rule("closed", Rule::new().if_input(link).reject_unreachable(Unreachable::Prohibited));

    t.add_rule("passing", Rule::new().if_input(link).clamp_segments());
    t.add_rule("passing", Rule::new().if_output(link).clamp_segments());
    if egress == Egress::Nat {
        let opened = Rule::new().if_output(link).if_state(NEW).if_translated(false);
        t.add_rule("passing", opened.reject_unreachable(Unreachable::Prohibited));
        let (base, prefix) = (config.pod_cidr.base(), config.pod_cidr.prefix());
        t.add_rule("translation", Rule::new().if_output(link).accept());
        let from = || Rule::new().load_source(R0).if_within(R0, base, prefix);
        t.add_rule("translation", from().load_source(R0).load_mapped(SOURCES, R0, R0).source_nat_from(R0));
        t.add_rule("translation", from().masquerade());
    }
}

impl Uplink {
    pub(super) fn sync_sources(&mut self, wanted: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> Result<()> {
        if self.sources.as_ref() == Some(wanted) {
            return Ok(());
        }
        let element = |(own, to): (&Ipv4Addr, &Ipv4Addr)| {
            Element::new(own.octets().to_vec(), ElementValue::Data(to.octets().to_vec()))
        };
        let elements: Vec<Element> = wanted.iter().map(element).collect();
        self.sources = None;
        self.replace(SOURCES, &elements)?;
        self.sources = Some(wanted.clone());
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
        self.replace(EXPOSED, &elements)?;
        self.exposed = Some(wanted.clone());
        Ok(())
    }

    fn replace(&mut self, set: &str, elements: &[Element]) -> Result<()> {
        let mut t = Transaction::new(&self.table);
        t.flush_set(set);
        t.add_elements(set, elements);
        t.commit(&mut self.socket)
    }
}
