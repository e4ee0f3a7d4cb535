//! TrafficPolicies: what they let through, as curl sees it.
#![allow(clippy::unwrap_used)]

mod common;
use base64::Engine;
use common::*;
use serde_json::{Value, json};

fn policies() -> api::kind::Resource {
    api::kind::Resource::new("gateway.atoll.dev", "v1alpha1", "trafficpolicies")
}

/// A gateway with one route to an echo, and a policy on it.
async fn with(spec: Value) -> (Lab, Server) {
    let (lab, server) = (lab().await, echo().await);
    let mut spec = spec;
    spec["targetRefs"] = json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}]);
    lab.client.put(&policies(), json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    lab.simple(&[server.address]).await;
    (lab, server)
}

fn put_secret(lab: &Lab, name: &str, values: &[(&str, &str)]) {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let data: serde_json::Map<String, Value> =
        values.iter().map(|(k, v)| ((*k).to_owned(), encode(v).into())).collect();
    let secret = json!({"metadata": {"name": name, "namespace": "shop"}, "data": data});
    lab.client.put(&api::kind::Resource::new("", "v1", "secrets"), secret);
}

async fn ask(lab: &Lab, more: &[&str]) -> String {
    let url = format!("http://{}/", lab.address);
    curl(&[&["-i"], more, &[&url]].concat()).await
}

#[tokio::test]
async fn so_many_requests_and_no_more() {
    let limit = json!({"requests": 1, "period": "1h", "burst": 3, "by": "Header", "header": "x-user"});
    let (lab, _server) = with(json!({"rateLimits": [limit]})).await;
    for user in ["ann", "bob"] {
        let header = format!("x-user: {user}");
        for _ in 0..3 {
            assert!(ask(&lab, &["-H", &header]).await.starts_with("HTTP/1.1 200"), "{user}");
        }
        let text = ask(&lab, &["-H", &header]).await;
        assert!(text.starts_with("HTTP/1.1 429") && text.contains("retry-after: 3"), "{text}");
    }
    // A route that changes gives nobody a fresh start.
    lab.route("other", &["other.test"], json!([{"backendRefs": [{"name": "web", "port": 80}]}])).await;
    let tables = lab.count("tables_total");
    eventually("a new table", async || {
        lab.raw("GET / HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n\r\n").await.starts_with("HTTP/1.1 200")
    })
    .await;
    assert!(tables > 0 && ask(&lab, &["-H", "x-user: ann"]).await.starts_with("HTTP/1.1 429"));
    lab.stop().await;
}

#[tokio::test]
async fn keys_are_asked_for_and_not_sent_on() {
    let (lab, _server) = with(json!({"apiKeys": {"secretRef": {"name": "keys"}}})).await;
    assert!(
        ask(&lab, &["-H", "x-api-key: sesame"]).await.starts_with("HTTP/1.1 500"),
        "without its secret nobody comes in"
    );
    put_secret(&lab, "keys", &[("ann", "sesame"), ("bob", "other")]);
    eventually("ann comes in", async || ask(&lab, &["-H", "x-api-key: sesame"]).await.starts_with("HTTP/1.1 200"))
        .await;
    let text = ask(&lab, &["-H", "x-api-key: sesame", "-H", "x-atoll-consumer: root"]).await;
    assert!(text.contains("x-atoll-consumer: ann") && !text.contains("sesame") && !text.contains("root"), "{text}");
    for bad in ["x-api-key: sesam", "x-api-key:", "x: y"] {
        assert!(ask(&lab, &["-H", bad]).await.starts_with("HTTP/1.1 401"), "{bad}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn names_and_passwords() {
    let (lab, _server) = with(json!({"basicAuth": {"secretRef": {"name": "users"}, "realm": "shop"}})).await;
    put_secret(&lab, "users", &[("ann", "a:b")]);
    eventually("ann comes in", async || ask(&lab, &["-u", "ann:a:b"]).await.starts_with("HTTP/1.1 200")).await;
    let text = ask(&lab, &["-u", "ann:a:b"]).await;
    assert!(text.contains("x-atoll-consumer: ann") && !text.contains("authorization:"), "{text}");
    let text = ask(&lab, &["-u", "ann:c"]).await;
    assert!(text.starts_with("HTTP/1.1 401") && text.contains("www-authenticate: Basic realm=\"shop\""), "{text}");
    assert!(ask(&lab, &[]).await.starts_with("HTTP/1.1 401"));
    lab.stop().await;
}

#[tokio::test]
async fn addresses_and_bodies() {
    let (lab, _server) = with(json!({"addresses": {"deny": ["127.0.0.0/8"]}})).await;
    assert!(ask(&lab, &[]).await.starts_with("HTTP/1.1 403"));
    let spec = json!({"targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gw"}],
        "addresses": {"allow": ["127.0.0.1"]}, "maxBodyBytes": 10});
    lab.client.put(&policies(), json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    eventually("allowed", async || ask(&lab, &["-d", "0123456789"]).await.starts_with("HTTP/1.1 200")).await;
    assert!(ask(&lab, &["-d", "0123456789a"]).await.starts_with("HTTP/1.1 413"));
    let text = ask(&lab, &["-H", "Transfer-Encoding: chunked", "-d", "0123456789a"]).await;
    assert!(text.starts_with("HTTP/1.1 413"), "a length that is not said counts too: {text}");
    lab.stop().await;
}

#[tokio::test]
async fn headers_so_many_and_so_long() {
    let (lab, _server) = with(json!({"maxHeaders": 6, "maxHeaderBytes": 300})).await;
    // curl itself sends Host, User-Agent and Accept.
    let three = ["-H", "a: 1", "-H", "b: 2", "-H", "c: 3"];
    assert!(ask(&lab, &three).await.starts_with("HTTP/1.1 200"));
    assert!(ask(&lab, &[&three[..], &["-H", "d: 4"]].concat()).await.starts_with("HTTP/1.1 431"));
    let long = format!("a: {}", "x".repeat(300));
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let text = ask(&lab, &[version, "-H", &long]).await;
        assert!(text.contains(" 431") && text.contains("headers are too many or too long"), "{text}");
    }
    lab.stop().await;
}

/// A server with an answer for each path, behind a policy that compresses.
async fn compressing() -> (Lab, Server) {
    let answer = |path: &str| {
        let text = "compressible ".repeat(1000);
        let (head, body) = match path {
            "/text" => ("Content-Type: text/plain; charset=utf-8\r\nETag: \"a\"\r\nAccept-Ranges: bytes\r\n", text),
            "/short" => ("Content-Type: text/plain\r\n", "short".to_owned()),
            "/image" => ("Content-Type: image/png\r\n", text),
            "/encoded" => ("Content-Type: text/plain\r\nContent-Encoding: br\r\n", text),
            "/as-it-is" => ("Content-Type: text/plain\r\nCache-Control: max-age=1, no-transform\r\n", text),
            "/digest" => ("Content-Type: text/plain\r\nRepr-Digest: sha-256=:x:\r\n", text),
            "/events" => ("Content-Type: text/event-stream\r\n", text),
            "/same" => return b"HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n".to_vec(),
            "/part" => {
                return format!(
                    "HTTP/1.1 206 Partial Content\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-1999/9999\r\n\
                     Content-Length: 2000\r\n\r\n{}",
                    "y".repeat(2000)
                )
                .into_bytes();
            }
            _ => ("", "fine".to_owned()),
        };
        format!("HTTP/1.1 200 OK\r\n{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let server = server(move |head, _| {
        let mut answer = answer(head.split(' ').nth(1).unwrap_or_default());
        if head.starts_with("HEAD") {
            let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
            answer.truncate(end + 4);
        }
        answer
    })
    .await;
    let lab = lab().await;
    let target = json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}]);
    let spec = json!({"targetRefs": target, "compression": {}});
    lab.client.put(&policies(), json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    lab.simple(&[server.address]).await;
    (lab, server)
}

#[tokio::test]
async fn texts_are_compressed_for_who_takes_it() {
    let (lab, _server) = compressing().await;
    let at = |path: &str| format!("http://{}{path}", lab.address);
    let whole = "compressible ".repeat(1000);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        for coding in ["gzip", "zstd", "gzip, zstd;q=0.5"] {
            let header = format!("Accept-Encoding: {coding}");
            let text = curl(&[version, "--compressed", "-H", &header, &at("/text")]).await;
            assert!(text == whole, "{coding}: {} bytes", text.len());
            let text =
                curl(&[version, "-H", &header, "-D", "-", "-o", "/dev/null", "-w", "%{size_download}", &at("/text")])
                    .await;
            let wanted = format!("content-encoding: {}\r\n", &coding[..4]);
            assert!(text.contains(&wanted) && text.contains("vary: accept-encoding\r\n"), "{text}");
            assert!(text.contains("etag: W/\"a\"\r\n") && !text.contains("accept-ranges"), "{text}");
            let size: usize = text.lines().last().unwrap().parse().unwrap();
            assert!(size < 1000, "{size}");
        }
        assert!(curl(&[version, "--compressed", &at("/text")]).await == whole, "as curl asks by itself");
        for header in [
            "Accept-Encoding:",
            "Accept-Encoding: br",
            "Accept-Encoding: gzip;q=0",
            "Accept-Encoding: identity, gzip;q=0.5",
        ] {
            let text = curl(&[version, "-H", header, "-i", &at("/text")]).await;
            assert!(!text.contains("content-encoding") && text.ends_with(&whole), "{header}");
            assert!(text.contains("vary: accept-encoding\r\n") && text.contains("etag: \"a\"\r\n"), "{text}");
        }
    }
    assert!(lab.count("compressed_total") > 0);
    eventually("no encoder is left", async || lab.count("compressions_active") == 0).await;
    lab.stop().await;
}

#[tokio::test]
async fn what_must_not_be_compressed_is_not() {
    let (lab, _server) = compressing().await;
    let get = async |args: &[&str], path: &str| {
        let url = format!("http://{}{path}", lab.address);
        curl(&[&["-i", "-H", "Accept-Encoding: gzip"], args, &[&url]].concat()).await
    };
    for path in ["/short", "/image", "/as-it-is", "/digest", "/events", "/part"] {
        let text = get(&[], path).await;
        assert!(!text.contains("content-encoding") && text.contains("content-length: "), "{path}: {text}");
    }
    let text = get(&[], "/encoded").await;
    assert!(text.contains("content-encoding: br") && text.ends_with("compressible "), "{text}");
    let text = get(&["-I"], "/text").await;
    assert!(text.contains("content-length: 13000") && text.contains("vary: accept-encoding"), "{text}");
    assert!(get(&[], "/same").await.contains("etag: W/\"a\""), "what it has is the compressed one");
    assert_eq!(lab.count("compressed_total"), 0);
    lab.stop().await;
}

/// An answer that comes slowly is passed on as it comes, and one that breaks off is not passed off as whole.
#[tokio::test]
async fn compressed_streams_are_not_held_back() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let go = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    let gate = go.clone();
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let gate = gate.clone();
            tokio::spawn(async move {
                let mut head = [0; 2048];
                let count = stream.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..count]).into_owned();
                let first = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                             5\r\nfirst\r\n";
                stream.write_all(first.as_bytes()).await.unwrap();
                if head.contains("/slow") {
                    gate.acquire().await.unwrap().forget();
                    stream.write_all(b"4\r\nlast\r\n").await.unwrap();
                }
                if !head.contains("/broken") {
                    stream.write_all(b"0\r\n\r\n").await.unwrap();
                }
            });
        }
    });
    let lab = lab().await;
    let target = json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}]);
    let spec = json!({"targetRefs": target, "compression": {"types": ["text/*"], "minBytes": 0}});
    lab.client.put(&policies(), json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    lab.simple(&[address]).await;
    for coding in ["gzip", "zstd"] {
        let mut stream = tokio::net::TcpStream::connect(lab.address).await.unwrap();
        let ask = format!("GET /slow HTTP/1.1\r\nHost: a\r\nAccept-Encoding: {coding}\r\nConnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        // Head, a chunk that is not the last, its end: something came out before all went in.
        while text.windows(4).position(|w| w == b"\r\n\r\n").is_none_or(|end| text.len() < end + 12) {
            text.push(stream.read_u8().await.unwrap());
        }
        go.add_permits(1);
        stream.read_to_end(&mut text).await.unwrap();
        assert!(text.ends_with(b"\r\n0\r\n\r\n"));
        go.add_permits(1);
        let header = format!("Accept-Encoding: {coding}");
        let url = format!("http://{}/slow", lab.address);
        assert_eq!(curl(&["--compressed", "-H", &header, &url]).await, "firstlast");
        let url = format!("http://{}/broken", lab.address);
        let text = curl(&["--compressed", "-H", &header, &url]).await;
        assert!(text.contains("curl: ("), "{text}");
    }
    lab.stop().await;
    serving.abort();
}
