//! The cluster's DNS server, asked from a workload.

use crate::changes::SERVICES;
use network::dns::{ServiceKind, ServiceRecord, Views, codec};
use network::{DnsServer, Records, Router, in_netns};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

const TURN: Duration = Duration::from_secs(2);

/// Seconds of CPU that the server's UDP threads have used.
fn cpu() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).ok();
    let ticks = tasks.filter_map(stat).filter(|stat| stat.contains("(atoll-dns-udp)")).map(|stat| {
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
    });
    ticks.sum::<f64>() / 100.0
}

/// Answers for each second of the server's CPU time and of the clock; and how long one takes where one question is asked
/// at a time.
pub fn measure(router: &Router, netns: &Path) -> serde_json::Value {
    let at = SocketAddr::from((Ipv4Addr::new(10, 43, 0, 10), 53));
    let server = DnsServer::start(router, at, vec![]).unwrap();
    let service = |n: u32| ServiceRecord {
        namespace: "default".into(),
        name: format!("s{n}"),
        kind: ServiceKind::ClusterIp(vec![Ipv4Addr::from_bits(0x0a2b_1000 + n).into()]),
        ports: vec![],
    };
    server.set(&Records { services: (0..SERVICES).map(service).collect() });
    server.set_views(Views::open());
    in_netns(netns, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let question = codec::question(9, "s77.default.svc.cluster.local", codec::TYPE_A, Some(1232));
        let (begun, before, mut count) = (Instant::now(), cpu(), 0);
        while begun.elapsed() < TURN {
            for _ in 0..16 {
                socket.send(&question).unwrap();
            }
            for _ in 0..16 {
                socket.recv(&mut [0; 512]).unwrap();
            }
            count += 16;
        }
        let count = f64::from(count);
        let (per_core, a_second) = (count / (cpu() - before), count / begun.elapsed().as_secs_f64());
        let mut each: Vec<f64> = (0..20_000)
            .map(|_| {
                let begun = Instant::now();
                socket.send(&question).unwrap();
                socket.recv(&mut [0; 512]).unwrap();
                begun.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        each.sort_by(f64::total_cmp);
        serde_json::json!({
            "dns_answers_per_core_s": per_core,
            "dns_answers_per_s": a_second,
            "dns_median_us": each[each.len() / 2],
            "dns_p99_us": each[each.len() * 99 / 100],
        })
    })
    .unwrap()
}
