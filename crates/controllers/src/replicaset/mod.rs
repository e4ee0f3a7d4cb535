//! ReplicaSets: keep the wanted number of pods of one template.

mod ranking;
#[cfg(test)]
mod tests;

use crate::claim::Claim;
use crate::context::{Condition, Context, PODS, REPLICA_SETS, remove_condition, set_condition};
use crate::objects::{
    condition, controller_name, controller_reference, int, is_active, is_available, is_ready, pod_from_template,
    ready_since,
};
use crate::recent::Recent;
use crate::runner::{Again, Reconcile, Source, is_race};
use api::client::DeleteOptions;
use api::informer::{Informer, Key};
use api::object::{Meta, Object, SharedObject, object_of};
use api::selector::Selector;
use api::status::StatusResult;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const COMPONENT: &str = "replicaset-controller";
/// Pods made or ended in one go.
const BURST: usize = 500;

pub(crate) struct ReplicaSets {
    context: Arc<Context>,
    sets: Informer,
    pods: Informer,
    recent: Recent,
}

/// What went wrong while making or ending pods.
struct Failure {
    reason: &'static str,
    message: String,
}

pub(crate) fn new(context: &Arc<Context>) -> (Arc<dyn Reconcile>, Vec<Source>) {
    let (sets, pods) = (context.informers.of(&REPLICA_SETS), context.informers.of(&PODS));
    let all = sets.clone();
    let owner = Source::new(pods.clone(), move |pod| match controller_name(pod, &REPLICA_SETS, "ReplicaSet") {
        Some(name) => vec![Key::new(pod.namespace(), name)],
        None if pod.controller_ref().is_some() => Vec::new(),
        None => selecting(&all, pod),
    });
    let sources = vec![Source::own(sets.clone()), owner];
    (Arc::new(ReplicaSets { context: Arc::clone(context), sets, pods, recent: Recent::default() }), sources)
}

/// The sets whose selector matches a pod without a controller.
fn selecting(sets: &Informer, pod: &Object) -> Vec<Key> {
    let matches = |set: &SharedObject| selector(set).is_some_and(|selector| selector.matches_object(pod));
    sets.list_in(pod.namespace()).iter().filter(|set| matches(set)).map(Key::of).collect()
}

fn selector(set: &Object) -> Option<Selector> {
    let selector = Selector::from_object(set.pointer("/spec/selector").unwrap_or(&Value::Null)).ok()?;
    (!selector.is_everything()).then_some(selector)
}

#[async_trait]
impl Reconcile for ReplicaSets {
    fn name(&self) -> &'static str {
        COMPONENT
    }

    async fn reconcile(&self, key: &Key) -> StatusResult<Again> {
        let Some(set) = self.sets.get_key(key) else {
            self.recent.forget(key);
            return Ok(None);
        };
        let Some(selector) = selector(&set) else { return Ok(None) };
        let all = self.recent.pods(&self.context, &self.pods, key).await?;
        let active = all.iter().filter(|pod| is_active(pod)).cloned().collect();
        let claim = Claim {
            owner_resource: &REPLICA_SETS,
            owner: &set,
            reference: controller_reference(&REPLICA_SETS, "ReplicaSet", &set),
            selector: &selector,
            resource: &PODS,
        };
        let mut pods = claim.of(&self.context, active).await?;
        let failure = if set.is_deleting() { None } else { self.manage(key, &set, &mut pods, &all).await? };
        let status = self.status(&set, &pods, failure.as_ref());
        self.context.write_status(&REPLICA_SETS, &set, status).await?;
        if let Some(failure) = failure {
            return Err(api::Status::internal(failure.message));
        }
        Ok(self.until_available(&set, &pods))
    }
}

impl ReplicaSets {
    async fn manage(
        &self,
        key: &Key,
        set: &SharedObject,
        pods: &mut Vec<SharedObject>,
        all: &[SharedObject],
    ) -> StatusResult<Option<Failure>> {
        let wanted = usize::try_from(int(set, "/spec/replicas").unwrap_or(1)).unwrap_or(0);
        if pods.len() < wanted {
            return self.create(key, set, pods, (wanted - pods.len()).min(BURST)).await;
        }
        let surplus = (pods.len() - wanted).min(BURST);
        if surplus == 0 {
            return Ok(None);
        }
        let doomed = ranking::first_to_go(pods, &self.related(set, all), self.context.now(), surplus);
        let mut failed = None;
        for pod in doomed {
            let options = DeleteOptions { uid: Some(pod.uid().to_owned()), ..Default::default() };
            match self.context.client.delete(&PODS, pod.namespace(), pod.name(), &options).await {
                Ok(()) => {
                    self.recent.deleted(key, &pod);
                    pods.retain(|other| other.uid() != pod.uid());
                    let message = format!("Deleted pod: {}", pod.name());
                    self.context.events.normal(COMPONENT, set, "SuccessfulDelete", message);
                }
                Err(error) if is_race(&error) => pods.retain(|other| other.uid() != pod.uid()),
                Err(error) => {
                    let message = format!("Error deleting: {error}");
                    self.context.events.warning(COMPONENT, set, "FailedDelete", message);
                    failed = Some(Failure { reason: "FailedDelete", message: error.to_string() });
                }
            }
        }
        Ok(failed)
    }

    /// One at first, then twice as many each time, so that what cannot be made is not tried hundreds of times.
    async fn create(
        &self,
        key: &Key,
        set: &SharedObject,
        pods: &mut Vec<SharedObject>,
        missing: usize,
    ) -> StatusResult<Option<Failure>> {
        let template = set.pointer("/spec/template").unwrap_or(&Value::Null);
        let (mut left, mut batch) = (missing, 1);
        while left > 0 {
            let size = batch.min(left);
            let made = (0..size).map(|_| {
                let mut pod = pod_from_template(template);
                let metadata = pod.metadata_mut();
                metadata.insert("generateName".into(), format!("{}-", set.name()).into());
                let owner = controller_reference(&REPLICA_SETS, "ReplicaSet", set);
                metadata.insert("ownerReferences".into(), json!([owner]));
                self.context.client.create(&PODS, set.namespace(), pod)
            });
            for made in futures_util::future::join_all(made).await {
                match made {
                    Ok(pod) => {
                        self.recent.created(key, &pod);
                        let message = format!("Created pod: {}", pod.name());
                        self.context.events.normal(COMPONENT, set, "SuccessfulCreate", message);
                        pods.push(pod);
                    }
                    Err(error) => {
                        let message = format!("Error creating: {error}");
                        self.context.events.warning(COMPONENT, set, "FailedCreate", message);
                        return Ok(Some(Failure { reason: "FailedCreate", message: error.to_string() }));
                    }
                }
            }
            left -= size;
            batch *= 2;
        }
        Ok(None)
    }

    /// Pods of all sets of the same controller: of two pods on one node, one goes first.
    fn related(&self, set: &SharedObject, all: &[SharedObject]) -> Vec<SharedObject> {
        let Some(owner) = set.controller_ref() else {
            return all.iter().filter(|pod| is_active(pod)).cloned().collect();
        };
        let owner = owner.str_at("/uid");
        let siblings: Vec<String> = self
            .sets
            .list_in(set.namespace())
            .iter()
            .filter(|other| other.controller_ref().is_some_and(|other| other.str_at("/uid") == owner))
            .map(|other| other.uid().to_owned())
            .collect();
        let related = |pod: &&SharedObject| {
            let controller = pod.controller_ref().map_or("", |owner| owner.str_at("/uid"));
            is_active(pod) && siblings.iter().any(|uid| uid == controller)
        };
        all.iter().filter(related).cloned().collect()
    }

    fn status(&self, set: &SharedObject, pods: &[SharedObject], failure: Option<&Failure>) -> Value {
        let template = set.pointer("/spec/template/metadata/labels").unwrap_or(&Value::Null);
        let labels = Selector::from_map(template).unwrap_or_else(|_| Selector::nothing());
        let min_ready = int(set, "/spec/minReadySeconds").unwrap_or(0);
        let now = self.context.now();
        let count = |test: &dyn Fn(&SharedObject) -> bool| pods.iter().filter(|pod| test(pod)).count();
        let mut status = set.get("status").cloned().unwrap_or_else(|| json!({}));
        let fields = object_of(&mut status);
        for (name, number) in [
            ("replicas", pods.len()),
            ("fullyLabeledReplicas", count(&|pod| labels.matches_object(pod))),
            ("readyReplicas", count(&|pod| is_ready(pod))),
            ("availableReplicas", count(&|pod| is_available(pod, min_ready, now))),
        ] {
            // As Kubernetes writes it: a zero is left out, but for `replicas`.
            if number == 0 && name != "replicas" {
                fields.remove(name);
            } else {
                fields.insert(name.into(), number.into());
            }
        }
        fields.insert("observedGeneration".into(), set.generation().into());
        match failure {
            Some(failure) => {
                let new = Condition {
                    kind: "ReplicaFailure",
                    status: "True",
                    reason: failure.reason,
                    message: &failure.message,
                };
                if condition(&status, "ReplicaFailure").is_none() {
                    set_condition(&mut status, new, &self.context.timestamp(), &[]);
                }
            }
            None => {
                remove_condition(&mut status, "ReplicaFailure");
                let fields = object_of(&mut status);
                if fields.get("conditions").and_then(Value::as_array).is_some_and(Vec::is_empty) {
                    fields.remove("conditions");
                }
            }
        }
        status
    }

    /// When the next ready pod will have been ready for `minReadySeconds`.
    fn until_available(&self, set: &SharedObject, pods: &[SharedObject]) -> Again {
        let min_ready = int(set, "/spec/minReadySeconds").filter(|seconds| *seconds > 0)?;
        let now = self.context.now();
        let left = |pod: &SharedObject| Some(ready_since(pod)? + min_ready - now).filter(|left| *left > 0);
        let soonest = pods.iter().filter_map(left).min()?;
        Some(Duration::from_secs(u64::try_from(soonest).unwrap_or(1)))
    }
}
