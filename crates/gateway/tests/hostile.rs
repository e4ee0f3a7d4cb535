//! Clients that mean harm: floods of HTTP/2, slow ones, requests that say two things at once, paths that lead elsewhere.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// HPACK: GET, http, `/`, and `:authority: a` spelled out.
const HEAD: &[u8] = b"\x82\x86\x84\x41\x01a";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Writes until the other side closes, at most `all`; whether it closed.
async fn flood(stream: &mut TcpStream, mut next: impl FnMut(u32) -> Vec<u8>, all: u32) -> bool {
    let (mut read, mut write) = stream.split();
    let sending = async {
        for number in 0..all {
            if write.write_all(&next(number)).await.is_err() {
                return true;
            }
        }
        std::future::pending().await
    };
    let reading = async {
        let mut buffer = vec![0; 64 << 10];
        while !matches!(read.read(&mut buffer).await, Ok(0) | Err(_)) {}
        true
    };
    tokio::select! {
        closed = sending => closed,
        closed = reading => closed,
        () = tokio::time::sleep(Duration::from_secs(20)) => false,
    }
}

#[tokio::test]
async fn rapid_resets_end_the_connection_and_leave_nothing_behind() {
    let lab = lab().await;
    // Takes requests and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    lab.backend("web", &[silent.local_addr().unwrap()]).await;
    lab.route("r", &[], json!([{"backendRefs": [{"name": "web", "port": 80}]}])).await;
    eventually("the API was read", async || lab.count("tables_total") > 0).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let closed = flood(
        &mut stream,
        |number| {
            let id = number * 2 + 1;
            [frame(1, 5, id, HEAD), frame(3, 0, id, &[0, 0, 0, 8])].concat()
        },
        200_000,
    )
    .await;
    assert!(closed, "who resets all it asks for is let go");
    drop(stream);
    eventually("no request is left", async || lab.count("requests_active") == 0).await;
    eventually("no connection is left", async || lab.count("connections_open") == 0).await;
    lab.stop().await;
}

#[tokio::test]
async fn continuations_without_end_and_endless_heads_are_cut() {
    let lab = lab().await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    stream.write_all(&frame(1, 1, 1, HEAD)).await.unwrap();
    // A literal header that is not indexed, over and over.
    let line = [&b"\0\x01x\x7f\x01"[..], &[b'y'; 128]].concat();
    let lines = line.repeat(100);
    assert!(flood(&mut stream, |_| frame(9, 0, 1, &lines[..16_000.min(lines.len())]), 10_000).await);
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    assert!(flood(&mut stream, |_| frame(9, 0, 1, b""), 10_000).await, "a continuation of nothing");
    eventually("no connection is left", async || lab.count("connections_open") == 0).await;
    lab.stop().await;
}

#[tokio::test]
async fn pings_and_settings_are_answered_without_hoarding() {
    let (lab, server) = (lab().await, named("served").await);
    lab.simple(&[server.address]).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    // Nothing is read: the gateway must stop to take, or close, rather than keep all answers.
    let sent = async {
        for _ in 0..2_000_000 {
            if stream.write_all(&frame(6, 0, 0, &[0; 8])).await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), sent).await;
    assert_eq!(lab.get("/").await, (200, "served".into()), "others are served meanwhile");
    drop(stream);
    lab.stop().await;
}

#[tokio::test]
async fn slow_clients_are_let_go() {
    let lab = lab_with(|config| {
        config.head_timeout = Duration::from_millis(100);
        config.body_timeout = Duration::from_millis(100);
    })
    .await;
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let server = server(move |_, _| {
        count.fetch_add(1, Relaxed);
        ok(&"x".repeat(64 << 20))
    })
    .await;
    lab.simple(&[server.address]).await;
    let text = lab.raw("GET / HTTP/1.1\r\nHost: a\r\nX: ").await;
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 408"), "half a head: {text}");
    let text = lab.raw("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab").await;
    assert!(text.starts_with("HTTP/1.1 408"), "half a body: {text}");
    // Asks for much and takes nothing.
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    eventually("it is let go", async || lab.count("connections_open") == 0).await;
    drop(stream);
    lab.stop().await;
}

/// Each is one request by RFC 9112, or none; what follows must never be taken for a second one.
#[tokio::test]
async fn nothing_is_smuggled() {
    let (lab, asked) = (lab().await, Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    let server = server(move |head, _| {
        if head.contains("smuggled") {
            count.fetch_add(1, Relaxed);
        }
        ok("fine")
    })
    .await;
    lab.simple(&[server.address]).await;
    let inner = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for (what, head) in [
        ("two lengths", "Content-Length: 0\r\nContent-Length: 37\r\n"),
        ("a list of lengths", "Content-Length: 0, 37\r\n"),
        ("a length with a sign", "Content-Length: +0\r\n"),
        ("a length in hexadecimal", "Content-Length: 0x0\r\n"),
        ("an unknown coding", "Transfer-Encoding: xchunked\r\n"),
        ("chunked not last", "Transfer-Encoding: chunked, identity\r\n"),
        ("a blank before the colon", "Transfer-Encoding : chunked\r\n"),
        ("a folded line", "X: y\r\n Transfer-Encoding: chunked\r\n"),
        ("a bare CR", "X: y\rTransfer-Encoding: chunked\r\n"),
        ("a NUL", "X: y\0\r\n"),
        ("a vertical tab in the coding", "Transfer-Encoding: \x0bchunked\r\n"),
        ("no colon", "Transfer-Encoding chunked\r\n"),
    ] {
        let text = lab.raw(&format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n{inner}")).await;
        assert!(text.starts_with("HTTP/1.1 400"), "{what}: {text}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{what}: the connection ends there: {text}");
    }
    for chunks in [
        "5\nhello\r\n0\r\n\r\n",
        "5;\x01\r\nhelloX",
        "g\r\n",
        "-1\r\n",
        "ffffffffffffffffff\r\n",
        "5\r\nhelloXX0\r\n\r\n",
    ] {
        let text =
            lab.raw(&format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}{inner}")).await;
        assert!(!text.contains("200 OK"), "{chunks:?}: {text}");
    }
    assert_eq!(asked.load(Relaxed), 0);
    lab.stop().await;
}

#[tokio::test]
async fn headers_cannot_be_injected() {
    let (lab, server) = (lab().await, echo().await);
    lab.simple(&[server.address]).await;
    let url = format!("http://{}", lab.address);
    let text = curl(&[&format!("{url}/a%0d%0aInjected:%20yes?q=%0d%0aInjected:%20yes")]).await;
    assert!(text.contains("GET /a%0d%0aInjected:%20yes?q=%0d%0aInjected:%20yes HTTP/1.1"), "{text}");
    for name in ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded"] {
        let text = curl(&["-H", &format!("{name}: evil"), &url]).await;
        assert!(!text.contains("evil"), "{name}: {text}");
    }
    // Hop-by-hop headers, also those that Connection names, go no further.
    let text =
        curl(&["-H", "Connection: close, x-secret", "-H", "X-Secret: evil", "-H", "Keep-Alive: evil", &url]).await;
    assert!(!text.contains("evil"), "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn paths_lead_where_they_seem_to() {
    let (lab, public, private) = (lab().await, named("public").await, named("private").await);
    lab.backend("public", &[public.address]).await;
    lab.backend("private", &[private.address]).await;
    let to = |path: &str, name: &str| json!({"matches": [{"path": {"value": path}}], "backendRefs": [{"name": name, "port": 80}]});
    lab.route("r", &[], json!([to("/public", "public"), to("/private", "private")])).await;
    lab.ready("/public", 404).await;
    for (path, wanted) in [
        ("/public/../private", "private"),
        ("/public/%2e%2e/private", "private"),
        ("/public/.%2E/private/x", "private"),
        ("/private/../public", "public"),
        ("/public/..%2fprivate", "public"),
        ("/public//../../private", "private"),
        ("/./public", "public"),
        ("/public;x=/../private", "private"),
        ("//private", "404"),
        ("/%70rivate", "private"),
        ("/%2570rivate", "404"),
    ] {
        let (status, body) = lab.get(path).await;
        let got = if status == 404 { "404" } else { body.as_str() };
        assert_eq!(got, wanted, "{path}");
    }
    lab.stop().await;
}
