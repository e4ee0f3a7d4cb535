//! Connections that workloads make to Services some of whose backends may sleep: each is handed on to a backend's endpoint
//! as bytes, in the client's name, once there is one. While it lasts it counts as one request of the backend, so whoever
//! scales that knows of it.
//!
//! Who may connect is not asked here but by the network, of the second connection.

use crate::counters::{Counters, Level};
use crate::gateway::Shared;
use crate::proxy::random;
use crate::serve::until;
use crate::upstream::{Endpoint, Lease, Upstream, Upstreams};
use api::demand::{BACKENDS, backends};
use api::object::{Meta, SharedObject};
use bytes::BytesMut;
use rustix::net::sockopt;
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Endpoints that are tried for one connection.
const ATTEMPTS: usize = 3;
/// How long a client waits for an endpoint at most, as Knative's requests do.
const PATIENCE: Duration = Duration::from_secs(300);
/// What of a client's words is taken before somebody hears them.
const SAID: usize = 8 << 10;
/// Connections of one workload at a time.
const SHARE: usize = 2048;
/// Pause after the kernel refused a connection (no descriptors left).
const PAUSE: Duration = Duration::from_millis(50);
/// A client that is gone without a word is found out after three questions.
const QUIET: Duration = Duration::from_secs(30);
const ASK: Duration = Duration::from_secs(10);

/// Makes a connection in a client's name, not blocking.
pub type Connect = Arc<dyn Fn(IpAddr, SocketAddr) -> io::Result<std::net::TcpStream> + Send + Sync>;

/// Where such connections arrive, and how they go on.
pub struct Inside {
    pub listeners: Vec<std::net::TcpListener>,
    pub connect: Connect,
}

impl fmt::Debug for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inside").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

/// Services by address and port.
pub type Sleepers = HashMap<SocketAddr, Arc<Sleeper>>;

#[derive(Debug)]
pub struct Sleeper {
    backends: Vec<(Arc<Upstream>, u32)>,
}

/// Reads [`BACKENDS`]. A backend that is no Service of the same namespace is left out.
pub fn sleepers(services: &[SharedObject], upstreams: &mut Upstreams) -> Sleepers {
    let mut all = Sleepers::new();
    for service in services {
        let Some(named) = service.annotation(BACKENDS).filter(|text| !text.is_empty()) else { continue };
        let mut found = Vec::new();
        for (name, weight) in backends(named) {
            let backend = services.iter().find(|s| (s.namespace(), s.name()) == (service.namespace(), name.as_str()));
            let Some(port) = backend.and_then(|backend| backend.pointer("/spec/ports/0")) else { continue };
            if let Some(number) = number(port) {
                found.push((upstreams.want(service.namespace(), &name, number, port.str_at("/name"), false), weight));
            }
        }
        let sleeper = Arc::new(Sleeper { backends: found });
        let list = |at: &str| service.pointer(at).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for address in list("/spec/clusterIPs").iter().filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok()) {
            for port in list("/spec/ports").iter().filter_map(number) {
                all.insert(SocketAddr::new(address, port), sleeper.clone());
            }
        }
    }
    all
}

fn number(port: &Value) -> Option<u16> {
    port.get("port")?.as_u64()?.try_into().ok()
}

impl Sleeper {
    fn pick(&self, random: u64) -> Option<&Arc<Upstream>> {
        let total: u64 = self.backends.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let mut place = random.checked_rem(total)?;
        let here = |(_, weight): &&(Arc<Upstream>, u32)| match place.checked_sub(u64::from(*weight)) {
            Some(rest) => {
                place = rest;
                false
            }
            None => true,
        };
        self.backends.iter().find(here).map(|(upstream, _)| upstream)
    }
}

/// Room for connections, of which each workload has a share: no one takes it all.
#[derive(Clone)]
pub struct Places {
    all: Arc<Semaphore>,
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Places {
    /// So many, and no more than an eighth of the descriptors that this process may have: each takes two.
    pub fn new(most: usize) -> Places {
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let most = descriptors.map_or(most, |files| most.min(usize::try_from(files / 8).unwrap_or(most)));
        Places { all: Arc::new(Semaphore::new(most.max(1))), clients: Arc::default() }
    }

    /// `None`: the client has its share.
    fn enter(&self, client: IpAddr) -> Option<Place> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(client).or_default();
        if *count >= SHARE {
            return None;
        }
        *count += 1;
        Some(Place { clients: self.clients.clone(), client })
    }
}

struct Place {
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
    client: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

/// Accepts until it is dropped. Those that were accepted go on until the gateway ends.
pub async fn run(shared: Arc<Shared>, listener: TcpListener, connect: Connect, places: Places) {
    loop {
        // The semaphore is never closed.
        let room = places.all.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((client, from)) => {
                let Some(place) = places.enter(from.ip()) else {
                    reset(&client);
                    continue;
                };
                let visit = Visit { shared: shared.clone(), connect: connect.clone(), from };
                tokio::spawn(async move {
                    visit.serve(client).await;
                    drop((room, place));
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a workload's connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

struct Visit {
    shared: Arc<Shared>,
    connect: Connect,
    from: SocketAddr,
}

impl Visit {
    async fn serve(self, mut client: TcpStream) {
        let counters = self.shared.counters.clone();
        Counters::add(&counters.activated_total);
        let _open = Level::up(&counters.activated_open);
        let mut cut = self.shared.cut.subscribe();
        // Failures only cost time.
        let _ = client.set_nodelay(true);
        let _ = ask_for_life(&client);
        let result = tokio::select! {
            result = self.carry(&mut client) => result,
            () = until(&mut cut) => return,
        };
        if let Err(error) = result {
            tracing::debug!(client = %self.from, "a workload's connection broke off: {error}");
            reset(&client);
        }
    }

    async fn carry(&self, client: &mut TcpStream) -> io::Result<()> {
        let to = original(client)?;
        let sleeper = self.shared.sleepers().get(&to).cloned();
        let upstream = sleeper.as_ref().and_then(|sleeper| sleeper.pick(random()));
        let upstream = upstream.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such Service"))?;
        let mut said = BytesMut::new();
        let (mut stream, lease) = tokio::select! {
            made = self.reach(upstream) => made?,
            () = gone(client, &mut said) => return Ok(()),
        };
        stream.write_all(&said).await?;
        let copied = tokio::io::copy_bidirectional(client, &mut stream).await;
        drop(lease);
        copied.map(drop)
    }

    async fn reach(&self, upstream: &Upstream) -> io::Result<(TcpStream, Lease)> {
        let mut tried = None;
        let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the service has no ready endpoint"));
        for _ in 0..ATTEMPTS {
            let found = tokio::time::timeout(PATIENCE, awake(upstream, self.from.ip(), tried.as_ref())).await;
            let Some(lease) = found.map_err(|_| io::ErrorKind::TimedOut)? else {
                Counters::add(&self.shared.counters.no_endpoint_total);
                break;
            };
            match self.dial(lease.endpoint().address).await {
                Ok(stream) => return Ok((stream, lease)),
                // It may be this client alone that is refused: the endpoint is as good as before.
                Err(error) => result = Err(error),
            }
            tried = Some(lease.endpoint().clone());
        }
        result
    }

    async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = TcpStream::from_std((self.connect)(self.from.ip(), to)?)?;
        tokio::time::timeout(self.shared.connect_timeout, stream.writable()).await??;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        let _ = stream.set_nodelay(true);
        let _ = ask_for_life(&stream);
        Ok(stream)
    }
}

/// An endpoint with the connection's share of its Service's load, waking one if none is there.
async fn awake(upstream: &Upstream, client: IpAddr, avoid: Option<&Arc<Endpoint>>) -> Option<Lease> {
    let load = &upstream.load;
    let key = upstream.key(client, &http::HeaderMap::new());
    loop {
        let mut changed = pin!(load.changed());
        changed.as_mut().enable();
        let share = load.enter();
        let held = load.is_held();
        if !held {
            // How many requests an endpoint has at once is not for connections to say.
            let any = || upstream.endpoints().first().cloned();
            if let Some(endpoint) = upstream.pick(random(), key, avoid).endpoint().or_else(any) {
                return Lease::within(usize::MAX, &endpoint, share).ok();
            }
        }
        drop(share);
        let _place = if held || load.is_managed() { load.stand_in_line() } else { None }?;
        changed.await;
    }
}

/// Returns when the client has gone without having said anything. What it says is kept.
async fn gone(client: &mut TcpStream, said: &mut BytesMut) {
    while said.len() < SAID {
        match client.read_buf(said).await {
            Ok(0) if !said.is_empty() => break,
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending().await
}

/// The connection will not end but break off: nobody is to take a part for the whole. Failures only cost that.
fn reset(stream: &TcpStream) {
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// Where a client wanted to connect to before it was led here.
fn original(client: &TcpStream) -> io::Result<SocketAddr> {
    Ok(match client.local_addr()? {
        SocketAddr::V4(_) => sockopt::ip_original_dst(client)?.into(),
        SocketAddr::V6(_) => {
            let to = sockopt::ipv6_original_dst(client)?;
            SocketAddr::new((*to.ip()).into(), to.port())
        }
    })
}

fn ask_for_life(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, QUIET)?;
    sockopt::set_tcp_keepintvl(stream, ASK)?;
    Ok(sockopt::set_tcp_keepcnt(stream, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(namespace: &str, name: &str, address: &str, backends: &str) -> SharedObject {
        Arc::new(json!({
            "metadata": {"namespace": namespace, "name": name, "annotations": {BACKENDS: backends}},
            "spec": {"clusterIPs": [address, "fd00:10:43::9"], "ports": [{"name": "http", "port": 80}, {"port": 8080}]}
        }))
    }

    #[test]
    fn backends_are_services_of_the_same_namespace() {
        let all = [
            service("a", "web", "10.43.0.9", "one=75,two=25,gone=10"),
            service("a", "one", "10.43.0.10", ""),
            service("a", "two", "10.43.0.11", ""),
            service("b", "gone", "10.43.0.12", ""),
            service("b", "alone", "10.43.0.13", "one=100"),
        ];
        let sleepers = sleepers(&all, &mut Upstreams::new(crate::upstream::Settings::default()));
        let mut addresses: Vec<String> = sleepers.keys().map(SocketAddr::to_string).collect();
        addresses.sort();
        let both = ["10.43.0.13:80", "10.43.0.13:8080", "10.43.0.9:80", "10.43.0.9:8080"];
        assert_eq!(addresses, [&both[..], &["[fd00:10:43::9]:80", "[fd00:10:43::9]:8080"]].concat());

        let web = &sleepers[&"10.43.0.9:80".parse().unwrap()];
        let names: Vec<&str> = (0..100).map(|random| web.pick(random).unwrap().service.as_str()).collect();
        assert_eq!(names.iter().filter(|name| **name == "one").count(), 75);
        assert_eq!(names.iter().filter(|name| **name == "two").count(), 25);
        assert!(sleepers[&"10.43.0.13:80".parse().unwrap()].pick(7).is_none(), "another namespace's is not led to");
    }

    #[test]
    fn one_workload_takes_its_share_and_gives_it_back() {
        let places = Places::new(usize::MAX);
        let (one, other): (IpAddr, IpAddr) = ([10, 42, 0, 7].into(), [10, 42, 0, 8].into());
        let mut taken: Vec<Place> = std::iter::repeat_with(|| places.enter(one)).map_while(|place| place).collect();
        assert_eq!(taken.len(), SHARE);
        assert!(places.enter(other).is_some());
        taken.pop();
        assert!(places.enter(one).is_some());
        drop(taken);
        assert!(places.clients.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_client_without_an_endpoint_wakes_one_and_gets_it() {
        let demand: Arc<api::demand::Demand> = Arc::default();
        let settings = crate::upstream::Settings { demand: demand.clone(), ..Default::default() };
        let upstream = Upstreams::new(settings).want("n", "s", 80, "http", false);
        let client: IpAddr = [10, 42, 0, 7].into();
        assert!(awake(&upstream, client, None).await.is_none(), "nobody would wake it");
        let load = demand.of("n", "s");
        load.manage(true);
        let waking = upstream.clone();
        let waiting = tokio::spawn(async move { awake(&waking, client, None).await });
        demand.wanted().await;
        assert_eq!((load.waiting(), waiting.is_finished()), (1, false));
        upstream.set_endpoints(&["127.0.0.1:80".parse().unwrap()]);
        let lease = waiting.await.unwrap().unwrap();
        assert_eq!((load.wants(), load.arrived()), (1, 1));
        assert!(!load.hold_if_idle(), "one that is open is under way");
        drop(lease);
        assert!(load.hold_if_idle());
    }
}
