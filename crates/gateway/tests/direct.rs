//! Requests that are answered without hyper, and connections that go from the one to the other.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Status lines of all answers in this text.
fn statuses(text: &str) -> Vec<&str> {
    text.split("HTTP/1.1 ").skip(1).filter_map(|rest| rest.get(..3)).collect()
}

#[tokio::test]
async fn requests_one_behind_the_other_are_answered_in_order() {
    let server = server(|head, body| {
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        ok(&format!("[{path} {body}]"))
    })
    .await;
    let lab = lab().await;
    lab.simple(&[server.address]).await;
    let text = lab
        .raw(
            "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n\
             POST /3 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello\
             GET /4 HTTP/1.1\r\nHost: a\r\n\r\nPOST /5 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
             3\r\nabc\r\n0\r\n\r\nGET /6 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /7 HTTP/1.1\r\nHost: a\r\n\r\n",
        )
        .await;
    assert_eq!(statuses(&text), ["200"; 6], "{text}");
    let bodies: Vec<&str> = text.split('[').skip(1).map(|rest| rest.split(']').next().unwrap()).collect();
    assert_eq!(bodies, ["/1 ", "/2 ", "/3 hello", "/4 ", "/5 3\r\nabc\r\n0\r\n\r\n", "/6 "], "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn heads_in_pieces_and_halves_of_two_requests() {
    let (lab, server) = (lab().await, echo().await);
    lab.simple(&[server.address]).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let all = "GET /first HTTP/1.1\r\nHost: a\r\n\r\nGET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for piece in [&all[..50], &all[50..60], &all[60..]] {
        stream.write_all(piece.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        if piece.len() == 50 {
            let mut first = vec![0; 17];
            stream.read_exact(&mut first).await.unwrap();
            assert_eq!(first, b"HTTP/1.1 200 OK\r\n");
        }
    }
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("GET /first") && rest.contains("GET /second"), "{rest}");
    lab.stop().await;
}

#[tokio::test]
async fn every_kind_of_answer_is_framed() {
    let server = server(|head, _| match head.split(' ').nth(1) {
        Some("/chunked") => {
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n".to_vec()
        }
        Some("/none") => b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n".to_vec(),
        Some("/same") => b"HTTP/1.1 304 Not Modified\r\nContent-Length: 11\r\nETag: \"a\"\r\n\r\n".to_vec(),
        Some("/empty") => ok(""),
        Some("/large") => ok(&"x".repeat(1 << 20)),
        Some("/dated") => {
            b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\n\r\n".to_vec()
        }
        _ if head.starts_with("HEAD") => b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n".to_vec(),
        _ => ok("hello world"),
    })
    .await;
    let lab = lab().await;
    lab.simple(&[server.address]).await;
    let ask =
        async |request: &str| lab.raw(&format!("{request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).await;
    let text = ask("GET /chunked").await;
    assert!(text.contains("transfer-encoding: chunked\r\n") && !text.contains("content-length"), "{text}");
    assert!(text.ends_with("\r\n0\r\n\r\n") && text.contains("hello") && text.contains(" world"), "{text}");
    let text = ask("GET /none").await;
    assert!(text.starts_with("HTTP/1.1 204") && text.ends_with("\r\n\r\n") && !text.contains("length"), "{text}");
    let text = ask("GET /same").await;
    assert!(
        text.starts_with("HTTP/1.1 304") && text.contains("content-length: 11") && text.ends_with("\r\n\r\n"),
        "{text}"
    );
    let text = ask("HEAD /").await;
    assert!(text.contains("content-length: 11") && text.ends_with("\r\n\r\n"), "{text}");
    let text = ask("GET /").await;
    assert!(
        text.ends_with("\r\n\r\nhello world") && text.contains("\r\ndate: ") && text.contains(" GMT\r\n"),
        "{text}"
    );
    let text = ask("GET /empty").await;
    assert!(text.contains("content-length: 0\r\n") && text.ends_with("\r\n\r\n"), "{text}");
    let text = ask("GET /dated").await;
    assert!(text.matches("date: ").count() == 1 && text.contains("1994"), "{text}");
    assert!(ask("GET /large").await.len() > 1 << 20);
    lab.stop().await;
}

#[tokio::test]
async fn a_filter_cannot_frame_an_answer() {
    let (lab, server) = (lab().await, named("hello world").await);
    lab.backend("web", &[server.address]).await;
    let set = json!([{"name": "Content-Length", "value": "3"}, {"name": "Transfer-Encoding", "value": "chunked"},
        {"name": "Connection", "value": "x"}]);
    let filter = json!({"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": set}});
    lab.route("r", &[], json!([{"filters": [filter], "backendRefs": [{"name": "web", "port": 80}]}])).await;
    lab.ready("/", 404).await;
    let text = lab.raw("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert_eq!(text.matches("content-length: 11\r\n").count(), 2, "{text}");
    assert!(!text.contains("transfer-encoding") && text.ends_with("hello world"), "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn idle_connections_end_with_their_time_and_with_the_gateway() {
    let server = named("a").await;
    let lab = lab_with(|config| config.head_timeout = Duration::from_millis(100)).await;
    lab.simple(&[server.address]).await;
    // A pause of the whole process between two requests is idleness too: then the connection is another one.
    eventually("three requests over one connection, then its end", async || {
        let mut stream = TcpStream::connect(lab.address).await.unwrap();
        let mut text = Vec::new();
        for _ in 0..3 {
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            text.clear();
            while !text.ends_with(b"\r\n\r\na") {
                let Ok(byte) = stream.read_u8().await else { return false };
                text.push(byte);
            }
        }
        matches!(stream.read(&mut [0]).await, Ok(0))
    })
    .await;
    eventually("no connection is left", async || lab.count("connections_open") == 0).await;
    lab.stop().await;
    let lab = common::lab().await;
    lab.simple(&[server.address]).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    stream.read_exact(&mut [0; 17]).await.unwrap();
    lab.stop().await;
    stream.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_passed_off_as_whole() {
    for (broken, seen) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhell", "hell"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n", "4\r\nhell\r\n"),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let lab = lab().await;
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let _ = stream.write_all(broken.as_bytes()).await;
            }
        });
        lab.simple(&[address]).await;
        let text = lab.raw("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with(seen), "{text}");
        lab.stop().await;
        serving.abort();
    }
}
