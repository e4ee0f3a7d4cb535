//! What the boundary knows of a pod's containers, brought into its slots.

use super::slot::{self, State};
use super::{Role, Sandbox, Worker, limited};
use crate::boundary::{BoundaryError, ContainerState, Phase};
use api::object::Meta;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

impl Worker {
    /// Reads what the boundary knows; `false` if the sandbox is no more.
    pub(super) async fn refresh(&mut self, sandbox: &Sandbox) -> bool {
        let listed = match limited(sandbox.boundary.list(&sandbox.spec)).await {
            Ok(listed) => listed,
            Err(BoundaryError::NoSandbox(_)) => return false,
            Err(error) => {
                tracing::warn!(pod = self.object.name(), "cannot list containers, trying again: {error}");
                self.wake_at(Instant::now() + Duration::from_secs(1));
                return true;
            }
        };
        self.dirty = false;
        for state in &listed {
            let Some(index) = self.slots.iter().position(|s| s.name == state.name) else { continue };
            self.observe(sandbox, index, state).await;
        }
        for index in 0..self.slots.len() {
            let missing =
                self.slots.get(index).is_some_and(|s| s.is_running() && !listed.iter().any(|l| l.name == s.name));
            if missing {
                self.lose(index);
            }
        }
        let (boundary, spec) = (sandbox.boundary.clone(), sandbox.spec.clone());
        self.changed = Some(Mutex::new(Box::pin(async move { boundary.changed(&spec).await })));
        true
    }

    /// Brings one slot up to what the boundary says.
    async fn observe(&mut self, sandbox: &Sandbox, index: usize, state: &ContainerState) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        match slot::ended(state) {
            None => {
                let Phase::Running { started } = state.phase else { return };
                let known = slot.is_running() && slot.attempt == state.attempt;
                if !known {
                    let was_up = slot.startup_done;
                    slot.begin(state.attempt, started);
                    slot.startup_done = was_up;
                    self.after_start(sandbox, index, false);
                } else if slot.probes.is_empty() && slot.killer.is_none() && !slot.hook_pending {
                    // Adopted: its probes have to be taken up again.
                    if let State::Running { started: at } = &mut slot.state {
                        *at = started;
                    }
                    self.start_probes(sandbox, index);
                }
            }
            Some(mut ended) => {
                let known = match slot.latest_end() {
                    Some(known) => known.attempt == ended.attempt && !slot.is_running(),
                    None => false,
                };
                if known || slot.attempt > ended.attempt {
                    return;
                }
                self.read_message(index, &mut ended).await;
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.end(ended, Instant::now());
                }
            }
        }
    }

    /// A container that should run and is not there.
    pub(super) fn lose(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let State::Running { started } = slot.state else { return };
        let ended = slot::Ended {
            attempt: slot.attempt,
            code: 137,
            signal: None,
            reason: "ContainerStatusUnknown".into(),
            message: "The container could not be located when the pod was looked at".into(),
            started,
            finished: api::time::now_micros().saturating_mul(1000),
        };
        slot.end(ended, Instant::now());
    }

    pub(super) fn lose_running(&mut self) {
        for index in 0..self.slots.len() {
            self.lose(index);
        }
        for slot in self.slots.iter_mut().filter(|s| s.begun) {
            slot.earlier = true;
            slot.again = slot.role != Role::Main;
        }
    }
}
