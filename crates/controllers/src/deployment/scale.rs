//! Sizing sets: the step itself, and what happens when a Deployment is scaled or paused.

use super::{COMPONENT, DESIRED, Deployments, MAXIMUM, Round, available, plan, replicas};
use crate::context::{REPLICA_SETS, remove_condition};
use crate::objects::{by_age, flag, int};
use crate::runner::Again;
use api::client::DeleteOptions;
use api::object::{Meta, SharedObject, child, object_of};
use api::status::{Found, StatusResult};
use std::cmp::Reverse;

impl Deployments {
    /// Paused, or `spec.replicas` has changed: sets are sized, but nothing is rolled out.
    pub(super) async fn sync(&self, round: &mut Round) -> StatusResult<Again> {
        let current = self.current(round, false).await?;
        self.scale(round, current.as_ref()).await?;
        if flag(&round.deployment, "/spec/paused") {
            let current = round.current();
            self.clean_up(round, current.as_ref()).await?;
        }
        let current = round.current();
        self.tell(round, current.as_ref()).await?;
        Ok(None)
    }

    /// Sizes one set; true if its size has changed.
    pub(super) async fn resize(&self, round: &mut Round, set: &SharedObject, to: i64) -> StatusResult<bool> {
        let from = replicas(set);
        let mut new = (**set).clone();
        child(object_of(&mut new), "spec").insert("replicas".into(), to.into());
        new.set_annotation(DESIRED, &round.size.replicas.to_string());
        new.set_annotation(MAXIMUM, &round.size.most().to_string());
        let written = self.context.write(&REPLICA_SETS, set, new).await?;
        round.put(&written);
        if from == to {
            return Ok(false);
        }
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {} from {from} to {to}", set.name());
        self.context.events.normal(COMPONENT, &round.deployment, "ScalingReplicaSet", message);
        Ok(true)
    }

    async fn scale(&self, round: &mut Round, current: Option<&SharedObject>) -> StatusResult<()> {
        let wanted = round.size.replicas;
        let others = round.others(current);
        let active: Vec<SharedObject> = round.sets.iter().filter(|set| replicas(set) > 0).cloned().collect();
        let only = match &active[..] {
            [] => current.cloned().or_else(|| others.last().cloned()),
            [one] => Some(one.clone()),
            _ => None,
        };
        if let Some(only) = only {
            self.resize(round, &only, wanted).await?;
            return Ok(());
        }
        if current.is_some_and(|set| is_saturated(set, wanted)) {
            for set in others.iter().filter(|set| replicas(set) > 0) {
                self.resize(round, set, 0).await?;
            }
            return Ok(());
        }
        if round.deployment.str_at("/spec/strategy/type") != "Recreate" {
            self.scale_in_proportion(round, active).await?;
        }
        Ok(())
    }

    async fn scale_in_proportion(&self, round: &mut Round, mut active: Vec<SharedObject>) -> StatusResult<()> {
        by_age(&mut active);
        let sum: i64 = active.iter().map(|set| replicas(set)).sum();
        if round.size.most() > sum {
            // The largest first, of equals the newest: that is the one that is to stay.
            active.reverse();
        }
        active.sort_by_key(|set| Reverse(replicas(set)));
        let now = int(&round.deployment, "/status/replicas").unwrap_or(0);
        let most_before = |set: &SharedObject| {
            let told = set.annotation(MAXIMUM).and_then(|text| text.parse::<i64>().ok()).filter(|most| *most != 0);
            told.unwrap_or(now)
        };
        let shares: Vec<plan::Share> =
            active.iter().map(|set| plan::Share { replicas: replicas(set), most_before: most_before(set) }).collect();
        for (set, size) in active.iter().zip(plan::shared_out(round.size, &shares)) {
            self.resize(round, set, size).await?;
        }
        Ok(())
    }

    /// Deletes old sets beyond `revisionHistoryLimit`.
    pub(super) async fn clean_up(&self, round: &mut Round, current: Option<&SharedObject>) -> StatusResult<()> {
        let Some(limit) = int(&round.deployment, "/spec/revisionHistoryLimit") else { return Ok(()) };
        let mut old: Vec<SharedObject> = round.others(current).into_iter().filter(|set| !set.is_deleting()).collect();
        let Some(surplus) = old.len().checked_sub(usize::try_from(limit).unwrap_or(0)) else { return Ok(()) };
        old.sort_by_key(|set| super::revision(set));
        for set in old.iter().take(surplus) {
            let busy = int(set, "/status/replicas").unwrap_or(0) != 0
                || replicas(set) != 0
                || set.generation() > int(set, "/status/observedGeneration").unwrap_or(0);
            if busy {
                continue;
            }
            let options = DeleteOptions { uid: Some(set.uid().to_owned()), ..Default::default() };
            let deleted = self.context.client.delete(&REPLICA_SETS, set.namespace(), set.name(), &options).await;
            if deleted.found()?.is_some() {
                round.sets.retain(|known| known.uid() != set.uid());
            }
        }
        Ok(())
    }

    /// Pausing stops the progress clock, resuming starts it again.
    pub(super) fn note_pause(&self, round: &mut Round) {
        if !super::sets::has_deadline(&round.deployment) {
            return remove_condition(&mut round.status, "Progressing");
        }
        let progress = crate::objects::condition(&round.status, "Progressing");
        let reason = progress.map_or("", |condition| condition.str_at("/reason")).to_owned();
        if reason == "ProgressDeadlineExceeded" {
            return;
        }
        let was_paused = reason == "DeploymentPaused";
        if flag(&round.deployment, "/spec/paused") && !was_paused {
            self.set_condition(round, super::sets::progressing("Unknown", "DeploymentPaused", "Deployment is paused"));
        } else if !flag(&round.deployment, "/spec/paused") && was_paused {
            let resumed = super::sets::progressing("Unknown", "DeploymentResumed", "Deployment is resumed");
            self.set_condition(round, resumed);
        }
    }
}

fn is_saturated(set: &SharedObject, wanted: i64) -> bool {
    let desired = set.annotation(DESIRED).and_then(|text| text.parse().ok());
    replicas(set) == wanted && desired == Some(wanted) && available(set) == wanted
}
