//! The API and the gateway as the command line sees them: HTTPS with what the kubeconfig says, HTTP for functions.

use crate::cli::{Failure, Outcome, explain};
use base64::Engine as _;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Bytes of an answer that are read.
const ANSWER_LIMIT: usize = 64 << 20;
const CONNECT: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Config {
    current_context: String,
    contexts: Vec<Named<ContextEntry>>,
    clusters: Vec<Named<ClusterEntry>>,
    users: Vec<Named<UserEntry>>,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    entry: T,
}

#[derive(Deserialize)]
struct ContextEntry {
    cluster: String,
    user: String,
    namespace: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    certificate_authority_data: Option<String>,
    certificate_authority: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserEntry {
    client_certificate_data: Option<String>,
    client_certificate: Option<PathBuf>,
    client_key_data: Option<String>,
    client_key: Option<PathBuf>,
    token: Option<String>,
}

pub struct Api {
    /// `host:port`
    authority: String,
    host: String,
    tls: tokio_rustls::TlsConnector,
    token: Option<String>,
    /// The context's namespace.
    pub namespace: String,
}

/// What the API refused, or that it could not be asked.
pub enum Refusal {
    NotFound(String),
    Other(Failure),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        match refusal {
            Refusal::NotFound(message) => Failure(message),
            Refusal::Other(failure) => failure,
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        Refusal::Other(failure)
    }
}

type Answer = Result<Value, Refusal>;

fn find<'a, T>(list: &'a [Named<T>], name: &str, what: &str, path: &Path) -> Result<&'a T, Failure> {
    let found = list.iter().find(|named| named.name == name).map(|named| &named.entry);
    found.ok_or_else(|| Failure(format!("{}: it names the {what} {name:?} but does not hold it", path.display())))
}

/// Bytes that a kubeconfig holds itself or in a file beside it.
fn material(data: &Option<String>, file: &Option<PathBuf>, config: &Path) -> Result<Option<Vec<u8>>, Failure> {
    if let Some(data) = data {
        let decoded = base64::engine::general_purpose::STANDARD.decode(data);
        return decoded.map(Some).map_err(|e| Failure(format!("{}: base64: {e}", config.display())));
    }
    let Some(file) = file else { return Ok(None) };
    let file = config.parent().unwrap_or(Path::new(".")).join(file);
    std::fs::read(&file).map(Some).map_err(|e| Failure(format!("{}: {e}", file.display())))
}

impl Api {
    /// Reads a kubeconfig's current context.
    pub fn open(path: &Path) -> Result<Api, Failure> {
        let bad = |why: String| Failure(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| {
            bad(format!("{e}; is `atoll up` running? name its file with --kubeconfig or the variable KUBECONFIG"))
        })?;
        let config: Config = serde_saphyr::from_str(&text).map_err(|e| bad(format!("not a kubeconfig: {e}")))?;
        let context = find(&config.contexts, &config.current_context, "context", path)?;
        let cluster = find(&config.clusters, &context.cluster, "cluster", path)?;
        let user = find(&config.users, &context.user, "user", path)?;
        let uri: hyper::Uri = cluster.server.parse().map_err(|e| bad(format!("server {:?}: {e}", cluster.server)))?;
        let (Some("https"), Some(host)) = (uri.scheme_str(), uri.host()) else {
            return Err(bad(format!("server {:?}: an https:// address is needed", cluster.server)));
        };
        let mut roots = rustls::RootCertStore::empty();
        let authority =
            material(&cluster.certificate_authority_data, &cluster.certificate_authority, path)?.unwrap_or_default();
        for certificate in CertificateDer::pem_slice_iter(&authority) {
            roots.add(certificate.map_err(|e| bad(e.to_string()))?).map_err(|e| bad(e.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(explain)?
            .with_root_certificates(roots);
        let certificate = material(&user.client_certificate_data, &user.client_certificate, path)?;
        let key = material(&user.client_key_data, &user.client_key, path)?;
        let tls = match (certificate, key) {
            (Some(certificate), Some(key)) => {
                let chain = CertificateDer::pem_slice_iter(&certificate).collect::<Result<Vec<_>, _>>();
                let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| bad(e.to_string()))?;
                builder.with_client_auth_cert(chain.map_err(|e| bad(e.to_string()))?, key).map_err(explain)?
            }
            _ => builder.with_no_client_auth(),
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let authority = format!("{}:{}", uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(443));
        let namespace = context.namespace.clone().unwrap_or_else(|| "default".into());
        Ok(Api { authority, host, tls: Arc::new(tls).into(), token: user.token.clone(), namespace })
    }

    /// Sends one request; the answer's body is still to be read.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Failure> {
        let at =
            |e: &dyn std::fmt::Display| Failure(format!("API https://{}: {e}; is `atoll up` running?", self.authority));
        let tcp = connect(&self.authority).await.map_err(|e| at(&e))?;
        let name = ServerName::try_from(self.host.clone()).map_err(|e| at(&e))?;
        let tls = self.tls.connect(name, tcp).await.map_err(|e| at(&e))?;
        let mut request =
            Request::builder().method(method).uri(path).header("host", &self.authority).header("content-type", kind);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(explain)?;
        exchange(tls, request).await.map_err(|e| at(&e))
    }

    async fn ask(&self, method: &str, path: &str, kind: &str, body: Vec<u8>) -> Answer {
        let response = self.send(method, path, kind, body).await?;
        let status = response.status();
        let bytes = read(response.into_body()).await?;
        match status.is_success() {
            true => Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null)),
            false => Err(refused(status, &bytes)),
        }
    }

    /// The lines of an answer as they come, without their ends.
    pub async fn lines(&self, path: &str, mut each: impl FnMut(&[u8]) -> Outcome) -> Outcome {
        let response = self.send("GET", path, "application/json", Vec::new()).await?;
        let (status, mut body) = (response.status(), response.into_body());
        if !status.is_success() {
            return Err(refused(status, &read(body).await?).into());
        }
        let mut begun = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| Failure(format!("the answer broke off: {e}")))?;
            let Ok(bytes) = frame.into_data() else { continue };
            begun.extend_from_slice(&bytes);
            let whole = begun.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            let rest = begun.split_off(whole);
            for line in begun.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                each(line)?;
            }
            begun = rest;
            if begun.len() > ANSWER_LIMIT {
                return Err(Failure(format!("the answer has a line of more than {ANSWER_LIMIT} bytes")));
            }
        }
        Ok(())
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "application/json", Vec::new()).await
    }

    /// Asks for something to be done.
    pub async fn put(&self, path: &str) -> Answer {
        self.ask("PUT", path, "application/json", Vec::new()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.ask("DELETE", path, "application/json", Vec::new()).await
    }

    pub async fn create(&self, path: &str, object: &Value) -> Answer {
        let path = format!("{path}?fieldManager=atoll&fieldValidation=Strict");
        self.ask("POST", &path, "application/json", object.to_string().into_bytes()).await
    }

    /// Server-side apply: creates or changes, fields that others set stay.
    pub async fn apply(&self, path: &str, object: &Value) -> Answer {
        let path = format!("{path}?fieldManager=atoll-function&force=true&fieldValidation=Strict");
        self.ask("PATCH", &path, "application/apply-patch+yaml", object.to_string().into_bytes()).await
    }
}

/// What a `Status` says.
fn refused(status: StatusCode, body: &[u8]) -> Refusal {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let message = value.get("message").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
    match status {
        StatusCode::NOT_FOUND => Refusal::NotFound(message),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Failure(format!("{message} ({status}); the kubeconfig's user may not do that")).into()
        }
        _ => Failure(format!("{message} ({status})")).into(),
    }
}

async fn connect(authority: &str) -> std::io::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect(authority)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// A request in plain HTTP to `authority`.
pub async fn plain(authority: &str, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
    let at = |e: &dyn std::fmt::Display| Failure(format!("http://{authority}: {e}"));
    let stream = connect(authority).await.map_err(|e| at(&e))?;
    exchange(stream, request).await.map_err(|e| at(&e))
}

pub async fn read(body: Incoming) -> Result<Bytes, Failure> {
    let collected = Limited::new(body, ANSWER_LIMIT).collect().await;
    collected.map(|whole| whole.to_bytes()).map_err(|e| Failure(format!("the answer broke off: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubeconfigs_say_what_is_wrong_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let complaint = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Api::open(&path).err().unwrap().0
        };
        assert!(complaint("nonsense").contains("not a kubeconfig"));
        let text =
            "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\nclusters: []\nusers: []\n";
        assert!(complaint(text).contains("the cluster \"c\""));
        let plain = "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\n\
                     clusters: [{name: c, cluster: {server: 'http://h:1'}}]\nusers: [{name: u, user: {}}]\n";
        assert!(complaint(plain).contains("https:// address"));
        std::fs::write(&path, plain.replace("http:", "https:")).unwrap();
        assert_eq!(Api::open(&path).unwrap().authority, "h:1");
    }
}
