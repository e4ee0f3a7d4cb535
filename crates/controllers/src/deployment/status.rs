//! A Deployment's status: counts, `Available`, and `Progressing` with its deadline.

use super::sets::{has_deadline, progressing};
use super::{Deployments, Round, available, failure_of, total};
use crate::context::{Condition, DEPLOYMENTS, remove_condition};
use crate::objects::{condition, int};
use crate::runner::Again;
use api::object::{Meta, SharedObject, object_of};
use api::status::StatusResult;
use serde_json::{Value, json};
use std::time::Duration;

const AVAILABLE_NEW: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// All pods are of the newest version and available.
pub(super) fn is_complete(round: &Round) -> bool {
    let count = |name: &str| int(&round.status, name).unwrap_or(0);
    let wanted = round.size.replicas;
    count("/updatedReplicas") == wanted
        && count("/replicas") == wanted
        && count("/availableReplicas") == wanted
        && count("/observedGeneration") >= round.deployment.generation()
}

impl Deployments {
    /// As Kubernetes does: nothing changes while status and reason stay the same.
    pub(super) fn set_condition(&self, round: &mut Round, new: Condition<'_>) {
        let now = self.context.timestamp();
        let unchanged = condition(&round.status, new.kind)
            .is_some_and(|old| old.str_at("/status") == new.status && old.str_at("/reason") == new.reason);
        if !unchanged {
            crate::context::set_condition(&mut round.status, new, &now, &[("lastUpdateTime", json!(now))]);
        }
    }

    /// Counts and `Available`, written.
    pub(super) async fn tell(&self, round: &mut Round, current: Option<&SharedObject>) -> StatusResult<()> {
        self.count(round, current);
        self.write(round).await
    }

    pub(super) async fn write(&self, round: &Round) -> StatusResult<()> {
        self.context.write_status(&DEPLOYMENTS, &round.deployment, round.status.clone()).await
    }

    fn count(&self, round: &mut Round, current: Option<&SharedObject>) {
        let sum = |name: &str| round.sets.iter().filter_map(|set| int(set, name)).sum::<i64>();
        let can = round.sets.iter().map(|set| available(set)).sum::<i64>();
        let counts = [
            ("replicas", sum("/status/replicas")),
            ("updatedReplicas", current.and_then(|set| int(set, "/status/replicas")).unwrap_or(0)),
            ("readyReplicas", sum("/status/readyReplicas")),
            ("availableReplicas", can),
            ("unavailableReplicas", (total(&round.sets) - can).max(0)),
        ];
        let generation = round.deployment.generation();
        let fields = object_of(&mut round.status);
        for (name, number) in counts {
            if number == 0 {
                fields.remove(name);
            } else {
                fields.insert(name.into(), number.into());
            }
        }
        fields.insert("observedGeneration".into(), generation.into());
        let enough = can >= round.size.least_available();
        let new = match enough {
            true => Condition {
                kind: "Available",
                status: "True",
                reason: "MinimumReplicasAvailable",
                message: "Deployment has minimum availability.",
            },
            false => Condition {
                kind: "Available",
                status: "False",
                reason: "MinimumReplicasUnavailable",
                message: "Deployment does not have minimum availability.",
            },
        };
        self.set_condition(round, new);
    }

    /// Counts and all conditions of a rollout. Returns when its deadline has to be looked at.
    pub(super) fn progress(&self, round: &mut Round, current: Option<&SharedObject>) -> Again {
        let before = round.deployment.get("status").cloned().unwrap_or(Value::Null);
        self.count(round, current);
        let subject = match current {
            Some(set) => format!("ReplicaSet \"{}\"", set.name()),
            None => format!("Deployment \"{}\"", round.deployment.name()),
        };
        if has_deadline(&round.deployment) {
            self.judge_progress(round, &before, &subject);
        } else {
            remove_condition(&mut round.status, "Progressing");
        }
        let failure = failure_of(current, &round.sets).cloned();
        match failure {
            Some(failure) => {
                let (reason, message) = (failure.str_at("/reason"), failure.str_at("/message"));
                self.set_condition(round, Condition { kind: "ReplicaFailure", status: "True", reason, message });
            }
            None => remove_condition(&mut round.status, "ReplicaFailure"),
        }
        self.until_deadline(round)
    }

    fn judge_progress(&self, round: &mut Round, before: &Value, subject: &str) {
        let count = |status: &Value, name: &str| int(status, name).unwrap_or(0);
        let known = condition(&round.status, "Progressing").cloned();
        let reason = known.as_ref().map_or("", |known| known.str_at("/reason"));
        let settled = count(&round.status, "/replicas") == count(&round.status, "/updatedReplicas");
        if settled && reason == AVAILABLE_NEW {
            return;
        }
        let old = |status: &Value| count(status, "/replicas") - count(status, "/updatedReplicas");
        let moved = ["/updatedReplicas", "/readyReplicas", "/availableReplicas"]
            .iter()
            .any(|name| count(&round.status, name) > count(before, name))
            || old(&round.status) < old(before);
        if is_complete(round) {
            let message = format!("{subject} has successfully progressed.");
            self.set_condition(round, progressing("True", AVAILABLE_NEW, &message));
        } else if moved {
            let message = format!("{subject} is progressing.");
            let now = self.context.timestamp();
            let new = progressing("True", "ReplicaSetUpdated", &message);
            // Every step counts: the deadline runs from `lastUpdateTime`.
            crate::context::set_condition(&mut round.status, new, &now, &[("lastUpdateTime", json!(now))]);
        } else if reason != AVAILABLE_NEW && (reason == TIMED_OUT || self.left(round).is_some_and(|left| left < 0)) {
            let message = format!("{subject} has timed out progressing.");
            self.set_condition(round, progressing("False", TIMED_OUT, &message));
        }
    }

    /// Seconds until the deadline, negative after it.
    fn left(&self, round: &Round) -> Option<i64> {
        let seconds = int(&round.deployment, "/spec/progressDeadlineSeconds")?;
        let since = api::time::parse(condition(&round.status, "Progressing")?.str_at("/lastUpdateTime"))?;
        Some(since + seconds - self.context.now())
    }

    fn until_deadline(&self, round: &Round) -> Again {
        let reason = condition(&round.status, "Progressing")?.str_at("/reason");
        if !has_deadline(&round.deployment) || is_complete(round) || reason == TIMED_OUT {
            return None;
        }
        let left = self.left(round)?.max(0);
        Some(Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1))
    }
}
