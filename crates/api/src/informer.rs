//! A local copy of a resource that follows the API: list, then watch, list again when history is gone. Controllers, agent
//! and gateway read from it without asking the API, and are told which objects changed.
//!
//! The copy is always updated before a change is told, so whoever reacts to a change reads at least that state. The queue
//! of changes is bounded: a subscriber that is too slow gets [`Change::Everything`] and looks at all objects, so a lost
//! event costs time, never correctness.

use crate::client::{Client, ListOptions, WatchEvent, WatchStream};
use crate::kind::Resource;
use crate::names;
use crate::object::{Meta, SharedObject};
use crate::status::{Reason, Status};
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// Changes a subscriber may be behind before it is told to look at everything.
const QUEUE: usize = 1024;
const FIRST_DELAY: Duration = Duration::from_millis(50);
const MAX_DELAY: Duration = Duration::from_secs(15);

/// Namespace (`""` for cluster-scoped) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(namespace: &str, name: &str) -> Self {
        Key { namespace: namespace.into(), name: name.into() }
    }
    pub fn of(object: &SharedObject) -> Self {
        Key::new(object.namespace(), object.name())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

#[derive(Clone, Debug)]
pub enum Change {
    /// `old` is absent for a new object, `new` for one that is gone.
    Object { key: Key, old: Option<SharedObject>, new: Option<SharedObject> },
    /// Changes were missed: look at every object.
    Everything,
}

struct Shared {
    objects: RwLock<BTreeMap<Key, SharedObject>>,
    changes: broadcast::Sender<Change>,
    synced: watch::Sender<bool>,
}

/// Stops the task when the last handle and the last subscription are gone.
struct Running {
    shared: Arc<Shared>,
    task: tokio::task::AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A cloneable handle on a followed resource.
#[derive(Clone)]
pub struct Informer {
    running: Arc<Running>,
}

impl Informer {
    /// Follows `resource` in `namespace` (`""` = all). Must be called inside a tokio runtime.
    pub fn spawn(client: Arc<dyn Client>, resource: Resource, namespace: &str, options: ListOptions) -> Informer {
        let shared = Arc::new(Shared {
            objects: RwLock::default(),
            changes: broadcast::Sender::new(QUEUE),
            synced: watch::Sender::new(false),
        });
        let follower = Follower { client, resource, namespace: namespace.to_owned(), options, shared: shared.clone() };
        let task = tokio::spawn(follower.run()).abort_handle();
        Informer { running: Arc::new(Running { shared, task }) }
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<SharedObject> {
        self.get_key(&Key::new(namespace, name))
    }

    pub fn get_key(&self, key: &Key) -> Option<SharedObject> {
        self.running.shared.read(|objects| objects.get(key).cloned())
    }

    /// All objects, by namespace and name.
    pub fn list(&self) -> Vec<SharedObject> {
        self.running.shared.read(|objects| objects.values().cloned().collect())
    }

    /// All objects of one namespace.
    pub fn list_in(&self, namespace: &str) -> Vec<SharedObject> {
        self.running.shared.read(|objects| {
            let from = objects.range(Key::new(namespace, "")..);
            from.take_while(|(key, _)| &*key.namespace == namespace).map(|(_, object)| object.clone()).collect()
        })
    }

    pub fn keys(&self) -> Vec<Key> {
        self.running.shared.read(|objects| objects.keys().cloned().collect())
    }

    pub fn is_synced(&self) -> bool {
        *self.running.shared.synced.borrow()
    }

    /// Returns once the first list has been read.
    pub async fn synced(&self) {
        // The sender lives in `shared`, which this handle keeps, so waiting cannot fail.
        let _ = self.running.shared.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Changes from now on. Subscribe first and list afterwards to miss nothing.
    pub fn subscribe(&self) -> Subscription {
        Subscription { changes: self.running.shared.changes.subscribe(), _running: self.running.clone() }
    }
}

/// A bounded queue of changes.
pub struct Subscription {
    changes: broadcast::Receiver<Change>,
    _running: Arc<Running>,
}

impl Subscription {
    /// Waits for the next change. Cancel-safe.
    pub async fn next(&mut self) -> Change {
        match self.changes.recv().await {
            Ok(change) => change,
            Err(broadcast::error::RecvError::Lagged(_)) => Change::Everything,
            // The sender lives as long as this subscription does.
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }

    /// The next change if there is one already.
    pub fn try_next(&mut self) -> Option<Change> {
        match self.changes.try_recv() {
            Ok(change) => Some(change),
            Err(broadcast::error::TryRecvError::Lagged(_)) => Some(Change::Everything),
            Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed) => None,
        }
    }
}

impl Shared {
    fn read<T>(&self, get: impl FnOnce(&BTreeMap<Key, SharedObject>) -> T) -> T {
        get(&self.objects.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut BTreeMap<Key, SharedObject>) -> T) -> T {
        change(&mut self.objects.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, key: Key, old: Option<SharedObject>, new: Option<SharedObject>) {
        // Nobody listening is fine.
        let _ = self.changes.send(Change::Object { key, old, new });
    }

    fn put(&self, object: SharedObject) {
        let key = Key::of(&object);
        let old = self.write(|objects| objects.insert(key.clone(), object.clone()));
        self.tell(key, old, Some(object));
    }

    fn remove(&self, object: &SharedObject) {
        let key = Key::of(object);
        let old = self.write(|objects| objects.remove(&key));
        self.tell(key, Some(old.unwrap_or_else(|| object.clone())), None);
    }

    /// Takes over a fresh list and tells what differs from before.
    fn replace(&self, items: Vec<SharedObject>) {
        let fresh: BTreeMap<Key, SharedObject> = items.into_iter().map(|object| (Key::of(&object), object)).collect();
        let before = self.write(|objects| std::mem::replace(objects, fresh.clone()));
        for (key, old) in &before {
            if !fresh.contains_key(key) {
                self.tell(key.clone(), Some(old.clone()), None);
            }
        }
        for (key, new) in fresh {
            let old = before.get(&key).cloned();
            let same = old.as_ref().is_some_and(|old| {
                old.uid() == new.uid()
                    && old.resource_version() == new.resource_version()
                    && !new.resource_version().is_empty()
            });
            if !same {
                self.tell(key, old, Some(new));
            }
        }
    }
}

/// The task behind an informer.
struct Follower {
    client: Arc<dyn Client>,
    resource: Resource,
    namespace: String,
    options: ListOptions,
    shared: Arc<Shared>,
}

/// Why a watch came to its end.
enum End {
    /// Ended or failed; watch on from the last version seen.
    Resume,
    /// History is gone, list again.
    Relist,
}

impl Follower {
    async fn run(self) {
        let mut delay = Backoff::default();
        loop {
            match self.client.list(&self.resource, &self.namespace, &self.options).await {
                Ok(list) => {
                    self.shared.replace(list.items);
                    self.shared.synced.send_replace(true);
                    self.follow(list.resource_version, &mut delay).await;
                }
                Err(error) => self.complain("list", &error),
            }
            delay.wait().await;
        }
    }

    /// Watches from `version` on until history is gone.
    async fn follow(&self, mut version: String, delay: &mut Backoff) {
        loop {
            let end = match self.client.watch(&self.resource, &self.namespace, &self.options, &version).await {
                Ok(stream) => self.drain(stream, &mut version, delay).await,
                Err(error) => self.judge(&error),
            };
            match end {
                End::Resume => delay.wait().await,
                End::Relist => return,
            }
        }
    }

    async fn drain(&self, mut stream: WatchStream, version: &mut String, delay: &mut Backoff) -> End {
        while let Some(event) = stream.next().await {
            match event {
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    object.resource_version().clone_into(version);
                    self.shared.put(object);
                }
                Ok(WatchEvent::Deleted(object)) => {
                    object.resource_version().clone_into(version);
                    self.shared.remove(&object);
                }
                Ok(WatchEvent::Bookmark(at)) => *version = at,
                Err(error) => return self.judge(&error),
            }
            delay.reset();
        }
        End::Resume
    }

    fn judge(&self, error: &Status) -> End {
        self.complain("watch", error);
        match error.reason {
            // A version this server never had (a restored store) is as good as expired.
            Reason::Expired | Reason::BadRequest | Reason::Invalid | Reason::NotFound => End::Relist,
            _ => End::Resume,
        }
    }

    fn complain(&self, what: &str, error: &Status) {
        if error.reason == Reason::Expired {
            tracing::debug!(resource = %self.resource.plural, "{what}: {error}; listing again");
        } else {
            tracing::warn!(resource = %self.resource.plural, "{what} failed, trying again: {error}");
        }
    }
}

/// Doubling waits with jitter: half fixed, half random.
struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: FIRST_DELAY }
    }
}

impl Backoff {
    fn reset(&mut self) {
        self.next = FIRST_DELAY;
    }

    async fn wait(&mut self) {
        let half = self.next / 2;
        let random = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
        self.next = (self.next * 2).min(MAX_DELAY);
        tokio::time::sleep(half + Duration::from_micros(names::random_u64() % random)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryClient;
    use serde_json::{Value, json};

    fn config(name: &str, value: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "a"}, "data": {"k": value}})
    }

    async fn until(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(tokio::time::Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn follows_and_tells_changes() {
        let client = MemoryClient::new();
        let resource = Resource::new("", "v1", "configmaps");
        client.create(&resource, "a", config("one", "1")).await.unwrap();
        let informer = Informer::spawn(client.clone(), resource.clone(), "", ListOptions::default());
        let mut changes = informer.subscribe();
        informer.synced().await;
        assert_eq!(informer.list_in("a").len(), 1);
        assert!(matches!(changes.next().await, Change::Object { old: None, new: Some(_), .. }));
        client.create(&resource, "a", config("two", "1")).await.unwrap();
        client.update(&resource, "a", config("one", "2")).await.unwrap();
        client.delete(&resource, "a", "two", &Default::default()).await.unwrap();
        let mut seen = Vec::new();
        while seen.len() < 3 {
            if let Change::Object { key, old, new } = changes.next().await {
                seen.push((key.to_string(), old.is_some(), new.is_some()));
            }
        }
        let expected = [("a/two", false, true), ("a/one", true, true), ("a/two", true, false)];
        assert_eq!(seen, expected.map(|(key, old, new)| (key.to_owned(), old, new)));
        assert_eq!(informer.get("a", "one").unwrap().str_at("/data/k"), "2");
    }

    #[tokio::test]
    async fn lists_again_when_history_is_gone_and_after_errors() {
        let client = MemoryClient::new();
        let resource = Resource::new("", "v1", "configmaps");
        client.create(&resource, "a", config("one", "1")).await.unwrap();
        let informer = Informer::spawn(client.clone(), resource.clone(), "a", ListOptions::default());
        informer.synced().await;
        client.break_watches(Status::new(Reason::Expired, "too old resource version"));
        client.create(&resource, "a", config("two", "1")).await.unwrap();
        client.delete(&resource, "a", "one", &Default::default()).await.unwrap();
        client.compact();
        until("the new state is seen", || informer.keys() == [Key::new("a", "two")]).await;
        client.break_watches(Status::internal("cut"));
        client.create(&resource, "a", config("three", "1")).await.unwrap();
        until("the watch goes on", || informer.list().len() == 2).await;
    }

    #[tokio::test]
    async fn overflow_means_look_at_everything() {
        let client = MemoryClient::new();
        let resource = Resource::new("", "v1", "configmaps");
        let informer = Informer::spawn(client.clone(), resource.clone(), "", ListOptions::default());
        let mut changes = informer.subscribe();
        informer.synced().await;
        for index in 0..QUEUE + 10 {
            client.create(&resource, "a", config(&format!("c{index}"), "1")).await.unwrap();
        }
        until("all are seen", || informer.list().len() == QUEUE + 10).await;
        assert!(matches!(changes.next().await, Change::Everything));
    }
}
