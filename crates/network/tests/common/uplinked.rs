//! A host with one link to a world that has servers, and what of the host could be touched.

use super::outside::{Netns, ip, outside};
use super::{Lab, run};
use network::policy::{Action, Direction, Network, Otherwise, Profile, Rule, ranges};
use network::{Egress, in_netns};
use rustix::fd::AsFd;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;

pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
pub const ALIAS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
pub const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
pub const ALIAS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
pub const WORLD6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A host with one link to a world that has servers; both go with it.
pub struct Outside {
    pub host: Netns,
    pub world: Netns,
}

impl Outside {
    pub fn new() -> Outside {
        let (of_host, of_world) =
            ([format!("{HOST}/24"), format!("{ALIAS}/24")], [format!("{WORLD}/24"), format!("{METADATA}/32")]);
        let (host, world) = outside(&of_host, &of_world);
        ip(&host, &format!("route add default via {WORLD}"));
        ip(&world, &format!("route add 10.42.0.0/16 via {HOST}"));
        let outside = Outside { host, world };
        for netns in [&outside.host, &outside.world] {
            serve(netns, Ipv4Addr::UNSPECIFIED.into(), 80);
        }
        outside
    }

    /// The same with IPv6.
    pub fn dual() -> Outside {
        let outside = Outside::new();
        for (netns, line) in [
            // What neighbours are asked with for packets of others.
            (&outside.host, "-6 address add fe80::a/64 dev wan nodad".to_owned()),
            (&outside.world, "-6 address add fe80::b/64 dev eth0 nodad".to_owned()),
            (&outside.host, format!("-6 address add {HOST6}/64 dev wan nodad")),
            // Deprecated: the host does not choose it by itself.
            (&outside.host, format!("-6 address add {ALIAS6}/64 dev wan nodad preferred_lft 0")),
            (&outside.world, format!("-6 address add {WORLD6}/64 dev eth0 nodad")),
            (&outside.host, format!("-6 route add default via {WORLD6}")),
            (&outside.world, format!("-6 route add fd00:10:42::/64 via {HOST6}")),
            (&outside.world, format!("-6 route add fd00:10:44::/48 via {HOST6}")),
        ] {
            ip(netns, &line);
        }
        for netns in [&outside.host, &outside.world] {
            serve(netns, Ipv6Addr::UNSPECIFIED.into(), 81);
        }
        outside
    }

    pub fn set(&self, lab: &Lab, egress: Egress) {
        lab.router().set_egress(File::open(&self.host).unwrap().as_fd(), egress).unwrap();
    }

    /// Everything of the host that could have been touched.
    pub fn state(&self) -> BTreeSet<String> {
        let look = |program: &str, args: &[&str]| run(&self.host, program, args).1;
        let sysctls: Vec<String> = look("sysctl", &["-a"])
            .lines()
            .filter(|line| {
                ["net.ipv4.conf", "net.ipv4.ip_forward", "net.ipv6.conf"].iter().any(|part| line.starts_with(part))
            })
            .map(str::to_owned)
            .collect();
        let looks: [(&str, &[&str]); 6] = [
            // Not `ip link`, which stumbles over peers in namespaces that other tests remove.
            ("cut", &["-d:", "-f1", "/proc/net/dev"]),
            ("ip", &["-o", "address"]),
            ("ip", &["route", "show", "table", "all"]),
            ("ip", &["-6", "route", "show", "table", "main"]),
            ("ip", &["neighbour", "show", "nud", "permanent"]),
            ("nft", &["list", "ruleset"]),
        ];
        let said = looks.iter().flat_map(|(program, args)| {
            look(program, args).lines().map(|line| format!("{program} {args:?}: {line}")).collect::<Vec<_>>()
        });
        said.chain(sysctls).collect()
    }
}

#[track_caller]
pub fn same(now: &BTreeSet<String>, then: &BTreeSet<String>) {
    let (new, gone): (Vec<_>, Vec<_>) = (now.difference(then).collect(), then.difference(now).collect());
    assert!(new.is_empty() && gone.is_empty(), "new {new:#?}, gone {gone:#?}");
}

/// Tells each client who it seems to be, and the segment size that it offered.
pub fn serve(netns: &Path, address: IpAddr, port: u16) {
    let listener = in_netns(netns, || TcpListener::bind((address, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(peer.to_string().as_bytes());
        }
    });
}

/// Lets workloads out, to addresses in these networks.
pub fn let_out(lab: &Lab, networks: &[&str]) {
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = network::Policies::without_rules(network::Isolation::Private, workloads);
    let key: Arc<str> = "out".into();
    let blocks: Vec<_> = networks
        .iter()
        .map(|text| network::policy::Block { network: text.parse::<Network>().unwrap(), except: Vec::new() })
        .collect();
    let rule = Rule {
        origin: key.clone(),
        action: Action::Allow,
        anyone: false,
        group: None,
        blocks: ranges(&blocks),
        names: None,
        ports: Vec::new(),
    };
    let otherwise = Otherwise::Refuse;
    let profile = Profile { direction: Direction::Egress, origin: key.clone(), rules: vec![rule], otherwise };
    policies.profiles.insert(key.clone(), profile);
    policies.workloads.values_mut().for_each(|workload| workload.egress = Some(key.clone()));
    lab.router().sync_policies(policies).unwrap();
}
