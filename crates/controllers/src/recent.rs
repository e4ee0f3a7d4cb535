//! What a reconciler did a moment ago and its informer may not show yet. Without it, a reconciler called again at once
//! would make the same pod twice or end two pods for one. Where the cache is behind, the API itself is asked: exact, and
//! only in that short time.

use crate::context::{Context, PODS};
use crate::runner::is_race;
use api::informer::{Informer, Key};
use api::object::{Meta, SharedObject};
use api::status::StatusResult;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

#[derive(Default)]
struct Done {
    /// Pods made: name and uid.
    created: Vec<(String, String)>,
    /// Uids of pods whose deletion was asked for, with their names.
    deleted: Vec<(String, String)>,
}

/// By the key of the owner.
#[derive(Default)]
pub(crate) struct Recent {
    done: Mutex<HashMap<Key, Done>>,
}

impl Recent {
    fn with<T>(&self, change: impl FnOnce(&mut HashMap<Key, Done>) -> T) -> T {
        change(&mut self.done.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn created(&self, owner: &Key, pod: &SharedObject) {
        self.with(|done| {
            done.entry(owner.clone()).or_default().created.push((pod.name().to_owned(), pod.uid().to_owned()));
        });
    }

    pub fn deleted(&self, owner: &Key, pod: &SharedObject) {
        self.with(|done| {
            done.entry(owner.clone()).or_default().deleted.push((pod.name().to_owned(), pod.uid().to_owned()));
        });
    }

    pub fn forget(&self, owner: &Key) {
        self.with(|done| done.remove(owner));
    }

    /// All pods of the namespace as they are: those of the informer, with what it does not show yet. A pod whose deletion
    /// was asked for is left out until the informer shows that.
    pub async fn pods(&self, context: &Context, pods: &Informer, owner: &Key) -> StatusResult<Vec<SharedObject>> {
        let Some(done) = self.with(|done| done.remove(owner)) else { return Ok(pods.list_in(&owner.namespace)) };
        let mut still = Done::default();
        let mut extra = Vec::new();
        for (name, uid) in done.created {
            if pods.get(&owner.namespace, &name).is_some_and(|pod| pod.uid() == uid) {
                continue;
            }
            match context.client.get(&PODS, &owner.namespace, &name).await {
                Ok(pod) if pod.uid() == uid => {
                    extra.push(pod);
                    still.created.push((name, uid));
                }
                Ok(_) => {}
                Err(error) if is_race(&error) => {}
                Err(error) => {
                    still.created.push((name, uid));
                    self.put_back(owner, still, done.deleted);
                    return Err(error);
                }
            }
        }
        let mut all = pods.list_in(&owner.namespace);
        for pod in extra {
            if !all.iter().any(|known| known.uid() == pod.uid()) {
                all.push(pod);
            }
        }
        let unseen = |(name, uid): &(String, String)| {
            pods.get(&owner.namespace, name).is_some_and(|pod| pod.uid() == uid && !pod.is_deleting())
        };
        let deleted: Vec<_> = done.deleted.into_iter().filter(unseen).collect();
        all.retain(|pod| !deleted.iter().any(|(_, uid)| uid == pod.uid()));
        self.put_back(owner, still, deleted);
        Ok(all)
    }

    fn put_back(&self, owner: &Key, still: Done, deleted: Vec<(String, String)>) {
        if still.created.is_empty() && deleted.is_empty() {
            return;
        }
        self.with(|done| {
            let entry = done.entry(owner.clone()).or_default();
            entry.created.extend(still.created);
            entry.deleted.extend(deleted);
        });
    }
}
