//! Pods that are network namespaces, and every pair and port between them tried with real packets.

use crate::model::Pod;
use network::{AttachRequest, Isolation, LinkKind, Router, RouterConfig, in_netns};
use node::policy::{AdminPolicy, Member, Node, Policy, World, compile};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const PORTS: [u16; 2] = [80, 81];
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Lab {
    pub router: Option<Router>,
    pub namespaces: Vec<(&'static str, Value)>,
    pub pods: Vec<Pod>,
    /// By pod and family; one family where the kernel has no IPv6.
    ends: Vec<Vec<Ends>>,
    round: u8,
    _dir: tempfile::TempDir,
}

/// By family.
const PROTOCOLS: [[&str; 3]; 2] = [["TCP", "UDP", "ICMP"], ["TCP6", "UDP6", "ICMP6"]];
/// Types of ICMP's requests and replies.
const ECHOES: [(u8, u8); 2] = [(8, 0), (128, 129)];

/// A pod's sockets; they stay in its namespace whichever thread uses them.
struct Ends {
    netns: PathBuf,
    listeners: Vec<TcpListener>,
    servers: Vec<UdpSocket>,
    client: UdpSocket,
    ping: OwnedFd,
}

/// Source, destination (indices), protocol, port.
pub type Probe = (usize, usize, &'static str, u16);

impl Lab {
    /// `None` (said aloud) without root.
    pub fn new() -> Option<Lab> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let router = Router::open(RouterConfig::new(dir.path().join("data"), dir.path().join("run"))).unwrap();
        let namespaces = vec![
            ("a", json!({"kubernetes.io/metadata.name": "a", "team": "one", "purpose": "production"})),
            ("b", json!({"kubernetes.io/metadata.name": "b", "team": "two", "purpose": "testing"})),
            ("c", json!({"kubernetes.io/metadata.name": "c", "team": "two"})),
        ];
        let mut lab = Lab { router: Some(router), namespaces, pods: Vec::new(), ends: Vec::new(), round: 0, _dir: dir };
        for namespace in ["a", "b", "c"] {
            for (index, (app, role)) in
                [("web", "front"), ("api", "back"), ("db", "back"), ("web", "")].iter().enumerate()
            {
                let labels = if role.is_empty() { json!({"app": app}) } else { json!({"app": app, "role": role}) };
                lab.add(namespace, format!("p{index}"), labels, PORTS[index % 2]);
            }
        }
        lab.warm_up();
        Some(lab)
    }

    /// A link that was just brought up drops packets until the kernel has given it its queue: nothing is judged before
    /// everything has got through to everyone once.
    fn warm_up(&mut self) {
        self.enforce(false, &[]);
        let all: BTreeSet<Probe> = self.all().into_iter().filter(|probe| !probe.2.starts_with("TCP")).collect();
        let until = Instant::now() + PATIENCE;
        let mut passed = BTreeSet::new();
        while !all.is_subset(&passed) {
            assert!(Instant::now() < until, "links that never came up");
            self.round = self.round.wrapping_add(1);
            passed.extend(self.datagrams(&BTreeSet::new()));
        }
    }

    fn add(&mut self, namespace: &'static str, name: String, labels: Value, http: u16) {
        let request = AttachRequest {
            uid: format!("{namespace}-{name}"),
            namespace: namespace.into(),
            address_key: None,
            kind: LinkKind::Namespace,
            place: network::Place::default(),
        };
        let attachment = self.router.as_ref().unwrap().attach(&request).unwrap();
        let (netns, address) = (attachment.netns.unwrap(), attachment.address);
        let address6 = self.router.as_ref().unwrap().config().v6_of(address);
        let own = [Some(address.into()), attachment.address6.map(IpAddr::from)];
        let ends = || own.into_iter().flatten().map(|address| Ends::new(netns.clone(), address)).collect();
        self.ends.push(in_netns(&netns, ends).unwrap());
        self.pods.push(Pod { namespace, name, labels, address, address6, http });
    }

    /// Puts policies in force through the code under test.
    pub fn enforce(&self, private: bool, policies: &[Value]) {
        let (admin, own): (Vec<&Value>, Vec<&Value>) = policies.iter().partition(|policy| policy["kind"].is_string());
        let own: Vec<Arc<Policy>> = own.into_iter().map(|policy| Arc::new(Policy::read(policy))).collect();
        let baseline = |policy: &Value| policy["kind"] == "BaselineAdminNetworkPolicy";
        let admin: Vec<Arc<AdminPolicy>> =
            admin.into_iter().map(|policy| Arc::new(AdminPolicy::read(policy, baseline(policy)))).collect();
        let namespaces: BTreeMap<String, Value> =
            self.namespaces.iter().map(|(name, labels)| ((*name).to_owned(), labels.clone())).collect();
        let specs: Vec<Value> = self.pods.iter().map(|pod| spec(pod.http)).collect();
        let member = |(pod, spec)| -> Member<'_> {
            let pod: &Pod = pod;
            Member { namespace: pod.namespace, name: &pod.name, labels: &pod.labels, address: pod.address, spec }
        };
        let members: Vec<Member<'_>> = self.pods.iter().zip(&specs).map(member).collect();
        let isolation = if private { Isolation::Private } else { Isolation::Open };
        let nodes = [Node { labels: json!({"zone": "one"}), addresses: vec![Ipv4Addr::new(10, 42, 0, 1).into()] }];
        let router = self.router.as_ref().unwrap();
        let compiled = compile(&World {
            config: router.config(),
            isolation,
            policies: &own,
            by_name: &[],
            admin: &admin,
            namespaces: &namespaces,
            nodes: &nodes,
            members: &members,
        });
        router.sync_policies(compiled.policies).unwrap();
    }

    pub fn index(&self, name: &str) -> usize {
        let wanted = name.split_once('/').unwrap();
        self.pods.iter().position(|pod| (pod.namespace, pod.name.as_str()) == wanted).unwrap()
    }

    /// Every pair, protocol and port that packets may take.
    pub fn all(&self) -> Vec<Probe> {
        let pods = 0..self.pods.len();
        let pairs = pods.clone().flat_map(|from| pods.clone().map(move |to| (from, to)));
        let families = self.ends.first().map_or(0, Vec::len);
        let ways = PROTOCOLS[..families].iter().flat_map(|[tcp, udp, icmp]| {
            PORTS.iter().flat_map(|port| [(*tcp, *port), (*udp, *port)]).chain([(*icmp, 0)])
        });
        pairs.flat_map(|(from, to)| ways.clone().map(move |(protocol, port)| (from, to, protocol, port))).collect()
    }

    /// Every pair and port that packets got through; `expected` are waited for, what comes besides them is found too.
    pub fn probe(&mut self, expected: &BTreeSet<Probe>) -> BTreeSet<Probe> {
        self.round = self.round.wrapping_add(1);
        let mut passed = self.datagrams(expected);
        for from in 0..self.pods.len() {
            for (family, ends) in self.ends[from].iter().enumerate() {
                let pods = &self.pods;
                let connected = in_netns(&ends.netns, || {
                    let mut connected = Vec::new();
                    for (to, pod) in pods.iter().enumerate() {
                        for port in PORTS {
                            match TcpStream::connect_timeout(&(pod.both()[family], port).into(), PATIENCE) {
                                Ok(_) => connected.push((from, to, PROTOCOLS[family][0], port)),
                                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                                Err(e) => panic!("{from} to {to}:{port}: neither accepted nor refused: {e}"),
                            }
                        }
                    }
                    connected
                })
                .unwrap();
                passed.extend(connected);
            }
            for listener in self.ends.iter().flatten().flat_map(|ends| &ends.listeners) {
                while listener.accept().is_ok() {}
            }
        }
        passed
    }

    /// UDP and ICMP: all is sent, what is expected is waited for, and by then whatever else got through has come too: a
    /// packet between namespaces is delivered before the call that sends it returns.
    fn datagrams(&self, expected: &BTreeSet<Probe>) -> BTreeSet<Probe> {
        let mut passed = BTreeSet::new();
        for (from, both) in self.ends.iter().enumerate() {
            for (family, ends) in both.iter().enumerate() {
                for (to, pod) in self.pods.iter().enumerate() {
                    let (address, mark) = (pod.both()[family], [self.round, from as u8, to as u8]);
                    for port in PORTS {
                        // An ICMP error of an earlier one is told by the next call, which sends nothing.
                        while ends.client.send_to(&mark, (address, port)).is_err() {}
                    }
                    let echo = [&[ECHOES[family].0, 0, 0, 0, 0, 0, 0, 0][..], &mark].concat();
                    let at = SocketAddr::new(address, 0);
                    while rustix::net::sendto(&ends.ping, &echo, SendFlags::empty(), &at).is_err() {}
                }
            }
            self.collect(&mut passed);
        }
        let waited = |passed: &BTreeSet<Probe>| {
            expected.iter().all(|probe| probe.2.starts_with("TCP") || passed.contains(probe))
        };
        let until = Instant::now() + PATIENCE;
        while !waited(&passed) && Instant::now() < until {
            std::thread::yield_now();
            self.collect(&mut passed);
        }
        self.collect(&mut passed);
        passed
    }

    fn collect(&self, passed: &mut BTreeSet<Probe>) {
        for (to, both) in self.ends.iter().enumerate() {
            for (family, ends) in both.iter().enumerate() {
                self.collect_one(to, family, ends, passed);
            }
        }
    }

    fn collect_one(&self, to: usize, family: usize, ends: &Ends, passed: &mut BTreeSet<Probe>) {
        let mut buffer = [0; 64];
        let [_, udp, icmp] = PROTOCOLS[family];
        for (server, port) in ends.servers.iter().zip(PORTS) {
            loop {
                match server.recv_from(&mut buffer) {
                    Ok((3, _)) if buffer[0] == self.round => {
                        assert_eq!(usize::from(buffer[2]), to);
                        passed.insert((usize::from(buffer[1]), to, udp, port));
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        loop {
            match rustix::net::recv(&ends.ping, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((11, _)) if buffer[0] == ECHOES[family].1 && buffer[8] == self.round => {
                    passed.insert((usize::from(buffer[9]), usize::from(buffer[10]), icmp, 0));
                }
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {}
            }
        }
    }
}

impl Ends {
    /// Sockets of one family: they are bound to the pod's own address.
    fn new(netns: PathBuf, address: IpAddr) -> Ends {
        let listen = |port| {
            let listener = TcpListener::bind((address, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let serve = |port| {
            let socket = UdpSocket::bind((address, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (family, protocol) = match address {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let ping = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol)).unwrap();
        Ends {
            netns,
            listeners: PORTS.map(listen).into(),
            servers: PORTS.map(serve).into(),
            client: UdpSocket::bind((address, 0)).unwrap(),
            ping,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(router) = self.router.take() {
            router.teardown().unwrap();
        }
    }
}

fn spec(http: u16) -> Value {
    json!({"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": http}]}]})
}
