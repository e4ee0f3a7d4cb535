//! Sets whose elements expire. Both carry comments, which come back when they are listed.

use super::{
    DATA_VALUE, Family, Field, GETSET, GETSETELEM, LIST_ELEM, NEWSET, NEWSETELEM, SET_TIMEOUT, SUBSYSTEM, Transaction,
    user_comment,
};
use crate::error::Result;
use crate::netlink::parse::{Attributes, text};
use crate::netlink::{Batch, NLM_F_CREATE, NLM_F_DUMP, Socket};
use rustix::io::Errno;
use std::time::Duration;

/// `NFTNL_UDATA_SET_COMMENT`
const SET_COMMENT: u8 = 7;
const ELEMENTS_PER_MESSAGE: usize = 128;

/// An element and for how long it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    pub key: Vec<u8>,
    pub comment: String,
    pub left: Duration,
}

impl Transaction {
    /// No more than `limit` elements fit.
    pub fn add_timed_set(&mut self, name: &str, key: Field, comment: &str, limit: u32) {
        self.change("make the set", NEWSET, NLM_F_CREATE, |w| {
            w.string(2, name);
            w.be32(3, SET_TIMEOUT);
            w.be32(4, Field::type_of(&[key]));
            w.be32(5, Field::length_of(&[key]));
            w.nest(9, |w| w.be32(1, limit));
            w.be32(10, 0);
            let mut comment = user_comment(comment);
            if let Some(kind) = comment.first_mut() {
                *kind = SET_COMMENT;
            }
            w.attr(13, &comment);
        });
    }

    /// Puts elements in, those that are there with a new time.
    pub fn put_timed(&mut self, set: &str, elements: &[Timed]) {
        self.add_timed(set, elements);
        let keys: Vec<super::Element> = elements.iter().map(|one| super::Element::key(one.key.clone())).collect();
        self.delete_elements(set, &keys);
        self.add_timed(set, elements);
    }

    /// Takes elements out, whether they are there or not.
    pub fn remove_timed(&mut self, set: &str, keys: &[Vec<u8>]) {
        let left = Duration::from_secs(1);
        let elements: Vec<Timed> =
            keys.iter().map(|key| Timed { key: key.clone(), comment: String::new(), left }).collect();
        self.add_timed(set, &elements);
        let keys: Vec<super::Element> = keys.iter().map(|key| super::Element::key(key.clone())).collect();
        self.delete_elements(set, &keys);
    }

    pub fn add_timed(&mut self, set: &str, elements: &[Timed]) {
        for some in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.change("add to the set", NEWSETELEM, NLM_F_CREATE, |w| {
                w.string(2, set);
                w.nest(3, |w| {
                    for one in some {
                        w.nest(LIST_ELEM, |w| {
                            w.nest(1, |w| w.attr(DATA_VALUE, &one.key));
                            w.be64(4, u64::try_from(one.left.as_millis()).unwrap_or(u64::MAX).max(1));
                            if !one.comment.is_empty() {
                                w.attr(6, &element_comment(&one.comment));
                            }
                        });
                    }
                });
            });
        }
    }
}

/// As nft writes it: its length, text and the NUL behind it in one byte; names of DNS just fit.
fn element_comment(comment: &str) -> Vec<u8> {
    let mut text: Vec<u8> = comment.bytes().filter(|b| *b != 0).take(253).collect();
    text.push(0);
    let mut data = vec![0, text.len() as u8];
    data.append(&mut text);
    data
}

/// Names and comments of a table's sets.
pub fn set_comments(socket: &mut Socket, table: &str, family: Family) -> Result<Vec<(String, String)>> {
    let mut batch = Batch::new();
    batch.request("list the sets", SUBSYSTEM | GETSET, NLM_F_DUMP, &[], |w| w.raw(&[family as u8, 0, 0, 0]));
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        let Some(attributes) = payload.get(4..).filter(|_| kind == SUBSYSTEM | NEWSET) else { return };
        if Attributes::get(attributes, 1).map(text) != Some(table) {
            return;
        }
        let comment = Attributes::get(attributes, 13).filter(|data| data.first() == Some(&SET_COMMENT));
        if let (Some(name), Some(comment)) = (Attributes::get(attributes, 2), comment) {
            all.push((text(name).to_owned(), text(comment.get(2..).unwrap_or_default()).to_owned()));
        }
    })?;
    Ok(all)
}

/// The elements of a set that have a comment and expire.
pub fn timed(socket: &mut Socket, table: &str, family: Family, set: &str) -> Result<Vec<Timed>> {
    let mut batch = Batch::new();
    batch.request("list the elements", SUBSYSTEM | GETSETELEM, NLM_F_DUMP, &[Errno::NOENT], |w| {
        w.raw(&[family as u8, 0, 0, 0]);
        w.string(1, table);
        w.string(2, set);
    });
    let mut all = Vec::new();
    socket.query(batch, |kind, payload| {
        let list = payload.get(4..).and_then(|attributes| Attributes::get(attributes, 3));
        if let Some(list) = list.filter(|_| kind == SUBSYSTEM | NEWSETELEM) {
            all.extend(Attributes::new(list).filter_map(|(_, element)| read(element)));
        }
    })?;
    Ok(all)
}

/// Reads one element.
pub fn read(element: &[u8]) -> Option<Timed> {
    let key = Attributes::get(Attributes::get(element, 1)?, DATA_VALUE)?.to_vec();
    let left = Attributes::get(element, 5)?.try_into().ok().map(u64::from_be_bytes)?;
    let comment = Attributes::get(element, 6)?;
    let comment = text(comment.get(2..).filter(|_| comment.first() == Some(&0))?).to_owned();
    Some(Timed { key, comment, left: Duration::from_millis(left) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = super::read(&bytes);
        }
        #[test]
        fn comments_fit_what_the_kernel_takes(text in "[a-z.]{0,400}") {
            prop_assert!(super::element_comment(&text).len() <= 256);
        }
    }
}
