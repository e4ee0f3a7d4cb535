//! Garbage collection: deletes what is owned by something that is gone, and carries out foreground and orphaning deletion.
//!
//! It follows the metadata of every resource served ([`meta::MetaOnly`]), keeps who owns what in a [`graph::Graph`], and
//! works on one object at a time, always looking at its live state before it acts. An owner counts as gone only when the
//! API itself says so: not found, or another uid under that name.

mod graph;
mod meta;
#[cfg(test)]
mod tests;

use crate::context::Context;
use crate::queue::Queue;
use crate::runner::is_race;
use api::client::{Client, DeleteOptions, ListOptions, Patch, Propagation};
use api::informer::{Change, Informer};
use api::kind::{Resource, Scope};
use api::object::{Meta, SharedObject};
use api::status::{Found, StatusResult};
use graph::{FOREGROUND, Graph, ORPHAN, Owner, Uid};
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

const WORKERS: usize = 4;
/// How often to look for resources that have come or gone.
const RESOURCES_EVERY: Duration = Duration::from_secs(2);

struct Collector {
    context: Arc<Context>,
    graph: Mutex<Graph>,
    queue: Queue<Uid>,
    /// By group and kind, with its scope.
    kinds: Mutex<Kinds>,
}

type Kinds = HashMap<(Arc<str>, String), (Resource, Scope)>;

/// The API's resources once each, in the version listed first.
pub(crate) fn resources(client: &dyn Client) -> Vec<(Resource, Scope, String)> {
    let mut seen = std::collections::HashSet::new();
    let mut all = client.resources();
    all.retain(|(resource, ..)| {
        // Events own nothing, are owned by nobody and are many.
        &*resource.plural != "events" && seen.insert((Arc::clone(&resource.group), Arc::clone(&resource.plural)))
    });
    all
}

pub(crate) async fn run(context: Arc<Context>) {
    let collector = Arc::new(Collector {
        context: Arc::clone(&context),
        graph: Mutex::default(),
        queue: Queue::default(),
        kinds: Mutex::default(),
    });
    let metadata: Arc<dyn Client> = Arc::new(meta::MetaOnly(Arc::clone(&context.client)));
    let mut followed: HashMap<Resource, (Informer, tokio::task::AbortHandle)> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut working = false;
    let mut resync = tokio::time::Instant::now() + context.config.resync;
    loop {
        let served = resources(&*context.client);
        for (resource, ..) in &served {
            if !followed.contains_key(resource) {
                let spawn = || Informer::spawn(Arc::clone(&metadata), resource.clone(), "", ListOptions::default());
                let informer = context.informers.existing(resource).unwrap_or_else(spawn);
                let follow = Arc::clone(&collector).follow(resource.clone(), informer.clone());
                let handle = tasks.spawn(follow);
                followed.insert(resource.clone(), (informer, handle));
            }
        }
        followed.retain(|resource, (_, handle)| {
            let stays = served.iter().any(|(other, ..)| other == resource);
            if !stays {
                handle.abort();
                collector.forget(resource);
            }
            stays
        });
        collector.learn(&served);
        if !working {
            for (informer, _) in followed.values() {
                informer.synced().await;
            }
            for _ in 0..WORKERS {
                tasks.spawn(Arc::clone(&collector).work());
            }
            working = true;
        }
        tokio::time::sleep(RESOURCES_EVERY).await;
        if tokio::time::Instant::now() >= resync {
            collector.look_again();
            resync = tokio::time::Instant::now() + context.config.resync;
        }
    }
}

impl Collector {
    fn graph(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, served: &[(Resource, Scope, String)]) {
        let key = |(resource, scope, kind): &(Resource, Scope, String)| {
            ((Arc::clone(&resource.group), kind.clone()), (resource.clone(), *scope))
        };
        *self.kinds.lock().unwrap_or_else(PoisonError::into_inner) = served.iter().map(key).collect();
    }

    fn kind(&self, owner: &Owner) -> Option<(Resource, Scope)> {
        let kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        kinds.get(&(Arc::clone(&owner.group), owner.kind.clone())).cloned()
    }

    fn forget(&self, resource: &Resource) {
        let touched = self.graph().remove_resource(resource);
        touched.into_iter().for_each(|uid| self.queue.add(uid));
    }

    fn look_again(&self) {
        let all = self.graph().owned();
        all.into_iter().for_each(|uid| self.queue.add(uid));
    }

    async fn follow(self: Arc<Self>, resource: Resource, informer: Informer) {
        let mut changes = informer.subscribe();
        informer.synced().await;
        self.replace(&resource, &informer.list());
        loop {
            let touched = match changes.next().await {
                Change::Everything => {
                    self.replace(&resource, &informer.list());
                    continue;
                }
                Change::Object { old, new, .. } => {
                    let mut graph = self.graph();
                    let replaced = match (&old, &new) {
                        (Some(old), Some(new)) if old.uid() == new.uid() => Vec::new(),
                        (Some(old), _) => graph.remove(old.uid()),
                        (None, _) => Vec::new(),
                    };
                    let put = new.map(|new| graph.put(&resource, &new)).unwrap_or_default();
                    replaced.into_iter().chain(put).collect::<Vec<_>>()
                }
            };
            touched.into_iter().for_each(|uid| self.queue.add(uid));
        }
    }

    fn replace(&self, resource: &Resource, objects: &[SharedObject]) {
        let mut graph = self.graph();
        let mut touched = graph.remove_absent(resource, objects);
        for object in objects {
            touched.extend(graph.put(resource, object));
        }
        drop(graph);
        touched.into_iter().for_each(|uid| self.queue.add(uid));
    }

    async fn work(self: Arc<Self>) {
        loop {
            let uid = self.queue.next().await;
            let failed = match self.look_at(&uid).await {
                Ok(()) => false,
                Err(error) => {
                    if !is_race(&error) {
                        tracing::warn!(%uid, %error, "garbage collection failed, trying again");
                    }
                    true
                }
            };
            self.queue.done(&uid, failed, None);
        }
    }

    async fn look_at(&self, uid: &Uid) -> StatusResult<()> {
        let Some((resource, namespace, name)) = self.graph().address(uid) else { return Ok(()) };
        let live = match self.context.client.get(&resource, &namespace, &name).await {
            Ok(live) if live.uid() == &**uid => live,
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {
                // Gone; its informer will say so too.
                let touched = self.graph().remove(uid);
                touched.into_iter().for_each(|uid| self.queue.add(uid));
                return Ok(());
            }
        };
        if live.is_deleting() {
            if live.finalizers().contains(&ORPHAN) {
                return self.orphan(&resource, &live).await;
            }
            if live.finalizers().contains(&FOREGROUND) {
                return self.delete_dependents(&resource, &live).await;
            }
            return Ok(());
        }
        self.judge(&resource, &live).await
    }

    /// An object that nobody deletes: are its owners still there?
    async fn judge(&self, resource: &Resource, live: &SharedObject) -> StatusResult<()> {
        let owners = graph::owners(live);
        let (mut solid, mut waiting, mut gone) = (0, Vec::new(), Vec::new());
        for owner in &owners {
            match self.state_of(live, owner).await? {
                OwnerState::There => solid += 1,
                OwnerState::Waiting => waiting.push(owner.uid.to_string()),
                OwnerState::Gone => gone.push(owner.uid.to_string()),
            }
        }
        if owners.is_empty() || (waiting.is_empty() && gone.is_empty()) {
            return Ok(());
        }
        if solid > 0 {
            waiting.append(&mut gone);
            return self.remove_owners(resource, live, &waiting).await;
        }
        let has_dependents = self.graph().has_dependents(live.uid());
        let propagation = if !waiting.is_empty() && has_dependents {
            Propagation::Foreground
        } else if live.finalizers().contains(&ORPHAN) {
            Propagation::Orphan
        } else if live.finalizers().contains(&FOREGROUND) {
            Propagation::Foreground
        } else {
            Propagation::Background
        };
        let options = DeleteOptions { propagation, uid: Some(live.uid().to_owned()), ..Default::default() };
        tracing::debug!(resource = %resource.plural, namespace = live.namespace(), name = live.name(), "collected");
        self.context.client.delete(resource, live.namespace(), live.name(), &options).await.found().map(drop)
    }

    async fn state_of(&self, dependent: &SharedObject, owner: &Owner) -> StatusResult<OwnerState> {
        if let Some(waiting) = self.graph().waits_for_dependents(&owner.uid) {
            return Ok(if waiting { OwnerState::Waiting } else { OwnerState::There });
        }
        // Of a kind nobody serves: it cannot be said to be gone.
        let Some((resource, scope)) = self.kind(owner) else { return Ok(OwnerState::There) };
        let namespace = match (scope, dependent.namespace()) {
            (Scope::Cluster, _) => "",
            (Scope::Namespaced, "") => return Ok(OwnerState::There),
            (Scope::Namespaced, namespace) => namespace,
        };
        match self.context.client.get(&resource, namespace, &owner.name).await {
            Ok(found) if found.uid() == &*owner.uid => {
                let waits = found.is_deleting() && found.finalizers().contains(&FOREGROUND);
                Ok(if waits { OwnerState::Waiting } else { OwnerState::There })
            }
            Ok(_) => Ok(OwnerState::Gone),
            Err(error) if error.is_not_found() => Ok(OwnerState::Gone),
            Err(error) => Err(error),
        }
    }

    /// Foreground deletion: dependents that block go first.
    async fn delete_dependents(&self, resource: &Resource, live: &SharedObject) -> StatusResult<()> {
        let blocking = self.graph().blocking(live.uid());
        if blocking.is_empty() {
            return self.remove_finalizer(resource, live, FOREGROUND).await;
        }
        // One that is being deleted already is looked at when it is gone.
        blocking.into_iter().filter(|(_, deleting)| !deleting).for_each(|(uid, _)| self.queue.add(uid));
        Ok(())
    }

    /// Orphaning deletion: dependents forget their owner, then it may go.
    async fn orphan(&self, resource: &Resource, live: &SharedObject) -> StatusResult<()> {
        let dependents = self.graph().dependents(live.uid());
        for (resource, namespace, name) in dependents {
            let dependent = self.context.client.get(&resource, &namespace, &name).await.found()?;
            let Some(dependent) = dependent else { continue };
            self.remove_owners(&resource, &dependent, &[live.uid().to_owned()]).await?;
        }
        self.remove_finalizer(resource, live, ORPHAN).await
    }

    async fn remove_owners(&self, resource: &Resource, live: &SharedObject, uids: &[String]) -> StatusResult<()> {
        let kept: Vec<_> = crate::objects::list(live, "/metadata/ownerReferences")
            .iter()
            .filter(|owner| !uids.iter().any(|uid| uid == owner.str_at("/uid")))
            .collect();
        self.patch(resource, live, "ownerReferences", json!(kept)).await
    }

    async fn remove_finalizer(&self, resource: &Resource, live: &SharedObject, finalizer: &str) -> StatusResult<()> {
        let kept: Vec<_> = live.finalizers().into_iter().filter(|other| *other != finalizer).collect();
        self.patch(resource, live, "finalizers", json!(kept)).await
    }

    async fn patch(
        &self,
        resource: &Resource,
        live: &SharedObject,
        field: &str,
        value: serde_json::Value,
    ) -> StatusResult<()> {
        let patch = json!({"metadata": {"uid": live.uid(), "resourceVersion": live.resource_version(), field: value}});
        let patched = self.context.client.patch(resource, live.namespace(), live.name(), "", Patch::Merge(patch)).await;
        patched.found().map(drop)
    }
}

enum OwnerState {
    There,
    /// It waits for its dependents to be deleted.
    Waiting,
    Gone,
}
