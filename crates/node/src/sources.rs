//! ConfigMaps and Secrets that a pod refers to, fetched before they are used, so that the code that uses them is pure.

use api::client::Client;
use api::k8s::api::core::v1::{ConfigMap, Container, Pod, Secret};
use api::kind::Resource;
use api::status::{Found, StatusResult};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum SourceKind {
    ConfigMap,
    Secret,
}

impl SourceKind {
    pub fn resource(self) -> Resource {
        match self {
            SourceKind::ConfigMap => Resource::new("", "v1", "configmaps"),
            SourceKind::Secret => Resource::new("", "v1", "secrets"),
        }
    }
    pub fn word(self) -> &'static str {
        match self {
            SourceKind::ConfigMap => "configmap",
            SourceKind::Secret => "secret",
        }
    }
}

pub(crate) type SourceRef = (SourceKind, String);

/// What was found; a name that is a key with `None` was looked for and is not there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    config_maps: BTreeMap<String, Option<Arc<ConfigMap>>>,
    secrets: BTreeMap<String, Option<Arc<Secret>>>,
}

impl Sources {
    pub async fn fetch(client: &dyn Client, namespace: &str, names: &BTreeSet<SourceRef>) -> StatusResult<Self> {
        let mut found = Sources::default();
        for (kind, name) in names {
            match kind {
                SourceKind::ConfigMap => {
                    let object = get::<ConfigMap>(client, *kind, namespace, name).await?;
                    found.config_maps.insert(name.clone(), object.map(Arc::new));
                }
                SourceKind::Secret => {
                    let object = get::<Secret>(client, *kind, namespace, name).await?;
                    found.secrets.insert(name.clone(), object.map(Arc::new));
                }
            }
        }
        Ok(found)
    }

    pub fn config_map(&self, name: &str) -> Option<&Arc<ConfigMap>> {
        self.config_maps.get(name)?.as_ref()
    }
    pub fn secret(&self, name: &str) -> Option<&Arc<Secret>> {
        self.secrets.get(name)?.as_ref()
    }
    pub fn exists(&self, kind: SourceKind, name: &str) -> bool {
        match kind {
            SourceKind::ConfigMap => self.config_map(name).is_some(),
            SourceKind::Secret => self.secret(name).is_some(),
        }
    }
    /// One value as bytes.
    pub fn bytes(&self, kind: SourceKind, name: &str, key: &str) -> Option<Vec<u8>> {
        match kind {
            SourceKind::ConfigMap => {
                let map = self.config_map(name)?;
                let text = map.data.as_ref().and_then(|d| d.get(key)).map(|v| v.as_bytes().to_vec());
                text.or_else(|| map.binary_data.as_ref().and_then(|d| d.get(key)).map(|v| v.0.clone()))
            }
            SourceKind::Secret => self.secret(name)?.data.as_ref()?.get(key).map(|v| v.0.clone()),
        }
    }
    /// All keys with their values, sorted.
    pub fn all(&self, kind: SourceKind, name: &str) -> Vec<(String, Vec<u8>)> {
        let mut out = BTreeMap::new();
        match kind {
            SourceKind::ConfigMap => {
                if let Some(map) = self.config_map(name) {
                    for (k, v) in map.data.iter().flatten() {
                        out.insert(k.clone(), v.as_bytes().to_vec());
                    }
                    for (k, v) in map.binary_data.iter().flatten() {
                        out.insert(k.clone(), v.0.clone());
                    }
                }
            }
            SourceKind::Secret => {
                if let Some(secret) = self.secret(name) {
                    for (k, v) in secret.data.iter().flatten() {
                        out.insert(k.clone(), v.0.clone());
                    }
                }
            }
        }
        out.into_iter().collect()
    }
    /// Puts in one object as a watch reported it.
    #[cfg(test)]
    pub fn insert(&mut self, kind: SourceKind, name: &str, object: &api::Object) {
        use serde::Deserialize;
        match kind {
            SourceKind::ConfigMap => {
                self.config_maps.insert(name.into(), ConfigMap::deserialize(object).ok().map(Arc::new));
            }
            SourceKind::Secret => {
                self.secrets.insert(name.into(), Secret::deserialize(object).ok().map(Arc::new));
            }
        }
    }
}

async fn get<T: DeserializeOwned>(
    client: &dyn Client,
    kind: SourceKind,
    namespace: &str,
    name: &str,
) -> StatusResult<Option<T>> {
    let object = client.get(&kind.resource(), namespace, name).await.found()?;
    object.map(|object| T::deserialize(&*object)).transpose().map_err(api::Status::internal)
}

/// What the environment of `container` refers to.
pub(crate) fn of_container(container: &Container) -> BTreeSet<SourceRef> {
    let mut out = BTreeSet::new();
    for from in container.env_from.iter().flatten() {
        if let Some(r) = &from.config_map_ref {
            out.insert((SourceKind::ConfigMap, r.name.clone()));
        }
        if let Some(r) = &from.secret_ref {
            out.insert((SourceKind::Secret, r.name.clone()));
        }
    }
    for from in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        if let Some(r) = &from.config_map_key_ref {
            out.insert((SourceKind::ConfigMap, r.name.clone()));
        }
        if let Some(r) = &from.secret_key_ref {
            out.insert((SourceKind::Secret, r.name.clone()));
        }
    }
    out
}

/// What the volumes of `pod` refer to.
pub(crate) fn of_volumes(pod: &Pod) -> BTreeSet<SourceRef> {
    let mut out = BTreeSet::new();
    for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
        if let Some(r) = &volume.config_map {
            out.insert((SourceKind::ConfigMap, r.name.clone()));
        }
        if let Some(r) = volume.secret.as_ref().and_then(|s| s.secret_name.clone()) {
            out.insert((SourceKind::Secret, r));
        }
        for projection in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            if let Some(r) = &projection.config_map {
                out.insert((SourceKind::ConfigMap, r.name.clone()));
            }
            if let Some(r) = &projection.secret {
                out.insert((SourceKind::Secret, r.name.clone()));
            }
        }
    }
    out
}
