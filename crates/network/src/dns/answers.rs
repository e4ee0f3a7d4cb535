//! Reading what others answered. Foreign bytes: every length is checked, and names are followed backwards only.

use super::codec::{
    CLASS_IN, Code, HEADER, MAX_NAME, TYPE_A, TYPE_AAAA, TYPE_CNAME, TYPE_OPT, skip_name, u16_at, u32_at,
};
use std::collections::HashMap;
use std::net::IpAddr;

/// Longest chain of aliases that is followed.
const MAX_CHAIN: usize = 16;

/// The addresses that an answer gives for a name, through the aliases that it gives too, each with the shortest TTL on
/// the way there. What an answer says about other names does not count. `None` is malformed.
pub fn resolved(packet: &[u8], name: &str) -> Option<Vec<(IpAddr, u32)>> {
    let (flags, questions, answers) = (u16_at(packet, 2)?, u16_at(packet, 4)?, u16_at(packet, 6)?);
    if flags & 0x8000 == 0 || flags & 15 != Code::NoError as u16 {
        return Some(Vec::new());
    }
    let mut at = HEADER;
    for _ in 0..questions {
        at = skip_name(packet, at)? + 4;
    }
    let (mut aliases, mut found) = (HashMap::new(), Vec::new());
    for _ in 0..answers {
        let (owner, after) = expand_name(packet, at)?;
        let (kind, class) = (u16_at(packet, after)?, u16_at(packet, after + 2)?);
        let length = usize::from(u16_at(packet, after + 8)?);
        // RFC 2181, 8: with the highest bit set it is 0.
        let ttl = Some(u32_at(packet, after + 4)?).filter(|ttl| *ttl <= i32::MAX as u32).unwrap_or(0);
        let start = after + 10;
        at = start + length;
        let data = packet.get(start..at)?;
        match kind {
            _ if class != CLASS_IN => {}
            TYPE_A => found.push((owner, IpAddr::from(<[u8; 4]>::try_from(data).ok()?), ttl)),
            TYPE_AAAA => found.push((owner, IpAddr::from(<[u8; 16]>::try_from(data).ok()?), ttl)),
            TYPE_CNAME => {
                aliases.entry(owner).or_insert((expand_name(packet, start)?.0, ttl));
            }
            _ => {}
        }
    }
    let (mut current, mut shortest) = (name.to_owned(), u32::MAX);
    for _ in 0..MAX_CHAIN {
        let Some((target, ttl)) = aliases.get(&current) else { break };
        shortest = shortest.min(*ttl);
        current.clone_from(target);
    }
    let own = found.into_iter().filter(|(owner, ..)| *owner == current);
    Some(own.map(|(_, address, ttl)| (address, ttl.min(shortest))).collect())
}

/// A name, compressed or not, in lower case, and the offset after it. Pointers lead backwards only, so that none makes a
/// loop; what is not plain reads as a name that nobody asks for.
fn expand_name(packet: &[u8], mut at: usize) -> Option<(String, usize)> {
    let (mut text, mut after, mut lowest) = (String::with_capacity(64), None, at);
    loop {
        let length = usize::from(*packet.get(at)?);
        match length {
            0 => return Some((text, after.unwrap_or(at + 1))),
            1..=63 => {
                if !text.is_empty() {
                    text.push('.');
                }
                for byte in packet.get(at + 1..at + 1 + length)? {
                    let plain = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
                    text.push(if plain { char::from(byte.to_ascii_lowercase()) } else { '?' });
                }
                if text.len() >= MAX_NAME {
                    return None;
                }
                at += 1 + length;
            }
            0xc0.. => {
                let target = usize::from(u16_at(packet, at)? & 0x3fff);
                after.get_or_insert(at + 2);
                if target >= lowest || target < HEADER {
                    return None;
                }
                (at, lowest) = (target, target);
            }
            _ => return None,
        }
    }
}

/// Lowers TTLs to `most` seconds, so that nobody keeps an answer longer than we do. What cannot be read stays as it is.
pub fn limit_ttls(packet: &mut [u8], most: u32) {
    fn each(packet: &mut [u8], most: u32) -> Option<()> {
        let counts = [4, 6, 8, 10].map(|at| u16_at(packet, at));
        let mut at = HEADER;
        for _ in 0..counts[0]? {
            at = skip_name(packet, at)? + 4;
        }
        for _ in 0..u32::from(counts[1]?) + u32::from(counts[2]?) + u32::from(counts[3]?) {
            at = skip_name(packet, at)?;
            let (kind, ttl) = (u16_at(packet, at)?, u32_at(packet, at + 4)?);
            if kind != TYPE_OPT && ttl > most {
                packet.get_mut(at + 4..at + 8)?.copy_from_slice(&most.to_be_bytes());
            }
            at += 10 + usize::from(u16_at(packet, at + 8)?);
        }
        Some(())
    }
    let _ = each(packet, most);
}

/// Whether an answer was cut, and the whole is to be had over TCP.
pub fn is_truncated(packet: &[u8]) -> bool {
    u16_at(packet, 2).is_some_and(|flags| flags & 0x0200 != 0)
}

#[cfg(test)]
mod tests {
    use super::super::codec::question;
    use super::*;
    use proptest::prelude::*;

    /// An answer to `www.example.org` with these records, written by hand: owner, type, TTL, data.
    fn answer(records: &[(&[u8], u16, u32, &[u8])]) -> Vec<u8> {
        let mut packet = question(1, "www.example.org", TYPE_A, None);
        packet[2] |= 0x80;
        packet[7] = records.len() as u8;
        for (owner, kind, ttl, data) in records {
            packet.extend_from_slice(owner);
            for bytes in [&kind.to_be_bytes()[..], &CLASS_IN.to_be_bytes(), &ttl.to_be_bytes()] {
                packet.extend_from_slice(bytes);
            }
            packet.extend((data.len() as u16).to_be_bytes());
            packet.extend_from_slice(data);
        }
        packet
    }

    #[test]
    fn addresses_are_found_through_aliases_and_nowhere_else() {
        let own = &[0xc0, 12][..];
        let (a, b) = ([192, 0, 2, 1], [192, 0, 2, 2]);
        let found = |packet: &[u8]| resolved(packet, "www.example.org");
        assert_eq!(found(&answer(&[(own, TYPE_A, 9, &a)])), Some(vec![(a.into(), 9)]));
        // `cdn` before the question's `example.org`, which begins at byte 16.
        let cdn = [3, b'c', b'd', b'n', 0xc0, 16];
        let records: [(&[u8], u16, u32, &[u8]); 3] =
            [(&cdn, TYPE_A, 90, &b), (own, TYPE_CNAME, 7, &cdn), (own, TYPE_A, 5, &a)];
        assert_eq!(found(&answer(&records)), Some(vec![(b.into(), 7)]), "what has an alias has no address");
        assert_eq!(found(&answer(&[(&cdn, TYPE_A, 90, &b)])), Some(vec![]));
        assert_eq!(found(&answer(&[(own, TYPE_CNAME, 1, own), (own, TYPE_A, 5, &a)])), Some(vec![(a.into(), 1)]));
        assert_eq!(found(&answer(&[(own, TYPE_A, u32::MAX, &a)])), Some(vec![(a.into(), 0)]), "RFC 2181");
        let mut refused = answer(&[(own, TYPE_A, 9, &a)]);
        refused[3] |= 5;
        assert_eq!(found(&refused), Some(vec![]));
        for loops in [&[0xc0, 33][..], &[0xc0, 35], &[1, b'a', 0xc0, 33], &[0xc0, 200], &[0xc0, 2], &[0x80, 1], &[0xc0]]
        {
            assert_eq!(found(&answer(&[(loops, TYPE_A, 9, &a)])), None, "{loops:?}");
        }
        for length in [0, 3, 5] {
            assert_eq!(found(&answer(&[(own, TYPE_A, 9, &[1; 5][..length])])), None, "{length}");
        }
        let long = answer(&[(own, TYPE_A, 100_000, &a), (own, TYPE_AAAA, 10, &[1; 16])]);
        let mut limited = long.clone();
        limit_ttls(&mut limited, 60);
        let ttls: Vec<u32> = found(&limited).unwrap().into_iter().map(|(_, ttl)| ttl).collect();
        assert_eq!(ttls, [60, 10]);
    }

    proptest! {
        #[test]
        fn hostile_answers_never_panic(at in 0usize..120, bytes in proptest::collection::vec(any::<u8>(), 1..30), cut in 0usize..120) {
            let own = &[0xc0, 12][..];
            let mut packet = answer(&[(own, TYPE_CNAME, 7, &[3, b'c', b'd', b'n', 0xc0, 16]), (own, TYPE_A, 5, &[1; 4])]);
            for (place, byte) in packet.iter_mut().skip(at).zip(&bytes) {
                *place = *byte;
            }
            packet.truncate(packet.len() - cut.min(packet.len()));
            let _ = resolved(&packet, "www.example.org");
            let length = packet.len();
            limit_ttls(&mut packet, 5);
            prop_assert_eq!(packet.len(), length);
        }
        #[test]
        fn any_bytes_are_an_answer_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = resolved(&bytes, "www.example.org");
            limit_ttls(&mut bytes.clone(), 5);
        }
    }
}
