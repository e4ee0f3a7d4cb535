//! How long the store keeps what was: history older than five minutes goes, but never the newest thousand revisions.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use store::{Revision, Store};

const KEEP: Duration = Duration::from_secs(300);
const KEEP_REVISIONS: Revision = 1000;
const EVERY: Duration = Duration::from_secs(60);

/// Compacts until it is dropped.
pub async fn run(store: Arc<dyn Store>) {
    let mut marks = Marks::default();
    loop {
        tokio::time::sleep(EVERY).await;
        let now = match store.revision().await {
            Ok(now) => now,
            Err(store::Error::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "compaction: read revision");
                continue;
            }
        };
        if let Some(revision) = marks.tick(now) {
            match store.compact(revision).await {
                Ok(()) | Err(store::Error::Compacted { .. }) => tracing::debug!(revision, "history compacted"),
                Err(error) => tracing::warn!(%error, revision, "compaction"),
            }
        }
    }
}

/// Which revision was newest, how long ago.
#[derive(Default)]
struct Marks {
    seen: VecDeque<Revision>,
    done: Revision,
}

impl Marks {
    /// One interval has passed and the store is at `now`: the revision to compact to, if that is further than before.
    fn tick(&mut self, now: Revision) -> Option<Revision> {
        self.seen.push_back(now);
        let kept = (KEEP.as_secs() / EVERY.as_secs()) as usize;
        if self.seen.len() <= kept {
            return None;
        }
        let old = self.seen.pop_front()?;
        let to = old.min(now - KEEP_REVISIONS);
        if to <= self.done.max(1) {
            return None;
        }
        self.done = to;
        Some(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_minutes_and_a_thousand_revisions_stay() {
        let mut marks = Marks::default();
        let ticks: Vec<_> = (0..8).map(|n| marks.tick(2000 + n * 500)).collect();
        assert_eq!(ticks, [None, None, None, None, None, Some(2000), Some(2500), Some(3000)]);
        let mut quiet = Marks::default();
        assert!((0..100).all(|_| quiet.tick(500).is_none()), "less than a thousand revisions");
    }
}
