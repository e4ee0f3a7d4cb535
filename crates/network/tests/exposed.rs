//! Ports of the host, between namespaces that the test makes: pods, a host, and the world behind it.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::policy::{Action, Block, Direction, Otherwise, Profile, Ranges, Rule, ranges};
use network::{Egress, Exposer, Exposure, Isolation, Leads, Policies, Protocol, in_netns};
use rustix::fd::AsFd;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const ALIAS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const HOST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const WORLD6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const PORT: u16 = 30080;

/// A host with one link to a world; both go with it.
struct Outside {
    host: Netns,
    world: Netns,
}

impl Outside {
    fn new() -> Outside {
        let of_host = [format!("{HOST}/24"), format!("{ALIAS}/24"), format!("{HOST6}/64 nodad")];
        let of_world = [format!("{WORLD}/24"), format!("{OTHER}/24"), format!("{WORLD6}/64 nodad")];
        let (host, world) = outside(&of_host, &of_world);
        ip(&host, &format!("route add default via {WORLD}"));
        Outside { host, world }
    }

    fn exposer(&self, lab: &Lab) -> Exposer {
        Exposer::new(lab.router(), File::open(&self.host).unwrap().into()).unwrap()
    }
}

fn exposure(listen: impl Into<IpAddr>, port: u16, endpoints: &[(IpAddr, u16)]) -> Exposure {
    Exposure {
        namespace: "default".into(),
        name: "web".into(),
        listen: (listen.into(), port).into(),
        protocol: Protocol::Tcp,
        leads: Leads::To { endpoints: endpoints.to_vec(), sticky: false },
        sources: Ranges::default(),
    }
}

#[track_caller]
fn open(lab: &Lab, exposer: &mut Exposer, exposures: Vec<Exposure>) {
    let failed = exposer.sync(lab.router(), exposures).unwrap();
    assert!(failed.is_empty(), "{failed:?}");
}

/// What a server says to whoever connects from `netns`, from this address of it.
fn ask_as(netns: &Path, from: Option<Ipv4Addr>, to: impl Into<IpAddr>) -> std::io::Result<String> {
    let to = SocketAddr::new(to.into(), PORT);
    in_netns(netns, || {
        let mut stream = match from {
            Some(from) => connect_from(from, to)?,
            None => TcpStream::connect_timeout(&to, Duration::from_secs(5))?,
        };
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
    .unwrap()
}

fn connect_from(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketType};
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(from.into(), 0))?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket.into())
}

fn ask(netns: &Path, to: impl Into<IpAddr>) -> std::io::Result<String> {
    ask_as(netns, None, to)
}

fn refused(answer: &std::io::Result<String>) -> bool {
    answer.as_ref().is_err_and(|e| matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused))
}

/// The pods that a policy selects take connections from these networks only.
fn let_in(lab: &Lab, network: &str) {
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    let key: Arc<str> = "in".into();
    let rule = Rule {
        origin: key.clone(),
        action: Action::Allow,
        anyone: false,
        group: None,
        blocks: ranges(&[Block { network: network.parse().unwrap(), except: Vec::new() }]),
        names: None,
        ports: Vec::new(),
    };
    let profile =
        Profile { direction: Direction::Ingress, origin: key.clone(), rules: vec![rule], otherwise: Otherwise::Refuse };
    policies.profiles.insert(key.clone(), profile);
    policies.workloads.values_mut().for_each(|workload| workload.ingress = Some(key.clone()));
    lab.router().sync_policies(policies).unwrap();
}

#[test]
fn a_port_leads_to_a_workload_which_sees_its_client() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    greet(&pod, 8080, "a");
    let mut exposer = outside.exposer(&lab);
    open(&lab, &mut exposer, vec![exposure(Ipv4Addr::UNSPECIFIED, PORT, &[(pod.address.into(), 8080)])]);
    let router = lab.router().config().router_address();
    assert_eq!(ask(&outside.world, HOST).unwrap(), format!("a {WORLD}"));
    assert_eq!(ask_as(&outside.world, Some(OTHER), ALIAS).unwrap(), format!("a {OTHER}"));
    // The host itself is the node.
    assert_eq!(ask(&outside.host, Ipv4Addr::LOCALHOST).unwrap(), format!("a {router}"));
    assert_eq!(ask(&outside.host, HOST).unwrap(), format!("a {router}"));
    // With an uplink whose routes lead to all the world, answers still come back to the relay.
    for egress in [Egress::Nat, Egress::Routed, Egress::None] {
        lab.router().set_egress(File::open(&outside.host).unwrap().as_fd(), egress).unwrap();
        assert_eq!(ask(&outside.world, HOST).unwrap(), format!("a {WORLD}"));
    }
    // Endpoints of others, or that are no workloads, are not led to.
    let foreign = Exposure { namespace: "other".into(), ..exposure(HOST, PORT, &[(pod.address.into(), 8080)]) };
    open(&lab, &mut exposer, vec![foreign]);
    assert!(refused(&ask(&outside.world, HOST)));
    let strange = [[127, 0, 0, 1], router.octets(), [203, 0, 113, 1]].map(|address| (IpAddr::from(address), 8080));
    open(&lab, &mut exposer, vec![exposure(HOST, PORT, &strange)]);
    assert!(refused(&ask(&outside.host, HOST)));
    // A workload gets no further by an address that it has no way to.
    assert!(call_from(&pod, HOST, PORT).is_err());
    open(&lab, &mut exposer, Vec::new());
    assert!(refused(&ask(&outside.world, HOST)));
    open(&lab, &mut exposer, vec![exposure(HOST, PORT, &[])]);
    assert!(refused(&ask(&outside.world, HOST)));
    assert!(refused(&ask(&outside.world, ALIAS)));
}

#[test]
fn both_directions_are_whole_and_end_by_themselves() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    let listener = in_netns(&netns(&pod), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7)).unwrap()).unwrap();
    // Answers only when all has been said.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut all = Vec::new();
            if stream.read_to_end(&mut all).is_ok() {
                all.reverse();
                let _ = stream.write_all(&all);
            }
        }
    });
    let mut exposer = outside.exposer(&lab);
    open(&lab, &mut exposer, vec![exposure(HOST, PORT, &[(pod.address.into(), 7)])]);
    let said: Vec<u8> = (0..8u32 << 20).map(|n| (n ^ (n >> 11)) as u8).collect();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = in_netns(&outside.world, || TcpStream::connect((HOST, PORT)).unwrap()).unwrap();
            let said = said.clone();
            std::thread::spawn(move || {
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                stream.write_all(&said).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).unwrap();
                heard
            })
        })
        .collect();
    let wanted: Vec<u8> = said.iter().rev().copied().collect();
    for client in clients {
        assert!(client.join().unwrap() == wanted);
    }
}

#[test]
fn policies_judge_clients_outside_by_their_address() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    greet(&pod, 8080, "a");
    greet_udp(&pod, 53, "a");
    let silent = in_netns(&netns(&pod), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9)).unwrap()).unwrap();
    let mut exposer = outside.exposer(&lab);
    let to = |port| (IpAddr::from(pod.address), port);
    let udp = Exposure { protocol: Protocol::Udp, ..exposure(HOST, PORT, &[to(53)]) };
    let slow = exposure(HOST, 30009, &[to(9)]);
    open(&lab, &mut exposer, vec![exposure(HOST, PORT, &[to(8080)]), udp, slow]);
    let mut long = in_netns(&outside.world, || TcpStream::connect((HOST, 30009)).unwrap()).unwrap();
    let (_kept, peer) = silent.accept().unwrap();
    assert_eq!(peer.ip(), WORLD);
    let_in(&lab, &format!("{OTHER}/32"));
    assert!(refused(&ask(&outside.world, HOST)));
    assert_eq!(ask_as(&outside.world, Some(OTHER), HOST).unwrap(), format!("a {OTHER}"));
    // The node reaches every workload.
    let by_node = ask(&outside.host, HOST);
    assert!(by_node.is_ok(), "{by_node:?}");
    // What was open and is not allowed any more ends with its next packet.
    long.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    eventually("the connection ends", || {
        long.write_all(b"x").is_err() || matches!(long.read(&mut [0]), Err(e) if e.kind() == ErrorKind::ConnectionReset)
    });
    let asks = |from: Ipv4Addr| {
        in_netns(&outside.world, || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            socket.send_to(b"?", (HOST, PORT)).unwrap();
            socket.recv_from(&mut [0; 64]).is_ok()
        })
        .unwrap()
    };
    eventually("datagrams of the one that may pass", || asks(OTHER));
    assert!(!asks(WORLD));
    lab.defaults(Isolation::Private);
    eventually("datagrams of all pass", || asks(WORLD));
}

#[test]
fn datagrams_are_answered_from_where_they_went() {
    let Some(lab) = lab() else { return };
    let (outside, one, two) = (Outside::new(), lab.pod("one"), lab.pod("two"));
    greet_udp(&one, 53, "one");
    greet_udp(&two, 53, "two");
    let mut exposer = outside.exposer(&lab);
    let leads = |endpoint: Ipv4Addr| Exposure {
        protocol: Protocol::Udp,
        ..exposure(Ipv4Addr::UNSPECIFIED, PORT, &[(endpoint.into(), 53)])
    };
    open(&lab, &mut exposer, vec![leads(one.address)]);
    let client = in_netns(&outside.world, || UdpSocket::bind((WORLD, 0)).unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let ask = |address: Ipv4Addr| {
        client.send_to(b"?", (address, PORT)).unwrap();
        let mut buffer = [0; 64];
        loop {
            let (length, from) = client.recv_from(&mut buffer).ok()?;
            // Not a late one to an earlier question.
            if from == SocketAddr::from((address, PORT)) {
                return Some(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
        }
    };
    for address in [HOST, ALIAS] {
        eventually("an answer comes", || ask(address).as_deref() == Some("one"));
    }
    // A client that goes on sending does not stay with an endpoint that has gone.
    open(&lab, &mut exposer, vec![leads(two.address)]);
    for address in [HOST, ALIAS] {
        eventually("the other answers", || ask(address).as_deref() == Some("two"));
    }
}

#[test]
fn whom_a_port_takes_and_what_it_cannot_be() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    greet(&pod, 8080, "a");
    let to = [(IpAddr::from(pod.address), 8080)];
    let mut exposer = outside.exposer(&lab);
    let only = |network: &str| Exposure {
        sources: ranges(&[Block { network: network.parse().unwrap(), except: Vec::new() }]),
        ..exposure(HOST, PORT, &to)
    };
    open(&lab, &mut exposer, vec![only(&format!("{WORLD}/32"))]);
    assert!(ask(&outside.world, HOST).is_ok());
    assert!(refused(&ask_as(&outside.world, Some(OTHER), HOST)));
    assert!(refused(&ask(&outside.host, HOST)), "the host is not in the ranges either");
    open(&lab, &mut exposer, vec![only(&format!("{OTHER}/32"))]);
    assert!(refused(&ask(&outside.world, HOST)));
    // What cannot be opened is told, and keeps nothing else from it.
    let taken = in_netns(&outside.host, || TcpListener::bind((HOST, 30081)).unwrap()).unwrap();
    let wanted = vec![
        exposure(HOST, PORT, &to),
        Exposure { name: "other".into(), ..exposure(HOST, PORT, &to) },
        exposure(HOST, 30081, &to),
        exposure(Ipv4Addr::new(192, 0, 2, 77), PORT, &to),
    ];
    let failed = exposer.sync(lab.router(), wanted.clone()).unwrap();
    let told: Vec<String> = failed.iter().map(|f| format!("{} {}", f.exposure.listen, f.why)).collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told[0].contains("another Service") && told[1].contains("in use"), "{told:?}");
    assert!(told[2].contains("192.0.2.77"), "{told:?}");
    assert!(ask(&outside.world, HOST).is_ok());
    drop(taken);
    assert_eq!(exposer.sync(lab.router(), wanted).unwrap().len(), 2);
    // A port that is freed can be taken by another address in the same breath.
    open(&lab, &mut exposer, vec![exposure(Ipv4Addr::UNSPECIFIED, PORT, &to)]);
    assert!(ask(&outside.world, ALIAS).is_ok());
    drop(exposer);
    assert!(refused(&ask(&outside.world, HOST)));
}

#[test]
fn a_port_that_is_full_takes_nothing_from_others() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    greet(&pod, 8080, "a");
    // Greets, and keeps every connection.
    let keeper = in_netns(&netns(&pod), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in keeper.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(b"k").unwrap();
            kept.push(stream);
        }
    });
    let mut exposer = outside.exposer(&lab);
    let to = |port| [(IpAddr::from(pod.address), port)];
    open(&lab, &mut exposer, vec![exposure(HOST, 30009, &to(9)), exposure(HOST, PORT, &to(8080))]);
    let connect = || {
        let mut stream = in_netns(&outside.world, || TcpStream::connect((HOST, 30009)).unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut [0]).map(|()| stream)
    };
    let mut held = Vec::new();
    let why = loop {
        match connect() {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        assert!(held.len() <= 2048, "there is no bound");
    };
    assert_eq!(why.kind(), ErrorKind::ConnectionReset);
    assert!(held.len() >= 4);
    assert!(ask(&outside.world, HOST).is_ok());
    // Broken off, not only done with speaking: the server's side may still have something to say.
    let gone = held.pop().unwrap();
    rustix::net::sockopt::set_socket_linger(&gone, Some(Duration::ZERO)).unwrap();
    drop(gone);
    eventually("there is room again", || connect().is_ok());
}

#[test]
fn ipv6_ports_and_health() {
    let Some(lab) = lab() else { return };
    let (outside, pod) = (Outside::new(), lab.pod("a"));
    let Some(address6) = pod.address6 else { return println!("SKIPPED: this kernel has no IPv6") };
    let listener = in_netns(&netns(&pod), || TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8080)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(peer.to_string().as_bytes());
        }
    });
    let mut exposer = outside.exposer(&lab);
    let health = |endpoints| Exposure { leads: Leads::Health { endpoints }, ..exposure(HOST, 30090, &[]) };
    let web = exposure(Ipv6Addr::UNSPECIFIED, PORT, &[(address6.into(), 8080)]);
    open(&lab, &mut exposer, vec![web.clone(), health(0)]);
    eventually("the link has its address", || ask(&outside.world, HOST6).is_ok());
    assert_eq!(ask(&outside.world, HOST6).unwrap(), WORLD6.to_string());
    assert_eq!(ask(&outside.host, Ipv6Addr::LOCALHOST).unwrap(), lab.router().config().router_address6().to_string());
    let get = |request: &str| {
        let mut stream = in_netns(&outside.world, || TcpStream::connect((HOST, 30090)).unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(request.as_bytes());
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    };
    let none = get("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(none.starts_with("HTTP/1.1 503 ") && none.contains("\"localEndpoints\": 0"), "{none}");
    open(&lab, &mut exposer, vec![web, health(2)]);
    let two = get("GET / HTTP/1.0\r\n\r\n");
    assert!(two.starts_with("HTTP/1.1 200 ") && two.contains("\"localEndpoints\": 2"), "{two}");
    assert!(two.contains("X-Load-Balancing-Endpoint-Weight: 2") && two.contains("\"namespace\": \"default\""));
    assert_eq!(get(&"x".repeat(8192)), "");
}
