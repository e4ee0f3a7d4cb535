//! From objects to sites. What is wrong with one listener leaves that one out; its status says why.

use super::certificates::{authorities, certified, version};
use super::{Site, Sites};
use crate::routing::attach::{self, Bound, Gateway, Role};
use crate::routing::references::{From, References, granted};
use crate::routing::rules::{self, Owner};
use crate::routing::wire::{ClientTls, IngressSpec, ObjectRef, RouteSpec};
use crate::routing::{HostPattern, Objects, Rule, ingresses, spec};
use crate::upstream::Upstreams;
use api::object::{Meta, SharedObject};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, server::danger::ClientCertVerifier};
use std::collections::HashMap;
use std::sync::Arc;

/// Configurations by what they are made from, so that what did not change keeps its sessions.
pub struct Cache {
    provider: Arc<CryptoProvider>,
    configs: HashMap<String, (Arc<ServerConfig>, bool)>,
    /// Why listeners are not served, which is told once.
    told: HashMap<Arc<str>, (String, bool)>,
}

impl Cache {
    fn tell(&mut self, listener: Arc<str>, why: String) {
        let before = self.told.insert(listener.clone(), (why.clone(), true));
        if before.is_none_or(|(before, _)| before != why) {
            tracing::warn!(%listener, "not served: {why}");
        }
    }
}

impl Default for Cache {
    fn default() -> Cache {
        Cache {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            configs: HashMap::new(),
            told: HashMap::new(),
        }
    }
}

struct Builder<'a> {
    objects: &'a Objects,
    secrets: HashMap<(&'a str, &'a str), &'a SharedObject>,
    cache: &'a mut Cache,
    sites: Sites,
}

pub fn build(objects: &Objects, class: &str, upstreams: &mut Upstreams, cache: &mut Cache) -> Sites {
    let secrets = objects.secrets.iter().map(|s| ((s.namespace(), s.name()), s)).collect();
    let mut builder = Builder { objects, secrets, cache, sites: Sites::default() };
    let gateways = attach::gateways(objects, class);
    for gateway in &gateways {
        for bound in gateway.listeners.iter().filter(|bound| bound.role == Role::Secure) {
            builder.listener(gateway, bound);
        }
    }
    builder.routes(&gateways, upstreams);
    for ingress in ingresses(objects, class) {
        builder.ingress(ingress);
    }
    builder.cache.configs.retain(|_, (_, used)| std::mem::replace(used, false));
    builder.cache.told.retain(|_, (_, used)| std::mem::replace(used, false));
    builder.sites
}

impl Builder<'_> {
    fn listener(&mut self, gateway: &Gateway, bound: &Bound) {
        let listener: Arc<str> = format!("{}/{}/{}", gateway.namespace, gateway.name, bound.listener.name).into();
        let frontend = &gateway.spec.tls.frontend;
        let own = frontend.per_port.iter().find(|port| port.port == bound.listener.port).map(|port| &port.tls);
        let keys: Vec<&ObjectRef> = bound.listener.tls.certificate_refs.iter().collect();
        let from = From { kind: "Gateway", namespace: &gateway.namespace };
        match self.config(from, &keys, own.unwrap_or(&frontend.default)) {
            Ok(config) => {
                self.sites.add(bound.host.clone(), Arc::new(Site::Terminate { listener, config }));
            }
            Err(why) => self.cache.tell(listener, why),
        }
    }

    fn secret(&self, from: From<'_>, reference: &ObjectRef) -> Result<SharedObject, String> {
        let (group, kind) = (reference.group.as_deref().unwrap_or(""), reference.kind.as_deref().unwrap_or("Secret"));
        let (namespace, name) = (reference.namespace.as_deref().unwrap_or(from.namespace), reference.name.as_str());
        if (group, kind) != ("", "Secret") {
            return Err(format!("{name:?} is a {kind} of group {group:?}, not a Secret"));
        }
        if !granted(&self.objects.grants, from, ("", "Secret"), namespace, name) {
            return Err(format!("no ReferenceGrant in {namespace:?} lets {:?} refer to {name:?}", from.namespace));
        }
        self.secrets
            .get(&(namespace, name))
            .map(|found| SharedObject::clone(found))
            .ok_or_else(|| format!("there is no secret {namespace}/{name}"))
    }

    fn config(
        &mut self,
        from: From<'_>,
        keys: &[&ObjectRef],
        clients: &ClientTls,
    ) -> Result<Arc<ServerConfig>, String> {
        let secrets: Vec<SharedObject> =
            keys.iter().map(|reference| self.secret(from, reference)).collect::<Result<_, _>>()?;
        let authorities = self.authorities(from, clients)?;
        let mut made_from: Vec<String> = secrets.iter().map(version).collect();
        made_from.extend(authorities.iter().map(|(object, _)| version(object)));
        made_from.extend(clients.validation.as_ref().map(|v| format!("clients {:?}", v.mode)));
        let made_from = made_from.join(" ");
        if let Some((config, used)) = self.cache.configs.get_mut(&made_from) {
            *used = true;
            return Ok(config.clone());
        }
        let provider = self.cache.provider.clone();
        let certified = |secret: &SharedObject| {
            let key = certified(secret, &provider).map(Arc::new);
            key.map_err(|why| format!("secret {}/{}: {why}", secret.namespace(), secret.name()))
        };
        let keys: Vec<Arc<CertifiedKey>> = secrets.iter().map(certified).collect::<Result<_, _>>()?;
        if keys.is_empty() {
            return Err("there is no certificate".into());
        }
        let config = Arc::new(self.make(keys, &authorities, clients)?);
        self.cache.configs.insert(made_from, (config.clone(), true));
        Ok(config)
    }

    fn make(
        &self,
        keys: Vec<Arc<CertifiedKey>>,
        authorities: &[(SharedObject, bool)],
        clients: &ClientTls,
    ) -> Result<ServerConfig, String> {
        let provider = &self.cache.provider;
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
        let builder = match &clients.validation {
            None => builder.with_no_client_auth(),
            Some(validation) => {
                builder.with_client_cert_verifier(verifier(authorities, validation.mode.as_deref(), provider)?)
            }
        };
        let mut config = builder.with_cert_resolver(Arc::new(Keys(keys)));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|e| e.to_string())?;
        Ok(config)
    }

    /// The objects with the authorities that sign clients' certificates, and whether each is a Secret.
    fn authorities(&self, from: From<'_>, clients: &ClientTls) -> Result<Vec<(SharedObject, bool)>, String> {
        let references = clients.validation.iter().flat_map(|validation| &validation.ca_certificate_refs);
        let find = |reference: &ObjectRef| {
            if reference.kind.as_deref() != Some("ConfigMap") {
                return self.secret(from, reference).map(|secret| (secret, true));
            }
            let (namespace, name) = (reference.namespace.as_deref().unwrap_or(from.namespace), &reference.name);
            if !granted(&self.objects.grants, from, ("", "ConfigMap"), namespace, name) {
                return Err(format!("no ReferenceGrant in {namespace:?} lets {:?} refer to {name:?}", from.namespace));
            }
            let known = self.objects.config_maps.iter().find(|map| map.namespace() == namespace && map.name() == name);
            known.map(|map| (map.clone(), false)).ok_or_else(|| format!("there is no configmap {namespace}/{name}"))
        };
        references.map(find).collect()
    }

    /// TLSRoutes, the oldest first.
    fn routes(&mut self, gateways: &[Gateway], upstreams: &mut Upstreams) {
        let mut routes: Vec<&SharedObject> =
            self.objects.tls_routes.iter().filter(|route| !route.is_deleting()).collect();
        routes.sort_by_key(|r| (r.str_at("/metadata/creationTimestamp").to_owned(), r.namespace(), r.name()));
        let mut references = References::new(self.objects, upstreams);
        for route in routes {
            let Some(spec) = spec::<RouteSpec>(route) else { continue };
            let hosts = attach::hosts(self.objects, "TLSRoute", route, &spec, gateways);
            let name = format!("{}/{}", route.namespace(), route.name()).into();
            let owner = Owner { name, namespace: route.namespace(), kind: "TLSRoute", http2: false };
            for rule in spec.rules.iter().flatten().take(1) {
                for served in &hosts {
                    let Rule { backends, total_weight, .. } = rules::rule(&owner, rule, None, &mut references);
                    self.sites.add(served.host.clone(), Arc::new(Site::Pass { backends, total_weight }));
                }
            }
        }
    }

    fn ingress(&mut self, ingress: &SharedObject) {
        let Some(spec) = spec::<IngressSpec>(ingress) else { return };
        let namespace = ingress.namespace();
        for tls in spec.tls.iter().filter(|tls| !tls.secret_name.is_empty()) {
            let reference = ObjectRef { name: tls.secret_name.clone(), ..ObjectRef::default() };
            let from = From { kind: "Ingress", namespace };
            match self.config(from, &[&reference], &ClientTls::default()) {
                Ok(config) => {
                    let listener: Arc<str> = format!("{namespace}/{}/{}", ingress.name(), tls.secret_name).into();
                    let site = Arc::new(Site::Terminate { listener, config });
                    let hosts = tls.hosts.iter().map(|host| HostPattern::parse(host));
                    hosts.for_each(|host| self.sites.add(host, site.clone()));
                }
                Err(why) => tracing::warn!(ingress = %format_args!("{namespace}/{}", ingress.name()), "TLS: {why}"),
            }
        }
    }
}

fn verifier(
    authorities_in: &[(SharedObject, bool)],
    mode: Option<&str>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for (object, is_secret) in authorities_in {
        authorities(object, *is_secret, &mut roots)
            .map_err(|why| format!("{}/{}: {why}", object.namespace(), object.name()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let builder = match mode {
        Some("AllowInsecureFallback") => builder.allow_unauthenticated(),
        _ => builder,
    };
    builder.build().map_err(|e| e.to_string())
}

/// Of several certificates the first that covers the name and fits the client, else the first that fits.
#[derive(Debug)]
struct Keys(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Keys {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let [only] = self.0.as_slice() {
            return Some(only.clone());
        }
        let name = hello.server_name().and_then(|name| rustls_pki_types::ServerName::try_from(name.to_owned()).ok());
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        let covers = |key: &&Arc<CertifiedKey>| {
            let certificate =
                key.end_entity_cert().ok().and_then(|der| rustls::server::ParsedCertificate::try_from(der).ok());
            certificate
                .zip(name.as_ref())
                .is_some_and(|(certificate, name)| rustls::client::verify_server_name(&certificate, name).is_ok())
        };
        let best = self.0.iter().filter(fits).find(covers).or_else(|| self.0.iter().find(fits));
        best.or(self.0.first()).cloned()
    }
}
