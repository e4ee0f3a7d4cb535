//! Figures of the network's own work, as JSON; run by `bench/network.py` in a network namespace of its own.
#![allow(clippy::unwrap_used)]

use network::policy::{Allow, Direction, Ports, Profile};
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
        let allow =
            Allow { origin: "bench".into(), anyone: false, group: Some(group.into()), blocks: Vec::new(), ports };
        let profile = Profile { direction: Direction::Ingress, origin: "bench".into(), allows: vec![allow] };
        policies.profiles.insert(format!("profile {n}").into(), profile);
    }
    policies
}

fn main() {
    let dir = std::env::args().nth(1).expect("a scratch directory");
    let dir = std::path::Path::new(&dir);
    let router = Router::open(RouterConfig {
        data_dir: dir.join("data"),
        run_dir: dir.join("run"),
        pod_cidr: "10.42.0.0/16".parse().unwrap(),
        service_cidr: "10.43.0.0/16".parse().unwrap(),
        dns_address: Ipv4Addr::new(10, 43, 0, 10),
    })
    .unwrap();
    let attach = measure(40, |n| {
        router.attach(&request(format!("pod-{n}"))).unwrap();
    });
    let service = |n: u32, count: u32| ServiceRule {
        namespace: "default".into(),
        name: format!("s{n}"),
        cluster_ip: Ipv4Addr::from_bits(0x0a2b_1000 + n),
        protocol: Protocol::Tcp,
        port: 80,
        endpoints: (0..count).map(|m| (Ipv4Addr::from_bits(0x0a2a_1000 + m), 80)).collect(),
        affinity_seconds: None,
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
        profile.allows[0].ports[0].last = 81 + n as u16;
        router.sync_policies(all.clone()).unwrap();
    });
    router.teardown().unwrap();
    println!(
        "{}",
        serde_json::json!({"attach_us": attach, "services_2000_ms": services_all, "service_change_us": services_one,
            "policies_500_ms": policies_all, "policy_member_us": policies_member, "policy_rule_us": policies_rule})
    );
}
