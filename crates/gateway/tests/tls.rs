//! TLS: certificates from Secrets by server name, clients' certificates, reloads, connections passed on.
#![allow(clippy::unwrap_used)]

mod common;
use base64::Engine;
use common::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const GATEWAY: &str = "gateway.networking.k8s.io";

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, "test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { issuer, dir }
    }
    /// Certificate and key in PEM.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_string_lossy().into_owned()
    }
    fn ca(&self) -> String {
        self.dir.path().join("ca.pem").to_string_lossy().into_owned()
    }
}

fn secret(name: &str, (certificate, key): &(String, String)) -> Value {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    json!({"metadata": {"name": name, "namespace": "shop"}, "type": "kubernetes.io/tls",
           "data": {"tls.crt": encode(certificate), "tls.key": encode(key)}})
}

fn https(name: &str, host: &str, secret: &str) -> Value {
    json!({"name": name, "port": 443, "protocol": "HTTPS", "hostname": host, "tls": {"certificateRefs": [{"name": secret}]}})
}

async fn ask(lab: &Lab, authority: &Authority, host: &str, more: &[&str]) -> String {
    let port = lab.tls.port();
    let (resolve, ca) = (format!("{host}:{port}:127.0.0.1"), authority.ca());
    let url = format!("https://{host}:{port}/");
    let args = [&["--resolve", &resolve, "--cacert", &ca], more, &[&url]].concat();
    curl(&args).await
}

async fn secure_lab(listeners: Value, extra: Value) -> Lab {
    let lab = lab().await;
    let mut spec = json!({"gatewayClassName": "atoll", "listeners": listeners});
    if let Some(extra) = extra.as_object() {
        spec.as_object_mut().unwrap().extend(extra.clone());
    }
    lab.create(GATEWAY, "gateways", json!({"metadata": {"name": "secure"}, "spec": spec})).await;
    lab
}

async fn route(lab: &Lab, hosts: &[&str], service: &str) {
    let route = json!({"metadata": {"name": service}, "spec": {"parentRefs": [{"name": "secure"}], "hostnames": hosts,
        "rules": [{"backendRefs": [{"name": service, "port": 80}]}]}});
    lab.create(GATEWAY, "httproutes", route).await;
}

#[tokio::test]
async fn every_name_has_its_certificate_and_its_routes() {
    let authority = Authority::new();
    let listeners = json!([https("a", "a.test", "a"), https("wild", "*.b.test", "b")]);
    let (lab, server) = (secure_lab(listeners, json!({})).await, echo().await);
    lab.create("", "secrets", secret("a", &authority.issue(&["a.test"]))).await;
    lab.create("", "secrets", secret("b", &authority.issue(&["*.b.test"]))).await;
    lab.backend("web", &[server.address]).await;
    route(&lab, &["a.test", "x.b.test"], "web").await;
    eventually("served", async || ask(&lab, &authority, "a.test", &[]).await.contains("GET / ")).await;
    let text = ask(&lab, &authority, "x.b.test", &["-w", "%{http_version}"]).await;
    assert!(text.contains("x-forwarded-proto: https") && text.ends_with('2'), "{text}");
    let text = ask(&lab, &authority, "a.test", &["--http1.1", "-w", "%{http_version}"]).await;
    assert!(text.ends_with("1.1"), "{text}");
    assert_eq!(lab.get("/").await.0, 404, "what is attached to HTTPS listeners is not served without TLS");
    let text = ask(&lab, &authority, "nobody.test", &[]).await;
    assert!(text.contains("unrecognized name") || text.contains("SSL"), "{text}");
    assert_eq!(lab.count("tls_unknown_name_total"), 1);
    let text = ask(&lab, &authority, "a.test", &["-i", "-H", "Host: x.b.test"]).await;
    assert!(text.starts_with("HTTP/2 421"), "another listener's host over this connection: {text}");
    lab.stop().await;
}

#[tokio::test]
async fn a_new_certificate_is_used_without_dropping_a_connection() {
    let (first, second) = (Authority::new(), Authority::new());
    let (lab, server) = (secure_lab(json!([https("a", "a.test", "a")]), json!({})).await, named("served").await);
    lab.create("", "secrets", secret("a", &first.issue(&["a.test"]))).await;
    lab.backend("web", &[server.address]).await;
    route(&lab, &["a.test"], "web").await;
    eventually("served", async || ask(&lab, &first, "a.test", &[]).await == "served").await;

    let mut roots = rustls::RootCertStore::empty();
    roots.add(first.issuer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let stream = TcpStream::connect(lab.tls).await.unwrap();
    let mut open =
        tokio_rustls::TlsConnector::from(config).connect("a.test".try_into().unwrap(), stream).await.unwrap();
    let mut request = async || {
        open.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").await.unwrap();
        let mut text = Vec::new();
        while !text.ends_with(b"served") {
            text.push(open.read_u8().await.unwrap());
        }
    };
    request().await;
    lab.client.put(&api::kind::Resource::new("", "v1", "secrets"), secret("a", &second.issue(&["a.test"])));
    eventually("the new one is used", async || ask(&lab, &second, "a.test", &[]).await == "served").await;
    request().await;
    // One whose key is another's is not used: nothing is served rather than something wrong.
    let mixed = (first.issue(&["a.test"]).0, second.issue(&["a.test"]).1);
    lab.client.put(&api::kind::Resource::new("", "v1", "secrets"), secret("a", &mixed));
    eventually("not served", async || !ask(&lab, &second, "a.test", &[]).await.contains("served")).await;
    request().await;
    lab.stop().await;
}

#[tokio::test]
async fn clients_show_certificates_where_that_is_asked() {
    let (servers, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let validation = json!({"tls": {"frontend": {"default": {"validation":
        {"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "clients"}]}}}}});
    let (lab, server) = (secure_lab(json!([https("a", "a.test", "a")]), validation).await, named("served").await);
    lab.create("", "secrets", secret("a", &servers.issue(&["a.test"]))).await;
    lab.create("", "configmaps", json!({"metadata": {"name": "clients"}, "data": {"ca.crt": clients.issuer.pem()}}))
        .await;
    lab.backend("web", &[server.address]).await;
    route(&lab, &["a.test"], "web").await;
    let with = |authority: &Authority| {
        let (certificate, key) = authority.issue(&["client"]);
        (authority.file("client.pem", &certificate), authority.file("client.key", &key))
    };
    let (good, bad) = (with(&clients), with(&strangers));
    let good = ["--cert", &good.0, "--key", &good.1];
    eventually("served", async || ask(&lab, &servers, "a.test", &good).await == "served").await;
    for args in [&[][..], &["--cert", &bad.0, "--key", &bad.1]] {
        let text = ask(&lab, &servers, "a.test", args).await;
        assert!(!text.contains("served") && text.contains("curl:"), "{text}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn tls_routes_pass_connections_on() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue(&["db.test"]);
    let listeners =
        json!([{"name": "pass", "port": 443, "protocol": "TLS", "hostname": "*.test", "tls": {"mode": "Passthrough"}}]);
    let lab = secure_lab(listeners, json!({})).await;
    // The service speaks TLS itself.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let acceptor =
        tokio_rustls::TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\npassed").await;
            let _ = stream.shutdown().await;
        }
    });
    lab.backend("db", &[address]).await;
    let route = json!({"metadata": {"name": "db"}, "spec": {"parentRefs": [{"name": "secure"}], "hostnames": ["db.test"],
        "rules": [{"backendRefs": [{"name": "db", "port": 80}]}]}});
    lab.create(GATEWAY, "tlsroutes", route).await;
    eventually("passed", async || ask(&lab, &authority, "db.test", &["--http1.1"]).await == "passed").await;
    assert!(ask(&lab, &authority, "other.test", &[]).await.contains("curl:"));
    lab.stop().await;
}

#[tokio::test]
async fn who_does_not_say_hello_is_let_go() {
    let lab = lab_with(|config| config.handshake_timeout = std::time::Duration::from_millis(50)).await;
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 0x40, 0], &[0; 100_000]] {
        let mut stream = TcpStream::connect(lab.tls).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        // Closed, with or without a reset.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.len() < 10, "{answer:?}");
    }
    eventually("all are counted", async || lab.count("tls_handshake_failures_total") == 4).await;
    lab.stop().await;
}
