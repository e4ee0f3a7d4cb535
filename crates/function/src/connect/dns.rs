//! Questions to the namespace's resolver: A and AAAA of one name, over UDP, over TCP where an answer was cut off.
//! RFC 1035, sections 4.1 and 4.2.2.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const PORT: u16 = 53;
const TRY: Duration = Duration::from_secs(2);
const HEADER: usize = 12;
const A: u16 = 1;
const AAAA: u16 = 28;
const INTERNET: u16 = 1;
/// Bytes of a datagram without EDNS.
const DATAGRAM: usize = 512;
const ADDRESSES: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    NoSuchName,
    /// The resolver's response code.
    Refused(u8),
    NoAnswer,
}

/// Addresses of an absolute name, IPv4 first.
pub(super) fn resolve(resolver: Ipv4Addr, name: &str, until: Instant) -> Result<Vec<IpAddr>, Failed> {
    let v4 = ask(resolver, name, A, until);
    let v6 = ask(resolver, name, AAAA, until);
    match (v4, v6) {
        (Ok(mut all), Ok(more)) => {
            all.extend(more);
            Ok(all)
        }
        (Ok(some), Err(_)) | (Err(_), Ok(some)) if !some.is_empty() => Ok(some),
        (Err(failed), _) | (_, Err(failed)) => Err(failed),
    }
}

fn ask(resolver: Ipv4Addr, name: &str, kind: u16, until: Instant) -> Result<Vec<IpAddr>, Failed> {
    while Instant::now() < until {
        let id = RandomState::new().hash_one(clock::now_nanos()) as u16;
        let question = question(id, name, kind).ok_or(Failed::NoSuchName)?;
        let limit = TRY.min(until.saturating_duration_since(Instant::now())).max(Duration::from_millis(1));
        // A lost datagram, or a resolver that is being restarted: asked again.
        let Ok(answer) = by_datagram(resolver, &question, limit) else { continue };
        match read(&answer, &question, kind) {
            Answer::Addresses(addresses) => return Ok(addresses),
            Answer::Failed(failed) => return Err(failed),
            Answer::CutOff => {
                let answer = by_stream(resolver, &question, limit).map_err(|_| Failed::NoAnswer)?;
                return match read(&answer, &question, kind) {
                    Answer::Addresses(addresses) => Ok(addresses),
                    Answer::Failed(failed) => Err(failed),
                    Answer::CutOff | Answer::Foreign => Err(Failed::NoAnswer),
                };
            }
            Answer::Foreign => {}
        }
    }
    Err(Failed::NoAnswer)
}

fn by_datagram(resolver: Ipv4Addr, question: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    // The standard library's would be bound first, which this role may not.
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let socket = UdpSocket::from(socket);
    socket.connect((resolver, PORT))?;
    socket.set_read_timeout(Some(limit))?;
    socket.send(question)?;
    let mut answer = vec![0u8; 4096];
    let length = receive(&socket, &mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(buffer) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn by_stream(resolver: Ipv4Addr, question: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((resolver, PORT)), limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let length = u16::try_from(question.len()).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    stream.write_all(&[length.to_be_bytes().as_slice(), question].concat())?;
    let mut length = [0u8; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0u8; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// `None` if the name is none.
fn question(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    // Recursion desired, one question.
    let mut message = [id.to_be_bytes(), [1, 0], [0, 1], [0; 2], [0; 2], [0; 2]].concat();
    for label in name.split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length))?;
        message.push(length);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend(INTERNET.to_be_bytes());
    (message.len() <= HEADER + 255 + 4 && message.len() <= DATAGRAM).then_some(message)
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Addresses(Vec<IpAddr>),
    Failed(Failed),
    CutOff,
    /// Not an answer to this question.
    Foreign,
}

fn read(answer: &[u8], question: &[u8], kind: u16) -> Answer {
    let half = |at: usize| Some(u16::from_be_bytes([*answer.get(at)?, *answer.get(at + 1)?]));
    let (Some(flags), Some(records)) = (half(2), half(6)) else { return Answer::Foreign };
    let same = answer.get(..2) == question.get(..2)
        && answer
            .get(HEADER..question.len())
            .zip(question.get(HEADER..))
            .is_some_and(|(a, b)| a.eq_ignore_ascii_case(b));
    if !same || flags & 0x8000 == 0 {
        return Answer::Foreign;
    }
    if flags & 0x0200 != 0 {
        return Answer::CutOff;
    }
    match (flags & 0xf) as u8 {
        0 => {}
        3 => return Answer::Failed(Failed::NoSuchName),
        code => return Answer::Failed(Failed::Refused(code)),
    }
    let mut addresses = Vec::new();
    let mut at = question.len();
    // Aliases come first; the resolver followed them, so every address is the name's.
    for _ in 0..records {
        let Some(next) = record(answer, at, kind, &mut addresses) else { break };
        at = next;
        if addresses.len() >= ADDRESSES {
            break;
        }
    }
    Answer::Addresses(addresses)
}

/// Reads one record; gives where the next begins.
fn record(message: &[u8], mut at: usize, kind: u16, addresses: &mut Vec<IpAddr>) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => {
                at += 1;
                break;
            }
            pointer if pointer & 0xc0 == 0xc0 => {
                at += 2;
                break;
            }
            length if length & 0xc0 == 0 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let fixed = message.get(at..at + 10)?;
    let half = |at: usize| Some(u16::from_be_bytes([*fixed.get(at)?, *fixed.get(at + 1)?]));
    let (its_kind, class, length) = (half(0)?, half(2)?, usize::from(half(8)?));
    let data = message.get(at + 10..at + 10 + length)?;
    if its_kind == kind && class == INTERNET {
        match kind {
            A => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            _ => addresses.push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
        }
    }
    Some(at + 10 + length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answered(flags: u16, records: &[(u16, &[u8])]) -> (Vec<u8>, Vec<u8>) {
        let question = question(7, "web.example", A).unwrap();
        let mut answer = question.clone();
        answer[2..4].copy_from_slice(&flags.to_be_bytes());
        answer[6..8].copy_from_slice(&(records.len() as u16).to_be_bytes());
        for (kind, data) in records {
            answer.extend([0xc0, 12]);
            answer.extend(kind.to_be_bytes());
            answer.extend([0, 1, 0, 0, 0, 9]);
            answer.extend((data.len() as u16).to_be_bytes());
            answer.extend_from_slice(data);
        }
        (question, answer)
    }

    #[test]
    fn addresses_are_found_behind_aliases() {
        let (question, answer) = answered(0x8180, &[(5, &[1, b'x', 0]), (A, &[192, 0, 2, 1]), (A, &[192, 0, 2, 2])]);
        let wanted = vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()];
        assert_eq!(read(&answer, &question, A), Answer::Addresses(wanted));
        assert_eq!(
            read(&answer[..answer.len() - 1], &question, A),
            Answer::Addresses(vec!["192.0.2.1".parse().unwrap()])
        );
        let (question, answer) = answered(0x8183, &[]);
        assert_eq!(read(&answer, &question, A), Answer::Failed(Failed::NoSuchName));
        let (question, answer) = answered(0x8382, &[]);
        assert_eq!(read(&answer, &question, A), Answer::CutOff);
        let (mut other, answer) = answered(0x8180, &[]);
        other[1] ^= 1;
        assert_eq!(read(&answer, &other, A), Answer::Foreign);
        for bad in ["", "a..b", &"x".repeat(64), &"abc.".repeat(100)] {
            assert_eq!(super::question(1, bad, A), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_trusted(noise in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..60) {
            let (question, mut answer) = answered(0x8180, &[(A, &[192, 0, 2, 1])]);
            answer.truncate(answer.len().saturating_sub(cut));
            answer.extend(noise);
            let _ = read(&answer, &question, A);
            let _ = read(&answer, &question, AAAA);
        }
    }
}
