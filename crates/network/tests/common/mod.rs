//! What the tests share: a router of their own, and threads that serve and connect inside workloads' namespaces.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod outside;
pub mod uplinked;

use network::{
    AttachRequest, Attachment, Isolation, Limits, LinkKind, Policies, Protocol, Router, RouterConfig, ServiceRule,
    in_netns,
};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub use outside::{Netns, ip, outside};

pub struct Lab {
    pub router: Option<Router>,
    pub dir: tempfile::TempDir,
}

/// `None` (said aloud) where network namespaces cannot be made.
pub fn lab() -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let router = Router::open(config(dir.path())).unwrap();
    Some(Lab { router: Some(router), dir })
}

pub fn config(dir: &Path) -> RouterConfig {
    RouterConfig::new(dir.join("data"), dir.join("run"))
}

impl Lab {
    pub fn router(&self) -> &Router {
        self.router.as_ref().unwrap()
    }
    pub fn reopen(&mut self) {
        self.router = None;
        self.router = Some(Router::open(config(self.dir.path())).unwrap());
    }
    pub fn reopen_with(&mut self, limits: Limits) {
        self.router = None;
        self.router = Some(Router::open(RouterConfig { limits, ..config(self.dir.path()) }).unwrap());
    }
    pub fn pod(&self, uid: &str) -> Attachment {
        self.attach(&request(uid))
    }
    /// Attaches and lets the workload follow its namespace's default, as all others do.
    pub fn attach(&self, request: &AttachRequest) -> Attachment {
        let attachment = self.router().attach(request).unwrap();
        self.defaults(Isolation::Private);
        attachment
    }
    pub fn defaults(&self, isolation: Isolation) {
        let leases = self.router().leases();
        let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
        self.router().sync_policies(Policies::without_rules(isolation, workloads)).unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(router) = self.router.take() {
            router.teardown().unwrap();
        }
    }
}

pub fn request(uid: &str) -> AttachRequest {
    AttachRequest {
        uid: uid.into(),
        namespace: "default".into(),
        address_key: None,
        kind: LinkKind::Namespace,
        place: network::Place::default(),
    }
}

pub fn netns(attachment: &Attachment) -> PathBuf {
    attachment.netns.clone().unwrap()
}

/// Runs a program in a namespace: whether it succeeded, and all it said.
pub fn run(netns: &Path, program: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new("nsenter").arg(format!("--net={}", netns.display())).arg(program).args(args).output();
    let output = output.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A TCP server in the workload's namespace that greets with `name` and the client's address.
pub fn greet(attachment: &Attachment, port: u16, name: &str) {
    let listener = in_netns(&netns(attachment), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    let name = name.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(format!("{name} {peer}").as_bytes());
        }
    });
}

/// A UDP server that answers with `name`.
pub fn greet_udp(attachment: &Attachment, port: u16, name: &str) {
    let socket = in_netns(&netns(attachment), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    let name = name.to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), client);
        }
    });
}

/// Connects and reads all that comes.
pub fn call(address: Ipv4Addr, port: u16) -> std::io::Result<String> {
    let to = SocketAddr::V4(SocketAddrV4::new(address, port));
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

pub fn call_from(from: &Attachment, address: Ipv4Addr, port: u16) -> std::io::Result<String> {
    in_netns(&netns(from), || call(address, port)).unwrap()
}

pub fn service<A: Into<IpAddr> + Copy>(ip: A, protocol: Protocol, port: u16, endpoints: &[(A, u16)]) -> ServiceRule {
    ServiceRule {
        namespace: "default".into(),
        name: format!("s{port}"),
        cluster_ip: ip.into(),
        protocol,
        port,
        endpoints: endpoints.iter().map(|(address, port)| ((*address).into(), *port)).collect(),
        affinity_seconds: None,
        sources: Vec::new(),
        activated: false,
    }
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
