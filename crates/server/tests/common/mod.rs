//! A server on loopback in a temporary directory, and two ways to talk to it: HTTP by hand, and the real `kubectl`.
#![allow(dead_code)]

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use server::{Config, Server};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

pub struct Running {
    pub dir: tempfile::TempDir,
    pub server: Arc<Server>,
    pub address: std::net::SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

pub struct Answer {
    pub code: u16,
    pub headers: http::HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("")
    }
    /// The message of a `Status`, checked to carry `code`.
    pub fn refusal(&self, code: u16) -> String {
        let json = self.json();
        assert_eq!(self.code, code, "{json}");
        assert_eq!(json["kind"], "Status", "{json}");
        assert_eq!(json["code"], code, "{json}");
        json["message"].as_str().unwrap().to_owned()
    }
}

/// How a request shows who it is from.
#[derive(Clone, Debug)]
pub enum As {
    Admin,
    Anonymous,
    Token(String),
}

impl Running {
    pub async fn start() -> Running {
        Self::start_with(Arc::new(store::memory::Engine::new())).await
    }

    pub async fn start_with(store: Arc<dyn store::Store>) -> Running {
        let dir = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = Config {
            listener,
            data_dir: dir.path().to_owned(),
            advertise: address,
            store,
            cluster_domain: "cluster.local".into(),
            service_cidr: "10.43.0.0/16,fd00:10:43::/112".into(),
        };
        let server = Server::new(config).await.unwrap();
        server.write_kubeconfig(&dir.path().join("kubeconfig")).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = server.clone();
        let task = tokio::spawn(async move {
            serving.serve(async { drop(stopped.await) }).await.unwrap();
        });
        Running { dir, server, address, stop: Some(stop), task: Some(task) }
    }

    /// Stops it and waits until it has.
    pub async fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            tokio::time::timeout(Duration::from_secs(20), task).await.expect("the server stops").unwrap();
        }
    }

    fn tls(&self, with_certificate: bool) -> rustls::ClientConfig {
        let pki = self.dir.path().join("pki");
        let mut roots = rustls::RootCertStore::empty();
        for ca in CertificateDer::pem_file_iter(pki.join("ca.crt")).unwrap() {
            roots.add(ca.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        if !with_certificate {
            return builder.with_no_client_auth();
        }
        let chain: Vec<_> = CertificateDer::pem_file_iter(pki.join("admin.crt")).unwrap().map(|c| c.unwrap()).collect();
        builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(pki.join("admin.key")).unwrap()).unwrap()
    }

    /// One HTTP/1.1 connection.
    pub async fn connect(&self, who: &As) -> hyper::client::conn::http1::SendRequest<Full<Bytes>> {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.tls(matches!(who, As::Admin))));
        let stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let stream = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), stream).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    pub async fn open(
        &self,
        who: &As,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> hyper::Response<hyper::body::Incoming> {
        let mut sender = self.connect(who).await;
        let mut request = hyper::Request::builder().method(method).uri(path).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let As::Token(token) = who {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap()
    }

    pub async fn send(
        &self,
        who: &As,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let response = self.open(who, method, path, headers, body).await;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { code: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(&As::Admin, "GET", path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(&As::Admin, "POST", path, &[("content-type", "application/json")], body.to_string()).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send(&As::Admin, "PUT", path, &[("content-type", "application/json")], body.to_string()).await
    }

    pub async fn delete(&self, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(&As::Admin, "DELETE", path, &[("content-type", "application/json")], body).await
    }

    /// The lines of a watch, as they come.
    pub async fn watch(&self, path: &str, headers: &[(&str, &str)]) -> Lines {
        let response = self.open(&As::Admin, "GET", path, headers, "").await;
        assert_eq!(response.status(), 200);
        Lines { body: response.into_body(), buffer: Vec::new() }
    }

    pub fn kubectl(&self) -> Option<Kubectl> {
        Kubectl::find(self)
    }
}

pub struct Lines {
    body: hyper::body::Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next event, `None` at the end of the watch.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(Duration::from_secs(30), self.body.frame()).await.expect("an event");
            self.buffer.extend_from_slice(&frame?.ok()?.into_data().ok()?);
        }
    }
    /// Type and name of the next event.
    pub async fn next_name(&mut self) -> (String, String) {
        let event = self.next().await.expect("an event, not the end");
        let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or("").to_owned();
        (text("/type"), text("/object/metadata/name"))
    }
}

/// The real `kubectl`, with a cache of its own.
#[derive(Clone)]
pub struct Kubectl {
    config: PathBuf,
    cache: PathBuf,
}

pub struct Output {
    pub ok: bool,
    pub out: String,
    pub err: String,
}

impl Kubectl {
    fn find(running: &Running) -> Option<Kubectl> {
        if std::process::Command::new("kubectl").arg("version").arg("--client").output().is_err() {
            println!("SKIPPED: kubectl is not installed");
            return None;
        }
        let dir = running.dir.path();
        Some(Kubectl { config: dir.join("kubeconfig"), cache: dir.join("cache") })
    }

    pub fn command(&self) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("kubectl");
        command
            .env("KUBECONFIG", &self.config)
            .env("HOME", &self.cache)
            .arg("--cache-dir")
            .arg(&self.cache)
            .kill_on_drop(true)
            .stdin(std::process::Stdio::null());
        command
    }

    pub async fn run(&self, args: &[&str]) -> Output {
        let output = tokio::time::timeout(Duration::from_secs(120), self.command().args(args).output());
        let output = output.await.unwrap_or_else(|_| panic!("kubectl {args:?} takes too long")).unwrap();
        Output {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output of a call that must succeed.
    pub async fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args).await;
        assert!(output.ok, "kubectl {args:?}\n{}\n{}", output.out, output.err);
        output.out
    }

    /// Standard error of a call that must fail.
    pub async fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args).await;
        assert!(!output.ok, "kubectl {args:?} should fail\n{}\n{}", output.out, output.err);
        output.err
    }

    /// Runs with `text` as `-f FILE`.
    pub async fn with(&self, args: &[&str], text: &str) -> Output {
        let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        // Not JSON, whatever it begins with.
        std::fs::write(file.path(), format!("# YAML\n{text}")).unwrap();
        let mut all = args.to_vec();
        let path = file.path().display().to_string();
        all.extend(["-f", &path]);
        self.run(&all).await
    }

    pub async fn ok_with(&self, args: &[&str], text: &str) -> String {
        let output = self.with(args, text).await;
        assert!(output.ok, "kubectl {args:?}\n{}\n{}", output.out, output.err);
        output.out
    }
}

/// Waits until `check` says yes.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !check().await {
        assert!(Instant::now() < deadline, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
