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
