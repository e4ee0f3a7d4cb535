//! What routes can say beyond where a request goes: CORS, mirrors, retries, sessions, trailers, other kinds of routes.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const GATEWAY: &str = "gateway.networking.k8s.io";

fn to(service: &str) -> Value {
    json!([{"name": service, "port": 80}])
}

#[tokio::test]
async fn preflights_are_answered_and_answers_say_who_may_read_them() {
    let (lab, server) = (lab().await, echo().await);
    lab.backend("web", &[server.address]).await;
    let cors = json!({"type": "CORS", "cors": {"allowOrigins": ["https://a.test"], "allowMethods": ["PUT"],
        "allowHeaders": ["x-one"], "exposeHeaders": ["x-two"], "allowCredentials": true, "maxAge": 60}});
    let rules =
        json!([{"matches": [{"method": "PUT", "path": {"value": "/"}}], "filters": [cors], "backendRefs": to("web")}]);
    lab.route("r", &[], rules).await;
    let url = format!("http://{}/x", lab.address);
    let preflight =
        ["-i", "-X", "OPTIONS", "-H", "Origin: https://a.test", "-H", "Access-Control-Request-Method: PUT", &url];
    eventually("the preflight is answered", async || curl(&preflight).await.starts_with("HTTP/1.1 204")).await;
    let text = curl(&preflight).await;
    for wanted in [
        "access-control-allow-origin: https://a.test",
        "access-control-allow-methods: PUT",
        "access-control-allow-headers: x-one",
        "access-control-allow-credentials: true",
        "access-control-max-age: 60",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let text = curl(&["-i", "-X", "PUT", "-H", "Origin: https://a.test", &url]).await;
    assert!(text.contains("access-control-allow-origin: https://a.test") && text.contains("PUT /x "), "{text}");
    assert!(text.contains("access-control-expose-headers: x-two") && text.contains("vary: origin"), "{text}");
    let text = curl(&["-i", "-X", "PUT", "-H", "Origin: https://evil.test", &url]).await;
    assert!(text.contains("PUT /x ") && !text.contains("access-control-allow-origin"), "{text}");
    let text = curl(&["-i", "-X", "OPTIONS", &url]).await;
    assert!(text.starts_with("HTTP/1.1 404"), "an OPTIONS that asks for nothing is a request: {text}");
    lab.stop().await;
}

#[tokio::test]
async fn mirrors_get_bodies_up_to_a_limit() {
    let (lab, server, seen) = (lab().await, echo().await, Arc::new(Mutex::new(Vec::<usize>::new())));
    let keep = seen.clone();
    let copies = common::server(move |_, body| {
        keep.lock().unwrap().push(body.len());
        ok("")
    })
    .await;
    lab.backend("web", &[server.address]).await;
    lab.backend("copies", &[copies.address]).await;
    let mirror = json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "copies", "port": 80},
        "fraction": {"numerator": 1, "denominator": 1}}});
    lab.route("r", &[], json!([{"filters": [mirror], "backendRefs": to("web")}])).await;
    lab.ready("/", 404).await;
    eventually("the first copy came", async || !seen.lock().unwrap().is_empty()).await;
    let url = format!("http://{}/x", lab.address);
    let post = async |length: usize| curl(&["-X", "POST", "-d", &"x".repeat(length), &url]).await;
    assert!(post(5000).await.ends_with("xxx"));
    eventually("the body came too", async || seen.lock().unwrap().contains(&5000)).await;
    assert!(post(70_000).await.ends_with("xxx"));
    eventually("a large one is left out", async || lab.count("mirrors_left_out_total") == 1).await;
    assert!(!seen.lock().unwrap().contains(&70_000));
    lab.stop().await;
}

#[tokio::test]
async fn retries_are_made_where_that_is_safe() {
    let (lab, asked) = (lab().await, Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    // Every third request is answered.
    let server = server(move |head, body| {
        if head.starts_with("GET /ready") || count.fetch_add(1, Relaxed) % 3 == 2 {
            return ok(&format!("served {body}"));
        }
        b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n".to_vec()
    })
    .await;
    lab.backend("web", &[server.address]).await;
    let retry = json!({"codes": [503], "attempts": 2, "backoff": "1ms"});
    lab.route("r", &[], json!([{"retry": retry, "backendRefs": to("web")}])).await;
    eventually("served", async || lab.get("/ready").await.0 == 200).await;
    let url = format!("http://{}/x", lab.address);
    assert_eq!(curl(&["-X", "PUT", "-d", "hello", &url]).await, "served hello", "the body is sent again");
    assert_eq!(asked.load(Relaxed), 3);
    let code = curl(&["-X", "POST", "-d", "hello", "-o", "/dev/null", "-w", "%{http_code}", &url]).await;
    assert_eq!((code.as_str(), asked.load(Relaxed)), ("503", 4), "a POST is sent once");
    lab.stop().await;
}

#[tokio::test]
async fn a_slow_endpoint_costs_one_attempt() {
    let (lab, fast) = (lab().await, named("fast").await);
    // Accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    lab.backend("web", &[silent.local_addr().unwrap(), fast.address]).await;
    let rule = json!({"retry": {"attempts": 1, "backoff": "1ms"}, "timeouts": {"backendRequest": "1s"}, "backendRefs": to("web")});
    lab.route("r", &[], json!([rule])).await;
    lab.ready("/", 404).await;
    for _ in 0..4 {
        assert_eq!(lab.get("/").await, (200, "fast".into()));
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_session_stays_where_it_began() {
    let (lab, a, b) = (lab().await, named("a").await, named("b").await);
    lab.backend("web", &[a.address, b.address]).await;
    let session = json!({"sessionName": "sid", "type": "Cookie"});
    lab.route("r", &[], json!([{"sessionPersistence": session, "backendRefs": to("web")}])).await;
    lab.ready("/", 404).await;
    let first = lab.raw("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    let cookie = first.split("set-cookie: ").nth(1).unwrap().split(';').next().unwrap().to_owned();
    assert!(cookie.starts_with("sid=") && first.contains("HttpOnly"), "{first}");
    let body = split(&first).1;
    for _ in 0..20 {
        let text =
            lab.raw(&format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=y; {cookie}\r\nConnection: close\r\n\r\n")).await;
        assert!(split(&text).1 == body && !text.contains("set-cookie"), "{text}");
    }
    // The endpoint goes: the session moves and is told so.
    let other = if body == "a" { &b } else { &a };
    lab.endpoints("web", &[other.address]).await;
    eventually("the session moves", async || {
        let text =
            lab.raw(&format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n")).await;
        split(&text).1 != body && text.contains("set-cookie: sid=")
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let lab = lab().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(String::new()));
    let keep = seen.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let keep = keep.clone();
            tokio::spawn(async move {
                let mut text = Vec::new();
                while !text.ends_with(b"\r\n\r\n")
                    || (text.starts_with(b"POST") && !text.windows(3).any(|w| w == b"0\r\n"))
                {
                    text.push(stream.read_u8().await.unwrap());
                }
                *keep.lock().unwrap() = String::from_utf8_lossy(&text).into_owned();
                let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 7\r\nHost: evil\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
        }
    });
    lab.simple(&[address]).await;
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: x-in\r\nConnection: close, te\r\n\
                   Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-In: 5\r\n\r\n";
    let answer = lab.raw(request).await;
    assert!(answer.contains("0\r\nx-sum: 7\r\n\r\n"), "{answer}");
    assert!(!answer.contains("evil"), "{answer}");
    let asked = seen.lock().unwrap().clone();
    assert!(asked.contains("0\r\nx-in: 5\r\n\r\n") && asked.contains("te: trailers"), "{asked}");
    let text = curl(&["--http2-prior-knowledge", "-i", &format!("http://{}/", lab.address)]).await;
    assert!(text.contains("x-sum: 7"), "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn a_reference_across_namespaces_needs_a_grant() {
    let (lab, server) = (lab().await, named("far").await);
    lab.client.put(
        &services(),
        json!({"metadata": {"name": "far", "namespace": "other"}, "spec": {"ports": [{"name": "http", "port": 80}]}}),
    );
    lab.client.put(
        &slices(),
        json!({"metadata": {"name": "far", "namespace": "other", "labels": {"kubernetes.io/service-name": "far"}},
        "ports": [{"name": "http", "port": server.address.port()}], "endpoints": [{"addresses": ["127.0.0.1"]}]}),
    );
    lab.route("r", &[], json!([{"backendRefs": [{"name": "far", "namespace": "other", "port": 80}]}])).await;
    eventually("refused", async || lab.get("/").await.0 == 500).await;
    let grant = json!({"metadata": {"name": "g", "namespace": "other"}, "spec": {
        "from": [{"group": GATEWAY, "kind": "HTTPRoute", "namespace": "shop"}], "to": [{"group": "", "kind": "Service"}]}});
    let grants = api::kind::Resource::new(GATEWAY, "v1", "referencegrants");
    lab.client.put(&grants, grant);
    eventually("granted", async || lab.get("/").await == (200, "far".into())).await;
    api::client::Client::delete(&*lab.client, &grants, "other", "g", &Default::default()).await.unwrap();
    eventually("taken back", async || lab.get("/").await.0 == 500).await;
    lab.stop().await;
}

#[tokio::test]
async fn ingresses_are_served() {
    let (lab, a, b) = (lab().await, named("a").await, named("b").await);
    lab.backend("a", &[a.address]).await;
    lab.backend("b", &[b.address]).await;
    let to = |name: &str, port: Value| json!({"service": {"name": name, "port": port}});
    let ingress = json!({"metadata": {"name": "i"}, "spec": {"ingressClassName": "atoll",
        "defaultBackend": to("b", json!({"number": 80})),
        "rules": [{"host": "shop.test", "http": {"paths": [
            {"path": "/a", "pathType": "Prefix", "backend": to("a", json!({"name": "http"}))},
            {"path": "/a/exact", "pathType": "Exact", "backend": to("b", json!({"number": 80}))}]}}]}});
    lab.create("networking.k8s.io", "ingresses", ingress).await;
    lab.ready("/a", 404).await;
    assert_eq!(lab.get("/a/b").await.1, "a");
    assert_eq!(lab.get("/a/exact").await.1, "b");
    assert_eq!(lab.get("/ab").await.1, "b", "the default backend");
    let other = json!({"metadata": {"name": "other"}, "spec": {"ingressClassName": "nginx", "rules": [{"host": "shop.test",
        "http": {"paths": [{"path": "/other", "pathType": "Prefix", "backend": to("a", json!({"number": 80}))}]}}]}});
    lab.create("networking.k8s.io", "ingresses", other).await;
    lab.route("later", &["later.test"], json!([{"backendRefs": [{"name": "a", "port": 80}]}])).await;
    eventually("what came later is served", async || {
        lab.raw("GET / HTTP/1.1\r\nHost: later.test\r\nConnection: close\r\n\r\n").await.ends_with("\r\n\r\na")
    })
    .await;
    assert_eq!(lab.get("/other").await.1, "b", "of another class");
    lab.stop().await;
}

/// A gRPC server of HTTP/2 without TLS that answers with the path in a frame, and trailers.
async fn grpc_server() -> std::net::SocketAddr {
    use http_body_util::{BodyExt, StreamBody};
    use hyper::body::Frame;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                let data = bytes::Bytes::from(format!("{path} {}", body.len()));
                let frames = [Ok::<_, std::io::Error>(Frame::data(data)), Ok(Frame::trailers(trailers))];
                let body = StreamBody::new(futures_util::stream::iter(frames));
                Ok::<_, std::io::Error>(
                    http::Response::builder().header("content-type", "application/grpc").body(body).unwrap(),
                )
            });
            let builder = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            tokio::spawn(builder.serve_connection(hyper_util::rt::TokioIo::new(stream), service));
        }
    });
    address
}

#[tokio::test]
async fn grpc_calls_go_by_service_and_method() {
    let lab = lab().await;
    let address = grpc_server().await;
    lab.backend("calls", &[address]).await;
    let route = json!({"metadata": {"name": "g"}, "spec": {"parentRefs": [{"name": "gw"}], "rules": [
        {"matches": [{"method": {"service": "shop.Cart", "method": "Add"}}], "backendRefs": to("calls")},
        {"matches": [{"method": {"service": "shop.Gone"}}], "backendRefs": to("missing")}]}});
    lab.create(GATEWAY, "grpcroutes", route).await;
    let call = async |path: &str| {
        let url = format!("http://{}{path}", lab.address);
        curl(&[
            "--http2-prior-knowledge",
            "-i",
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "-d",
            "12345",
            &url,
        ])
        .await
    };
    eventually("served", async || call("/shop.Cart/Add").await.contains("/shop.Cart/Add 5")).await;
    let text = call("/shop.Cart/Add").await;
    assert!(text.starts_with("HTTP/2 200") && text.contains("grpc-status: 0"), "{text}");
    let text = call("/shop.Cart/Remove").await;
    assert!(text.contains("HTTP/2 200") && text.contains("grpc-status: 12"), "{text}");
    let text = call("/shop.Gone/Any").await;
    assert!(text.contains("grpc-status: 14") && text.contains("grpc-message: the route's rule"), "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn a_balancer_in_front_says_who_asks() {
    let (lab, server) = (lab_with(|config| config.proxy_protocol = true).await, echo().await);
    lab.backend("web", &[server.address]).await;
    lab.route("r", &[], json!([{"backendRefs": to("web")}])).await;
    let asked = "PROXY TCP4 192.0.2.7 10.0.0.1 1234 80\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    eventually("served", async || lab.raw(asked).await.contains("x-forwarded-for: 192.0.2.7")).await;
    assert_eq!(lab.raw("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await, "", "without the header there is no answer");
    lab.stop().await;
}

#[tokio::test]
async fn websockets_and_events_stream() {
    let lab = lab().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = [0; 2048];
                let count = stream.read(&mut buffer).await.unwrap();
                if String::from_utf8_lossy(&buffer[..count]).contains("upgrade: websocket") {
                    stream
                        .write_all(
                            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
                        )
                        .await
                        .unwrap();
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    return;
                }
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
                    .await
                    .unwrap();
                // The second event comes when the first was taken note of: the client closes.
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    lab.backend("web", &[address]).await;
    lab.route("r", &[], json!([{"backendRefs": to("web")}])).await;
    let mut first = Vec::new();
    eventually("the first event comes before the answer ends", async || {
        let mut stream = TcpStream::connect(lab.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        first.clear();
        while !first.ends_with(b"data: 1\n\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => first.push(byte),
                Err(_) => return false,
            }
            if first.starts_with(b"HTTP/1.1 404") || first.starts_with(b"HTTP/1.1 503") {
                return false;
            }
        }
        true
    })
    .await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"));
    stream.write_all(b"\x81\x05hello").await.unwrap();
    let mut frame = [0; 7];
    stream.read_exact(&mut frame).await.unwrap();
    assert_eq!(&frame, b"\x81\x05hello");
    drop(stream);
    lab.stop().await;
}

/// What an access log is written to.
#[derive(Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Page {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn requests_are_logged_counted_and_traced() {
    let page = Page::default();
    let metrics = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let scrape = format!("http://{}/metrics", metrics.local_addr().unwrap());
    let out = Box::new(page.clone());
    let lab = lab_with(|config| {
        config.metrics_listener = Some(metrics);
        config.access_log = Some(gateway::AccessSink { format: gateway::AccessFormat::Json, out });
    })
    .await;
    let server = echo().await;
    lab.simple(&[server.address]).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let header = format!("traceparent: 00-{trace}-b7ad6b7169203331-01");
    let text = curl(&["-H", &header, &format!("http://{}/x?q=1", lab.address)]).await;
    assert!(text.contains(&format!("traceparent: 00-{trace}-")) && !text.contains("b7ad6b7169203331"), "{text}");
    let text = curl(&["-H", "traceparent: 00-evil-1-1", &format!("http://{}/y", lab.address)]).await;
    assert!(!text.contains("evil"), "{text}");
    let line = |target: &str| {
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|line| line["target"] == target)
    };
    eventually("both are logged", async || line("/x?q=1").is_some() && line("/y").is_some()).await;
    let logged = line("/x?q=1").unwrap();
    assert_eq!(
        (&logged["status"], &logged["route"], &logged["trace"]),
        (&json!(200), &json!("shop/all"), &json!(trace))
    );
    let text = curl(&[&scrape]).await;
    let value = text.lines().find_map(|line| line.strip_prefix("atoll_gateway_responses_2xx_total ")).unwrap();
    assert!(value.parse::<u64>().unwrap() >= 3, "{text}");
    assert!(curl(&["-i", &scrape.replace("/metrics", "/")]).await.starts_with("HTTP/1.1 404"));
    lab.stop().await;
}
