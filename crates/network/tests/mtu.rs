//! A way out that carries less than a workload's link does: TCP and UDP both ways, past hops that only say so when asked.
//!
//! ```text
//! pod - router - host --1400-- near --1300-- far --1500-- world
//! ```
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;
use common::*;
use network::policy::{Action, Block, Direction, Network, Otherwise, Profile, Rule, ranges};
use network::{Attachment, Egress, Isolation, Policies, in_netns};
use rustix::fd::AsFd;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;

const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const BYTES: usize = 2 << 20;

struct Hops([Netns; 4]);

impl Hops {
    fn new(to_near: u32, to_far: u32) -> Hops {
        let hops = Hops(["host", "near", "far", "world"].map(Netns::new));
        let [host, near, far, world] = &hops.0;
        let join = |one: &Path, other: &Netns, network: &str, mtu: u32| {
            let peer = other.name();
            ip(one, &format!("link add out mtu {mtu} type veth peer name in mtu {mtu} netns {peer}"));
            ip(one, &format!("address add {network}.1/24 dev out"));
            ip(other, &format!("address add {network}.2/24 dev in"));
            ip(one, "link set out up");
            ip(other, "link set in up");
        };
        join(host, near, "198.51.100", to_near);
        join(near, far, "192.0.2", to_far);
        join(far, world, "203.0.113", 1500);
        for (netns, hop) in [(host, "198.51.100.2"), (near, "192.0.2.2")] {
            ip(netns, &format!("route add default via {hop}"));
        }
        for (netns, hop) in [(world, "203.0.113.1"), (far, "192.0.2.1")] {
            ip(netns, &format!("route add default via {hop}"));
        }
        for netns in [near, far] {
            let on = || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            in_netns(netns, on).unwrap();
        }
        hops
    }
}

fn let_out(lab: &Lab) {
    let leases = lab.router().leases();
    let workloads = leases.iter().map(|l| (l.address, l.namespace.as_str(), l.uid.as_str()));
    let mut policies = Policies::without_rules(Isolation::Private, workloads);
    let key: Arc<str> = "out".into();
    let everywhere = Block { network: "0.0.0.0/0".parse::<Network>().unwrap(), except: Vec::new() };
    let (action, blocks) = (Action::Allow, ranges(&[everywhere]));
    let rule = Rule { origin: key.clone(), action, anyone: false, group: None, blocks, ports: Vec::new(), names: None };
    let (direction, otherwise) = (Direction::Egress, Otherwise::Refuse);
    let profile = Profile { direction, origin: key.clone(), rules: vec![rule], otherwise };
    policies.profiles.insert(key.clone(), profile);
    policies.workloads.values_mut().for_each(|workload| workload.egress = Some(key.clone()));
    lab.router().sync_policies(policies).unwrap();
}

/// A server that takes all there is, and then sends as much.
fn echo_much(netns: &Path) {
    let listener = in_netns(netns, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut all = vec![0; BYTES];
            let _ = stream.read_exact(&mut all).and_then(|()| stream.write_all(&all));
        }
    });
}

fn talk(pod: &Attachment) {
    in_netns(&netns(pod), || {
        let mut stream = TcpStream::connect((WORLD, 80)).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        stream.write_all(&vec![7; BYTES]).unwrap();
        let mut all = vec![0; BYTES];
        stream.read_exact(&mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == 7));
    })
    .unwrap();
}

/// Datagrams longer than the way carries come back once the hops have told the pod, which knows then what fits.
fn datagrams(pod: &Attachment, world: &Path, fits: u32) {
    let echo = in_netns(world, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..length], from);
        }
    });
    let socket = in_netns(&netns(pod), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    socket.connect((WORLD, 9)).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    eventually("a long datagram comes back", || {
        let _ = socket.send(&[7; 1472]);
        socket.recv(&mut [0; 2000]).is_ok_and(|length| length == 1472)
    });
    let (_, route) = run(&netns(pod), "ip", &["route", "get", &WORLD.to_string()]);
    assert!(route.contains(&format!("mtu {fits}")), "{route}");
}

fn way_out(to_near: u32, to_far: u32, egress: Egress) {
    let Some(lab) = lab() else { return };
    let hops = Hops::new(to_near, to_far);
    let [host, near, far, world] = &hops.0;
    if egress == Egress::Routed {
        for (netns, hop) in [(near, "198.51.100.1"), (far, "192.0.2.1"), (world, "203.0.113.1")] {
            ip(netns, &format!("route add 10.42.0.0/16 via {hop}"));
        }
    } else {
        ip(far, "route add 198.51.100.0/24 via 192.0.2.1");
    }
    lab.router().set_egress(File::open(host).unwrap().as_fd(), egress).unwrap();
    let pod = lab.pod("a");
    let_out(&lab);
    echo_much(world);
    eventually("the way is there", || in_netns(&netns(&pod), || TcpStream::connect((WORLD, 80)).is_ok()).unwrap());
    datagrams(&pod, world, to_near.min(to_far));
    talk(&pod);
    // What the pod learned is not what TCP needs: another, which knows nothing, speaks TCP first.
    let fresh = lab.pod("b");
    let_out(&lab);
    talk(&fresh);
}

#[test]
fn a_hop_far_away_carries_less() {
    way_out(1500, 1300, Egress::Nat);
}

#[test]
fn the_hosts_own_link_carries_less() {
    way_out(1400, 1500, Egress::Nat);
}

#[test]
fn routed_addresses_learn_it_too() {
    way_out(1500, 1300, Egress::Routed);
}
