//! Keys and certificates: a certificate authority made at first start, the API's own certificate, the
//! administrator's client certificate and the key that signs service account tokens.
//!
//! All of it renews itself: a certificate with less than a third of its life left is issued again at start and by
//! [`Pki::renew`], which the server calls on a timer. The authority is renewed with the *same key and subject*, so what
//! the old certificate vouches for and what the new one vouches for are the same, and files that hold only the old one go
//! on working until it ends; `ca.crt` holds both while they overlap.

mod files;
mod issue;

pub use files::{FileError, read_text, write_private};

use base64::Engine as _;
use issue::Pair;
use rcgen::KeyPair;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const SERVER_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
const ADMIN_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: not a usable {what} ({why}); restore it from a backup, or remove {dir} to start with new keys")]
    Damaged { path: PathBuf, dir: PathBuf, what: &'static str, why: String },
    #[error("issue {what} certificate")]
    Issue {
        what: &'static str,
        #[source]
        source: rcgen::Error,
    },
    #[error("set up TLS: {0}")]
    Tls(String),
}

/// The key material of one installation, in `dir`.
pub struct Pki {
    dir: PathBuf,
    names: Vec<String>,
    ca_key: KeyPair,
    state: Mutex<State>,
    resolver: Arc<Resolver>,
    token_key: Arc<TokenKey>,
    /// Kubeconfigs that are kept up to date: path and URL.
    kubeconfigs: Mutex<Vec<(PathBuf, String)>>,
}

struct State {
    /// Newest first; the last may be an older one that has not ended yet.
    ca: Vec<Pair>,
    server: Pair,
    admin: Pair,
}

/// The key service account tokens are signed with (ES256).
pub struct TokenKey {
    pub pkcs8: Vec<u8>,
    /// Uncompressed point.
    pub public: Vec<u8>,
}

impl Pki {
    /// Opens the key material below `dir`, making what is missing and renewing what is near its end. `names` are the
    /// DNS names and addresses the API is reached by.
    pub fn open(dir: &Path, names: Vec<String>, now: SystemTime) -> Result<Self, PkiError> {
        files::private_dir(dir)?;
        let ca_key = issue::key(dir, "ca.key", "CA key")?;
        let ca = issue::authority(dir, &ca_key, now)?;
        let server = issue::server(dir, &ca_key, &ca, &names, now)?;
        let admin = issue::admin(dir, &ca_key, &ca, now)?;
        let token_key = issue::key(dir, "sa.key", "service account signing key")?;
        let resolver = Arc::new(Resolver { current: RwLock::new(issue::certified(dir, &server)?) });
        Ok(Pki {
            dir: dir.to_owned(),
            names,
            ca_key,
            state: Mutex::new(State { ca, server, admin }),
            resolver,
            token_key: Arc::new(TokenKey {
                pkcs8: token_key.serialize_der(),
                public: token_key.public_key_raw().to_vec(),
            }),
            kubeconfigs: Mutex::new(Vec::new()),
        })
    }

    /// Issues again what has less than a third of its life left, swaps it in and rewrites kubeconfigs. Returns whether
    /// anything changed.
    pub fn renew(&self, now: SystemTime) -> Result<bool, PkiError> {
        let changed = {
            let mut state = lock(&self.state);
            let ca = issue::authority(&self.dir, &self.ca_key, now)?;
            let server = issue::server(&self.dir, &self.ca_key, &ca, &self.names, now)?;
            let admin = issue::admin(&self.dir, &self.ca_key, &ca, now)?;
            if server.pem != state.server.pem {
                let certified = issue::certified(&self.dir, &server)?;
                *self.resolver.current.write().unwrap_or_else(|e| e.into_inner()) = certified;
            }
            let changed = server.pem != state.server.pem
                || admin.pem != state.admin.pem
                || ca.first().map(|c| &c.pem) != state.ca.first().map(|c| &c.pem);
            *state = State { ca, server, admin };
            changed
        };
        if changed {
            let known = lock(&self.kubeconfigs).clone();
            for (path, url) in known {
                self.write_kubeconfig(&path, &url)?;
            }
        }
        Ok(changed)
    }

    /// When [`renew`](Self::renew) should be called next: a sixth of the shortest life, so that it is seen in time.
    pub fn renew_every(&self) -> Duration {
        DAY / 4
    }

    /// PEM of the authority's certificates, for clients to trust.
    pub fn ca_pem(&self) -> String {
        lock(&self.state).ca.iter().map(|pair| pair.pem.as_str()).collect()
    }

    pub fn token_key(&self) -> Arc<TokenKey> {
        self.token_key.clone()
    }

    /// Writes a kubeconfig with the administrator's client certificate (0600) and keeps it up to date from now on.
    pub fn write_kubeconfig(&self, path: &Path, url: &str) -> Result<(), PkiError> {
        let (certificate, key) = {
            let state = lock(&self.state);
            (state.admin.pem.clone(), state.admin.key_pem.clone())
        };
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: atoll\n  cluster:\n    server: {url}\n    \
             certificate-authority-data: {ca}\nusers:\n- name: atoll-admin\n  user:\n    client-certificate-data: \
             {certificate}\n    client-key-data: {key}\ncontexts:\n- name: atoll\n  context:\n    cluster: atoll\n    \
             user: atoll-admin\ncurrent-context: atoll\n",
            ca = encode(&self.ca_pem()),
            certificate = encode(&certificate),
            key = encode(&key),
        );
        write_private(path, text.as_bytes())?;
        let mut known = lock(&self.kubeconfigs);
        let entry = (path.to_owned(), url.to_owned());
        if !known.contains(&entry) {
            known.push(entry);
        }
        Ok(())
    }

    /// TLS for the API: our certificate, and client certificates of our authority asked for but not required.
    pub fn server_tls(&self) -> Result<Arc<rustls::ServerConfig>, PkiError> {
        let tls = |error: &dyn std::fmt::Display| PkiError::Tls(error.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        for pair in &lock(&self.state).ca {
            roots.add(pair.der.clone()).map_err(|e| tls(&e))?;
        }
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|e| tls(&e))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| tls(&e))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.resolver.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The names an API server at `advertise` answers to.
pub fn server_names(advertise: IpAddr, service_address: IpAddr, cluster_domain: &str) -> Vec<String> {
    let mut names = vec![advertise.to_string()];
    for address in ["127.0.0.1".to_owned(), "::1".to_owned(), service_address.to_string()] {
        if !names.contains(&address) {
            names.push(address);
        }
    }
    names.extend(["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(str::to_owned));
    names.push(format!("kubernetes.default.svc.{cluster_domain}"));
    names
}

/// Hands out the server certificate of the moment.
#[derive(Debug)]
struct Resolver {
    current: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(|e| e.into_inner()).clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        server_names("10.1.2.3".parse().unwrap(), "10.43.0.1".parse().unwrap(), "cluster.local")
    }

    #[test]
    fn keys_are_reused_and_renewed_in_the_last_third() {
        let dir = tempfile::tempdir().unwrap();
        let start = SystemTime::now();
        let first = Pki::open(dir.path(), names(), start).unwrap();
        let again = Pki::open(dir.path(), names(), start + DAY).unwrap();
        assert_eq!(first.ca_pem(), again.ca_pem());
        assert_eq!(lock(&first.state).server.pem, lock(&again.state).server.pem);

        assert!(!again.renew(start + 19 * DAY).unwrap(), "a third is not reached");
        let config = dir.path().join("kubeconfig");
        again.write_kubeconfig(&config, "https://127.0.0.1:1").unwrap();
        let before = read_text(&config).unwrap();
        assert!(again.renew(start + 21 * DAY).unwrap());
        assert_ne!(lock(&first.state).server.pem, lock(&again.state).server.pem);
        assert_eq!(first.ca_pem(), again.ca_pem());

        let later = start + 3000 * DAY;
        assert!(again.renew(later).unwrap());
        assert_ne!(before, read_text(&config).unwrap(), "the kubeconfig follows");
        assert_eq!(lock(&again.state).ca.len(), 2, "old and new authority overlap");
        assert!(again.renew(start + 3700 * DAY).unwrap());
        assert_eq!(lock(&again.state).ca.len(), 1, "the old one has ended");
    }

    #[test]
    fn an_old_trust_anchor_accepts_certificates_of_the_renewed_authority() {
        let dir = tempfile::tempdir().unwrap();
        let start = SystemTime::now();
        let pki = Pki::open(dir.path(), names(), start).unwrap();
        let old = lock(&pki.state).ca[0].der.clone();
        let later = start + 3000 * DAY;
        pki.renew(later).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(old).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        use rustls::client::danger::ServerCertVerifier;
        let leaf = lock(&pki.state).server.der.clone();
        let at = rustls_pki_types::UnixTime::since_unix_epoch(later.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        for name in ["10.1.2.3", "localhost", "kubernetes.default.svc.cluster.local", "10.43.0.1"] {
            verifier.verify_server_cert(&leaf, &[], &name.try_into().unwrap(), &[], at).unwrap();
        }
        assert!(verifier.verify_server_cert(&leaf, &[], &"example.org".try_into().unwrap(), &[], at).is_err());
    }

    #[test]
    fn a_damaged_key_names_the_file_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.key"), "not a key").unwrap();
        let text = Pki::open(dir.path(), names(), SystemTime::now()).err().unwrap().to_string();
        assert!(text.contains("ca.key") && text.contains("restore it from a backup"), "{text}");
    }
}
