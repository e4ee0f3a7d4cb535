//! Figures of the network, as a table on standard error and JSON on standard output, beside a plain veth pair, loopback and
//! a bridge with iptables rules in the same run; `bench/network.sh` runs it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod changes;
mod names;
mod peers;
mod ways;

use network::{Limits, Router, RouterConfig};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::path::Path;
use ways::Way;

/// Of this process.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Two workloads, and ways between them: directly, through the only Service, and through the last of 2,000. The kernel holds
/// 500 policies and what else `main` has made.
struct Pair {
    from: std::path::PathBuf,
    to: std::path::PathBuf,
    server: Ipv4Addr,
}

impl Pair {
    fn attach(router: &Router) -> Pair {
        let [client, server] = ["client", "server"].map(|uid| router.attach(&changes::request(uid)).unwrap());
        router.sync_policies(changes::some_policies(router, changes::POLICIES)).unwrap();
        Pair { from: client.netns.unwrap(), to: server.netns.unwrap(), server: server.address }
    }
    fn service(&self, router: &Router, name: &'static str, count: u32) -> Way {
        let all: Vec<_> = (0..count).map(|n| changes::service(n, vec![self.server])).collect();
        router.sync_services(&all).unwrap();
        let at = (changes::service_address(count - 1), ways::PORT).into();
        Way { name, from: self.from.clone(), to: self.to.clone(), at }
    }
    fn direct(&self) -> Way {
        let at = (self.server, ways::PORT).into();
        Way { name: "pods", from: self.from.clone(), to: self.to.clone(), at }
    }
}

/// The figures of all ways, and what the issue asks for of them. `only`: names of the ways that are wanted; empty: all.
fn traffic(router: &Router, pair: &Pair, rounds: usize, only: &[String]) -> (Value, Value) {
    let mut own = peers::Namespaces::none();
    let mut all = peers::plain(&mut own).to_vec();
    match peers::bridge(&mut own, changes::SERVICES) {
        Ok(ways) => all.extend(ways),
        Err(why) => eprintln!("skipped: bridge with iptables: {why}"),
    }
    all.extend([pair.direct(), pair.service(router, "pods_service", 1)]);
    let wanted = |way: &Way| only.is_empty() || only.iter().any(|name| name == way.name);
    all.retain(wanted);
    let few = ways::measure(&all, rounds);
    let mut many = vec![pair.direct(), pair.service(router, "pods_service_2000", changes::SERVICES)];
    many.extend(all.into_iter().filter(|way| way.name == "bridge_service"));
    many.retain(wanted);
    let many = ways::measure(&many, rounds);
    let ratios = json!({
        "throughput_to_veth": few.ratio("gbit_per_core_s", "pods", "veth"),
        "throughput_to_veth_two_cores": few.ratio("gbit_per_s", "pods", "veth"),
        "throughput_to_bridge": few.ratio("gbit_per_core_s", "pods", "bridge"),
        "throughput_of_service_to_veth": few.ratio("gbit_per_core_s", "pods_service", "veth"),
        "requests_to_veth": few.ratio("request_us", "veth", "pods"),
        "requests_to_veth_two_cores": few.ratio("requests_per_s", "pods", "veth"),
        "requests_to_bridge": few.ratio("request_us", "bridge", "pods"),
        "connect_cost_to_veth": few.ratio("connect_us", "pods", "veth"),
        "connect_cost_of_service_to_direct": few.ratio("connect_us", "pods_service", "pods"),
        "connect_cost_of_one_of_2000_to_direct": many.ratio("connect_us", "pods_service_2000", "pods"),
        "connect_cost_of_one_of_2000_to_bridge": many.ratio("connect_us", "pods_service_2000", "bridge_service"),
    });
    let mut figures = few.medians();
    if let Some(own) = many.medians().get("pods_service_2000") {
        figures["pods_service_2000"] = own.clone();
    }
    (figures, ratios)
}

fn table(figures: &Value) {
    let columns = ways::FIGURES;
    eprintln!("{:<20}{}", "", columns.map(|column| format!("{column:>17}")).concat());
    for (way, own) in figures.as_object().unwrap() {
        let cells = columns.map(|column| format!("{:>17.1}", own[column].as_f64().unwrap_or_default()));
        eprintln!("{way:<20}{}", cells.concat());
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a scratch directory; then rounds, then names of ways");
    let rounds = args.next().map_or(ways::ROUNDS, |rounds| rounds.parse().unwrap());
    let only: Vec<String> = args.collect();
    let dir = Path::new(&dir);
    let mut config = RouterConfig::new(dir.join("data"), dir.join("run"));
    // One workload asks and connects as fast as it can.
    config.limits = Limits { connections: 1 << 20, questions: 1 << 20 };
    let router = Router::open(config).unwrap();
    let mut all = json!({});
    let mut add = |figures: Value| all.as_object_mut().unwrap().extend(figures.as_object().unwrap().clone());
    if only.is_empty() || only == ["attach"] {
        add(changes::attach(&router));
    }
    if only.is_empty() {
        for figures in [changes::services(&router), changes::policies(&router)] {
            add(figures);
        }
        // With 2,000 Services, 10,000 endpoints and 500 policies in force, and their copies here.
        add(json!({"resident_kib": resident_kib()}));
    }
    let pair = Pair::attach(&router);
    if only.is_empty() {
        add(names::measure(&router, &pair.from));
    }
    let (figures, ratios) = traffic(&router, &pair, rounds, &only);
    table(&figures);
    add(json!({"ratios": ratios, "traffic": figures}));
    router.teardown().unwrap();
    for (name, value) in all.as_object().unwrap().iter().chain(all["ratios"].as_object().unwrap()) {
        if let Some(value) = value.as_f64() {
            eprintln!("{name:<34}{value:>14.2}");
        }
    }
    println!("{all:#}");
}
