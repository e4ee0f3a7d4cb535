//! The DNS wire format (RFC 1035, 6891, 2782), as much as a server of one question needs. Questions are foreign bytes:
//! every length is checked, compression pointers in questions are refused (no client writes them).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const TYPE_A: u16 = 1;
pub const TYPE_NS: u16 = 2;
pub const TYPE_CNAME: u16 = 5;
pub const TYPE_SOA: u16 = 6;
pub const TYPE_PTR: u16 = 12;
pub const TYPE_TXT: u16 = 16;
pub const TYPE_AAAA: u16 = 28;
pub const TYPE_SRV: u16 = 33;
pub(super) const TYPE_OPT: u16 = 41;
pub const TYPE_ANY: u16 = 255;
pub(super) const CLASS_IN: u16 = 1;
const CLASS_ANY: u16 = 255;

pub(super) const HEADER: usize = 12;
pub(super) const MAX_NAME: usize = 255;
/// Of the OPT record that we write.
const OPT_LENGTH: usize = 11;
/// Largest answer over UDP that we send whatever the client offers: no fragments on a 1500-byte link.
const MAX_UDP: usize = 1232;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    NoError = 0,
    FormatError = 1,
    ServerFailure = 2,
    NameError = 3,
    NotImplemented = 4,
    Refused = 5,
}

/// A question that could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    pub recursion_desired: bool,
    /// Lower case, dots between labels, none at the end; `None` if a label has bytes that no name of ours has.
    pub name: Option<String>,
    pub kind: u16,
    /// The question section as it came, letters' case included: echoed in the answer.
    pub question: Vec<u8>,
    /// The client's UDP payload size if it speaks EDNS.
    pub edns: Option<u16>,
    /// Of EDNS; we know 0.
    pub version: u8,
}

/// Why a packet gets no proper answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Too short for a header, or itself an answer: no reply at all.
    Silent,
    /// Reply with this code.
    Reply { id: u16, code: Code },
}

/// Data of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(String),
    Ptr(String),
    Ns(String),
    Srv { priority: u16, weight: u16, port: u16, target: String },
    Txt(String),
    Soa { primary: String, mailbox: String, serial: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Owner; `None` is the question's own name.
    pub name: Option<String>,
    pub ttl: u32,
    pub data: Data,
}

/// An answer to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub code: Code,
    pub authoritative: bool,
    pub answers: Vec<Record>,
    pub authority: Vec<Record>,
    pub additional: Vec<Record>,
}

impl Reply {
    pub fn of(code: Code) -> Reply {
        Reply { code, authoritative: false, answers: Vec::new(), authority: Vec::new(), additional: Vec::new() }
    }
}

/// Reads a question.
pub fn parse(packet: &[u8]) -> Result<Query, Malformed> {
    let (Some(id), Some(flags)) = (u16_at(packet, 0), u16_at(packet, 2)) else { return Err(Malformed::Silent) };
    if packet.len() < HEADER || flags & 0x8000 != 0 {
        return Err(Malformed::Silent);
    }
    let reply = |code| Malformed::Reply { id, code };
    if flags & 0x7800 != 0 {
        return Err(reply(Code::NotImplemented));
    }
    let counts = [4, 6, 8, 10].map(|at| u16_at(packet, at).unwrap_or(0));
    if counts[0] != 1 {
        return Err(reply(Code::FormatError));
    }
    let format = || reply(Code::FormatError);
    let (name, after) = read_name(packet, HEADER).ok_or_else(format)?;
    let kind = u16_at(packet, after).ok_or_else(format)?;
    let class = u16_at(packet, after + 2).ok_or_else(format)?;
    let end = after + 4;
    let edns = read_edns(packet, end, counts.iter().skip(1).map(|n| u32::from(*n)).sum()).ok_or_else(format)?;
    if class != CLASS_IN && class != CLASS_ANY {
        return Err(reply(Code::Refused));
    }
    let question = packet.get(HEADER..end).unwrap_or_default().to_vec();
    let (edns, version) = edns.map_or((None, 0), |(size, version)| (Some(size), version));
    Ok(Query { id, recursion_desired: flags & 0x0100 != 0, name, kind, question, edns, version })
}

/// A name without compression: its text and the offset after it.
fn read_name(packet: &[u8], mut at: usize) -> Option<(Option<String>, usize)> {
    let start = at;
    let mut text = String::with_capacity(64);
    let mut plain = true;
    loop {
        let length = usize::from(*packet.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        if length > 63 || at + length - start > MAX_NAME - 1 {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        for byte in packet.get(at..at + length)? {
            plain &= byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            text.push(char::from(byte.to_ascii_lowercase()));
        }
        at += length;
    }
    Some((plain.then_some(text), at))
}

/// Walks the records after the question; answers the EDNS payload size and version. `None` is malformed.
fn read_edns(packet: &[u8], mut at: usize, records: u32) -> Option<Option<(u16, u8)>> {
    let mut edns = None;
    for _ in 0..records.min(64) {
        at = skip_name(packet, at)?;
        let (kind, class) = (u16_at(packet, at)?, u16_at(packet, at + 2)?);
        let (version, length) = (*packet.get(at + 5)?, usize::from(u16_at(packet, at + 8)?));
        at += 10 + length;
        if at > packet.len() {
            return None;
        }
        // RFC 6891, 6.1.1: there is one at most.
        if kind == TYPE_OPT && edns.replace((class, version)).is_some() {
            return None;
        }
    }
    Some(edns)
}

/// The addresses (A and AAAA) in an answer's records; `None` is malformed.
pub fn addresses(packet: &[u8]) -> Option<Vec<IpAddr>> {
    let counts = [4, 6, 8, 10].map(|at| u16_at(packet, at));
    let mut at = HEADER;
    for _ in 0..counts[0]? {
        at = skip_name(packet, at)? + 4;
    }
    let mut found = Vec::new();
    for _ in 0..u32::from(counts[1]?) + u32::from(counts[2]?) + u32::from(counts[3]?) {
        at = skip_name(packet, at)?;
        let kind = u16_at(packet, at)?;
        let length = usize::from(u16_at(packet, at + 8)?);
        let data = packet.get(at + 10..at + 10 + length)?;
        match kind {
            TYPE_A => found.push(IpAddr::from(<[u8; 4]>::try_from(data).ok()?)),
            TYPE_AAAA => found.push(IpAddr::from(<[u8; 16]>::try_from(data).ok()?)),
            _ => {}
        }
        at += 10 + length;
    }
    Some(found)
}

/// An answer of others as this client can take it: over UDP what is too large becomes "truncated".
pub fn fit<'a>(query: &Query, answer: &'a [u8], udp: bool) -> std::borrow::Cow<'a, [u8]> {
    if answer.len() <= limit(query, udp) {
        return answer.into();
    }
    write_truncated(query, Code::NoError).into()
}

fn limit(query: &Query, udp: bool) -> usize {
    match (udp, query.edns) {
        (false, _) => usize::from(u16::MAX),
        (true, None) => 512,
        (true, Some(size)) => usize::from(size).clamp(512, MAX_UDP),
    }
}

pub(super) fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0..=0xff => return Some(at + 2),
            _ => return None,
        }
    }
}

/// Writes a reply. Over UDP what is too large is cut to an empty answer marked "truncated", and the client asks again
/// over TCP. What does not fit there either is left out: with the order turning, others each time.
pub fn write(query: &Query, reply: &Reply, udp: bool) -> Vec<u8> {
    let limit = limit(query, udp);
    let (whole, complete) = write_up_to(limit, query, reply);
    if complete || !udp {
        return whole;
    }
    if !reply.additional.is_empty() {
        let fewer = Reply { additional: Vec::new(), ..reply.clone() };
        if let (without, true) = write_up_to(limit, query, &fewer) {
            return without;
        }
    }
    write_truncated(query, reply.code)
}

fn write_truncated(query: &Query, code: Code) -> Vec<u8> {
    let (mut out, _) = write_up_to(usize::from(u16::MAX), query, &Reply::of(code));
    if let Some(flags) = out.get_mut(2) {
        *flags |= 0x02;
    }
    out
}

/// As much as fits into `limit` bytes, and whether that is all.
fn write_up_to(limit: usize, query: &Query, reply: &Reply) -> (Vec<u8>, bool) {
    let mut out = Vec::with_capacity(256);
    let mut flags = 0x8000u16 | 0x0080 | reply.code as u16;
    for (set, bit) in [(reply.authoritative, 0x0400), (query.recursion_desired, 0x0100)] {
        flags |= if set { bit } else { 0 };
    }
    for word in [query.id, flags, 1, 0, 0, 0] {
        out.extend(word.to_be_bytes());
    }
    out.extend(&query.question);
    let most = limit.saturating_sub(if query.edns.is_some() { OPT_LENGTH } else { 0 });
    let mut complete = true;
    for (place, records) in [(6, &reply.answers), (8, &reply.authority), (10, &reply.additional)] {
        let mut count = 0u16;
        for record in records {
            let before = out.len();
            write_record(&mut out, record);
            if out.len() > most {
                out.truncate(before);
                complete = false;
                break;
            }
            count += 1;
        }
        count += u16::from(place == 10 && query.edns.is_some());
        if let Some(field) = out.get_mut(place..place + 2) {
            field.copy_from_slice(&count.to_be_bytes());
        }
    }
    if query.edns.is_some() {
        out.push(0);
        out.extend(TYPE_OPT.to_be_bytes());
        out.extend((MAX_UDP as u16).to_be_bytes());
        out.extend([0; 6]);
    }
    (out, complete)
}

/// "Bad version" (RFC 6891, 6.1.3), which says that we know version 0.
pub fn write_bad_version(query: &Query) -> Vec<u8> {
    let (mut out, _) = write_up_to(usize::from(u16::MAX), query, &Reply::of(Code::NoError));
    // The extended code's upper bits are the first byte of the OPT record's TTL, six bytes from the end.
    let at = out.len().saturating_sub(6);
    if let Some(upper) = out.get_mut(at) {
        *upper = 1;
    }
    out
}

/// A reply to what could not be read.
pub fn write_error(id: u16, code: Code) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER);
    for word in [id, 0x8080 | code as u16, 0, 0, 0, 0] {
        out.extend(word.to_be_bytes());
    }
    out
}

fn write_record(out: &mut Vec<u8>, record: &Record) {
    match &record.name {
        None => out.extend([0xc0, HEADER as u8]),
        Some(name) => write_name(out, name),
    }
    let kind = match &record.data {
        Data::A(_) => TYPE_A,
        Data::Aaaa(_) => TYPE_AAAA,
        Data::Cname(_) => TYPE_CNAME,
        Data::Ptr(_) => TYPE_PTR,
        Data::Ns(_) => TYPE_NS,
        Data::Srv { .. } => TYPE_SRV,
        Data::Txt(_) => TYPE_TXT,
        Data::Soa { .. } => TYPE_SOA,
    };
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.extend(record.ttl.to_be_bytes());
    let start = out.len();
    out.extend([0, 0]);
    match &record.data {
        Data::A(address) => out.extend(address.octets()),
        Data::Aaaa(address) => out.extend(address.octets()),
        Data::Cname(name) | Data::Ptr(name) | Data::Ns(name) => write_name(out, name),
        Data::Srv { priority, weight, port, target } => {
            for word in [priority, weight, port] {
                out.extend(word.to_be_bytes());
            }
            write_name(out, target);
        }
        Data::Txt(text) => {
            let text = text.as_bytes();
            let text = text.get(..text.len().min(255)).unwrap_or_default();
            out.push(text.len() as u8);
            out.extend(text);
        }
        Data::Soa { primary, mailbox, serial } => {
            write_name(out, primary);
            write_name(out, mailbox);
            for word in [*serial, 7200, 1800, 86400, crate::dns::zone::TTL] {
                out.extend(word.to_be_bytes());
            }
        }
    }
    let length = (out.len() - start - 2) as u16;
    if let Some(place) = out.get_mut(start..start + 2) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// Names come from validated API objects; a label that is none is left out rather than written wrongly.
fn write_name(out: &mut Vec<u8>, name: &str) {
    let mut total = 0;
    for label in name.split('.').filter(|label| (1..=63).contains(&label.len())) {
        total += label.len() + 1;
        if total >= MAX_NAME {
            break;
        }
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.push(0);
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A question as a client writes it; for forwarding tests and probes.
pub fn question(id: u16, name: &str, kind: u16, edns: Option<u16>) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [id, 0x0100, 1, 0, 0, u16::from(edns.is_some())] {
        out.extend(word.to_be_bytes());
    }
    write_name(&mut out, name);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    if let Some(size) = edns {
        out.push(0);
        out.extend(TYPE_OPT.to_be_bytes());
        out.extend(size.to_be_bytes());
        out.extend([0; 6]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_question_reads_back_in_lower_case() {
        let query = parse(&question(7, "Web.Default.SVC.cluster.local", TYPE_A, Some(4096))).unwrap();
        assert_eq!(query.name.as_deref(), Some("web.default.svc.cluster.local"));
        assert_eq!((query.id, query.kind, query.edns, query.recursion_desired), (7, TYPE_A, Some(4096), true));
        assert!(query.question.starts_with(b"\x03Web"));
    }

    #[test]
    fn a_large_answer_is_truncated_over_udp_only() {
        let query = parse(&question(7, "a.b", TYPE_A, None)).unwrap();
        let mut reply = Reply::of(Code::NoError);
        reply.answers = (0..100).map(|n| Record { name: None, ttl: 5, data: Data::A(n.into()) }).collect();
        let udp = write(&query, &reply, true);
        assert!(udp.len() <= 512 && udp[2] & 2 != 0 && udp[7] == 0);
        let tcp = write(&query, &reply, false);
        assert!(tcp[2] & 2 == 0 && tcp[7] == 100);
    }

    #[test]
    fn what_no_message_holds_is_left_out() {
        let query = parse(&question(7, "a.b", TYPE_A, Some(1232))).unwrap();
        let mut reply = Reply::of(Code::NoError);
        let record = |n: u32| Record { name: None, ttl: 5, data: Data::A(n.into()) };
        reply.answers = (0..10_000).map(record).collect();
        reply.additional = vec![record(1)];
        let tcp = write(&query, &reply, false);
        let answers = u16::from_be_bytes([tcp[6], tcp[7]]);
        assert!(tcp.len() <= 65_535 && answers > 4000 && tcp[2] & 2 == 0, "{} {answers}", tcp.len());
        let read = crate::dns::answers::resolved(&tcp, "a.b").unwrap();
        assert_eq!((read.len(), addresses(&tcp).unwrap().len()), (usize::from(answers), usize::from(answers)));
        assert!(write(&query, &reply, true).len() <= 512);
    }

    #[test]
    fn other_versions_of_edns_are_told_ours() {
        let mut packet = question(7, "a.b", TYPE_A, Some(1232));
        let at = packet.len() - 5;
        packet[at] = 1;
        let query = parse(&packet).unwrap();
        assert_eq!(query.version, 1);
        let reply = write_bad_version(&query);
        assert_eq!(reply[reply.len() - 6..], [1, 0, 0, 0, 0, 0]);
        assert_eq!((reply[3] & 15, reply[11]), (0, 1));
        // Two of them are none.
        let opt = packet[packet.len() - 11..].to_vec();
        packet.extend(opt);
        packet[11] = 2;
        assert_eq!(parse(&packet), Err(Malformed::Reply { id: 7, code: Code::FormatError }));
    }

    #[test]
    fn what_is_not_a_question_is_refused() {
        assert_eq!(parse(&[]), Err(Malformed::Silent));
        let mut answer = question(1, "a", TYPE_A, None);
        answer[2] |= 0x80;
        assert_eq!(parse(&answer), Err(Malformed::Silent));
        let mut two = question(1, "a", TYPE_A, None);
        two[5] = 2;
        assert_eq!(parse(&two), Err(Malformed::Reply { id: 1, code: Code::FormatError }));
        let mut pointer = question(1, "a", TYPE_A, None);
        pointer[12] = 0xc0;
        assert_eq!(parse(&pointer), Err(Malformed::Reply { id: 1, code: Code::FormatError }));
        let mut update = question(1, "a", TYPE_A, None);
        update[2] = 0x28;
        assert_eq!(parse(&update), Err(Malformed::Reply { id: 1, code: Code::NotImplemented }));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(query) = parse(&bytes) {
                let _ = write(&query, &Reply::of(Code::NameError), true);
            }
        }
        #[test]
        fn damaged_questions_never_panic(at in 0usize..60, byte: u8, cut in 0usize..60) {
            let mut packet = question(1, "a.web.default.svc.cluster.local", TYPE_SRV, Some(1232));
            if let Some(place) = packet.get_mut(at) {
                *place = byte;
            }
            packet.truncate(packet.len() - cut.min(packet.len()));
            let _ = parse(&packet);
            let _ = addresses(&packet);
        }
    }
}
