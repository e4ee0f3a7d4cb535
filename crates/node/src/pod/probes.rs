//! Probe tasks: one per container and kind, counting successes and failures; they tell the pod's worker only when the
//! verdict changes, and record each failure as an event.

use super::handler::Place;
use super::{Wake, slot::Task};
use crate::events::{About, Level, Recorder};
use api::k8s::api::core::v1::Probe;
use std::time::Duration;
use tokio::sync::mpsc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    pub fn word(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        }
    }
}

/// Counts results against the thresholds.
#[derive(Debug)]
pub(crate) struct Counter {
    successes_needed: u32,
    failures_needed: u32,
    verdict: Option<bool>,
    run: u32,
    last: Option<bool>,
}

impl Counter {
    pub fn new(kind: Kind, probe: &Probe, ready: bool) -> Self {
        let at_least_one =
            |n: Option<i32>, default: u32| n.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default);
        Counter {
            successes_needed: at_least_one(probe.success_threshold, 1),
            failures_needed: at_least_one(probe.failure_threshold, 3),
            // A container is not ready until a probe says so; it lives until one says it does not.
            verdict: match kind {
                Kind::Readiness => Some(ready),
                Kind::Liveness => Some(true),
                Kind::Startup => None,
            },
            run: 0,
            last: None,
        }
    }

    /// The new verdict if this result changes it.
    pub fn add(&mut self, ok: bool) -> Option<bool> {
        self.run = if self.last == Some(ok) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(ok);
        let needed = if ok { self.successes_needed } else { self.failures_needed };
        if self.run < needed || self.verdict == Some(ok) {
            return None;
        }
        self.verdict = Some(ok);
        self.verdict
    }
}

pub(crate) struct Job {
    pub kind: Kind,
    pub slot: usize,
    pub attempt: u32,
    pub probe: Probe,
    pub place: Place,
    pub about: About,
    /// Time the container runs already.
    pub age: Duration,
    /// It was ready when an earlier agent looked.
    pub ready: bool,
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default))
}

pub(crate) fn spawn(job: Job, events: Recorder, wake: mpsc::Sender<Wake>) -> Task {
    Task::spawn(async move {
        let delay = Duration::from_secs(u64::try_from(job.probe.initial_delay_seconds.unwrap_or(0)).unwrap_or(0));
        tokio::time::sleep(delay.saturating_sub(job.age)).await;
        let timeout = seconds(job.probe.timeout_seconds, 1);
        let mut ticks = tokio::time::interval(seconds(job.probe.period_seconds, 10));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut counter = Counter::new(job.kind, &job.probe, job.ready);
        loop {
            ticks.tick().await;
            let result = once(&job, timeout).await;
            if let Err(message) = &result {
                let text = format!("{} probe failed: {message}", job.kind.word());
                events.record(job.about.clone(), Level::Warning, "Unhealthy", text);
            }
            if let Some(ok) = counter.add(result.is_ok()) {
                let message = result.err().unwrap_or_default();
                let verdict = Wake::Probe { slot: job.slot, attempt: job.attempt, kind: job.kind, ok, message };
                if wake.send(verdict).await.is_err() || job.kind == Kind::Startup {
                    return;
                }
            }
        }
    })
}

async fn once(job: &Job, timeout: Duration) -> Result<(), String> {
    let action = job.place.probe(&job.probe)?;
    match tokio::time::timeout(timeout, job.place.run(&action)).await {
        Ok(result) => result,
        Err(_) => Err(match action {
            super::handler::Action::Http(get) => format!(
                "Get \"{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
                get.url()
            ),
            _ => format!("timed out after {timeout:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counter(kind: Kind, success: i32, failure: i32) -> Counter {
        let probe = Probe { success_threshold: Some(success), failure_threshold: Some(failure), ..Default::default() };
        Counter::new(kind, &probe, false)
    }

    #[test]
    fn thresholds() {
        let mut c = counter(Kind::Readiness, 2, 3);
        let verdicts: Vec<_> = [true, false, true, true, true, false, false, true, false, false, false]
            .into_iter()
            .map(|ok| c.add(ok))
            .collect();
        assert_eq!(verdicts, [None, None, None, Some(true), None, None, None, None, None, None, Some(false)]);
        let mut c = counter(Kind::Liveness, 1, 1);
        assert_eq!((c.add(true), c.add(false), c.add(false)), (None, Some(false), None));
        let mut c = counter(Kind::Startup, 1, 2);
        assert_eq!((c.add(false), c.add(true)), (None, Some(true)));
    }

    proptest! {
        #[test]
        fn verdicts_alternate(results in prop::collection::vec(any::<bool>(), 0..200), s in 1..5i32, f in 1..5i32) {
            let mut c = counter(Kind::Readiness, s, f);
            let verdicts: Vec<bool> = results.into_iter().filter_map(|ok| c.add(ok)).collect();
            for (index, verdict) in verdicts.iter().enumerate() {
                prop_assert_eq!(*verdict, index % 2 == 0);
            }
        }
    }
}
