//! What changes cost: workloads that come, Services and policies that change.

use crate::ways::median;
use network::policy::{Action, Direction, Otherwise, Ports, Profile, Rule};
use network::{AttachRequest, Isolation, LinkKind, Policies, Protocol, Router, ServiceRule};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

pub const SERVICES: u32 = 2000;
pub const POLICIES: u32 = 500;
/// Workloads that are attached, one after another.
const PODS: usize = 200;
/// Links that are kept prepared.
const POOL: usize = 8;

/// Microseconds of each turn.
fn each(count: usize, mut work: impl FnMut(usize)) -> Vec<f64> {
    let turn = |n| {
        let begun = Instant::now();
        work(n);
        begun.elapsed().as_secs_f64() * 1e6
    };
    (0..count).map(turn).collect()
}

fn milliseconds(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64() * 1e3
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

/// Attaching, from prepared links and without, with few and with many workloads there.
pub fn attach(router: &Router) -> serde_json::Value {
    let attach = |uid: String| {
        router.attach(&request(&uid)).unwrap();
    };
    let times = each(PODS, |n| attach(format!("pod-{n}")));
    let (few, many) = (times[..PODS / 4].to_vec(), times[PODS * 3 / 4..].to_vec());
    let pooled: Vec<f64> = std::thread::scope(|scope| {
        scope.spawn(|| router.keep_prepared(POOL));
        let times = (0..PODS / 2).map(|n| {
            while router.prepared() < POOL {
                std::thread::sleep(Duration::from_millis(1));
            }
            each(1, |_| attach(format!("pooled-{n}")))[0]
        });
        let times = times.collect();
        router.stop_preparing();
        times
    });
    let detach = each(PODS / 4, |n| router.detach(&format!("pod-{n}")).unwrap());
    serde_json::json!({
        "attach_from_pool_us": median(pooled), "attach_us": median(few), "attach_us_with_150_more": median(many),
        "detach_us": median(detach),
    })
}

pub fn service_address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a2b_1000 + n)
}

pub fn service(n: u32, endpoints: Vec<Ipv4Addr>) -> ServiceRule {
    ServiceRule {
        namespace: "default".into(),
        name: format!("s{n}"),
        cluster_ip: service_address(n).into(),
        protocol: Protocol::Tcp,
        port: 80,
        endpoints: endpoints.into_iter().map(|address| (address.into(), 80)).collect(),
        affinity_seconds: None,
        sources: Vec::new(),
        activated: false,
    }
}

/// [`SERVICES`] with five endpoints each.
pub fn services(router: &Router) -> serde_json::Value {
    let endpoints = |count: u32| (0..count).map(|m| Ipv4Addr::from_bits(0x0a2a_1000 + m)).collect();
    let mut all: Vec<ServiceRule> = (0..SERVICES).map(|n| service(n, endpoints(5))).collect();
    let first = milliseconds(|| {
        router.sync_services(&all).unwrap();
    });
    let one = each(30, |n| {
        all[7] = service(7, endpoints(1 + n as u32 % 5 + u32::from(n % 2 == 0) * 5));
        router.sync_services(&all).unwrap();
    });
    serde_json::json!({"services_2000_ms": first, "service_change_us": median(one)})
}

/// [`POLICIES`] that select nobody in particular, beside the default.
pub fn some_policies(router: &Router, count: u32) -> Policies {
    let leases = router.leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    for n in 0..count {
        let group = format!("group {n}");
        let members: BTreeSet<Ipv4Addr> = (0..20).map(|m| Ipv4Addr::from_bits(0x0a2a_1000 + n * 20 + m)).collect();
        policies.groups.insert(group.as_str().into(), members);
        let rule = Rule {
            origin: "bench".into(),
            action: Action::Allow,
            anyone: false,
            group: Some(group.into()),
            blocks: Default::default(),
            names: None,
            ports: vec![Ports { protocol: Protocol::Tcp, first: 80, last: 80 }],
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

pub fn policies(router: &Router) -> serde_json::Value {
    let mut all = some_policies(router, POLICIES);
    let first = milliseconds(|| {
        router.sync_policies(all.clone()).unwrap();
    });
    let member = each(30, |n| {
        all.groups.values_mut().next().unwrap().insert(Ipv4Addr::from_bits(0x0a2a_f000 + n as u32));
        router.sync_policies(all.clone()).unwrap();
    });
    let rule = each(30, |n| {
        all.profiles.values_mut().next().unwrap().rules[0].ports[0].last = 81 + n as u16;
        router.sync_policies(all.clone()).unwrap();
    });
    serde_json::json!({"policies_500_ms": first, "policy_member_us": median(member), "policy_rule_us": median(rule)})
}
