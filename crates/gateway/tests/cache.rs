//! Answers kept by a TrafficPolicy's cache (RFC 9111), as curl sees it.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An endpoint that counts requests and answers by path; the answer says its number and what it was asked.
async fn counting() -> (Server, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let server = server(move |head, _| {
        let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
        let path = head.split(' ').nth(1).unwrap_or_default();
        let has = |line: &str| head.lines().any(|one| one.eq_ignore_ascii_case(line));
        let (status, headers) = match path.split(['?', '#']).next().unwrap_or_default() {
            "/minute" | "/other" => ("200 OK", "Cache-Control: max-age=60\r\n"),
            "/public" => ("200 OK", "Cache-Control: public, max-age=60\r\n"),
            "/shared" => ("200 OK", "Cache-Control: max-age=0, s-maxage=60\r\n"),
            "/private" => ("200 OK", "Cache-Control: private, max-age=60\r\n"),
            "/never" => ("200 OK", "Cache-Control: no-store\r\n"),
            "/cookie" => ("200 OK", "Cache-Control: max-age=60\r\nSet-Cookie: a=b\r\n"),
            "/old" => ("200 OK", "Cache-Control: max-age=60\r\nAge: 60\r\n"),
            "/language" => ("200 OK", "Cache-Control: max-age=60\r\nVary: Accept-Language\r\n"),
            "/anything" => ("200 OK", "Cache-Control: max-age=60\r\nVary: *\r\n"),
            "/gone" => ("404 Not Found", "Cache-Control: max-age=60\r\n"),
            "/broken" => ("500 Internal Server Error", "Cache-Control: max-age=60\r\n"),
            "/check" if has("if-none-match: \"v1\"") => {
                return b"HTTP/1.1 304 Not Modified\r\nETag: \"v1\"\r\nX-New: yes\r\n\r\n".to_vec();
            }
            "/check" => ("200 OK", "Cache-Control: no-cache\r\nETag: \"v1\"\r\nX-New: no\r\n"),
            "/tagged" => ("200 OK", "Cache-Control: max-age=60\r\nETag: \"v1\"\r\n"),
            "/short" => {
                let head = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n";
                return format!("{head}1\r\nx\r\nnot a length\r\n").into_bytes();
            }
            "/long" => ("200 OK", "Cache-Control: max-age=60\r\nX-Long: yes\r\n"),
            _ => ("200 OK", ""),
        };
        let body = if path == "/long" { "x".repeat(5000) } else { format!("answer {number}\n") };
        let length = body.len();
        let body = if head.starts_with("HEAD") { String::new() } else { body };
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n{body}").into_bytes()
    })
    .await;
    (server, asked)
}

struct Cached {
    lab: Lab,
    asked: Arc<AtomicUsize>,
    _server: Server,
}

async fn caching(cache: Value, more: Value) -> Cached {
    let (lab, (server, asked)) = (lab().await, counting().await);
    let target = json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}]);
    let mut spec = json!({"targetRefs": target, "cache": cache});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let policies = api::kind::Resource::new("gateway.atoll.dev", "v1alpha1", "trafficpolicies");
    lab.client.put(&policies, json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    lab.simple(&[server.address]).await;
    asked.store(0, Ordering::SeqCst);
    Cached { lab, asked, _server: server }
}

impl Cached {
    async fn get(&self, path: &str, args: &[&str]) -> String {
        let url = format!("http://{}{path}", self.lab.address);
        curl(&[&["-i", "--path-as-is"], args, &[&url]].concat()).await
    }

    /// Two requests, and whether the second one was answered without the endpoint.
    async fn keeps(&self, path: &str, args: &[&str]) -> bool {
        self.get(path, args).await;
        let before = self.asked.load(Ordering::SeqCst);
        let text = self.get(path, args).await;
        let kept = self.asked.load(Ordering::SeqCst) == before;
        assert_eq!(kept, text.contains("cache-status: atoll; hit\r\n"), "{path}: {text}");
        assert!(!kept || text.contains("age: 0\r\n") || text.contains("age: 1\r\n"), "{path}: {text}");
        kept
    }
}

#[tokio::test]
async fn what_says_so_is_kept_and_nothing_else() {
    let cached = caching(json!({}), json!({})).await;
    for (path, kept) in [
        ("/minute", true),
        ("/minute?a=1", true),
        ("/shared", true),
        ("/gone", true),
        ("/silent", false),
        ("/private", false),
        ("/never", false),
        ("/cookie", false),
        ("/old", false),
        ("/anything", false),
        ("/broken", false),
    ] {
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            assert_eq!(cached.keeps(path, &[version]).await, kept, "{path} {version}");
        }
    }
    assert!(cached.get("/minute", &[]).await.ends_with("answer 1\n"), "of all that were asked, the first");
    assert!(cached.get("/x/../minute", &[]).await.ends_with("answer 1\n"), "the same path");
    assert!(!cached.get("/minute?a=2", &[]).await.contains("; hit"), "another query");
    assert!(!cached.get("/minute", &["-H", "Host: other.test"]).await.contains("; hit"), "another host");
    let head = cached.get("/minute", &["-I"]).await;
    assert!(head.contains("; hit") && head.contains("content-length: 9\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    let part = cached.get("/minute", &["-H", "Range: bytes=0-1"]).await;
    assert!(!part.contains("; hit"), "parts are the endpoint's: {part}");
    assert!(cached.lab.count("cache_hits_total") > 10 && cached.lab.count("cache_misses_total") > 10);
    cached.lab.stop().await;
}

#[tokio::test]
async fn requests_say_what_they_take() {
    let cached = caching(json!({}), json!({})).await;
    for (language, kept) in [("de", false), ("en", false), ("de", true), ("en", true), ("fr", false)] {
        let header = format!("Accept-Language: {language}");
        let text = cached.get("/language", &["-H", &header]).await;
        assert_eq!(text.contains("; hit"), kept, "{language}: {text}");
    }
    assert!(cached.keeps("/minute", &[]).await);
    for header in
        ["Cache-Control: no-cache", "Cache-Control: max-age=0", "Pragma: no-cache", "Cache-Control: min-fresh=100"]
    {
        let text = cached.get("/minute", &["-H", header]).await;
        assert!(!text.contains("; hit"), "{header}: {text}");
    }
    let only = ["-H", "Cache-Control: only-if-cached"];
    assert!(cached.get("/minute", &only).await.contains("; hit"));
    assert!(cached.get("/other", &only).await.starts_with("HTTP/1.1 504"));
    let private = ["-H", "Cache-Control: no-store"];
    assert!(!cached.keeps("/other", &private).await, "whose request says so, its answer is not kept");
    cached.lab.stop().await;
}

#[tokio::test]
async fn what_is_somebodys_own_is_kept_for_nobody() {
    let cached = caching(json!({"keyHeaders": ["x-tenant"]}), json!({})).await;
    for who in ["Authorization: Bearer x", "Cookie: session=1"] {
        assert!(!cached.keeps("/minute", &["-H", who]).await, "{who}");
        assert!(cached.keeps("/public", &["-H", who]).await, "{who}");
    }
    // a header that nobody knows may have led the endpoint elsewhere
    let odd = ["-H", "X-Original-Url: /admin"];
    assert!(!cached.keeps("/other", &odd).await);
    assert!(!cached.get("/other", &[]).await.contains("; hit"), "nor did it leave anything for others");
    assert!(cached.keeps("/other", &[]).await);
    // one that the policy names is part of what is asked for
    let ann = cached.get("/shared", &["-H", "X-Tenant: ann"]).await;
    assert!(cached.keeps("/shared", &["-H", "X-Tenant: bob"]).await);
    let again = cached.get("/shared", &["-H", "X-Tenant: ann"]).await;
    let last = |text: &str| text.lines().last().unwrap_or_default().to_owned();
    assert!(again.contains("; hit") && last(&again) == last(&ann), "{again}");
    cached.lab.stop().await;
}

#[tokio::test]
async fn a_check_comes_before_the_cache() {
    let cached = caching(json!({}), json!({"addresses": {"deny": ["127.0.0.0/8"]}})).await;
    assert!(cached.get("/minute", &[]).await.starts_with("HTTP/1.1 403"));
    assert_eq!(cached.asked.load(Ordering::SeqCst), 0);
    cached.lab.stop().await;
}

#[tokio::test]
async fn old_answers_are_asked_for_again() {
    let cached = caching(json!({}), json!({})).await;
    let first = cached.get("/check", &[]).await;
    assert!(first.contains("x-new: no") && first.ends_with("answer 1\n"), "{first}");
    let second = cached.get("/check", &[]).await;
    assert!(second.starts_with("HTTP/1.1 200") && second.ends_with("answer 1\n"), "{second}");
    assert!(second.contains("x-new: yes") && second.contains("fwd-status=304"), "{second}");
    assert_eq!(cached.asked.load(Ordering::SeqCst), 2);
    assert_eq!(cached.lab.count("cache_validated_total"), 1);
    // a client that has it already is told so, without the endpoint or with it
    let same = cached.get("/check", &["-H", "If-None-Match: \"v1\""]).await;
    assert!(same.starts_with("HTTP/1.1 304") && !same.contains("answer"), "{same}");
    cached.get("/tagged", &[]).await;
    let before = cached.asked.load(Ordering::SeqCst);
    for (tag, status) in [("\"v1\"", 304), ("W/\"v1\", \"x\"", 304), ("*", 304), ("\"v2\"", 200)] {
        let text = cached.get("/tagged", &["-H", &format!("If-None-Match: {tag}")]).await;
        assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{tag}: {text}");
    }
    assert_eq!(cached.asked.load(Ordering::SeqCst), before);
    cached.lab.stop().await;
}

#[tokio::test]
async fn what_changes_is_forgotten() {
    let cached = caching(json!({}), json!({})).await;
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        assert!(cached.keeps("/minute", &[]).await);
        cached.get("/minute", &["-X", method]).await;
        assert!(!cached.get("/minute", &[]).await.contains("; hit"), "{method}");
    }
    assert!(cached.keeps("/gone", &[]).await);
    cached.get("/gone", &["-X", "POST"]).await;
    assert!(cached.get("/gone", &[]).await.contains("; hit"), "a change that failed is none");
    // a route that changes has another answer
    assert!(cached.keeps("/minute", &[]).await);
    let filter = json!({"type": "URLRewrite", "urlRewrite": {"hostname": "elsewhere.test"}});
    let rules = json!([{"filters": [filter], "backendRefs": [{"name": "web", "port": 80}]}]);
    let spec = json!({"parentRefs": [{"name": "gw"}], "rules": rules});
    cached.lab.client.put(&routes(), json!({"metadata": {"name": "all", "namespace": "shop"}, "spec": spec}));
    eventually("asked again", async || !cached.get("/minute", &[]).await.contains("; hit")).await;
    cached.lab.stop().await;
}

#[tokio::test]
async fn what_is_not_whole_or_too_long_is_not_kept() {
    let cached = caching(json!({"maxObjectBytes": 4096}), json!({})).await;
    let text = cached.get("/short", &[]).await;
    assert!(text.contains("curl: ("), "not passed off as whole: {text}");
    assert!(!cached.keeps("/short", &[]).await);
    assert!(!cached.keeps("/long", &[]).await);
    assert!(cached.get("/long", &[]).await.ends_with(&"x".repeat(5000)));
    cached.lab.stop().await;
}

/// A crowd that wants the same thing is one request to the endpoint.
#[tokio::test]
async fn a_crowd_asks_once() {
    use tokio::io::AsyncWriteExt;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
    let (counted, gate) = (asked.clone(), go.clone());
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (counted, gate) = (counted.clone(), gate.clone());
            tokio::spawn(async move {
                let mut stream = tokio::io::BufReader::new(stream);
                while let Some((head, _)) = read_request(&mut stream).await {
                    if head.starts_with("GET /crowd") {
                        counted.fetch_add(1, Ordering::SeqCst);
                        gate.acquire().await.unwrap().forget();
                    }
                    let answer = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 4\r\n\r\nfine";
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            });
        }
    });
    let lab = lab().await;
    let target = json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "all"}]);
    let policies = api::kind::Resource::new("gateway.atoll.dev", "v1alpha1", "trafficpolicies");
    let spec = json!({"targetRefs": target, "cache": {}});
    lab.client.put(&policies, json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}));
    lab.simple(&[address]).await;
    let crowd: Vec<_> = (0..20)
        .map(|_| {
            let url = format!("http://{}/crowd", lab.address);
            tokio::spawn(async move { curl(&[&url]).await })
        })
        .collect();
    eventually("all but one wait", async || lab.count("cache_waits_total") == 19).await;
    go.add_permits(20);
    for one in crowd {
        assert_eq!(one.await.unwrap(), "fine");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    lab.stop().await;
    serving.abort();
}
