//! The two programs on every link's end in the router.
//!
//! `arriving` sees what a workload sends. What belongs to a known flow leaves at once by the flow's other link; other
//! packets are marked, and their addresses noted, before they take the long way. `leaving` sees what comes out of the long
//! way: a packet that still has its mark has passed the firewall, and makes its flow known. Both run to their end on one
//! processor before that takes up another packet, so the note is the packet's own.

use super::assembler::*;
use crate::firewall::{ACTIVATOR, RELAYED, TO_ACTIVATOR};

/// Keys: source, destination (IPv4 in the first four bytes), ports, protocol, IP version.
pub const KEY: usize = 40;
const KEY_DESTINATION: i16 = 16;
const KEY_PORTS: i16 = 32;
const KEY_PROTOCOL: i16 = 36;
const KEY_VERSION: i16 = 37;

/// Flows: the settings' epoch at the time, the link, until when, what addresses and ports become, the frame's MACs, and
/// whether the side that sends it has said its last.
pub const FLOW: usize = 72;
const FLOW_EPOCH: i16 = 0;
const FLOW_LINK: i16 = 4;
const FLOW_UNTIL: i16 = 8;
const FLOW_NEW: i16 = 16;
const FLOW_CHANGES: i16 = 52;
const FLOW_MACS: i16 = 56;
const FLOW_CLOSED: i16 = 68;

/// Links: whose they are, and what has gone out past the interface's own counters.
pub const LINK: usize = 48;
pub const LINK_ADDRESS: i16 = 0;
pub const LINK_MAC: i16 = 4;
pub const LINK_DETOUR: i16 = 10;
pub const LINK_ADDRESS6: i16 = 16;
pub const LINK_PACKETS: i16 = 32;
pub const LINK_BYTES: i16 = 40;

/// Settings: an epoch, whose end all flows' end is; until when everything takes the long way.
pub const SETTINGS: usize = 16;
const SETTINGS_EPOCH: i16 = 0;
const SETTINGS_WATCHED: i16 = 8;

/// Notes: the mark, the epoch, the key.
pub const NOTE: usize = 48;
const NOTE_MARK: i16 = 0;
const NOTE_EPOCH: i16 = 4;
const NOTE_KEY: i16 = 8;

/// So long a flow is known before a packet of it takes the long way again, and with that tells the connection tracker
/// that the flow lives.
const REFRESH_NS: i32 = 2_000_000_000i64 as i32;
/// Marks are of these bits' form, which no mark of the firewall's has.
const MARK: u32 = 0x8000_0000;
const MARK_BITS: u32 = 0xc000_0000;
const _: () = assert!(RELAYED & ACTIVATOR & TO_ACTIVATOR & MARK_BITS != MARK);

/// `struct __sk_buff`.
const SKB_LENGTH: i16 = 0;
const SKB_TYPE: i16 = 4;
const SKB_MARK: i16 = 8;
const SKB_LINK: i16 = 40;
const SKB_DATA: i16 = 76;
const SKB_END: i16 = 80;
/// What the filter says: go on as if it were not there.
const GO_ON: i32 = -1;
const DROP: i32 = 2;

const ETHERNET: i16 = 14;
const IPV4: i16 = 20;
const IPV6: i16 = 40;
const TCP: i32 = 6;
const UDP: i32 = 17;
const TCP_LENGTH: i16 = 20;
const UDP_LENGTH: i16 = 8;
const TCP_FLAGS: i16 = 13;
/// FIN, SYN, RST: what the connection tracker has to see.
const TURNS: i32 = 7;
const SYN: i32 = 2;

/// [`FLOW_CHANGES`]: what is translated.
const CHANGED_SOURCE: i32 = 1;
const CHANGED_DESTINATION: i32 = 2;
const CHANGED_PORTS: i32 = 4;

/// Where things are in the frames of both programs.
const AT_KEY: i16 = -40;
const AT_NOW: i16 = -48;
const AT_EPOCH: i16 = -56;
const AT_TURNS: i16 = -64;
const AT_INDEX: i16 = -68;
const AT_FLOW: i16 = -144;

/// Descriptors of the maps.
#[derive(Clone, Copy)]
pub struct Maps {
    pub settings: i32,
    pub links: i32,
    pub flows: i32,
    pub notes: i32,
}

/// Half a word as the machine loads it from network order.
fn wire(value: u16) -> i32 {
    i32::from(value.to_be())
}

/// R0 becomes the only element of a map, or the program ends.
fn only_element(a: &mut Assembler, map: i32) {
    a.store_value(Size::Word, FRAME, AT_INDEX, 0);
    a.map(R1, map);
    a.address(R2, FRAME, AT_INDEX);
    a.call(Helper::MapLookup);
    a.jump_if(R0, If::Equal, 0, "pass");
}

/// R0 becomes the link whose index R1 holds, or the program ends.
fn link(a: &mut Assembler, maps: Maps) {
    a.store(Size::Word, FRAME, AT_INDEX, R1);
    a.map(R1, maps.links);
    a.address(R2, FRAME, AT_INDEX);
    a.call(Helper::MapLookup);
    a.jump_if(R0, If::Equal, 0, "pass");
}

/// R6 is the packet, R7 its bytes, of which there are enough, or the program ends. The key is made in the frame, and FIN,
/// SYN and RST noted. Fragments, options, extension headers, what is about to expire and other protocols end the program.
fn parse(a: &mut Assembler) {
    a.set(R6, R1);
    a.load(Size::Word, R7, R6, SKB_DATA);
    a.load(Size::Word, R8, R6, SKB_END);
    for at in 0..5 {
        a.store_value(Size::Double, FRAME, AT_KEY + at * 8, 0);
    }
    a.store_value(Size::Double, FRAME, AT_TURNS, 0);
    let at_least = |a: &mut Assembler, length: i16| {
        a.address(R1, R7, length);
        a.jump_if_register(R1, If::Greater, R8, "pass");
    };
    at_least(a, ETHERNET + IPV4 + UDP_LENGTH);
    a.load(Size::Half, R1, R7, 12);
    a.jump_if(R1, If::Equal, wire(0x86dd), "v6");
    a.jump_if(R1, If::Differs, wire(0x0800), "pass");
    a.load(Size::Byte, R1, R7, ETHERNET);
    a.jump_if(R1, If::Differs, 0x45, "pass");
    a.load(Size::Half, R1, R7, ETHERNET + 6);
    a.jump_if(R1, If::AnyBit, wire(0x3fff), "pass");
    a.load(Size::Byte, R1, R7, ETHERNET + 8);
    a.jump_if(R1, If::Less, 2, "pass");
    for (from, to) in [(12, AT_KEY), (16, AT_KEY + KEY_DESTINATION), (IPV4, AT_KEY + KEY_PORTS)] {
        a.load(Size::Word, R1, R7, ETHERNET + from);
        a.store(Size::Word, FRAME, to, R1);
    }
    a.store_value(Size::Byte, FRAME, AT_KEY + KEY_VERSION, 4);
    a.load(Size::Byte, R2, R7, ETHERNET + 9);
    a.store(Size::Byte, FRAME, AT_KEY + KEY_PROTOCOL, R2);
    a.jump_if(R2, If::Equal, UDP, "parsed");
    a.jump_if(R2, If::Differs, TCP, "pass");
    at_least(a, ETHERNET + IPV4 + TCP_LENGTH);
    a.load(Size::Byte, R1, R7, ETHERNET + IPV4 + TCP_FLAGS);
    a.alu(Alu::And, R1, TURNS);
    a.store(Size::Double, FRAME, AT_TURNS, R1);
    a.jump("parsed");

    a.label("v6");
    at_least(a, ETHERNET + IPV6 + UDP_LENGTH);
    a.load(Size::Byte, R1, R7, ETHERNET);
    a.alu(Alu::Shr, R1, 4);
    a.jump_if(R1, If::Differs, 6, "pass");
    a.load(Size::Byte, R1, R7, ETHERNET + 7);
    a.jump_if(R1, If::Less, 2, "pass");
    for at in 0..4 {
        a.load(Size::Double, R1, R7, ETHERNET + 8 + at * 8);
        a.store(Size::Double, FRAME, AT_KEY + at * 8, R1);
    }
    a.load(Size::Word, R1, R7, ETHERNET + IPV6);
    a.store(Size::Word, FRAME, AT_KEY + KEY_PORTS, R1);
    a.store_value(Size::Byte, FRAME, AT_KEY + KEY_VERSION, 6);
    a.load(Size::Byte, R2, R7, ETHERNET + 6);
    a.store(Size::Byte, FRAME, AT_KEY + KEY_PROTOCOL, R2);
    a.jump_if(R2, If::Equal, UDP, "parsed");
    a.jump_if(R2, If::Differs, TCP, "pass");
    at_least(a, ETHERNET + IPV6 + TCP_LENGTH);
    a.load(Size::Byte, R1, R7, ETHERNET + IPV6 + TCP_FLAGS);
    a.alu(Alu::And, R1, TURNS);
    a.store(Size::Double, FRAME, AT_TURNS, R1);
    a.label("parsed");
}

fn pass(a: &mut Assembler) {
    a.label("pass");
    a.value(R0, GO_ON);
    a.end();
}

/// The frame is the link's own, to the router: the program ends otherwise. R9 is changed.
fn own_frame(a: &mut Assembler, maps: Maps) {
    a.load(Size::Word, R1, R6, SKB_TYPE);
    a.jump_if(R1, If::Differs, 0, "pass");
    a.load(Size::Word, R1, R6, SKB_LINK);
    link(a, maps);
    a.set(R9, R0);
    for (size, at) in [(Size::Word, 0), (Size::Half, 4)] {
        a.load(size, R1, R7, 6 + at);
        a.load(size, R2, R9, LINK_MAC + at);
        a.jump_if_register(R1, If::Differs, R2, "pass");
    }
    a.load(Size::Byte, R1, FRAME, AT_KEY + KEY_VERSION);
    a.jump_if(R1, If::Equal, 6, "own v6");
    a.load(Size::Word, R1, FRAME, AT_KEY);
    a.load(Size::Word, R2, R9, LINK_ADDRESS);
    a.jump_if_register(R1, If::Differs, R2, "pass");
    a.jump("own");
    a.label("own v6");
    for at in [0, 8] {
        a.load(Size::Double, R1, FRAME, AT_KEY + at);
        a.load(Size::Double, R2, R9, LINK_ADDRESS6 + at);
        a.jump_if_register(R1, If::Differs, R2, "pass");
    }
    a.label("own");
}

/// What runs where frames of workloads arrive.
pub fn arriving(maps: Maps) -> Option<Vec<Instruction>> {
    let mut assembler = Assembler::default();
    let a = &mut assembler;
    parse(a);
    own_frame(a, maps);
    only_element(a, maps.settings);
    a.set(R9, R0);
    a.call(Helper::CoarseNow);
    a.store(Size::Double, FRAME, AT_NOW, R0);
    a.load(Size::Double, R1, R9, SETTINGS_WATCHED);
    a.jump_if_register(R0, If::Less, R1, "pass");
    a.load(Size::Word, R1, R9, SETTINGS_EPOCH);
    a.store(Size::Double, FRAME, AT_EPOCH, R1);
    a.load(Size::Double, R1, FRAME, AT_TURNS);
    a.jump_if(R1, If::Differs, 0, "turns");
    a.map(R1, maps.flows);
    a.address(R2, FRAME, AT_KEY);
    a.call(Helper::MapLookup);
    a.jump_if(R0, If::Equal, 0, "unknown");
    a.set(R8, R0);
    a.load(Size::Word, R1, R8, FLOW_EPOCH);
    a.load(Size::Double, R2, FRAME, AT_EPOCH);
    a.jump_if_register(R1, If::Differs, R2, "unknown");
    a.load(Size::Double, R1, R8, FLOW_UNTIL);
    a.load(Size::Double, R2, FRAME, AT_NOW);
    a.jump_if_register(R2, If::Greater, R1, "unknown");
    a.load(Size::Word, R1, R8, FLOW_LINK);
    link(a, maps);
    forward(a);

    a.label("unknown");
    note(a, maps);
    a.jump("pass");
    // Who has sent its FIN sends acknowledgements only, the last of which the connection tracker has to see, or the
    // connection would count as open for half a minute more: they all take the long way, and are not learned from.
    a.label("turns");
    a.jump_if(R1, If::AnyBit, SYN, "opens");
    a.map(R1, maps.flows);
    a.address(R2, FRAME, AT_KEY);
    a.call(Helper::MapLookup);
    a.jump_if(R0, If::Equal, 0, "pass");
    a.store_value(Size::Word, R0, FLOW_CLOSED, 1);
    a.store_value(Size::Double, R0, FLOW_UNTIL, 0);
    a.jump("pass");
    a.label("opens");
    a.map(R1, maps.flows);
    a.address(R2, FRAME, AT_KEY);
    a.call(Helper::MapDelete);
    pass(a);
    assembler.finish()
}

/// R0 is the link to leave by, R8 the flow: counts, does what a router does to the packet, and sends it.
fn forward(a: &mut Assembler) {
    a.value(R1, 1);
    a.count(R0, LINK_PACKETS, R1);
    a.load(Size::Word, R1, R6, SKB_LENGTH);
    a.count(R0, LINK_BYTES, R1);
    a.load(Size::Double, R1, R8, FLOW_MACS);
    a.store(Size::Double, R7, 0, R1);
    a.load(Size::Word, R1, R8, FLOW_MACS + 8);
    a.store(Size::Word, R7, 8, R1);
    a.load(Size::Byte, R1, FRAME, AT_KEY + KEY_VERSION);
    a.jump_if(R1, If::Equal, 6, "hop v6");
    a.load(Size::Byte, R1, R7, ETHERNET + 8);
    a.alu(Alu::Add, R1, -1);
    a.store(Size::Byte, R7, ETHERNET + 8, R1);
    // RFC 1141: the checksum grows by what the header lost, with its carry.
    a.load(Size::Half, R1, R7, ETHERNET + 10);
    a.alu(Alu::Add, R1, wire(0x0100));
    a.set(R2, R1);
    a.alu(Alu::Shr, R2, 16);
    a.alu_of(Alu::Add, R1, R2);
    a.store(Size::Half, R7, ETHERNET + 10, R1);
    translate(a);
    a.jump("send");
    a.label("hop v6");
    a.load(Size::Byte, R1, R7, ETHERNET + 7);
    a.alu(Alu::Add, R1, -1);
    a.store(Size::Byte, R7, ETHERNET + 7, R1);
    a.label("send");
    a.load(Size::Word, R1, R8, FLOW_LINK);
    a.value(R2, 0);
    a.call(Helper::RedirectPeer);
    a.end();
    a.label("drop");
    a.value(R0, DROP);
    a.end();
}

/// `BPF_F_PSEUDO_HDR`; `BPF_F_MARK_MANGLED_0`: a UDP checksum of zero is none.
const OF_ADDRESS: i32 = 0x10;
const UDP_NONE: i32 = 0x20;

/// Writes an IPv4 flow's new addresses and ports. Pointers into the packet are void afterwards.
fn translate(a: &mut Assembler) {
    a.load(Size::Word, R7, R8, FLOW_CHANGES);
    a.jump_if(R7, If::Equal, 0, "send");
    // R9: the checksum's place, and in the upper half the flags of its change.
    a.value(R9, i32::from(ETHERNET + IPV4 + 16));
    a.load(Size::Byte, R1, FRAME, AT_KEY + KEY_PROTOCOL);
    a.jump_if(R1, If::Equal, TCP, "translate");
    a.value(R9, i32::from(ETHERNET + IPV4 + 6) | UDP_NONE << 16);
    a.label("translate");
    let l4_checksum = |a: &mut Assembler, key: i16, flags: i32| {
        a.set(R1, R6);
        a.set(R2, R9);
        a.alu(Alu::And, R2, 0xffff);
        a.load(Size::Word, R3, FRAME, AT_KEY + key);
        a.load(Size::Word, R4, R8, FLOW_NEW + key);
        a.set(R5, R9);
        a.alu(Alu::Shr, R5, 16);
        a.alu(Alu::Or, R5, 4 | flags);
        a.call(Helper::ReplaceL4Checksum);
        a.jump_if(R0, If::Differs, 0, "drop");
    };
    let store = |a: &mut Assembler, at: i16, key: i16| {
        a.set(R1, R6);
        a.value(R2, i32::from(at));
        a.address(R3, R8, FLOW_NEW + key);
        a.value(R4, 4);
        a.value(R5, 0);
        a.call(Helper::StoreBytes);
        a.jump_if(R0, If::Differs, 0, "drop");
    };
    for (bit, key, at, next) in [
        (CHANGED_SOURCE, 0, ETHERNET + 12, "source is done"),
        (CHANGED_DESTINATION, KEY_DESTINATION, ETHERNET + 16, "destination is done"),
    ] {
        a.jump_if(R7, If::AnyBit, bit, if key == 0 { "new source" } else { "new destination" });
        a.jump(next);
        a.label(if key == 0 { "new source" } else { "new destination" });
        a.set(R1, R6);
        a.value(R2, i32::from(ETHERNET + 10));
        a.load(Size::Word, R3, FRAME, AT_KEY + key);
        a.load(Size::Word, R4, R8, FLOW_NEW + key);
        a.value(R5, 4);
        a.call(Helper::ReplaceL3Checksum);
        a.jump_if(R0, If::Differs, 0, "drop");
        l4_checksum(a, key, OF_ADDRESS);
        store(a, at, key);
        a.label(next);
    }
    a.jump_if(R7, If::AnyBit, CHANGED_PORTS, "new ports");
    a.jump("send");
    a.label("new ports");
    l4_checksum(a, KEY_PORTS, 0);
    store(a, ETHERNET + IPV4, KEY_PORTS);
}

/// Marks the packet and notes its key.
fn note(a: &mut Assembler, maps: Maps) {
    only_element(a, maps.notes);
    a.load(Size::Word, R1, R0, NOTE_MARK);
    a.alu(Alu::Add, R1, 1);
    a.alu(Alu::And, R1, !MARK_BITS as i32);
    a.alu(Alu::Or, R1, MARK as i32);
    a.store(Size::Word, R0, NOTE_MARK, R1);
    a.store(Size::Word, R6, SKB_MARK, R1);
    a.load(Size::Double, R1, FRAME, AT_EPOCH);
    a.store(Size::Word, R0, NOTE_EPOCH, R1);
    for at in 0..5 {
        a.load(Size::Double, R1, FRAME, AT_KEY + at * 8);
        a.store(Size::Double, R0, NOTE_KEY + at * 8, R1);
    }
}

/// What runs where frames leave for workloads.
pub fn leaving(maps: Maps) -> Option<Vec<Instruction>> {
    let mut assembler = Assembler::default();
    let a = &mut assembler;
    a.load(Size::Word, R2, R1, SKB_MARK);
    a.alu(Alu::Shr, R2, MARK_BITS.trailing_zeros() as i32);
    a.jump_if(R2, If::Differs, (MARK >> MARK_BITS.trailing_zeros()) as i32, "pass");
    parse(a);
    a.load(Size::Double, R1, FRAME, AT_TURNS);
    a.jump_if(R1, If::Differs, 0, "pass");
    a.load(Size::Word, R1, R6, SKB_LINK);
    link(a, maps);
    a.load(Size::Byte, R1, R0, LINK_DETOUR);
    a.jump_if(R1, If::Differs, 0, "pass");
    only_element(a, maps.notes);
    a.set(R9, R0);
    a.load(Size::Word, R1, R9, NOTE_MARK);
    a.load(Size::Word, R2, R6, SKB_MARK);
    a.jump_if_register(R1, If::Differs, R2, "pass");
    a.value(R1, 0);
    a.store(Size::Word, R6, SKB_MARK, R1);
    a.map(R1, maps.flows);
    a.address(R2, R9, NOTE_KEY);
    a.call(Helper::MapLookup);
    a.jump_if(R0, If::Equal, 0, "open");
    a.load(Size::Word, R1, R0, FLOW_CLOSED);
    a.jump_if(R1, If::Differs, 0, "pass");
    a.label("open");
    flow(a);
    a.map(R1, maps.flows);
    a.address(R2, R9, NOTE_KEY);
    a.address(R3, FRAME, AT_FLOW);
    a.value(R4, 0);
    a.call(Helper::MapUpdate);
    pass(a);
    assembler.finish()
}

/// Makes the flow in the frame from the note, which R9 is, and the packet.
fn flow(a: &mut Assembler) {
    a.load(Size::Word, R1, FRAME, AT_KEY + KEY_PROTOCOL);
    a.load(Size::Word, R2, R9, NOTE_KEY + KEY_PROTOCOL);
    a.jump_if_register(R1, If::Differs, R2, "pass");
    // R8: what the firewall translated.
    a.value(R8, 0);
    for (at, bit, same) in
        [(0, CHANGED_SOURCE, "same source"), (KEY_DESTINATION, CHANGED_DESTINATION, "same destination")]
    {
        a.load(Size::Double, R1, FRAME, AT_KEY + at);
        a.load(Size::Double, R2, R9, NOTE_KEY + at);
        a.jump_if_register(R1, If::Equal, R2, same);
        a.alu(Alu::Or, R8, bit);
        a.label(same);
        a.load(Size::Double, R1, FRAME, AT_KEY + at + 8);
        a.load(Size::Double, R2, R9, NOTE_KEY + at + 8);
        // An IPv6 address whose second half was translated: not done here.
        a.jump_if_register(R1, If::Differs, R2, "pass");
    }
    a.load(Size::Word, R1, FRAME, AT_KEY + KEY_PORTS);
    a.load(Size::Word, R2, R9, NOTE_KEY + KEY_PORTS);
    a.jump_if_register(R1, If::Equal, R2, "same ports");
    a.alu(Alu::Or, R8, CHANGED_PORTS);
    a.label("same ports");
    // Both ends translated: a workload that reached itself.
    a.set(R1, R8);
    a.alu(Alu::And, R1, CHANGED_SOURCE | CHANGED_DESTINATION);
    a.jump_if(R1, If::Equal, CHANGED_SOURCE | CHANGED_DESTINATION, "pass");
    a.load(Size::Byte, R1, FRAME, AT_KEY + KEY_VERSION);
    a.jump_if(R1, If::Equal, 4, "translatable");
    a.jump_if(R8, If::Differs, 0, "pass");
    a.label("translatable");
    a.store(Size::Word, FRAME, AT_FLOW + FLOW_CHANGES, R8);
    a.load(Size::Word, R1, R9, NOTE_EPOCH);
    a.store(Size::Word, FRAME, AT_FLOW + FLOW_EPOCH, R1);
    a.load(Size::Word, R1, R6, SKB_LINK);
    a.store(Size::Word, FRAME, AT_FLOW + FLOW_LINK, R1);
    for at in 0..4 {
        a.load(Size::Double, R1, FRAME, AT_KEY + at * 8);
        a.store(Size::Double, FRAME, AT_FLOW + FLOW_NEW + at * 8, R1);
    }
    a.load(Size::Word, R1, FRAME, AT_KEY + KEY_PORTS);
    a.store(Size::Word, FRAME, AT_FLOW + FLOW_NEW + KEY_PORTS, R1);
    a.load(Size::Double, R1, R7, 0);
    a.store(Size::Double, FRAME, AT_FLOW + FLOW_MACS, R1);
    a.load(Size::Word, R1, R7, 8);
    a.store(Size::Word, FRAME, AT_FLOW + FLOW_MACS + 8, R1);
    a.store_value(Size::Word, FRAME, AT_FLOW + FLOW_CLOSED, 0);
    a.call(Helper::CoarseNow);
    a.alu(Alu::Add, R0, REFRESH_NS);
    a.store(Size::Double, FRAME, AT_FLOW + FLOW_UNTIL, R0);
}
