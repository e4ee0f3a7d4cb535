//! DHCP (RFC 2131, 2132, 3442): a machine asks, and is told the one address that its link has. A question names the
//! asker's MAC, of which the address is a part; an answer always goes to the machine that has it.

use crate::attach::mac_of;
use crate::config::{Cidr, GATEWAY, MTU};
use std::net::Ipv4Addr;

const MAGIC: [u8; 4] = [99, 130, 83, 99];
const OPTIONS: usize = 240;
/// BOOTP's smallest message, which some clients insist on.
const SMALLEST: usize = 300;
/// The address is the machine's for life.
const FOREVER: u32 = u32::MAX;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What an answer is made from.
pub struct Facts {
    /// Workloads' networks.
    pub pods: [Cidr; 2],
    pub dns: Ipv4Addr,
}

/// The answer to a packet, and the machine that it goes to. `None` for what deserves none.
pub fn answer(packet: &[u8], facts: &Facts) -> Option<(Vec<u8>, Ipv4Addr)> {
    // A request, on Ethernet, that came by no relay.
    if packet.get(..3) != Some(&[1, 1, 6])
        || packet.get(24..28) != Some(&[0; 4])
        || packet.get(236..240) != Some(&MAGIC)
    {
        return None;
    }
    let mac: [u8; 6] = packet.get(28..34)?.try_into().ok()?;
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(mac.get(2..)?).ok()?);
    if mac_of(address) != mac || !facts.pods.iter().any(|pods| pods.contains(address)) {
        return None;
    }
    let kind = *option(packet, 53)?.first()?;
    let wanted = |bytes: Option<&[u8]>| bytes.and_then(|b| <[u8; 4]>::try_from(b).ok()).map(Ipv4Addr::from);
    let server = wanted(option(packet, 54));
    if server.is_some_and(|server| server != GATEWAY) {
        return None;
    }
    let held = wanted(packet.get(12..16)).filter(|held| !held.is_unspecified());
    let reply = match kind {
        DISCOVER => OFFER,
        REQUEST if wanted(option(packet, 50)).or(held).is_some_and(|asked| asked != address) => NAK,
        REQUEST | INFORM => ACK,
        _ => return None,
    };
    Some((write(packet, reply, address, kind == INFORM, facts)?, address))
}

/// The first option of this code. Options that run over the end are none.
fn option(packet: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = packet.get(OPTIONS..)?;
    loop {
        match *rest.first()? {
            0 => rest = rest.get(1..)?,
            255 => return None,
            code => {
                let end = 2 + usize::from(*rest.get(1)?);
                let value = rest.get(2..end)?;
                if code == wanted {
                    return Some(value);
                }
                rest = rest.get(end..)?;
            }
        }
    }
}

fn write(asked: &[u8], kind: u8, address: Ipv4Addr, informed: bool, facts: &Facts) -> Option<Vec<u8>> {
    let mut out = vec![0; OPTIONS];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = out.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &[2, 1, 6, 0]);
    // Transaction, flags and hardware address as they came; the address that the client has already.
    put(4, asked.get(4..8)?);
    put(10, asked.get(10..12)?);
    put(28, asked.get(28..44)?);
    put(236, &MAGIC);
    if kind != NAK {
        put(12, asked.get(12..16)?);
        if !informed {
            put(16, &address.octets());
        }
    }
    let mut add = |code: u8, value: &[u8]| {
        out.extend([code, value.len() as u8]);
        out.extend(value);
    };
    add(53, &[kind]);
    add(54, &GATEWAY.octets());
    if kind != NAK {
        if !informed {
            add(51, &FOREVER.to_be_bytes());
        }
        add(1, &[255; 4]);
        // The next hop is on the link, all else behind it.
        let hop = GATEWAY.octets();
        add(121, &[&[32][..], &hop, &[0; 4], &[0], &hop].concat());
        add(3, &hop);
        add(6, &facts.dns.octets());
        add(26, &(MTU as u16).to_be_bytes());
    }
    out.push(255);
    out.resize(out.len().max(SMALLEST), 0);
    Some(out)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn facts() -> Facts {
        Facts {
            pods: ["10.42.0.0/16", "10.44.0.0/16"].map(|pods| pods.parse().unwrap()),
            dns: Ipv4Addr::new(10, 43, 0, 10),
        }
    }

    pub fn question(kind: u8, mac: [u8; 6], options: &[&[u8]]) -> Vec<u8> {
        let mut packet = vec![0; OPTIONS];
        packet[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
        packet[28..34].copy_from_slice(&mac);
        packet[236..240].copy_from_slice(&MAGIC);
        packet.extend([53, 1, kind]);
        options.iter().for_each(|option| packet.extend(*option));
        packet.push(255);
        packet
    }

    const MAC: [u8; 6] = [0x0a, 0x58, 10, 42, 0, 7];
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 7);

    fn told(packet: &[u8]) -> Option<(u8, Vec<u8>)> {
        let (reply, to) = answer(packet, &facts())?;
        assert_eq!(to, OWN);
        Some((option(&reply, 53).unwrap()[0], reply))
    }

    #[test]
    fn a_machine_gets_its_address() {
        let (kind, offer) = told(&question(DISCOVER, MAC, &[])).unwrap();
        assert_eq!((kind, &offer[16..20], &offer[4..8]), (OFFER, &OWN.octets()[..], &[1, 2, 3, 4][..]));
        assert_eq!(option(&offer, 3), Some(&[169, 254, 1, 1][..]));
        assert_eq!(option(&offer, 121), Some(&[32, 169, 254, 1, 1, 0, 0, 0, 0, 0, 169, 254, 1, 1][..]));
        assert_eq!(option(&offer, 6), Some(&[10, 43, 0, 10][..]));
        assert!(offer.len() >= SMALLEST);
        let server = [54, 4, 169, 254, 1, 1];
        assert_eq!(told(&question(REQUEST, MAC, &[&[50, 4, 10, 42, 0, 7], &server])).unwrap().0, ACK);
        let (kind, nak) = told(&question(REQUEST, MAC, &[&[50, 4, 10, 42, 0, 8], &server])).unwrap();
        assert_eq!((kind, &nak[16..20]), (NAK, &[0; 4][..]));
        let mut renew = question(REQUEST, MAC, &[]);
        renew[12..16].copy_from_slice(&OWN.octets());
        assert_eq!(told(&renew).unwrap().0, ACK);
        let (kind, inform) = told(&question(INFORM, MAC, &[])).unwrap();
        assert_eq!((kind, option(&inform, 51)), (ACK, None));
    }

    #[test]
    fn others_get_nothing() {
        assert!(told(&question(REQUEST, MAC, &[&[54, 4, 192, 0, 2, 1]])).is_none(), "it chose another server");
        assert!(told(&question(DISCOVER, [0x0a, 0x58, 10, 99, 0, 7], &[])).is_none(), "not our network");
        assert!(told(&question(DISCOVER, [2, 0, 10, 42, 0, 7], &[])).is_none(), "not our MAC");
        for kind in [0, 2, 4, 5, 7, 9, 255] {
            assert!(told(&question(kind, MAC, &[])).is_none(), "{kind}");
        }
        let whole = question(DISCOVER, MAC, &[]);
        for cut in 0..243 {
            assert!(told(&whole[..cut]).is_none(), "{cut}");
        }
        let mut relayed = whole;
        relayed[24] = 10;
        assert!(told(&relayed).is_none());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(options in proptest::collection::vec(any::<u8>(), 0..80), cut in 0usize..400) {
            let mut packet = question(DISCOVER, MAC, &[&options]);
            let _ = answer(&packet, &facts());
            packet.truncate(cut);
            let _ = answer(&packet, &facts());
            let _ = answer(&options, &facts());
        }
    }
}
