//! Requests through a running gateway to real servers on loopback.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn a_request_reaches_its_service_and_says_who_asked() {
    let (lab, server) = (lab().await, echo().await);
    lab.simple(&[server.address]).await;
    let url = format!("http://{}/a/b?c=d", lab.address);
    let text = curl(&["-i", &url, "-H", "Host: Shop.Test:8080", "-H", "X-Forwarded-For: 6.6.6.6", "-d", "hello"]).await;
    assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
    for wanted in [
        "POST /a/b?c=d HTTP/1.1",
        "host: Shop.Test:8080",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "forwarded: for=127.0.0.1;host=\"Shop.Test:8080\";proto=http",
        "x-forwarded-host: Shop.Test:8080",
        "content-length: 5",
        "\nhello",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("6.6.6.6"), "{text}");
    let text = curl(&["--http2-prior-knowledge", "-w", "%{http_version} %{response_code}", &url]).await;
    assert!(text.contains("GET /a/b?c=d HTTP/1.1") && text.ends_with("2 200"), "{text}");
    let text = curl(&["--http2-prior-knowledge", "-d", "hello", "-H", "cookie: a=1", &url]).await;
    assert!(text.contains("\nhello") && text.contains("cookie: a=1"), "{text}");
    assert!(lab.count("upstream_reused_total") > 0, "connections are kept");
    lab.stop().await;
}

#[tokio::test]
async fn answers_that_come_from_the_gateway_itself() {
    let lab = lab().await;
    eventually("the API was read", async || lab.get("/").await.0 == 404).await;
    let (_, text) = lab.get("/x").await;
    assert!(text.contains("no HTTPRoute matches host \"shop.test\" and path \"/x\""), "{text}");
    lab.service("empty", json!({})).await;
    lab.backend("dead", &["127.0.0.1:1".parse().unwrap()]).await;
    let to = |path: &str, name: &str| json!({"matches": [{"path": {"value": path}}], "backendRefs": [{"name": name, "port": 80}]});
    lab.route("r", &[], json!([to("/empty", "empty"), to("/dead", "dead"), to("/missing", "missing")])).await;
    eventually("missing is 500", async || lab.get("/missing").await.0 == 500).await;
    assert_eq!(lab.get("/empty").await, (503, "the service has no ready endpoint\n".into()));
    assert_eq!(lab.get("/dead").await.0, 502);
    assert!(lab.count("upstream_connect_failures_total") >= 3);
    lab.stop().await;
}

#[tokio::test]
async fn what_is_ambiguous_or_too_large_is_refused() {
    let (lab, server) = (lab().await, echo().await);
    lab.simple(&[server.address]).await;
    for bad in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\nX\n\n",
    ] {
        let text = lab.raw(&bad.replacen("\r\nHost", "\r\nConnection: close\r\nHost", 1)).await;
        assert!(
            text.starts_with("HTTP/1.1 400") || text.starts_with("HTTP/1.0 400") || text.is_empty(),
            "{bad:?}: {text}"
        );
    }
    // Two lengths: chunks count, and the endpoint is told one length only.
    let both = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n\
                5\r\nhello\r\n0\r\n\r\n";
    let text = lab.raw(both).await;
    assert!(text.contains("transfer-encoding: chunked") && !text.contains("content-length: 3"), "{text}");
    assert!(text.contains("5\r\nhello\r\n0"), "{text}");
    let large = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(100 << 10));
    assert!(lab.raw(&large).await.starts_with("HTTP/1.1 431"));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(200));
    assert!(lab.raw(&many).await.starts_with("HTTP/1.1 431"));
    assert!(
        lab.raw("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n").await.starts_with("HTTP/1.1 405")
    );
    lab.stop().await;
}

#[tokio::test]
async fn hostile_answers_are_bad_gateways_and_never_reach_the_client() {
    let answers = [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "garbage\r\n\r\n",
        "HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\0: x\r\n\r\n",
    ];
    let lab = lab().await;
    let server = server(move |head, _| {
        let index = head.split(['/', ' ']).nth(2).and_then(|n| n.parse::<usize>().ok());
        index.and_then(|index| answers.get(index)).map_or(ok("fine"), |text| text.as_bytes().to_vec())
    })
    .await;
    lab.simple(&[server.address]).await;
    for (index, answer) in answers.iter().enumerate() {
        assert_eq!(lab.get(&format!("/{index}")).await.0, 502, "{answer}");
    }
    assert_eq!(lab.get("/fine").await, (200, "fine".into()));
    lab.stop().await;
}

#[tokio::test]
async fn filters_change_what_they_say() {
    let (lab, server, mirror) = (lab().await, echo().await, Arc::new(AtomicUsize::new(0)));
    let seen = mirror.clone();
    let copies = common::server(move |_, _| {
        seen.fetch_add(1, Relaxed);
        ok("")
    })
    .await;
    lab.backend("web", &[server.address]).await;
    lab.backend("copies", &[copies.address]).await;
    let backend = json!([{"name": "web", "port": 80, "filters": [{"type": "ResponseHeaderModifier",
        "responseHeaderModifier": {"add": [{"name": "X-Backend", "value": "1"}]}}]}]);
    let at = |path: &str, filters: serde_json::Value| json!({"matches": [{"path": {"value": path}}], "filters": filters, "backendRefs": backend});
    let rules = json!([
        at(
            "/headers",
            json!([
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "A", "value": "set"}],
             "add": [{"name": "B", "value": "added"}], "remove": ["C"]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "X-Rule", "value": "1"}]}}])
        ),
        at(
            "/old",
            json!([{"type": "URLRewrite", "urlRewrite": {"hostname": "inner.test",
            "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}}])
        ),
        at(
            "/go",
            json!([{"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "statusCode": 301,
            "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/went"}}}])
        ),
        at(
            "/copy",
            json!([{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "copies", "port": 80}}}])
        ),
        at("/unknown", json!([{"type": "ExtensionRef"}])),
    ]);
    lab.route("r", &[], rules).await;
    lab.ready("/headers", 404).await;
    let at = |path: &str| format!("http://{}{path}", lab.address);
    let text = curl(&["-i", &at("/headers"), "-H", "A: 1", "-H", "B: 1", "-H", "C: 1"]).await;
    for wanted in ["\na: set\r", "\nb: 1\r", "\nb: added\r", "\nx-rule: 1\r", "\nx-backend: 1\r"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("\nc: 1"), "{text}");
    let text = curl(&[&at("/old/x?q=1")]).await;
    assert!(text.contains("GET /new/x?q=1 ") && text.contains("host: inner.test"), "{text}");
    let text = curl(&["-i", &at("/go/there?q=1")]).await;
    assert!(text.starts_with("HTTP/1.1 301") && text.contains("location: https://127.0.0.1/went/there?q=1"), "{text}");
    assert_eq!(lab.get("/copy").await.0, 200);
    eventually("the mirror got a copy", async || mirror.load(Relaxed) == 1).await;
    assert_eq!(lab.get("/unknown").await.0, 500);
    lab.stop().await;
}

#[tokio::test]
async fn weights_spread_requests() {
    let (lab, a, b) = (lab().await, named("a").await, named("b").await);
    lab.backend("a", &[a.address]).await;
    lab.backend("b", &[b.address]).await;
    let backends = json!([{"name": "a", "port": 80, "weight": 3}, {"name": "b", "port": 80, "weight": 1}]);
    lab.route("r", &[], json!([{"backendRefs": backends}])).await;
    lab.ready("/", 404).await;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..400 {
        *counts.entry(lab.get("/").await.1).or_default() += 1;
    }
    assert!(counts["a"] > 240 && counts["b"] > 50, "{counts:?}");
    lab.stop().await;
}

#[tokio::test]
async fn time_limits_end_a_request() {
    let lab = lab().await;
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    lab.backend("web", &[slow.local_addr().unwrap()]).await;
    lab.route("r", &[], json!([{"timeouts": {"request": "200ms"}, "backendRefs": [{"name": "web", "port": 80}]}]))
        .await;
    eventually("the limit ends it", async || lab.get("/").await.0 == 504).await;
    assert!(lab.count("upstream_timeouts_total") > 0);
    lab.stop().await;
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let lab = lab().await;
    // A server that answers each chunk as it comes.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
                let _ = stream.write_all(answer).await;
                if head.starts_with(b"GET") {
                    let _ = stream.write_all(b"0\r\n\r\n").await;
                    return;
                }
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    let _ = stream.write_all(&buffer[..count]).await;
                }
            });
        }
    });
    lab.simple(&[address]).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    let mut read = async |stream: &mut TcpStream, until: &str| {
        let mut buffer = [0; 4096];
        while !text.ends_with(until) {
            let count = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(count > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    for word in ["one", "two"] {
        stream.write_all(format!("3\r\n{word}\r\n").as_bytes()).await.unwrap();
        read(&mut stream, &format!("3\r\n{word}\r\n")).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    read(&mut stream, "0\r\n\r\n").await;
    lab.stop().await;
}

#[tokio::test]
async fn large_bodies_arrive_whole() {
    let lab = lab().await;
    let big = server(
        |head, body| if head.starts_with("POST") { ok(&body.len().to_string()) } else { ok(&"x".repeat(5 << 20)) },
    )
    .await;
    lab.simple(&[big.address]).await;
    let url = format!("http://{}/", lab.address);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        assert_eq!(curl(&[version, &url]).await.len(), 5 << 20);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'y'; 3 << 20]).unwrap();
        let text =
            curl(&[version, "-H", "Expect:", "--data-binary", &format!("@{}", file.path().display()), &url]).await;
        assert_eq!(text, (3 << 20).to_string());
        let text = curl(&[
            version,
            "-H",
            "Expect: 100-continue",
            "-T",
            &file.path().display().to_string(),
            "-X",
            "POST",
            &url,
        ])
        .await;
        assert_eq!(text, (3 << 20).to_string());
    }
    assert!(curl(&["-I", &url]).await.contains("content-length: 5242880"));
    lab.stop().await;
}

#[tokio::test]
async fn protocols_are_switched() {
    let lab = lab().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let head = loop {
                    let Some((head, _)) = read_request(&mut stream).await else { return };
                    if head.contains("upgrade: websocket") {
                        break head;
                    }
                    let _ = stream.write_all(&ok("plain")).await;
                };
                assert!(head.contains("connection: upgrade") && head.contains("sec-websocket-key: k"), "{head}");
                let answer =
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly";
                stream.write_all(answer.as_bytes()).await.unwrap();
                let mut buffer = [0; 64];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(&buffer[..count]).await.unwrap();
                }
            });
        }
    });
    lab.simple(&[address]).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let head = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"early") {
        text.push(stream.read_u8().await.unwrap());
    }
    assert!(text.starts_with(b"HTTP/1.1 101"));
    for word in ["ping", "pong"] {
        stream.write_all(word.as_bytes()).await.unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(back, word.as_bytes());
    }
    assert_eq!(lab.count("upgrades_total"), 1);
    drop(stream);
    lab.stop().await;
}

#[tokio::test]
async fn http2_all_the_way() {
    // Another gateway is the HTTP/2 server.
    let (outer, inner, server) = (lab().await, lab().await, echo().await);
    inner.simple(&[server.address]).await;
    outer.service("web", json!({"appProtocol": "kubernetes.io/h2c"})).await;
    outer.endpoints("web", &[inner.address]).await;
    outer.route("r", &[], json!([{"backendRefs": [{"name": "web", "port": 80}]}])).await;
    outer.ready("/", 404).await;
    let url = format!("http://{}/deep?q=1", outer.address);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let text = curl(&[version, "-d", "body", &url]).await;
        assert!(text.contains("POST /deep?q=1 HTTP/1.1") && text.ends_with("\nbody"), "{text}");
    }
    assert_eq!(outer.count("upstream_connects_total"), 1);
    outer.stop().await;
    inner.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_is_gone_costs_no_request() {
    let (lab, live) = (lab().await, named("live").await);
    let dead: SocketAddr = "127.0.0.1:1".parse().unwrap();
    lab.simple(&[dead, live.address]).await;
    for _ in 0..100 {
        assert_eq!(lab.get("/").await, (200, "live".into()));
    }
    assert!(lab.count("upstream_connect_failures_total") < 20, "it is passed over after the first failures");
    lab.stop().await;
}

#[tokio::test]
async fn a_server_that_closes_unannounced_costs_no_request() {
    let lab = lab().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                // The answer leaves with the end of the connection: nobody can ask between the two.
                rustix::net::sockopt::set_tcp_cork(&stream, true).unwrap();
                let mut stream = BufReader::new(stream);
                if read_request(&mut stream).await.is_some() {
                    stream.write_all(&ok("once")).await.unwrap();
                }
            });
        }
    });
    lab.simple(&[address]).await;
    let url = format!("http://{}/", lab.address);
    let args = [&["-d", "hello"][..], &[url.as_str(); 30]].concat();
    assert_eq!(curl(&args).await, "once".repeat(30), "what must not be sent twice is not sent to who is gone");
    assert_eq!(lab.count("upstream_failures_total"), 0);
    lab.stop().await;
    serving.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_come_and_go_under_load_and_no_request_is_lost() {
    let lab = Arc::new(lab().await);
    let mut servers = vec![named("s").await, named("s").await];
    lab.simple(&servers.iter().map(|server| server.address).collect::<Vec<_>>()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (stop, address) = (stop.clone(), lab.address);
            tokio::spawn(async move {
                let mut count = 0usize;
                let mut stream = TcpStream::connect(address).await.unwrap();
                while !stop.load(Relaxed) {
                    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
                    let mut text = Vec::new();
                    while !text.ends_with(b"\r\n\r\ns") {
                        let byte = stream.read_u8().await.unwrap();
                        text.push(byte);
                        assert!(text.len() < 500, "{}", String::from_utf8_lossy(&text));
                    }
                    assert!(text.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&text));
                    count += 1;
                }
                count
            })
        })
        .collect();
    let before = || lab.count("requests_total");
    for _ in 0..20 {
        let seen = before();
        // A new endpoint comes, the oldest goes from the API and only then stops, as pods do.
        servers.push(named("s").await);
        lab.endpoints("web", &servers[1..].iter().map(|s| s.address).collect::<Vec<_>>()).await;
        eventually("load goes on", async || before() > seen + 50).await;
        // The server breaks off even where requests are under way on kept connections.
        drop(servers.remove(0));
        eventually("load goes on", async || before() > seen + 100).await;
    }
    stop.store(true, Relaxed);
    let mut total = 0;
    for task in load {
        total += task.await.unwrap();
    }
    assert!(total > 1000, "{total}");
    Arc::into_inner(lab).unwrap().stop().await;
}

#[tokio::test]
async fn shutdown_lets_requests_end() {
    let lab = lab().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (arrived, mut wait) = tokio::sync::mpsc::channel(16);
    let go = Arc::new(tokio::sync::Notify::new());
    let (address, gate) = (listener.local_addr().unwrap(), go.clone());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (arrived, gate) = (arrived.clone(), gate.clone());
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                while let Some((head, _)) = read_request(&mut stream).await {
                    if head.starts_with("GET /slow") {
                        let _ = arrived.send(()).await;
                        gate.notified().await;
                    }
                    let _ = stream.write_all(&ok("done")).await;
                }
            });
        }
    });
    lab.simple(&[address]).await;
    let url = format!("http://{}/slow", lab.address);
    let slow = tokio::spawn(async move { curl(&[&url]).await });
    wait.recv().await.unwrap();
    // An idle connection does not hold the end up.
    let idle = TcpStream::connect(lab.address).await.unwrap();
    let address = lab.address;
    let stopping = tokio::spawn(lab.stop());
    eventually("no new connections", async || TcpStream::connect(address).await.is_err()).await;
    go.notify_waiters();
    assert_eq!(slow.await.unwrap(), "done");
    stopping.await.unwrap();
    drop(idle);
}
