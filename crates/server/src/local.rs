//! The API for the rest of this process: the same verbs, admission and conflicts as over HTTP, without the wire.

use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::http::watch_error;
use crate::rest::{ListRequest, Wanted, WriteOptions};
use crate::watch::{Change, Event, Filter, Watcher};
use api::client::{Client, DeleteOptions, List, ListOptions, Patch, Propagation, WatchEvent, WatchStream};
use api::kind::{Kind, Resource, Scope};
use api::object::{Meta, Object, SharedObject};
use api::status::{Reason, Status, StatusResult};
use async_trait::async_trait;
use serde_json::json;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Field manager of what the control plane writes.
const MANAGER: &str = "atoll";
const BOOKMARKS: Duration = Duration::from_secs(30);

pub struct Local {
    core: Arc<Core>,
    permit: Permit,
}

impl Local {
    pub fn new(core: Arc<Core>) -> Self {
        Local { core, permit: Permit::internal() }
    }

    fn kind(&self, resource: &Resource) -> StatusResult<Arc<Kind>> {
        self.core.kinds.current().find(resource).cloned().ok_or_else(|| {
            let text = format!("the server does not serve {}/{}", resource.api_version(), resource.plural);
            Status::new(Reason::NotFound, text)
        })
    }

    fn target(&self, resource: &Resource, namespace: &str, name: &str) -> StatusResult<Target> {
        Ok(Target::new(&self.kind(resource)?, namespace, name))
    }

    fn options(&self, subresource: &str) -> WriteOptions {
        WriteOptions { manager: MANAGER.into(), subresource: subresource.into(), ..WriteOptions::default() }
    }

    fn filter(&self, kind: &Kind, namespace: &str, options: &ListOptions) -> StatusResult<Filter> {
        let namespace = if kind.scope == Scope::Cluster { "" } else { namespace };
        let fields = crate::admission::selectable(kind);
        Filter::parse(namespace, &options.label_selector, &options.field_selector, fields)
    }

    async fn replace(
        &self,
        resource: &Resource,
        namespace: &str,
        object: Object,
        subresource: &str,
    ) -> StatusResult<SharedObject> {
        let namespace = if namespace.is_empty() { object.namespace().to_owned() } else { namespace.to_owned() };
        let target = self.target(resource, &namespace, object.name())?;
        let written = self.core.update(&self.permit, &target, object, &self.options(subresource)).await?;
        Ok(written.object.into())
    }
}

#[async_trait]
impl Client for Local {
    async fn get(&self, resource: &Resource, namespace: &str, name: &str) -> StatusResult<SharedObject> {
        self.core.get(&self.target(resource, namespace, name)?).await.map(Arc::new)
    }

    async fn list(&self, resource: &Resource, namespace: &str, options: &ListOptions) -> StatusResult<List> {
        let kind = self.kind(resource)?;
        let filter = self.filter(&kind, namespace, options)?;
        let answer = self.core.list(&ListRequest::all(&kind, filter)).await?;
        let items = answer.items.into_iter().map(Arc::new).collect();
        Ok(List { items, resource_version: answer.revision.to_string() })
    }

    async fn watch(
        &self,
        resource: &Resource,
        namespace: &str,
        options: &ListOptions,
        resource_version: &str,
    ) -> StatusResult<WatchStream> {
        let kind = self.kind(resource)?;
        let filter = self.filter(&kind, namespace, options)?;
        let after = resource_version.parse::<i64>().map_err(|_| {
            Status::bad_request(format!("resourceVersion: Invalid value: \"{resource_version}\": must be a number"))
        })?;
        let watcher = self.core.feeds.watch(&kind, after).await.map_err(|e| watch_error(e, after))?;
        let state = Following { watcher, filter, pending: VecDeque::new(), ended: false };
        Ok(Box::pin(futures_util::stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item, state))
        })))
    }

    async fn create(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        let namespace = if namespace.is_empty() { object.namespace().to_owned() } else { namespace.to_owned() };
        let target = self.target(resource, &namespace, "")?;
        Ok(self.core.create(&self.permit, &target, object, &self.options("")).await?.object.into())
    }

    async fn update(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        self.replace(resource, namespace, object, "").await
    }

    async fn update_status(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        self.replace(resource, namespace, object, "status").await
    }

    async fn patch(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        subresource: &str,
        patch: Patch,
    ) -> StatusResult<SharedObject> {
        let target = self.target(resource, namespace, name)?;
        let written = self.core.patch(&self.permit, &target, &patch, &self.options(subresource)).await?;
        Ok(written.object.into())
    }

    async fn request_token(&self, namespace: &str, account: &str, request: Object) -> StatusResult<Object> {
        let target = self.target(&Resource::new("", "v1", "serviceaccounts"), namespace, account)?;
        crate::admission::tokens::request(&self.core, &target, request).await
    }

    async fn bind(&self, namespace: &str, pod: &str, pod_uid: &str, node: &str) -> StatusResult<()> {
        let target = self.target(&Resource::new("", "v1", "pods"), namespace, pod)?;
        let binding = json!({"metadata": {"name": pod, "uid": pod_uid}, "target": {"kind": "Node", "name": node}});
        self.core.bind(&self.permit, &target, &binding, &self.options("binding")).await
    }

    async fn delete(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> StatusResult<()> {
        let target = self.target(resource, namespace, name)?;
        // Background is what happens anyway; said outright it would take back what someone else chose.
        let propagation = Some(options.propagation).filter(|p| *p != Propagation::Background);
        self.core.delete(&self.permit, &target, options, Wanted { propagation }, false).await.map(drop)
    }

    fn resources(&self) -> Vec<(Resource, Scope, String)> {
        self.core.kinds.current().scope_list()
    }
}

struct Following {
    watcher: Watcher,
    filter: Filter,
    pending: VecDeque<Arc<Event>>,
    ended: bool,
}

impl Following {
    async fn next(&mut self) -> Option<StatusResult<WatchEvent>> {
        loop {
            while let Some(event) = self.pending.pop_front() {
                if let Some((change, object)) = self.filter.see(&event) {
                    return Some(Ok(match change {
                        Change::Added => WatchEvent::Added(object),
                        Change::Modified => WatchEvent::Modified(object),
                        Change::Deleted => WatchEvent::Deleted(object),
                    }));
                }
            }
            if self.ended {
                return None;
            }
            match tokio::time::timeout(BOOKMARKS, self.watcher.next()).await {
                Err(_) => return Some(Ok(WatchEvent::Bookmark(self.watcher.position().to_string()))),
                Ok(None) => return None,
                Ok(Some(Ok(events))) => self.pending.extend(events),
                Ok(Some(Err(error))) => {
                    self.ended = true;
                    return Some(Err(watch_error(error, 0)));
                }
            }
        }
    }
}

impl Core {
    /// The newest object as the store has it, for parts of this crate that know what they ask for.
    pub(crate) async fn fetch(&self, kind: &Arc<Kind>, namespace: &str, name: &str) -> StatusResult<Option<Object>> {
        Ok(self.storage.get(kind, namespace, name).await?.map(|(object, _)| object))
    }
}
