//! Which hosts a function may send requests to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ENTRIES: usize = 64;
const NAME: usize = 253;
/// Of an entry without a port.
const PORTS: [u16; 2] = [80, 443];

/// `HOST[:PORT]`, several of them: a name, `*.` and a name for all names below it, an address or a range of addresses.
/// Without a port it is 80 and 443.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    host: Host,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Name(String),
    /// Every name that ends in a dot and this.
    Below(String),
    Addresses(IpAddr, u8),
}

impl AllowList {
    /// Entries are separated by commas or white space. The error names the entry and says what is wrong with it.
    pub fn parse(text: &str) -> Result<AllowList, String> {
        let entries: Vec<&str> =
            text.split(|c: char| c == ',' || c.is_ascii_whitespace()).filter(|e| !e.is_empty()).collect();
        if entries.len() > ENTRIES {
            return Err(format!("{} hosts; at most {ENTRIES} may be named", entries.len()));
        }
        let parsed = entries.into_iter().map(|entry| Entry::parse(entry).map_err(|why| format!("{entry:?}: {why}")));
        parsed.collect::<Result<_, _>>().map(AllowList)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a name, or an address's text, may be asked for at this port.
    pub(super) fn names(&self, host: &str, port: u16) -> bool {
        if let Some(address) = literal(host) {
            return self.covers(address, port);
        }
        let host = normal(host);
        self.at(port).any(|entry| match &entry.host {
            Host::Name(name) => *name == host,
            Host::Below(name) => {
                host.strip_suffix(name.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
            Host::Addresses(..) => false,
        })
    }

    /// Whether an address is on the list as one.
    pub(super) fn covers(&self, address: IpAddr, port: u16) -> bool {
        self.at(port).any(|entry| match entry.host {
            Host::Addresses(network, bits) => within(address, network, bits),
            Host::Name(_) | Host::Below(_) => false,
        })
    }

    fn at(&self, port: u16) -> impl Iterator<Item = &Entry> {
        self.0.iter().filter(move |entry| entry.port.map_or(PORTS.contains(&port), |own| own == port))
    }
}

/// The form that [`AllowList::parse`] reads.
impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, entry) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "," })?;
            match &entry.host {
                Host::Name(name) => f.write_str(name)?,
                Host::Below(name) => write!(f, "*.{name}")?,
                Host::Addresses(IpAddr::V4(address), 32) => write!(f, "{address}")?,
                Host::Addresses(IpAddr::V6(address), 128) => write!(f, "[{address}]")?,
                Host::Addresses(IpAddr::V4(address), bits) => write!(f, "{address}/{bits}")?,
                Host::Addresses(IpAddr::V6(address), bits) => write!(f, "[{address}/{bits}]")?,
            }
            if let Some(port) = entry.port {
                write!(f, ":{port}")?;
            }
        }
        Ok(())
    }
}

impl Entry {
    fn parse(text: &str) -> Result<Entry, String> {
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((inside, "")) => (inside, None),
            Some((inside, rest)) => (inside, Some(rest.strip_prefix(':').ok_or("a colon and a port belong after ]")?)),
            None => match text.split_once(':') {
                Some((_, rest)) if rest.contains(':') => return Err("IPv6 addresses are written in [ ]".into()),
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = match port {
            None => None,
            Some(port) => match port.parse::<u16>() {
                Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => Some(number),
                _ => return Err(format!("port {port:?} is not a number from 1 to 65535")),
            },
        };
        Ok(Entry { host: Host::parse(host, text.starts_with('['))?, port })
    }
}

impl Host {
    fn parse(text: &str, bracketed: bool) -> Result<Host, String> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        if let Ok(address) = address.parse::<IpAddr>() {
            let most = if address.is_ipv4() { 32 } else { 128 };
            let bits = match bits.map(|bits| (bits, bits.parse::<u8>())) {
                None => most,
                Some((_, Ok(bits))) if bits <= most => bits,
                Some((bits, _)) => return Err(format!("/{bits} is not from /0 to /{most}")),
            };
            return Ok(Host::Addresses(address, bits));
        }
        if bracketed || bits.is_some() {
            return Err("not an address or a range of addresses".into());
        }
        match text.strip_prefix("*.") {
            Some(name) => Ok(Host::Below(name_of(name)?)),
            None => Ok(Host::Name(name_of(text)?)),
        }
    }
}

fn name_of(text: &str) -> Result<String, String> {
    let name = normal(text);
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    match !name.is_empty() && name.len() <= NAME && name.split('.').all(label) && !numeric {
        true => Ok(name),
        false => Err("not a host: a DNS name, *. and a name, an address or a range of addresses is needed".into()),
    }
}

/// Lower case, without the root's dot.
pub(super) fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// The address that a URL's host is, if it is one.
pub(super) fn literal(host: &str) -> Option<IpAddr> {
    let inside = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match inside {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(|address| IpAddr::V6(address).to_canonical()),
        None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    }
}

fn within(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    let shared = |a: u128, b: u128, width: u8| bits == 0 || (a ^ b) >> (width - bits) == 0;
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => shared(u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => shared(a.to_bits(), b.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_is_on_the_list() {
        let list =
            AllowList::parse("api.Example.com, *.cdn.example:8443 10.0.0.0/8:5432\n[fd00::/8] 192.0.2.7").unwrap();
        for (host, port, on) in [
            ("api.example.com", 443, true),
            ("API.example.com.", 80, true),
            ("api.example.com", 8080, false),
            ("x.api.example.com", 443, false),
            ("a.b.cdn.example", 8443, true),
            ("cdn.example", 8443, false),
            (".cdn.example", 8443, false),
            ("evilcdn.example", 8443, false),
            ("10.9.8.7", 5432, true),
            ("10.9.8.7", 443, false),
            ("[fd12::1]", 443, true),
            ("[fe80::1]", 443, false),
            ("192.0.2.7", 80, true),
            ("[::ffff:192.0.2.7]", 80, true),
            ("192.0.2.8", 80, false),
            ("", 80, false),
        ] {
            assert_eq!(list.names(host, port), on, "{host} {port}");
        }
        assert!(!AllowList::default().names("api.example.com", 443));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, why) in [
            ("example.com:0", "port"),
            ("example.com:+80", "port"),
            ("example.com:http", "port"),
            ("https://example.com", "port"),
            ("fd00::1", "[ ]"),
            ("[fd00::1", "[ ]"),
            ("[example.com]", "not an address"),
            ("10.0.0.0/33", "/33"),
            ("*", "not a host"),
            ("a.*.b", "not a host"),
            ("user@host", "not a host"),
            ("-a.b", "not a host"),
            ("1.2.3", "not a host"),
        ] {
            let said = AllowList::parse(bad).unwrap_err();
            assert!(said.contains(why) && said.contains(bad.split_whitespace().next().unwrap()), "{bad}: {said}");
        }
        assert!(AllowList::parse(&"a.b ".repeat(65)).unwrap_err().contains("at most 64"));
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_written_the_same(text in "([a-z*]{0,3}\\.?[a-z0-9.:/\\[\\]]{0,12}[, ]){0,4}") {
            if let Ok(list) = AllowList::parse(&text) {
                prop_assert_eq!(AllowList::parse(&list.to_string()), Ok(list));
            }
        }
    }
}
