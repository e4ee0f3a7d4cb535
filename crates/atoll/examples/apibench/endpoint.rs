//! `endpoint ROUTER COUNT`: how long after the API has accepted a changed EndpointSlice the kernel has it, with COUNT
//! Services there. `ROUTER` is the file of the router's network namespace; nftables itself tells there when a change is in
//! force.

use crate::{Fault, Target, quantile};
use rustix::fs::{Mode, OFlags};
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with, sockopt};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const CHANGES: usize = 200;
/// `1 << (NFNLGRP_NFTABLES - 1)`.
const NFTABLES: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`: the end of a transaction.
const NEWGEN: u16 = 10 << 8 | 15;
/// Longer than a change takes, and what follows from it.
const QUIET: Duration = Duration::from_millis(20);

fn monitor(router: &str) -> Result<OwnedFd, Fault> {
    let namespace = rustix::fs::open(router, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let open = move || -> Result<OwnedFd, Fault> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
        bind(&socket, &SocketAddrNetlink::new(0, NFTABLES))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(socket)
    };
    std::thread::spawn(open).join().map_err(|_| "the monitor's thread panicked")?
}

/// When the kernel's next transaction is told of.
fn in_force(monitor: &OwnedFd) -> Result<Instant, Fault> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, _) = recv(monitor, buffer.as_mut_slice(), RecvFlags::empty())?;
        let now = Instant::now();
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some([l0, l1, l2, l3, k0, k1, ..]) = rest.first_chunk::<16>() {
            if u16::from_ne_bytes([*k0, *k1]) == NEWGEN {
                return Ok(now);
            }
            let length = u32::from_ne_bytes([*l0, *l1, *l2, *l3]) as usize;
            rest = rest.get(length.next_multiple_of(4).max(16)..).unwrap_or_default();
        }
    }
}

fn drain(monitor: &OwnedFd) {
    let mut buffer = vec![0; 64 << 10];
    while recv(monitor, buffer.as_mut_slice(), RecvFlags::DONTWAIT).is_ok() {}
}

fn slice(index: usize, last: usize) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("e{index}-1"), "labels": {"kubernetes.io/service-name": format!("e{index}")}},
        "ports": [{"port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [format!("10.42.200.{last}")], "conditions": {"ready": true}}]})
}

/// Milliseconds until the kernel has it: from the request, and from its answer (0 if the kernel was first).
pub async fn endpoint(target: Target, router: &str, count: usize) -> Result<Value, Fault> {
    let mut sender = target.connect().await?;
    let (services, slices) =
        ("/api/v1/namespaces/bench/services", "/apis/discovery.k8s.io/v1/namespaces/bench/endpointslices");
    for index in 0..count {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("e{index}")},
            "spec": {"ports": [{"port": 80, "targetPort": 8080}]}});
        target.must(&mut sender, "POST", services, service).await?;
        target.must(&mut sender, "POST", slices, slice(index, 1)).await?;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let monitor = std::sync::Arc::new(monitor(router)?);
    let (mut sent, mut accepted) = (Vec::new(), Vec::new());
    for turn in 0..CHANGES {
        tokio::time::sleep(QUIET).await;
        drain(&monitor);
        let own = monitor.clone();
        let told = tokio::task::spawn_blocking(move || in_force(&own));
        let begun = Instant::now();
        target.must(&mut sender, "PUT", &format!("{slices}/e0-1"), slice(0, turn % 200 + 2)).await?;
        let answered = Instant::now();
        let at = told.await??;
        sent.push(at.duration_since(begun).as_secs_f64() * 1e3);
        accepted.push(at.saturating_duration_since(answered).as_secs_f64() * 1e3);
    }
    let of = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        json!({"median": quantile(times, 0.5), "p99": quantile(times, 0.99)})
    };
    for index in 0..count {
        target.must(&mut sender, "DELETE", &format!("{slices}/e{index}-1"), Value::Null).await?;
        target.must(&mut sender, "DELETE", &format!("{services}/e{index}"), Value::Null).await?;
    }
    Ok(
        json!({"services": count, "changes": CHANGES, "accepted_to_kernel_ms": of(&mut accepted), "sent_to_kernel_ms": of(&mut sent)}),
    )
}
