//! What a workload may take of the router, so that the others find room: open connections and new ones, fragments, questions
//! to the DNS server, questions for an address; and packets to groups, which go nowhere.
//!
//! Connections are counted in shards that each new one is put in by chance. The kernel walks a list to count, so that
//! a workload with many connections costs a part of them only; the sum of the shards is the limit all the same.

use crate::error::{Error, Result};
use crate::firewall::{LOG_GROUP, Side, own};
use crate::netlink::nft::meter::Meter;
use crate::netlink::nft::{BaseChain, Field, Hook, Policy, R0, Transaction, Unreachable};
use crate::ns;

/// What a packet was refused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Policies, or the lack of one.
    Policy,
    /// More connections than a workload may have.
    Connections,
    /// More parts of packets than a workload may send.
    Fragments,
    /// More questions to the DNS server than a workload may ask.
    Questions,
    /// To everyone or to a group: there is no layer 2.
    Groups,
    /// Addresses, routes or a better way, which the router alone gives and announces.
    Announcements,
}

impl Cause {
    const LIMITS: [Cause; 5] =
        [Cause::Connections, Cause::Fragments, Cause::Questions, Cause::Groups, Cause::Announcements];

    /// The word that the kernel's log carries; also the name of the chain that refuses.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Cause::Policy => crate::firewall::REFUSED,
            Cause::Connections => "limit_connections",
            Cause::Fragments => "limit_fragments",
            Cause::Questions => "limit_questions",
            Cause::Groups => "no_groups",
            Cause::Announcements => "router_alone",
        }
    }
    pub(crate) fn of_word(word: &str) -> Cause {
        Cause::LIMITS.into_iter().find(|cause| cause.word() == word).unwrap_or(Cause::Policy)
    }
    /// Chains whose counters count refused packets.
    pub(crate) fn chains() -> impl Iterator<Item = &'static str> {
        [Cause::Policy].into_iter().chain(Cause::LIMITS).map(Cause::word)
    }
}

/// Of each workload, for each of its two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections that it opened and that are open; and how many it may open a second. 64 to 1,048,576.
    pub connections: u32,
    /// Questions a second to the DNS server by UDP.
    pub questions: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 16_384, questions: 10_000 }
    }
}

impl Limits {
    pub(crate) fn check(self) -> Result<()> {
        let error =
            |field, value: u32, why: &str| Err(Error::Config { field, value: value.to_string(), why: why.into() });
        if !(64..=1 << 20).contains(&self.connections) {
            return error("limits.connections", self.connections, "must be 64 to 1048576");
        }
        if !(1..=10_000_000).contains(&self.questions) {
            return error("limits.questions", self.questions, "must be 1 to 10000000");
        }
        Ok(())
    }
    /// Shards, and connections in each.
    fn shards(self) -> (u32, u32) {
        let shards = (self.connections / SHARD).clamp(1, 64);
        (shards, self.connections.div_ceil(shards))
    }
}

/// Connections in a shard, unless there would be too many shards.
const SHARD: u32 = 256;
/// Accepts what opens a connection, if its source may have one more.
pub const COUNTED: &str = "counted";
/// What is sent to groups.
pub const GROUPS: &str = "groups";
/// Parts of packets; questions to the DNS server.
pub const FRAGMENTS: &str = "fragments";
pub const QUESTIONS: &str = "questions";
/// Machines that ask for their addresses.
pub const ASKING: &str = "asking";
const CONNECTIONS_OF: &str = "connections_of";
const FRAGMENTS_OF: &str = "fragments_of";
const QUESTIONS_OF: &str = "questions_of";
const ASKING_OF: &str = "asking_of";
/// Keys in a set: more than there are workloads.
const KEYS: u32 = 1 << 20;
/// Parts of packets a second, and at once: 64 KiB datagrams at 100 Mbit/s.
const FRAGMENT_RATE: Meter = Meter::Rate { per_second: 8192, burst: 2048 };
const ASKING_RATE: Meter = Meter::Rate { per_second: 10, burst: 50 };
/// Packets of one cause told to the log, a second; and how much of each.
const LOG_RATE: u32 = 5;
const LOG_BYTES: u32 = 128;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The calling thread's namespace, a router's, keeps parts of packets and closed connections no longer than it has to.
pub fn sysctls() -> Result<()> {
    for (name, value) in [
        ("netfilter/nf_conntrack_tcp_timeout_time_wait", "5"),
        ("netfilter/nf_conntrack_tcp_timeout_close", "5"),
        ("netfilter/nf_conntrack_tcp_timeout_established", "86400"),
        ("ipv4/ipfrag_time", "2"),
        ("ipv4/ipfrag_high_thresh", "33554432"),
        ("netfilter/nf_conntrack_frag6_timeout", "2"),
        ("netfilter/nf_conntrack_frag6_high_thresh", "33554432"),
    ] {
        ns::sysctl(name, value)?;
    }
    Ok(())
}

/// Says when the kernel's own limit is so low that a few workloads reach it together.
pub fn warn_of_small_table(limits: Limits) {
    let most = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or_default();
    if let Ok(most) = most.trim().parse::<u32>()
        && most > 0
        && limits.connections > most / 2
    {
        tracing::warn!(
            "a workload may have {} connections, and the kernel tracks {most} of all together: raise \
             net.netfilter.nf_conntrack_max, or lower atoll up --workload-connections",
            limits.connections
        );
    }
}

/// Sets and chains, to which rules of `firewall.rs` lead.
pub(crate) fn ruleset(t: &mut Transaction, side: &Side) {
    let own = || own(side);
    let address = side.family.address();
    t.add_metered_set(CONNECTIONS_OF, &[address, Field::Mark], false, KEYS);
    t.add_metered_set(FRAGMENTS_OF, &[address], true, KEYS);
    t.add_metered_set(QUESTIONS_OF, &[address], true, KEYS);
    t.add_metered_set(ASKING_OF, &[Field::InterfaceName], true, KEYS);
    for cause in Cause::LIMITS {
        let log = side.rule().at_most(LOG_RATE).log_as(cause.word(), LOG_GROUP, LOG_BYTES);
        t.add_rule(cause.word(), log);
        if cause == Cause::Connections {
            t.add_rule(cause.word(), side.rule().count().if_protocol(TCP).reject_reset());
            t.add_rule(cause.word(), side.rule().reject_unreachable(Unreachable::Prohibited));
        } else {
            t.add_rule(cause.word(), side.rule().count().drop());
        }
    }
    let (shards, most) = side.limits.shards();
    let connections = [Meter::Rate { per_second: most, burst: most }, Meter::Connections(most)];
    let shard = R0.after(address);
    t.add_rule(
        COUNTED,
        side.rule().load_source(R0).random(shards, shard).metered(CONNECTIONS_OF, R0, &connections).accept(),
    );
    t.add_rule(COUNTED, side.rule().goto(Cause::Connections.word()));

    let fragment = own().load_source(R0).metered(FRAGMENTS_OF, R0, &[FRAGMENT_RATE]);
    t.add_rule(FRAGMENTS, fragment.accept());
    t.add_rule(FRAGMENTS, own().goto(Cause::Fragments.word()));

    // Nothing remembers a question that was asked by UDP: it is answered at once.
    let question = || own().if_protocol(UDP).if_destination_port(53);
    let rate = Meter::Rate { per_second: side.limits.questions, burst: side.limits.questions };
    t.add_rule(QUESTIONS, question().load_source(R0).metered(QUESTIONS_OF, R0, &[rate]).untracked().accept());
    t.add_rule(QUESTIONS, question().goto(Cause::Questions.word()));
    t.add_rule(QUESTIONS, own().accept());
    t.add_base_chain(&BaseChain {
        name: "answers",
        kind: "filter",
        hook: Hook::Output,
        priority: -300,
        policy: Policy::Accept,
    });
    t.add_rule("answers", side.rule().if_source(side.dns).if_protocol(UDP).if_source_port(53).untracked());

    t.add_rule(ASKING, side.rule().load_input_name(R0).metered(ASKING_OF, R0, &[ASKING_RATE]).accept());
    t.add_rule(ASKING, side.rule().count().drop());
    t.add_rule(GROUPS, own().goto(Cause::Groups.word()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_add_up_to_the_limit() {
        for (connections, want) in [(64, (1, 64)), (512, (2, 256)), (1000, (3, 334)), (16_384, (64, 256))] {
            assert_eq!(Limits { connections, ..Limits::default() }.shards(), want);
        }
        assert_eq!(Limits { connections: 1 << 20, ..Limits::default() }.shards(), (64, 16_384));
    }

    #[test]
    fn words_say_the_cause() {
        for cause in Cause::LIMITS {
            assert_eq!(Cause::of_word(cause.word()), cause);
        }
        assert_eq!(Cause::of_word(""), Cause::Policy);
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        assert!(Limits::default().check().is_ok());
        assert!(Limits { connections: 63, ..Limits::default() }.check().is_err());
        assert!(Limits { questions: 0, ..Limits::default() }.check().is_err());
    }
}
