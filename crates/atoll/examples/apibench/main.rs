//! Measures a running API server from outside, over TLS with the administrator's certificate:
//! `apibench KUBECONFIG creates|watchers|pods|path|endpoint` prints one JSON value.
//!
//! - `creates`: durable creates of ConfigMaps a second, 64 connections.
//! - `watchers`: from sending a create until the last of 100 watchers has its event.
//! - `pods`: from sending a pod until its process has written its first line (the log's own timestamp).
//! - `path IMAGE COUNT`: the same as the process itself tells it.
//! - `endpoint ROUTER COUNT`: from a changed EndpointSlice until the kernel has it.

mod endpoint;
mod path;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

type Fault = Box<dyn std::error::Error + Send + Sync>;

const CREATES: usize = 10_000;
const CONNECTIONS: usize = 64;
const WATCHERS: usize = 100;
const EVENTS: usize = 50;
const PODS: usize = 30;

#[derive(Clone)]
struct Target {
    address: String,
    tls: tokio_rustls::TlsConnector,
}

/// Reads what Atoll itself wrote: one cluster, one user, one `key: value` a line.
fn target(path: &str) -> Result<Target, Fault> {
    let text = std::fs::read_to_string(path)?;
    let field = |name: &str| -> Result<String, Fault> {
        let line = text.lines().find_map(|l| l.trim().strip_prefix(name)?.strip_prefix(':'));
        Ok(line.ok_or(format!("{path}: no {name}"))?.trim().trim_matches('"').to_owned())
    };
    let decode = |name: &str| -> Result<Vec<u8>, Fault> {
        use base64::Engine;
        Ok(base64::engine::general_purpose::STANDARD.decode(field(name)?)?)
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&decode("certificate-authority-data")?) {
        roots.add(certificate?)?;
    }
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(&decode("client-certificate-data")?).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&decode("client-key-data")?)?;
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
    let address = field("server")?.trim_start_matches("https://").to_owned();
    Ok(Target { address, tls: Arc::new(config).into() })
}

impl Target {
    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Fault> {
        let tcp = tokio::net::TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(h, _)| h).to_owned();
        let tls = self.tls.connect(ServerName::try_from(host)?, tcp).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        method: &str,
        path: &str,
        body: Value,
    ) -> Result<Response<Incoming>, Fault> {
        sender.ready().await?;
        let body = if body.is_null() { Bytes::new() } else { serde_json::to_vec(&body)?.into() };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.address)
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        Ok(sender.send_request(request).await?)
    }

    async fn call(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        method: &str,
        path: &str,
        body: Value,
    ) -> Result<(u16, Bytes), Fault> {
        let response = self.send(sender, method, path, body).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    async fn must(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        method: &str,
        path: &str,
        body: Value,
    ) -> Result<Bytes, Fault> {
        let (status, bytes) = self.call(sender, method, path, body).await?;
        if status >= 300 {
            return Err(format!("{method} {path}: {status} {}", String::from_utf8_lossy(&bytes)).into());
        }
        Ok(bytes)
    }
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": "value", "more": "x".repeat(200)}})
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = ((sorted.len().saturating_sub(1)) as f64 * q).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

async fn creates(target: Target) -> Result<Value, Fault> {
    let next = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (target, next) = (target.clone(), next.clone());
        tasks.spawn(async move {
            let mut sender = target.connect().await?;
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= CREATES {
                    return Ok::<_, Fault>(());
                }
                let name = format!("c{n}");
                target.must(&mut sender, "POST", "/api/v1/namespaces/bench/configmaps", config_map(&name)).await?;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok(json!({"creates_per_second": CREATES as f64 / seconds, "creates": CREATES, "connections": CONNECTIONS}))
}

async fn watchers(target: Target) -> Result<Value, Fault> {
    let seen = Arc::new(tokio::sync::Semaphore::new(0));
    for _ in 0..WATCHERS {
        let mut sender = target.connect().await?;
        let path =
            "/api/v1/namespaces/bench/configmaps?watch=1&resourceVersion=0&fieldSelector=metadata.name%3Dwatched";
        let mut body = target.send(&mut sender, "GET", path, Value::Null).await?.into_body();
        let seen = seen.clone();
        tokio::spawn(async move {
            let _connection = sender;
            while let Some(Ok(frame)) = body.frame().await {
                if let Some(data) = frame.data_ref() {
                    seen.add_permits(data.iter().filter(|b| **b == b'\n').count());
                }
            }
        });
    }
    let mut sender = target.connect().await?;
    let mut times = Vec::new();
    for turn in 0..EVENTS {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let begun = Instant::now();
        if turn == 0 {
            target.must(&mut sender, "POST", "/api/v1/namespaces/bench/configmaps", config_map("watched")).await?;
        } else {
            let mut object = config_map("watched");
            object["data"]["key"] = json!(turn.to_string());
            target.must(&mut sender, "PUT", "/api/v1/namespaces/bench/configmaps/watched", object).await?;
        }
        let permits = tokio::time::timeout(Duration::from_secs(10), seen.acquire_many(WATCHERS as u32)).await??;
        permits.forget();
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(
        json!({"write_to_last_of_100_watchers_ms": {"median": quantile(&times, 0.5), "p99": quantile(&times, 0.99)}, "events": EVENTS}),
    )
}

async fn pods(target: Target) -> Result<Value, Fault> {
    let mut sender = target.connect().await?;
    let mut times = Vec::new();
    for turn in 0..PODS {
        let name = format!("p{turn}");
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": "127.0.0.1:5000/bench/busybox:1", "command": ["/bin/sh", "-c", "echo started; exec sleep 1000"]}]}});
        let begun = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as i64;
        target.must(&mut sender, "POST", "/api/v1/namespaces/bench/pods", pod).await?;
        let until = Instant::now() + Duration::from_secs(30);
        let line = loop {
            let path = format!("/api/v1/namespaces/bench/pods/{name}/log?timestamps=true");
            let (status, bytes) = target.call(&mut sender, "GET", &path, Value::Null).await?;
            if status == 200 && !bytes.is_empty() {
                break String::from_utf8_lossy(&bytes).into_owned();
            }
            if Instant::now() > until {
                return Err(format!("{name} wrote nothing in 30 s: {}", String::from_utf8_lossy(&bytes)).into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let stamp = line.split(' ').next().unwrap_or_default();
        let at = api::time::parse_micros(stamp).ok_or(format!("log line without a time: {line}"))?;
        times.push((at - begun) as f64 / 1e3);
        target.must(&mut sender, "DELETE", &format!("/api/v1/namespaces/bench/pods/{name}"), Value::Null).await?;
    }
    times.sort_by(f64::total_cmp);
    Ok(
        json!({"pod_request_to_process_ms": {"median": quantile(&times, 0.5), "p99": quantile(&times, 0.99)}, "pods": PODS}),
    )
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Fault> {
    let args: Vec<String> = std::env::args().collect();
    let (Some(config), Some(what)) = (args.get(1), args.get(2)) else {
        return Err("usage: apibench KUBECONFIG creates|watchers|pods|path|endpoint".into());
    };
    let target = target(config)?;
    let mut sender = target.connect().await?;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}});
    let (status, bytes) = target.call(&mut sender, "POST", "/api/v1/namespaces", namespace).await?;
    if status >= 300 && status != 409 {
        return Err(format!("create namespace: {status} {}", String::from_utf8_lossy(&bytes)).into());
    }
    let result = match what.as_str() {
        "creates" => creates(target).await?,
        "watchers" => watchers(target).await?,
        "pods" => pods(target).await?,
        "path" => {
            let (Some(image), Some(Ok(count))) = (args.get(3), args.get(4).map(|count| count.parse())) else {
                return Err("usage: apibench KUBECONFIG path IMAGE COUNT".into());
            };
            path::path(target, image, count).await?
        }
        "endpoint" => {
            let (Some(router), Some(Ok(count))) = (args.get(3), args.get(4).map(|count| count.parse())) else {
                return Err("usage: apibench KUBECONFIG endpoint ROUTER COUNT".into());
            };
            endpoint::endpoint(target, router, count).await?
        }
        other => return Err(format!("{other}: must be creates, watchers, pods, path or endpoint").into()),
    };
    println!("{result}");
    Ok(())
}
