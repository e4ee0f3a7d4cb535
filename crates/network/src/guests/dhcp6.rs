//! DHCPv6 (RFC 8415) as much as a machine needs that is told its one address: no leases, no relays, no prefixes.

use crate::config::MTU;
use std::net::Ipv6Addr;

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION_REQUEST: u8 = 11;

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const DNS_SERVERS: u16 = 23;
const NO_ADDRESS: u16 = 2;
const NOT_ON_LINK: u16 = 4;
const FOREVER: [u8; 4] = [0xff; 4];
/// RFC 8415, 11.1: a DUID is at most 130 bytes.
const LONGEST_DUID: usize = 130;
/// More associations than any machine with one link has.
const MOST_ASSOCIATIONS: usize = 4;

/// The answer to a packet from the machine whose address this is. `None` for what deserves none.
pub fn answer(packet: &[u8], address: Ipv6Addr, dns: Ipv6Addr, server_mac: [u8; 6]) -> Option<Vec<u8>> {
    let (kind, transaction) = (*packet.first()?, packet.get(1..4)?);
    let options = parse(packet.get(4..)?)?;
    let find = |wanted: u16| options.iter().find(|(code, _)| *code == wanted).map(|(_, value)| *value);
    // A DUID made from the link-layer address.
    let server = [&[0, 3, 0, 1][..], &server_mac].concat();
    let client = find(CLIENT_ID);
    if client.is_some_and(|id| id.len() > LONGEST_DUID) || find(SERVER_ID).is_some_and(|id| id != server) {
        return None;
    }
    let (needs_client, needs_server) = match kind {
        SOLICIT | CONFIRM | REBIND => (true, false),
        REQUEST | RENEW | RELEASE | DECLINE => (true, true),
        INFORMATION_REQUEST => (false, false),
        _ => return None,
    };
    if needs_client && client.is_none() || needs_server && find(SERVER_ID).is_none() {
        return None;
    }
    let rapid = kind == SOLICIT && find(RAPID_COMMIT).is_some();
    let mut out = vec![if kind == SOLICIT && !rapid { ADVERTISE } else { REPLY }];
    out.extend(transaction);
    if let Some(client) = client {
        put(&mut out, CLIENT_ID, client);
    }
    put(&mut out, SERVER_ID, &server);
    if rapid {
        put(&mut out, RAPID_COMMIT, &[]);
    }
    let associations = || options.iter().filter(|(code, _)| *code == IA_NA).take(MOST_ASSOCIATIONS);
    match kind {
        CONFIRM => {
            let known = associations().all(|(_, value)| addresses(value).all(|asked| asked == address.octets()));
            let code = if known { 0 } else { NOT_ON_LINK };
            put(&mut out, STATUS, &code.to_be_bytes());
        }
        RELEASE | DECLINE => put(&mut out, STATUS, &[0, 0]),
        _ => {
            for (at, (_, value)) in associations().enumerate() {
                put(&mut out, IA_NA, &association(value, (at == 0).then_some(address))?);
            }
        }
    }
    put(&mut out, DNS_SERVERS, &dns.octets());
    Some(out)
}

/// `None` where an option runs over the end.
fn parse(bytes: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let (mut all, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let head: [u8; 4] = rest.get(..4)?.try_into().ok()?;
        let [a, b, c, d] = head;
        let end = 4 + usize::from(u16::from_be_bytes([c, d]));
        all.push((u16::from_be_bytes([a, b]), rest.get(4..end)?));
        rest = rest.get(end..)?;
    }
    Some(all)
}

/// The addresses that an association names.
fn addresses(association: &[u8]) -> impl Iterator<Item = &[u8]> {
    let options = association.get(12..).and_then(parse).unwrap_or_default();
    options.into_iter().filter(|(code, _)| *code == IA_ADDRESS).filter_map(|(_, value)| value.get(..16))
}

/// The answer's association with the same identifier: with the address, and without renewal.
fn association(asked: &[u8], address: Option<Ipv6Addr>) -> Option<Vec<u8>> {
    let mut out = [asked.get(..4)?, &FOREVER, &FOREVER].concat();
    match address {
        Some(address) => put(&mut out, IA_ADDRESS, &[&address.octets()[..], &FOREVER, &FOREVER].concat()),
        None => put(&mut out, STATUS, &NO_ADDRESS.to_be_bytes()),
    }
    Some(out)
}

fn put(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_be_bytes());
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
}

/// A router advertisement (RFC 4861, 4.2; RFC 8106): the next hop, "ask DHCPv6 for your address", MTU and DNS server. The
/// kernel fills in the checksum.
pub fn advertisement(dns: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    // Hop limit 64, managed and other configuration, the longest lifetime.
    let mut out = vec![134, 0, 0, 0, 64, 0xc0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    out.extend([1, 1]);
    out.extend(mac);
    out.extend([5, 1, 0, 0]);
    out.extend(MTU.to_be_bytes());
    out.extend([25, 3, 0, 0]);
    out.extend(FOREVER);
    out.extend(dns.octets());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [0x0a, 0x58, 169, 254, 1, 1];
    const CLIENT: [u8; 10] = [0, 3, 0, 1, 2, 2, 2, 2, 2, 2];

    fn own() -> Ipv6Addr {
        "fd00:10:42::7".parse().unwrap()
    }
    fn dns() -> Ipv6Addr {
        "fd00:10:43::a".parse().unwrap()
    }
    fn question(kind: u8, options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut packet = vec![kind, 1, 2, 3];
        put(&mut packet, CLIENT_ID, &CLIENT);
        options.iter().for_each(|(code, value)| put(&mut packet, *code, value));
        packet
    }
    type Options = Vec<(u16, Vec<u8>)>;

    fn told(packet: &[u8]) -> Option<(u8, Options)> {
        let reply = answer(packet, own(), dns(), MAC)?;
        assert_eq!(reply[1..4], [1, 2, 3]);
        let options = parse(&reply[4..]).unwrap().into_iter().map(|(code, value)| (code, value.to_vec())).collect();
        Some((reply[0], options))
    }
    fn value(options: &[(u16, Vec<u8>)], wanted: u16) -> Vec<u8> {
        options.iter().find(|(code, _)| *code == wanted).unwrap().1.clone()
    }

    #[test]
    fn a_machine_gets_its_address() {
        let ia = [&[0, 0, 0, 9][..], &[0; 8]].concat();
        let (kind, options) = told(&question(SOLICIT, &[(IA_NA, &ia)])).unwrap();
        assert_eq!(kind, ADVERTISE);
        assert_eq!(value(&options, CLIENT_ID), CLIENT);
        assert_eq!(value(&options, DNS_SERVERS), dns().octets());
        let given = value(&options, IA_NA);
        assert_eq!((&given[..4], addresses(&given).next().unwrap()), (&ia[..4], &own().octets()[..]));
        let server = value(&options, SERVER_ID);
        let (kind, options) = told(&question(REQUEST, &[(SERVER_ID, &server), (IA_NA, &ia), (IA_NA, &ia)])).unwrap();
        assert_eq!((kind, options.iter().filter(|(code, _)| *code == IA_NA).count()), (REPLY, 2));
        let second = options.iter().rfind(|(code, _)| *code == IA_NA).unwrap();
        assert_eq!(addresses(&second.1).count(), 0, "one address for one link");
        assert_eq!(told(&question(SOLICIT, &[(RAPID_COMMIT, &[]), (IA_NA, &ia)])).unwrap().0, REPLY);
        let mut other = ia.clone();
        put(&mut other, IA_ADDRESS, &[[9; 16].as_slice(), &[0; 8]].concat());
        assert_eq!(value(&told(&question(CONFIRM, &[(IA_NA, &other)])).unwrap().1, STATUS), NOT_ON_LINK.to_be_bytes());
        assert_eq!(value(&told(&question(CONFIRM, &[(IA_NA, &given)])).unwrap().1, STATUS), [0, 0]);
    }

    #[test]
    fn others_get_nothing() {
        assert!(told(&question(REQUEST, &[])).is_none(), "names no server");
        assert!(told(&question(REQUEST, &[(SERVER_ID, &[1, 2])])).is_none(), "names another server");
        assert!(told(&[SOLICIT, 1, 2, 3]).is_none(), "says not who asks");
        assert!(told(&question(SOLICIT, &[(IA_NA, &[1, 2])])).is_none(), "half an association");
        for kind in [0, 2, 7, 10, 12, 13, 200] {
            assert!(told(&question(kind, &[])).is_none(), "{kind}");
        }
        let mut long = vec![SOLICIT, 1, 2, 3];
        put(&mut long, CLIENT_ID, &[0; LONGEST_DUID + 1]);
        assert!(told(&long).is_none());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..13) {
            let _ = answer(&bytes, own(), dns(), MAC);
            let _ = answer(&question(kind, &[(IA_NA, &bytes)]), own(), dns(), MAC);
        }
    }
}
