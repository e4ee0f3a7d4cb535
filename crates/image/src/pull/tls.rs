//! Which certificates a registry may show: those of the system's list, and more if asked.

use crate::error::{Error, Result, io};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;
use std::sync::Arc;

/// Where distributions keep the list: Debian, Fedora, Alpine.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

pub(super) fn config(more: Option<&Path>, host: &str) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let own = std::env::var_os("SSL_CERT_FILE").map(std::path::PathBuf::from);
    let system = own.iter().map(|p| p.as_path()).chain(BUNDLES.iter().map(Path::new)).find(|p| p.exists());
    for path in system.into_iter().chain(more) {
        let pem = std::fs::read(path).map_err(io("read", path))?;
        let certificates = CertificateDer::pem_slice_iter(&pem).filter_map(std::result::Result::ok);
        roots.add_parsable_certificates(certificates);
    }
    if roots.is_empty() {
        return Err(Error::Registry {
            host: host.to_owned(),
            why: format!(
                "this machine has no list of certificate authorities ({}); install the package ca-certificates",
                BUNDLES.join(", ")
            ),
        });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Registry { host: host.to_owned(), why: e.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
