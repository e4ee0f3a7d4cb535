//! Services that sleep: who is led to the activator, and as whom it goes on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::policy::{Direction, Otherwise, Profile};
use network::{AttachRequest, Isolation, Policies, Protocol, Router, ServiceRule};
use rustix::net::sockopt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const SERVICE: [u8; 4] = [10, 43, 0, 50];
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x43, 0, 0, 0, 0, 0x50);

/// Hands on what comes, byte for byte, to one endpoint of each family.
struct Activator {
    carried: Arc<AtomicUsize>,
    /// Where it listens for IPv4.
    at: SocketAddr,
}

impl Activator {
    fn start(router: &Arc<Router>, endpoints: Vec<SocketAddr>) -> Activator {
        let carried = Arc::new(AtomicUsize::new(0));
        let listeners = router.open_activator().unwrap();
        let at = listeners[0].local_addr().unwrap();
        for listener in listeners {
            let (own, endpoints, carried) = (Arc::downgrade(router), endpoints.clone(), carried.clone());
            let namespace = router.netns_path();
            let serve = move || {
                for client in listener.incoming() {
                    // The test may be over.
                    let Ok(client) = client else { break };
                    carried.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(asked_for(&client).port(), 80);
                    let from = client.peer_addr().unwrap().ip();
                    let Some(to) = endpoints.iter().find(|to| to.is_ipv4() == from.is_ipv4()) else { continue };
                    let Some(router) = own.upgrade() else { break };
                    match connect(&router, from, *to) {
                        Ok(stream) => join(client, stream),
                        Err(_) => sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap(),
                    }
                }
            };
            // Until the test's process ends: nobody else connects.
            std::thread::spawn(move || network::in_netns(&namespace, serve));
        }
        Activator { carried, at }
    }

    fn carried(&self) -> usize {
        self.carried.load(Ordering::Relaxed)
    }
}

fn asked_for(client: &TcpStream) -> SocketAddr {
    let to: SocketAddr = match client.local_addr().unwrap() {
        SocketAddr::V4(_) => sockopt::ip_original_dst(client).unwrap().into(),
        SocketAddr::V6(_) => sockopt::ipv6_original_dst(client).unwrap().into(),
    };
    assert!([IpAddr::from(SERVICE), SERVICE6.into()].contains(&to.ip()), "{to}");
    to
}

fn connect(router: &Router, from: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = router.connect_as(from, to)?;
    let mut polled = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::OUT)];
    rustix::event::poll(&mut polled, Some(&Duration::from_secs(5).try_into().unwrap()))?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn join(client: TcpStream, stream: TcpStream) {
    for (mut from, mut to) in
        [(client.try_clone(), stream.try_clone()), (Ok(stream), Ok(client))].map(|(a, b)| (a.unwrap(), b.unwrap()))
    {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}

fn asleep(endpoints: &[([u8; 4], u16)]) -> ServiceRule {
    ServiceRule { activated: true, ..service(SERVICE, Protocol::Tcp, 80, endpoints) }
}

/// Connects from a workload to a Service, and reads all that comes.
fn ask(from: &network::Attachment, to: impl Into<IpAddr>) -> Result<String, ErrorKind> {
    let to = SocketAddr::new(to.into(), 80);
    let answer = network::in_netns(&netns(from), || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    answer.unwrap().map_err(|error| error.kind())
}

/// The lab's router, which the activator's threads see, until the test ends.
struct Shared {
    lab: Lab,
    router: Option<Arc<Router>>,
}

impl Shared {
    fn new(mut lab: Lab) -> Shared {
        let router = lab.router.take().map(Arc::new);
        Shared { lab, router }
    }
}

impl Deref for Shared {
    type Target = Arc<Router>;
    fn deref(&self) -> &Arc<Router> {
        self.router.as_ref().unwrap()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut router = self.router.take().unwrap();
        // A thread may be about to let go of it.
        self.lab.router = loop {
            match Arc::try_unwrap(router) {
                Ok(router) => break Some(router),
                Err(shared) => router = shared,
            }
            std::thread::sleep(Duration::from_millis(1));
        };
    }
}

fn defaults(router: &Router, isolation: Isolation) {
    router.sync_policies(policies(router, isolation)).unwrap();
}

fn policies(router: &Router, isolation: Isolation) -> Policies {
    let leases = router.leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    Policies::without_rules(isolation, workloads)
}

#[test]
fn its_own_namespace_is_led_to_the_activator_and_stays_who_it_is() {
    let Some(lab) = lab() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let stranger = lab.attach(&AttachRequest { namespace: "other".into(), ..request("stranger") });
    greet(&server, 8080, "server");
    let router = Shared::new(lab);
    let to = [
        (IpAddr::from(server.address), 8080).into(),
        (IpAddr::from(router.config().v6_of(server.address)), 8080).into(),
    ];
    let activator = Activator::start(&router, to.to_vec());

    router.sync_services(&[asleep(&[])]).unwrap();
    assert_eq!(ask(&client, SERVICE).unwrap(), format!("server {}", client.address));
    assert_eq!(activator.carried(), 1);
    // To the others it is a Service without endpoints.
    assert_eq!(ask(&stranger, SERVICE), Err(ErrorKind::ConnectionRefused));
    assert_eq!(activator.carried(), 1);
    // The server itself is its own client, whom the hairpin gives the router's address.
    assert_eq!(ask(&server, SERVICE).unwrap(), format!("server {}", router.config().router_address()));

    // With endpoints those may be let in, and wake nobody.
    router.sync_services(&[asleep(&[(server.address.octets(), 8080)])]).unwrap();
    assert_eq!(ask(&stranger, SERVICE), Err(ErrorKind::ConnectionRefused));
    defaults(&router, Isolation::Open);
    assert_eq!(ask(&stranger, SERVICE).unwrap(), format!("server {}", stranger.address));
    assert_eq!(activator.carried(), 3, "an open network is one namespace");
    defaults(&router, Isolation::Private);
    assert_eq!(ask(&stranger, SERVICE), Err(ErrorKind::ConnectionRefused));

    // Not by the router's address, nor by endpoints that somebody wrote.
    let listener = activator.at;
    let direct = network::in_netns(&netns(&client), || TcpStream::connect_timeout(&listener, Duration::from_secs(5)));
    assert_eq!(direct.unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let IpAddr::V4(own) = listener.ip() else { unreachable!() };
    router.sync_services(&[service(SERVICE, Protocol::Tcp, 80, &[(own.octets(), listener.port())])]).unwrap();
    assert_eq!(ask(&client, SERVICE), Err(ErrorKind::ConnectionRefused));

    // A namespace that had nobody has a number from its first workload on.
    let fresh = || ServiceRule { namespace: "fresh".into(), ..asleep(&[]) };
    router.sync_services(&[fresh()]).unwrap();
    let first = router.attach(&AttachRequest { namespace: "fresh".into(), ..request("first") }).unwrap();
    defaults(&router, Isolation::Private);
    let before = activator.carried();
    // Led there; and refused, since the server is another namespace's.
    assert_eq!(ask(&first, SERVICE), Err(ErrorKind::ConnectionReset));
    assert_eq!(activator.carried(), before + 1);
    drop(first);
}

#[test]
fn policies_judge_the_client_both_ways() {
    let Some(lab) = lab() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    greet(&server, 8080, "server");
    let router = Shared::new(lab);
    let activator = Activator::start(&router, vec![(IpAddr::from(server.address), 8080).into()]);
    router.sync_services(&[asleep(&[])]).unwrap();
    let refuse = |direction| {
        let mut policies = policies(&router, Isolation::Private);
        let key: Arc<str> = "nobody".into();
        let none = Profile { direction, origin: key.clone(), rules: Vec::new(), otherwise: Otherwise::Refuse };
        policies.profiles.insert(key.clone(), none);
        match direction {
            Direction::Egress => policies.workloads.get_mut(&client.address).unwrap().egress = Some(key),
            Direction::Ingress => policies.workloads.get_mut(&server.address).unwrap().ingress = Some(key),
        }
        router.sync_policies(policies).unwrap();
    };
    for (n, direction) in [Direction::Egress, Direction::Ingress].into_iter().enumerate() {
        assert!(ask(&client, SERVICE).is_ok());
        refuse(direction);
        assert_eq!(ask(&client, SERVICE), Err(ErrorKind::ConnectionReset), "{direction:?}");
        assert_eq!(activator.carried(), 2 * (n + 1));
        defaults(&router, Isolation::Private);
    }
}

#[test]
fn a_connection_is_whole_both_ways_in_both_families_and_ends_with_a_policy() {
    let Some(lab) = lab() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let router = Shared::new(lab);
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 8080));
    let listener = network::in_netns(&netns(&server), || TcpListener::bind(any).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    let mut to: Vec<SocketAddr> = vec![(IpAddr::from(server.address), 8080).into()];
    let mut services = vec![asleep(&[])];
    if router.has_ipv6() {
        to.push((IpAddr::from(router.config().v6_of(server.address)), 8080).into());
        services.push(ServiceRule { activated: true, ..service(SERVICE6, Protocol::Tcp, 80, &[]) });
    }
    let _activator = Activator::start(&router, to);
    router.sync_services(&services).unwrap();
    for rule in &services {
        let at = SocketAddr::new(rule.cluster_ip, 80);
        let mut stream = network::in_netns(&netns(&client), || TcpStream::connect(at).unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let said: Vec<u8> = (0..4u32 << 20).map(|n| (n ^ (n >> 11)) as u8).collect();
        let (mut speaker, text) = (stream.try_clone().unwrap(), said.clone());
        let speaking = std::thread::spawn(move || speaker.write_all(&text).unwrap());
        let mut heard = vec![0; said.len()];
        stream.read_exact(&mut heard).unwrap();
        speaking.join().unwrap();
        assert!(heard == said, "{at}");

        // What is no longer allowed ends, as if the client had made the connection itself.
        let mut alone = policies(&router, Isolation::Private);
        alone.workloads.get_mut(&server.address).unwrap().namespace = "elsewhere".into();
        router.sync_policies(alone).unwrap();
        let _ = stream.write_all(b"more");
        let mut byte = [0];
        assert!(!matches!(stream.read(&mut byte), Ok(1)), "{at}");
        defaults(&router, Isolation::Private);
    }
}
