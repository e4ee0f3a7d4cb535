//! How fast the API is, over real TLS connections with durable writes: creates a second, and how long an event takes to
//! reach a hundred watchers. `cargo run --release -p server --example load [CREATES]`; figures as one line of JSON.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Sender = hyper::client::conn::http2::SendRequest<Full<Bytes>>;

const CONNECTIONS: usize = 8;
const CONCURRENT: usize = 128;
const WATCHERS: usize = 100;
const EVENTS: usize = 100;
const PATH: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::main]
async fn main() -> Result<(), Error> {
    let creates: usize = std::env::args().nth(1).map_or(Ok(10_000), |n| n.parse())?;
    let dir = tempfile::tempdir()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let advertise = listener.local_addr()?;
    let store = Arc::new(store::redb::Engine::open(&dir.path().join("store"))?);
    let server = server::Server::new(server::Config {
        listener,
        data_dir: dir.path().to_owned(),
        advertise,
        store,
        cluster_domain: "cluster.local".into(),
        service_cidr: "10.43.0.0/16".into(),
    })
    .await?;
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(std::future::pending()).await });
    let mut senders = Vec::new();
    for _ in 0..CONNECTIONS {
        senders.push(connect(dir.path(), advertise).await?);
    }
    let http = over_http(&senders, creates).await?;
    let local = in_process(&server, creates).await?;
    let (median, worst) = watchers(dir.path(), advertise, &senders[0]).await?;
    println!(
        "{{\"creates_per_second_http\":{http:.0},\"creates_per_second_in_process\":{local:.0},\
         \"event_to_{WATCHERS}_watchers_ms_median\":{median:.2},\"event_to_{WATCHERS}_watchers_ms_max\":{worst:.2}}}"
    );
    Ok(())
}

async fn connect(dir: &Path, address: std::net::SocketAddr) -> Result<Sender, Error> {
    let pki = dir.join("pki");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.join("ca.crt"))?)?;
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(pki.join("admin.crt"))?],
            PrivateKeyDer::from_pem_file(pki.join("admin.key"))?,
        )?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let stream = tokio::net::TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let stream =
        tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(ServerName::try_from("127.0.0.1")?, stream).await?;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

fn body(name: &str) -> String {
    serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"app": "load"}},
                       "data": {"key": "value ".repeat(20)}})
    .to_string()
}

async fn create(mut sender: Sender, name: &str) -> Result<(), Error> {
    let request = hyper::Request::post(format!("https://127.0.0.1{PATH}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body(name))))?;
    let response = sender.send_request(request).await?;
    let code = response.status();
    response.into_body().collect().await?;
    if code != 201 {
        return Err(format!("create {name}: {code}").into());
    }
    Ok(())
}

async fn over_http(senders: &[Sender], creates: usize) -> Result<f64, Error> {
    let started = Instant::now();
    let mut tasks = Vec::new();
    for worker in 0..CONCURRENT {
        let sender = senders[worker % senders.len()].clone();
        tasks.push(tokio::spawn(async move {
            for n in (worker..creates).step_by(CONCURRENT) {
                create(sender.clone(), &format!("h-{n}")).await?;
            }
            Ok::<_, Error>(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(creates as f64 / started.elapsed().as_secs_f64())
}

async fn in_process(server: &Arc<server::Server>, creates: usize) -> Result<f64, Error> {
    let resource = api::kind::Resource::new("", "v1", "configmaps");
    let client = server.client();
    let started = Instant::now();
    let mut tasks = Vec::new();
    for worker in 0..CONCURRENT {
        let (client, resource) = (client.clone(), resource.clone());
        tasks.push(tokio::spawn(async move {
            for n in (worker..creates).step_by(CONCURRENT) {
                let object = serde_json::from_str(&body(&format!("l-{n}")))?;
                client.create(&resource, "default", object).await?;
            }
            Ok::<_, Error>(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(creates as f64 / started.elapsed().as_secs_f64())
}

async fn watchers(dir: &Path, address: std::net::SocketAddr, writer: &Sender) -> Result<(f64, f64), Error> {
    let (seen, mut arrivals) = tokio::sync::mpsc::unbounded_channel::<Instant>();
    let mut connection = connect(dir, address).await?;
    for watcher in 0..WATCHERS {
        if watcher % 10 == 9 {
            connection = connect(dir, address).await?;
        }
        let version = {
            let request = hyper::Request::get(format!("https://127.0.0.1{PATH}?limit=1")).body(Full::default())?;
            let bytes = connection.send_request(request).await?.into_body().collect().await?.to_bytes();
            let list: serde_json::Value = serde_json::from_slice(&bytes)?;
            list["metadata"]["resourceVersion"].as_str().unwrap_or("").to_owned()
        };
        let uri = format!("https://127.0.0.1{PATH}?watch=1&resourceVersion={version}");
        let request = hyper::Request::get(uri).body(Full::default())?;
        let mut body = connection.send_request(request).await?.into_body();
        let seen = seen.clone();
        tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                let now = Instant::now();
                for _ in frame.data_ref().into_iter().flat_map(|d| d.iter()).filter(|b| **b == b'\n') {
                    let _ = seen.send(now);
                }
            }
        });
    }
    let mut times = Vec::new();
    for n in 0..EVENTS {
        create(writer.clone(), &format!("w-{n}")).await?;
        let acknowledged = Instant::now();
        let mut last = Duration::ZERO;
        for _ in 0..WATCHERS {
            let at = tokio::time::timeout(Duration::from_secs(10), arrivals.recv()).await?.ok_or("closed")?;
            last = last.max(at.saturating_duration_since(acknowledged));
        }
        times.push(last.as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], times[times.len() - 1]))
}
