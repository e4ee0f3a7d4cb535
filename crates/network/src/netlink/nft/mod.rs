//! nf_tables: tables, chains, sets, rules and their expressions, as `linux/netfilter/nf_tables.h` numbers them. Registers
//! are named by 32-bit slots: `R0` to `R15`; a concatenated key occupies consecutive ones.

mod list;
pub mod meter;
mod nat;
mod relay;
mod rule;
mod timed;

use super::{Batch, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Socket, Writer};
use crate::error::Result;
pub use list::{chains, counted, keys, sets, table_comment};
pub use rule::{Rule, Unreachable};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
pub use timed::{Timed, read as read_timed, set_comments, timed};

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const GETSET: u16 = 10;
const DELSET: u16 = 11;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_ARP: u8 = 3;
const NFPROTO_IPV6: u8 = 10;
const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const TYPE_VERDICT: u32 = 0xffff_ff00;

const SET_ANONYMOUS: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_INTERVAL: u32 = 4;
const SET_MAP: u32 = 8;
const SET_TIMEOUT: u32 = 0x10;
const SET_DYNAMIC: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
/// The element ends an interval of a set of single fields.
const ELEMENT_INTERVAL_END: u32 = 1;

/// Bytes of elements in one message: an attribute's length has 16 bits.
const ELEMENTS_PER_MESSAGE: usize = 40 << 10;

/// A 32-bit register slot.
#[derive(Clone, Copy)]
pub struct Reg(pub u32);
pub const R0: Reg = Reg(0);
pub const R1: Reg = Reg(1);
pub const R2: Reg = Reg(2);
pub const R3: Reg = Reg(3);
pub const R4: Reg = Reg(4);
pub const R6: Reg = Reg(6);
pub const R8: Reg = Reg(8);

impl Reg {
    /// The kernel numbers 32-bit registers from 8.
    fn number(self) -> u32 {
        8 + self.0
    }
    /// The first register behind a field that begins in this one.
    pub fn after(self, field: Field) -> Reg {
        Reg(self.0 + field.length().div_ceil(4))
    }
}

#[derive(Clone, Copy)]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
    /// Packets of the `arp` family that come in.
    ArpInput,
}

impl Hook {
    fn number(self) -> u32 {
        match self {
            // NF_ARP_IN
            Hook::ArpInput => 0,
            other => other as u32,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Drop = 0,
    Accept = 1,
}

pub struct BaseChain<'a> {
    pub name: &'a str,
    /// `filter` or `nat`.
    pub kind: &'a str,
    pub hook: Hook,
    pub priority: i32,
    pub policy: Policy,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Goto(String),
    Jump(String),
}

/// What a set's key or a map's value is made of; the numbers are nft's own, for its listings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Integer = 4,
    Address = 7,
    Address6 = 8,
    Ether = 9,
    Protocol = 12,
    Port = 13,
    /// Any 32 bits, in host byte order.
    Mark = 19,
    InterfaceName = 41,
}

impl Field {
    fn length(self) -> u32 {
        match self {
            Field::Integer | Field::Address | Field::Mark => 4,
            Field::Protocol => 1,
            Field::Port => 2,
            Field::Ether => 6,
            Field::Address6 | Field::InterfaceName => 16,
        }
    }
    fn type_of(fields: &[Field]) -> u32 {
        fields.iter().fold(0, |all, field| (all << 6) | *field as u32)
    }
    fn length_of(fields: &[Field]) -> u32 {
        match fields {
            [one] => one.length(),
            many => many.iter().map(|field| field.length().next_multiple_of(4)).sum(),
        }
    }
}

/// Value of a map.
pub enum Value<'a> {
    None,
    Verdict,
    Data(&'a [Field]),
}

/// One element: its key, and for a map its value.
pub struct Element {
    key: Vec<u8>,
    end: End,
    value: ElementValue,
}

/// How an interval is closed.
enum End {
    /// No interval.
    None,
    /// This element is the first key after one.
    OfInterval,
    /// The last key of one.
    Key(Vec<u8>),
}

pub enum ElementValue {
    None,
    Verdict(Verdict),
    Data(Vec<u8>),
}

/// Which of the tables of one name a change is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    #[default]
    Ip = NFPROTO_IPV4 as isize,
    Ip6 = NFPROTO_IPV6 as isize,
    Arp = NFPROTO_ARP as isize,
}

impl Family {
    /// Both families of a workload's addresses.
    pub const INET: [Family; 2] = [Family::Ip, Family::Ip6];

    pub fn of(address: IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family::Ip,
            IpAddr::V6(_) => Family::Ip6,
        }
    }
    /// An address of this family as a set's field.
    pub fn address(self) -> Field {
        match self {
            Family::Ip | Family::Arp => Field::Address,
            Family::Ip6 => Field::Address6,
        }
    }
}

/// An address's bytes as keys of sets hold them.
pub fn octets(address: impl Into<IpAddr>) -> Vec<u8> {
    match address.into() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A transaction on the tables of one name: all of it takes effect at once, or nothing.
pub struct Transaction {
    batch: Batch,
    table: String,
    family: Family,
    changes: usize,
    anonymous: u32,
}

impl Transaction {
    pub fn new(table: &str) -> Transaction {
        let mut batch = Batch::new();
        batch.request("begin the transaction", BATCH_BEGIN, 0, &[], |w| w.raw(&[0, 0, 0, (SUBSYSTEM >> 8) as u8]));
        Transaction { batch, table: table.to_owned(), family: Family::Ip, changes: 0, anonymous: 0 }
    }
    /// The family that the next changes are for; `ip` at first.
    pub fn family(&mut self, family: Family) {
        self.family = family;
    }
    /// A rule for the present family's table.
    pub fn rule(&self) -> Rule {
        Rule::of(self.family)
    }
    pub fn is_empty(&self) -> bool {
        self.changes == 0
    }
    pub fn commit(mut self, socket: &mut Socket) -> Result<()> {
        if self.changes == 0 {
            return Ok(());
        }
        self.batch.request("commit the transaction", BATCH_END, 0, &[], |w| {
            w.raw(&[0, 0, 0, (SUBSYSTEM >> 8) as u8]);
        });
        socket.send(self.batch)
    }
    fn change(&mut self, operation: &'static str, kind: u16, flags: u16, fill: impl FnOnce(&mut Writer)) {
        self.changes += 1;
        let (table, family) = (&self.table, self.family as u8);
        self.batch.request(operation, SUBSYSTEM | kind, flags | NLM_F_ACK, &[], |w| {
            w.raw(&[family, 0, 0, 0]);
            w.string(1, table);
            fill(w);
        });
    }
    /// `comment` comes back from [`table_comment`].
    pub fn add_table(&mut self, comment: &str) {
        self.change("make the table", NEWTABLE, NLM_F_CREATE, |w| w.attr(6, &user_comment(comment)));
    }
    pub fn delete_table(&mut self) {
        self.change("remove the table", DELTABLE, 0, |_| {});
    }
    pub fn add_chain(&mut self, name: &str) {
        self.change("make the chain", NEWCHAIN, NLM_F_CREATE, |w| w.string(3, name));
    }
    pub fn add_base_chain(&mut self, chain: &BaseChain<'_>) {
        self.change("make the base chain", NEWCHAIN, NLM_F_CREATE, |w| {
            w.string(3, chain.name);
            w.nest(4, |w| {
                w.be32(1, chain.hook.number());
                w.be32(2, chain.priority as u32);
            });
            w.be32(5, chain.policy as u32);
            w.string(7, chain.kind);
        });
    }
    pub fn delete_chain(&mut self, name: &str) {
        self.change("remove the chain", DELCHAIN, 0, |w| w.string(3, name));
    }
    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, name: &str) {
        self.change("empty the chain", DELRULE, 0, |w| w.string(2, name));
    }
    pub fn add_set(&mut self, name: &str, key: &[Field], value: &Value<'_>) {
        self.set(name, key, value, 0, 0);
    }
    /// A map that rules fill; an element goes when it has not been written for `seconds`. No more than `limit` fit.
    pub fn add_expiring_map(&mut self, name: &str, key: &[Field], value: &[Field], seconds: u32, limit: u32) {
        self.change("make the map", NEWSET, NLM_F_CREATE, |w| {
            w.string(2, name);
            w.be32(3, SET_MAP | SET_TIMEOUT | SET_DYNAMIC);
            w.be32(4, Field::type_of(key));
            w.be32(5, Field::length_of(key));
            w.be32(6, Field::type_of(value));
            w.be32(7, Field::length_of(value));
            w.nest(9, |w| w.be32(1, limit));
            w.be32(10, 0);
            w.be64(11, u64::from(seconds) * 1000);
        });
    }
    fn set(&mut self, name: &str, key: &[Field], value: &Value<'_>, flags: u32, id: u32) {
        self.change("make the set", NEWSET, NLM_F_CREATE, |w| {
            w.string(2, name);
            let map = if matches!(value, Value::None) { 0 } else { SET_MAP };
            w.be32(3, flags | map);
            w.be32(4, Field::type_of(key));
            w.be32(5, Field::length_of(key));
            match value {
                Value::None => {}
                Value::Verdict => w.be32(6, TYPE_VERDICT),
                Value::Data(fields) => {
                    w.be32(6, Field::type_of(fields));
                    w.be32(7, Field::length_of(fields));
                }
            }
            w.be32(10, id);
            if flags & SET_CONCAT != 0 {
                // The lengths of the fields: without them the kernel cannot match ranges in each.
                w.nest(9, |w| {
                    w.nest(2, |w| {
                        for field in key {
                            w.nest(LIST_ELEM, |w| w.be32(1, field.length()));
                        }
                    });
                });
            }
            if let [Field::Integer] = key {
                // For nft's listings: host byte order of the key, network order of the value.
                w.attr(13, &[0, 4, 1, 0, 0, 0, 1, 4, 2, 0, 0, 0]);
            }
        });
    }
    /// Nothing may refer to it any more.
    pub fn delete_set(&mut self, name: &str) {
        self.change("remove the set", DELSET, 0, |w| w.string(2, name));
    }
    pub fn add_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements("add to the set", NEWSETELEM, NLM_F_CREATE, set, 0, elements);
    }
    pub fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements("remove from the set", DELSETELEM, 0, set, 0, elements);
    }
    /// Removes all elements.
    pub fn flush_set(&mut self, set: &str) {
        self.change("empty the set", DELSETELEM, 0, |w| w.string(2, set));
    }
    fn elements(&mut self, operation: &'static str, kind: u16, flags: u16, set: &str, id: u32, all: &[Element]) {
        let mut rest = all;
        while !rest.is_empty() {
            let mut taken = 0;
            self.change(operation, kind, flags, |w| {
                w.string(2, set);
                if id != 0 {
                    w.be32(4, id);
                }
                w.nest(3, |w| {
                    let start = w.len();
                    for element in rest {
                        if w.len() - start > ELEMENTS_PER_MESSAGE {
                            break;
                        }
                        w.nest(LIST_ELEM, |w| element.write(w));
                        taken += 1;
                    }
                });
            });
            rest = rest.get(taken..).unwrap_or_default();
        }
    }
    /// A constant map that lives and dies with the rule that looks it up; the answer is the name for [`Rule::lookup`].
    pub fn add_anonymous_map(&mut self, key: &[Field], value: &[Field], elements: &[Element]) -> AnonymousSet {
        self.anonymous += 1;
        let id = self.anonymous;
        self.set("__map%d", key, &Value::Data(value), SET_ANONYMOUS | SET_CONSTANT, id);
        self.elements("fill the map", NEWSETELEM, NLM_F_CREATE, "__map%d", id, elements);
        AnonymousSet(id)
    }
    /// A constant set of inclusive address ranges, which must be sorted and disjoint.
    pub fn add_anonymous_ranges(&mut self, ranges: &[(Ipv4Addr, Ipv4Addr)]) -> AnonymousSet {
        let mut elements = Vec::with_capacity(ranges.len() * 2);
        for (first, last) in ranges {
            elements.push(Element::key(first.octets().to_vec()));
            if let Some(after) = last.to_bits().checked_add(1) {
                let key = after.to_be_bytes().to_vec();
                elements.push(Element { key, end: End::OfInterval, value: ElementValue::None });
            }
        }
        self.anonymous_set(&[Field::Address], SET_INTERVAL, &elements)
    }
    /// As [`Transaction::add_anonymous_ranges`], for the table of family `ip6`.
    pub fn add_anonymous_ranges6(&mut self, ranges: &[(Ipv6Addr, Ipv6Addr)]) -> AnonymousSet {
        let mut elements = Vec::with_capacity(ranges.len() * 2);
        for (first, last) in ranges {
            elements.push(Element::key(first.octets().to_vec()));
            if let Some(after) = last.to_bits().checked_add(1) {
                let key = after.to_be_bytes().to_vec();
                elements.push(Element { key, end: End::OfInterval, value: ElementValue::None });
            }
        }
        self.anonymous_set(&[Field::Address6], SET_INTERVAL, &elements)
    }
    /// A constant set of (protocol, inclusive port range).
    pub fn add_anonymous_ports(&mut self, ports: &[(u8, u16, u16)]) -> AnonymousSet {
        let key = |protocol: u8, port: u16| concat(&[&[protocol], &port.to_be_bytes()]);
        let element = |(protocol, first, last): &(u8, u16, u16)| Element {
            key: key(*protocol, *first),
            end: End::Key(key(*protocol, *last)),
            value: ElementValue::None,
        };
        let elements: Vec<Element> = ports.iter().map(element).collect();
        self.anonymous_set(&[Field::Protocol, Field::Port], SET_INTERVAL | SET_CONCAT, &elements)
    }
    /// A constant set of keys of several fields.
    pub fn add_anonymous_keys(&mut self, key: &[Field], elements: &[Element]) -> AnonymousSet {
        self.anonymous_set(key, 0, elements)
    }
    fn anonymous_set(&mut self, key: &[Field], flags: u32, elements: &[Element]) -> AnonymousSet {
        self.anonymous += 1;
        let id = self.anonymous;
        self.set("__set%d", key, &Value::None, SET_ANONYMOUS | SET_CONSTANT | flags, id);
        self.elements("fill the set", NEWSETELEM, NLM_F_CREATE, "__set%d", id, elements);
        AnonymousSet(id)
    }
    pub fn add_rule(&mut self, chain: &str, rule: Rule) {
        self.change("add the rule", NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |w| {
            w.string(2, chain);
            w.nest(4, |w| w.raw(rule.writer.bytes()));
            if !rule.comment.is_empty() {
                w.attr(7, &user_comment(&rule.comment));
            }
        });
    }
}

/// nft's user data of type "comment", which its listings show.
fn user_comment(comment: &str) -> Vec<u8> {
    let mut text: Vec<u8> = comment.bytes().filter(|b| *b != 0).take(127).collect();
    text.push(0);
    let mut data = vec![0, text.len() as u8];
    data.append(&mut text);
    data
}

#[derive(Clone, Copy)]
pub struct AnonymousSet(u32);

impl Element {
    pub fn key(key: Vec<u8>) -> Element {
        Element::new(key, ElementValue::None)
    }
    pub fn new(key: Vec<u8>, value: ElementValue) -> Element {
        Element { key, end: End::None, value }
    }
    fn write(&self, w: &mut Writer) {
        w.nest(1, |w| w.attr(DATA_VALUE, &self.key));
        match &self.end {
            End::None => {}
            End::OfInterval => w.be32(3, ELEMENT_INTERVAL_END),
            End::Key(last) => w.nest(10, |w| w.attr(DATA_VALUE, last)),
        }
        match &self.value {
            ElementValue::None => {}
            ElementValue::Verdict(verdict) => w.nest(2, |w| write_verdict(w, verdict)),
            ElementValue::Data(data) => w.nest(2, |w| w.attr(DATA_VALUE, data)),
        }
    }
}

fn write_verdict(w: &mut Writer, verdict: &Verdict) {
    w.nest(DATA_VERDICT, |w| match verdict {
        Verdict::Drop => w.be32(1, 0),
        Verdict::Accept => w.be32(1, 1),
        Verdict::Jump(chain) => {
            w.be32(1, -3i32 as u32);
            w.string(2, chain);
        }
        Verdict::Goto(chain) => {
            w.be32(1, -4i32 as u32);
            w.string(2, chain);
        }
    });
}

/// Joins fields into a key, each padded to whole registers.
pub fn concat(fields: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(32);
    for field in fields {
        key.extend_from_slice(field);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    key
}

/// An interface name as a 16-byte field.
pub fn interface_name(name: &str) -> [u8; 16] {
    let mut field = [0; 16];
    for (to, from) in field.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    field
}
