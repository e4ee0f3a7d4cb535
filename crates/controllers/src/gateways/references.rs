//! References to Secrets and across namespaces: what ReferenceGrants allow, and whether a certificate is one.

use super::{CONFIG_MAPS, GRANTS, GROUP, SECRETS, attach::Refusal};
use crate::context::Context;
use crate::objects::list;
use api::informer::Informer;
use api::object::{Meta, Object, SharedObject};
use base64::Engine;
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;

pub(super) struct References {
    pub grants: Informer,
    pub secrets: Informer,
    pub config_maps: Informer,
}

impl References {
    pub fn new(context: &Context) -> References {
        let informers = &context.informers;
        References {
            grants: informers.of(&GRANTS),
            secrets: informers.of(&SECRETS),
            config_maps: informers.of(&CONFIG_MAPS),
        }
    }

    /// Whether an object of `kind` in namespace `from` may refer to the one of (core) `to` named `name` in `namespace`.
    pub fn granted(&self, kind: &str, from: &str, to: &str, namespace: &str, name: &str) -> bool {
        from == namespace
            || self.grants.list_in(namespace).iter().any(|grant| {
                let source =
                    |f: &Value| (f.str_at("/group"), f.str_at("/kind"), f.str_at("/namespace")) == (GROUP, kind, from);
                let target = |t: &Value| {
                    (t.str_at("/group"), t.str_at("/kind")) == ("", to) && ["", name].contains(&t.str_at("/name"))
                };
                list(grant, "/spec/from").iter().any(source) && list(grant, "/spec/to").iter().any(target)
            })
    }

    /// Whether the certificates of a listener can be used.
    pub fn certificates(&self, gateway: &Object, listener: &Value) -> Result<(), Refusal> {
        for reference in list(listener, "/tls/certificateRefs") {
            let secret = self.find(gateway, reference, "Secret", "InvalidCertificateRef")?;
            certified(&secret).map_err(|why| {
                let message = format!("Secret {}/{}: {why}", secret.namespace(), secret.name());
                ("InvalidCertificateRef", message)
            })?;
        }
        let port = listener.get("port");
        let per_port = list(gateway, "/spec/tls/frontend/perPort").iter().find(|one| one.get("port") == port);
        let clients = match per_port {
            Some(one) => one.pointer("/tls"),
            None => gateway.pointer("/spec/tls/frontend/default"),
        };
        for reference in clients.map(|tls| list(tls, "/validation/caCertificateRefs")).unwrap_or_default() {
            const REASON: &str = "InvalidCACertificateRef";
            let kind = if reference.str_at("/kind") == "Secret" { "Secret" } else { "ConfigMap" };
            let found = self.find(gateway, reference, kind, REASON)?;
            authorities(&found, kind == "Secret")
                .map_err(|why| (REASON, format!("{kind} {}/{}: {why}", found.namespace(), found.name())))?;
        }
        Ok(())
    }

    fn find(
        &self,
        gateway: &Object,
        reference: &Value,
        wanted: &str,
        bad: &'static str,
    ) -> Result<SharedObject, Refusal> {
        let (group, kind, name) = (reference.str_at("/group"), reference.str_at("/kind"), reference.str_at("/name"));
        if !group.is_empty() || !(kind == wanted || (kind.is_empty() && wanted == "Secret")) {
            return Err((bad, format!("{kind} {name:?} of group {group:?}: only a {wanted} will do")));
        }
        let namespace = match reference.str_at("/namespace") {
            "" => gateway.namespace(),
            namespace => namespace,
        };
        if !self.granted("Gateway", gateway.namespace(), wanted, namespace, name) {
            let message = format!(
                "No ReferenceGrant in {namespace:?} lets Gateways of {:?} refer to {wanted} {name:?}",
                gateway.namespace()
            );
            return Err(("RefNotPermitted", message));
        }
        let informer = if wanted == "Secret" { &self.secrets } else { &self.config_maps };
        informer.get(namespace, name).ok_or_else(|| (bad, format!("{wanted} {namespace}/{name} not found")))
    }
}

fn bytes(secret: &Object, key: &str) -> Result<Vec<u8>, String> {
    let text = secret.pointer("/data").and_then(|data| data.get(key)).and_then(Value::as_str);
    let text = text.ok_or_else(|| format!("it has no {key:?}"))?;
    base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| format!("{key:?} is not base64"))
}

/// Whether `tls.crt` and `tls.key` are there and belong together.
fn certified(secret: &Object) -> Result<(), String> {
    let (chain, key) = (bytes(secret, "tls.crt")?, bytes(secret, "tls.key")?);
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&chain).collect::<Result<_, _>>().map_err(|e| format!("tls.crt: {e}"))?;
    if chain.is_empty() {
        return Err("tls.crt has no certificate".into());
    }
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| format!("tls.key: {e}"))?;
    let provider = rustls::crypto::ring::default_provider();
    match CertifiedKey::from_der(chain, key, &provider) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => Err("tls.key is not the key of the certificate in tls.crt".into()),
        Err(error) => Err(format!("certificate and key: {error}")),
    }
}

fn authorities(object: &Object, is_secret: bool) -> Result<(), String> {
    let text = match is_secret {
        true => bytes(object, "ca.crt")?,
        false => {
            let text = object.pointer("/data").and_then(|data| data.get("ca.crt")).and_then(Value::as_str);
            text.ok_or("it has no \"ca.crt\"")?.as_bytes().to_vec()
        }
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|e| format!("ca.crt: {e}"))?;
        roots.add(certificate).map_err(|e| format!("ca.crt: {e}"))?;
    }
    if roots.is_empty() { Err("ca.crt has no certificate".into()) } else { Ok(()) }
}
