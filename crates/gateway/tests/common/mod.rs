//! What the tests share: an API in memory, a gateway on loopback, upstream servers that nobody here wrote the client for.
#![allow(dead_code, clippy::unwrap_used)]

use api::client::{Client, DeleteOptions};
use api::kind::Resource;
use api::testing::MemoryClient;
use gateway::{Config, Counters, Gateway};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub struct Lab {
    pub client: Arc<MemoryClient>,
    pub address: SocketAddr,
    /// Of the socket for TLS.
    pub tls: SocketAddr,
    pub counters: Arc<Counters>,
    pub shutdown: Option<oneshot::Sender<()>>,
    pub running: JoinHandle<()>,
}

pub fn gateways() -> Resource {
    Resource::new("gateway.networking.k8s.io", "v1", "gateways")
}
pub fn routes() -> Resource {
    Resource::new("gateway.networking.k8s.io", "v1", "httproutes")
}
pub fn services() -> Resource {
    Resource::new("", "v1", "services")
}
pub fn slices() -> Resource {
    Resource::new("discovery.k8s.io", "v1", "endpointslices")
}

/// A gateway with one Gateway object that takes all hosts.
pub async fn lab() -> Lab {
    lab_with(|_| {}).await
}

pub async fn lab_with(change: impl FnOnce(&mut Config)) -> Lab {
    let client = MemoryClient::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tls_listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tls = tls_listener.local_addr().unwrap();
    let mut config = Config { tls_listener: Some(tls_listener), ..Config::new(listener) };
    config.drain = Duration::from_secs(5);
    change(&mut config);
    let gateway = Gateway::new(config, client.clone());
    let counters = gateway.counters();
    let (shutdown, wait) = oneshot::channel();
    let running = tokio::spawn(async move {
        gateway
            .run(async {
                let _ = wait.await;
            })
            .await
            .unwrap();
    });
    let lab = Lab { client, address, tls, counters, shutdown: Some(shutdown), running };
    lab.gateway("gw", json!([{"name": "http", "port": 80, "protocol": "HTTP"}])).await;
    lab
}

/// `curl` with these arguments: what it said on both channels.
pub async fn curl(args: &[&str]) -> String {
    let output = tokio::process::Command::new("curl").args(["-sS", "--max-time", "20"]).args(args).output().await;
    let output = output.unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

impl Lab {
    /// Any object, in namespace `shop`.
    pub async fn create(&self, group: &str, plural: &str, object: Value) {
        self.client.create(&Resource::new(group, "v1", plural), "shop", object).await.unwrap();
    }
    pub async fn gateway(&self, name: &str, listeners: Value) {
        let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": name}, "spec": {"gatewayClassName": "atoll", "listeners": listeners}});
        self.client.create(&gateways(), "shop", gateway).await.unwrap();
    }
    pub async fn service(&self, name: &str, extra: Value) {
        let mut port = json!({"name": "http", "port": 80});
        for (key, value) in extra.as_object().unwrap() {
            port[key] = value.clone();
        }
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": "10.43.0.9", "ports": [port]}});
        self.client.create(&services(), "shop", service).await.unwrap();
    }
    pub async fn endpoints(&self, service: &str, addresses: &[SocketAddr]) {
        for (index, address) in addresses.iter().enumerate() {
            let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("{service}-{index}"), "namespace": "shop",
                             "labels": {"kubernetes.io/service-name": service}},
                "ports": [{"name": "http", "port": address.port(), "protocol": "TCP"}],
                "endpoints": [{"addresses": [address.ip().to_string()], "conditions": {"ready": true}}]});
            self.client.put(&slices(), slice);
        }
        for index in addresses.len()..16 {
            let name = format!("{service}-{index}");
            let _ = self.client.delete(&slices(), "shop", &name, &DeleteOptions::default()).await;
        }
    }
    /// A Service `name` with these endpoints.
    pub async fn backend(&self, name: &str, addresses: &[SocketAddr]) {
        self.service(name, json!({})).await;
        self.endpoints(name, addresses).await;
    }
    pub async fn route(&self, name: &str, hostnames: &[&str], rules: Value) {
        let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": name}, "spec": {"parentRefs": [{"name": "gw"}], "hostnames": hostnames, "rules": rules}});
        self.client.create(&routes(), "shop", route).await.unwrap();
    }
    /// A route of everything to one service, and the wait until it is served.
    pub async fn simple(&self, addresses: &[SocketAddr]) {
        self.backend("web", addresses).await;
        self.route("all", &[], json!([{"backendRefs": [{"name": "web", "port": 80}]}])).await;
        self.ready("/", 404).await;
    }
    /// Waits until the answer is another one than `not` (and than "no routes read yet").
    pub async fn ready(&self, path: &str, not: u16) {
        eventually("the route is served", async || {
            let status = self.get(path).await.0;
            status != not && status != 503
        })
        .await;
    }
    pub async fn get(&self, path: &str) -> (u16, String) {
        let text = self.raw(&format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n")).await;
        split(&text)
    }
    /// Sends bytes, half closes nothing, reads to the end.
    pub async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        let read = stream.read_to_end(&mut text);
        let _ = tokio::time::timeout(Duration::from_secs(20), read).await.unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }
    pub async fn stop(mut self) {
        let _ = self.shutdown.take().unwrap().send(());
        tokio::time::timeout(Duration::from_secs(20), &mut self.running).await.unwrap().unwrap();
    }
    pub fn count(&self, name: &str) -> u64 {
        let name = format!("atoll_gateway_{name}");
        self.counters.read().into_iter().find(|(known, _)| **known == *name).unwrap().1
    }
}

/// Status and body of an answer.
pub fn split(text: &str) -> (u16, String) {
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    (status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(std::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub struct Server {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An upstream that answers each connection's requests by `answer`: request head and body in, whole answer out. It knows
/// Content-Length bodies only. An empty answer closes the connection.
pub async fn server(answer: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            connections.spawn(async move {
                let mut stream = BufReader::new(stream);
                while let Some((head, body)) = read_request(&mut stream).await {
                    let bytes = answer(&head, &body);
                    if bytes.is_empty() || stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Server { address, task }
}

/// Head and body of the next request; chunked bodies come as they are on the wire.
pub async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<(String, String)> {
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let mut body = Vec::new();
    if let Some(length) = field("content-length:") {
        body.resize(length.parse().ok()?, 0);
        stream.read_exact(&mut body).await.ok()?;
    } else if field("transfer-encoding:").is_some() {
        while !body.ends_with(b"0\r\n\r\n") {
            body.push(stream.read_u8().await.ok()?);
        }
    }
    Some((head, String::from_utf8_lossy(&body).into_owned()))
}

pub fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// A server that says its name.
pub async fn named(name: &'static str) -> Server {
    server(move |_, _| ok(name)).await
}

/// A server that says what it was asked.
pub async fn echo() -> Server {
    server(|head, body| ok(&format!("{head}\n{body}"))).await
}
