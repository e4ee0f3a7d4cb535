//! How controllers, node agent and gateway see the API: typed requests in one process, the same admission, validation
//! and conflicts as over HTTP. The server implements it; tests implement it in memory.

use crate::kind::Resource;
use crate::object::{Object, SharedObject};
use crate::status::StatusResult;
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde_json::Value;

#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// `a=b,c in (d,e),!f`
    pub label_selector: String,
    /// `metadata.name=x,spec.nodeName=y`
    pub field_selector: String,
}

#[derive(Clone, Debug)]
pub struct List {
    pub items: Vec<SharedObject>,
    /// Watch from here to see all that comes after.
    pub resource_version: String,
}

#[derive(Clone, Debug)]
pub enum WatchEvent {
    Added(SharedObject),
    Modified(SharedObject),
    /// The last state of what was deleted.
    Deleted(SharedObject),
    /// Nothing changed up to this resource version.
    Bookmark(String),
}

pub type WatchStream = BoxStream<'static, StatusResult<WatchEvent>>;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Background,
    Foreground,
    Orphan,
}

#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// `Some(0)` = remove now (what the agent does once a pod has ended).
    pub grace_period_seconds: Option<i64>,
    pub propagation: Propagation,
    /// Precondition: only if the object still has this uid.
    pub uid: Option<String>,
    pub resource_version: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Patch {
    /// RFC 7386.
    Merge(Value),
    /// RFC 6902.
    Json(Value),
    Strategic(Value),
    Apply {
        object: Value,
        manager: String,
        force: bool,
    },
}

/// The API. `namespace` is `""` for cluster-scoped resources; in `list` and `watch` `""` means all namespaces.
#[async_trait]
pub trait Client: Send + Sync + 'static {
    async fn get(&self, resource: &Resource, namespace: &str, name: &str) -> StatusResult<SharedObject>;
    async fn list(&self, resource: &Resource, namespace: &str, options: &ListOptions) -> StatusResult<List>;
    /// Events after `resource_version`; ends with `Expired` when that is too old to follow.
    async fn watch(
        &self,
        resource: &Resource,
        namespace: &str,
        options: &ListOptions,
        resource_version: &str,
    ) -> StatusResult<WatchStream>;
    async fn create(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject>;
    /// Replaces; refuses with `Conflict` if `metadata.resourceVersion` is set and not the newest.
    async fn update(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject>;
    /// Replaces `status` only, same conflict rule.
    async fn update_status(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject>;
    /// `subresource` is `""`, `status`, `scale` or, for namespaces, `finalize`.
    async fn patch(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        subresource: &str,
        patch: Patch,
    ) -> StatusResult<SharedObject>;
    /// Answers a `TokenRequest` for a service account (`serviceaccounts/token`): the same object with its status.
    async fn request_token(&self, namespace: &str, account: &str, request: Object) -> StatusResult<Object>;
    /// Binds a pod to a node (`pods/binding`).
    async fn bind(&self, namespace: &str, pod: &str, pod_uid: &str, node: &str) -> StatusResult<()>;
    /// Deletes, or marks as being deleted where a grace period, finalizers or propagation ask for it.
    async fn delete(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> StatusResult<()>;
    /// Every resource served now, built-in and custom (the garbage collector and namespace deletion need them all).
    fn resources(&self) -> Vec<(Resource, crate::kind::Scope, String)>;
}
