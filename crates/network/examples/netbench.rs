//! Figures of the network, as JSON, beside a plain veth pair in the same run; `bench/network.sh` runs it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use network::dns::{ServiceKind, ServiceRecord, Views, codec};
use network::{DnsServer, Records, in_netns};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use network::policy::{Action, Direction, Otherwise, Ports, Profile, Rule};
use network::{AttachRequest, Isolation, LinkKind, Policies, Protocol, Router, RouterConfig, ServiceRule};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Instant;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn measure(count: usize, mut work: impl FnMut(usize)) -> f64 {
    let times = (0..count).map(|n| {
        let begun = Instant::now();
        work(n);
        begun.elapsed().as_secs_f64() * 1e6
    });
    median(times.collect())
}

fn request(uid: String) -> AttachRequest {
    AttachRequest { uid, namespace: "default".into(), address_key: None, kind: LinkKind::Namespace }
}

fn policies(router: &Router, count: u32) -> Policies {
    let leases = router.leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    for n in 0..count {
        let group = format!("group {n}");
        let members: BTreeSet<Ipv4Addr> = (0..20).map(|m| Ipv4Addr::from_bits(0x0a2a_1000 + n * 20 + m)).collect();
        policies.groups.insert(group.as_str().into(), members);
        let ports = vec![Ports { protocol: Protocol::Tcp, first: 80, last: 80 }];
        let rule = Rule {
            origin: "bench".into(),
            action: Action::Allow,
            anyone: false,
            group: Some(group.into()),
            blocks: Default::default(),
            ports,
        };
        let profile = Profile {
            direction: Direction::Ingress,
            origin: "bench".into(),
            rules: vec![rule],
            otherwise: Otherwise::Refuse,
        };
        policies.profiles.insert(format!("profile {n}").into(), profile);
    }
    policies
}

const ROUND: Duration = Duration::from_millis(700);

/// Serves connections: what comes is read to its end.
fn sink(netns: &Path, port: u16) {
    let listener = in_netns(netns, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
        }
    });
}

/// Connections a second, one after another.
fn connects(netns: &Path, to: (Ipv4Addr, u16)) -> f64 {
    in_netns(netns, || {
        let (begun, mut count) = (Instant::now(), 0);
        while begun.elapsed() < ROUND {
            TcpStream::connect(to).unwrap();
            count += 1;
        }
        f64::from(count) / begun.elapsed().as_secs_f64()
    })
    .unwrap()
}

/// Gigabits a second of one stream.
fn throughput(netns: &Path, to: (Ipv4Addr, u16)) -> f64 {
    in_netns(netns, || {
        let mut stream = TcpStream::connect(to).unwrap();
        let (begun, mut sent, buffer) = (Instant::now(), 0, vec![1; 256 << 10]);
        while begun.elapsed() < ROUND {
            sent += stream.write(&buffer).unwrap();
        }
        sent as f64 * 8e-9 / begun.elapsed().as_secs_f64()
    })
    .unwrap()
}

/// Two namespaces joined by nothing but a veth pair.
fn plain_pair() -> (PathBuf, PathBuf) {
    let names = ["a", "b"].map(|end| format!("netbench-{}-{end}", std::process::id()));
    let ip = |args: &str| assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "{args}");
    for name in &names {
        ip(&format!("netns add {name}"));
    }
    ip(&format!("link add nb0 netns {} type veth peer name nb1 netns {}", names[0], names[1]));
    for (index, name) in names.iter().enumerate() {
        ip(&format!("-n {name} addr add 192.0.2.{}/24 dev nb{index}", index + 1));
        ip(&format!("-n {name} link set nb{index} up"));
    }
    let [a, b] = names.map(|name| PathBuf::from(format!("/run/netns/{name}")));
    (a, b)
}

/// Seconds of CPU that the DNS server's UDP threads have used.
fn dns_cpu() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).ok();
    let ticks = tasks.filter_map(stat).filter(|stat| stat.contains("(atoll-dns-udp)")).map(|stat| {
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
    });
    ticks.sum::<f64>() / 100.0
}

/// Answers for each second of the server's CPU time, answers a second, and the 99th percentile of the microseconds that one
/// answer takes where one question is asked at a time.
fn dns(router: &Router, netns: &Path) -> (f64, f64, f64) {
    let at = SocketAddr::from((Ipv4Addr::new(10, 43, 0, 10), 53));
    let server = DnsServer::start(router, at, vec![]).unwrap();
    let service = |n: u32| ServiceRecord {
        namespace: "default".into(),
        name: format!("s{n}"),
        kind: ServiceKind::ClusterIp(vec![Ipv4Addr::from_bits(0x0a2b_1000 + n).into()]),
        ports: vec![],
    };
    server.set(&Records { services: (0..2000).map(service).collect() });
    server.set_views(Views::open());
    in_netns(netns, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let question = codec::question(9, "s77.default.svc.cluster.local", codec::TYPE_A, Some(1232));
        let (begun, cpu, mut count) = (Instant::now(), dns_cpu(), 0);
        while begun.elapsed() < ROUND * 3 {
            for _ in 0..16 {
                socket.send(&question).unwrap();
            }
            for _ in 0..16 {
                socket.recv(&mut [0; 512]).unwrap();
            }
            count += 16;
        }
        let count = f64::from(count);
        let (per_core, a_second) = (count / (dns_cpu() - cpu), count / begun.elapsed().as_secs_f64());
        let mut each: Vec<f64> = (0..20_000)
            .map(|_| {
                let begun = Instant::now();
                socket.send(&question).unwrap();
                socket.recv(&mut [0; 512]).unwrap();
                begun.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        each.sort_by(f64::total_cmp);
        (per_core, a_second, each[each.len() * 99 / 100])
    })
    .unwrap()
}

/// Plain pair, pod to pod, through a Service: in turn, three times, medians.
fn traffic(router: &Router) -> serde_json::Value {
    let [client, server] = ["client", "server"].map(|uid| router.attach(&request(uid.to_owned())).unwrap());
    router.sync_policies(policies(router, 500)).unwrap();
    let (from, to) = (client.netns.unwrap(), server.netns.unwrap());
    let (plain_from, plain_to) = plain_pair();
    sink(&to, 80);
    sink(&plain_to, 80);
    let service = |endpoint| ServiceRule {
        namespace: "default".into(),
        name: "server".into(),
        cluster_ip: Ipv4Addr::new(10, 43, 0, 80).into(),
        protocol: Protocol::Tcp,
        port: 80,
        endpoints: vec![(std::net::IpAddr::V4(endpoint), 80)],
        affinity_seconds: None,
        sources: Vec::new(),
    };
    router.sync_services(&[service(server.address)]).unwrap();
    let ways = [
        (&plain_from, (Ipv4Addr::new(192, 0, 2, 2), 80)),
        (&from, (server.address, 80)),
        (&from, (Ipv4Addr::new(10, 43, 0, 80), 80)),
    ];
    let mut rates: [Vec<f64>; 3] = Default::default();
    let mut speeds: [Vec<f64>; 3] = Default::default();
    for _ in 0..3 {
        for (index, (netns, at)) in ways.iter().enumerate() {
            rates[index].push(connects(netns, *at));
            speeds[index].push(throughput(netns, *at));
        }
    }
    let [plain, direct, through] = rates.map(median);
    let [plain_gbit, direct_gbit, _] = speeds.map(median);
    for netns in [plain_from, plain_to] {
        let name = netns.file_name().unwrap().to_owned();
        Command::new("ip").args(["netns", "del"]).arg(name).status().unwrap();
    }
    let (per_core, a_second, p99) = dns(router, &from);
    serde_json::json!({
        "connects_per_s": {"plain_veth": plain, "pod_to_pod": direct, "through_service": through},
        "service_to_direct": direct / through,
        "gbit_per_s": {"plain_veth": plain_gbit, "pod_to_pod": direct_gbit, "ratio": direct_gbit / plain_gbit},
        "dns_answers_per_core_s": per_core,
        "dns_answers_per_s": a_second,
        "dns_p99_us": p99,
    })
}

/// Of this process.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn main() {
    let dir = std::env::args().nth(1).expect("a scratch directory");
    let dir = std::path::Path::new(&dir);
    let router = Router::open(RouterConfig::new(dir.join("data"), dir.join("run"))).unwrap();
    let attach = measure(40, |n| {
        router.attach(&request(format!("pod-{n}"))).unwrap();
    });
    let service = |n: u32, count: u32| ServiceRule {
        namespace: "default".into(),
        name: format!("s{n}"),
        cluster_ip: Ipv4Addr::from_bits(0x0a2b_1000 + n).into(),
        protocol: Protocol::Tcp,
        port: 80,
        endpoints: (0..count).map(|m| (Ipv4Addr::from_bits(0x0a2a_1000 + m).into(), 80)).collect(),
        affinity_seconds: None,
        sources: Vec::new(),
    };
    let mut services: Vec<ServiceRule> = (0..2000).map(|n| service(n, 5)).collect();
    let begun = Instant::now();
    router.sync_services(&services).unwrap();
    let services_all = begun.elapsed().as_secs_f64() * 1e3;
    let services_one = measure(30, |n| {
        services[7] = service(7, 1 + n as u32 % 5 + u32::from(n % 2 == 0) * 5);
        router.sync_services(&services).unwrap();
    });
    let mut all = policies(&router, 500);
    let begun = Instant::now();
    router.sync_policies(all.clone()).unwrap();
    let policies_all = begun.elapsed().as_secs_f64() * 1e3;
    let policies_member = measure(30, |n| {
        let group = all.groups.values_mut().next().unwrap();
        group.insert(Ipv4Addr::from_bits(0x0a2a_f000 + n as u32));
        router.sync_policies(all.clone()).unwrap();
    });
    let policies_rule = measure(30, |n| {
        let profile = all.profiles.values_mut().next().unwrap();
        profile.rules[0].ports[0].last = 81 + n as u16;
        router.sync_policies(all.clone()).unwrap();
    });
    // With 2,000 Services, 10,000 endpoints and 500 policies in force, and their copies here.
    let memory = resident_kib();
    let traffic = traffic(&router);
    router.teardown().unwrap();
    println!(
        "{:#}",
        serde_json::json!({"traffic": traffic, "attach_us": attach, "services_2000_ms": services_all, "service_change_us": services_one,
            "policies_500_ms": policies_all, "policy_member_us": policies_member, "policy_rule_us": policies_rule, "resident_kib": memory})
    );
}
