//! The steps of a rollout. Each look does at most one: make room or fill it; the sets' status brings the next look.

use super::{Deployments, Round, available, replicas, total};
use crate::objects::{has_ended, is_controlled_by};
use crate::runner::Again;
use api::object::{Meta, SharedObject};
use api::status::StatusResult;

impl Deployments {
    pub(super) async fn roll(&self, round: &mut Round) -> StatusResult<Again> {
        let Some(current) = self.current(round, true).await? else { return Ok(None) };
        if !self.fill(round, &current).await? {
            self.make_room(round, &current).await?;
        }
        self.conclude(round).await
    }

    pub(super) async fn recreate(&self, round: &mut Round) -> StatusResult<Again> {
        let current = self.current(round, false).await?;
        let others = round.others(current.as_ref());
        let mut shrunk = false;
        for set in others.iter().filter(|set| replicas(set) > 0) {
            shrunk |= self.resize(round, set, 0).await?;
        }
        if shrunk || self.runs_any(&others) {
            return self.conclude(round).await;
        }
        let Some(current) = self.current(round, true).await? else { return Ok(None) };
        if replicas(&current) != round.size.replicas {
            let wanted = round.size.replicas;
            self.resize(round, &current, wanted).await?;
        }
        self.conclude(round).await
    }

    /// Whether pods of these sets are still there.
    fn runs_any(&self, sets: &[SharedObject]) -> bool {
        let Some(namespace) = sets.first().map(|set| set.namespace()) else { return false };
        let theirs = |pod: &SharedObject| sets.iter().any(|set| is_controlled_by(pod, set.uid()));
        self.pods.list_in(namespace).iter().any(|pod| !has_ended(pod) && theirs(pod))
    }

    /// Brings the current set nearer to its size; true if it has changed.
    async fn fill(&self, round: &mut Round, current: &SharedObject) -> StatusResult<bool> {
        let (own, wanted) = (replicas(current), round.size.replicas);
        if own == wanted {
            return Ok(false);
        }
        let to = if own > wanted { wanted } else { round.size.grown(false, total(&round.sets), own) };
        self.resize(round, current, to).await
    }

    /// Takes pods from old sets as far as enough stay available: first those that are not available anyway.
    async fn make_room(&self, round: &mut Round, current: &SharedObject) -> StatusResult<()> {
        let old: Vec<SharedObject> = round.others(Some(current)).into_iter().filter(|set| replicas(set) > 0).collect();
        if old.is_empty() {
            return Ok(());
        }
        let least = round.size.least_available();
        let unavailable_new = replicas(current) - available(current);
        let mut spare = total(&round.sets) - least - unavailable_new;
        for set in &old {
            let useless = (replicas(set) - available(set)).max(0).min(spare);
            if useless > 0 {
                self.resize(round, set, replicas(set) - useless).await?;
                spare -= useless;
            }
        }
        // Sets that were just shrunk still tell of their old pods; what was promised to go is not there to be taken again.
        let mut spare = spare.min(round.sets.iter().map(|set| available(set)).sum::<i64>() - least);
        let shrunk: Vec<SharedObject> = round.others(Some(current));
        for set in shrunk.iter().filter(|set| replicas(set) > 0) {
            let less = replicas(set).min(spare);
            if less > 0 {
                self.resize(round, set, replicas(set) - less).await?;
                spare -= less;
            }
        }
        Ok(())
    }

    async fn conclude(&self, round: &mut Round) -> StatusResult<Again> {
        let current = round.current();
        let again = self.progress(round, current.as_ref());
        if super::status::is_complete(round) {
            self.clean_up(round, current.as_ref()).await?;
        }
        self.write(round).await?;
        Ok(again)
    }
}
