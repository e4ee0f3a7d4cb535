//! What the kernel has: names of chains and sets, keys of elements, counters.

use super::{DATA_VALUE, Family, GETSET, GETSETELEM, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM, NEWTABLE, SUBSYSTEM};
use crate::error::Result;
use crate::netlink::parse::{Attributes, text};
use crate::netlink::{Batch, NLM_F_DUMP, Socket};
use rustix::io::Errno;

const GETTABLE: u16 = 1;
const GETCHAIN: u16 = 4;
const GETRULE: u16 = 7;
/// The comment a table was made with; `None` if there is no such table.
pub fn table_comment(socket: &mut Socket, table: &str, family: Family) -> Result<Option<String>> {
    let mut batch = Batch::new();
    batch.request("look the table up", SUBSYSTEM | GETTABLE, 0, &[Errno::NOENT], |w| {
        w.raw(&[family as u8, 0, 0, 0]);
        w.string(1, table);
    });
    let mut found = None;
    socket.query(batch, |kind, payload| {
        if kind == SUBSYSTEM | NEWTABLE {
            let data = payload.get(4..).and_then(|bytes| Attributes::get(bytes, 6)).unwrap_or_default();
            found = Some(text(data.get(2..).unwrap_or_default()).to_owned());
        }
    })?;
    Ok(found)
}

/// Names of a table's chains.
pub fn chains(socket: &mut Socket, table: &str, family: Family) -> Result<Vec<String>> {
    names(socket, table, family, "list the chains", (GETCHAIN, NEWCHAIN), 3)
}

/// Names of a table's named sets and maps.
pub fn sets(socket: &mut Socket, table: &str, family: Family) -> Result<Vec<String>> {
    names(socket, table, family, "list the sets", (GETSET, NEWSET), 2)
}

fn names(
    socket: &mut Socket,
    table: &str,
    family: Family,
    operation: &'static str,
    (get, new): (u16, u16),
    attribute: u16,
) -> Result<Vec<String>> {
    let mut batch = Batch::new();
    batch.request(operation, SUBSYSTEM | get, NLM_F_DUMP, &[], |w| w.raw(&[family as u8, 0, 0, 0]));
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        let Some(attributes) = payload.get(4..) else { return };
        if kind == SUBSYSTEM | new && Attributes::get(attributes, 1).map(text) == Some(table) {
            all.extend(Attributes::get(attributes, attribute).map(|name| text(name).to_owned()));
        }
    })?;
    Ok(all)
}

/// Packets that the counters in a chain's rules have counted.
pub fn counted(socket: &mut Socket, table: &str, family: Family, chain: &str) -> Result<u64> {
    let mut batch = Batch::new();
    batch.request("list the rules", SUBSYSTEM | GETRULE, NLM_F_DUMP, &[Errno::NOENT], |w| {
        w.raw(&[family as u8, 0, 0, 0]);
        w.string(1, table);
        w.string(2, chain);
    });
    let mut packets = 0;
    socket.query(batch, |kind, payload| {
        if kind == SUBSYSTEM | NEWRULE {
            packets += payload.get(4..).map_or(0, counters_of_rule);
        }
    })?;
    Ok(packets)
}

/// Reads a rule's counter expressions.
fn counters_of_rule(attributes: &[u8]) -> u64 {
    let expressions = Attributes::get(attributes, 4).unwrap_or_default();
    let one = |(_, expression): (u16, &[u8])| {
        let name = Attributes::get(expression, 1).map(text)?;
        let data = Attributes::get(expression, 2).filter(|_| name == "counter")?;
        Attributes::get(data, 2)?.try_into().ok().map(u64::from_be_bytes)
    };
    Attributes::new(expressions).filter_map(one).sum()
}

/// Keys of all elements of a set or map.
pub fn keys(socket: &mut Socket, table: &str, family: Family, set: &str) -> Result<Vec<Vec<u8>>> {
    let mut batch = Batch::new();
    batch.request("list the elements", SUBSYSTEM | GETSETELEM, NLM_F_DUMP, &[], |w| {
        w.raw(&[family as u8, 0, 0, 0]);
        w.string(1, table);
        w.string(2, set);
    });
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        let list = payload.get(4..).and_then(|attributes| Attributes::get(attributes, 3));
        if kind == SUBSYSTEM | NEWSETELEM
            && let Some(list) = list
        {
            let key = |element| Attributes::get(Attributes::get(element, 1)?, DATA_VALUE);
            all.extend(Attributes::new(list).filter_map(|(_, element)| key(element)).map(<[u8]>::to_vec));
        }
    })?;
    Ok(all)
}
