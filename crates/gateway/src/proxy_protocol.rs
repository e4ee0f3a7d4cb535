//! The PROXY protocol, versions 1 and 2, as a load balancer in front of the gateway speaks it, and as the gateway speaks it
//! to endpoints that ask for it: the client's address ahead of the client's bytes (https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt).

use crate::upstream::ProxyVersion;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The longest header that is taken: version 1's limit is 107 bytes; of version 2's extensions none is read.
pub const MAX: usize = 4096;
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header and its length in bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    pub length: usize,
    /// `None` when the balancer speaks for itself (health checks) or of something other than TCP.
    pub client: Option<SocketAddr>,
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Reads the header at the start of a connection; `None` if more bytes are needed.
pub fn parse(bytes: &[u8]) -> io::Result<Option<Header>> {
    let begins = |start: &[u8]| bytes.iter().zip(start).all(|(a, b)| a == b);
    if begins(SIGNATURE) {
        if bytes.len() < SIGNATURE.len() { Ok(None) } else { binary(bytes) }
    } else if begins(b"PROXY ") {
        text(bytes)
    } else {
        Err(invalid("no PROXY protocol header"))
    }
}

/// The header that says that `client` connected to `local`. Of addresses of two families nothing can be said.
pub fn header(version: ProxyVersion, client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let pair = match (client.ip().to_canonical(), local.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            Some(("TCP4", 0x11, [from.octets(), to.octets()].concat(), from.to_string(), to.to_string()))
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            Some(("TCP6", 0x21, [from.octets(), to.octets()].concat(), from.to_string(), to.to_string()))
        }
        _ => None,
    };
    match (version, pair) {
        (ProxyVersion::V1, None) => b"PROXY UNKNOWN\r\n".to_vec(),
        (ProxyVersion::V1, Some((family, _, _, from, to))) => {
            format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), local.port()).into_bytes()
        }
        // LOCAL, of no family.
        (ProxyVersion::V2, None) => [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat(),
        (ProxyVersion::V2, Some((_, family, addresses, _, _))) => {
            let length = (addresses.len() as u16 + 4).to_be_bytes();
            let ports = [client.port().to_be_bytes(), local.port().to_be_bytes()].concat();
            [&SIGNATURE[..], &[0x21, family], &length, &addresses, &ports].concat()
        }
    }
}

fn text(bytes: &[u8]) -> io::Result<Option<Header>> {
    let Some(end) = bytes.iter().take(107).position(|byte| *byte == b'\n') else {
        return if bytes.len() < 107 { Ok(None) } else { Err(invalid("a PROXY header of more than 107 bytes")) };
    };
    let line = std::str::from_utf8(bytes.get(..end).unwrap_or_default()).ok().and_then(|line| line.strip_suffix('\r'));
    let line = line.ok_or_else(|| invalid("a PROXY header that is not a line of text"))?;
    let words: Vec<&str> = line.split(' ').collect();
    let client = match words.as_slice() {
        ["PROXY", "UNKNOWN", ..] => None,
        ["PROXY", family @ ("TCP4" | "TCP6"), source, target, port, to] => {
            let parse = |text: &str| text.parse::<IpAddr>().ok().filter(|ip| ip.is_ipv4() == (*family == "TCP4"));
            let (ip, port) = (parse(source), port.parse::<u16>().ok());
            match (ip, parse(target), port, to.parse::<u16>()) {
                (Some(ip), Some(_), Some(port), Ok(_)) => Some(SocketAddr::new(ip, port)),
                _ => return Err(invalid("a PROXY header with addresses that are none")),
            }
        }
        _ => return Err(invalid("a PROXY header that is not understood")),
    };
    Ok(Some(Header { length: end + 1, client }))
}

fn binary(bytes: &[u8]) -> io::Result<Option<Header>> {
    let Some([command, family, high, low]) = bytes.get(12..16).and_then(|fixed| <[u8; 4]>::try_from(fixed).ok()) else {
        return Ok(None);
    };
    let length = 16 + usize::from(u16::from_be_bytes([high, low]));
    if length > MAX {
        return Err(invalid("a PROXY header that is too long"));
    }
    let Some(body) = bytes.get(16..length) else { return Ok(None) };
    let client = match (command, family) {
        (0x20, _) => None,
        (0x21, 0x11) => {
            let [a, b, c, d, _, _, _, _, high, low, _, _] = fixed::<12>(body)?;
            Some(SocketAddr::new(Ipv4Addr::new(a, b, c, d).into(), u16::from_be_bytes([high, low])))
        }
        (0x21, 0x21) => {
            let bytes = fixed::<36>(body)?;
            let ip: [u8; 16] = fixed(&bytes)?;
            let port: [u8; 2] = fixed(bytes.get(32..).unwrap_or_default())?;
            Some(SocketAddr::new(Ipv6Addr::from(ip).into(), u16::from_be_bytes(port)))
        }
        (0x21, _) => None,
        _ => return Err(invalid("a PROXY header of an unknown version or command")),
    };
    Ok(Some(Header { length, client }))
}

fn fixed<const N: usize>(bytes: &[u8]) -> io::Result<[u8; N]> {
    bytes.get(..N).and_then(|part| part.try_into().ok()).ok_or_else(|| invalid("a PROXY header without its addresses"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u16).to_be_bytes();
        [&SIGNATURE[..], &[command, family, length[0], length[1]], body].concat()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let (four, six): (SocketAddr, SocketAddr) =
            ("192.0.2.1:5".parse().unwrap(), "[2001:db8::1]:6".parse().unwrap());
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            for (client, local, wanted) in [(four, four, Some(four)), (six, six, Some(six)), (four, six, None)] {
                let bytes = header(version, client, local);
                let read = parse(&bytes).unwrap().unwrap();
                assert_eq!((read.length, read.client), (bytes.len(), wanted));
            }
        }
        assert_eq!(header(ProxyVersion::V1, four, four), b"PROXY TCP4 192.0.2.1 192.0.2.1 5 5\r\n");
    }

    #[test]
    fn both_versions() {
        let line = b"PROXY TCP4 192.0.2.1 10.0.0.1 56324 443\r\nGET";
        assert_eq!(
            parse(line).unwrap().unwrap(),
            Header { length: 41, client: Some("192.0.2.1:56324".parse().unwrap()) }
        );
        assert_eq!(parse(b"PROXY UNKNOWN\r\n").unwrap().unwrap(), Header { length: 15, client: None });
        let six = b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n";
        assert_eq!(parse(six).unwrap().unwrap().client, Some("[2001:db8::1]:1".parse().unwrap()));
        let four = v2(0x21, 0x11, &[192, 0, 2, 1, 10, 0, 0, 1, 0xdc, 4, 1, 187, 9, 9]);
        assert_eq!(
            parse(&four).unwrap().unwrap(),
            Header { length: 30, client: Some("192.0.2.1:56324".parse().unwrap()) }
        );
        assert_eq!(parse(&v2(0x20, 0, &[])).unwrap().unwrap(), Header { length: 16, client: None });
        for end in 0..four.len() {
            assert_eq!(parse(&four[..end]).unwrap(), None, "{end}");
        }
        for bad in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 70000\r\n",
            b"PROXY TCP4 1.2.3.4\n",
            &v2(0x21, 0x11, &[1, 2]),
            &v2(0x31, 0x11, &[0; 12]),
            &[b'P'; 200],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), version: u8) {
            let _ = parse(&bytes);
            let start: &[u8] = if version % 2 == 0 { SIGNATURE } else { b"PROXY TCP4 " };
            let _ = parse(&[start, &bytes].concat());
        }
    }
}
