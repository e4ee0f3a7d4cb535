//! The API with all but metadata left out of lists and watches: what the collector keeps of kinds that no reconciler
//! follows anyway.

use api::client::{Client, DeleteOptions, List, ListOptions, Patch, WatchEvent, WatchStream};
use api::kind::{Resource, Scope};
use api::object::{Object, SharedObject};
use api::status::StatusResult;
use async_trait::async_trait;
use futures_util::StreamExt;
use serde_json::{Map, Value};
use std::sync::Arc;

pub(super) struct MetaOnly(pub Arc<dyn Client>);

const KEPT: &[&str] =
    &["name", "namespace", "uid", "resourceVersion", "deletionTimestamp", "finalizers", "ownerReferences"];

fn stripped(object: &SharedObject) -> SharedObject {
    let metadata: Map<String, Value> =
        KEPT.iter().filter_map(|key| Some(((*key).to_owned(), object.get("metadata")?.get(key)?.clone()))).collect();
    let mut fields = Map::new();
    fields.insert("metadata".into(), Value::Object(metadata));
    Arc::new(Value::Object(fields))
}

#[async_trait]
impl Client for MetaOnly {
    async fn get(&self, resource: &Resource, namespace: &str, name: &str) -> StatusResult<SharedObject> {
        self.0.get(resource, namespace, name).await
    }

    async fn list(&self, resource: &Resource, namespace: &str, options: &ListOptions) -> StatusResult<List> {
        let list = self.0.list(resource, namespace, options).await?;
        Ok(List { items: list.items.iter().map(stripped).collect(), ..list })
    }

    async fn watch(
        &self,
        resource: &Resource,
        namespace: &str,
        options: &ListOptions,
        resource_version: &str,
    ) -> StatusResult<WatchStream> {
        let stream = self.0.watch(resource, namespace, options, resource_version).await?;
        let strip = |event: StatusResult<WatchEvent>| {
            event.map(|event| match event {
                WatchEvent::Added(object) => WatchEvent::Added(stripped(&object)),
                WatchEvent::Modified(object) => WatchEvent::Modified(stripped(&object)),
                WatchEvent::Deleted(object) => WatchEvent::Deleted(stripped(&object)),
                WatchEvent::Bookmark(version) => WatchEvent::Bookmark(version),
            })
        };
        Ok(stream.map(strip).boxed())
    }

    async fn create(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        self.0.create(resource, namespace, object).await
    }

    async fn update(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        self.0.update(resource, namespace, object).await
    }

    async fn update_status(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        self.0.update_status(resource, namespace, object).await
    }

    async fn patch(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        subresource: &str,
        patch: Patch,
    ) -> StatusResult<SharedObject> {
        self.0.patch(resource, namespace, name, subresource, patch).await
    }

    async fn request_token(&self, namespace: &str, account: &str, request: Object) -> StatusResult<Object> {
        self.0.request_token(namespace, account, request).await
    }

    async fn bind(&self, namespace: &str, pod: &str, pod_uid: &str, node: &str) -> StatusResult<()> {
        self.0.bind(namespace, pod, pod_uid, node).await
    }

    async fn delete(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> StatusResult<()> {
        self.0.delete(resource, namespace, name, options).await
    }

    fn resources(&self) -> Vec<(Resource, Scope, String)> {
        self.0.resources()
    }
}
