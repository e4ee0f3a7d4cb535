//! An in-memory [`Client`] for the tests of controllers, node agent and gateway: uids, resource versions, conflicts,
//! generations, watches, deletion with finalizers and grace. No admission, defaults or validation; those belong to the
//! server, whose own tests cover them.

mod patch;

use crate::client::{Client, DeleteOptions, List, ListOptions, Patch, Propagation, WatchEvent, WatchStream};
use crate::kind::{Resource, Scope};
use crate::object::{Meta, Object, SharedObject, child};
use crate::selector::{FieldSelector, Selector};
use crate::status::{Reason, Status, StatusResult};
use crate::{kinds, names, time};
use async_trait::async_trait;
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

type Address = (Resource, String, String);

/// One write, as watches see it.
#[derive(Clone)]
struct Logged {
    version: u64,
    address: Address,
    old: Option<SharedObject>,
    new: Option<SharedObject>,
    /// The last state with the version of the deletion.
    gone: Option<SharedObject>,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Address, SharedObject>,
    log: Vec<Logged>,
    /// Entries up to this version have been forgotten.
    compacted: u64,
    /// Watches opened before this count of breaks end with the error.
    breaks: u64,
    break_error: Option<Status>,
    extra: Vec<(Resource, Scope, String)>,
}

/// See the module's documentation. Clones share their objects.
#[derive(Clone)]
pub struct MemoryClient {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryClient {
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Arc<MemoryClient> {
        let inner = Inner { state: Mutex::default(), changed: watch::Sender::new(0) };
        Arc::new(MemoryClient { inner: Arc::new(inner) })
    }

    /// Makes `resources()` name one more resource.
    pub fn register(&self, resource: Resource, scope: Scope, kind: &str) {
        self.lock().extra.push((resource, scope, kind.to_owned()));
    }

    /// Stores `object` as it is, status and all; uid, versions and creation time are filled where absent.
    pub fn put(&self, resource: &Resource, object: Object) -> SharedObject {
        let mut state = self.lock();
        let address = (resource.clone(), object.namespace().to_owned(), object.name().to_owned());
        let object = complete(object);
        self.store(&mut state, address, Some(object)).unwrap_or_default()
    }

    /// Ends every open watch with `error`.
    pub fn break_watches(&self, error: Status) {
        let mut state = self.lock();
        state.breaks += 1;
        state.break_error = Some(error);
        self.inner.changed.send_modify(|_| {});
    }

    /// Forgets history: a watch from an older version ends with `Expired`.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.compacted = state.version;
        state.log.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.lock()
    }

    /// Writes or removes one object and tells watches.
    fn store(&self, state: &mut State, address: Address, new: Option<Object>) -> Option<SharedObject> {
        state.version += 1;
        let version = state.version;
        let stamp = |mut object: Object| {
            object.metadata_mut().insert("resourceVersion".into(), version.to_string().into());
            Arc::new(object)
        };
        let new = new.map(stamp);
        let old = match &new {
            Some(object) => state.objects.insert(address.clone(), object.clone()),
            None => state.objects.remove(&address),
        };
        let gone = if new.is_none() { old.as_deref().cloned().map(stamp) } else { None };
        state.log.push(Logged { version, address, old, new: new.clone(), gone });
        self.inner.changed.send_replace(version);
        new
    }

    fn find(state: &State, resource: &Resource, namespace: &str, name: &str) -> StatusResult<(Address, SharedObject)> {
        let address = (resource.clone(), namespace.to_owned(), name.to_owned());
        match state.objects.get(&address) {
            Some(object) => Ok((address, object.clone())),
            None => Err(Status::not_found(&resource.group, &resource.plural, name)),
        }
    }

    /// What update, update_status and patch have in common. `new` already holds what the caller wants.
    fn replace(
        &self,
        state: &mut State,
        address: Address,
        old: &SharedObject,
        mut new: Object,
        status_only: bool,
    ) -> StatusResult<SharedObject> {
        let resource = &address.0;
        let conflict = |why: &str| Status::conflict(&resource.group, &resource.plural, old.name(), why);
        if !new.resource_version().is_empty() && new.resource_version() != old.resource_version() {
            return Err(conflict(
                "the object has been modified; please apply your changes to the latest version and try again",
            ));
        }
        if !new.uid().is_empty() && new.uid() != old.uid() {
            return Err(conflict("Precondition failed: UID in precondition does not match UID in object meta"));
        }
        if status_only {
            let status = new.get("status").cloned();
            new = (**old).clone();
            set(&mut new, "status", status);
        } else {
            if has_status(resource) {
                set(&mut new, "status", old.get("status").cloned());
            }
            for key in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation"] {
                let kept = old.pointer("/metadata").and_then(|meta| meta.get(key)).cloned();
                set_in(new.metadata_mut(), key, kept);
            }
            if significant(&new) != significant(old) {
                new.metadata_mut().insert("generation".into(), (old.generation() + 1).into());
            }
        }
        new.metadata_mut().insert("resourceVersion".into(), old.resource_version().into());
        if new == **old {
            return Ok(old.clone());
        }
        let ended = new.is_deleting() && new.finalizers().is_empty() && grace(&new) == 0;
        let last = Arc::new(new.clone());
        let kept = self.store(state, address.clone(), Some(new));
        if ended {
            self.store(state, address, None);
        }
        Ok(kept.unwrap_or(last))
    }

    fn mark_deleted(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> StatusResult<()> {
        let mut state = self.lock();
        let (address, old) = Self::find(&state, resource, namespace, name)?;
        let conflict = |why: String| Err(Status::conflict(&resource.group, &resource.plural, name, &why));
        if let Some(uid) = options.uid.as_deref().filter(|uid| *uid != old.uid()) {
            return conflict(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                old.uid()
            ));
        }
        if let Some(version) = options.resource_version.as_deref().filter(|version| *version != old.resource_version())
        {
            return conflict(format!(
                "Precondition failed: ResourceVersion in precondition: {version}, ResourceVersion in object meta: {}",
                old.resource_version()
            ));
        }
        let mut new = (*old).clone();
        let mut finalizers: Vec<Value> = old.finalizers().into_iter().map(Value::from).collect();
        let wanted = match options.propagation {
            Propagation::Background => None,
            Propagation::Foreground => Some("foregroundDeletion"),
            Propagation::Orphan => Some("orphan"),
        };
        if let Some(wanted) = wanted.filter(|wanted| !old.finalizers().contains(wanted)) {
            finalizers.push(wanted.into());
        }
        let mut seconds = pod_grace(resource, &old, options);
        if old.is_deleting() {
            seconds = seconds.min(grace(&old));
        }
        if finalizers.is_empty() && seconds == 0 {
            self.store(&mut state, address, None);
            return Ok(());
        }
        let meta = new.metadata_mut();
        if !finalizers.is_empty() {
            meta.insert("finalizers".into(), finalizers.into());
        }
        meta.insert("deletionTimestamp".into(), time::rfc3339(time::now() + seconds).into());
        meta.insert("deletionGracePeriodSeconds".into(), seconds.into());
        if !old.is_deleting() {
            meta.insert("generation".into(), (old.generation() + 1).into());
        } else if seconds == grace(&old) && new.finalizers() == old.finalizers() {
            return Ok(());
        }
        self.store(&mut state, address, Some(new));
        Ok(())
    }
}

/// Seconds a pod is given to end; everything else is removed at once.
fn pod_grace(resource: &Resource, pod: &Object, options: &DeleteOptions) -> i64 {
    if !resource.group.is_empty() || &*resource.plural != "pods" {
        return 0;
    }
    let ended = matches!(pod.str_at("/status/phase"), "Succeeded" | "Failed");
    if pod.str_at("/spec/nodeName").is_empty() || ended {
        return 0;
    }
    let asked = options.grace_period_seconds;
    asked.or(pod.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64)).unwrap_or(30).max(0)
}

fn grace(object: &Object) -> i64 {
    object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0)
}

fn set(object: &mut Object, key: &str, value: Option<Value>) {
    set_in(crate::object::object_of(object), key, value);
}

fn set_in(map: &mut serde_json::Map<String, Value>, key: &str, value: Option<Value>) {
    match value {
        Some(value) => map.insert(key.to_owned(), value),
        None => map.remove(key),
    };
}

/// Kinds whose status only `update_status` changes; so do those that nobody has heard of.
fn has_status(resource: &Resource) -> bool {
    static WITHOUT: LazyLock<Vec<Resource>> = LazyLock::new(|| {
        kinds::builtin().into_iter().filter(|kind| !kind.subresources.status).map(|kind| kind.resource).collect()
    });
    !WITHOUT.contains(resource)
}

/// What counts for the generation.
fn significant(object: &Object) -> Object {
    let mut rest = object.clone();
    if let Value::Object(fields) = &mut rest {
        fields.remove("metadata");
        fields.remove("status");
    }
    rest
}

fn complete(mut object: Object) -> Object {
    let meta = object.metadata_mut();
    meta.entry("uid").or_insert_with(|| names::uid().into());
    meta.entry("creationTimestamp").or_insert_with(|| time::now_rfc3339().into());
    meta.entry("generation").or_insert_with(|| 1.into());
    object
}

/// Which objects a list or watch means.
#[derive(Clone)]
struct Wanted {
    resource: Resource,
    namespace: String,
    labels: Selector,
    fields: FieldSelector,
}

impl Wanted {
    fn new(resource: &Resource, namespace: &str, options: &ListOptions) -> StatusResult<Self> {
        Ok(Wanted {
            resource: resource.clone(),
            namespace: namespace.to_owned(),
            labels: Selector::parse(&options.label_selector).map_err(|e| Status::bad_request(e.to_string()))?,
            fields: FieldSelector::parse(&options.field_selector).map_err(|e| Status::bad_request(e.to_string()))?,
        })
    }
    fn address(&self, address: &Address) -> bool {
        address.0 == self.resource && (self.namespace.is_empty() || self.namespace == address.1)
    }
    fn object(&self, object: &Object) -> bool {
        self.labels.matches_object(object) && self.fields.matches(object)
    }
    /// An object that stops matching is deleted as far as this watch goes.
    fn event(&self, entry: &Logged) -> Option<WatchEvent> {
        if !self.address(&entry.address) {
            return None;
        }
        let old = entry.old.as_ref().filter(|old| self.object(old));
        let new = entry.new.as_ref().filter(|new| self.object(new));
        match (old, new) {
            (None, Some(new)) => Some(WatchEvent::Added(new.clone())),
            (Some(_), Some(new)) => Some(WatchEvent::Modified(new.clone())),
            (Some(old), None) => {
                Some(WatchEvent::Deleted(entry.new.as_ref().or(entry.gone.as_ref()).unwrap_or(old).clone()))
            }
            (None, None) => None,
        }
    }
}

/// A running watch: its place in the log.
struct Follow {
    inner: Arc<Inner>,
    wanted: Wanted,
    at: u64,
    breaks: u64,
    changed: watch::Receiver<u64>,
    ready: VecDeque<WatchEvent>,
}

impl Follow {
    /// `None` once the watch was broken and its error told.
    async fn next(mut self) -> Option<(StatusResult<WatchEvent>, Option<Follow>)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), Some(self)));
            }
            self.changed.borrow_and_update();
            if let Some(error) = self.fill() {
                return Some((Err(error), None));
            }
            if self.ready.is_empty() {
                self.changed.changed().await.ok()?;
            }
        }
    }

    /// Takes what is new in the log, or the error this watch ends with.
    fn fill(&mut self) -> Option<Status> {
        let inner = self.inner.clone();
        let state = inner.lock();
        if state.breaks > self.breaks {
            return state.break_error.clone();
        }
        if self.at < state.compacted {
            return Some(expired(self.at, state.compacted));
        }
        let start = state.log.partition_point(|entry| entry.version <= self.at);
        self.ready.extend(state.log.iter().skip(start).filter_map(|entry| self.wanted.event(entry)));
        self.at = state.version;
        None
    }
}

fn expired(from: u64, oldest: u64) -> Status {
    Status::new(Reason::Expired, format!("too old resource version: {from} ({oldest})"))
}

#[async_trait]
impl Client for MemoryClient {
    async fn get(&self, resource: &Resource, namespace: &str, name: &str) -> StatusResult<SharedObject> {
        Ok(Self::find(&self.lock(), resource, namespace, name)?.1)
    }

    async fn list(&self, resource: &Resource, namespace: &str, options: &ListOptions) -> StatusResult<List> {
        let wanted = Wanted::new(resource, namespace, options)?;
        let state = self.lock();
        let items = state.objects.iter().filter(|(address, object)| wanted.address(address) && wanted.object(object));
        Ok(List {
            items: items.map(|(_, object)| object.clone()).collect(),
            resource_version: state.version.to_string(),
        })
    }

    async fn watch(
        &self,
        resource: &Resource,
        namespace: &str,
        options: &ListOptions,
        from: &str,
    ) -> StatusResult<WatchStream> {
        let wanted = Wanted::new(resource, namespace, options)?;
        let state = self.lock();
        let from: u64 = match from {
            "" | "0" => state.version,
            text => text.parse().map_err(|_| Status::bad_request(format!("invalid resource version {text:?}")))?,
        };
        if from < state.compacted {
            return Err(expired(from, state.compacted));
        }
        let follow = Follow {
            inner: self.inner.clone(),
            wanted,
            at: from,
            breaks: state.breaks,
            changed: self.inner.changed.subscribe(),
            ready: VecDeque::new(),
        };
        let stream = futures_util::stream::unfold(Some(follow), |follow| async move { follow?.next().await });
        Ok(stream.boxed())
    }

    async fn create(&self, resource: &Resource, namespace: &str, mut object: Object) -> StatusResult<SharedObject> {
        let base = object.str_at("/metadata/generateName").to_owned();
        let meta = object.metadata_mut();
        if meta.get("name").and_then(Value::as_str).unwrap_or("").is_empty() && !base.is_empty() {
            meta.insert("name".into(), names::generate(&base).into());
        }
        if !namespace.is_empty() {
            meta.insert("namespace".into(), namespace.into());
        }
        for key in ["uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "generation", "selfLink"] {
            meta.remove(key);
        }
        if object.name().is_empty() {
            return Err(Status::invalid(
                &resource.group,
                object.str_at("/kind"),
                "",
                vec![crate::status::Cause {
                    reason: "FieldValueRequired".into(),
                    message: "Required value: name or generateName is required".into(),
                    field: "metadata.name".into(),
                }],
            ));
        }
        // A node registers itself with its status; everything else begins without.
        if has_status(resource) && &*resource.plural != "nodes" {
            set(&mut object, "status", None);
        }
        if resource.group.is_empty() && &*resource.plural == "pods" {
            set(&mut object, "status", Some(json!({"phase": "Pending"})));
        }
        let mut state = self.lock();
        let address = (resource.clone(), namespace.to_owned(), object.name().to_owned());
        if state.objects.contains_key(&address) {
            return Err(Status::already_exists(&resource.group, &resource.plural, object.name()));
        }
        let object = complete(object);
        Ok(self.store(&mut state, address, Some(object)).unwrap_or_default())
    }

    async fn update(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        let mut state = self.lock();
        let (address, old) = Self::find(&state, resource, namespace, object.name())?;
        self.replace(&mut state, address, &old, object, false)
    }

    async fn update_status(&self, resource: &Resource, namespace: &str, object: Object) -> StatusResult<SharedObject> {
        let mut state = self.lock();
        let (address, old) = Self::find(&state, resource, namespace, object.name())?;
        self.replace(&mut state, address, &old, object, true)
    }

    async fn patch(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        subresource: &str,
        patch: Patch,
    ) -> StatusResult<SharedObject> {
        if let Patch::Apply { object, .. } = &patch {
            let exists = Self::find(&self.lock(), resource, namespace, name).is_ok();
            if !exists && subresource.is_empty() {
                return self.create(resource, namespace, object.clone()).await;
            }
        }
        let mut state = self.lock();
        let (address, old) = Self::find(&state, resource, namespace, name)?;
        let mut new = (*old).clone();
        if let Some(Value::Object(meta)) = new.get_mut("metadata") {
            // Only a version that the patch itself names is a precondition.
            meta.remove("resourceVersion");
        }
        match patch {
            Patch::Merge(patch) | Patch::Apply { object: patch, .. } => patch::merge(&mut new, &patch),
            Patch::Json(patch) => patch::json_patch(&mut new, &patch)?,
            Patch::Strategic(_) => {
                return Err(Status::new(
                    Reason::UnsupportedMediaType,
                    "strategic merge patch needs the server; use a merge patch",
                ));
            }
        }
        self.replace(&mut state, address, &old, new, subresource == "status")
    }

    async fn request_token(&self, namespace: &str, account: &str, mut request: Object) -> StatusResult<Object> {
        let account = self.get(&Resource::new("", "v1", "serviceaccounts"), namespace, account).await?;
        let token = serde_json::json!({"token": format!("token of {}", account.uid())});
        crate::object::object_of(&mut request).insert("status".into(), token);
        Ok(request)
    }

    async fn bind(&self, namespace: &str, pod: &str, pod_uid: &str, node: &str) -> StatusResult<()> {
        let resource = Resource::new("", "v1", "pods");
        let mut state = self.lock();
        let (address, old) = Self::find(&state, &resource, namespace, pod)?;
        let conflict = |why: &str| Err(Status::conflict("", "pods/binding", pod, why));
        if !pod_uid.is_empty() && pod_uid != old.uid() {
            return conflict("Precondition failed: UID in precondition does not match UID in object meta");
        }
        if old.is_deleting() {
            return conflict(&format!("pod {pod} is being deleted, cannot be assigned to a host"));
        }
        let bound = old.str_at("/spec/nodeName");
        if !bound.is_empty() {
            return conflict(&format!("pod {pod} is already assigned to node {bound:?}"));
        }
        let mut new = (*old).clone();
        let fields = crate::object::object_of(&mut new);
        child(fields, "spec").insert("nodeName".into(), node.into());
        let conditions = child(fields, "status").entry("conditions").or_insert_with(|| json!([]));
        if let Value::Array(list) = conditions {
            list.retain(|condition| condition.str_at("/type") != "PodScheduled");
            list.push(json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": time::now_rfc3339()}));
        }
        self.store(&mut state, address, Some(new));
        Ok(())
    }

    async fn delete(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> StatusResult<()> {
        self.mark_deleted(resource, namespace, name, options)
    }

    fn resources(&self) -> Vec<(Resource, Scope, String)> {
        let known = kinds::builtin().into_iter().map(|kind| (kind.resource, kind.scope, kind.kind));
        known.chain(self.lock().extra.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "web-", "labels": {"a": "b"}},
               "spec": {"containers": [{"name": "c", "image": "i"}]}})
    }

    #[tokio::test]
    async fn a_pod_from_creation_to_its_end() {
        let client = MemoryClient::new();
        let pods = Resource::new("", "v1", "pods");
        let made = client.create(&pods, "x", pod()).await.unwrap();
        assert_eq!((made.namespace(), made.generation(), made.str_at("/status/phase")), ("x", 1, "Pending"));
        client.bind("x", made.name(), made.uid(), "n1").await.unwrap();
        assert!(client.bind("x", made.name(), made.uid(), "n2").await.unwrap_err().is_conflict());
        let stale = client.update(&pods, "x", (*made).clone()).await;
        assert!(stale.unwrap_err().is_conflict());
        let status = Patch::Merge(json!({"status": {"phase": "Running"}, "spec": {"x": 1}}));
        let now = client.patch(&pods, "x", made.name(), "status", status).await.unwrap();
        assert_eq!((now.str_at("/status/phase"), now.pointer("/spec/x"), now.generation()), ("Running", None, 1));
        client.delete(&pods, "x", made.name(), &DeleteOptions::default()).await.unwrap();
        assert!(client.get(&pods, "x", made.name()).await.unwrap().is_deleting());
        let now = DeleteOptions { grace_period_seconds: Some(0), ..Default::default() };
        client.delete(&pods, "x", made.name(), &now).await.unwrap();
        assert!(client.get(&pods, "x", made.name()).await.unwrap_err().is_not_found());
    }

    #[tokio::test]
    async fn finalizers_hold_and_updates_release() {
        let client = MemoryClient::new();
        let resource = Resource::new("apps", "v1", "deployments");
        let object = json!({"metadata": {"name": "d", "finalizers": ["f"]}, "spec": {"replicas": 1}});
        client.create(&resource, "x", object).await.unwrap();
        client.delete(&resource, "x", "d", &DeleteOptions::default()).await.unwrap();
        let scaled = Patch::Json(json!([{"op": "replace", "path": "/spec/replicas", "value": 3}]));
        let held = client.patch(&resource, "x", "d", "", scaled).await.unwrap();
        assert!(held.is_deleting() && held.generation() == 3);
        let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        client.patch(&resource, "x", "d", "", release).await.unwrap();
        assert!(client.list(&resource, "", &ListOptions::default()).await.unwrap().items.is_empty());
    }

    #[tokio::test]
    async fn watches_see_objects_enter_and_leave_a_selection() {
        let client = MemoryClient::new();
        let pods = Resource::new("", "v1", "pods");
        let options = ListOptions { label_selector: "a=b".into(), ..Default::default() };
        let mut watch = client.watch(&pods, "", &options, "0").await.unwrap();
        let made = client.create(&pods, "x", pod()).await.unwrap();
        for value in ["c", "b"] {
            let patch = Patch::Merge(json!({"metadata": {"labels": {"a": value}}}));
            client.patch(&pods, "x", made.name(), "", patch).await.unwrap();
        }
        client.delete(&pods, "x", made.name(), &DeleteOptions::default()).await.unwrap();
        let mut seen = String::new();
        for _ in 0..4 {
            seen.push(match watch.next().await.unwrap().unwrap() {
                WatchEvent::Added(_) => 'a',
                WatchEvent::Modified(_) => 'm',
                WatchEvent::Deleted(_) => 'd',
                WatchEvent::Bookmark(_) => 'b',
            });
        }
        assert_eq!(seen, "adad");
    }
}
