//! BackendPolicies: which endpoint a request goes to, and how many at a time.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

fn policy(spec: Value) -> Value {
    let mut spec = spec;
    spec["targetRefs"] = json!([{"kind": "Service", "name": "web"}]);
    json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
}

/// A gateway with one route to these, and a policy for their Service.
async fn with(spec: Value, addresses: &[std::net::SocketAddr]) -> Lab {
    let lab = lab().await;
    lab.client.put(&api::kind::Resource::new("gateway.atoll.dev", "v1alpha1", "backendpolicies"), policy(spec));
    lab.simple(addresses).await;
    lab
}

async fn ask(lab: &Lab, header: &str) -> String {
    let text = lab.raw(&format!("GET / HTTP/1.1\r\nHost: a\r\n{header}Connection: close\r\n\r\n")).await;
    split(&text).1
}

#[tokio::test]
async fn everybody_gets_a_turn() {
    let servers = [named("one").await, named("two").await, named("three").await];
    let lab = with(json!({"balancing": {"algorithm": "RoundRobin"}}), &servers.each_ref().map(|s| s.address)).await;
    let mut counts: HashMap<String, u32> = HashMap::new();
    for _ in 0..30 {
        *counts.entry(ask(&lab, "").await).or_default() += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|count| *count == 10), "{counts:?}");
    lab.stop().await;
}

#[tokio::test]
async fn keys_stay_where_they_are() {
    let servers = [named("one").await, named("two").await, named("three").await];
    let all = servers.each_ref().map(|server| server.address);
    let hash = json!({"by": "Header", "name": "x-user"});
    let lab = with(json!({"balancing": {"algorithm": "Hash", "hash": hash}}), &all).await;
    let mut homes = HashMap::new();
    for user in 0..30 {
        let header = format!("x-user: u{user}\r\n");
        let home = ask(&lab, &header).await;
        for _ in 0..3 {
            assert_eq!(ask(&lab, &header).await, home);
        }
        homes.insert(header, home);
    }
    assert!(["one", "two", "three"].iter().all(|name| homes.values().any(|home| home == name)), "{homes:?}");
    // One endpoint goes: nobody else moves.
    lab.endpoints("web", &all[1..]).await;
    let (left, _) = homes.iter().find(|(_, home)| *home == "one").unwrap();
    eventually("the endpoint is gone", async || ask(&lab, left).await != "one").await;
    for (header, home) in homes.iter().filter(|(_, home)| *home != "one") {
        assert_eq!(ask(&lab, header).await, *home);
    }
    lab.stop().await;
}

/// A server whose answers wait for permits; how many requests it had at a time at most.
async fn gated() -> (std::net::SocketAddr, Arc<Semaphore>, Arc<std::sync::Mutex<(usize, usize)>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, gate) = (listener.local_addr().unwrap(), Arc::new(Semaphore::new(0)));
    let seen = Arc::new(std::sync::Mutex::new((0usize, 0usize)));
    let (permits, counts) = (gate.clone(), seen.clone());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (permits, counts) = (permits.clone(), counts.clone());
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                while read_request(&mut stream).await.is_some() {
                    {
                        let mut counts = counts.lock().unwrap();
                        counts.0 += 1;
                        counts.1 = counts.1.max(counts.0);
                    }
                    permits.acquire().await.unwrap().forget();
                    counts.lock().unwrap().0 -= 1;
                    stream.write_all(&ok("served")).await.unwrap();
                }
            });
        }
    });
    (address, gate, seen)
}

#[tokio::test]
async fn so_many_at_a_time_some_wait_the_rest_is_refused() {
    let (address, gate, seen) = gated().await;
    let lab = lab().await;
    let limits = json!({"requests": 2, "pending": 3});
    let policies = api::kind::Resource::new("gateway.atoll.dev", "v1alpha1", "backendpolicies");
    lab.client.put(&policies, policy(json!({"limits": limits})));
    lab.backend("web", &[address]).await;
    lab.route("all", &[], json!([{"backendRefs": [{"name": "web", "port": 80}]}])).await;
    gate.add_permits(1);
    eventually("the route is served", async || lab.get("/").await.0 == 200).await;
    let lab = Arc::new(lab);
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let lab = lab.clone();
        asking.spawn(async move { lab.get("/").await.0 });
    }
    // Two are under way, three wait, three are refused.
    for _ in 0..3 {
        assert_eq!(asking.join_next().await.unwrap().unwrap(), 503);
    }
    assert_eq!(lab.count("overflow_total"), 3);
    assert_eq!(seen.lock().unwrap().1, 2);
    gate.add_permits(5);
    while let Some(status) = asking.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    assert_eq!(*seen.lock().unwrap(), (0, 2));
    Arc::into_inner(lab).unwrap().stop().await;
}

#[tokio::test]
async fn endpoints_are_told_who_the_client_is_ahead_of_the_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                let (head, _) = read_request(&mut stream).await.unwrap();
                assert!(head.starts_with("GET / "));
                stream.write_all(&ok(line.trim())).await.unwrap();
                // Nothing further comes over this connection.
                assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
            });
        }
    });
    let lab = with(json!({"proxyProtocol": "V1"}), &[address]).await;
    let port = lab.address.port().to_string();
    for _ in 0..3 {
        let said = ask(&lab, "").await;
        let words: Vec<&str> = said.split(' ').collect();
        assert_eq!((&words[..4], words[5]), (&["PROXY", "TCP4", "127.0.0.1", "127.0.0.1"][..], &*port), "{said}");
    }
    lab.stop().await;
    serving.abort();
}

#[tokio::test]
async fn what_a_herd_opened_is_kept_for_the_next() {
    const HERD: usize = 400;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if files.is_some_and(|files| files < 4 * HERD as u64 + 400) {
        println!("SKIPPED: {files:?} open files are too few here");
        return;
    }
    let (lab, listener) = (lab().await, TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = listener.local_addr().unwrap();
    let all_there = Arc::new(tokio::sync::Barrier::new(HERD));
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let all_there = all_there.clone();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                while let Some((head, _)) = read_request(&mut stream).await {
                    if head.starts_with("GET /together ") {
                        all_there.wait().await;
                    }
                    stream.write_all(&ok("here")).await.unwrap();
                }
            });
        }
    });
    lab.simple(&[address]).await;
    for _ in 0..3 {
        let answers = futures_util::future::join_all((0..HERD).map(|_| lab.get("/together"))).await;
        assert!(answers.iter().all(|answer| *answer == (200, "here".into())));
    }
    assert_eq!(lab.count("upstream_connects_total"), HERD as u64);
    lab.stop().await;
    server.abort();
}
