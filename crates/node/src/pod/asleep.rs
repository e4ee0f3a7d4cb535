//! Pods that sleep (annotation [`ASLEEP`]). What is to be is on disk before it is begun, and what was is on disk until it
//! is undone: a crash in between leaves what can be done again.

use super::plan::Role;
use super::{Sandbox, Worker, limited};
use crate::boundary::BoundaryError;
use crate::events::Level;
use api::object::Meta;
use api::sleep::{ASLEEP, Sleep};
use std::sync::PoisonError;
use std::time::Duration;
use tokio::time::Instant;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// What is known of a pod's sleep.
#[derive(Default)]
pub(super) struct Rest {
    /// It sleeps, or an earlier process was about to make it.
    pub how: Option<Sleep>,
    /// This process has seen to it.
    done: bool,
    retry: Option<Instant>,
    delay: Duration,
}

pub(super) enum Resting {
    Awake,
    Asleep,
    /// The sandbox is no more.
    Lost,
}

impl Rest {
    pub fn of(how: Option<Sleep>) -> Rest {
        Rest { how, ..Rest::default() }
    }
}

impl Worker {
    /// Makes the pod sleep, or wakes it, as its annotation says. Who is to stop is awake for it.
    pub(super) async fn rest(&mut self, sandbox: &Sandbox) -> Resting {
        let wanted = self.object.annotation(ASLEEP).and_then(|text| Sleep::of_pod(text).ok());
        let wanted = wanted.filter(|_| self.must_stop().is_none());
        match (self.rest.how, wanted) {
            (None, None) => {
                self.rest.retry = None;
                Resting::Awake
            }
            (Some(now), wanted) if wanted != Some(now) => self.wake_up(sandbox).await,
            (Some(_), _) if self.rest.done => Resting::Asleep,
            (Some(how), _) => self.fall_asleep(sandbox, how).await,
            (None, Some(how)) => match self.may_rest() {
                true => self.fall_asleep(sandbox, how).await,
                false => Resting::Awake,
            },
        }
    }

    /// All that is to run does, and nothing is under way that standing still would hold up.
    fn may_rest(&mut self) -> bool {
        if let Some(at) = self.rest.retry.filter(|at| *at > Instant::now()) {
            self.wake_at(at);
            return false;
        }
        let mut serving = self.slots.iter().filter(|slot| slot.role != Role::Init);
        !self.dirty && serving.all(|slot| slot.started() && slot.ready && slot.killer.is_none())
    }

    async fn fall_asleep(&mut self, sandbox: &Sandbox, how: Sleep) -> Resting {
        self.note_rest(sandbox, Some(how)).await;
        self.slots.iter_mut().for_each(|slot| slot.probes.clear());
        self.changed = None;
        match limited(sandbox.boundary.sleep(&sandbox.spec, how)).await {
            Ok(()) => {
                self.rest = Rest { how: Some(how), done: true, ..Rest::default() };
                self.dirty = false;
                self.event(Level::Normal, "Sleeping", format!("The pod sleeps, {}", how.word()));
                Resting::Asleep
            }
            Err(BoundaryError::NoSandbox(_)) => Resting::Lost,
            Err(error) => {
                tracing::warn!(pod = self.object.name(), "cannot sleep: {error}");
                self.event(Level::Warning, "FailedSleep", error.to_string());
                let delay = (self.rest.delay * 2).clamp(FIRST_RETRY, MAX_RETRY);
                let never = matches!(error, BoundaryError::Unsupported { .. });
                let at = Instant::now() + if never { MAX_RETRY } else { delay };
                match self.wake_up(sandbox).await {
                    Resting::Awake => {
                        self.rest.delay = delay;
                        self.rest.retry = Some(at);
                        self.wake_at(at);
                        Resting::Awake
                    }
                    other => other,
                }
            }
        }
    }

    /// What cannot go on begins anew.
    async fn wake_up(&mut self, sandbox: &Sandbox) -> Resting {
        let woken = limited(sandbox.boundary.wake(&sandbox.spec)).await;
        self.dirty = true;
        match woken {
            Ok(()) => {
                self.note_rest(sandbox, None).await;
                self.rest = Rest::default();
                Resting::Awake
            }
            Err(error) => {
                if !matches!(error, BoundaryError::NoSandbox(_)) {
                    tracing::warn!(pod = self.object.name(), "cannot wake up, it begins anew: {error}");
                    self.event(Level::Warning, "FailedWake", format!("{error}; the pod begins anew"));
                }
                Resting::Lost
            }
        }
    }

    async fn note_rest(&self, sandbox: &Sandbox, how: Option<Sleep>) {
        let changed = {
            let mut record = sandbox.record.lock().unwrap_or_else(PoisonError::into_inner);
            if record.asleep == how {
                return;
            }
            record.asleep = how;
            record.clone()
        };
        let dir = self.dir.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || changed.write(&dir)).await {
            tracing::warn!("{}", crate::volumes::chain(&error));
        }
    }
}
