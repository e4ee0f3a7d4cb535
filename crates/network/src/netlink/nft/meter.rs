//! Sets that rules fill with what they count by key: packets a second, open connections.

use super::{Field, NEWSET, NLM_F_CREATE, Reg, Rule, SET_DYNAMIC, SET_TIMEOUT, Transaction};
use crate::netlink::Writer;

/// What is counted for each key. A rule goes on only as long as none is exceeded.
#[derive(Clone, Copy)]
pub enum Meter {
    /// Packets a second, after a burst of as many as this.
    Rate { per_second: u32, burst: u32 },
    /// Connections that are open, the one that the packet opens among them. For packets that open one.
    Connections(u32),
}

/// Seconds after which a rate that nobody used is forgotten.
const FORGOTTEN: u64 = 60;
/// NFT_DYNSET_F_EXPR
const SEVERAL: u32 = 2;

impl Meter {
    fn write(self, w: &mut Writer) {
        match self {
            Meter::Rate { per_second, burst } => {
                w.string(1, "limit");
                w.nest(2, |w| {
                    w.be64(1, u64::from(per_second));
                    w.be64(2, 1);
                    w.be32(3, burst);
                    w.be32(4, 0);
                    w.be32(5, 0);
                });
            }
            Meter::Connections(most) => {
                w.string(1, "connlimit");
                w.nest(2, |w| {
                    w.be32(1, most);
                    w.be32(2, 0);
                });
            }
        }
    }
}

impl Transaction {
    /// A set for [`Rule::metered`]. With `forgets` a key goes when it has not been met for a minute; without, when none of
    /// its connections is open any more. No more than `limit` keys fit.
    pub fn add_metered_set(&mut self, name: &str, key: &[Field], forgets: bool, limit: u32) {
        self.change("make the set", NEWSET, NLM_F_CREATE, |w| {
            w.string(2, name);
            w.be32(3, SET_DYNAMIC | if forgets { SET_TIMEOUT } else { 0 });
            w.be32(4, Field::type_of(key));
            w.be32(5, Field::length_of(key));
            w.nest(9, |w| w.be32(1, limit));
            w.be32(10, 0);
            if forgets {
                w.be64(11, FORGOTTEN * 1000);
            }
        });
    }
}

impl Rule {
    /// Counts for the key in consecutive registers from `key`, and goes on unless that is too much, or the set is full.
    pub fn metered(self, set: &str, key: Reg, meters: &[Meter]) -> Rule {
        let keeps = meters.iter().any(|meter| matches!(meter, Meter::Connections(_)));
        self.expression("dynset", |w| {
            w.string(1, set);
            // "add", or "update" for elements that time takes away.
            w.be32(3, u32::from(!keeps));
            w.be32(4, key.number());
            match meters {
                [one] => w.nest(7, |w| one.write(w)),
                many => {
                    w.be32(9, SEVERAL);
                    w.nest(10, |w| many.iter().for_each(|one| w.nest(super::LIST_ELEM, |w| one.write(w))));
                }
            }
        })
    }
    /// The packet opens no connection in the kernel's eyes.
    pub fn untracked(self) -> Rule {
        self.expression("notrack", |_| {})
    }
    /// A frame to everyone or to a group.
    pub fn if_not_to_us(self) -> Rule {
        self.meta(19, super::R0).compare(super::R0, 1, &[0])
    }
    /// An IPv4 packet that is a part of one, or an IPv6 packet that says so first.
    pub fn if_fragment(self) -> Rule {
        match self.family {
            super::Family::Ip6 => self.payload(1, 6, 1, super::R0).equal(super::R0, &[44]),
            super::Family::Ip | super::Family::Arp => {
                self.payload(1, 6, 2, super::R0).mask(super::R0, &[0x3f, 0xff]).compare(super::R0, 1, &[0, 0])
            }
        }
    }
    /// As [`Rule::log`], with a word for the listener.
    pub fn log_as(self, word: &str, group: u16, bytes: u32) -> Rule {
        self.expression("log", |w| {
            w.attr(1, &group.to_be_bytes());
            w.string(2, word);
            w.be32(3, bytes);
            w.attr(4, &1u16.to_be_bytes());
        })
    }
    pub fn jump(self, chain: &str) -> Rule {
        self.verdict(&super::Verdict::Jump(chain.to_owned()))
    }
}
