//! The ReplicaSets of a Deployment: the one of the template as it is now, made when missing, and their revisions.

use super::{COMPONENT, DESIRED, Deployments, HASH, MAXIMUM, REVISION, REVISION_HISTORY, Round, plan, revision, total};
use crate::context::{Condition, DEPLOYMENTS, REPLICA_SETS};
use crate::objects::{condition, controller_reference, int, is_controlled_by, joined, map};
use api::client::Patch;
use api::object::{Meta, Object, SharedObject, child};
use api::status::{Reason, StatusResult};
use serde_json::{Value, json};

/// Annotations of the Deployment that its sets do not get.
const OWN_ANNOTATIONS: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAXIMUM,
    "deprecated.deployment.rollback.to",
];
/// Characters of old revisions remembered in an annotation.
const HISTORY_LIMIT: usize = 2000;

impl Deployments {
    /// The set of the current template, with its revision brought up to date; made if missing and `make`.
    pub(super) async fn current(&self, round: &mut Round, make: bool) -> StatusResult<Option<SharedObject>> {
        let current = round.current();
        let others = round.others(current.as_ref());
        let newest = others.iter().map(|set| revision(set)).max().unwrap_or(0) + 1;
        match current {
            Some(set) => self.refresh(round, set, newest).await.map(Some),
            None if make => self.make(round, newest).await.map(Some),
            None => Ok(None),
        }
    }

    async fn refresh(&self, round: &mut Round, set: SharedObject, newest: i64) -> StatusResult<SharedObject> {
        let mut new = (*set).clone();
        copy_annotations(&round.deployment, &mut new);
        let before = revision(&set);
        if before < newest {
            if before > 0 {
                let old = set.annotation(REVISION_HISTORY).unwrap_or("");
                let mut history: Vec<String> = old.split(',').filter(|r| !r.is_empty()).map(str::to_owned).collect();
                history.push(before.to_string());
                while history.iter().map(|r| r.len() + 1).sum::<usize>() > HISTORY_LIMIT {
                    history.remove(0);
                }
                new.set_annotation(REVISION_HISTORY, &history.join(","));
            }
            new.set_annotation(REVISION, &newest.to_string());
        }
        let min_ready = int(&round.deployment, "/spec/minReadySeconds").unwrap_or(0);
        if int(&new, "/spec/minReadySeconds").unwrap_or(0) != min_ready
            && let Some(spec) = new.get_mut("spec").and_then(Value::as_object_mut)
        {
            spec.insert("minReadySeconds".into(), min_ready.into());
        }
        let set = self.context.write(&REPLICA_SETS, &set, new).await?;
        round.put(&set);
        let revision = revision(&set);
        self.set_revision(round, revision).await?;
        if has_deadline(&round.deployment) && condition(&round.status, "Progressing").is_none() {
            let message = format!("Found new replica set \"{}\"", set.name());
            self.set_condition(round, progressing("True", "FoundNewReplicaSet", &message));
        }
        Ok(set)
    }

    async fn make(&self, round: &mut Round, newest: i64) -> StatusResult<SharedObject> {
        let deployment = SharedObject::clone(&round.deployment);
        let template = deployment.pointer("/spec/template").cloned().unwrap_or_else(|| json!({}));
        let collisions = int(&deployment, "/status/collisionCount");
        let hash = plan::hash(&template, collisions);
        let recreate = deployment.str_at("/spec/strategy/type") == "Recreate";
        let replicas = round.size.grown(recreate, total(&round.sets), 0);
        let mut set = new_set(&deployment, template, &hash, replicas);
        copy_annotations(&deployment, &mut set);
        for (key, value) in [(REVISION, newest), (DESIRED, round.size.replicas), (MAXIMUM, round.size.most())] {
            set.set_annotation(key, &value.to_string());
        }
        let name = set.name().to_owned();
        let made = match self.context.client.create(&REPLICA_SETS, deployment.namespace(), set).await {
            Ok(set) => {
                if replicas > 0 {
                    let message = format!("Scaled up replica set {name} from 0 to {replicas}");
                    self.context.events.normal(COMPONENT, &deployment, "ScalingReplicaSet", message);
                }
                set
            }
            Err(error) if error.reason == Reason::AlreadyExists => self.existing(round, &name).await?,
            Err(error) => {
                if has_deadline(&deployment) {
                    let message = format!("Failed to create new replica set \"{name}\": {error}");
                    self.set_condition(round, progressing("False", "ReplicaSetCreateError", &message));
                    let status = round.status.clone();
                    self.context.write_status(&DEPLOYMENTS, &round.deployment, status).await?;
                }
                return Err(error);
            }
        };
        round.put(&made);
        self.set_revision(round, newest).await?;
        if has_deadline(&deployment) {
            let message = format!("Created new replica set \"{name}\"");
            self.set_condition(round, progressing("True", "NewReplicaSetCreated", &message));
        }
        Ok(made)
    }

    /// A set of that name is there: our own, made a moment ago, or a collision of hashes, which changes the next one.
    async fn existing(&self, round: &mut Round, name: &str) -> StatusResult<SharedObject> {
        let deployment = &round.deployment;
        let found = self.context.client.get(&REPLICA_SETS, deployment.namespace(), name).await?;
        let template = |object: &Object| plan::without_hash(object.pointer("/spec/template").unwrap_or(&Value::Null));
        if is_controlled_by(&found, deployment.uid()) && template(&found) == template(deployment) {
            return Ok(found);
        }
        let collisions = int(deployment, "/status/collisionCount").unwrap_or(0) + 1;
        let mut status = deployment.get("status").cloned().unwrap_or_else(|| json!({}));
        api::object::object_of(&mut status).insert("collisionCount".into(), collisions.into());
        self.context.write_status(&DEPLOYMENTS, deployment, status).await?;
        Err(api::Status::already_exists("apps", "replicasets", name))
    }

    /// `kubectl rollout history` reads the Deployment's own revision from its annotation.
    async fn set_revision(&self, round: &mut Round, revision: i64) -> StatusResult<()> {
        let text = revision.to_string();
        if round.deployment.annotation(REVISION) == Some(&text) {
            return Ok(());
        }
        let patch = json!({"metadata": {"uid": round.deployment.uid(),
                           "resourceVersion": round.deployment.resource_version(), "annotations": {REVISION: text}}});
        let (namespace, name) = (round.deployment.namespace(), round.deployment.name());
        round.deployment = self.context.client.patch(&DEPLOYMENTS, namespace, name, "", Patch::Merge(patch)).await?;
        Ok(())
    }
}

pub(super) fn has_deadline(deployment: &Object) -> bool {
    int(deployment, "/spec/progressDeadlineSeconds").is_some_and(|seconds| seconds != i64::from(i32::MAX))
}

pub(super) fn progressing<'a>(status: &'a str, reason: &'a str, message: &'a str) -> Condition<'a> {
    Condition { kind: "Progressing", status, reason, message }
}

fn new_set(deployment: &Object, mut template: Value, hash: &str, replicas: i64) -> Object {
    template.set_label(HASH, hash);
    let mut selector = deployment.pointer("/spec/selector").cloned().unwrap_or_else(|| json!({}));
    child(api::object::object_of(&mut selector), "matchLabels").insert(HASH.into(), hash.into());
    let labels = template.pointer("/metadata/labels").cloned();
    let mut set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {"name": joined(deployment.name(), &format!("-{hash}"), 253), "namespace": deployment.namespace(),
                     "labels": labels,
                     "ownerReferences": [controller_reference(&DEPLOYMENTS, "Deployment", deployment)]},
        "spec": {"replicas": replicas, "selector": selector, "template": template},
    });
    if let Some(seconds) = int(deployment, "/spec/minReadySeconds").filter(|seconds| *seconds > 0)
        && let Some(spec) = set.get_mut("spec").and_then(Value::as_object_mut)
    {
        spec.insert("minReadySeconds".into(), seconds.into());
    }
    set
}

fn copy_annotations(deployment: &Object, set: &mut Object) {
    for (key, value) in map(deployment, "/metadata/annotations") {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            set.set_annotation(key, value.as_str().unwrap_or(""));
        }
    }
}
