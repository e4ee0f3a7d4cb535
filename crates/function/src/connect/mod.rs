//! The role `atoll function-connect`: makes the connections of one function's own requests. It stays in the pod's network
//! namespace, so what it sends goes through the pod's link and policies, and is in a jail but for that; the host asks it by
//! name, and gets connected sockets. The list of allowed hosts is kept here, out of reach of what runs the tenant's code.
//!
//! It lives as long as the other end of its socket, which the host keeps with the function. When it ends first, the
//! function counts as ended.
//!
//! Addresses are judged after the name was looked up, and those are connected to: a name that is on the list cannot be made
//! to lead inside by its owner. Cluster names lead where the cluster says; other names only to public addresses, unless
//! the list has the address, too.

mod dns;
mod list;

pub use list::AllowList;

use crate::error::{Error, Result, io};
use crate::wire::{receive, send};
use crate::{host, jail};
use dns::Failed;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const ROLE: &str = "function-connect";
const LIMITS: jail::Limits =
    jail::Limits { processes: Some(128), descriptors: Some(512), address_space: Some(1 << 30), cpu: None, file: None };
/// Connections being made at once.
pub(crate) const AT_ONCE: usize = 64;
/// For names and connections together, at most.
pub(crate) const MOST: Duration = Duration::from_secs(30);
/// One address's share, if there are more.
const EACH: Duration = Duration::from_secs(5);
const STACK: usize = 128 << 10;

/// What a function may connect to, and who knows the names.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectSpec {
    /// As [`AllowList`] reads it.
    pub allow: String,
    pub resolver: Option<Ipv4Addr>,
    /// Domains in which names without a dot are looked up, then names that are not found; the last is the cluster's.
    pub search: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub id: u64,
    pub host: String,
    pub port: u16,
    pub limit_ms: u64,
}

/// With one descriptor, the connected socket, if it is no failure.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    pub id: u64,
    pub failure: Option<Failure>,
}

/// Why there is no connection. The texts are for the function's author.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Failure {
    #[error("{host}:{port} is not on the list of hosts it may send requests to; --allow-outbound adds it")]
    NotAllowed { host: String, port: u16 },
    #[error("{host} leads to {address}, which is not public; --allow-outbound {address}:{port} allows that, too")]
    Inside { host: String, address: IpAddr, port: u16 },
    #[error("{host} leads to {address}, where no function may go")]
    Never { host: String, address: IpAddr },
    #[error("{host}: no such name")]
    NoSuchName { host: String },
    #[error("{host}: the resolver gives no address (code {code})")]
    Resolver { host: String, code: u8 },
    #[error("{host}: the resolver does not answer")]
    NoResolver { host: String },
    #[error("{host}:{port}: connection refused")]
    Refused { host: String, port: u16 },
    #[error("{host}:{port}: no connection in time; a network policy may be why")]
    Late { host: String, port: u16 },
    #[error("{host}:{port}: {why}")]
    Other { host: String, port: u16, why: String },
}

/// Starts a connector as `uid` in the calling thread's network namespace; gives the end of its socket that the host gets.
/// `run_dir` is made if it is not there, and gets its log.
pub fn launch_connector(exe: &Path, run_dir: &Path, uid: u32, spec: &ConnectSpec) -> Result<OwnedFd> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(io("create", run_dir))?;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, its) = pair.map_err(io("make", "a pair of sockets"))?;
    let mut child = Command::new(exe)
        .arg(ROLE)
        .arg(run_dir)
        .arg(uid.to_string())
        .env_clear()
        .stdin(Stdio::from(its))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io("run", exe))?;
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut said);
    }
    let status = child.wait().map_err(io("wait for", exe))?;
    if !status.success() {
        return Err(Error::Start(said.trim().to_owned()));
    }
    send(&ours, spec, &[])?;
    Ok(ours)
}

/// Entry of `atoll function-connect RUN_DIR UID`; its standard input is its socket. Returns 0 when it serves, detached.
pub fn main(args: &[String]) -> i32 {
    host::detached(ROLE, args, serve_jailed)
}

fn serve_jailed(socket: OwnedFd, run_dir: &Path, uid: u32) -> Result<()> {
    jail::leave_the_host_but_its_network(run_dir)?;
    jail::drop_privilege_but_connections(uid, &LIMITS)?;
    host::report_ready()?;
    let Some((spec, _)) = receive::<ConnectSpec>(&socket)? else { return Ok(()) };
    let rules = Arc::new(Rules {
        allow: AllowList::parse(&spec.allow).map_err(Error::Protocol)?,
        resolver: spec.resolver,
        search: spec.search.iter().map(|domain| list::normal(domain)).collect(),
    });
    serve(Arc::new(socket), &rules)
}

fn serve(socket: Arc<OwnedFd>, rules: &Arc<Rules>) -> Result<()> {
    let busy = Arc::new(AtomicUsize::new(0));
    while let Some((ask, _)) = receive::<Ask>(&*socket)? {
        let (id, host, port) = (ask.id, ask.host.clone(), ask.port);
        let refuse = |why: &str| {
            let failure = Failure::Other { host: host.clone(), port, why: why.into() };
            send(&*socket, &Told { id, failure: Some(failure) }, &[])
        };
        if busy.load(Ordering::Relaxed) >= AT_ONCE {
            refuse("too many connections are being made at once")?;
            continue;
        }
        busy.fetch_add(1, Ordering::Relaxed);
        let (own, its_rules, count) = (socket.clone(), rules.clone(), busy.clone());
        let work = move || {
            let id = ask.id;
            // When this cannot be sent, the host is gone, and so is everyone soon.
            let _ = match its_rules.connect(&ask) {
                Ok(stream) => send(&*own, &Told { id, failure: None }, &[stream.as_fd()]),
                Err(failure) => send(&*own, &Told { id, failure: Some(failure) }, &[]),
            };
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().stack_size(STACK).spawn(work).is_err() {
            busy.fetch_sub(1, Ordering::Relaxed);
            refuse("out of threads")?;
        }
    }
    Ok(())
}

struct Rules {
    allow: AllowList,
    resolver: Option<Ipv4Addr>,
    search: Vec<String>,
}

impl Rules {
    fn connect(&self, ask: &Ask) -> std::result::Result<TcpStream, Failure> {
        let (host, port) = (&ask.host, ask.port);
        if !self.allow.names(host, port) {
            return Err(Failure::NotAllowed { host: host.clone(), port });
        }
        let until = Instant::now() + MOST.min(Duration::from_millis(ask.limit_ms.max(1)));
        let (addresses, of_cluster) = match list::literal(host) {
            Some(address) => (vec![address], false),
            None => self.resolve(host, until)?,
        };
        let mut failure = Failure::NoSuchName { host: host.clone() };
        let count = addresses.len();
        for (at, address) in addresses.into_iter().enumerate() {
            let address = address.to_canonical();
            if let Err(refused) = self.judge(host, address, port, of_cluster) {
                failure = refused;
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            let limit = if at + 1 < count { left.min(EACH) } else { left };
            if limit.is_zero() {
                return Err(Failure::Late { host: host.clone(), port });
            }
            match TcpStream::connect_timeout(&(address, port).into(), limit) {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = of_connecting(host, port, &error),
            }
        }
        Err(failure)
    }

    /// Whether a name that is on the list may lead to this address.
    fn judge(&self, host: &str, address: IpAddr, port: u16, of_cluster: bool) -> std::result::Result<(), Failure> {
        let host = host.to_owned();
        match place(address) {
            Place::Never => Err(Failure::Never { host, address }),
            Place::Inside if !of_cluster && !self.allow.covers(address, port) => {
                Err(Failure::Inside { host, address, port })
            }
            Place::Inside | Place::Public => Ok(()),
        }
    }

    /// A name's addresses, and whether the name is the cluster's.
    fn resolve(&self, host: &str, until: Instant) -> std::result::Result<(Vec<IpAddr>, bool), Failure> {
        let Some(resolver) = self.resolver else { return Err(Failure::NoResolver { host: host.to_owned() }) };
        let name = list::normal(host);
        let in_domains = self.search.iter().map(|domain| format!("{name}.{domain}"));
        let absolute = name.contains('.').then(|| name.clone());
        let candidates: Vec<String> = match host.ends_with('.') {
            true => vec![name.clone()],
            false => absolute.into_iter().chain(in_domains).collect(),
        };
        for candidate in candidates {
            match dns::resolve(resolver, &candidate, until) {
                Ok(addresses) if addresses.is_empty() => {}
                Ok(addresses) => return Ok((addresses, self.is_clusters(&candidate))),
                Err(Failed::NoSuchName) => {}
                Err(Failed::Refused(code)) => return Err(Failure::Resolver { host: host.to_owned(), code }),
                Err(Failed::NoAnswer) => return Err(Failure::NoResolver { host: host.to_owned() }),
            }
        }
        Err(Failure::NoSuchName { host: host.to_owned() })
    }

    fn is_clusters(&self, name: &str) -> bool {
        let domain = self.search.last().filter(|domain| !domain.is_empty());
        domain.is_some_and(|domain| name.strip_suffix(domain.as_str()).is_some_and(|rest| rest.ends_with('.')))
    }
}

fn of_connecting(host: &str, port: u16, error: &std::io::Error) -> Failure {
    let host = host.to_owned();
    match error.kind() {
        ErrorKind::ConnectionRefused => Failure::Refused { host, port },
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Late { host, port },
        _ => Failure::Other { host, port, why: error.to_string() },
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Public,
    /// Private networks, this cloud's among them, and ranges that are no one's on the internet.
    Inside,
    /// The pod itself, its link, the host's metadata services, groups.
    Never,
}

/// The special purpose registries of RFC 6890.
fn place(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(address) => place_v4(address),
        IpAddr::V6(address) => place_v6(address),
    }
}

fn place_v4(address: Ipv4Addr) -> Place {
    let [a, b, c, _] = address.octets();
    if a == 0 || address.is_loopback() || address.is_link_local() || address.is_multicast() || address.is_broadcast() {
        return Place::Never;
    }
    let carrier = a == 100 && (64..128).contains(&b);
    let protocols = (a, b, c) == (192, 0, 0);
    let benchmarks = a == 198 && (b == 18 || b == 19);
    match address.is_private() || carrier || protocols || benchmarks || a >= 240 {
        true => Place::Inside,
        false => Place::Public,
    }
}

fn place_v6(address: Ipv6Addr) -> Place {
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_unicast_link_local() {
        return Place::Never;
    }
    let [first, second, ..] = address.segments();
    // Forms that carry an IPv4 address: compatible, translated (RFC 6052), 6to4, Teredo.
    let carries =
        first == 0 || (first == 0x64 && second == 0xff9b) || first == 0x2002 || (first == 0x2001 && second == 0);
    match carries || address.is_unique_local() || first & 0xffc0 == 0xfec0 {
        true => Place::Inside,
        false => Place::Public,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(allow: &str) -> Rules {
        Rules {
            allow: AllowList::parse(allow).unwrap(),
            resolver: None,
            search: vec!["ns.svc.cluster.local".into(), "cluster.local".into()],
        }
    }

    #[test]
    fn addresses_have_their_place() {
        for (text, wanted) in [
            ("93.184.216.34", Place::Public),
            ("198.51.100.7", Place::Public),
            ("2606:2800:220:1::1", Place::Public),
            ("10.42.0.5", Place::Inside),
            ("172.16.0.1", Place::Inside),
            ("192.168.1.1", Place::Inside),
            ("100.64.0.1", Place::Inside),
            ("198.18.0.1", Place::Inside),
            ("240.0.0.1", Place::Inside),
            ("fd00:10:43::a", Place::Inside),
            ("64:ff9b::7f00:1", Place::Inside),
            ("2002:7f00:1::", Place::Inside),
            ("127.0.0.53", Place::Never),
            ("0.0.0.0", Place::Never),
            ("169.254.169.254", Place::Never),
            ("224.0.0.1", Place::Never),
            ("255.255.255.255", Place::Never),
            ("::1", Place::Never),
            ("::", Place::Never),
            ("fe80::1", Place::Never),
            ("ff02::1", Place::Never),
        ] {
            assert_eq!(place(text.parse::<IpAddr>().unwrap().to_canonical()), wanted, "{text}");
        }
        assert_eq!(place("::ffff:127.0.0.1".parse::<IpAddr>().unwrap().to_canonical()), Place::Never);
    }

    #[test]
    fn a_name_does_not_lead_inside_unless_the_list_says_so() {
        let (inside, port) = ("10.42.0.9".parse().unwrap(), 443);
        let closed = rules("evil.example, db");
        assert!(matches!(closed.judge("evil.example", inside, port, false), Err(Failure::Inside { .. })));
        assert!(closed.judge("db", inside, port, true).is_ok());
        assert!(rules("evil.example 10.42.0.0/16").judge("evil.example", inside, port, false).is_ok());
        let metadata = "169.254.169.254".parse().unwrap();
        assert!(matches!(rules("169.254.0.0/16").judge("x", metadata, 80, true), Err(Failure::Never { .. })));
        assert!(closed.is_clusters("db.ns.svc.cluster.local"));
        assert!(!closed.is_clusters("evilcluster.local") && !closed.is_clusters("cluster.local"));
        let ask = Ask { id: 1, host: "other.example".into(), port, limit_ms: 1 };
        let said = closed.connect(&ask).unwrap_err().to_string();
        assert!(said.contains("other.example:443 is not on the list"), "{said}");
    }
}
