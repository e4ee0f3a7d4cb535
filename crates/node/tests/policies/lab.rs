//! Pods that are network namespaces, and every pair and port between them tried with real packets.

use crate::model::Pod;
use network::{AttachRequest, Isolation, LinkKind, Router, RouterConfig, in_netns};
use node::policy::{AdminPolicy, Member, Node, Policy, World, compile};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const PORTS: [u16; 2] = [80, 81];
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Lab {
    pub router: Option<Router>,
    pub namespaces: Vec<(&'static str, Value)>,
    pub pods: Vec<Pod>,
    ends: Vec<Ends>,
    round: u8,
    _dir: tempfile::TempDir,
}

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
        let pods = 0..self.pods.len();
        let all: BTreeSet<Probe> = pods
            .clone()
            .flat_map(|from| pods.clone().map(move |to| (from, to)))
            .flat_map(|(from, to)| [(from, to, "UDP", PORTS[0]), (from, to, "UDP", PORTS[1]), (from, to, "ICMP", 0)])
            .collect();
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
        };
        let attachment = self.router.as_ref().unwrap().attach(&request).unwrap();
        let (netns, address) = (attachment.netns.unwrap(), attachment.address);
        self.ends.push(in_netns(&netns, || Ends::new(netns.clone(), address)).unwrap());
        self.pods.push(Pod { namespace, name, labels, address, http });
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
        let nodes = [Node { labels: json!({"zone": "one"}), addresses: vec![Ipv4Addr::new(10, 42, 0, 1)] }];
        let compiled = compile(&World {
            isolation,
            policies: &own,
            admin: &admin,
            namespaces: &namespaces,
            nodes: &nodes,
            members: &members,
        });
        self.router.as_ref().unwrap().sync_policies(compiled.policies).unwrap();
    }

    pub fn index(&self, name: &str) -> usize {
        let wanted = name.split_once('/').unwrap();
        self.pods.iter().position(|pod| (pod.namespace, pod.name.as_str()) == wanted).unwrap()
    }

    /// Every pair and port that packets got through; `expected` are waited for, what comes besides them is found too.
    pub fn probe(&mut self, expected: &BTreeSet<Probe>) -> BTreeSet<Probe> {
        self.round = self.round.wrapping_add(1);
        let mut passed = self.datagrams(expected);
        for from in 0..self.pods.len() {
            let pods = &self.pods;
            let connected = in_netns(&self.ends[from].netns, || {
                let mut connected = Vec::new();
                for (to, pod) in pods.iter().enumerate() {
                    for port in PORTS {
                        let at = SocketAddrV4::new(pod.address, port);
                        match TcpStream::connect_timeout(&at.into(), PATIENCE) {
                            Ok(_) => connected.push((from, to, "TCP", port)),
                            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                            Err(e) => panic!("{from} to {to}:{port}: neither accepted nor refused: {e}"),
                        }
                    }
                }
                connected
            })
            .unwrap();
            passed.extend(connected);
            for listener in self.ends.iter().flat_map(|ends| &ends.listeners) {
                while listener.accept().is_ok() {}
            }
        }
        passed
    }

    /// UDP and ICMP: all is sent, what is expected is waited for, and by then whatever else got through has come too: a
    /// packet between namespaces is delivered before the call that sends it returns.
    fn datagrams(&self, expected: &BTreeSet<Probe>) -> BTreeSet<Probe> {
        let mut passed = BTreeSet::new();
        for (from, ends) in self.ends.iter().enumerate() {
            for (to, pod) in self.pods.iter().enumerate() {
                let mark = [self.round, from as u8, to as u8];
                for port in PORTS {
                    // An ICMP error of an earlier one is told by the next call, which sends nothing.
                    while ends.client.send_to(&mark, (pod.address, port)).is_err() {}
                }
                let echo = [&[8, 0, 0, 0, 0, 0, 0, 0][..], &mark].concat();
                let at = SocketAddrV4::new(pod.address, 0);
                while rustix::net::sendto(&ends.ping, &echo, SendFlags::empty(), &at).is_err() {}
            }
            self.collect(&mut passed);
        }
        let waited = |passed: &BTreeSet<Probe>| expected.iter().all(|probe| probe.2 == "TCP" || passed.contains(probe));
        let until = Instant::now() + PATIENCE;
        while !waited(&passed) && Instant::now() < until {
            std::thread::yield_now();
            self.collect(&mut passed);
        }
        self.collect(&mut passed);
        passed
    }

    fn collect(&self, passed: &mut BTreeSet<Probe>) {
        for (to, ends) in self.ends.iter().enumerate() {
            let mut buffer = [0; 64];
            for (server, port) in ends.servers.iter().zip(PORTS) {
                loop {
                    match server.recv_from(&mut buffer) {
                        Ok((3, _)) if buffer[0] == self.round => {
                            assert_eq!(usize::from(buffer[2]), to);
                            passed.insert((usize::from(buffer[1]), to, "UDP", port));
                        }
                        Ok(_) => {}
                        Err(_) => break,
                    }
                }
            }
            loop {
                match rustix::net::recv(&ends.ping, &mut buffer[..], RecvFlags::DONTWAIT) {
                    Ok((11, _)) if buffer[0] == 0 && buffer[8] == self.round => {
                        passed.insert((usize::from(buffer[9]), usize::from(buffer[10]), "ICMP", 0));
                    }
                    Ok(_) => {}
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(_) => {}
                }
            }
        }
    }
}

impl Ends {
    fn new(netns: PathBuf, address: Ipv4Addr) -> Ends {
        let listen = |port| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let serve = |port| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let ping = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP));
        Ends {
            netns,
            listeners: PORTS.map(listen).into(),
            servers: PORTS.map(serve).into(),
            client: UdpSocket::bind((address, 0)).unwrap(),
            ping: ping.unwrap(),
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
