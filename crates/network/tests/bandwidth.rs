//! Limits on what workloads send and receive: real TCP over some seconds, compared with the limit as a ratio.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use network::netlink::{Socket, route};
use network::{Attachment, Bandwidth, in_netns};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Bits a second: far below what this can do anywhere.
const LIMIT: u64 = 40_000_000;

/// Bits a second that arrive of a TCP connection, over two seconds after a first one.
fn throughput(from: &Attachment, to: &Attachment, address: std::net::IpAddr) -> f64 {
    let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0".parse().unwrap() } else { "[::]:0".parse().unwrap() };
    let listener = in_netns(&netns(to), move || TcpListener::bind(any).unwrap()).unwrap();
    let target = SocketAddr::new(address, listener.local_addr().unwrap().port());
    let mut sender = in_netns(&netns(from), move || TcpStream::connect(target).unwrap()).unwrap();
    let sending = std::thread::spawn(move || while sender.write_all(&[7; 64 << 10]).is_ok() {});
    let (mut stream, _) = listener.accept().unwrap();
    let mut buffer = vec![0; 64 << 10];
    let mut receive = |time: Duration| {
        let (begin, mut bytes) = (Instant::now(), 0);
        while begin.elapsed() < time {
            bytes += stream.read(&mut buffer).unwrap();
        }
        bytes as f64 * 8.0 / begin.elapsed().as_secs_f64()
    };
    receive(Duration::from_secs(1));
    let rate = receive(Duration::from_secs(2));
    drop(stream);
    sending.join().unwrap();
    rate
}

fn near_limit(what: &str, rate: f64, limit: u64) {
    let ratio = rate / limit as f64;
    println!("{what}: {:.1} Mbit/s, {ratio:.2} of the limit", rate / 1e6);
    assert!((0.5..1.25).contains(&ratio), "{what}: {ratio}");
}

/// Names of the router's links, with whether they are shaped.
fn links(lab: &Lab) -> Vec<(String, bool)> {
    let all = lab.router().run(|| route::links(&mut Socket::route().unwrap()).unwrap()).unwrap();
    all.into_iter().map(|link| (link.name, link.shaped)).collect()
}

#[test]
fn tcp_comes_close_to_the_limit_in_both_directions_and_families() {
    let Some(mut lab) = lab() else { return };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let free = throughput(&a, &b, b.address.into());
    assert!(free > 3.0 * LIMIT as f64, "too slow a machine to see a limit: {free}");

    lab.router().set_bandwidth("a", Bandwidth { ingress: None, egress: Some(LIMIT) }).unwrap();
    near_limit("sent", throughput(&a, &b, b.address.into()), LIMIT);
    let other_way = throughput(&b, &a, a.address.into());
    assert!(other_way > 1.5 * LIMIT as f64, "only what is sent is limited, but {other_way} came");

    // The limit outlives the process, and changes while the workload runs.
    lab.reopen();
    lab.defaults(network::Isolation::Private);
    if let Some(v6) = b.address6 {
        near_limit("sent, by IPv6, after a restart", throughput(&a, &b, v6.into()), LIMIT);
    }
    lab.router().set_bandwidth("a", Bandwidth { ingress: Some(LIMIT / 2), egress: None }).unwrap();
    near_limit("received", throughput(&b, &a, a.address.into()), LIMIT / 2);
    lab.router().set_bandwidth("a", Bandwidth { ingress: Some(LIMIT), egress: Some(2 * LIMIT) }).unwrap();
    near_limit("received, after a change", throughput(&b, &a, a.address.into()), LIMIT);
    lab.router().set_bandwidth("a", Bandwidth::default()).unwrap();
    assert!(throughput(&a, &b, b.address.into()) > 3.0 * LIMIT as f64, "no limit any more");
}

#[test]
fn nothing_of_a_limit_stays_behind() {
    let Some(mut lab) = lab() else { return };
    let before = links(&lab);
    let both = Bandwidth { ingress: Some(LIMIT), egress: Some(LIMIT) };
    let pod = lab.pod("a");
    let index = || links(&lab).iter().filter(|(name, shaped)| name.starts_with("ifb") && *shaped).count();
    lab.router().set_bandwidth("a", both).unwrap();
    lab.router().set_bandwidth("a", both).unwrap();
    assert_eq!(index(), 1);
    lab.router().detach("a").unwrap();
    assert_eq!(links(&lab), before);

    // Nor after a crash between two steps: the device without its workload goes when the router is opened.
    lab.router().attach(&request("b")).unwrap();
    lab.router().set_bandwidth("b", both).unwrap();
    lab.reopen();
    lab.router().detach("b").unwrap();
    assert_eq!(links(&lab), before);
    assert!(lab.router().set_bandwidth("gone", both).is_err());
    drop(pod);
}
