//! Deployments: a ReplicaSet per version of the template, and the steps from one version to the next.
//!
//! `plan` holds the arithmetic (pure), `sets` the ReplicaSets and their revisions, `scale` and `rollout` what is done
//! with them, `status` what is told.

mod plan;
mod rollout;
mod scale;
mod sets;
mod status;
#[cfg(test)]
mod tests;

use crate::claim::Claim;
use crate::context::{Context, DEPLOYMENTS, PODS, REPLICA_SETS};
use crate::objects::{controller_name, controller_reference, flag, int, list};
use crate::runner::{Again, Reconcile, Source};
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject};
use api::selector::Selector;
use api::status::StatusResult;
use async_trait::async_trait;
use plan::Size;
use serde_json::{Value, json};
use std::sync::Arc;

const COMPONENT: &str = "deployment-controller";
const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
const HASH: &str = "pod-template-hash";

pub(crate) struct Deployments {
    context: Arc<Context>,
    deployments: Informer,
    sets: Informer,
    pods: Informer,
}

/// One look at a Deployment: what was read, and the status as it is being made.
struct Round {
    deployment: SharedObject,
    size: Size,
    /// All ReplicaSets that belong to it, oldest first.
    sets: Vec<SharedObject>,
    /// The status to write in the end.
    status: Value,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let informers = &context.informers;
    let (deployments, sets, pods) = (informers.of(&DEPLOYMENTS), informers.of(&REPLICA_SETS), informers.of(&PODS));
    let all = deployments.clone();
    let owner = Source::new(sets.clone(), move |set| match controller_name(set, &DEPLOYMENTS, "Deployment") {
        Some(name) => vec![Key::new(set.namespace(), name)],
        None if set.controller_ref().is_some() => Vec::new(),
        None => selecting(&all, set),
    });
    // Only `Recreate` waits for pods themselves: for the last old one to be gone.
    let (known_sets, known) = (sets.clone(), deployments.clone());
    let gone = Source::new(pods.clone(), move |pod| {
        let set = controller_name(pod, &REPLICA_SETS, "ReplicaSet");
        let set = set.and_then(|name| known_sets.get(pod.namespace(), name));
        let name = set.as_ref().and_then(|set| controller_name(set, &DEPLOYMENTS, "Deployment"));
        let key = name.map(|name| Key::new(pod.namespace(), name));
        let recreates = |key: &Key| known.get_key(key).is_some_and(|d| d.str_at("/spec/strategy/type") == "Recreate");
        key.filter(recreates).into_iter().collect()
    });
    let sources = vec![Source::own(deployments.clone()), owner, gone];
    (Arc::new(Deployments { context: Arc::clone(context), deployments, sets, pods }), sources)
}

fn selecting(deployments: &Informer, set: &Object) -> Vec<Key> {
    let matches = |deployment: &SharedObject| selector(deployment).is_some_and(|s| s.matches_object(set));
    deployments.list_in(set.namespace()).iter().filter(|d| matches(d)).map(Key::of).collect()
}

fn selector(deployment: &Object) -> Option<Selector> {
    let selector = Selector::from_object(deployment.pointer("/spec/selector").unwrap_or(&Value::Null)).ok()?;
    (!selector.is_everything()).then_some(selector)
}

#[async_trait]
impl Reconcile for Deployments {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(deployment) = self.deployments.get_key(key) else { return Ok(None) };
        let Some(selector) = selector(&deployment) else {
            let message = "This deployment is selecting all pods. A non-empty selector is required.".to_owned();
            self.context.events.warning(COMPONENT, &deployment, "SelectingAll", message);
            return Ok(None);
        };
        let claim = Claim {
            owner_resource: &DEPLOYMENTS,
            owner: &deployment,
            reference: controller_reference(&DEPLOYMENTS, "Deployment", &deployment),
            selector: &selector,
            resource: &REPLICA_SETS,
        };
        let mut sets = claim.of(&self.context, self.sets.list_in(&key.namespace)).await?;
        crate::objects::by_age(&mut sets);
        let status = deployment.get("status").cloned().unwrap_or_else(|| json!({}));
        let mut round = Round { size: Size::of(&deployment), deployment, sets, status };
        if round.deployment.is_deleting() {
            let current = round.current();
            return self.tell(&mut round, current.as_ref()).await.map(|()| None);
        }
        self.note_pause(&mut round);
        if flag(&round.deployment, "/spec/paused") || round.is_being_scaled() {
            return self.sync(&mut round).await;
        }
        match round.deployment.str_at("/spec/strategy/type") {
            "Recreate" => self.recreate(&mut round).await,
            _ => self.roll(&mut round).await,
        }
    }
}

impl Round {
    /// The ReplicaSet of the template as it is now: the oldest that has it.
    fn current(&self) -> Option<SharedObject> {
        let template = plan::without_hash(self.deployment.pointer("/spec/template").unwrap_or(&Value::Null));
        let same =
            |set: &&SharedObject| plan::without_hash(set.pointer("/spec/template").unwrap_or(&Value::Null)) == template;
        self.sets.iter().find(same).cloned()
    }

    /// All but `current`, oldest first.
    fn others(&self, current: Option<&SharedObject>) -> Vec<SharedObject> {
        let not_current = |set: &&SharedObject| current.is_none_or(|current| current.uid() != set.uid());
        self.sets.iter().filter(not_current).cloned().collect()
    }

    /// `spec.replicas` has changed since the sets were sized.
    fn is_being_scaled(&self) -> bool {
        let differs = |set: &SharedObject| {
            let desired = set.annotation(DESIRED).and_then(|text| text.parse::<i64>().ok());
            desired.is_some_and(|desired| desired != self.size.replicas)
        };
        self.sets.iter().filter(|set| replicas(set) > 0).any(differs)
    }

    /// Takes over a set as it was written.
    fn put(&mut self, set: &SharedObject) {
        match self.sets.iter_mut().find(|known| known.uid() == set.uid()) {
            Some(known) => *known = Arc::clone(set),
            None => self.sets.push(Arc::clone(set)),
        }
    }
}

/// Wanted pods of a set.
fn replicas(set: &Object) -> i64 {
    int(set, "/spec/replicas").unwrap_or(1).max(0)
}

fn total(sets: &[SharedObject]) -> i64 {
    sets.iter().map(|set| replicas(set)).sum()
}

fn available(set: &Object) -> i64 {
    int(set, "/status/availableReplicas").unwrap_or(0)
}

fn revision(object: &Object) -> i64 {
    object.annotation(REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Failures of the sets, newest version first.
fn failure_of<'a>(current: Option<&'a SharedObject>, others: &'a [SharedObject]) -> Option<&'a Value> {
    let of = |set: &'a SharedObject| {
        list(set, "/status/conditions").iter().find(|condition| condition.str_at("/type") == "ReplicaFailure")
    };
    current.and_then(of).or_else(|| others.iter().find_map(of))
}
