//! Requests of functions' own, in a network namespace that stands for the pod's: a resolver, a web server and a TLS server
//! at addresses of its loopback device.

use super::{ANSWER, Bench, Running, UID};
use function::{AllowList, ConnectSpec, FunctionLimits, FunctionSpec, FunctionStats, launch_connector};
use rustix::thread::LinkNameSpaceType;
use rustls::pki_types::PrivateKeyDer;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PUBLIC: &str = "198.51.100.9";
const INSIDE: &str = "10.77.0.1";
const RESOLVER: &str = "198.51.100.53";
const LARGE: usize = 3 << 20;

struct Outside {
    netns: String,
    /// Connections that came to the address inside.
    inside: Arc<AtomicUsize>,
    roots: PathBuf,
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

/// Runs `work` in a thread that stays in the namespace.
fn within<T: Send + 'static>(netns: &str, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    let file = File::open(format!("/run/netns/{netns}")).unwrap();
    std::thread::spawn(move || {
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
}

fn outside(bench: &Bench) -> Outside {
    let netns = format!("atoll-outbound-{}", std::process::id());
    let ip = |args: &[&str]| assert!(Command::new("ip").args(args).status().unwrap().success(), "{args:?}");
    ip(&["netns", "add", &netns]);
    ip(&["-n", &netns, "link", "set", "lo", "up"]);
    for address in [PUBLIC, INSIDE, RESOLVER] {
        ip(&["-n", &netns, "addr", "add", address, "dev", "lo"]);
    }
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["secure.example".into()]).unwrap().self_signed(&key).unwrap();
    let roots = bench.dir.path().join("roots.pem");
    fs::write(&roots, certificate.pem()).unwrap();
    let inside = Arc::new(AtomicUsize::new(0));
    let seen = inside.clone();
    let listening = within(&netns, move || {
        let bind = |at: &str| TcpListener::bind(at).unwrap();
        let resolver = UdpSocket::bind((RESOLVER, 53)).unwrap();
        std::thread::spawn(move || resolve(&resolver));
        let plain = bind(&format!("{PUBLIC}:8080"));
        std::thread::spawn(move || plain.incoming().flatten().for_each(|stream| drop(answer(stream))));
        let hidden = bind(&format!("{INSIDE}:8080"));
        std::thread::spawn(move || {
            for stream in hidden.incoming().flatten() {
                seen.fetch_add(1, Ordering::SeqCst);
                let _ = answer(stream);
            }
        });
        let tls = bind(&format!("{PUBLIC}:443"));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap());
        let config = Arc::new(config.unwrap());
        std::thread::spawn(move || {
            for stream in tls.incoming().flatten() {
                let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                let _ = answer(rustls::StreamOwned::new(connection, stream));
            }
        });
    });
    listening.join().unwrap();
    Outside { netns, inside, roots }
}

/// Answers A questions; nothing has an IPv6 address.
fn resolve(socket: &UdpSocket) {
    let mut buffer = [0u8; 512];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        let mut answer = buffer[..length].to_vec();
        let (mut name, mut at) = (String::new(), 12);
        while answer[at] > 0 {
            let label = &answer[at + 1..at + 1 + usize::from(answer[at])];
            name.push_str(&format!("{}.", String::from_utf8_lossy(label)));
            at += 1 + label.len();
        }
        let kind = answer[at + 2];
        let address = match name.as_str() {
            "web.example." | "secure.example." | "other.example." => Some([198, 51, 100, 9]),
            "evil.example." | "db.shop.svc.cluster.local." => Some([10, 77, 0, 1]),
            "metadata.example." => Some([169, 254, 169, 254]),
            _ => None,
        };
        answer[2] = 0x81;
        answer[3] = if address.is_some() { 0x80 } else { 0x83 };
        if let (Some(address), 1) = (address, kind) {
            answer[7] = 1;
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
            answer.extend(address);
        }
        socket.send_to(&answer, peer).unwrap();
    }
}

fn answer(mut stream: impl Read + Write) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = [0u8; 4096];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..length]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let body = if path == "/large" { "x".repeat(LARGE) } else { format!("{path} of {}", host_of(&head)) };
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    stream.flush()
}

fn host_of(head: &str) -> String {
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("host:")).unwrap_or_default();
    line.split_once(':').map(|(_, host)| host.trim().to_owned()).unwrap_or_default()
}

impl Outside {
    fn connector(&self, bench: &Bench, allow: &str) -> OwnedFd {
        let (exe, dir) = (bench.exe.clone(), bench.dir.path().join("connect"));
        let spec = ConnectSpec {
            allow: AllowList::parse(allow).unwrap().to_string(),
            resolver: Some(RESOLVER.parse().unwrap()),
            search: vec!["shop.svc.cluster.local".into(), "cluster.local".into()],
        };
        within(&self.netns, move || launch_connector(&exe, &dir, UID + 2, &spec).unwrap()).join().unwrap()
    }

    fn start(&self, bench: &Bench, id: &str, allow: &str, limits: FunctionLimits) -> Running {
        let (path, digest) = bench.store(&wat::parse_str(include_str!("../outbound.wat")).unwrap());
        let code = bench.cache().get(&path, &digest).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log_path = bench.dir.path().join(format!("{id}.log"));
        let log = File::options().create(true).append(true).open(&log_path).unwrap();
        let spec =
            FunctionSpec { id: id.into(), code: code.name, env: vec![], args: vec![], limits, log_max_bytes: 1 << 20 };
        let roots = File::open(&self.roots).unwrap();
        let descriptors = [code.file.as_fd(), listener.as_fd(), log.as_fd()];
        bench.client.add_outbound(spec, descriptors, self.connector(bench, allow), roots).unwrap();
        Running { address, log_path }
    }
}

/// Status and body, which ends with the connection: HTTP/1.0.
fn get(running: &Running, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(running.address).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nhost: shop\r\n\r\n").unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

/// Pids of connectors, and of what is their start.
fn connectors(bench: &Bench) -> Vec<u32> {
    let wanted = bench.dir.path().join("connect").to_str().unwrap().to_owned();
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&wanted)
    })
    .collect()
}

pub fn test(bench: &Bench) {
    let outside = outside(bench);
    let limits = FunctionLimits { outbound_bytes: 1 << 20, ..FunctionLimits::default() };
    let list = format!(
        "web.example:8080, evil.example:8080 metadata.example secure.example nowhere.example db:8080 {PUBLIC}:81"
    );
    let running = outside.start(bench, "asks", &list, limits);
    assert_eq!(get(&running, "/h/web.example:8080/a?b=c"), (200, "/a?b=c of web.example:8080".into()));
    assert_eq!(get(&running, "/s/secure.example/x"), (200, "/x of secure.example".into()));
    assert_eq!(get(&running, "/h/db:8080/y"), (200, "/y of db:8080".into()), "a name of the cluster leads inside");
    assert_eq!(outside.inside.load(Ordering::SeqCst), 1);

    let refused = |path: &str, wanted: &str| {
        let (status, body) = get(&running, path);
        assert!(status == 502 && body.contains(wanted), "{path}: {status} {body}");
    };
    refused("/h/other.example:8080/", "other.example:8080 is not on the list");
    refused("/h/web.example/", "web.example:80 is not on the list");
    refused(&format!("/h/{PUBLIC}:8080/"), "is not on the list");
    refused("/h/127.0.0.1:8080/", "is not on the list");
    refused("/h/evil.example:8080/", "evil.example leads to 10.77.0.1, which is not public");
    refused("/h/metadata.example/latest", "leads to 169.254.169.254, where no function may go");
    // DNS-error, connection-refused, HTTP-request-URI-invalid.
    refused("/h/nowhere.example/", "01");
    refused(&format!("/h/{PUBLIC}:81/"), "06");
    refused("/h/user@web.example:8080/", "19");
    assert_eq!(outside.inside.load(Ordering::SeqCst), 1, "nothing came to the address inside");
    running.logged("the request to http://other.example:8080 failed: other.example:8080 is not on the list");
    let (status, body) = get(&running, "/h/web.example:8080/large");
    assert!(status == 200 && body.len() < LARGE, "{} bytes", body.len());

    let widened = outside.start(bench, "widened", "evil.example:8080 10.77.0.0/16:8080", FunctionLimits::default());
    assert_eq!(get(&widened, "/h/evil.example:8080/").0, 200, "unless the list says so");
    foreign_certificate(bench, &outside);
    mute(bench);

    let stats: FunctionStats = bench.client.stats("asks").unwrap();
    assert_eq!(stats.outbound_requests, 12, "those that were no requests are not counted: {stats:?}");
    assert!(stats.outbound_sent_bytes > 100 && stats.outbound_received_bytes > 1 << 20, "{stats:?}");
    jailed(bench, &outside);
    endings(bench);
}

fn foreign_certificate(bench: &Bench, outside: &Outside) {
    let kept = fs::read(&outside.roots).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let other = rcgen::CertificateParams::new(["secure.example".into()]).unwrap().self_signed(&key).unwrap();
    fs::write(&outside.roots, other.pem()).unwrap();
    let running = outside.start(bench, "distrusts", "secure.example", FunctionLimits::default());
    let (status, body) = get(&running, "/s/secure.example/");
    assert!(status == 502 && body.contains("TLS: secure.example:443: invalid peer certificate"), "{body}");
    fs::write(&outside.roots, kept).unwrap();
}

/// Without a list nothing is sent, and the component is told.
fn mute(bench: &Bench) {
    let (path, digest) = bench.store(&wat::parse_str(include_str!("../outbound.wat")).unwrap());
    let running = bench.start_component("mute", &path, &digest, FunctionLimits::default(), &[]).unwrap();
    let (status, body) = get(&running, "/h/web.example:8080/secret");
    assert!(
        status == 502 && body.contains("http://web.example:8080 was refused") && !body.contains("secret"),
        "{body}"
    );
    let none = FunctionLimits { outbound_requests: 0, ..FunctionLimits::default() };
    let _ = bench.start("beside-mute", ANSWER, none);
}

fn jailed(bench: &Bench, outside: &Outside) {
    let pids = connectors(bench);
    assert_eq!(pids.len(), 3, "one for each function that asks");
    let status = fs::read_to_string(format!("/proc/{}/status", pids[0])).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}:\n{status}");
    }
    assert!(status.contains(&format!("Uid:\t{0}\t{0}\t{0}\t{0}", UID + 2)), "{status}");
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "pid", "ipc", "uts"] {
        assert_ne!(of(&pids[0].to_string(), kind), of("self", kind), "{kind} namespace");
    }
    let pods = within(&outside.netns, || fs::read_link("/proc/thread-self/ns/net").unwrap()).join().unwrap();
    assert_eq!(of(&pids[0].to_string(), "net"), pods);
    assert_eq!(fs::read_dir(format!("/proc/{}/root", pids[0])).unwrap().count(), 0, "its root is empty");
}

/// A connector ends with its function; a function ends with its connector.
fn endings(bench: &Bench) {
    let until = |count: usize| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while connectors(bench).len() != count {
            assert!(Instant::now() < deadline, "{:?}", connectors(bench));
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    bench.client.forget("widened").unwrap();
    bench.client.forget("distrusts").unwrap();
    until(1);
    let pid = connectors(bench)[0].to_string();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    let exit = bench.exit_of("asks");
    assert_eq!((exit.code, exit.message.as_str()), (255, "its connector ended"));
    bench.client.forget("asks").unwrap();
    until(0);
}
