//! Certificates and keys from Secrets, certificate authorities from ConfigMaps and Secrets.

use api::object::{Meta, SharedObject};
use base64::Engine;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

fn data(secret: &SharedObject, key: &str) -> Result<Vec<u8>, String> {
    let text = secret.pointer("/data").and_then(|data| data.get(key)).and_then(|value| value.as_str());
    let text = text.ok_or_else(|| format!("has no {key:?}"))?;
    base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| format!("{key:?} is not base64"))
}

/// Certificate chain and key of a Secret (`tls.crt`, `tls.key`), if the two belong together.
pub fn certified(secret: &SharedObject, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let (chain, key) = (data(secret, "tls.crt")?, data(secret, "tls.key")?);
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&chain).collect::<Result<_, _>>().map_err(|e| format!("tls.crt: {e}"))?;
    if chain.is_empty() {
        return Err("tls.crt has no certificate".into());
    }
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| format!("tls.key: {e}"))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|e| format!("certificate and key: {e}"))
}

/// The authorities in `ca.crt` of a ConfigMap or Secret, added to `roots`.
pub fn authorities(object: &SharedObject, is_secret: bool, roots: &mut RootCertStore) -> Result<(), String> {
    let text = match is_secret {
        true => data(object, "ca.crt")?,
        false => {
            let text = object.pointer("/data").and_then(|data| data.get("ca.crt")).and_then(|value| value.as_str());
            text.ok_or("has no \"ca.crt\"")?.as_bytes().to_vec()
        }
    };
    let mut found = false;
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|e| format!("ca.crt: {e}"))?;
        roots.add(certificate).map_err(|e| format!("ca.crt: {e}"))?;
        found = true;
    }
    if found { Ok(()) } else { Err("ca.crt has no certificate".into()) }
}

/// What tells one state of an object from another.
pub fn version(object: &SharedObject) -> String {
    format!("{}/{}@{}", object.namespace(), object.name(), object.resource_version())
}
